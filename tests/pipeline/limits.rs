//! What keys may ask of the models: limits that hold for many clients at once, and a ledger that says
//! what the model's server says.

use std::sync::Arc;
use std::time::Duration;

use axum::{Extension, Router};
use chat::{Cache, Chat, Meter, OnLeave};
use chrono::TimeDelta;
use futures_util::future::join_all;
use reqwest::{Method, Response};
use serde_json::{Value, json};
use shared::api::admin::{KeyLimits, Scope};
use shared::auth::Identity;
use shared::clock::Clock;
use shared::config::Env;
use shared::embedded::SqliteCallers;
use shared::llm::Llm;
use shared::llm::models::Models;
use shared::ports::Callers;

use crate::proxy::models_file;
use crate::support::eventually;
use crate::support::keyed::Keyed;
use crate::support::llm_server::{Behaviour, Ending, LlmServer, chunks};

/// What one answer of the server takes.
const PROMPT: u64 = 19;
const COMPLETION: u64 = 10;
/// At 1 and 10 USD for a million.
const COST: f64 = 119e-6;

struct Scene {
    host: Keyed,
    llm: LlmServer,
}

/// A key with limits.
struct Limited {
    id: String,
    key: String,
}

impl Scene {
    async fn new(script: impl IntoIterator<Item = Behaviour>) -> Self {
        let llm = LlmServer::start(script).await;
        let fast = json!({"base_url": llm.base_url(), "prompt_usd_per_million": 1, "completion_usd_per_million": 10});
        let slow = json!({"base_url": llm.base_url()});
        Self::of(llm, &json!({"fast": fast, "slow": slow})).await
    }

    /// With a model that is never available and another that stands in for it, at so many USD for a million
    /// tokens.
    async fn standing_in(script: impl IntoIterator<Item = Behaviour>, [first, other]: [u32; 2]) -> Self {
        let (absent, llm) = (LlmServer::start([]).await, LlmServer::start(script).await);
        absent.behave(Behaviour::Status(503, None));
        let model = |server: &LlmServer, usd: u32| {
            let base_url = server.base_url();
            json!({"base_url": base_url, "prompt_usd_per_million": usd, "completion_usd_per_million": usd})
        };
        let (mut fast, sure) = (model(&absent, first), model(&llm, other));
        fast["fallback"] = json!("sure");
        Self::of(llm, &json!({"fast": fast, "sure": sure})).await
    }

    /// With these models; the server behaves well behind its script.
    async fn of(llm: LlmServer, models: &Value) -> Self {
        llm.behave(Behaviour::Answer("A growth of cells.".into()));
        let (_folder, path) = models_file(models);
        let host = Keyed::start(&[("LLM_MODELS_FILE", &path), ("REQUESTS_PER_MINUTE", "100000")]).await;
        Self { host, llm }
    }

    async fn key(&self, limits: Value) -> Limited {
        let mut new = json!({"caller": "ward"});
        new.as_object_mut().unwrap().extend(limits.as_object().unwrap().clone());
        let made = self.host.make(new).await;
        for (name, limit) in limits.as_object().unwrap() {
            assert_eq!(&made[name], limit);
        }
        let text = |name: &str| made[name].as_str().unwrap().to_owned();
        Limited { id: text("id"), key: text("key") }
    }

    fn request(&self, key: &Limited, body: &Value) -> reqwest::RequestBuilder {
        self.host.request(Method::POST, "/v1/chat/completions", &key.key).json(body)
    }

    async fn ask(&self, key: &Limited, body: &Value) -> Response {
        self.request(key, body).send().await.unwrap()
    }

    /// The ledger once nothing is under way: the one month, or null.
    async fn ledger(&self, key: &Limited) -> Value {
        let mut usage = Value::Null;
        eventually("everything is settled", async || {
            let path = format!("/admin/keys/{}/usage", key.id);
            usage = self.host.get(&path, &self.host.admin).await.json().await.unwrap();
            usage["under_way"] == 0
        })
        .await;
        usage["months"][0].clone()
    }
}

fn asked(stream: bool) -> Value {
    // Bounds the answer, so that little is reserved.
    json!({"model": "fast", "messages": [{"role": "user", "content": "?"}], "stream": stream, "max_tokens": 20})
}

fn header<'a>(response: &'a Response, name: &str) -> &'a str {
    response.headers().get(name).map_or("", |value| value.to_str().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_clients_at_once_make_no_more_requests_than_their_key_may() {
    let scene = Scene::new([]).await;
    let key = scene.key(json!({"requests_per_minute": 30})).await;
    let clients = (0..20).map(async |number| {
        let mut let_in = 0;
        for round in 0..5 {
            let response = scene.ask(&key, &asked((number + round) % 2 == 0)).await;
            assert_eq!(header(&response, "x-ratelimit-limit-requests"), "30");
            match response.status().as_u16() {
                200 => let_in += 1,
                429 => {
                    assert_eq!(header(&response, "retry-after"), "2", "one comes back in two seconds");
                    assert_eq!(header(&response, "x-ratelimit-remaining-requests"), "0");
                    let error: Value = response.json().await.unwrap();
                    assert_eq!(error["error"]["code"], "too_many_requests");
                    continue;
                }
                other => panic!("{other}"),
            }
            response.bytes().await.unwrap();
        }
        let_in
    });
    let let_in: usize = join_all(clients).await.into_iter().sum();
    assert_eq!((let_in, scene.llm.calls()), (30, 30));
    let month = scene.ledger(&key).await;
    assert_eq!((&month["requests"], &month["estimated_requests"]), (&json!(30), &json!(0)));
    scene.host.clock.advance(TimeDelta::seconds(2));
    let response = scene.ask(&key, &asked(false)).await;
    assert_eq!((response.status().as_u16(), header(&response, "x-ratelimit-reset-requests")), (200, "60s"));
    assert_eq!(scene.ask(&key, &asked(false)).await.status(), 429);
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_clients_at_once_exceed_their_tokens_by_no_more_than_one_request() {
    let scene = Scene::new([]).await;
    let limit = 290;
    let key = scene.key(json!({"tokens_per_minute": limit})).await;
    let clients = (0..20).map(async |number| {
        for round in 0..5 {
            let response = scene.ask(&key, &asked((number + round) % 2 == 0)).await;
            assert!(matches!(response.status().as_u16(), 200 | 429));
            assert_eq!(header(&response, "x-ratelimit-limit-tokens"), "290");
            assert_eq!(response.status() == 429, !header(&response, "retry-after").is_empty());
            response.bytes().await.unwrap();
        }
    });
    join_all(clients).await;
    // Alone, a client gets as far as the limit goes, once nothing is reserved for an answer that has just come.
    let month = loop {
        let month = scene.ledger(&key).await;
        if scene.ask(&key, &asked(false)).await.status() != 200 {
            break month;
        }
    };
    let tokens = month["prompt_tokens"].as_u64().unwrap() + month["completion_tokens"].as_u64().unwrap();
    assert_eq!(tokens, scene.llm.calls() as u64 * (PROMPT + COMPLETION));
    assert!((limit..limit + PROMPT + COMPLETION).contains(&tokens), "{tokens}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_budget_is_kept_and_the_ledger_agrees_with_the_server_through_retries_and_broken_connections() {
    let begun = || chunks("A growth of cells.")[..3].to_vec();
    let trouble = (0..12).flat_map(|_| {
        [Behaviour::Status(500, None), Behaviour::Status(429, Some(0)), Behaviour::Stream(begun(), Ending::CutOff)]
    });
    let scene = Scene::new(trouble).await;
    let budget = 0.004;
    let key = scene.key(json!({"budget_usd_per_month": budget})).await;
    let clients = (0..20).map(async |_| {
        let mut whole = 0;
        for _ in 0..5 {
            let response = scene.ask(&key, &asked(true)).await;
            let (status, should_retry) = (response.status().as_u16(), header(&response, "x-should-retry").to_owned());
            let text = response.text().await.unwrap();
            match status {
                200 => whole += u64::from(text.contains("[DONE]")),
                429 if text.contains("insufficient_quota") => assert_eq!(should_retry, "false"),
                429 | 500 | 502 => {}
                other => panic!("{other}"),
            }
        }
        whole
    });
    let mut whole: u64 = join_all(clients).await.into_iter().sum();
    // Alone, a client gets as far as the budget goes, once nothing is reserved for an answer that has just come.
    let month = loop {
        let month = scene.ledger(&key).await;
        let response = scene.ask(&key, &asked(true)).await;
        if response.status() != 200 {
            break month;
        }
        whole += u64::from(response.text().await.unwrap().contains("[DONE]"));
    };
    let number = |name: &str| month[name].as_u64().unwrap();
    let broken = 12;
    assert_eq!(number("estimated_requests"), broken);
    let exact = number("prompt_tokens") + number("completion_tokens") - number("estimated_tokens");
    assert_eq!(exact, whole * (PROMPT + COMPLETION), "{month}");
    let (cost, estimated) = (month["cost_usd"].as_f64().unwrap(), month["estimated_cost_usd"].as_f64().unwrap());
    assert!((cost - estimated - whole as f64 * COST).abs() < 1e-9, "{month}");
    // No estimate is more than its reservation, which is 200 µUSD for the answer and as many bytes as the
    // request has for the prompt.
    assert!(estimated > 0.0 && estimated <= broken as f64 * 400e-6, "{month}");
    assert!(cost >= budget && cost < budget + 400e-6, "{month}");
}

#[tokio::test]
async fn what_a_model_answers_that_stands_in_is_entered_at_its_own_price() {
    for prices in [[1000, 10_000], [10_000, 1000]] {
        let scene = Scene::standing_in([], prices).await;
        let key = scene.key(json!({})).await;
        for stream in [false, true] {
            let response = scene.ask(&key, &asked(stream)).await;
            assert_eq!(response.status(), 200, "{prices:?}");
            response.bytes().await.unwrap();
        }
        let month = scene.ledger(&key).await;
        assert_eq!((&month["requests"], &month["estimated_requests"]), (&json!(2), &json!(0)), "{prices:?}");
        let cost = 2.0 * (PROMPT + COMPLETION) as f64 * f64::from(prices[1]) / 1e6;
        assert!((month["cost_usd"].as_f64().unwrap() - cost).abs() < 1e-9, "{prices:?}: {month}");
        assert_eq!(scene.llm.calls(), 2);
    }
}

#[tokio::test]
async fn a_try_that_may_be_billed_is_entered_at_the_price_of_its_model_beside_what_is_told_exactly() {
    let (silent, llm) = (LlmServer::start([]).await, LlmServer::start([]).await);
    // Twice it breaks off, having perhaps worked.
    silent.behave(Behaviour::CutOff);
    let dear = json!({"base_url": silent.base_url(), "fallback": "free",
        "prompt_usd_per_million": 1000, "completion_usd_per_million": 1000});
    let free = json!({"base_url": llm.base_url()});
    let scene = Scene::of(llm, &json!({"fast": dear, "free": free})).await;
    let key = scene.key(json!({})).await;
    assert_eq!(scene.ask(&key, &asked(false)).await.status(), 200);
    let month = scene.ledger(&key).await;
    let number = |name: &str| month[name].as_u64().unwrap();
    let again = number("estimated_tokens");
    assert!(silent.calls() == 2 && again > 0 && again % 2 == 0, "{month}");
    // Ten tokens of each have come.
    let taken = (number("prompt_tokens"), number("completion_tokens"));
    assert_eq!(taken, (PROMPT + again - 20, COMPLETION + 20), "{month}");
    assert!((month["cost_usd"].as_f64().unwrap() - again as f64 / 1000.0).abs() < 1e-9, "{month}");
}

#[tokio::test]
async fn of_an_answer_that_nobody_has_seen_what_the_server_may_have_done_is_entered_within_what_was_reserved() {
    for (first, stream, completion, estimated) in [
        // Three seconds, in which more than 20 tokens are written.
        (Behaviour::Stall, false, COMPLETION + 20, 1),
        (Behaviour::Stall, true, COMPLETION, 1),
        (Behaviour::Status(502, None), false, COMPLETION, 1),
        (Behaviour::Status(504, None), true, COMPLETION, 1),
        (Behaviour::Status(503, None), false, COMPLETION, 0),
        // 43 bytes of it have come.
        (Behaviour::CutOff, false, COMPLETION + 10, 1),
    ] {
        let llm = LlmServer::start([first.clone()]).await;
        let timeout_seconds = if matches!(first, Behaviour::Stall) { 3 } else { 60 };
        let model = json!({"base_url": llm.base_url(), "timeout_seconds": timeout_seconds});
        let scene = Scene::of(llm, &json!({"fast": model})).await;
        let key = scene.key(json!({})).await;
        let response = scene.ask(&key, &asked(stream)).await;
        assert_eq!(response.status(), 200, "{first:?}");
        response.bytes().await.unwrap();
        let month = scene.ledger(&key).await;
        let seen = (&month["completion_tokens"], &month["estimated_requests"]);
        assert_eq!(seen, (&json!(completion), &json!(estimated)), "{first:?} {stream}: {month}");
    }
}

#[tokio::test]
async fn no_number_of_choices_empties_the_bucket_of_tokens() {
    let scene = Scene::new([]).await;
    // An answer takes 29 of them.
    let key = scene.key(json!({"tokens_per_minute": 40})).await;
    let mut many = asked(false);
    many["n"] = json!(5_000_000_000_000_000_u64);
    many.as_object_mut().unwrap().remove("max_tokens");
    assert_eq!(scene.ask(&key, &asked(false)).await.status(), 200);
    scene.llm.behave(Behaviour::Status(400, None));
    assert!(!scene.ask(&key, &many).await.status().is_success());
    scene.llm.behave(Behaviour::Answer("A growth of cells.".into()));
    let month = scene.ledger(&key).await;
    assert_eq!((&month["requests"], &month["prompt_tokens"]), (&json!(2), &json!(PROMPT)), "{month}");
    let statuses = [scene.ask(&key, &asked(false)).await.status(), scene.ask(&key, &asked(false)).await.status()];
    assert_eq!(statuses, [200, 429], "58 of 40 are taken");
}

#[tokio::test]
async fn of_a_client_that_leaves_the_usage_that_was_told_on_the_way_is_an_estimate() {
    let so_far =
        r#"{"choices":[{"index":0,"delta":{"content":"A"}}],"usage":{"prompt_tokens":3,"completion_tokens":1}}"#;
    let scene = Scene::new([Behaviour::Stream(vec![format!("data: {so_far}\n\n")], Ending::Stall)]).await;
    let key = scene.key(json!({})).await;
    let mut response = scene.ask(&key, &asked(true)).await;
    assert!(response.chunk().await.unwrap().is_some());
    drop(response);
    let month = scene.ledger(&key).await;
    assert_eq!((&month["prompt_tokens"], &month["estimated_requests"]), (&json!(3), &json!(1)), "{month}");
}

#[tokio::test]
async fn what_is_told_exactly_is_entered_whole_whatever_an_earlier_try_may_have_taken() {
    // More than is reserved for an answer of 5 tokens.
    let scene = Scene::new([Behaviour::CutOff]).await;
    let key = scene.key(json!({})).await;
    let mut body = asked(false);
    body["max_tokens"] = json!(5);
    assert_eq!(scene.ask(&key, &body).await.status(), 200);
    let month = scene.ledger(&key).await;
    // And of what came before it was cut off no more than was reserved.
    let seen = (&month["completion_tokens"], &month["estimated_requests"]);
    assert_eq!(seen, (&json!(COMPLETION + 5), &json!(1)), "{month}");
}

#[tokio::test]
async fn what_is_reserved_is_the_price_of_the_dearer_model_whichever_of_the_two_will_answer() {
    // About 90 bytes and 20 tokens: 0.11 USD with the cheap one, 1.1 USD with the dear one.
    for (prices, let_in) in [([1000, 1000], true), ([1000, 10_000], false), ([10_000, 1000], false)] {
        let begun = chunks("A growth of cells.")[..4].to_vec();
        let scene = Scene::standing_in([Behaviour::Stream(begun, Ending::Stall)], prices).await;
        let key = scene.key(json!({"budget_usd_per_month": 0.75})).await;
        let mut under_way = scene.ask(&key, &asked(true)).await;
        assert_eq!(under_way.status(), 200, "{prices:?}");
        assert!(under_way.chunk().await.unwrap().is_some(), "{prices:?}");
        let second = scene.ask(&key, &asked(false)).await;
        assert_eq!(second.status(), if let_in { 200 } else { 429 }, "{prices:?}");
        let text = second.text().await.unwrap();
        assert_eq!(text.contains("insufficient_quota"), !let_in, "{prices:?}: {text}");
        assert_eq!(scene.llm.calls(), 1 + usize::from(let_in), "{prices:?}: the refused one was asked");
        // What was reserved and not taken is there again.
        drop(under_way);
        let month = scene.ledger(&key).await;
        assert!(month["cost_usd"].as_f64().unwrap() < 0.75, "{prices:?}: {month}");
        assert_eq!(scene.ask(&key, &asked(false)).await.status(), 200, "{prices:?}");
    }
}

#[tokio::test]
async fn a_key_sees_and_asks_the_models_that_it_may_and_finds_no_way_around_its_limits() {
    let scene = Scene::new([]).await;
    let key = scene.key(json!({"models": ["slow"]})).await;
    assert_eq!(scene.ask(&key, &asked(false)).await.status(), 404);
    let mut slow = asked(false);
    slow["model"] = json!("slow");
    assert_eq!(scene.ask(&key, &slow).await.status(), 200);
    let listed: Value = scene.host.get("/v1/models", &key.key).await.json().await.unwrap();
    assert_eq!(listed["data"].as_array().unwrap().len(), 1);
    assert_eq!(scene.host.status(Method::GET, "/v1/models/fast", &key.key).await, 404);
    for path in ["/chat", "/submit"] {
        let elsewhere = scene.host.request(Method::POST, path, &key.key);
        let elsewhere = elsewhere.json(&json!({"messages": [{"role": "user", "content": "?"}]})).send().await.unwrap();
        assert_eq!(elsewhere.status(), 403, "{path}");
    }
    assert_eq!(scene.llm.calls(), 1);
    let month = scene.ledger(&key).await;
    assert_eq!((&month["requests"], &month["cost_usd"]), (&json!(1), &json!(0.0)), "slow has no price");
}

#[tokio::test]
async fn without_a_valid_key_the_answer_is_of_openais_shape_as_well() {
    let scene = Scene::new([]).await;
    let wrong = Limited { id: String::new(), key: "sk-nobody".to_owned() };
    let response = scene.ask(&wrong, &asked(false)).await;
    assert_eq!(response.status(), 401);
    let body: Value = response.json().await.unwrap();
    assert_eq!(
        (&body["error"]["type"], &body["error"]["code"]),
        (&json!("authentication_error"), &json!("unauthorized"))
    );
    assert_eq!(scene.llm.calls(), 0);
}

#[tokio::test]
async fn limits_that_cannot_be_are_refused_when_a_key_is_made() {
    let scene = Scene::new([]).await;
    for limits in [
        json!({"models": []}),
        json!({"models": [""]}),
        json!({"requests_per_minute": 0}),
        json!({"tokens_per_minute": 0}),
        json!({"tokens_per_minute": -1}),
        json!({"tokens_per_minute": 1_000_000_001}),
        json!({"budget_usd_per_month": -0.1}),
        json!({"budget_usd_per_month": 1e7}),
    ] {
        let mut new = json!({"caller": "ward"});
        new.as_object_mut().unwrap().extend(limits.as_object().unwrap().clone());
        let request = scene.host.request(Method::POST, "/admin/keys", &scene.host.admin);
        assert_eq!(request.json(&new).send().await.unwrap().status(), 400, "{limits}");
    }
}

#[tokio::test]
async fn of_a_client_that_leaves_what_was_seen_is_entered_and_flagged() {
    let scene = Scene::new([Behaviour::Stream(chunks("A growth of cells.")[..4].to_vec(), Ending::Stall)]).await;
    let key = scene.key(json!({})).await;
    let mut response = scene.ask(&key, &asked(true)).await;
    assert!(response.chunk().await.unwrap().is_some());
    drop(response);
    let month = scene.ledger(&key).await;
    assert_eq!((&month["requests"], &month["estimated_requests"]), (&json!(1), &json!(1)));
    let (prompt, completion) = (month["prompt_tokens"].as_u64().unwrap(), month["completion_tokens"].as_u64().unwrap());
    assert!((1..200).contains(&prompt) && (1..=20).contains(&completion), "{month}");
    assert_eq!(scene.llm.calls(), 1);
}

/// As on Lambda, which goes on whoever leaves.
#[tokio::test]
async fn where_an_answer_is_read_to_its_end_for_a_client_that_left_the_ledger_is_exact() {
    let llm = LlmServer::start([]).await;
    llm.behave(Behaviour::After(Duration::from_secs(1)));
    let (folder, path) = models_file(&json!({"fast": {"base_url": llm.base_url()}}));
    let callers = SqliteCallers::open(&folder.path().join("callers.sqlite")).unwrap();
    let chat = Chat {
        llm: Arc::new(Llm::from_env(&Env::of([] as [(&str, &str); 0])).unwrap()),
        models: Arc::new(Models::from_env(&Env::of([("LLM_MODELS_FILE", path.as_str())])).unwrap()),
        meter: Arc::new(Meter::new(callers.clone(), Clock::System)),
        cache: Cache::default(),
        on_leave: OnLeave::Drain,
    };
    let identity = Identity {
        caller: "ward".into(),
        scopes: vec![Scope::Jobs],
        key_id: Some("0123456789ab".into()),
        limits: KeyLimits::default(),
        expires_at: None,
    };
    let router: Router = chat::router(Arc::new(chat)).layer(Extension(identity));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1/chat/completions", listener.local_addr().unwrap());
    let server = tokio::spawn(async move { axum::serve(listener, router).await });
    let request = crate::support::client().post(url).json(&asked(false)).timeout(Duration::from_millis(300));
    assert!(request.send().await.is_err());
    eventually("the answer is settled", async || {
        callers
            .find_account("0123456789ab")
            .await
            .unwrap()
            .months
            .values()
            .any(|month| (month.requests, month.estimated_requests, month.prompt_tokens) == (1, 0, PROMPT))
    })
    .await;
    assert_eq!(llm.calls(), 1);
    server.abort();
}
