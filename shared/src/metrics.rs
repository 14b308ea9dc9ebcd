//! What is counted and measured, by name and unit.
//!
//! Functions call these after the write that they tell of, so that a job counts once however often
//! its message comes. On AWS `aws/emf.rs` writes it to the log, from where CloudWatch takes it; on the
//! embedded host nobody listens. Every metric has the dimension `STAGE`, cold starts `FUNCTION`
//! besides; what is of a job, a caller or a request is in no dimension.

use std::time::Duration;

use metrics::{Unit, counter, describe_histogram, histogram};

use crate::job::{Job, LlmCall, Status};

/// The namespace in CloudWatch. Alarms find it, like the names below, in `terraform/names.json`.
pub const NAMESPACE: &str = "Lesion";
/// The dimension of every metric.
pub const STAGE: &str = "STAGE";
/// The dimension that cold starts have besides.
pub const FUNCTION: &str = "FUNCTION";

const COLD_STARTS: &str = "ColdStarts";
const STUCK_JOBS: &str = "StuckJobs";
const ABSTENTIONS: &str = "Abstentions";
const RETAKES: &str = "Retakes";
const LLM_FAILURES: &str = "LlmFailures";
const LLM_PROMPT_TOKENS: &str = "LlmPromptTokens";
const LLM_COMPLETION_TOKENS: &str = "LlmCompletionTokens";
const LLM_COST: &str = "LlmCost";
const LLM_DURATION: &str = "LlmDuration";
const LLM_FIRST_BYTE_DURATION: &str = "LlmFirstByteDuration";
const LLM_CACHE_HITS: &str = "LlmCacheHits";
const QUEUED_DURATION: &str = "QueuedDuration";
const FETCH_DURATION: &str = "FetchDuration";
const DECODE_DURATION: &str = "DecodeDuration";
const QUALITY_DURATION: &str = "QualityDuration";
const PREPROCESS_DURATION: &str = "PreprocessDuration";
const INFERENCE_DURATION: &str = "InferenceDuration";
const DESCRIBE_DURATION: &str = "DescribeDuration";
const TOTAL_DURATION: &str = "TotalDuration";

/// Every metric and its unit. CloudWatch has none for money: the cost is in USD.
pub const ALL: &[(&str, Option<Unit>)] = &[
    (COLD_STARTS, Some(Unit::Count)),
    (STUCK_JOBS, Some(Unit::Count)),
    (ABSTENTIONS, Some(Unit::Count)),
    (RETAKES, Some(Unit::Count)),
    (LLM_FAILURES, Some(Unit::Count)),
    (LLM_PROMPT_TOKENS, Some(Unit::Count)),
    (LLM_COMPLETION_TOKENS, Some(Unit::Count)),
    (LLM_COST, None),
    (LLM_DURATION, Some(Unit::Milliseconds)),
    (LLM_FIRST_BYTE_DURATION, Some(Unit::Milliseconds)),
    (LLM_CACHE_HITS, Some(Unit::Count)),
    (QUEUED_DURATION, Some(Unit::Milliseconds)),
    (FETCH_DURATION, Some(Unit::Milliseconds)),
    (DECODE_DURATION, Some(Unit::Milliseconds)),
    (QUALITY_DURATION, Some(Unit::Milliseconds)),
    (PREPROCESS_DURATION, Some(Unit::Milliseconds)),
    (INFERENCE_DURATION, Some(Unit::Milliseconds)),
    (DESCRIBE_DURATION, Some(Unit::Milliseconds)),
    (TOTAL_DURATION, Some(Unit::Milliseconds)),
];

/// Tells the recorder the units.
pub fn describe() {
    for (name, unit) in ALL {
        if let Some(unit) = unit {
            describe_histogram!(*name, *unit, "");
        }
    }
}

/// A new instance of a function.
pub fn cold_start(function: &'static str) {
    counter!(COLD_STARTS, FUNCTION => function).increment(1);
}

/// Jobs that one run of sweep has given up. Zero counts as well: an alarm goes back by it.
pub fn jobs_given_up(jobs: u32) {
    histogram!(STUCK_JOBS).record(f64::from(jobs));
}

/// A job whose inference has ended, as it was written.
pub fn photo_read(job: &Job) {
    if job.status == Status::NeedsRetake {
        counter!(RETAKES).increment(1);
    }
    if job.reading.as_ref().is_some_and(|reading| reading.abstained.is_some()) {
        counter!(ABSTENTIONS).increment(1);
    }
    let timings = &job.timings_ms;
    duration(QUEUED_DURATION, timings.queued);
    duration(FETCH_DURATION, timings.fetch);
    duration(DECODE_DURATION, timings.decode);
    duration(QUALITY_DURATION, timings.quality);
    duration(PREPROCESS_DURATION, timings.preprocess);
    duration(INFERENCE_DURATION, timings.inference);
    // Where the template describes.
    duration(DESCRIBE_DURATION, timings.describe);
    duration(TOTAL_DURATION, timings.total);
}

/// A job whose description was written.
pub fn described(job: &Job) {
    duration(DESCRIBE_DURATION, job.timings_ms.describe);
    duration(TOTAL_DURATION, job.timings_ms.total);
}

/// A call to the LLM. `failed` where it gave no answer; one that was refused afterwards did not fail.
pub fn llm_called(call: &LlmCall, failed: bool) {
    counter!(LLM_FAILURES).increment(u64::from(failed));
    counter!(LLM_PROMPT_TOKENS).increment(call.prompt_tokens.unwrap_or(0));
    counter!(LLM_COMPLETION_TOKENS).increment(call.completion_tokens.unwrap_or(0));
    histogram!(LLM_DURATION).record(call.latency_ms as f64);
    if let Some(cost) = call.cost_usd {
        histogram!(LLM_COST).record(cost);
    }
}

/// A completion that chat has passed on, or has not got.
pub struct Completion {
    pub failed: bool,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub cost_usd: Option<f64>,
    /// From the request to its end.
    pub duration: Duration,
    /// From the request to the first byte of the answer; below `/v1/` alone.
    pub first_byte: Option<Duration>,
}

/// A completion at its end.
pub fn completion_relayed(completion: &Completion) {
    let millis = |duration: Duration| duration.as_secs_f64() * 1e3;
    counter!(LLM_FAILURES).increment(u64::from(completion.failed));
    counter!(LLM_PROMPT_TOKENS).increment(completion.prompt_tokens);
    counter!(LLM_COMPLETION_TOKENS).increment(completion.completion_tokens);
    histogram!(LLM_DURATION).record(millis(completion.duration));
    duration(LLM_FIRST_BYTE_DURATION, completion.first_byte.map(millis));
    if let Some(cost) = completion.cost_usd {
        histogram!(LLM_COST).record(cost);
    }
}

/// A completion that the proxy had from before.
pub fn completion_cached() {
    counter!(LLM_CACHE_HITS).increment(1);
}

fn duration(name: &'static str, millis: Option<f64>) {
    if let Some(millis) = millis {
        histogram!(name).record(millis);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn what_the_alarms_name_is_what_is_measured() {
        let names: Value = serde_json::from_str(include_str!("../../terraform/names.json")).unwrap();
        assert_eq!((&names["metric_namespace"], &names["metric_dimension"]), (&NAMESPACE.into(), &STAGE.into()));
        assert_eq!(names["metrics"]["stuck_jobs"], STUCK_JOBS);
        assert_eq!(names["metrics"]["llm_failures"], LLM_FAILURES);
        // An alarm on a further one has its line above.
        assert_eq!(names["metrics"].as_object().unwrap().len(), 2);
    }
}
