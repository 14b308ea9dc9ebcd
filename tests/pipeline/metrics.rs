//! What is counted and logged of completions: values by name, from a recorder of this project's own and from the
//! real host's log.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ::metrics::{
    Counter, CounterFn, Gauge, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder, SharedString, Unit,
    set_default_local_recorder,
};
use reqwest::RequestBuilder;
use serde_json::{Value, json};

use crate::proxy::models_file;
use crate::support::llm_server::{Behaviour, LlmServer};
use crate::support::process::Process;
use crate::support::{Running, client, eventually};

/// Of 19 and 10 tokens, as the stand-in says, at 1 and 10 USD for a million.
const COST: f64 = 119e-6;
/// Before each piece of an answer. A stream of two words comes in six.
const PAUSE: Duration = Duration::from_millis(200);
const PAUSE_MS: f64 = 200.0;

/// Values by metric, in the order in which they came.
type Values = Arc<Mutex<BTreeMap<String, Vec<f64>>>>;

/// Keeps what the thread of a test counts.
#[derive(Default)]
struct Kept(Values);

struct Metric {
    name: String,
    values: Values,
}

impl Metric {
    fn push(&self, value: f64) {
        self.values.lock().unwrap().entry(self.name.clone()).or_default().push(value);
    }
}

impl CounterFn for Metric {
    fn increment(&self, value: u64) {
        self.push(value as f64);
    }

    fn absolute(&self, value: u64) {
        panic!("{} is set to {value}", self.name);
    }
}

impl HistogramFn for Metric {
    fn record(&self, value: f64) {
        self.push(value);
    }
}

impl Kept {
    fn metric(&self, key: &Key) -> Arc<Metric> {
        Arc::new(Metric { name: key.name().to_owned(), values: Arc::clone(&self.0) })
    }

    fn of(&self, name: &str) -> Vec<f64> {
        self.0.lock().unwrap().get(name).cloned().unwrap_or_default()
    }
}

impl Recorder for Kept {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.metric(key))
    }

    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(self.metric(key))
    }
}

/// `fast` has prices; `lame`, which it stands in for, has none.
fn models(llm: &LlmServer) -> Value {
    json!({
        "fast": {"base_url": llm.base_url(), "prompt_usd_per_million": 1, "completion_usd_per_million": 10},
        "lame": {"base_url": llm.base_url(), "fallback": "fast"},
    })
}

/// Asks for a whole answer, for a stream, for the first once more, for two that do not come, and for one that
/// another model gives.
async fn ask_for_six(llm: &LlmServer, url: &str) {
    let slow = || Behaviour::Slow(PAUSE, "A growth.".into());
    let down = || Behaviour::Status(503, None);
    llm.script([slow(), slow(), down(), down(), Behaviour::Refuse(400, "no".into()), down(), down(), slow()]);
    let body = |model: &str, question: &str, streamed: bool| {
        let messages = json!([{"role": "user", "content": question}]);
        json!({"model": model, "messages": messages, "stream": streamed, "temperature": 0})
    };
    for (body, status, cache) in [
        (body("fast", "a", false), 200, "miss"),
        (body("fast", "a", true), 200, ""),
        (body("fast", "a", false), 200, "hit"),
        (body("fast", "b", false), 502, ""),
        (body("fast", "c", false), 400, ""),
        (body("lame", "d", false), 200, "miss"),
    ] {
        let response = client().post(format!("{url}/v1/chat/completions")).json(&body).send().await.unwrap();
        let told = response.headers().get("x-cache").map_or("", |value| value.to_str().unwrap());
        assert_eq!((response.status().as_u16(), told), (status, cache), "{body}");
        response.bytes().await.unwrap();
    }
    assert_eq!(llm.calls(), 8);
}

/// On one thread: a recorder hears its own alone.
#[tokio::test]
async fn every_completion_is_counted_once_with_what_it_took() {
    let kept = Kept::default();
    let _listening = set_default_local_recorder(&kept);
    let llm = LlmServer::start([]).await;
    let (_folder, path) = models_file(&models(&llm));
    let host = Running::start(&[("LLM_MODELS_FILE", &path)]).await;
    ask_for_six(&llm, &host.url).await;
    eventually("five are counted", async || kept.of("LlmDuration").len() == 5).await;
    for (name, values) in [
        ("LlmPromptTokens", vec![19.0, 19.0, 0.0, 0.0, 19.0]),
        ("LlmCompletionTokens", vec![10.0, 10.0, 0.0, 0.0, 10.0]),
        // What did not come has no cost, which is not a cost of 0.
        ("LlmCost", vec![COST; 3]),
        // A refusal is its client's failure.
        ("LlmFailures", vec![0.0, 0.0, 1.0, 0.0, 0.0]),
        ("LlmCacheHits", vec![1.0]),
    ] {
        assert_eq!(kept.of(name), values, "{name}");
    }
    let (durations, first_bytes) = (kept.of("LlmDuration"), kept.of("LlmFirstByteDuration"));
    let [whole, stream, other] = first_bytes[..] else { panic!("{first_bytes:?}") };
    assert!(whole >= PAUSE_MS && stream >= PAUSE_MS && other >= PAUSE_MS, "{first_bytes:?}");
    assert!(durations[0] >= whole && durations[4] >= other, "{durations:?}, {first_bytes:?}");
    // Of the six pieces of a stream the first is meant.
    assert!(durations[1] >= 6.0 * PAUSE_MS && durations[1] - stream >= 2.0 * PAUSE_MS, "{durations:?}, {stream}");
}

/// An answer that does not say what it took.
const UNSAID: &str = r#"{"choices": [{"message": {"content": "A growth."}}]}"#;

fn converse(url: &str) -> RequestBuilder {
    let body = json!({"messages": [{"role": "user", "content": "What is a naevus?"}]});
    client().post(format!("{url}/chat")).json(&body)
}

#[tokio::test]
async fn every_answer_to_a_conversation_is_counted_once_with_what_it_took() {
    let kept = Kept::default();
    let _listening = set_default_local_recorder(&kept);
    let llm = LlmServer::start([]).await;
    let prices = [("LLM_PROMPT_USD_PER_MILLION", "1"), ("LLM_COMPLETION_USD_PER_MILLION", "10")];
    let host = Running::asking(&llm, &prices).await;
    let (slow, down) = (Behaviour::Slow(PAUSE, "A growth.".into()), Behaviour::Status(503, Some(0)));
    for (script, status) in [
        (vec![slow.clone()], 200),
        // Two tries, one call.
        (vec![down.clone(), slow], 200),
        (vec![Behaviour::Body(UNSAID)], 200),
        (vec![Behaviour::Status(400, None)], 502),
        (vec![Behaviour::Status(401, None)], 502),
        (vec![down; 3], 502),
    ] {
        llm.script(script);
        assert_eq!(converse(&host.url).send().await.unwrap().status().as_u16(), status);
    }
    llm.script([Behaviour::Stall]);
    assert!(converse(&host.url).timeout(PAUSE).send().await.unwrap_err().is_timeout());
    eventually("who has left is counted", async || kept.of("LlmDuration").len() == 7).await;
    // Of which the LLM never hears.
    let response = host.http.post(format!("{}/chat", host.url)).json(&json!({"messages": []})).send().await.unwrap();
    assert_eq!((response.status().as_u16(), llm.calls()), (400, 10));
    for (name, values) in [
        ("LlmPromptTokens", vec![19.0, 19.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
        ("LlmCompletionTokens", vec![10.0, 10.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
        // What is not known is not a cost of 0.
        ("LlmCost", vec![COST; 2]),
        // A conversation that is refused is its caller's failure, as leaving is; the key is the operator's.
        ("LlmFailures", vec![0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]),
        ("LlmFirstByteDuration", vec![]),
        ("LlmCacheHits", vec![]),
    ] {
        assert_eq!(kept.of(name), values, "{name}");
    }
    let durations = kept.of("LlmDuration");
    assert!(durations.len() == 7 && durations[..2].iter().all(|&duration| duration >= PAUSE_MS), "{durations:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_for_a_conversation_has_one_line_in_the_log_that_says_how_it_ended() {
    let (data, llm) = (tempfile::tempdir().unwrap(), LlmServer::start([]).await);
    let base_url = llm.base_url();
    let settings = [("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m"), ("LOG_LEVEL", "info")];
    let host = Process::start(data.path(), &settings).await.unwrap();
    let refused = [Behaviour::Status(400, None), Behaviour::Status(401, None)];
    llm.script([Behaviour::Answer("A growth.".into())].into_iter().chain(refused));
    for status in [200, 502, 502] {
        assert_eq!(converse(&host.url).send().await.unwrap().status().as_u16(), status);
    }
    llm.script([Behaviour::Stall]);
    assert!(converse(&host.url).timeout(PAUSE).send().await.unwrap_err().is_timeout());
    let lines = || -> Vec<Value> {
        let lines = host.log().into_iter().map(|line| serde_json::from_str::<Value>(&line).unwrap());
        lines.filter(|line| line["message"] == "llm called").collect()
    };
    eventually("all four are logged", async || lines().len() == 4).await;
    let outcomes = lines().into_iter().map(|line| (line["llm.outcome"].clone(), line["llm.completion_tokens"].clone()));
    let expected =
        [("ok", json!(10)), ("llm_refused", json!(null)), ("llm_denied", json!(null)), ("left", json!(null))];
    assert!(outcomes.eq(expected.map(|(outcome, tokens)| (json!(outcome), tokens))), "{:?}", lines());
    assert!(lines().iter().all(|line| line["span"]["request.id"].is_string()), "{:?}", lines());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_completion_has_one_line_in_the_log_that_says_what_it_took() {
    let data = tempfile::tempdir().unwrap();
    let llm = LlmServer::start([]).await;
    let (_folder, path) = models_file(&models(&llm));
    let settings = [("LLM_MODELS_FILE", path.as_str()), ("LOG_LEVEL", "info")];
    let host = Process::start(data.path(), &settings).await.unwrap();
    ask_for_six(&llm, &host.url).await;
    let lines = |message: &str| -> Vec<Value> {
        let lines = host.log();
        let lines = lines.iter().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.filter(|line| line["message"] == message).collect()
    };
    eventually("five are logged", async || lines("completion relayed").len() == 5).await;
    let line = |outcome: &str, status: u16, tries: u32, streamed: bool, tokens: [u64; 2]| {
        json!({
            "target": "chat::proxy", "level": "INFO", "llm.model": "fast", "llm.outcome": outcome,
            "llm.status": status, "llm.tries": tries, "llm.streamed": streamed, "llm.client_left": false,
            "llm.prompt_tokens": tokens[0], "llm.completion_tokens": tokens[1], "llm.estimated": false,
        })
    };
    let expected = [
        line("Complete", 200, 1, false, [19, 10]),
        line("Complete", 200, 1, true, [19, 10]),
        line("Failed(Unavailable)", 503, 2, false, [0, 0]),
        line("Failed(Refused)", 400, 1, false, [0, 0]),
        // By the one that stands in, whose price it is.
        line("Complete", 200, 3, false, [19, 10]),
    ];
    for (line, expected) in lines("completion relayed").iter().zip(&expected) {
        for (name, value) in expected.as_object().unwrap() {
            assert_eq!(&line[name], value, "{name}: {line}");
        }
        let is_complete = expected["llm.outcome"] == "Complete";
        let cost = line["llm.cost_usd"].as_f64().unwrap();
        assert!((cost - if is_complete { COST } else { 0.0 }).abs() < 1e-12, "{line}");
        let (first_byte, latency) = (line["llm.first_byte_ms"].as_f64(), line["llm.latency_ms"].as_f64().unwrap());
        assert_eq!(first_byte.is_some(), is_complete, "{line}");
        let first_byte = first_byte.unwrap_or(PAUSE_MS);
        assert!(first_byte >= PAUSE_MS, "{line}");
        if line["llm.streamed"] == true {
            assert!(latency >= 6.0 * PAUSE_MS && latency - first_byte >= 2.0 * PAUSE_MS, "{line}");
        }
    }
    let cached = lines("completion taken from the cache");
    assert!(cached.len() == 1 && cached[0]["llm.model"] == "fast", "{cached:?}");
}
