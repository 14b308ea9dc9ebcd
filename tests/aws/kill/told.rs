//! Who is told of an end: over a WebSocket, and by webhooks.

use chrono::{TimeDelta, Utc};
use reqwest::Method;
use serde_json::{Value, json};
use shared::api::admin::{KeyLimits, Scope};
use shared::auth::Identity;
use shared::aws::DynamoConnections;
use shared::crash::Point;
use shared::job::{Callback, Record};
use shared::message::Message;
use shared::ports::{Connection, Connections, JobStore, Subscribed};
use uuid::Uuid;

use super::{Expected, Kind, Scene, answered, id_of};
use crate::pipeline::record;
use crate::support::{of_stage, receiver, sdk, within};
use crate::webhooks;
use crate::websocket::Socket;

impl Scene<'_> {
    pub(super) async fn while_notifying(&self, usual: Expected) -> (Vec<Uuid>, Expected) {
        let id = self.pending().await;
        let connections = DynamoConnections::new(&sdk().await, of_stage("CONNECTIONS_TABLE_NAME"));
        let mut socket = Socket::connect(&self.user.http, &of_stage("API_URL"), &self.user.key).await;
        if self.point == Point::NotifyClosed {
            // Somebody who has gone, and whose end nobody was told of.
            let identity = Identity {
                caller: self.caller.clone(),
                scopes: vec![Scope::Jobs],
                key_id: None,
                limits: KeyLimits::default(),
                expires_at: None,
            };
            let gone = Connection { id: self.caller.clone(), identity, expires_at: Utc::now() + TimeDelta::hours(1) };
            connections.open(&gone).await.unwrap();
            assert_eq!(connections.subscribe(&gone, id).await.unwrap(), Subscribed::Done);
        } else {
            socket.subscribe(&id.to_string()).await;
            assert_eq!(socket.next().await.unwrap()["type"], "status", "{}", self.caller);
        }
        let moved = async || {
            within(&format!("{}: sweep sends", self.caller), async || {
                self.lambda.sweep().await;
                let Some(Record::Job(job)) = record(&id.to_string()).await else { panic!("{}", self.caller) };
                job.version > 1
            })
            .await;
        };
        self.lambda.killed_at_least_once("notify", self.point, moved).await;
        let ids = self.recover().await;
        // What was cut off comes again, and whoever is there is told of the end.
        socket.subscribe(&id.to_string()).await;
        let (frame, _) = socket.until_ended(&id.to_string()).await.unwrap();
        assert_eq!(frame["status"], "completed", "{}: {frame}", self.caller);
        let left = connections.subscribers(id).await.unwrap();
        assert!(left.iter().all(|it| it.connection != self.caller), "{}: who is gone is forgotten", self.caller);
        (ids, usual)
    }

    pub(super) async fn while_calling_back(&self, usual: Expected) -> (Vec<Uuid>, Expected) {
        let fails = self.kind != Kind::Webhook;
        receiver().answer(if fails { 503 } else { 200 });
        let submit = async || id_of(webhooks::submit(&self.user, "key").await).await;
        match self.point {
            Point::NotifyQueued => {
                let act = async || assert!(submit().await.is_some());
                self.lambda.killed_at_least_once("notify", self.point, act).await;
            }
            Point::SweepBuried => {
                let id = submit().await.unwrap();
                self.once_it_has_failed(&id, |job, delivery| {
                    job.due_at = Some(job.updated_at);
                    delivery.until = job.updated_at;
                })
                .await;
                self.kill(async || self.sweep_until_killed().await).await;
            }
            _ if self.kind == Kind::WebhookLast => {
                self.kill(async || self.try_for_the_last_time(&submit().await.unwrap()).await).await
            }
            _ => self.kill(async || assert!(submit().await.is_some())).await,
        }
        let id = submit().await.expect("the function goes on");
        let before = webhooks::told(&id).len();
        receiver().answer(200);
        self.ended(&id).await;
        if [Kind::WebhookLast, Kind::WebhookSwept].contains(&self.kind) {
            let request = self.user.request(Method::POST, "/admin/dead-letters/redrive").json(&json!({}));
            let redriven: Value = answered(request.send().await.unwrap()).unwrap().json().await.unwrap();
            assert!(redriven["redriven"].as_u64().unwrap() > 0, "{}: no dead letter", self.caller);
        }
        within(&format!("{}: the receiver is told", self.caller), async || {
            self.lambda.sweep().await;
            webhooks::is_delivered(&id).await
        })
        .await;
        let told = webhooks::told(&id);
        assert!(told.iter().all(|it| it.id() == told[0].id() && it.body == told[0].body), "{}", self.caller);
        assert!(told[0].id().starts_with(&format!("msg_{id}_")), "{}", self.caller);
        if self.point == Point::WebhookSettled {
            assert_eq!(told.len(), before, "{}: the receiver has it", self.caller);
        } else if self.point != Point::NotifyQueued {
            assert!(told.len() > 1, "{}: told again, or for the first time with success", self.caller);
        }
        (vec![id.parse().unwrap()], usual)
    }

    /// Changes a delivery once its first try has failed and its hours are over, but nobody has come yet.
    async fn once_it_has_failed(&self, id: &str, change: impl Fn(&mut shared::job::Job, &mut shared::job::Delivery)) {
        within(&format!("{}: the first try has failed", self.caller), async || {
            self.lambda.sweep().await;
            let Some(Record::Job(job)) = record(id).await else { panic!("{}", self.caller) };
            let Some(delivery) = job.delivery().filter(|delivery| delivery.not_before > job.updated_at) else {
                return false;
            };
            let mut delivery = shared::job::Delivery { not_before: job.updated_at, ..delivery.clone() };
            let mut due = shared::job::Job { version: job.version + 1, ..job.clone() };
            change(&mut due, &mut delivery);
            due.callback = job.callback.clone().map(|it| Callback { delivery: Some(delivery), ..it });
            self.jobs.replace(job.fence(), &Record::Job(due)).await.unwrap()
        })
        .await;
    }

    /// Hands webhook a message for a delivery that has failed seven times.
    async fn try_for_the_last_time(&self, id: &str) {
        self.once_it_has_failed(id, |_, delivery| delivery.tries = webhook::MAX_TRIES - 1).await;
        let body = Message::Deliver { id: id.parse().unwrap() }.encode();
        assert!(!self.hand_to_webhook(&body).await, "{}: it goes on", self.caller);
    }

    /// Whether webhook has worked it.
    async fn hand_to_webhook(&self, body: &str) -> bool {
        let message = json!({
            "messageId": "by hand",
            "receiptHandle": "by hand",
            "body": body,
            "attributes": {"ApproximateReceiveCount": "1"},
            "messageAttributes": {},
            "eventSource": "aws:sqs",
            "awsRegion": "us-east-1",
        });
        self.lambda.invoke("webhook", &json!({"Records": [message]})).await
    }

    pub(super) async fn while_putting_aside(&self) -> (Vec<Uuid>, Expected) {
        self.kill(async || assert!(!self.hand_to_webhook("no message").await)).await;
        assert!(self.hand_to_webhook("no message").await, "it comes again, and the function goes on");
        let sqs = aws_sdk_sqs::Client::new(&sdk().await);
        let letters = of_stage("WEBHOOK_DEAD_LETTER_QUEUE_URL");
        // Twice, since the first was not acknowledged: an operator sees both.
        let mut found = 0;
        within("both are put aside", async || {
            let received = sqs.receive_message().queue_url(&letters).max_number_of_messages(10).send().await.unwrap();
            for letter in received.messages() {
                assert_eq!(letter.body(), Some("no message"));
                let receipt = letter.receipt_handle().unwrap();
                sqs.delete_message().queue_url(&letters).receipt_handle(receipt).send().await.unwrap();
                found += 1;
            }
            found == 2
        })
        .await;
        (Vec::new(), Expected { claims: (0, 0), calls: 0, orphans: 0 })
    }
}
