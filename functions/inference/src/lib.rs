//! Runs the model on submitted photos.
//!
//! Triggered by the queue. Reads the record and the photo. Writes, in this order: the claim; then
//! either the overlay of the class activation map (blob store), where there is one, the finished
//! record, with a description where the template writes it, and after it the raw outputs (cache), or
//! the released record and the message's visibility.
//! A message may come twice or late: the claim decides, not the message.

pub mod bundle;
pub mod config;
pub mod draft;
pub mod jpeg;
pub mod manifest;
pub mod map;
pub mod model;
pub mod picture;
pub mod quality;
pub mod room;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lambda_events::event::sqs::{BatchItemFailure, SqsBatchResponse, SqsEvent, SqsMessage};
use chrono::TimeDelta;
use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};
use shared::Error;
use shared::cache::PredictionCache;
use shared::clock::{Clock, Timestamp};
use shared::crash::{self, Point};
use shared::job::{self, FailureCode, InferenceOutcome, Input, Job, Policy, Quality, Record, Refused, Status, Timings};
use shared::lease::put_leased;
use shared::llm::template;
use shared::message::Message;
use shared::metrics;
use shared::ports::{BlobStore, JobQueue, JobStore};
use shared::telemetry;
use shared::transition::{NotMoved, transition};
use tracing::{Instrument, Span};

use crate::model::{Model, RawOutputs};
use crate::picture::Picture;
use crate::room::{Held, Room};

/// What inference works with.
pub struct Inference<J, Q, B> {
    pub jobs: J,
    pub queue: Q,
    pub blobs: B,
    pub cache: PredictionCache,
    /// Keys the cache, so that who can read it cannot try photos against it.
    pub cache_secret: Vec<u8>,
    pub model: Arc<Model>,
    /// Whether descriptions come from the template: then no job waits for one.
    pub template_describes: bool,
    pub room: Room,
    pub clock: Clock,
    pub policy: Policy,
}

/// What becomes of a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing is left to do for it.
    Acknowledge,
    /// It comes back after this long.
    Retry(TimeDelta),
    /// It comes back, later each time.
    Again,
}

/// A job's way through the model.
struct Worked {
    outcome: InferenceOutcome,
    timings: Timings,
    /// Fresh outputs, for the cache.
    outputs: Option<RawOutputs>,
    /// The overlay of the class activation map, a PNG. It is there where the reading says so.
    map: Option<Vec<u8>>,
}

impl Worked {
    /// Without an answer of the network.
    fn without(outcome: InferenceOutcome, timings: Timings) -> Self {
        Self { outcome, timings, outputs: None, map: None }
    }
}

impl<J: JobStore, Q: JobQueue, B: BlobStore> Inference<J, Q, B> {
    /// Works a batch, each message by itself. `deadline` is the invocation's end, and with it that
    /// of every lease taken here. `turn` is the first message's, where it has one already.
    pub async fn handle(&self, event: SqsEvent, deadline: Timestamp, mut turn: Option<Held>) -> SqsBatchResponse {
        let mut response = SqsBatchResponse::default();
        for record in event.records {
            if !self.settle(&record, deadline, turn.take()).await {
                let mut failure = BatchItemFailure::default();
                failure.item_identifier = record.message_id.unwrap_or_default();
                response.batch_item_failures.push(failure);
            }
        }
        response
    }

    /// Works one message; `false` where it must come back.
    async fn settle(&self, record: &SqsMessage, deadline: Timestamp, turn: Option<Held>) -> bool {
        let outcome = match Message::decode(record.body.as_deref().unwrap_or("")) {
            Ok(message) => self.process(message, deadline, turn).await,
            Err(error) => {
                let message_id = record.message_id.as_deref().unwrap_or("");
                tracing::error!(message.id = message_id, error.code = "unreadable_message", error.chain = %error, "message not read");
                // Soon, and as often as the queue allows: then it is a dead letter, and somebody looks.
                Outcome::Retry(self.policy.backoff)
            }
        };
        let delay = match outcome {
            Outcome::Acknowledge => None,
            Outcome::Retry(delay) => Some(delay),
            Outcome::Again => Some(self.policy.doubled(self.policy.backoff, receives(record) - 1)),
        };
        match delay {
            None => true,
            Some(delay) => {
                let seconds = u32::try_from(delay.num_seconds()).unwrap_or(0);
                let receipt = record.receipt_handle.as_deref().unwrap_or("");
                if let Err(error) = self.queue.set_visibility(receipt, seconds).await {
                    // It comes back when its first visibility timeout ends.
                    tracing::warn!(error.chain = error.chain(), "message not hidden");
                }
                crash::here(Point::InferenceHidden);
                false
            }
        }
    }

    /// The rule for one message. Without a `turn` it waits for one.
    pub async fn process(&self, message: Message, lease_until: Timestamp, turn: Option<Held>) -> Outcome {
        let result = match message {
            Message::Infer { id } => self.infer(id, lease_until, turn).await,
            Message::Forget { id } => self.forget(id).await,
            // Another queue's: here it becomes a dead letter, and somebody looks.
            Message::Deliver { .. } | Message::Answer { .. } => Err(Error::internal("a message of another queue")),
        };
        result.unwrap_or_else(not_worked)
    }

    async fn infer(&self, id: uuid::Uuid, lease_until: Timestamp, turn: Option<Held>) -> Result<Outcome, Error> {
        // A lease runs, and an attempt counts, for photos that are nearly there.
        let turn = match turn {
            Some(turn) => turn,
            None => self.room.turn().await?,
        };
        let Some(Record::Job(job)) = self.jobs.get(id).await? else { return Ok(Outcome::Acknowledge) };
        let span = telemetry::job_span(job.id, &job.trace_id);
        let infer = async { self.infer_job(&job, lease_until, turn).await.unwrap_or_else(not_worked) };
        // Boxed: with every store's futures inside, the compiler finds the hosts' nested too deep.
        Ok(Box::pin(infer).instrument(span).await)
    }

    async fn infer_job(&self, job: &Job, lease_until: Timestamp, turn: Held) -> Result<Outcome, Error> {
        let now = self.clock.now();
        let claim = |job: &Job| Ok((job.claim_inference(now, lease_until, &self.policy)?, ()));
        let job = match transition(&self.jobs, job, claim).await {
            Ok((job, ())) => job,
            // Worked already, being worked, or sweep's to end: this message has nothing to add.
            Err(NotMoved::Refused(_) | NotMoved::Gone) => return Ok(Outcome::Acknowledge),
            Err(NotMoved::Store(error)) => return Err(error),
        };
        crash::here(Point::InferenceClaimed);
        match self.work(&job, turn).await {
            Ok(worked) => {
                let worked = self.with_map(&job, worked).await;
                self.finish(&job, self.with_description(&job, worked)).await
            }
            Err(error) => self.release(&job, &error).await,
        }
    }

    /// Stores the overlay before the record that names it: who reads of a map finds it. Where that is not
    /// possible the reading goes without, as it does where the network draws none.
    async fn with_map(&self, job: &Job, mut worked: Worked) -> Worked {
        let Some(png) = worked.map.take() else { return worked };
        let key = job::map_key(job.id, &self.model.digest);
        let stored = put_leased(&self.blobs, job, self.clock.now(), &key, png).await;
        match (stored, &mut worked.outcome) {
            (Ok(()), _) => crash::here(Point::InferenceMapStored),
            (Err(error), InferenceOutcome::Read { reading, .. }) => {
                tracing::warn!(error.code = error.code().as_str(), error.chain = error.chain(), "map not stored");
                reading.has_map = false;
            }
            (Err(_), _) => {}
        }
        worked
    }

    /// Adds the template's description, where no LLM is to write one.
    fn with_description(&self, job: &Job, mut worked: Worked) -> Worked {
        if let InferenceOutcome::Read { reading, description, .. } = &mut worked.outcome
            && self.template_describes
            && job.describe
            && reading.abstained.is_none()
        {
            let started = Instant::now();
            *description = Some(template::describe(reading, None));
            worked.timings.describe = Some(millis(started));
        }
        worked
    }

    async fn finish(&self, job: &Job, worked: Worked) -> Result<Outcome, Error> {
        let now = self.clock.now();
        let finish = |current: &Job| {
            let mut next = current.finish_inference(job.claim, worked.outcome.clone(), now, &self.policy)?;
            let earlier = std::mem::replace(&mut next.timings_ms, worked.timings.clone());
            next.timings_ms.queued = earlier.queued;
            next.timings_ms.total = earlier.total;
            Ok((next, ()))
        };
        let done = match transition(&self.jobs, job, finish).await {
            Ok((done, ())) => done,
            Err(NotMoved::Refused(refused)) => return Ok(lost(job, refused)),
            Err(NotMoved::Gone) => return Ok(Outcome::Acknowledge),
            Err(NotMoved::Store(error)) => return Err(error),
        };
        crash::here(Point::InferenceFinished);
        // Only after the record names the key: what nobody knows of, nobody can erase.
        if let (Some(key), Some(outputs)) = (&done.cache_key, &worked.outputs) {
            let ttl = (done.input.expires_at() - now).to_std().unwrap_or(Duration::ZERO);
            self.cache.put(key, serde_json::to_vec(outputs).map_err(Error::internal)?, ttl).await;
        }
        crash::here(Point::InferenceCached);
        metrics::photo_read(&done);
        tracing::info!(job.status = done.status.as_str(), job.attempts = done.attempts.inference, "photo read");
        Ok(Outcome::Acknowledge)
    }

    async fn release(&self, job: &Job, cause: &Error) -> Result<Outcome, Error> {
        tracing::warn!(
            error.code = cause.code().as_str(),
            error.chain = cause.chain(),
            job.attempts = job.attempts.inference,
            "photo not read"
        );
        let now = self.clock.now();
        let release = |current: &Job| Ok((current.release_inference(job.claim, now, &self.policy)?, ()));
        let released = match transition(&self.jobs, job, release).await {
            Ok((released, ())) => released,
            Err(NotMoved::Refused(refused)) => return Ok(lost(job, refused)),
            Err(NotMoved::Gone) => return Ok(Outcome::Acknowledge),
            Err(NotMoved::Store(error)) => return Err(error),
        };
        crash::here(Point::InferenceReleased);
        Ok(match released.status {
            Status::Pending => Outcome::Retry(released.inference_backoff(&self.policy)),
            _ => Outcome::Acknowledge,
        })
    }

    /// Erases the cache entry of a deleted job, and says so in its tombstone once no worker can
    /// put it back.
    async fn forget(&self, id: uuid::Uuid) -> Result<Outcome, Error> {
        let Some(Record::Tombstone(tombstone)) = self.jobs.get(id).await? else { return Ok(Outcome::Acknowledge) };
        let Some(key) = &tombstone.cache_key else { return Ok(Outcome::Acknowledge) };
        if !self.cache.remove(key).await {
            return Ok(Outcome::Again);
        }
        crash::here(Point::InferenceForgotten);
        if let Some(forgotten) = tombstone.forgotten(self.clock.now()) {
            let fence = Record::Tombstone(tombstone).fence();
            // Where sweep was faster the tombstone is due, and the order comes once more.
            self.jobs.replace(fence, &Record::Tombstone(forgotten)).await?;
        }
        Ok(Outcome::Acknowledge)
    }

    /// From the stored photo to an outcome. Errors are those that another attempt may cure.
    async fn work(&self, job: &Job, turn: Held) -> Result<Worked, Error> {
        let Input::Photo(photo) = &job.input else { return Err(Error::internal("a job of no photo is pending")) };
        // Before the photo is fetched: those who wait hold no bytes.
        let place = self.room.place().await?;
        let mut timings = Timings::default();
        let started = Instant::now();
        let Some(bytes) = self.blobs.get(&job::photo_key(job.id)).await? else {
            let outcome = InferenceOutcome::Failed { code: FailureCode::PhotoMissing };
            return Ok(Worked::without(outcome, timings));
        };
        timings.fetch = Some(millis(started));
        let key = self.cache_key(job, photo.orientation, &bytes);
        let cached = self.cache.get(&key).await.and_then(|value| serde_json::from_slice(&value).ok());
        let (model, orientation) = (Arc::clone(&self.model), photo.orientation);
        let memory = self.room.memory(picture::decoding_bytes(photo, &bytes)).await?;
        let span = Span::current();
        let work = move || {
            // Given back by the thread that works: it outlives a caller that has gone.
            let _held = (turn, place, memory);
            let _entered = span.entered();
            read_photo(&model, &bytes, orientation, cached, key, timings)
        };
        self.room.run(work).await
    }

    fn cache_key(&self, job: &Job, orientation: u8, photo: &[u8]) -> String {
        // HMAC takes keys of any length, so this cannot fail; an empty key would still be a key.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.cache_secret) else { return String::new() };
        mac.update(&Sha256::digest(job.caller.as_bytes()));
        mac.update(&Sha256::digest(photo));
        mac.update(&[orientation, picture::PREPROCESSING_VERSION]);
        mac.update(self.model.digest.as_bytes());
        let hex: String = mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        format!("outputs:{hex}")
    }
}

fn not_worked(error: Error) -> Outcome {
    tracing::error!(error.code = error.code().as_str(), error.chain = error.chain(), "message not worked");
    Outcome::Again
}

/// How often a message was received, this time included.
fn receives(record: &SqsMessage) -> u32 {
    let count = record.attributes.get("ApproximateReceiveCount").and_then(|count| count.parse().ok());
    count.unwrap_or(1).max(1)
}

/// Another worker or sweep has moved the job on: nothing was written, nothing is left to do.
fn lost(job: &Job, refused: Refused) -> Outcome {
    tracing::warn!(job.claim = job.claim, error.code = "claim_lost", error.chain = %refused, "claim lost");
    Outcome::Acknowledge
}

/// Decode, gate, network: everything that takes the processor's time.
fn read_photo(
    model: &Model,
    bytes: &[u8],
    orientation: u8,
    cached: Option<RawOutputs>,
    cache_key: String,
    mut timings: Timings,
) -> Worked {
    let failed = |code, timings| Worked::without(InferenceOutcome::Failed { code }, timings);
    let started = Instant::now();
    let Ok(picture) = picture::decode_for(bytes, orientation, &model.manifest.input) else {
        return failed(FailureCode::PhotoUnreadable, timings);
    };
    let Picture { pixels, side_px } = picture;
    timings.decode = Some(millis(started));

    let started = Instant::now();
    let Ok(quality) = gate(&pixels, side_px, &model.manifest.quality) else {
        return failed(FailureCode::PhotoUnreadable, timings);
    };
    timings.quality = Some(millis(started));
    if !quality.accepted {
        return Worked::without(InferenceOutcome::Retake { quality }, timings);
    }

    let (outputs, fresh) = match cached.filter(|outputs| model.fits(outputs)) {
        Some(outputs) => (outputs, false),
        None => {
            let started = Instant::now();
            let Ok(tensor) = picture::tensor(&pixels, &model.manifest.input) else {
                return failed(FailureCode::PhotoUnreadable, timings);
            };
            timings.preprocess = Some(millis(started));
            let started = Instant::now();
            let outputs = match model.run(&tensor) {
                Ok(outputs) => outputs,
                Err(error) => {
                    tracing::error!(error.code = "model_error", error.chain = %error, "model failed");
                    return failed(FailureCode::ModelError, timings);
                }
            };
            timings.inference = Some(millis(started));
            (outputs, true)
        }
    };
    let mut reading = model.read(&outputs);
    let map = match &outputs.map {
        // Of which class it speaks nobody is told after an abstention.
        Some(map) if reading.abstained.is_none() => map::overlay(map, pixels.width(), pixels.height()).ok(),
        _ => None,
    };
    reading.has_map = map.is_some();
    let outcome = InferenceOutcome::Read { reading, quality, cache_key: Some(cache_key), description: None };
    Worked { outcome, timings, outputs: fresh.then_some(outputs), map }
}

/// Measures an upright picture, perhaps reduced, against the manifest's thresholds. `side_px` is
/// the shorter side of the photo that it was made of.
///
/// # Errors
/// [`picture::Unreadable`] where it cannot be reduced.
pub fn gate(
    picture: &image::RgbImage,
    side_px: u32,
    thresholds: &quality::Thresholds,
) -> Result<Quality, picture::Unreadable> {
    let (pixels, width, height) = picture::gate_luma(picture)?;
    let measures = quality::measure(side_px, &quality::Luma { width, height, pixels: &pixels });
    let reasons = quality::reasons(&measures, thresholds);
    let measures: BTreeMap<String, f64> =
        serde_json::to_value(measures).ok().and_then(|value| serde_json::from_value(value).ok()).unwrap_or_default();
    Ok(Quality { accepted: reasons.is_empty(), reasons, measures })
}

fn millis(since: Instant) -> f64 {
    (since.elapsed().as_secs_f64() * 1e4).round() / 10.0
}
