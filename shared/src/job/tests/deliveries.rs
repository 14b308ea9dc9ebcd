//! Deliveries of a job's end.

use super::*;

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
