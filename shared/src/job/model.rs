//! Every state that one job, of a photo or of a prompt, can reach in a world where messages and
//! changes are lost, doubled and late, workers stall and die, sweep runs at any time, and the caller
//! deletes. Somebody may want to be told of its end, and not listen.
//!
//! Time is counted in ticks of a minute. A step is one conditional write: it is computed from the
//! record as it stands, which is what `transition` makes of a lost race.

mod kept;

use stateright::{Checker, Model, Property};

use chrono::TimeDelta;

use self::kept::*;
use super::*;

const TICKS: u8 = 12;

fn policy() -> Policy {
    Policy {
        max_attempts: 2,
        redispatch: TimeDelta::minutes(1),
        backoff: TimeDelta::minutes(1),
        max_delay: TimeDelta::minutes(4),
        lease: TimeDelta::minutes(2),
        prompt_lease: TimeDelta::minutes(3),
        deadline: TimeDelta::minutes(8),
        photo_ttl: TimeDelta::minutes(20),
        delivery_ttl: TimeDelta::minutes(4),
        ..Policy::default()
    }
}

fn at(tick: u8) -> Timestamp {
    from_millis(1_700_000_000_000) + TimeDelta::minutes(tick.into())
}

fn tick_of(moment: Timestamp) -> u8 {
    (moment - at(0)).num_minutes().try_into().unwrap()
}

/// How a worker's inference ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Outcome {
    Read,
    /// And described, by the template.
    Described,
    Abstained,
    Retake,
    Failed,
}

impl Outcome {
    fn full(self) -> InferenceOutcome {
        let read = |abstained, description| InferenceOutcome::Read {
            reading: reading(abstained),
            quality: quality(true),
            cache_key: None,
            description,
        };
        match self {
            Self::Read => read(false, None),
            Self::Described => read(false, Some(description())),
            Self::Abstained => read(true, None),
            Self::Retake => InferenceOutcome::Retake { quality: quality(false) },
            Self::Failed => InferenceOutcome::Failed { code: FailureCode::PhotoUnreadable },
        }
    }
}

/// One job and everything that may still act on it. Workers are the claim numbers they hold.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    now: u8,
    /// `None` once deleted.
    record: Option<Kept>,
    message: bool,
    change: bool,
    inferring: Vec<u64>,
    describing: Vec<u64>,
    /// The message to webhook.
    letter: bool,
    /// The deliveries that somebody has sent and had no answer to yet.
    sending: Vec<u64>,
    redrives: u8,
    /// A final state was left by something else than a redrive or a delete.
    reopened: bool,
    /// What was made was due again.
    retold: bool,
    /// A prediction, a description or an answer that a record had was not in the next.
    dropped: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Action {
    Tick,
    DeliverMessage,
    LoseMessage,
    DeliverChange,
    LoseChange,
    FinishInference(u64, Outcome),
    ReleaseInference(u64),
    FinishDescription(u64),
    DeferDescription(u64),
    /// Of a change as well, where nobody is asked.
    DescribeAtOnce,
    FinishAnswer(u64),
    /// Whether the trouble passes.
    ReleaseAnswer(u64, bool),
    DeliverLetter,
    LoseLetter,
    Told(u64),
    Refused(u64),
    /// By the last try.
    GivenUp(u64),
    Die(u64),
    /// All workers of a host die with it, and its next start ends the lease.
    Restart,
    Sweep,
    Redrive,
    Delete,
}

struct OneJob;

const FAILED: FailedTry<'static> = FailedTry { failed_before: 0, message: "" };

/// The step's record, or the refusal.
fn step(world: &World, action: Action) -> Option<Result<Job, Refused>> {
    let job = job(world.record.as_ref()?);
    let (now, policy) = (at(world.now), policy());
    let lease = now + policy.lease;
    Some(match action {
        Action::DeliverMessage => job.claim_inference(now, lease, &policy),
        Action::DeliverChange => job.claim_enrichment(now, lease, &policy),
        Action::FinishInference(claim, outcome) => job.finish_inference(claim, outcome.full(), now, &policy),
        Action::ReleaseInference(claim) => job.release_inference(claim, now, &policy),
        Action::FinishDescription(claim) => job.finish_description(claim, description(), now, &policy),
        Action::DeferDescription(claim) => job.defer_description(claim, None, now, &policy),
        Action::DescribeAtOnce => job.describe_at_once(description(), now, &policy),
        Action::FinishAnswer(claim) => job.finish_answer(claim, answer(), now, &policy),
        Action::ReleaseAnswer(claim, passing) => job.release_answer(claim, trouble(passing), None, now, &policy),
        Action::Sweep => job.sweep(now, &policy, |_| description()).map(|(job, _)| job),
        Action::Redrive => job.redrive(now, &policy),
        Action::Restart => job.lapse(now),
        Action::Told(seq) => job.settle_delivery(seq),
        Action::Refused(seq) => job.postpone_delivery(seq, FAILED, now + TimeDelta::minutes(1), &policy),
        Action::GivenUp(seq) => job.give_up_delivery(seq, FAILED),
        _ => return None,
    })
}

impl Model for OneJob {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let world = |prompt| World {
            now: 0,
            record: Some(kept(&new_job(prompt, false))),
            message: !prompt,
            change: prompt,
            inferring: Vec::new(),
            describing: Vec::new(),
            letter: false,
            sending: Vec::new(),
            redrives: 0,
            reopened: false,
            retold: false,
            dropped: false,
        };
        let ended = |job: Job| World {
            now: END,
            record: Some(kept(&job)),
            message: false,
            change: job.dispatch.is_some(),
            ..world(job.is_prompt())
        };
        vec![world(false), world(true), ended(photo_at_its_end()), ended(prompt_at_its_end())]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        if world.now < TICKS {
            actions.push(Action::Tick);
        }
        if world.message {
            actions.extend([Action::DeliverMessage, Action::LoseMessage]);
        }
        if world.change {
            actions.extend([Action::DeliverChange, Action::DescribeAtOnce, Action::LoseChange]);
        }
        for &claim in &world.inferring {
            let outcomes = [Outcome::Read, Outcome::Described, Outcome::Abstained, Outcome::Retake, Outcome::Failed];
            actions.extend(outcomes.map(|outcome| Action::FinishInference(claim, outcome)));
            actions.extend([Action::ReleaseInference(claim), Action::Die(claim)]);
        }
        for &claim in &world.describing {
            actions.extend([Action::FinishDescription(claim), Action::DeferDescription(claim), Action::Die(claim)]);
            actions.extend([Action::FinishAnswer(claim)]);
            actions.extend([true, false].map(|passing| Action::ReleaseAnswer(claim, passing)));
        }
        if world.letter {
            actions.extend([Action::DeliverLetter, Action::LoseLetter]);
        }
        for &seq in &world.sending {
            actions.extend([Action::Told(seq), Action::Refused(seq), Action::GivenUp(seq)]);
        }
        actions.extend([Action::Sweep, Action::Restart]);
        if world.redrives == 0 {
            actions.push(Action::Redrive);
        }
        if world.record.is_some() {
            actions.push(Action::Delete);
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut next = world.clone();
        match action {
            Action::Tick => next.now += 1,
            Action::LoseMessage => next.message = false,
            Action::LoseChange => next.change = false,
            Action::Delete => next.record = None,
            Action::LoseLetter => next.letter = false,
            Action::DeliverLetter => {
                let delivery = delivery_of(world)?;
                if delivery.made != Some(true)
                    && world.now >= delivery.not_before
                    && !world.sending.contains(&delivery.seq)
                {
                    next.sending.push(delivery.seq);
                }
            }
            // To notify.
            Action::DeliverChange if is_marked_for_webhook(world) => next.letter = true,
            Action::Die(claim) => {
                next.inferring.retain(|held| *held != claim);
                next.describing.retain(|held| *held != claim);
            }
            _ => {
                // A message or a change that is delivered stays: it may come again.
                let written = step(world, action)?.ok();
                match action {
                    Action::Restart => {
                        next.inferring.clear();
                        next.describing.clear();
                        next.sending.clear();
                    }
                    // A refused worker has learnt that it is stale, and is gone.
                    Action::FinishInference(claim, _) | Action::ReleaseInference(claim) => {
                        next.inferring.retain(|held| *held != claim);
                    }
                    Action::FinishDescription(claim)
                    | Action::DeferDescription(claim)
                    | Action::FinishAnswer(claim)
                    | Action::ReleaseAnswer(claim, _) => {
                        next.describing.retain(|held| *held != claim);
                    }
                    Action::Told(seq) | Action::Refused(seq) | Action::GivenUp(seq) => {
                        let place = next.sending.iter().position(|sent| *sent == seq)?;
                        next.sending.remove(place);
                    }
                    _ => {}
                }
                if let Some(mut job) = written {
                    match action {
                        Action::DeliverMessage => next.inferring.push(job.claim),
                        Action::DeliverChange => next.describing.push(job.claim),
                        Action::Redrive => next.redrives += 1,
                        _ => {}
                    }
                    let was_open = is_open(world);
                    next.reopened |= !was_open && job.status.is_open() && action != Action::Redrive;
                    let was_made = delivery_of(world).is_some_and(|delivery| delivery.made == Some(true));
                    next.retold |= was_made && job.due_at.is_some() && action != Action::Redrive;
                    next.dropped |= world.record.as_ref().is_some_and(|record| {
                        record.read && job.reading.is_none()
                            || record.described && job.description.is_none()
                            || record.answered && job.answer.is_none()
                    });
                    if was_open && !job.status.is_open() {
                        job = numbered(job, world.redrives);
                    }
                    next.message |= action == Action::Sweep && job.status == Status::Pending;
                    next.change |= job.dispatch.is_some();
                    next.record = Some(kept(&job));
                }
            }
        }
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("the record keeps its invariants", |_, world: &World| {
                world.record.as_ref().is_none_or(|record| keeps_invariants(&job(record)))
            }),
            Property::always("clock and sweep alone bring every job to an end", |_, world: &World| is_rescued(world)),
            Property::always("a stale worker changes nothing", |_, world: &World| {
                let Some(record) = &world.record else { return true };
                let stale = |claim: &u64| *claim != record.claim || record.lease.is_none();
                let refused = |action| step(world, action).is_some_and(|step| step.is_err());
                let inferring = world.inferring.iter().filter(|claim| stale(claim));
                let describing = world.describing.iter().filter(|claim| stale(claim));
                inferring
                    .flat_map(|claim| {
                        [Action::FinishInference(*claim, Outcome::Read), Action::ReleaseInference(*claim)]
                    })
                    .chain(describing.flat_map(|&claim| {
                        [
                            Action::FinishDescription(claim),
                            Action::DeferDescription(claim),
                            Action::FinishAnswer(claim),
                            Action::ReleaseAnswer(claim, false),
                        ]
                    }))
                    .all(refused)
            }),
            Property::always("no start costs an attempt or leaves a lease", |_, world: &World| {
                let Some(Ok(lapsed)) = step(world, Action::Restart) else { return true };
                let Some(record) = &world.record else { return true };
                let attempts = (lapsed.attempts.inference, lapsed.attempts.enrichment);
                attempts == record.attempts
                    && lapsed.claim == record.claim
                    && lapsed.sweep(at(world.now), &policy(), |_| description()).is_ok()
            }),
            Property::always("what a receiver has is not sent again", |_, world: &World| !world.retold),
            Property::always("a request from before a redrive changes nothing", |_, world: &World| {
                let current = delivery_of(world).map(|delivery| delivery.seq);
                let refused = |action| step(world, action).is_none_or(|step| step.is_err());
                let stale = world.sending.iter().filter(|seq| Some(**seq) != current);
                stale.flat_map(|&seq| [Action::Told(seq), Action::Refused(seq), Action::GivenUp(seq)]).all(refused)
            }),
            Property::always("a job ends once", |_, world: &World| !world.reopened),
            Property::always("what was made is never lost", |_, world: &World| !world.dropped),
            Property::always("a photo waits for words about a prediction", |_, world: &World| {
                let Some(record) = &world.record else { return true };
                record.status != "awaiting_description" || record.read || record.prompt
            }),
            Property::always("a prompt meets the LLM alone, a photo gets no answer", |_, world: &World| {
                let Some(record) = &world.record else { return true };
                let fits = if record.prompt {
                    record.attempts.0 == 0 && !record.read && !record.described
                } else {
                    !record.answered
                };
                fits && (!record.prompt || (record.status == "completed") == record.answered)
            }),
            Property::sometimes("a job is completed", |_, world: &World| is(world, "completed")),
            Property::sometimes("a job needs another photo", |_, world: &World| is(world, "needs_retake")),
            Property::sometimes("a job fails", |_, world: &World| is(world, "failed")),
            Property::sometimes("a prompt is answered", |_, world: &World| {
                world.record.as_ref().is_some_and(|record| record.answered)
            }),
            Property::sometimes("a redriven prompt is answered", |_, world: &World| {
                world.redrives == 1 && world.record.as_ref().is_some_and(|record| record.answered)
            }),
            Property::sometimes("a lease is taken over", |_, world: &World| {
                is(world, "processing") && world.inferring.len() == 2
            }),
            Property::sometimes("a delivery is made", |_, world: &World| is_made(world, true)),
            Property::sometimes("a delivery is given up", |_, world: &World| is_made(world, false)),
            Property::sometimes("the end of a redriven job is delivered", |_, world: &World| {
                world.redrives == 1 && is_made(world, true) && is(world, "completed")
            }),
            Property::sometimes("a redriven job is completed", |_, world: &World| {
                world.redrives == 1 && is(world, "completed")
            }),
        ]
    }
}

fn delivery_of(world: &World) -> Option<&KeptDelivery> {
    world.record.as_ref()?.callback.as_ref()?.as_ref()
}

fn is_made(world: &World, made: bool) -> bool {
    delivery_of(world).is_some_and(|delivery| delivery.made == Some(made))
}

fn is_open(world: &World) -> bool {
    world.record.as_ref().is_some_and(|record| job(record).status.is_open())
}

fn is_marked_for_webhook(world: &World) -> bool {
    world.record.as_ref().is_some_and(|record| job(record).dispatch == Some(Dispatch::Webhook))
}

fn is(world: &World, status: &str) -> bool {
    world.record.as_ref().is_some_and(|record| record.status == status)
}

fn keeps_invariants(job: &Job) -> bool {
    let open = job.status.is_open();
    let undelivered = job.delivery().is_some_and(|delivery| delivery.outcome.is_none());
    let marked = match job.dispatch {
        None => true,
        Some(Dispatch::Enrichment) => job.status == Status::AwaitingDescription,
        Some(Dispatch::Webhook) => undelivered,
    };
    job.due_at.is_some() == (open || undelivered)
        && marked
        && (open || job.lease_until.is_none())
        && (!open || job.delivery().is_none())
        && !(job.dispatch.is_some() && job.lease_until.is_some())
        && (job.lease_until.is_none() || job.lease_until == job.due_at)
        && (job.status == Status::Failed) == job.failure.is_some()
}

/// Whether the job ends, and nobody is told of it for ever, even if every message, change and worker is
/// lost from here on.
fn is_rescued(world: &World) -> bool {
    let Some(record) = &world.record else { return true };
    let mut job = job(record);
    for tick in world.now..world.now + 40 {
        if job.due_at.is_none() {
            return true;
        }
        if let Ok((swept, _)) = job.sweep(at(tick), &policy(), |_| description()) {
            job = swept;
        }
    }
    false
}

#[test]
fn no_reachable_state_is_stuck_loses_a_job_or_heeds_a_stale_worker() {
    let checker = OneJob.checker().threads(2).spawn_bfs().join();
    println!("{} states, {} of them different", checker.state_count(), checker.unique_state_count());
    checker.assert_properties();
    assert!(checker.is_done());
}
