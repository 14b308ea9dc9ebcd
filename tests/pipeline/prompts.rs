//! Prompt jobs: from `POST /submit` to the LLM's answer, however long it takes and whatever goes wrong.

mod queue;
mod trouble;

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use chrono::TimeDelta;
use reqwest::{Method, Response};
use serde_json::{Value, json};
use shared::clock::Clock;
use shared::embedded::SqliteJobStore;
use shared::job::{AnswerContent, Job, Record, Status, blob_prefix};
use shared::ports::{BlobStore, JobStore};
use tokio::process::Command;
use uuid::Uuid;

use crate::support::keyed::Keyed;
use crate::support::leaks::Leaks;
use crate::support::llm_server::{Behaviour, LlmServer};
use crate::support::process::{Process, binary};
use crate::support::{LLM_KEY, Running, client, ended, mole, open};

const QUESTION: &str = "What is a naevus?";
const ANSWER: &str = "A growth of pigment cells.";

async fn post(host: &Running, body: &Value) -> Response {
    host.http.post(format!("{}/submit", host.url)).json(body).send().await.unwrap()
}

async fn accepted(response: Response) -> String {
    let (status, body) = (response.status(), response.json::<Value>().await.unwrap());
    assert_eq!((status.as_u16(), &body["status"]), (202, &json!("awaiting_description")), "{body}");
    body["request_id"].as_str().unwrap().to_owned()
}

async fn ask(host: &Running, body: &Value) -> String {
    accepted(post(host, body).await).await
}

async fn answered(
    script: impl IntoIterator<Item = Behaviour>,
    body: &Value,
    extra: &[(&str, &str)],
) -> (Value, LlmServer) {
    let llm = LlmServer::start(script).await;
    let host = Running::asking(&llm, extra).await;
    let id = ask(&host, body).await;
    (host.ended(&id).await, llm)
}

fn question() -> Value {
    json!({"prompt": QUESTION})
}

async fn job(data: &Path, id: &str) -> Job {
    let store = SqliteJobStore::open(&data.join("jobs.sqlite")).unwrap();
    store.get(id.parse().unwrap()).await.unwrap().and_then(Record::into_job).unwrap()
}

/// Makes a job on a host that is not running.
async fn accept(host: &local::Host, question: &str) -> Uuid {
    let request = serde_json::from_value(json!({
        "messages": [{"role": "user", "content": question}], "max_tokens": null, "temperature": null, "format": "text",
    }));
    let caller = shared::http::Caller("local".into());
    host.submit.accept_prompt(&caller, None, &request.unwrap(), None).await.unwrap()
}

#[tokio::test]
async fn an_answer_comes_with_what_it_took_and_without_a_photos_fields() {
    let prices = [("LLM_PROMPT_USD_PER_MILLION", "1"), ("LLM_COMPLETION_USD_PER_MILLION", "4")];
    let (mut result, llm) = answered([Behaviour::Answer(ANSWER.into())], &question(), &prices).await;
    for moment in ["created_at", "updated_at", "request_id", "disclaimer"] {
        assert!(result.as_object_mut().unwrap().remove(moment).unwrap().is_string(), "{moment}");
    }
    assert!(result.as_object_mut().unwrap().remove("latency_ms").unwrap().is_u64());
    let timings = result.as_object_mut().unwrap().remove("timings_ms").unwrap();
    assert_eq!(timings.as_object().unwrap().keys().collect::<Vec<_>>(), ["queued", "total"]);
    let expected = json!({
        "status": "completed",
        "kind": "prompt",
        "content": ANSWER,
        "finish_reason": "stop",
        "token_usage": {"prompt_tokens": 19, "completion_tokens": 10},
        "cost_usd": 59e-6,
        "error": null,
    });
    assert_eq!(result, expected);
    assert_eq!(llm.calls(), 1);
}

#[tokio::test]
async fn the_llm_gets_the_messages_with_the_hosts_key_model_and_defaults() {
    let llm = LlmServer::start([]).await;
    let host = Running::asking(&llm, &[("LLM_MAX_TOKENS", "321"), ("LLM_TEMPERATURE", "0.25")]).await;
    let user = json!({"role": "user", "content": QUESTION});
    let short = json!({"role": "system", "content": "Be short."});
    for (body, messages) in [
        (question(), json!([user])),
        (json!({"prompt": QUESTION, "system": "Be short.", "max_tokens": 7, "temperature": 0}), json!([short, user])),
        (json!({"messages": [user], "system": "Be short.", "format": "text"}), json!([short, user])),
    ] {
        let id = ask(&host, &body).await;
        host.ended(&id).await;
        let (headers, sent) = llm.requests().pop().unwrap();
        assert_eq!(headers["authorization"], format!("Bearer {LLM_KEY}"));
        let wished = body["max_tokens"].is_number();
        let (max_tokens, temperature) = if wished { (7, 0.0) } else { (321, 0.25) };
        let expected =
            json!({"model": "tiny", "max_tokens": max_tokens, "temperature": temperature, "messages": messages});
        assert_eq!(sent, expected);
    }
}

#[tokio::test]
async fn passing_trouble_is_tried_again_until_an_answer_comes() {
    for script in [
        vec![Behaviour::Status(500, None)],
        vec![Behaviour::Status(429, Some(1))],
        vec![Behaviour::CutOff],
        // More than one claim's tries: sweep sends the job round again.
        vec![Behaviour::Status(500, None); 4],
    ] {
        let calls = script.len() + 1;
        let (result, llm) = answered(script.clone(), &question(), &[]).await;
        assert_eq!(result["status"], "completed", "{script:?}: {result}");
        assert_eq!(llm.calls(), calls, "{script:?}");
    }
}

#[tokio::test]
async fn an_error_of_the_api_fails_the_job_with_its_code_and_is_never_content() {
    let table = [
        (Behaviour::Status(500, None), "llm_unavailable", true, 6),
        (Behaviour::CutOff, "llm_unavailable", true, 6),
        (Behaviour::Status(429, Some(2)), "llm_rate_limited", true, 4),
        (Behaviour::Stall, "llm_timeout", true, 2),
        (Behaviour::Status(400, None), "llm_refused", false, 1),
        (Behaviour::Status(401, None), "llm_refused", false, 1),
        (Behaviour::Body("<html>upstream says no</html>"), "llm_invalid_response", false, 1),
        (Behaviour::Body(r#"{"error": {"message": "upstream says no"}}"#), "llm_invalid_response", false, 1),
        (Behaviour::Body(r#"{"choices": []}"#), "llm_invalid_response", false, 1),
    ];
    let tried = table.map(async |(behaviour, code, retryable, calls)| {
        let llm = LlmServer::start([]).await;
        llm.behave(behaviour.clone());
        let host = Running::asking(&llm, &[("MAX_ATTEMPTS", "2"), ("PROMPT_LEASE_SECONDS", "5")]).await;
        let id = ask(&host, &question()).await;
        let result = host.ended(&id).await;
        assert_eq!(
            (&result["status"], &result["content"]),
            (&json!("failed"), &Value::Null),
            "{behaviour:?}: {result}"
        );
        let error = &result["error"];
        assert_eq!((&error["code"], &error["retryable"]), (&json!(code), &json!(retryable)), "{behaviour:?}: {result}");
        assert_eq!(error["stage"], "enrichment");
        let message = error["message"].as_str().unwrap();
        assert!(!message.is_empty() && !result.to_string().contains("upstream"), "{behaviour:?}: {result}");
        assert_eq!(llm.calls(), calls, "{behaviour:?}");
        let ledger = job(host.folder.path(), &id).await.llm_calls;
        assert_eq!(ledger.iter().map(|call| call.tries as usize).sum::<usize>(), calls, "{behaviour:?}: {ledger:?}");
        // The ledger tells the operator's key apart.
        let outcome = if matches!(behaviour, Behaviour::Status(401, _)) { "llm_denied" } else { code };
        assert!(ledger.iter().all(|call| call.outcome == outcome), "{behaviour:?}: {ledger:?}");
    });
    futures_util::future::join_all(tried).await;
}

#[tokio::test]
async fn an_answer_in_json_parses_or_fails_the_job_and_is_not_asked_for_again() {
    let wish = json!({"prompt": "Three naevi, as JSON.", "format": "json"});
    for (behaviour, content) in [
        (Behaviour::Answer(r#"{"naevi": [1, 2, 3]}"#.into()), Some(r#"{"naevi": [1, 2, 3]}"#)),
        (Behaviour::Answer("```json\n{\"naevi\": []}\n```".into()), Some(r#"{"naevi": []}"#)),
        (Behaviour::Answer("Here you are: {}".into()), None),
        (Behaviour::Answer(String::new()), None),
        (Behaviour::Ended(r#"{"naevi": [1, 2"#.into(), "length"), None),
    ] {
        let (result, llm) = answered([behaviour.clone()], &wish, &[]).await;
        assert_eq!(llm.requests()[0].1["response_format"], json!({"type": "json_object"}));
        assert_eq!(llm.calls(), 1, "{behaviour:?}");
        assert_eq!(result["content"], json!(content), "{behaviour:?}: {result}");
        if content.is_none() {
            let error = (&result["status"], &result["error"]["code"], &result["error"]["retryable"]);
            assert_eq!(error, (&json!("failed"), &json!("llm_invalid_json"), &json!(true)), "{behaviour:?}: {result}");
        }
    }
}

#[tokio::test]
async fn an_answer_that_was_cut_off_is_shown_and_says_so() {
    let (result, _) = answered([Behaviour::Ended(ANSWER.into(), "length")], &question(), &[]).await;
    let shown = (&result["status"], &result["content"], &result["finish_reason"]);
    assert_eq!(shown, (&json!("completed"), &json!(ANSWER), &json!("length")), "{result}");
}

/// A million bytes, no two lines of them the same, with what JSON escapes.
fn megabyte() -> String {
    let line = |number| format!("line {number} of \"naevi\", é and 🙂\\\n");
    let mut text: String = (0..)
        .map(line)
        .scan(0, |size, line| {
            *size += line.len();
            (*size <= 1_000_000).then_some(line)
        })
        .collect();
    text.extend(std::iter::repeat_n('.', 1_000_000 - text.len()));
    text
}

#[tokio::test]
async fn an_answer_of_a_megabyte_comes_whole_and_a_delete_erases_it() {
    let llm = LlmServer::start([Behaviour::Answer(megabyte())]).await;
    let host = Running::asking(&llm, &[]).await;
    let id = ask(&host, &question()).await;
    let result = host.ended(&id).await;
    assert_eq!(result["status"], "completed", "{}", result["error"]);
    assert!(result["content"].as_str() == Some(megabyte().as_str()), "not the answer");
    let record = job(host.folder.path(), &id).await;
    assert!(serde_json::to_vec(&record).unwrap().len() < 4096, "the answer is in the record");
    let list: Value = host.get("/results").await.json().await.unwrap();
    let listed = &list["results"][0];
    assert_eq!((&listed["content"], &listed["finish_reason"]), (&Value::Null, &json!("stop")), "{listed}");
    let blobs = host.folder.path().join("blobs").join(blob_prefix(record.id));
    assert_eq!(std::fs::read_dir(&blobs).unwrap().count(), 2, "prompt and answer");
    assert!(record.expires_at <= record.updated_at + chrono::TimeDelta::days(7), "it goes when the blob may go");
    let deleted = host.http.delete(format!("{}/result/{id}", host.url)).send().await.unwrap();
    assert_eq!(deleted.status(), 204);
    assert!(!blobs.exists());
}

#[tokio::test]
async fn an_answer_lies_in_the_record_up_to_256_kib_of_json() {
    // Quotation marks around it, and two bytes for each of the last.
    for (text, inline) in
        [("x".repeat(256 * 1024 - 2), true), ("x".repeat(256 * 1024 - 1), false), ("\n".repeat(200_000), false)]
    {
        let llm = LlmServer::start([Behaviour::Answer(text.clone())]).await;
        let host = Running::asking(&llm, &[]).await;
        let id = ask(&host, &question()).await;
        assert!(host.ended(&id).await["content"] == text, "not the answer");
        let content = job(host.folder.path(), &id).await.answer.unwrap().content;
        assert_eq!(matches!(content, AnswerContent::Text(_)), inline, "{} bytes", text.len());
    }
}

#[tokio::test]
async fn the_same_prompt_under_the_same_key_is_one_job_and_other_content_is_refused() {
    let llm = LlmServer::start([Behaviour::Answer(ANSWER.into())]).await;
    let host = Running::asking(&llm, &[]).await;
    let submit = async |body: &Value| {
        let request = host.http.post(format!("{}/submit", host.url)).header("idempotency-key", "key").json(body);
        request.send().await.unwrap()
    };
    let id = accepted(submit(&question()).await).await;
    // The fields as they are parsed, however they are written.
    let same = json!({"format": "text", "messages": [{"content": QUESTION, "role": "user"}]});
    for body in [question(), same] {
        assert_eq!(accepted(submit(&body).await).await, id, "{body}");
    }
    host.ended(&id).await;
    assert_eq!(accepted(submit(&question()).await).await, id, "also when it has ended");
    for other in [
        json!({"prompt": "What is a mole?"}),
        json!({"prompt": QUESTION, "format": "json"}),
        json!({"prompt": QUESTION, "max_tokens": 7}),
        json!({"image": base64::Engine::encode(&base64::engine::general_purpose::STANDARD, mole())}),
    ] {
        let refused = submit(&other).await;
        assert_eq!(refused.status(), 409, "{other}");
        assert_eq!(refused.json::<Value>().await.unwrap()["error"]["code"], "idempotency_conflict");
    }
    assert_eq!(llm.calls(), 1);
}

#[tokio::test]
async fn what_is_no_prompt_is_refused_and_not_repeated() {
    let llm = LlmServer::start([]).await;
    let host = Running::asking(&llm, &[]).await;
    let user = json!({"role": "user", "content": QUESTION});
    let huge = "x".repeat(1024 * 1024 + 1);
    for (body, status, named) in [
        (json!({}), 400, "\"prompt\""),
        (json!({"prompt": " "}), 400, "messages[0].content"),
        (json!({"prompt": null}), 400, "Data"),
        (json!({"prompt": QUESTION, "messages": [user]}), 400, "\"prompt\" or \"messages\""),
        (json!({"prompt": QUESTION, "image": "iVBO"}), 400, "\"prompt\" or \"messages\""),
        (json!({"prompt": QUESTION, "describe": true}), 400, "\"prompt\" or \"messages\""),
        (json!({"image": "iVBO", "max_tokens": 7}), 400, "\"prompt\" or \"messages\""),
        (json!({"image_key": QUESTION, "format": "json"}), 400, "\"prompt\" or \"messages\""),
        (json!({"image": "iVBO", "describe": null}), 400, "Data"),
        (json!({"prompt": QUESTION, "system": ""}), 400, "messages[0].content"),
        (json!({"prompt": QUESTION, "max_tokens": 0}), 400, "max_tokens"),
        (json!({"prompt": QUESTION, "temperature": 2.1}), 400, "temperature"),
        (json!({"prompt": QUESTION, "format": "yaml"}), 400, "Data"),
        (json!({"prompt": QUESTION, "stream": true}), 400, "Data"),
        (json!({"messages": []}), 400, "messages"),
        (json!({"messages": [{"role": "tool", "content": QUESTION}]}), 400, "Data"),
        (json!({"messages": [{"role": "system", "content": QUESTION}]}), 400, "\"user\""),
        (json!({"prompt": huge}), 413, "1 MiB"),
    ] {
        let response = post(&host, &body).await;
        let answered = response.status().as_u16();
        let error: Value = response.json().await.unwrap();
        let message = error["error"]["message"].as_str().unwrap();
        assert_eq!(answered, status, "{named}: {message}");
        assert!(message.contains(named) && !message.contains(QUESTION), "{named}: {message}");
    }
    let largest = "x".repeat(1024 * 1024);
    let id = ask(&host, &json!({"prompt": largest})).await;
    assert_eq!(host.ended(&id).await["status"], "completed");
    assert_eq!(llm.calls(), 1, "nothing was asked of what was refused");
}

#[tokio::test]
async fn a_host_without_an_llm_takes_no_prompt_and_a_guest_has_none() {
    let host = Running::start(&[]).await;
    let refused = post(&host, &question()).await;
    assert_eq!(refused.status(), 404);
    assert_eq!(refused.json::<Value>().await.unwrap()["error"]["code"], "llm_not_configured");
    assert!(!host.folder.path().join("blobs/jobs").exists(), "nothing is stored of it");

    let llm = LlmServer::start([]).await;
    let base_url = llm.base_url();
    let settings = [("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m"), ("ADMIT_GUESTS", "true")];
    let host = Keyed::start(&settings).await;
    let guest = host.request(Method::POST, "/submit", "").json(&question()).send().await.unwrap();
    assert_eq!(guest.status(), 403);
    assert_eq!(llm.calls(), 0);
    let ward = host.key_of("ward").await;
    let id = accepted(host.request(Method::POST, "/submit", &ward).json(&question()).send().await.unwrap()).await;
    let path = format!("/result/{id}");
    assert_eq!(host.status(Method::GET, &path, "").await, 404);
    assert_eq!(host.status(Method::GET, &path, &host.admin).await, 404, "another caller's");
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_prompt_nor_answer_is_logged_and_a_delete_leaves_neither_in_a_file() {
    let data = tempfile::tempdir().unwrap();
    let log_file = tempfile::NamedTempFile::new().unwrap();
    let refused = Behaviour::Answer("no JSON but vlarbogenistic words".into());
    let llm = LlmServer::start([Behaviour::Answer("an answer of drimbolatic words".into()), refused]).await;
    let base_url = llm.base_url();
    let settings = [("LOG_LEVEL", "trace"), ("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m")];
    let stderr = Stdio::from(log_file.reopen().unwrap());
    let host = Process::start_as(Command::new(binary("local")), stderr, data.path(), &settings).await.unwrap();
    let mut leaks = Leaks::default();
    for marker in ["qvortolambrisk", "zembolinatural", "drimbolatic words", "vlarbogenistic"] {
        leaks.watch(marker, marker.as_bytes());
    }
    let http = client();
    for format in ["text", "json"] {
        let body = json!({"prompt": "a qvortolambrisk?", "system": "zembolinatural", "format": format});
        let id = accepted(http.post(format!("{}/submit", host.url)).json(&body).send().await.unwrap()).await;
        let result = ended(&http, &host.url, &id).await;
        assert_eq!(result["content"].is_string(), format == "text", "{result}");
        assert_ne!(leaks.found_below(data.path()).0, Vec::<String>::new(), "they were in no file before");
        let deleted = http.delete(format!("{}/result/{id}", host.url)).send().await.unwrap();
        assert_eq!(deleted.status(), 204);
        assert_eq!(leaks.found_below(data.path()).0, Vec::<String>::new());
    }
    assert!(host.terminate().await.success());
    assert_eq!(leaks.found_below(data.path()).0, Vec::<String>::new());
    let log = std::fs::read(log_file.path()).unwrap();
    assert!(log.len() > 1000);
    assert_eq!(leaks.found_in("the log", &log), Vec::<String>::new());
}

#[tokio::test]
async fn a_prompt_and_its_answer_expire_and_nothing_of_them_is_left() {
    let mut leaks = Leaks::default();
    for marker in ["qvortolambrisk", "drimbolatic words"] {
        leaks.watch(marker, marker.as_bytes());
    }
    // A short answer is in the record; a long one is a blob, without which its record says nothing.
    for (words, blobs, days) in [(1, 0, 30), (20_000, 1, 7)] {
        let clock = Clock::manual(chrono::Utc::now());
        let llm = LlmServer::start([Behaviour::Answer("drimbolatic words ".repeat(words))]).await;
        let (base_url, folder) = (llm.base_url(), tempfile::tempdir().unwrap());
        let host = open(folder.path(), clock.clone(), &[("LLM_BASE_URL", &base_url), ("LLM_MODEL", "m")]).await;
        let (id, start) = (accept(&host, "a qvortolambrisk?").await, clock.now());
        host.enrichment.process(id, start + TimeDelta::minutes(10), None).await.unwrap();
        let ended = host.store.get(id).await.unwrap().and_then(Record::into_job).unwrap();
        assert_eq!((ended.status, ended.expires_at), (Status::Completed, start + TimeDelta::days(days)));
        assert_eq!(usize::from(matches!(ended.answer.unwrap().content, AnswerContent::Blob { .. })), blobs);
        assert_ne!(leaks.found_below(folder.path()).0, Vec::<String>::new(), "they were in no file before");
        // As housekeeping does.
        let expire = async || {
            let records = host.store.remove_expired(clock.now()).await.unwrap();
            let limit = clock.now() - host.config.policy.photo_ttl;
            (records, host.blobs.remove_older("jobs/", limit.into()).await.unwrap())
        };
        for (day, records_gone, blobs_gone) in [(7, blobs, 1 + blobs), (30, 1 - blobs, 0)] {
            let moment = start + TimeDelta::days(day);
            clock.advance(moment - TimeDelta::hours(1) - clock.now());
            assert_eq!(expire().await, (0, 0), "{words}: before {day} days");
            clock.advance(TimeDelta::hours(2));
            assert_eq!(expire().await, (records_gone, blobs_gone), "{words}: after {day} days");
        }
        assert_eq!(host.store.get(id).await.unwrap(), None);
        assert_eq!(host.blobs.list("jobs/", None, 10).await.unwrap(), [] as [&str; 0]);
        assert_eq!(leaks.found_below(folder.path()).0, Vec::<String>::new());
    }
}

/// The only test here that waits for the clock: what a client of five minutes sees of an answer of
/// four, over a connection that no request holds.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_polls_for_five_minutes_gets_an_answer_that_takes_four() {
    let slow = Behaviour::Late(Duration::from_secs(240), ANSWER.into());
    let (folder, llm) = (tempfile::tempdir().unwrap(), LlmServer::start([slow]).await);
    let base_url = llm.base_url();
    // As a host is that was told nothing else; `Process` has shorter times for its kills.
    let host = Running::on(folder, Clock::System, &[("LLM_BASE_URL", &base_url), ("LLM_MODEL", "m")]).await;
    let id = ask(&host, &question()).await;
    let (started, mut pause, mut polls) = (Instant::now(), 2, 0);
    let result = loop {
        assert!(started.elapsed() < Duration::from_secs(300), "no answer within five minutes");
        tokio::time::sleep(Duration::from_secs(pause)).await;
        pause = (pause + 1).min(10);
        polls += 1;
        let result = host.result(&id).await;
        if result["status"] != "awaiting_description" {
            break result;
        }
        assert_eq!(result["content"], Value::Null, "{result}");
    };
    assert_eq!((&result["status"], &result["content"]), (&json!("completed"), &json!(ANSWER)), "{result}");
    assert!(result["latency_ms"].as_u64().unwrap() >= 240_000, "{result}");
    assert_eq!((llm.calls(), job(host.folder.path(), &id).await.attempts.enrichment), (1, 1));
    crate::support::report(&format!("a prompt of {} s, {polls} polls", started.elapsed().as_secs()));
}
