//! Prompts, over HTTP and a WebSocket, and completions.

use std::time::Duration;

use chrono::{TimeDelta, Utc};
use futures_util::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};
use shared::account::Month;
use shared::api::admin::KeyLimits;
use shared::aws::DynamoCallers;
use shared::crash::Point;
use shared::ports::Callers;
use uuid::Uuid;

use super::{Expected, Kind, Scene, answered, id_of};
use crate::llm_server::Behaviour;
use crate::support::{of_stage, sdk};
use crate::websocket::{Socket, open as open_socket, ticket};

impl Scene<'_> {
    /// Submits a prompt under one `Idempotency-Key`; `None` where no answer came.
    async fn ask(&self) -> Option<String> {
        let request = self.user.request(Method::POST, "/submit").header("idempotency-key", "key");
        id_of(request.json(&json!({"prompt": "What is a naevus?"})).send().await.unwrap()).await
    }

    pub(super) async fn while_asking(&self) -> (Vec<Uuid>, Expected) {
        // Too large for a record.
        let answer = "A growth of pigment cells. ".repeat(10_000);
        self.llm.behave(match self.point {
            Point::EnrichmentDeferred => Behaviour::Status(503, Some(8)),
            _ => Behaviour::Answer(answer.clone()),
        });
        let submitting = self.kind == Kind::SubmitPrompt;
        let ask = async || assert_eq!(self.ask().await.is_none(), submitting);
        match self.point {
            // The stream calls again until it has an answer. Another process has the message at once, and is not to be
            // ended in the middle of it by what lets the function go on.
            Point::EnrichmentQueued => {
                let ask = async || drop(self.ended(&self.ask().await.unwrap()).await);
                self.lambda.killed_at_least_once("enrichment", self.point, ask).await;
            }
            _ => self.kill(ask).await,
        }
        self.llm.behave(Behaviour::Answer(answer.clone()));
        let id = self.ask().await.expect("the function goes on");
        let result = self.ended(&id).await;
        assert!(result["content"] == answer, "{}: not the answer", self.caller);
        // Only an answer whose commit was cut off is asked for again, and one that never came.
        let asked_again = [Point::EnrichmentAnswered, Point::EnrichmentAnswerStored, Point::EnrichmentDeferred];
        let calls = if asked_again.contains(&self.point) { 2 } else { 1 };
        let once = submitting || [Point::EnrichmentQueued, Point::EnrichmentFinished].contains(&self.point);
        let orphans = u32::from(self.point == Point::SubmitPromptStored);
        (vec![id.parse().unwrap()], Expected { claims: (0, if once { 1 } else { 2 }), calls, orphans })
    }

    /// Opens a WebSocket and asks under the key of [`Scene::ask`], for as long as anybody would wait.
    async fn ask_over_a_socket(&self) {
        let url = of_stage("API_URL");
        let ask = async {
            let ticket = ticket(&self.user.http, &url, &self.user.key).await.ok()?;
            let mut socket = open_socket(&url, ticket["url"].as_str()?, &[]).await.ok()?;
            socket.send(json!({"action": "ask", "prompt": "What is a naevus?", "idempotency_key": "key"})).await;
            // Where the function dies the gateway says so, in words of its own.
            let ours = |text: &str| text.contains(r#""v":1"#) && !text.contains(r#""type":"result""#);
            while socket.0.next().await?.ok()?.to_text().is_ok_and(ours) {}
            Some(())
        };
        let _ = tokio::time::timeout(Duration::from_secs(8), ask).await;
    }

    pub(super) async fn while_asking_over_a_socket(&self) -> (Vec<Uuid>, Expected) {
        self.llm.behave(Behaviour::Answer("A growth.".to_owned()));
        let (function, _) = self.point.name().split_once('.').unwrap();
        self.lambda.killed_at_least_once(function, self.point, async || self.ask_over_a_socket().await).await;
        // The same key and prompt by HTTP: the same job, whatever became of the connection.
        let id = self.ask().await.expect("the function goes on");
        self.ended(&id).await;
        let mut socket = Socket::connect(&self.user.http, &of_stage("API_URL"), &self.user.key).await;
        socket.subscribe(&id).await;
        let (frame, _) = socket.until_ended(&id).await.unwrap();
        assert_eq!(frame["result"]["content"], "A growth.", "{}: {frame}", self.caller);
        // A text that was cut off is not gone on with under the same claim.
        let again = self.kind == Kind::SocketText;
        let (claims, calls) = if again { ((0, 2), 2) } else { ((0, 1), 1) };
        (vec![id.parse().unwrap()], Expected { claims, calls, orphans: 0 })
    }

    /// Asks the proxy twice, the first time to its function's end, and reads what the key has had.
    pub(super) async fn while_completing(&self) -> (Vec<Uuid>, Expected) {
        let url = format!("{}/v1/chat/completions", of_stage("CHAT_URL"));
        let body = json!({"model": "stand-in", "messages": [], "max_tokens": 20});
        let ask = async || {
            let request = self.user.http.post(&url).bearer_auth(&self.user.key).json(&body);
            answered(request.send().await.unwrap())?.json::<Value>().await.unwrap()["usage"]["total_tokens"].as_u64()
        };
        // The answer goes out behind its settlement: whoever dies in between has told nobody.
        self.kill(async || assert_eq!(ask().await, None)).await;
        let settled = self.point == Point::ChatSettled;
        let calls = usize::from(settled);
        assert_eq!(self.llm.calls() - self.calls_before, calls, "{}", self.caller);

        let callers = DynamoCallers::new(&sdk().await, of_stage("CALLERS_TABLE_NAME"));
        let id = self.user.key.split('_').nth(1).unwrap();
        let reserved = usize::from(!settled);
        // What is under way, and once it has fallen due: requests, estimated ones, tokens of the answers.
        let ledger = async || {
            let mut account = callers.find_account(id).await.unwrap();
            let under_way = account.under_way();
            account.refill(&KeyLimits::default(), Utc::now() + TimeDelta::minutes(21));
            assert_eq!(account.under_way(), 0, "{}", self.caller);
            let sum = |of: fn(&Month) -> u64| account.months.values().map(of).sum::<u64>();
            let months = (sum(|it| it.requests), sum(|it| it.estimated_requests), sum(|it| it.completion_tokens));
            (under_way, months)
        };
        let took = if settled { (1, 0, 10) } else { (1, 1, 20) };
        assert_eq!(ledger().await, (reserved, took), "{}", self.caller);
        assert_eq!(ask().await, Some(29), "{}: the key goes on", self.caller);
        assert_eq!(ledger().await, (reserved, (took.0 + 1, took.1, took.2 + 10)), "{}", self.caller);
        (vec![], Expected { claims: (0, 0), calls: calls + 1, orphans: 0 })
    }
}
