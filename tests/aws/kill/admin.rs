//! What an operator does.

use chrono::Utc;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use shared::crash::Point;
use shared::job::{Policy, Record};
use shared::message::Message;
use shared::ports::JobStore;
use uuid::Uuid;

use super::{Expected, Scene, answered};
use crate::pipeline::record;
use crate::support::{of_stage, sdk, within};

impl Scene<'_> {
    pub(super) async fn while_keeping_keys(&self) -> (Vec<Uuid>, Expected) {
        let keys = async || {
            let answer = self.user.request(Method::GET, "/admin/keys").send().await.unwrap();
            let listed: Value = answer.json().await.unwrap();
            let of_ward = |key: &&Value| key["caller"] == format!("ward-of-{}", self.caller);
            listed["keys"].as_array().unwrap().iter().filter(of_ward).cloned().collect::<Vec<_>>()
        };
        let create = async || {
            let body = json!({"caller": format!("ward-of-{}", self.caller)});
            answered(self.user.request(Method::POST, "/admin/keys").json(&body).send().await.unwrap()).is_some()
        };
        if self.point == Point::AdminKeyWritten {
            self.kill(async || assert!(!create().await)).await;
        } else {
            assert!(create().await);
        }
        let made = keys().await;
        assert_eq!(made.len(), 1, "{}", self.caller);
        let path = format!("/admin/keys/{}", made[0]["id"].as_str().unwrap());
        let revoke = async || answered(self.user.request(Method::DELETE, &path).send().await.unwrap()).is_some();
        if self.point == Point::AdminKeyRevoked {
            self.kill(async || assert!(!revoke().await)).await;
        } else {
            assert!(revoke().await);
        }
        let revoked = keys().await;
        assert!(revoked[0]["revoked_at"].is_string(), "{}", self.caller);
        // Repeated, a revocation changes nothing.
        assert!(revoke().await);
        assert_eq!(keys().await, revoked, "{}", self.caller);
        (vec![], Expected { claims: (0, 0), calls: 0, orphans: 0 })
    }

    pub(super) async fn while_redriving(&self, usual: Expected) -> (Vec<Uuid>, Expected) {
        let id = self.pending().await;
        let Some(Record::Job(job)) = record(&id.to_string()).await else { panic!("{}", self.caller) };
        let (now, policy) = (Utc::now(), Policy { max_attempts: 1, ..Policy::default() });
        let claimed = job.claim_inference(now, now + policy.lease, &policy).unwrap();
        let failed = claimed.release_inference(claimed.claim, now, &policy).unwrap();
        assert!(self.jobs.replace(job.fence(), &Record::Job(claimed.clone())).await.unwrap());
        assert!(self.jobs.replace(claimed.fence(), &Record::Job(failed)).await.unwrap());
        let path = format!("/admin/jobs/{id}/redrive");
        let redrive = async || self.user.request(Method::POST, &path).send().await.unwrap().status();
        self.kill(async || assert!(redrive().await.is_server_error())).await;
        // Repeated: the job has moved on, and is not sent round twice.
        assert_eq!(redrive().await, StatusCode::CONFLICT, "{}", self.caller);
        (self.recover().await, usual)
    }

    pub(super) async fn while_moving_dead_letters(&self, usual: Expected) -> (Vec<Uuid>, Expected) {
        let id = self.pending().await;
        let sqs = aws_sdk_sqs::Client::new(&sdk().await);
        let letter = sqs.send_message().queue_url(of_stage("DEAD_LETTER_QUEUE_URL"));
        letter.message_body(Message::Infer { id }.encode()).send().await.unwrap();
        let redrive = async || {
            let request = self.user.request(Method::POST, "/admin/dead-letters/redrive").json(&json!({}));
            answered(request.send().await.unwrap())?.json::<Value>().await.unwrap()["redriven"].as_u64()
        };
        self.kill(async || assert_eq!(redrive().await, None)).await;
        if [Point::AdminPhotoLettersMoved, Point::AdminDeadLettersMoved].contains(&self.point) {
            assert_eq!(redrive().await, Some(0), "{}", self.caller);
        } else {
            // Whom the kill left hidden is seen again half a minute later.
            within(&format!("{}: the letter is moved", self.caller), async || redrive().await == Some(1)).await;
        }
        (self.recover().await, usual)
    }
}
