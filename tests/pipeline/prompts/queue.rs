//! Prompts in a queue of their own, as on AWS: what enrichment does with the feed, with that queue, and where one of
//! them is in trouble. The stores are the embedded ones.

use aws_lambda_events::event::sqs::SqsEvent;
use chrono::{TimeDelta, Utc};
use enrichment::Enrichment;
use local::Host;
use serde_json::json;
use shared::clock::{Clock, Timestamp};
use shared::embedded::{DirBlobStore, Hub, SqliteJobQueue, SqliteJobStore};
use shared::http::Caller;
use shared::job::{Dispatch, Job, Record, Status};
use shared::message::Message;
use shared::ports::{JobQueue, JobStore};
use shared::stream::Event;
use submit::Submission;
use tempfile::TempDir;
use uuid::Uuid;

use super::accept;
use crate::support::llm_server::{Behaviour, HONEST, LlmServer, explanation};
use crate::support::{mole, open};
use crate::webhooks::event;

/// A host whose loops do not run, and the function of a stage on its stores.
struct Stage {
    llm: LlmServer,
    host: Host,
    prompts: SqliteJobQueue,
    enrichment: Enrichment<SqliteJobStore, DirBlobStore, Hub, SqliteJobQueue>,
    folder: TempDir,
}

impl Stage {
    async fn new(script: impl IntoIterator<Item = Behaviour>) -> Self {
        let (llm, folder) = (LlmServer::start(script).await, tempfile::tempdir().unwrap());
        let (base_url, clock) = (llm.base_url(), Clock::manual(Utc::now()));
        let host = open(folder.path(), clock.clone(), &[("LLM_BASE_URL", &base_url), ("LLM_MODEL", "m")]).await;
        let prompts = SqliteJobQueue::open(&folder.path().join("prompts.sqlite"), clock.clone(), 5).unwrap();
        let enrichment = Enrichment {
            jobs: host.store.clone(),
            blobs: host.blobs.clone(),
            llm: host.enrichment.llm.clone(),
            push: host.hub.clone(),
            prompts: Some(prompts.clone()),
            clock,
            policy: host.config.policy,
        };
        Self { llm, host, prompts, enrichment, folder }
    }

    fn until(&self) -> Timestamp {
        self.host.clock.now() + TimeDelta::minutes(10)
    }

    async fn ask(&self) -> Uuid {
        accept(&self.host, "What is a naevus?").await
    }

    async fn job(&self, id: Uuid) -> Job {
        self.host.store.get(id).await.unwrap().and_then(Record::into_job).unwrap()
    }

    /// Hands a batch of the feed over; the changes that are to come back.
    async fn change(&self, ids: &[Uuid]) -> Vec<String> {
        let records = ids.iter().map(|id| {
            let keys = json!({"id": {"S": id}});
            json!({"dynamodb": {"Keys": keys, "SequenceNumber": format!("of {id}")}})
        });
        let event: Event = serde_json::from_value(json!({"Records": records.collect::<Vec<_>>()})).unwrap();
        let answer = self.enrichment.handle(event, self.until()).await;
        answer.batch_item_failures.into_iter().map(|failure| failure.item_identifier.unwrap()).collect()
    }

    /// Takes all that waits out of the queue.
    async fn messages(&self) -> Vec<(String, SqsEvent)> {
        let mut messages = Vec::new();
        while let Some(delivery) = self.prompts.receive(TimeDelta::minutes(1)).await.unwrap() {
            self.prompts.acknowledge(&delivery.receipt).await.unwrap();
            messages.push((delivery.body.clone(), event(&delivery)));
        }
        messages
    }
}

#[tokio::test]
async fn the_feed_sends_a_prompt_on_and_describes_what_came_with_it() {
    let stage = Stage::new([Behaviour::Answer(explanation(HONEST))]).await;
    let submission = Submission { image: mole(), describe: true, callback_url: None };
    let photo = stage.host.submit.accept(&Caller("local".into()), None, submission).await.unwrap();
    stage.host.inference.process(Message::Infer { id: photo }, stage.until(), None).await;
    let prompt = stage.ask().await;
    let before = stage.job(prompt).await;

    assert_eq!(stage.change(&[prompt, photo]).await, [] as [&str; 0]);
    assert_eq!((stage.job(photo).await.status, stage.llm.calls()), (Status::Completed, 1));
    // Nobody has claimed it: it is still the queue's.
    assert_eq!(stage.job(prompt).await, before);
    let sent: Vec<_> = stage.messages().await.into_iter().map(|(body, _)| body).collect();
    assert_eq!(sent, [Message::Answer { id: prompt }.encode()]);
}

#[tokio::test]
async fn a_prompt_that_is_sent_twice_is_answered_once_and_a_late_change_sends_nothing() {
    let stage = Stage::new([Behaviour::Answer("A growth.".into())]).await;
    let id = stage.ask().await;
    assert_eq!(stage.change(&[id]).await, [] as [&str; 0]);
    assert_eq!(stage.change(&[id]).await, [] as [&str; 0]);
    let messages = stage.messages().await;
    assert_eq!(messages.len(), 2);
    for (_, message) in messages {
        let answer = stage.enrichment.handle_prompts(message, stage.until()).await;
        assert!(answer.batch_item_failures.is_empty());
    }
    let ended = stage.job(id).await;
    assert_eq!((ended.status, ended.attempts.enrichment, stage.llm.calls()), (Status::Completed, 1, 1));
    assert_eq!(stage.change(&[id, Uuid::now_v7()]).await, [] as [&str; 0]);
    assert_eq!(stage.messages().await.len(), 0);
}

#[tokio::test]
async fn a_change_whose_prompt_cannot_be_sent_comes_back() {
    let stage = Stage::new([]).await;
    let id = stage.ask().await;
    let queue = rusqlite::Connection::open(stage.folder.path().join("prompts.sqlite")).unwrap();
    queue.execute_batch("ALTER TABLE messages RENAME TO elsewhere").unwrap();
    assert_eq!(stage.change(&[id]).await, [format!("of {id}")]);
    let job = stage.job(id).await;
    assert_eq!((job.status, job.dispatch), (Status::AwaitingDescription, Some(Dispatch::Enrichment)));
    queue.execute_batch("ALTER TABLE elsewhere RENAME TO messages").unwrap();
    assert_eq!(stage.change(&[id]).await, [] as [&str; 0]);
    assert_eq!((stage.messages().await.len(), stage.llm.calls()), (1, 0));
}

#[tokio::test]
async fn of_the_queue_of_prompts_what_is_no_prompt_is_reported_and_what_is_gone_is_done() {
    let stage = Stage::new([]).await;
    let id = Uuid::now_v7();
    stage.prompts.send_body("no message".into()).await.unwrap();
    stage.prompts.send(Message::Infer { id }).await.unwrap();
    stage.prompts.send(Message::Answer { id }).await.unwrap();
    let mut reported = Vec::new();
    for (_, message) in stage.messages().await {
        let answer = stage.enrichment.handle_prompts(message, stage.until()).await;
        reported.push(answer.batch_item_failures.len());
    }
    assert_eq!((reported, stage.llm.calls()), (vec![1, 1, 0], 0));
}

#[tokio::test]
async fn a_message_whose_record_cannot_be_read_comes_back() {
    let stage = Stage::new([]).await;
    let id = stage.ask().await;
    assert_eq!(stage.change(&[id]).await, [] as [&str; 0]);
    let [(_, message)] = stage.messages().await.try_into().unwrap();
    let jobs = rusqlite::Connection::open(stage.folder.path().join("jobs.sqlite")).unwrap();
    jobs.execute("UPDATE jobs SET record = '{}' WHERE id = ?1", [id.to_string()]).unwrap();
    // In the feed it would hold up what is behind it; here it ends as a dead letter.
    assert_eq!(stage.change(&[id]).await, [] as [&str; 0]);
    let answer = stage.enrichment.handle_prompts(message, stage.until()).await;
    assert_eq!(answer.batch_item_failures.len(), 1);
}
