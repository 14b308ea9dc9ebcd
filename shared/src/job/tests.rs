mod deliveries;
mod prompts;

use chrono::TimeDelta;

use super::*;
use crate::clock::from_millis;

fn policy() -> Policy {
    Policy { max_attempts: 3, ..Policy::default() }
}

fn at(seconds: i64) -> Timestamp {
    from_millis(1_700_000_000_000 + seconds * 1000)
}

fn lease(seconds: i64) -> Timestamp {
    at(seconds) + policy().lease
}

fn new(describe: bool) -> NewJob {
    let photo = Photo {
        content_type: "image/jpeg".into(),
        width: 200,
        height: 150,
        orientation: 1,
        size_bytes: 1,
        expires_at: at(0) + policy().photo_ttl,
    };
    NewJob {
        id: new_id(at(0)),
        caller: "local".into(),
        trace_id: "t".into(),
        describe,
        idempotency_key: None,
        callback_url: None,
        input: Input::Photo(photo),
    }
}

fn pending(describe: bool) -> Job {
    Job::new(new(describe), at(0), &policy())
}

fn reading(abstained: bool) -> Reading {
    let abstained = abstained.then_some(Abstention { reason: AbstainReason::LowConfidence });
    Reading { model_digest: "d".into(), predictions: Vec::new(), abstained, has_map: false }
}

fn quality() -> Quality {
    Quality { accepted: true, reasons: Vec::new(), measures: std::collections::BTreeMap::default() }
}

fn read(abstained: bool) -> InferenceOutcome {
    described(abstained, None)
}

fn described(abstained: bool, description: Option<Description>) -> InferenceOutcome {
    InferenceOutcome::Read { reading: reading(abstained), quality: quality(), cache_key: Some("k".into()), description }
}

fn description() -> Description {
    Description { text: "t".into(), source: DescriptionSource::Template, version: "v".into(), fallback: None }
}

fn processing() -> Job {
    pending(true).claim_inference(at(1), lease(1), &policy()).unwrap()
}

fn awaiting() -> Job {
    let job = processing();
    job.finish_inference(job.claim, read(false), at(2), &policy()).unwrap()
}

fn describing() -> Job {
    awaiting().claim_enrichment(at(3), lease(3), &policy()).unwrap()
}

fn asked() -> Job {
    let stored = StoredPrompt { size_bytes: 7, expires_at: at(0) + policy().photo_ttl, connection: None };
    Job::new(NewJob { input: Input::Prompt(stored), ..new(false) }, at(0), &policy())
}

fn answering() -> Job {
    asked().claim_enrichment(at(1), at(3600), &policy()).unwrap()
}

fn answer(content: AnswerContent) -> LlmAnswer {
    let (finish_reason, prompt_tokens, completion_tokens) = (Some("stop".into()), Some(1), None);
    LlmAnswer { content, finish_reason, prompt_tokens, completion_tokens, latency_ms: 1, cost_usd: None }
}

/// What holds of every record that is ever written.
fn assert_invariants(job: &Job) {
    let open = job.status.is_open();
    let undelivered = job.delivery().is_some_and(|delivery| delivery.outcome.is_none());
    assert_eq!(job.due_at.is_some(), open || undelivered, "due if and only if there is work ahead: {job:?}");
    assert!(open || job.lease_until.is_none(), "ended jobs are held by nobody: {job:?}");
    match job.dispatch {
        None => {}
        Some(Dispatch::Enrichment) => assert_eq!(job.status, Status::AwaitingDescription, "{job:?}"),
        Some(Dispatch::Webhook) => assert!(!open && undelivered, "{job:?}"),
    }
    assert!(job.delivery().is_none() || !open, "nobody is told of the end before it: {job:?}");
    assert!(!(job.dispatch.is_some() && job.lease_until.is_some()), "a marker and a lease exclude each other: {job:?}");
    assert_eq!(job.status == Status::Failed, job.failure.is_some(), "{job:?}");
    assert!(job.lease_until.is_none() || job.lease_until == job.due_at, "sweep looks when the lease ends: {job:?}");
}

#[test]
fn a_photo_goes_from_pending_to_completed() {
    let done = describing().finish_description(2, description(), at(4), &policy()).unwrap();
    assert_eq!(done.status, Status::Completed);
    assert_eq!((done.version, done.claim), (5, 2));
    assert_eq!(done.timings_ms.total, Some(4000.0));
    assert_invariants(&done);
}

#[test]
fn a_description_that_comes_with_the_reading_ends_the_job_in_the_same_write() {
    let finish = |job: &Job, abstained| {
        let outcome = described(abstained, Some(description()));
        job.finish_inference(1, outcome, at(3), &policy()).unwrap()
    };
    let told = Job { callback: Some(Callback { url: String::new(), delivery: None }), ..processing() };
    let done = finish(&told, false);
    assert_eq!((done.status, done.version, done.claim, done.seq()), (Status::Completed, 3, 1, 3));
    assert_eq!((done.description.clone(), done.attempts.enrichment), (Some(description()), 0));
    assert_eq!(done.dispatch, Some(Dispatch::Webhook));
    assert_invariants(&done);
    assert_eq!(done.finish_inference(1, read(false), at(4), &policy()), Err(Refused::Ended));
    // Words about no prediction, and words that nobody asked for.
    for job in [finish(&processing(), true), finish(&Job { describe: false, ..processing() }, false)] {
        assert_eq!((job.status, &job.description), (Status::Completed, &None));
        assert_invariants(&job);
    }
}

#[test]
fn a_description_at_once_is_a_claim_and_its_end_in_one_write() {
    let job = awaiting();
    let done = job.describe_at_once(description(), at(4), &policy()).unwrap();
    let claimed = job.claim_enrichment(at(4), lease(4), &policy()).unwrap();
    let in_two = claimed.finish_description(2, description(), at(4), &policy()).unwrap();
    assert_eq!(done, Job { version: 4, ..in_two });
    assert_invariants(&done);
    let told = Job { callback: Some(Callback { url: String::new(), delivery: None }), ..awaiting() };
    let done = told.describe_at_once(description(), at(4), &policy()).unwrap();
    assert_eq!((done.version, done.seq()), (4, 4));
    assert_eq!(done.describe_at_once(description(), at(5), &policy()), Err(Refused::Ended));
    assert_eq!(describing().describe_at_once(description(), at(4), &policy()), Err(Refused::Leased));
}

#[test]
fn no_description_and_abstention_complete_at_once() {
    for (describe, abstained) in [(false, false), (true, true), (false, true)] {
        let job = pending(describe).claim_inference(at(1), lease(1), &policy()).unwrap();
        let done = job.finish_inference(1, read(abstained), at(2), &policy()).unwrap();
        assert_eq!(done.status, Status::Completed);
        assert!(done.description.is_none() && done.dispatch.is_none());
        assert_invariants(&done);
    }
}

#[test]
fn a_live_lease_is_respected_and_an_expired_one_taken_over() {
    let job = processing();
    assert_eq!(job.claim_inference(at(2), lease(2), &policy()), Err(Refused::Leased));
    let late = 1 + policy().lease.num_seconds();
    let taken = job.claim_inference(at(late), lease(late), &policy()).unwrap();
    assert_eq!(taken.claim, 2);
    assert_eq!(taken.finish_inference(1, read(false), at(late + 1), &policy()), Err(Refused::Stale));
    assert!(taken.finish_inference(2, read(false), at(late + 1), &policy()).is_ok());
}

#[test]
fn a_worker_whose_lease_was_swept_changes_nothing() {
    let (swept, action) = processing().sweep(at(1000), &policy(), |_| description()).unwrap();
    assert_eq!((swept.status, action), (Status::Pending, SweepAction::SendInfer));
    assert_eq!(swept.finish_inference(1, read(false), at(1001), &policy()), Err(Refused::Stale));
    let (swept, action) = describing().sweep(at(1000), &policy(), |_| description()).unwrap();
    assert_eq!((swept.status, action), (Status::AwaitingDescription, SweepAction::Marked));
    assert_eq!(swept.finish_description(2, description(), at(1001), &policy()), Err(Refused::Stale));
    assert_eq!(swept.defer_description(2, None, at(1001), &policy()), Err(Refused::Stale));
}

#[test]
fn a_second_delivery_of_a_change_finds_no_marker() {
    assert_eq!(describing().claim_enrichment(at(4), lease(4), &policy()), Err(Refused::Leased));
}

#[test]
fn releases_double_their_backoff_and_the_last_one_fails_the_job() {
    let mut job = pending(true);
    let mut delays = Vec::new();
    for second in [1, 1001] {
        job = job.claim_inference(at(second), lease(second), &policy()).unwrap();
        job = job.release_inference(job.claim, at(second), &policy()).unwrap();
        assert_eq!(job.status, Status::Pending);
        delays.push((job.due_at.unwrap() - at(second)).num_seconds());
        assert_invariants(&job);
    }
    assert_eq!(delays, [5, 10]);
    job = job.claim_inference(at(2001), lease(2001), &policy()).unwrap();
    job = job.release_inference(job.claim, at(2001), &policy()).unwrap();
    assert_eq!(
        job.failure,
        Some(Failure { stage: Stage::Inference, code: FailureCode::AttemptsExhausted, retryable: true })
    );
    assert_invariants(&job);
}

#[test]
fn a_description_that_keeps_failing_is_left_to_the_template() {
    let mut job = describing();
    for second in [10, 1010] {
        job = job.defer_description(job.claim, Some(TimeDelta::seconds(30)), at(second), &policy()).unwrap();
        assert_eq!(job.due_at, Some(at(second + 30)), "Retry-After is honoured");
        assert_invariants(&job);
        job = job.sweep(at(second + 30), &policy(), |_| description()).unwrap().0;
        job = job.claim_enrichment(at(second + 31), lease(second + 31), &policy()).unwrap();
    }
    assert_eq!(job.defer_description(job.claim, None, at(2010), &policy()), Err(Refused::Exhausted));
    // The worker may also die instead of finishing with the template: sweep does it then.
    let (done, action) = job.sweep(at(9000), &policy(), |_| description()).unwrap();
    assert_eq!((done.status, action), (Status::Completed, SweepAction::Ended));
    assert!(done.description.is_some());
    assert_invariants(&done);
}

#[test]
fn sweep_doubles_its_interval_and_leaves_alone_what_is_not_due() {
    let mut job = pending(true);
    assert_eq!(job.sweep(at(119), &policy(), |_| description()), Err(Refused::NotDue));
    let mut waits = Vec::new();
    for _ in 0..8 {
        let now = job.due_at.unwrap();
        job = job.sweep(now, &policy(), |_| description()).unwrap().0;
        waits.push((job.due_at.unwrap() - now).num_seconds());
    }
    assert_eq!(waits, [120, 240, 480, 960, 1920, 3600, 3600, 3600]);
}

#[test]
fn the_deadline_fails_a_photo_and_completes_a_description() {
    let late = at(0) + policy().deadline;
    let failed = pending(true).sweep(late, &policy(), |_| description()).unwrap().0;
    assert_eq!(failed.failure.as_ref().unwrap().code, FailureCode::DeadlineExceeded);
    let done = awaiting().sweep(late, &policy(), |_| description()).unwrap().0;
    assert_eq!(done.status, Status::Completed);
    for job in [failed, done] {
        assert_invariants(&job);
    }
}

#[test]
fn a_job_that_nobody_claims_ends_at_its_deadline() {
    let deadline = at(0) + policy().deadline;
    for (mut job, ends_as) in [(pending(true), Status::Failed), (awaiting(), Status::Completed)] {
        while job.status.is_open() {
            let due = job.due_at.unwrap();
            assert!(due <= deadline, "due at {due}, the deadline is {deadline}");
            job = job.sweep(due, &policy(), |_| description()).unwrap().0;
        }
        assert_eq!((job.status, job.updated_at), (ends_as, deadline));
    }
}

#[test]
fn a_redrive_starts_afresh_unless_the_photo_has_expired() {
    let failed = pending(true).sweep(at(0) + policy().deadline, &policy(), |_| description()).unwrap().0;
    let later = at(0) + TimeDelta::days(2);
    let again = failed.redrive(later, &policy()).unwrap();
    assert_eq!((again.status, again.due_at, again.attempts), (Status::Pending, Some(later), Attempts::default()));
    assert_eq!(again.deadline_at, later + policy().deadline);
    assert_invariants(&again);
    assert_eq!(failed.redrive(failed.input.expires_at(), &policy()), Err(Refused::InputExpired));
    assert_eq!(awaiting().redrive(later, &policy()), Err(Refused::WrongState));
}

#[test]
fn a_damaged_photo_fails_for_good() {
    let outcome = InferenceOutcome::Failed { code: FailureCode::PhotoUnreadable };
    let failed = processing().finish_inference(1, outcome, at(2), &policy()).unwrap();
    assert_eq!(failed.status, Status::Failed);
    assert_eq!(failed.redrive(at(3), &policy()), Err(Refused::WrongState));
    assert_invariants(&failed);
}

#[test]
fn an_ended_job_refuses_every_move() {
    let done = describing().finish_description(2, description(), at(4), &policy()).unwrap();
    let (now, until) = (at(90_000_000), lease(90_000_000));
    assert_eq!(done.claim_inference(now, until, &policy()), Err(Refused::Ended));
    assert_eq!(done.claim_enrichment(now, until, &policy()), Err(Refused::Ended));
    assert_eq!(done.finish_inference(2, read(false), now, &policy()), Err(Refused::Ended));
    assert_eq!(done.finish_description(2, description(), now, &policy()), Err(Refused::Ended));
    assert_eq!(done.sweep(now, &policy(), |_| description()), Err(Refused::NotDue));
}

#[test]
fn ids_sort_by_time_and_tell_it() {
    let ids: Vec<_> = (0..5).map(|second| new_id(at(second))).collect();
    assert!(ids.is_sorted());
    assert_eq!(id_time(ids[3]), Some(at(3)));
}

#[test]
fn a_record_reads_back_as_it_was_written() {
    let done = answering().finish_answer(1, answer(AnswerContent::Text("a".into())), at(2), &policy()).unwrap();
    for record in [
        Record::Job(describing()),
        Record::Job(asked()),
        Record::Job(done),
        Record::Tombstone(awaiting().tombstone(at(5), &policy())),
    ] {
        let text = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record);
    }
}

#[test]
fn a_tombstone_keeps_neither_photo_nor_result() {
    let text = serde_json::to_string(&Record::Tombstone(awaiting().tombstone(at(5), &policy()))).unwrap();
    for word in ["photo", "reading", "predictions", "quality", "description"] {
        assert!(!text.contains(word), "{text}");
    }
}

#[test]
fn a_tombstone_is_due_until_the_cache_entry_is_erased_after_the_last_lease() {
    let tombstone = awaiting().tombstone(at(0), &policy());
    assert_eq!(tombstone.forgotten(at(119)), None, "a worker may still put the entry back");
    let swept = tombstone.swept(at(120), &policy());
    assert_eq!(swept.due_at, Some(at(240)));
    assert_eq!(swept.swept(at(240), &policy()).due_at, Some(at(480)), "a cache that is down is waited for");
    let forgotten = swept.forgotten(at(241)).unwrap();
    assert_eq!((forgotten.cache_key.as_deref(), forgotten.due_at), (None, Some(at(241))));
    assert_eq!(forgotten.swept(at(242), &policy()).due_at, None);
}
