//! Prompts, up to their answer.

use super::*;

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
