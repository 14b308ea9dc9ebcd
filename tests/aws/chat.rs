//! Conversations through the function's own address, as Terraform has put it there.
//!
//! The emulator gives each answer in one piece, and lets everybody invoke the function through its
//! address once the first of the two rights is there.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::header::HeaderMap;
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};

use crate::lambda::Lambda;
use crate::llm_server::{Behaviour, Ending, HONEST, chunks, explanation};
use crate::pipeline::{LLM_TURN, User};
use crate::support::{llm, of_stage, within};

const QUESTION: &str = "What is a mole, in one sentence that nobody else would ask for?";

async fn ask(user: &User, body: &Value) -> Response {
    user.http.post(format!("{}/chat", of_stage("CHAT_URL"))).bearer_auth(&user.key).json(body).send().await.unwrap()
}

fn conversation() -> Value {
    json!({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 20})
}

#[tokio::test]
async fn a_conversation_is_answered_with_the_stages_key_and_leaves_no_word_in_the_log() {
    let (_turn, user) = (LLM_TURN.read().await, User::new("nadia").await);
    llm();
    let answer = ask(&user, &conversation()).await;
    assert_eq!(answer.status(), StatusCode::OK, "{}", answer.text().await.unwrap());
    let request_id = answer.headers()["x-request-id"].to_str().unwrap().to_owned();
    let answer: Value = answer.json().await.unwrap();
    assert!(answer["content"].as_str().unwrap().contains(HONEST), "{answer}");
    assert_eq!(answer["request_id"], request_id.as_str());
    let asked = llm().requests();
    let (headers, _) = asked.iter().find(|(_, body)| body["messages"][0]["content"] == QUESTION).unwrap();
    assert_eq!(headers["authorization"], "Bearer a-key-of-the-emulator");
    let log = Lambda::new().log("chat").await.join("\n");
    assert!(log.contains(&request_id), "the log is that of this function");
    for secret in [QUESTION, HONEST, &user.key, "a-key-of-the-emulator"] {
        assert!(!log.contains(secret), "{secret}");
    }
}

#[tokio::test]
async fn the_llm_is_not_asked_for_a_stranger_or_for_what_is_no_conversation() {
    let (_turn, user) = (LLM_TURN.read().await, User::new("oscar").await);
    let before = llm().requests().iter().filter(|(_, body)| body["max_tokens"] == 77).count();
    let question = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 77});
    let mut stranger = User::new("peter").await;
    stranger.key = "lesion_0123456789ab_no-such-secret".to_owned();
    let refused = ask(&stranger, &question).await;
    assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
    let refused = ask(&user, &json!({"messages": [], "max_tokens": 77})).await;
    assert_eq!(refused.status(), StatusCode::BAD_REQUEST);
    let body: Value = refused.json().await.unwrap();
    assert_eq!(body["error"]["code"], "invalid_request");
    let address = of_stage("CHAT_URL");
    let elsewhere = user.http.get(format!("{address}/results")).bearer_auth(&user.key).send().await.unwrap();
    assert_eq!(elsewhere.status(), StatusCode::NOT_FOUND);
    let after = llm().requests().iter().filter(|(_, body)| body["max_tokens"] == 77).count();
    assert_eq!(after, before);
}

#[tokio::test]
async fn upstream_trouble_has_its_code_and_the_next_conversation_is_answered() {
    let (_turn, user) = (LLM_TURN.write().await, User::new("quentin").await);
    llm().behave(Behaviour::Status(400, None));
    let answer = ask(&user, &conversation()).await;
    assert_eq!(answer.status(), StatusCode::BAD_GATEWAY);
    let body: Value = answer.json().await.unwrap();
    assert_eq!(body["error"]["code"], "llm_refused", "{body}");
    llm().behave(Behaviour::Stall);
    let answer = ask(&user, &conversation()).await;
    llm().behave(Behaviour::Answer(explanation(HONEST)));
    assert_eq!(answer.status(), StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(ask(&user, &conversation()).await.status(), StatusCode::OK);
}

#[tokio::test]
async fn the_address_describes_what_it_serves() {
    let http = User::new("rosa").await.http;
    let description: Value =
        http.get(format!("{}/openapi.json", of_stage("CHAT_URL"))).send().await.unwrap().json().await.unwrap();
    let paths: Vec<_> = description["paths"].as_object().unwrap().keys().collect();
    assert_eq!(paths, ["/chat", "/v1/chat/completions", "/v1/models", "/v1/models/{model}"]);
}

#[tokio::test]
async fn a_model_whose_server_is_gone_is_answered_by_its_stand_in_with_that_ones_key() {
    let (_turn, user) = (LLM_TURN.read().await, User::new("tessa").await);
    llm();
    let listed = user.http.get(format!("{}/v1/models", of_stage("CHAT_URL"))).bearer_auth(&user.key);
    let listed: Value = listed.send().await.unwrap().json().await.unwrap();
    let aliases: Vec<_> = listed["data"].as_array().unwrap().iter().map(|model| model["id"].clone()).collect();
    assert_eq!(aliases, ["gone", "spare", "stand-in"]);
    let question = "Who answers for a server that is gone?";
    let body = json!({"model": "gone", "messages": [{"role": "user", "content": question}], "max_tokens": 20});
    let answer = complete(&user, &user.key, &body).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK, "{}", answer.text().await.unwrap());
    let asked = llm().requests();
    let met: Vec<_> = asked.iter().filter(|(_, body)| body["messages"][0]["content"] == question).collect();
    assert_eq!(met.len(), 1);
    let (headers, body) = met[0];
    assert_eq!(
        (&headers["authorization"], &body["model"]),
        (&"Bearer a-spare-key-of-the-emulator".parse().unwrap(), &json!("a-spare"))
    );
    let log = Lambda::new().log("chat").await.join("\n");
    assert!(log.contains("fallback taken") && !log.contains("a-spare-key-of-the-emulator"));
}

/// What one completion of the stand-in takes.
const TOKENS: u64 = 29;
/// And costs, of which 19 are the prompt's, at 1 and 4 USD for a million.
const COST_USD: f64 = 59e-6;

fn complete(user: &User, key: &str, body: &Value) -> RequestBuilder {
    user.http.post(format!("{}/v1/chat/completions", of_stage("CHAT_URL"))).bearer_auth(key).json(body)
}

/// The id and the text of a key with limits.
async fn limited(user: &User, caller: &str, limits: Value) -> (String, String) {
    let mut new = limits;
    new["caller"] = json!(caller);
    let made: Value = user.request(Method::POST, "/admin/keys").json(&new).send().await.unwrap().json().await.unwrap();
    (made["id"].as_str().unwrap().to_owned(), made["key"].as_str().unwrap().to_owned())
}

/// The ledger of a key's one month, once nothing is under way.
pub async fn ledger(user: &User, id: &str) -> Value {
    let mut usage = Value::Null;
    within("everything is settled", async || {
        let answer = user.request(Method::GET, &format!("/admin/keys/{id}/usage")).send().await.unwrap();
        usage = answer.json().await.unwrap();
        usage["under_way"] == 0
    })
    .await;
    usage["months"][0].clone()
}

/// What has come back since `started` of so much a minute: a bucket fills while it is emptied.
fn refilled(limit: u64, started: Instant) -> u64 {
    (started.elapsed().as_secs_f64() * limit as f64 / 60.0).ceil() as u64
}

fn assert_within_limit(limit: u64, requests: u64, started: Instant) {
    let refilled = refilled(limit, started);
    assert!((limit..=limit + 1 + refilled).contains(&requests), "{requests} of {limit}, {refilled} refilled");
}

/// What a client was answered.
struct Answered {
    status: u16,
    headers: HeaderMap,
    text: String,
}

impl Answered {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// After how many seconds to come again.
    fn wait(&self) -> u64 {
        self.header("retry-after").parse().unwrap_or_else(|_| panic!("no Retry-After: {}", self.text))
    }
}

/// Puts one question of a caller's: the whole answer, or a limit's refusal.
async fn put(user: &User, key: &str, question: &str, streams: bool) -> Answered {
    let messages = json!([{"role": "user", "content": question}]);
    let body = json!({"model": "stand-in", "messages": messages, "stream": streams, "max_tokens": 20});
    let answer = complete(user, key, &body).send().await.unwrap();
    let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
    let answered = Answered { status, headers, text: answer.text().await.unwrap() };
    let text = &answered.text;
    match status {
        200 if streams => assert!(text.ends_with("data: [DONE]\n\n"), "{text}"),
        200 => assert!(text.contains("chat.completion"), "{text}"),
        429 => assert!(text.contains("rate_limit") && answered.wait() > 0, "{text}"),
        _ => panic!("{status}: {text}"),
    }
    answered
}

/// What twenty clients at once are answered who ask so many times each, every other time for a stream.
async fn twenty(user: &User, key: &str, caller: &str, times: usize) -> Vec<Answered> {
    let clients = (0..20).map(async |number: usize| {
        let mut answers = Vec::new();
        for round in 0..times {
            let question = format!("of {caller}: {number} {round}");
            answers.push(put(user, key, &question, (number + round).is_multiple_of(2)).await);
        }
        answers
    });
    join_all(clients).await.into_iter().flatten().collect()
}

/// Asks alone until a limit is reached, each time with nothing under way: the ledger, and the refusal.
async fn until_refused(user: &User, id: &str, key: &str, caller: &str) -> (Value, Answered) {
    loop {
        let month = ledger(user, id).await;
        let answered = put(user, key, &format!("of {caller}: alone"), false).await;
        if answered.status == 429 {
            return (month, answered);
        }
    }
}

/// How many questions of a caller have come to the server.
fn calls_of(caller: &str) -> u64 {
    let beginning = format!("of {caller}: ");
    let of_caller = |body: &Value| body["messages"][0]["content"].as_str().is_some_and(|it| it.starts_with(&beginning));
    llm().requests().iter().filter(|(_, body)| of_caller(body)).count() as u64
}

/// The ledger says what the server has counted: how many requests.
fn assert_is_the_servers(month: &Value, caller: &str) -> u64 {
    let (calls, number) = (calls_of(caller), |name: &str| month[name].as_u64().unwrap());
    let tokens = number("prompt_tokens") + number("completion_tokens");
    assert_eq!((number("requests"), tokens, number("estimated_requests")), (calls, calls * TOKENS, 0), "{month}");
    let cost = month["cost_usd"].as_f64().unwrap();
    assert!((cost - calls as f64 * COST_USD).abs() < 1e-9, "{month}");
    calls
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_clients_of_many_lambdas_stay_within_their_keys_limit_and_the_ledger_is_the_servers() {
    let (_turn, user) = (LLM_TURN.read().await, User::new("sam").await);
    llm();
    let (id, key) = limited(&user, "sam", json!({"requests_per_minute": 30, "budget_usd_per_month": 1})).await;
    let started = Instant::now();
    let answers = twenty(&user, &key, "sam", 3).await;
    let let_in = answers.iter().filter(|it| it.status == 200).count() as u64;
    assert_within_limit(30, let_in, started);
    assert_eq!(assert_is_the_servers(&ledger(&user, &id).await, "sam"), let_in);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_of_twenty_clients_at_once_is_refused_is_told_when_to_come_again_and_is_let_in_then() {
    let (_turn, user) = (LLM_TURN.read().await, User::new("theo").await);
    llm();
    // One comes back in five seconds. In the half minute that a client waits those are too few for all.
    let (id, key) = limited(&user, "theo", json!({"requests_per_minute": 12})).await;
    let started = Instant::now();
    let answers = twenty(&user, &key, "theo", 1).await;
    let (let_in, refused): (Vec<_>, Vec<_>) = answers.iter().partition(|it| it.status == 200);
    let let_in = let_in.len() as u64;
    assert_within_limit(12, let_in, started);
    assert_eq!(calls_of("theo"), let_in, "who was refused has asked the model");
    assert!(!refused.is_empty(), "nobody was refused");
    for it in &refused {
        let told = (it.header("x-ratelimit-limit-requests"), it.header("x-ratelimit-remaining-requests"));
        assert_eq!(told, ("12", "0"));
        assert!(it.text.contains("too_many_requests") && it.wait() <= 6, "{} s: {}", it.wait(), it.text);
    }
    let longest = refused.iter().map(|it| it.wait()).max().unwrap();
    tokio::time::sleep(Duration::from_secs(longest)).await;
    assert_eq!(put(&user, &key, "of theo: again", false).await.status, 200);
    assert_eq!(assert_is_the_servers(&ledger(&user, &id).await, "theo"), let_in + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_clients_of_many_lambdas_exceed_their_keys_tokens_by_less_than_one_request() {
    let (_turn, user) = (LLM_TURN.read().await, User::new("tilda").await);
    llm();
    // Two at once reserve all of it.
    let limit = 150;
    let (id, key) = limited(&user, "tilda", json!({"tokens_per_minute": limit})).await;
    let started = Instant::now();
    let answers = twenty(&user, &key, "tilda", 3).await;
    assert!(answers.iter().all(|it| it.header("x-ratelimit-limit-tokens") == "150"));
    assert!(answers.iter().any(|it| it.status == 429), "nobody was refused");
    let (month, _) = until_refused(&user, &id, &key, "tilda").await;
    let tokens = assert_is_the_servers(&month, "tilda") * TOKENS;
    let refilled = refilled(limit, started);
    assert!((limit..limit + refilled + TOKENS).contains(&tokens), "{tokens} of {limit}, {refilled} refilled");
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_clients_of_many_lambdas_exceed_their_keys_budget_by_less_than_one_request() {
    let (_turn, user) = (LLM_TURN.read().await, User::new("tracy").await);
    llm();
    // Eight leave something of it, nine do not.
    let (id, key) = limited(&user, "tracy", json!({"budget_usd_per_month": 8.5 * COST_USD})).await;
    let answers = twenty(&user, &key, "tracy", 3).await;
    let (month, alone) = until_refused(&user, &id, &key, "tracy").await;
    assert_eq!(assert_is_the_servers(&month, "tracy"), 9);
    let refused: Vec<_> = answers.iter().chain([&alone]).filter(|it| it.status == 429).collect();
    assert!(refused.len() > 1, "nobody was refused");
    for it in refused {
        assert!(it.text.contains("insufficient_quota") && it.header("x-should-retry") == "false", "{}", it.text);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_clients_that_leave_and_a_server_that_fails_twenty_clients_stay_within_the_limit_and_the_ledger_is_exact()
{
    let (_alone, user) = (LLM_TURN.write().await, User::new("toby").await);
    let (id, key) = limited(&user, "toby", json!({"requests_per_minute": 30, "budget_usd_per_month": 1})).await;
    let begun = || chunks("A growth of cells.")[..3].to_vec();
    let broken = 6;
    llm().script((0..broken).flat_map(|_| {
        [Behaviour::Status(500, None), Behaviour::Status(429, Some(0)), Behaviour::Stream(begun(), Ending::CutOff)]
    }));
    // Eight pieces, so that who leaves half a second later leaves in the middle.
    llm().behave(Behaviour::Slow(Duration::from_millis(120), "A growth of cells.".into()));
    let started = Instant::now();
    let clients = (0..20).map(async |number| {
        let mut whole = 0;
        for round in 0..3 {
            let messages = json!([{"role": "user", "content": format!("of toby: {number} {round}")}]);
            let body = json!({"model": "stand-in", "messages": messages, "stream": true, "max_tokens": 20});
            let request = complete(&user, &key, &body);
            let leaves = (number + round) % 3 == 0;
            let request = if leaves { request.timeout(Duration::from_millis(500)) } else { request };
            match request.send().await {
                Ok(answer) => {
                    let status = answer.status().as_u16();
                    let text = answer.text().await.unwrap();
                    assert!([200, 429, 502].contains(&status), "{status}: {text}");
                    whole += u64::from(text.ends_with("data: [DONE]\n\n"));
                }
                Err(error) => assert!(leaves && error.is_timeout(), "{error}"),
            }
        }
        whole
    });
    let delivered: u64 = join_all(clients).await.into_iter().sum();
    let month = ledger(&user, &id).await;
    llm().behave(Behaviour::Answer(explanation(HONEST)));
    let number = |name: &str| month[name].as_u64().unwrap();
    assert_within_limit(30, number("requests"), started);
    // What the server counts: each call was trouble, or a whole answer.
    let calls = calls_of("toby");
    let whole = calls - 3 * broken;
    assert!(whole > delivered, "{delivered} of {whole}: nobody has left");
    assert!(calls > number("requests"), "nothing was tried again");
    // Only what the server itself broke off is estimated.
    assert_eq!(number("estimated_requests"), broken, "{month}");
    let exact = number("prompt_tokens") + number("completion_tokens") - number("estimated_tokens");
    assert_eq!(exact, whole * TOKENS, "{month}");
}
