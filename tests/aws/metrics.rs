//! What the packaged functions print to standard output is CloudWatch's embedded metric format, and
//! says what has happened.
//!
//! `emf-schema.json` is the schema of Amazon CloudWatch's user guide, "Specification: Embedded metric
//! format", without its titles and examples; what that page says in words is checked below it.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use shared::aws::SqsJobQueue;
use shared::job::Status;
use shared::message::Message;
use shared::metrics;
use shared::ports::JobQueue;
use uuid::Uuid;

use crate::events::Functions;
use crate::llm_server::{Behaviour, HONEST, LlmServer, explanation};
use crate::support::{of_stage, sdk, within};

/// The keywords that the schema uses; another one is not passed over in silence.
fn check(schema: &Value, value: &Value, at: &str) {
    for (keyword, rule) in schema.as_object().unwrap() {
        let length = value.as_array().map(Vec::len).or(value.as_str().map(|text| text.chars().count()));
        let limit = || rule.as_u64().unwrap() as usize;
        match keyword.as_str() {
            "type" => {
                let holds = match rule.as_str().unwrap() {
                    "object" => value.is_object(),
                    "array" => value.is_array(),
                    "string" => value.is_string(),
                    "integer" => value.is_u64(),
                    other => panic!("type {other}"),
                };
                assert!(holds, "{at} is no {rule}: {value}");
            }
            "required" => {
                for name in rule.as_array().unwrap() {
                    assert!(value.get(name.as_str().unwrap()).is_some(), "{at} lacks {name}: {value}");
                }
            }
            "properties" => {
                for (name, schema) in rule.as_object().unwrap() {
                    if let Some(value) = value.get(name) {
                        check(schema, value, &format!("{at}.{name}"));
                    }
                }
            }
            "items" => value.as_array().unwrap().iter().for_each(|item| check(rule, item, &format!("{at}[]"))),
            "minItems" | "minLength" => assert!(length.unwrap() >= limit(), "{at}: {value}"),
            "maxItems" | "maxLength" => assert!(length.unwrap() <= limit(), "{at}: {value}"),
            // The one pattern there is lists words.
            "pattern" => {
                let words = rule.as_str().unwrap().trim_start_matches("^(").trim_end_matches(")$").replace('\\', "");
                assert!(words.split('|').any(|word| value == word), "{at}: {value}");
            }
            other => panic!("keyword {other}"),
        }
    }
}

/// The rules that the specification has in words.
fn check_targets(line: &Value) {
    for directive in line["_aws"]["CloudWatchMetrics"].as_array().unwrap() {
        for dimension in directive["Dimensions"].as_array().unwrap().iter().flat_map(|set| set.as_array().unwrap()) {
            assert!(line[dimension.as_str().unwrap()].is_string(), "a dimension's target is a string: {line}");
        }
        let metrics = directive["Metrics"].as_array().unwrap();
        assert!((1..=100).contains(&metrics.len()), "{line}");
        for metric in metrics {
            let target = &line[metric["Name"].as_str().unwrap()];
            let numbers = target.as_array().is_some_and(|all| all.len() <= 100 && all.iter().all(Value::is_number));
            assert!(target.is_number() || numbers, "a metric's target is a number or at most 100: {line}");
        }
    }
}

fn check_line(line: &Value) {
    let schema: Value = serde_json::from_str(include_str!("emf-schema.json")).unwrap();
    check(&schema, line, "line");
    check_targets(line);
}

#[test]
fn the_specifications_own_example_passes_and_what_breaks_a_rule_does_not() {
    let example = json!({
        "_aws": {
            "Timestamp": 1_574_109_732_004_u64,
            "CloudWatchMetrics": [{
                "Namespace": "lambda-function-metrics",
                "Dimensions": [["functionVersion"]],
                "Metrics": [{"Name": "time", "Unit": "Milliseconds"}],
            }],
        },
        "functionVersion": "$LATEST",
        "time": 100,
        "requestId": "989ffbf8-9ace-4817-a57c-e4dd734019ee",
    });
    check_line(&example);
    for (pointer, broken) in [
        ("/_aws", json!({})),
        ("/_aws/Timestamp", json!("now")),
        ("/_aws/CloudWatchMetrics/0", json!({"Dimensions": [[]], "Metrics": []})),
        ("/_aws/CloudWatchMetrics/0/Namespace", json!("")),
        ("/_aws/CloudWatchMetrics/0/Dimensions", json!([])),
        ("/_aws/CloudWatchMetrics/0/Dimensions/0", json!(["elsewhere"])),
        ("/_aws/CloudWatchMetrics/0/Metrics/0/Unit", json!("ms")),
        ("/_aws/CloudWatchMetrics/0/Metrics/0/Name", json!("elsewhere")),
        ("/functionVersion", json!(7)),
        ("/time", json!("100")),
        ("/time", json!(vec![1; 101])),
    ] {
        let mut line = example.clone();
        *line.pointer_mut(pointer).unwrap() = broken.clone();
        assert!(std::panic::catch_unwind(|| check_line(&line)).is_err(), "{pointer}: {broken}");
    }
}

/// Values by metric, over all lines; each with its dimensions and unit checked.
pub fn read(printed: &str, stage: &str) -> BTreeMap<String, Vec<f64>> {
    let units: BTreeMap<_, _> = metrics::ALL.iter().copied().collect();
    let mut found: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for line in printed.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        check_line(&line);
        let directive = &line["_aws"]["CloudWatchMetrics"][0];
        assert_eq!((&directive["Namespace"], &line["STAGE"]), (&json!("Lesion"), &json!(stage)), "{line}");
        for metric in directive["Metrics"].as_array().unwrap() {
            let name = metric["Name"].as_str().unwrap();
            let dimensions = if name == "ColdStarts" { json!([["STAGE", "FUNCTION"]]) } else { json!([["STAGE"]]) };
            assert_eq!(directive["Dimensions"], dimensions, "{line}");
            let unit = match name {
                "LlmCost" => Value::Null,
                name if name.ends_with("Duration") => json!("Milliseconds"),
                _ => json!("Count"),
            };
            assert_eq!(metric["Unit"], unit, "{line}");
            assert!(units.contains_key(name), "{name} is in the list of all metrics");
            let target = &line[name];
            let values = target.as_array().cloned().unwrap_or_else(|| vec![target.clone()]);
            found.entry(name.to_owned()).or_default().extend(values.iter().map(|value| value.as_f64().unwrap()));
        }
        // What is neither is a dimension of a job or a caller, or a text that nobody asked for.
        let known = |name: &str| ["_aws", "STAGE", "FUNCTION"].contains(&name) || units.contains_key(name);
        assert!(line.as_object().unwrap().keys().all(|name| known(name)), "{line}");
    }
    found
}

#[tokio::test]
async fn each_invocation_leaves_its_metrics_in_cloudwatchs_format() {
    let llm = LlmServer::start([Behaviour::Answer(explanation(HONEST)), Behaviour::Status(400, None)]).await;
    let base_url = llm.base_url();
    let settings = [
        ("LLM_BASE_URL", base_url.as_str()),
        ("LLM_MODEL", "m"),
        ("LLM_PROMPT_USD_PER_MILLION", "1000"),
        ("LLM_COMPLETION_USD_PER_MILLION", "4000"),
    ];
    let mut functions = Functions::start("mona", &settings).await;
    let shown = functions.run("mole-drawn.png").await;
    let (retaken, other) = (functions.run("blurred.png").await, functions.run("not-a-lesion.png").await);
    let refused = functions.run("hairy-mole-drawn.png").await;
    assert_eq!((shown.status, retaken.status), (Status::Completed, Status::NeedsRetake));
    assert!(other.reading.unwrap().abstained.is_some());
    assert_eq!(refused.description.unwrap().fallback.as_deref(), Some("llm_refused"));

    let submit = read(&functions.submit.printed("stdout"), "events");
    assert_eq!(submit, BTreeMap::from([("ColdStarts".to_owned(), vec![1.0])]));

    let inference = read(&functions.inference.printed("stdout"), "events");
    let count = |name: &str| inference[name].iter().sum::<f64>();
    assert_eq!((count("ColdStarts"), count("Retakes"), count("Abstentions")), (1.0, 1.0, 1.0));
    for (name, times) in [
        ("QueuedDuration", 4),
        ("FetchDuration", 4),
        ("DecodeDuration", 4),
        ("QualityDuration", 4),
        ("PreprocessDuration", 3),
        ("InferenceDuration", 3),
        ("TotalDuration", 2),
    ] {
        assert_eq!(inference[name].len(), times, "{name}");
    }
    assert_eq!(inference["DecodeDuration"][0], shown.timings_ms.decode.unwrap());

    let enrichment = read(&functions.enrichment.printed("stdout"), "events");
    // The stand-in says 19 and 10 tokens.
    let cost = (19.0 * 1000.0 + 10.0 * 4000.0) / 1e6;
    assert_eq!(shown.llm_calls[0].cost_usd, Some(cost));
    for (name, values) in [
        ("LlmPromptTokens", vec![19.0]),
        ("LlmCompletionTokens", vec![10.0]),
        ("LlmCost", vec![cost]),
        ("LlmFailures", vec![1.0]),
    ] {
        assert_eq!(enrichment[name], values, "{name}");
    }
    assert_eq!((enrichment["LlmDuration"].len(), enrichment["DescribeDuration"].len()), (2, 2));
    assert_eq!(enrichment["TotalDuration"][0], shown.timings_ms.total.unwrap());

    // The alarm must see that nothing is stuck as well.
    functions.sweep().await;
    assert_eq!(read(&functions.sweep.printed("stdout"), "events")["StuckJobs"], [0.0]);
    functions.forgotten().await;
    functions.forgotten().await;
    functions.sweep().await;
    assert_eq!(read(&functions.sweep.printed("stdout"), "events")["StuckJobs"], [0.0, 2.0]);
}

/// Of the stage's functions the emulator's log has those that queue and stream call.
#[tokio::test]
async fn the_stages_own_functions_print_their_metrics_under_its_name() {
    let queue = SqsJobQueue::new(&sdk().await, of_stage("QUEUE_URL"), None);
    queue.send(Message::Infer { id: Uuid::new_v4() }).await.unwrap();
    within("inference has told of its start", async || {
        let log = std::fs::read_to_string(of_stage("EMULATOR_LOG")).unwrap();
        let lines: Vec<_> = log.lines().filter_map(|line| Some(&line[line.find(r#"{"_aws""#)?..])).collect();
        read(&lines.join("\n"), "local").contains_key("ColdStarts")
    })
    .await;
}
