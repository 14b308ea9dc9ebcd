//! Photos: submitted, uploaded, read, described, deleted, swept.

use chrono::{TimeDelta, Utc};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use shared::crash::Point;
use shared::job::{Record, new_id, photo_key};
use shared::ports::{BlobStore, JobStore};
use uuid::Uuid;

use super::{Expected, Kind, Scene, answered, id_of};
use crate::llm_server::{Behaviour, HONEST, explanation};
use crate::pipeline::record;
use crate::support::{hex_sha256, sample, within};

/// What makes a stage's LLM.
const LLM: [&str; 7] = [
    "LLM_BASE_URL",
    "LLM_MODEL",
    "LLM_MAX_TOKENS",
    "LLM_TEMPERATURE",
    "LLM_TIMEOUT_SECONDS",
    "LLM_PROMPT_USD_PER_MILLION",
    "LLM_COMPLETION_USD_PER_MILLION",
];

impl Scene<'_> {
    pub(super) async fn while_submitting(&self, usual: Expected) -> (Vec<Uuid>, Expected) {
        self.kill(async || assert_eq!(self.submit().await, None)).await;
        // What the second try stores lies under another id.
        let orphans = u32::from(self.point == Point::SubmitPhotoStored);
        (self.recover().await, Expected { orphans, ..usual })
    }

    pub(super) async fn while_uploading(&self, usual: Expected) -> (Vec<Uuid>, Expected) {
        let mut image_key = None;
        self.kill(async || assert_eq!(self.upload_and_submit(&mut image_key).await, None)).await;
        let id = self.upload_and_submit(&mut image_key).await.expect("the function goes on");
        self.ended(&id).await;
        let orphans = u32::from(self.point == Point::SubmitPhotoStored);
        (vec![id.parse().unwrap()], Expected { orphans, ..usual })
    }

    /// Uploads and submits as an app does: whatever step fails is begun again.
    async fn upload_and_submit(&self, image_key: &mut Option<String>) -> Option<String> {
        if image_key.is_none() {
            *image_key = Some(self.upload().await?);
        }
        let request = self.user.request(Method::POST, "/submit").json(&json!({"image_key": image_key}));
        id_of(request.send().await.unwrap()).await
    }

    async fn upload(&self) -> Option<String> {
        let photo = sample("mole-drawn.png");
        let body = json!({"content_type": "image/png", "size_bytes": photo.len(), "sha256": hex_sha256(&photo)});
        let answer = self.user.request(Method::POST, "/uploads").json(&body).send().await.unwrap();
        let permit: Value = answered(answer)?.json().await.unwrap();
        let headers = permit["headers"].as_object().unwrap().iter();
        let put = self.user.http.put(permit["url"].as_str().unwrap()).body(photo);
        let put = headers.fold(put, |put, (name, value)| put.header(name, value.as_str().unwrap()));
        assert_eq!(put.send().await.unwrap().status(), StatusCode::OK);
        Some(permit["image_key"].as_str().unwrap().to_owned())
    }

    pub(super) async fn while_inferring(&self, usual: Expected) -> (Vec<Uuid>, Expected) {
        // Photos that cannot be fetched, for as long as it is armed.
        let other: &[_] = if self.kind == Kind::InferenceRetry { &[("BUCKET", "lesion-of-nobody")] } else { &[] };
        let submit = async || assert!(self.submit().await.is_some());
        self.lambda.killed("inference", self.point, other, submit).await;
        // Once the record is written nothing is read again.
        let read = [Point::InferenceFinished, Point::InferenceCached].contains(&self.point);
        (self.recover().await, Expected { claims: (if read { 1 } else { 2 }, 1), ..usual })
    }

    pub(super) async fn while_describing(&self, usual: Expected) -> (Vec<Uuid>, Expected) {
        if self.kind == Kind::EnrichmentRetry {
            // Longer than a lease, so that the function waits no second try out.
            self.llm.behave(Behaviour::Status(503, Some(8)));
        }
        let without_llm: &[_] = if self.kind == Kind::Offline { &LLM.map(|name| (name, "")) } else { &[] };
        let submit = async || assert!(self.submit().await.is_some());
        self.lambda.killed("enrichment", self.point, without_llm, submit).await;
        self.llm.behave(Behaviour::Answer(explanation(HONEST)));
        // Only an answer whose commit was cut off is asked for again, and one that never came.
        let asked_again = [Point::EnrichmentAnswered, Point::EnrichmentDeferred].contains(&self.point);
        let described = self.point == Point::EnrichmentFinished;
        let claims = (1, if described { 1 } else { 2 });
        let calls = if self.kind == Kind::Offline { 0 } else { 1 + usize::from(asked_again) };
        (self.recover().await, Expected { claims, calls, ..usual })
    }

    pub(super) async fn while_deleting(&self, usual: Expected) -> (Vec<Uuid>, Expected) {
        let ids = self.recover().await;
        let id = ids[0];
        let Some(Record::Job(job)) = record(&id.to_string()).await else { panic!("{}", self.caller) };
        let cached = format!("cache/{}", job.cache_key.unwrap());
        assert!(self.blobs.get(&cached).await.unwrap().is_some(), "{}: the outputs are cached", self.caller);
        let path = format!("/result/{id}");
        let delete = async || answered(self.user.request(Method::DELETE, &path).send().await.unwrap()).is_some();
        match self.point {
            Point::ResultTombstoned | Point::ResultBlobsErased | Point::ResultForgetSent => {
                self.kill(async || assert!(!delete().await)).await;
            }
            Point::InferenceForgotten => self.kill(async || assert!(delete().await)).await,
            _ => {
                assert!(delete().await);
                self.kill(async || self.sweep_until_killed().await).await;
            }
        }
        let gone = self.user.request(Method::GET, &path).send().await.unwrap().status();
        assert_eq!(gone, StatusCode::NOT_FOUND, "{}", self.caller);
        within(&format!("{}: the tombstone is settled", self.caller), async || {
            self.lambda.sweep().await;
            match record(&id.to_string()).await {
                Some(Record::Tombstone(tombstone)) => tombstone.due_at.is_none() && tombstone.cache_key.is_none(),
                other => panic!("{}: {other:?}", self.caller),
            }
        })
        .await;
        assert_eq!(self.blobs.get(&photo_key(id)).await.unwrap(), None, "{}", self.caller);
        assert_eq!(self.blobs.get(&cached).await.unwrap(), None, "{}", self.caller);
        (vec![], usual)
    }

    pub(super) async fn while_sweeping(&self, usual: Expected) -> (Vec<Uuid>, Expected) {
        match self.kind {
            Kind::Sweep => drop(self.pending().await),
            Kind::SweepUpload => {
                let image_key = self.upload().await.unwrap();
                let id = image_key.rsplit('/').nth(1).unwrap();
                let Some(Record::Upload(upload)) = record(id).await else { panic!("{}", self.caller) };
                let fence = Record::Upload(upload.clone()).fence();
                // Its hour is over.
                let due = shared::job::Upload { version: upload.version + 1, due_at: Some(Utc::now()), ..upload };
                assert!(self.jobs.replace(fence, &Record::Upload(due)).await.unwrap());
            }
            _ => {
                let orphan = photo_key(new_id(Utc::now() - TimeDelta::hours(3)));
                self.blobs.put(&orphan, b"x".to_vec()).await.unwrap();
            }
        }
        self.kill(async || self.sweep_until_killed().await).await;
        (self.recover().await, usual)
    }
}
