//! A delete races submissions of the same photo: under one `Idempotency-Key`, or of one upload.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;

use futures_util::future::BoxFuture;
use result::Results;
use shared::callback::Destinations;
use shared::error::{Code, Error};
use shared::http::Caller;
use shared::ports::{BlobStore, JobQueue, JobStore};
use submit::body::ImageKey;
use submit::{Submission, Submit};
use tokio::sync::Semaphore;
use uuid::Uuid;

use super::{Bench, Blobs, Jobs, Queue, key_of};
use crate::support::backlog::JOBS;
use crate::support::llm_server::LlmServer;
use crate::support::numbered_mole;
use crate::uploads::upload_body;

/// What a client sends, perhaps again.
#[derive(Debug, Clone)]
enum Request {
    /// A photo under its own `Idempotency-Key`.
    Photo(usize),
    /// What was uploaded under this `image_key`.
    Upload(String),
}

impl Request {
    async fn send<J: JobStore, Q: JobQueue, B: BlobStore>(&self, submit: &Submit<J, Q, B>) -> Result<Uuid, Error> {
        match self {
            Self::Photo(number) => {
                let submission = Submission { image: numbered_mole(*number), describe: true, callback_url: None };
                Box::pin(submit.accept(&local(), Some(key_of(*number)), submission)).await
            }
            Self::Upload(image_key) => {
                let upload = ImageKey { image_key: image_key.clone(), describe: true, callback_url: None };
                Box::pin(submit.accept_upload(&local(), None, upload)).await
            }
        }
    }

    /// The moment at which a submission writes its record; two a call.
    fn writes_at(&self) -> usize {
        match self {
            // Behind: the key, the photo.
            Self::Photo(_) => 4,
            // The key, the upload, what was uploaded, the photo.
            Self::Upload(_) => 8,
        }
    }
}

fn local() -> Caller {
    Caller("local".into())
}

/// What meets what, at which moment of the latter.
#[derive(Debug, Clone, Copy)]
enum Race {
    /// The delete of a job that was read, and a second submission.
    Second(usize),
    /// The same submitted and deleted, and a first submission.
    Twin(usize),
    /// The delete of the same, which was submitted just before, and a first submission from the write of its record on.
    Taken(usize),
    /// A second submission, and the delete of a job that was read.
    Delete(usize),
}

/// Every race, up to the moment behind each.
fn races(twin: usize, taken: usize) -> Vec<Race> {
    let second = (0..=2).map(Race::Second).chain((0..=twin).map(Race::Twin));
    second.chain((0..=taken).map(Race::Taken)).chain((0..=8).map(Race::Delete)).collect()
}

/// What the submission in a race is answered.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// The id of what was deleted, as before the delete.
    Deleted,
    /// The id of a new job.
    New,
    Refused(Code),
}

/// The bench with what takes submissions and deletes, interrupted as well.
struct Desk {
    bench: Bench,
    submit: Submit<Jobs, Queue, Blobs>,
    results: Results<Jobs, Queue, Blobs>,
}

impl Desk {
    async fn new(folder: &Path, llm: &LlmServer) -> Self {
        let bench = Bench::new(folder, llm).await;
        let (jobs, queue, blobs) = (bench.jobs.clone(), bench.queue.clone(), bench.blobs.clone());
        let (clock, policy) = (bench.host.clock.clone(), bench.host.config.policy);
        let submit = Submit {
            jobs: jobs.clone(),
            queue: queue.clone(),
            blobs: blobs.clone(),
            clock: clock.clone(),
            policy,
            max_queued_bytes: bench.host.config.max_queued_bytes,
            has_llm: false,
            destinations: Destinations::default(),
            upload_turns: Semaphore::new(1),
        };
        let results = Results { jobs, queue, blobs, clock, policy };
        Self { bench, submit, results }
    }

    /// Sends without interruption.
    async fn send(&self, request: &Request) -> Result<Uuid, Error> {
        request.send(&self.bench.host.submit).await
    }

    async fn upload(&self, number: usize) -> Request {
        let photo = numbered_mole(number);
        let permit = self.bench.host.submit.permit(&local(), &upload_body(&photo)).await.unwrap();
        self.bench.host.blobs.put(&permit.image_key, photo).await.unwrap();
        Request::Upload(permit.image_key)
    }

    /// Submits, and has it read: the cache holds something of it.
    async fn read(&self, request: &Request) -> Uuid {
        let id = self.send(request).await.unwrap();
        self.bench.infer(id).await;
        id
    }

    /// Submits and deletes; the id.
    fn come_and_go(&self, request: &Request) -> BoxFuture<'static, Uuid> {
        let (submit, results) = (Arc::clone(&self.bench.host.submit), Arc::clone(&self.bench.host.results));
        let request = request.clone();
        Box::pin(async move {
            let id = request.send(&submit).await.unwrap();
            results.delete(&local(), &id.to_string()).await.unwrap();
            id
        })
    }

    /// What the submission was answered, and the id of what was deleted.
    async fn race(&self, race: Race, request: &Request) -> (Result<Uuid, Error>, Uuid) {
        let (bench, interrupt) = (&self.bench, self.bench.interrupt.clone());
        match race {
            Race::Second(moment) => {
                let id = self.read(request).await;
                let (answer, _) = bench.race(id, moment, request.send(&self.submit)).await;
                (answer, id)
            }
            Race::Twin(moment) => {
                let ((sender, deleted), twin) = (channel(), self.come_and_go(request));
                interrupt.arm(moment, async move { sender.send(twin.await).unwrap() });
                let answer = request.send(&self.submit).await;
                let is_over = interrupt.disarm();
                let id = if is_over { self.come_and_go(request).await } else { deleted.try_recv().unwrap() };
                (answer, id)
            }
            Race::Taken(moment) => {
                let (sender, deleted) = channel();
                let (submit, results) = (Arc::clone(&bench.host.submit), Arc::clone(&bench.host.results));
                let (same, again) = (request.clone(), interrupt.clone());
                interrupt.arm(request.writes_at(), async move {
                    let id = same.send(&submit).await.unwrap();
                    again.arm(moment, async move {
                        results.delete(&local(), &id.to_string()).await.unwrap();
                    });
                    sender.send(id).unwrap();
                });
                let answer = request.send(&self.submit).await;
                let id = deleted.try_recv().unwrap();
                if interrupt.disarm() {
                    bench.delete(id).await;
                }
                (answer, id)
            }
            Race::Delete(moment) => {
                let id = self.read(request).await;
                let (sender, answer) = channel();
                let (submit, again) = (Arc::clone(&bench.host.submit), request.clone());
                interrupt.arm(moment, async move { sender.send(again.send(&submit).await).unwrap() });
                self.results.delete(&local(), &id.to_string()).await.unwrap();
                let is_over = interrupt.disarm();
                let answer = if is_over { self.send(request).await } else { answer.try_recv().unwrap() };
                (answer, id)
            }
        }
    }
}

/// Plays 500 races. Of each there is in the end a tombstone or, where `expected` says so, a new job beside it.
async fn play(is_upload: bool, races: &[Race], expected: fn(Race) -> Answer) {
    let (folder, llm) = (tempfile::tempdir().unwrap(), LlmServer::start([]).await);
    let desk = Desk::new(folder.path(), &llm).await;
    let (mut deleted, mut kept) = (Vec::new(), Vec::new());
    for number in 0..JOBS {
        let request = if is_upload { desk.upload(number).await } else { Request::Photo(number) };
        let Some(&race) = races.get(number % (races.len() + 1)) else {
            kept.push(desk.send(&request).await.unwrap());
            continue;
        };
        let (answer, id) = desk.race(race, &request).await;
        let found = match &answer {
            Ok(answered) if *answered == id => Answer::Deleted,
            Ok(_) => Answer::New,
            Err(error) => Answer::Refused(error.code()),
        };
        assert_eq!(found, expected(race), "{race:?}");
        assert!(desk.bench.job(id).await.is_none(), "{race:?}: it is back");
        deleted.push(id);
        if found == Answer::New {
            let new = answer.unwrap();
            assert_eq!(desk.send(&request).await.unwrap(), new, "{race:?}: the key is the new job's");
            kept.push(new);
        }
    }
    desk.bench.settle(&[&deleted[..], &kept].concat()).await;
    assert_eq!(llm.calls(), kept.len(), "nobody is asked about what was deleted");
    desk.bench.assert_only(&deleted, kept, "submissions").await;
}

#[tokio::test]
async fn hundreds_submitted_again_while_they_are_deleted_are_gone_or_new_jobs_that_end() {
    play(false, &races(8, 3), |race| match race {
        // The key went with the job.
        Race::Second(0) | Race::Twin(0..=4) | Race::Delete(3..) => Answer::New,
        _ => Answer::Deleted,
    })
    .await;
}

#[tokio::test]
async fn hundreds_of_uploads_submitted_again_while_their_jobs_are_deleted_make_no_second_job() {
    play(true, &races(14, 5), |race| match race {
        // An upload makes one job, and is used up with it.
        Race::Second(0) | Race::Twin(0..=2 | 5..=8) | Race::Delete(3..) => Answer::Refused(Code::IdempotencyConflict),
        // What was uploaded is erased between the look at its record and the look at it.
        Race::Twin(3 | 4) => Answer::Refused(Code::NotFound),
        _ => Answer::Deleted,
    })
    .await;
}

/// Without a delete: the same request, sent again while the first is under way.
#[tokio::test]
async fn what_was_uploaded_and_is_submitted_twice_at_once_is_one_job_whose_id_both_are_given() {
    let (folder, llm) = (tempfile::tempdir().unwrap(), LlmServer::start([]).await);
    let desk = Desk::new(folder.path(), &llm).await;
    let mut ids = Vec::new();
    for moment in 0.. {
        let request = desk.upload(moment).await;
        let (sender, twin) = channel();
        let (submit, same) = (Arc::clone(&desk.bench.host.submit), request.clone());
        desk.bench.interrupt.arm(moment, async move { sender.send(same.send(&submit).await).unwrap() });
        let first = request.send(&desk.submit).await;
        let is_over = desk.bench.interrupt.disarm();
        let second = if is_over { desk.send(&request).await } else { twin.try_recv().unwrap() };
        assert!(first.is_ok(), "moment {moment}: {first:?}");
        assert_eq!(first.as_ref().unwrap(), &second.unwrap(), "moment {moment}");
        ids.push(first.unwrap());
        if is_over {
            break;
        }
    }
    assert!(ids.len() > 14, "{} moments", ids.len());
    desk.bench.settle(&ids).await;
    desk.bench.assert_only(&[], ids, "twins").await;
}
