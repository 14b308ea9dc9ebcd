//! A record as the model keeps it, and back.

use std::collections::BTreeMap;

use super::super::*;
use super::{Outcome, at, policy, tick_of};

/// What of a record decides its future; the rest is left out so that equal futures are one state.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Kept {
    pub(super) prompt: bool,
    pub(super) status: &'static str,
    pub(super) claim: u64,
    pub(super) attempts: (u32, u32),
    pub(super) redispatches: u32,
    pub(super) deadline: u8,
    pub(super) due: Option<u8>,
    pub(super) lease: Option<u8>,
    pub(super) marked: bool,
    pub(super) failure: Option<(bool, bool)>,
    pub(super) read: bool,
    pub(super) described: bool,
    pub(super) answered: bool,
    /// Where somebody wants to be told of the end, how far that is.
    pub(super) callback: Option<Option<KeptDelivery>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct KeptDelivery {
    pub(super) seq: u64,
    pub(super) not_before: u8,
    pub(super) until: u8,
    /// Whether it was made, once it has ended.
    pub(super) made: Option<bool>,
}

pub(super) fn kept(job: &Job) -> Kept {
    Kept {
        prompt: job.is_prompt(),
        status: job.status.as_str(),
        claim: job.claim,
        attempts: (job.attempts.inference, job.attempts.enrichment),
        redispatches: job.redispatches,
        deadline: tick_of(job.deadline_at),
        due: job.due_at.map(tick_of),
        lease: job.lease_until.map(tick_of),
        marked: job.dispatch.is_some(),
        failure: job.failure.as_ref().map(|failure| (failure.stage == Stage::Inference, failure.retryable)),
        read: job.reading.is_some(),
        described: job.description.is_some(),
        answered: job.answer.is_some(),
        callback: job.callback.as_ref().map(|callback| callback.delivery.as_ref().map(kept_delivery)),
    }
}

pub(super) fn kept_delivery(delivery: &Delivery) -> KeptDelivery {
    KeptDelivery {
        seq: delivery.seq,
        not_before: tick_of(delivery.not_before),
        until: tick_of(delivery.until),
        made: delivery.outcome.map(|outcome| outcome == DeliveryOutcome::Delivered),
    }
}

pub(super) fn delivery(kept: &KeptDelivery) -> Delivery {
    let outcome = |made| if made { DeliveryOutcome::Delivered } else { DeliveryOutcome::GivenUp };
    // How often was tried decides nothing here: any try may be the last.
    let (not_before, until, outcome) = (at(kept.not_before), at(kept.until), kept.made.map(outcome));
    Delivery { seq: kept.seq, not_before, until, tries: 0, carrier: None, outcome }
}

pub(super) fn new_job(prompt: bool, told: bool) -> Job {
    let expires_at = at(0) + policy().photo_ttl;
    let photo = Photo { content_type: String::new(), width: 1, height: 1, orientation: 1, size_bytes: 1, expires_at };
    let stored = StoredPrompt { size_bytes: 1, expires_at, connection: None };
    let new = NewJob {
        id: Uuid::nil(),
        caller: String::new(),
        trace_id: String::new(),
        describe: true,
        idempotency_key: None,
        callback_url: told.then(String::new),
        input: if prompt { Input::Prompt(stored) } else { Input::Photo(photo) },
    };
    Job::new(new, at(0), &policy())
}

/// When those jobs end of whose end somebody is to be told: what they went through before is walked without.
pub(super) const END: u8 = 8;

pub(super) fn photo_at_its_end() -> Job {
    let (policy, lease) = (policy(), at(END) + policy().lease);
    let job = new_job(false, true).claim_inference(at(END - 1), lease, &policy).unwrap();
    numbered(job.finish_inference(1, Outcome::Abstained.full(), at(END), &policy).unwrap(), 0)
}

pub(super) fn prompt_at_its_end() -> Job {
    numbered(new_job(true, true).sweep(at(END), &policy(), |_| description()).unwrap().0, 0)
}

/// Versions are left out of what is kept; a job ends once for each time it is sent round.
pub(super) fn numbered(mut job: Job, redrives: u8) -> Job {
    let delivery = job.callback.as_mut().and_then(|callback| callback.delivery.as_mut());
    delivery.into_iter().for_each(|delivery| delivery.seq = redrives.into());
    job
}

pub(super) fn job(kept: &Kept) -> Job {
    let statuses = [
        Status::Pending,
        Status::Processing,
        Status::AwaitingDescription,
        Status::Completed,
        Status::NeedsRetake,
        Status::Failed,
    ];
    let stage = |inference| if inference { Stage::Inference } else { Stage::Enrichment };
    Job {
        status: statuses.into_iter().find(|status| status.as_str() == kept.status).unwrap(),
        claim: kept.claim,
        attempts: Attempts { inference: kept.attempts.0, enrichment: kept.attempts.1 },
        redispatches: kept.redispatches,
        deadline_at: at(kept.deadline),
        due_at: kept.due.map(at),
        lease_until: kept.lease.map(at),
        dispatch: match kept.callback {
            _ if !kept.marked => None,
            Some(Some(_)) => Some(Dispatch::Webhook),
            _ => Some(Dispatch::Enrichment),
        },
        callback: kept
            .callback
            .as_ref()
            .map(|told| Callback { url: String::new(), delivery: told.as_ref().map(delivery) }),
        failure: kept.failure.map(|(inference, retryable)| Failure {
            stage: stage(inference),
            code: FailureCode::AttemptsExhausted,
            retryable,
        }),
        reading: kept.read.then(|| reading(false)),
        description: kept.described.then(description),
        answer: kept.answered.then(answer),
        ..new_job(kept.prompt, false)
    }
}

pub(super) fn reading(abstained: bool) -> Reading {
    let abstained = abstained.then_some(Abstention { reason: AbstainReason::LowConfidence });
    Reading { model_digest: String::new(), predictions: Vec::new(), abstained, has_map: false }
}

pub(super) fn description() -> Description {
    let source = DescriptionSource::Template;
    Description { text: String::new(), source, version: String::new(), fallback: None }
}

pub(super) fn answer() -> LlmAnswer {
    LlmAnswer {
        content: AnswerContent::Text(String::new()),
        finish_reason: None,
        prompt_tokens: None,
        completion_tokens: None,
        latency_ms: 0,
        cost_usd: None,
    }
}

pub(super) fn trouble(passing: bool) -> LlmTrouble {
    LlmTrouble { code: FailureCode::AttemptsExhausted, passing, redrivable: passing }
}

pub(super) fn quality(accepted: bool) -> Quality {
    Quality { accepted, reasons: Vec::new(), measures: BTreeMap::new() }
}
