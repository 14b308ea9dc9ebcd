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

fn trouble(passing: bool) -> LlmTrouble {
    LlmTrouble { code: FailureCode::LlmUnavailable, passing, redrivable: passing }
}

#[test]
fn a_prompt_starts_with_its_marker_and_is_completed_by_its_answer() {
    let job = asked();
    assert_eq!((job.status, job.dispatch), (Status::AwaitingDescription, Some(Dispatch::Enrichment)));
    assert_eq!(job.queued_bytes(), 7);
    assert_eq!(job.claim_inference(at(1), lease(1), &policy()), Err(Refused::WrongState));
    let job = answering();
    let done = job.finish_answer(1, answer(AnswerContent::Text("a".into())), at(200), &policy()).unwrap();
    assert_eq!((done.status, done.queued_bytes(), done.expires_at), (Status::Completed, 0, job.expires_at));
    assert_eq!((done.timings_ms.queued, done.timings_ms.total), (Some(1000.0), Some(200_000.0)));
    for job in [asked(), job, done] {
        assert_invariants(&job);
    }
}

#[test]
fn a_claim_lasts_as_long_as_its_work_may_and_no_longer_than_the_invocation() {
    let description = awaiting().claim_enrichment(at(3), at(3600), &policy()).unwrap();
    assert_eq!(description.lease_until, Some(at(3 + 120)));
    assert_eq!(answering().lease_until, Some(at(1 + 600)));
    let cut = asked().claim_enrichment(at(1), at(20), &policy()).unwrap();
    assert_eq!(cut.lease_until, Some(at(20)));
    // Until then its worker may still write.
    assert_eq!(answering().tombstone(at(5), &policy()).erase_after, at(5 + 600));
    assert_eq!(awaiting().tombstone(at(5), &policy()).erase_after, at(5 + 120));
}

#[test]
fn a_record_whose_answer_is_a_blob_goes_when_the_blob_may_go() {
    let content = AnswerContent::of(&"x".repeat(300_000), answering().id, 1);
    let done = answering().finish_answer(1, answer(content), at(2), &policy()).unwrap();
    assert_eq!(done.expires_at, at(2) + policy().photo_ttl);
}

#[test]
fn passing_trouble_defers_a_prompt_and_the_last_attempt_fails_it_until_it_is_redriven() {
    let mut job = answering();
    for second in [10, 1010] {
        job =
            job.release_answer(job.claim, trouble(true), Some(TimeDelta::seconds(30)), at(second), &policy()).unwrap();
        assert_eq!((job.status, job.due_at), (Status::AwaitingDescription, Some(at(second + 30))));
        assert_invariants(&job);
        job = job.sweep(at(second + 30), &policy(), |_| description()).unwrap().0;
        job = job.claim_enrichment(at(second + 31), at(9000), &policy()).unwrap();
    }
    let failed = job.release_answer(job.claim, trouble(true), None, at(2010), &policy()).unwrap();
    let failure = Failure { stage: Stage::Enrichment, code: FailureCode::LlmUnavailable, retryable: true };
    assert_eq!((failed.status, &failed.failure), (Status::Failed, &Some(failure)));
    assert_invariants(&failed);
    let again = failed.redrive(at(3000), &policy()).unwrap();
    let waits = (again.status, again.dispatch, again.due_at, again.attempts.enrichment);
    assert_eq!(waits, (Status::AwaitingDescription, Some(Dispatch::Enrichment), Some(at(3000)), 0));
    assert_invariants(&again);
    assert_eq!(failed.redrive(failed.input.expires_at(), &policy()), Err(Refused::InputExpired));
}

#[test]
fn what_does_not_pass_fails_a_prompt_at_once() {
    let failed = answering().release_answer(1, trouble(false), None, at(2), &policy()).unwrap();
    assert_eq!(failed.failure.as_ref().map(|failure| failure.retryable), Some(false));
    assert_eq!(failed.redrive(at(3), &policy()), Err(Refused::WrongState));
}

#[test]
fn sweep_gives_a_prompt_up_without_a_template_and_says_why() {
    let (failed, action) = asked().sweep(at(0) + policy().deadline, &policy(), |_| description()).unwrap();
    assert_eq!(action, SweepAction::Ended);
    let failure = Failure { stage: Stage::Enrichment, code: FailureCode::DeadlineExceeded, retryable: true };
    assert_eq!((&failed.failure, &failed.description), (&Some(failure), &None));
    let worn = Job { attempts: Attempts { inference: 0, enrichment: 3 }, ..answering() };
    let failed = worn.sweep(at(601), &policy(), |_| description()).unwrap().0;
    assert_eq!(failed.failure.unwrap().code, FailureCode::AttemptsExhausted);
}

#[test]
fn a_description_is_no_answer_and_an_answer_no_description() {
    let text = answer(AnswerContent::Text("a".into()));
    assert_eq!(describing().finish_answer(2, text, at(4), &policy()), Err(Refused::WrongState));
    assert_eq!(describing().release_answer(2, trouble(true), None, at(4), &policy()), Err(Refused::WrongState));
    assert_eq!(answering().finish_description(1, description(), at(4), &policy()), Err(Refused::WrongState));
    assert_eq!(answering().defer_description(1, None, at(4), &policy()), Err(Refused::WrongState));
}

/// As a build wrote it that knew photos alone.
#[test]
fn a_record_from_before_there_were_prompts_is_read_and_written_as_it_was() {
    let text = r#"{"record":"job","id":"01a1fd23-16e4-7867-8ba2-ef5c50a78321","caller":"local","status":"processing",
        "version":2,"claim":1,"attempts":{"inference":1,"enrichment":0},"redispatches":0,
        "created_at":"2026-11-20T10:00:00Z","updated_at":"2026-11-20T10:00:01Z","deadline_at":"2026-11-21T10:00:00Z",
        "due_at":"2026-11-20T10:02:01Z","lease_until":"2026-11-20T10:02:01Z","dispatch":null,
        "expires_at":"2026-12-20T10:00:00Z","trace_id":"t","describe":true,"idempotency_key":null,
        "photo":{"content_type":"image/jpeg","width":200,"height":150,"orientation":6,"size_bytes":3900,
        "expires_at":"2026-11-27T10:00:00Z"},"quality":null,"reading":null,"cache_key":null,"description":null,
        "llm_calls":[],"failure":null,"timings_ms":{"queued":1000.0}}"#;
    let Ok(Record::Job(job)) = serde_json::from_str(text) else { panic!("not read") };
    let Input::Photo(photo) = &job.input else { panic!("{job:?}") };
    assert_eq!((photo.orientation, photo.size_bytes, &job.answer), (6, 3900, &None));
    let before: serde_json::Value = serde_json::from_str(text).unwrap();
    assert_eq!(serde_json::to_value(Record::Job(job)).unwrap(), before);
}

fn to_be_told() -> Job {
    let new = NewJob { callback_url: Some("https://hooks.example/a".into()), ..new(false) };
    let job = Job::new(new, at(0), &policy()).claim_inference(at(1), lease(1), &policy()).unwrap();
    assert_invariants(&job);
    let ended = job.finish_inference(1, read(false), at(2), &policy()).unwrap();
    assert_invariants(&ended);
    ended
}

fn swept(job: &Job, seconds: i64) -> Result<(Job, SweepAction), Refused> {
    let swept = job.sweep(at(seconds), &policy(), |_| panic!("no description is due"));
    swept.inspect(|(job, _)| assert_invariants(job))
}

#[test]
fn the_write_that_ends_a_job_marks_its_delivery_due() {
    let job = to_be_told();
    assert_eq!((job.status, job.dispatch), (Status::Completed, Some(Dispatch::Webhook)));
    assert_eq!(job.due_at, Some(at(2) + policy().redispatch));
    let delivery = job.delivery().unwrap();
    assert_eq!((delivery.seq, delivery.not_before, delivery.outcome), (job.version, at(2), None));
    // Whoever asked for nothing is told nothing.
    let silent = pending(false).claim_inference(at(1), lease(1), &policy()).unwrap();
    let silent = silent.finish_inference(1, read(false), at(2), &policy()).unwrap();
    assert_eq!((silent.dispatch, silent.due_at, silent.delivery()), (None, None, None));
}

#[test]
fn a_lost_delivery_is_marked_again_later_each_time_and_given_up_after_days() {
    let mut job = to_be_told();
    for seconds in [122, 242, 482, 962] {
        assert_eq!(swept(&job, seconds - 1).unwrap_err(), Refused::NotDue);
        let (next, action) = swept(&job, seconds).unwrap();
        assert_eq!((action, next.dispatch), (SweepAction::Marked, Some(Dispatch::Webhook)));
        assert_eq!((next.seq(), next.updated_at), (job.seq(), job.updated_at), "nothing that a caller reads changes");
        job = next;
    }
    let days = policy().delivery_ttl.num_seconds() + 2;
    assert_eq!(swept(&job, days - 1).unwrap().1, SweepAction::Marked);
    let (gone, action) = swept(&job, days).unwrap();
    assert_eq!((action, gone.due_at, gone.dispatch), (SweepAction::Undelivered, None, None));
    assert_eq!(gone.delivery().unwrap().outcome, Some(DeliveryOutcome::GivenUp));
    assert_eq!(swept(&gone, 2 * days).unwrap_err(), Refused::NotDue);
}

#[test]
fn a_delivery_that_failed_waits_for_its_message_and_one_that_was_made_for_nothing() {
    let job = to_be_told();
    let seq = job.seq();
    let waits = job.postpone_delivery(seq, FIRST, at(303), &policy()).unwrap();
    assert_invariants(&waits);
    assert_eq!((waits.delivery().unwrap().not_before, waits.due_at), (at(303), Some(at(303) + policy().redispatch)));
    assert_eq!(waits.dispatch, None);
    assert_eq!(swept(&waits, 303).unwrap_err(), Refused::NotDue, "its message is on its way");
    let made = waits.settle_delivery(seq).unwrap();
    assert_invariants(&made);
    assert_eq!((made.due_at, made.seq()), (None, seq));
    assert_eq!(made.settle_delivery(seq), Err(Refused::Ended));
    assert_eq!(made.give_up_delivery(seq, FIRST), Err(Refused::Ended));
    assert_eq!(made.postpone_delivery(seq, FIRST, at(4), &policy()), Err(Refused::Ended));
}

const FIRST: FailedTry<'static> = FailedTry { failed_before: 0, message: "a" };

#[test]
fn the_message_that_failed_carries_the_next_try_and_its_twin_does_nothing() {
    let job = to_be_told();
    let turn = |job: &Job, message, seconds| job.delivery().unwrap().turn(message, at(seconds));
    assert_eq!((turn(&job, "a", 2), turn(&job, "b", 2)), (Turn::Try, Turn::Try));
    let waits = job.postpone_delivery(job.seq(), FIRST, at(303), &policy()).unwrap();
    assert_eq!((waits.delivery().unwrap().tries, turn(&waits, "b", 4)), (1, Turn::Nothing));
    assert_eq!(turn(&waits, "a", 4), Turn::Wait(TimeDelta::seconds(299)), "by whatever clock it comes early");
    // Whichever comes when it is time.
    assert_eq!((turn(&waits, "a", 303), turn(&waits, "b", 303)), (Turn::Try, Turn::Try));
    // Of two that failed at once one is counted.
    let twin = FailedTry { message: "b", ..FIRST };
    assert_eq!(waits.postpone_delivery(job.seq(), twin, at(900), &policy()), Err(Refused::Stale));
    assert_eq!(waits.give_up_delivery(job.seq(), twin), Err(Refused::Stale));
    // A record of an earlier build names no message.
    let mut earlier = waits.clone();
    earlier.callback.as_mut().unwrap().delivery.as_mut().unwrap().carrier = None;
    assert_eq!(turn(&earlier, "b", 302), Turn::Wait(TimeDelta::seconds(1)));
}

#[test]
fn an_operator_may_have_a_delivery_tried_again_that_was_given_up() {
    let job = to_be_told();
    let given_up = job.give_up_delivery(job.seq(), FIRST).unwrap();
    assert_invariants(&given_up);
    let turn = |message| given_up.delivery().unwrap().turn(message, at(9));
    assert_eq!((turn("a"), turn("b")), (Turn::Nothing, Turn::Try), "what was given up comes with another message");
    assert_eq!(
        given_up.settle_delivery(job.seq()).unwrap().delivery().unwrap().outcome,
        Some(DeliveryOutcome::Delivered)
    );
    let again = FailedTry { failed_before: given_up.delivery().unwrap().failed_tries(), message: "b" };
    let waits = given_up.postpone_delivery(job.seq(), again, at(14), &policy()).unwrap();
    assert_invariants(&waits);
    let delivery = waits.delivery().unwrap();
    assert_eq!((delivery.outcome, delivery.tries), (None, 1), "it is tried as often as at first");
}

#[test]
fn a_redrive_takes_the_delivery_of_the_failure_back_and_the_next_end_is_another() {
    let new = NewJob { callback_url: Some("https://hooks.example/a".into()), ..new(true) };
    let failed = Job::new(new, at(0), &policy()).sweep(at(90_000), &policy(), |_| description()).unwrap().0;
    assert_eq!((failed.status, failed.dispatch), (Status::Failed, Some(Dispatch::Webhook)));
    let seq = failed.seq();
    let again = failed.redrive(at(90_001), &policy()).unwrap();
    assert_invariants(&again);
    assert_eq!(again.delivery(), None);
    assert_eq!(again.settle_delivery(seq), Err(Refused::Stale), "a request that was under way");
    let again = again.claim_inference(at(90_002), lease(90_002), &policy()).unwrap();
    let ended = again.finish_inference(again.claim, read(true), at(90_003), &policy()).unwrap();
    assert!(ended.seq() > seq);
    assert_eq!(ended.give_up_delivery(seq, FIRST), Err(Refused::Stale));
    assert!(ended.settle_delivery(ended.seq()).is_ok());
}

#[test]
fn nobody_is_told_longer_than_the_result_lives() {
    let short = Policy { result_ttl: TimeDelta::days(1), ..policy() };
    let new = NewJob { callback_url: Some("https://hooks.example/a".into()), ..new(false) };
    let job = Job::new(new, at(0), &short).claim_inference(at(1), lease(1), &short).unwrap();
    let ended = job.finish_inference(1, read(false), at(2), &short).unwrap();
    assert_eq!(ended.delivery().unwrap().until, ended.expires_at);
}
