//! Photos through the functions that Terraform has put behind the emulator's HTTP API, queue, stream
//! and schedule.

use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::{Client, Method, RequestBuilder, StatusCode};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use shared::api::admin::{NewKey, Scope};
use shared::auth::keys::ApiKey;
use shared::aws::{DynamoCallers, DynamoJobStore, S3BlobStore, SqsJobQueue};
use shared::clock::Clock;
use shared::job::{Job, Record};
use shared::message::Message;
use shared::ports::{BlobStore, Callers, JobQueue, JobStore};
use tokio::sync::RwLock;

use crate::lambda::Lambda;
use crate::llm_server::{Behaviour, HONEST, explanation};
use crate::support::{PATIENCE, hex_sha256, llm, of_stage, sample, sdk, within};

/// Somebody with a key of their own.
pub struct User {
    pub http: Client,
    url: String,
    pub key: String,
}

impl User {
    pub async fn new(caller: &str) -> Self {
        let callers = DynamoCallers::new(&sdk().await, of_stage("CALLERS_TABLE_NAME"));
        let scopes = vec![Scope::Jobs, Scope::Admin];
        let new = NewKey::plain(caller.into(), String::new(), scopes);
        let (key, text) = ApiKey::make(new, Clock::System.now()).unwrap();
        assert!(callers.create_key(&key).await.unwrap());
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = Client::builder().no_proxy().timeout(Duration::from_secs(30)).build().unwrap();
        Self { http, url: of_stage("API_URL"), key: text.expose_secret().to_owned() }
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url)).bearer_auth(&self.key)
    }

    pub async fn submit(&self, query: &str, photo: Vec<u8>) -> String {
        let answer =
            self.request(Method::POST, &format!("/submit{query}")).header("content-type", "image/png").body(photo);
        let answer = answer.send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::ACCEPTED, "{}", answer.text().await.unwrap());
        let body: Value = answer.json().await.unwrap();
        body["request_id"].as_str().unwrap().to_owned()
    }

    pub async fn ask(&self, prompt: &Value) -> String {
        let answer = self.request(Method::POST, "/submit").json(prompt).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::ACCEPTED, "{}", answer.text().await.unwrap());
        let body: Value = answer.json().await.unwrap();
        assert_eq!(body["status"], "awaiting_description");
        body["request_id"].as_str().unwrap().to_owned()
    }

    /// The result once the job has ended.
    pub async fn ended(&self, id: &str) -> Value {
        let started = Instant::now();
        loop {
            let answer = self.request(Method::GET, &format!("/result/{id}?wait=10")).send().await.unwrap();
            assert_eq!(answer.status(), StatusCode::OK);
            let result: Value = answer.json().await.unwrap();
            let status = result["status"].as_str().unwrap();
            if !["pending", "processing", "awaiting_description"].contains(&status) {
                return result;
            }
            assert!(started.elapsed() < PATIENCE, "job {id} is still {status}");
        }
    }
}

/// The stage has one LLM. Who lets it fail is alone with it.
pub static LLM_TURN: RwLock<()> = RwLock::const_new(());

pub async fn record(id: &str) -> Option<Record> {
    DynamoJobStore::new(&sdk().await, of_stage("TABLE_NAME")).get(id.parse().unwrap()).await.unwrap()
}

async fn job(id: &str) -> Job {
    record(id).await.and_then(Record::into_job).unwrap()
}

#[tokio::test]
async fn a_photo_goes_from_submit_to_a_description_by_the_llm() {
    let (_turn, user) = (LLM_TURN.read().await, User::new("alice").await);
    llm();
    let id = user.submit("", sample("mole-drawn.png")).await;
    let result = user.ended(&id).await;
    assert_eq!(result["status"], "completed", "{result}");
    assert!(!result["predictions"].as_array().unwrap().is_empty(), "{result}");
    assert_eq!(result["description"]["source"], "llm", "{result}");
    assert!(result["description"]["text"].as_str().unwrap().contains(HONEST), "{result}");
    let job = job(&id).await;
    assert_eq!((job.attempts.inference, job.attempts.enrichment), (1, 1));
    // Another caller cannot tell it from no job.
    let stranger = User::new("mallory").await;
    let answer = stranger.request(Method::GET, &format!("/result/{id}")).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::NOT_FOUND);
    let nobody = stranger.http.get(format!("{}/result/{id}", stranger.url)).send().await.unwrap();
    assert_eq!(nobody.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn without_a_description_the_job_ends_after_inference() {
    let user = User::new("bob").await;
    let result = user.ended(&user.submit("?describe=false", sample("mole-drawn.png")).await).await;
    assert_eq!((&result["status"], &result["description"]), (&json!("completed"), &Value::Null), "{result}");
    assert!(!result["predictions"].as_array().unwrap().is_empty(), "{result}");
}

#[tokio::test]
async fn a_blurred_photo_is_sent_back_and_a_picture_of_something_else_gets_no_label() {
    let user = User::new("carol").await;
    let (blurred, other) =
        (user.submit("", sample("blurred.png")).await, user.submit("", sample("not-a-lesion.png")).await);
    let blurred = user.ended(&blurred).await;
    assert_eq!(blurred["status"], "needs_retake", "{blurred}");
    assert!(!blurred["quality"]["reasons"].as_array().unwrap().is_empty(), "{blurred}");
    let other = user.ended(&other).await;
    assert_eq!((&other["status"], &other["predictions"]), (&json!("completed"), &json!([])), "{other}");
    assert!(other["abstained"]["reason"].is_string() && other["description"].is_null(), "{other}");
}

#[tokio::test]
async fn damaged_pixels_fail_for_good_and_say_so() {
    let user = User::new("dave").await;
    let mut damaged = sample("mole-drawn.png");
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0xFF;
    let result = user.ended(&user.submit("", damaged).await).await;
    assert_eq!(
        (&result["status"], &result["error"]["code"]),
        (&json!("failed"), &json!("photo_unreadable")),
        "{result}"
    );
    assert_eq!(result["predictions"], json!([]));
}

#[tokio::test]
async fn a_message_that_cannot_be_read_becomes_a_dead_letter_and_is_redriven() {
    let user = User::new("erin").await;
    let sqs = aws_sdk_sqs::Client::new(&sdk().await);
    sqs.send_message().queue_url(of_stage("QUEUE_URL")).message_body("poison").send().await.unwrap();
    let letters = async || {
        let answer = user.request(Method::GET, "/admin/dead-letters").send().await.unwrap();
        let body: Value = answer.json().await.unwrap();
        body["dead_letters"].as_array().unwrap().clone()
    };
    within("the poison is dead", async || letters().await.len() == 1).await;
    let letter = letters().await.remove(0);
    assert_eq!((&letter["kind"], &letter["size_bytes"]), (&Value::Null, &json!(6)), "{letter}");
    let redrive = user.request(Method::POST, "/admin/dead-letters/redrive").json(&json!({"ids": [letter["id"]]}));
    let redriven: Value = redrive.send().await.unwrap().json().await.unwrap();
    assert_eq!(redriven["redriven"], 1);
    assert_eq!(letters().await.len(), 0);
    within("the poison is dead again", async || letters().await.len() == 1).await;
    sqs.purge_queue().queue_url(of_stage("DEAD_LETTER_QUEUE_URL")).send().await.unwrap();
}

#[tokio::test]
async fn an_llm_that_is_down_hides_no_prediction_and_describes_once_it_is_back() {
    let (_alone, user) = (LLM_TURN.write().await, User::new("frank").await);
    llm().behave(Behaviour::Status(503, Some(1)));
    let id = user.submit("", sample("mole-drawn.png")).await;
    let calls = async || job(&id).await.llm_calls;
    within("the LLM was asked in vain", async || calls().await.iter().any(|call| !call.is_unknown())).await;
    let answer = user.request(Method::GET, &format!("/result/{id}")).send().await.unwrap();
    let open: Value = answer.json().await.unwrap();
    assert_eq!(open["status"], "awaiting_description", "{open}");
    assert!(!open["predictions"].as_array().unwrap().is_empty(), "{open}");
    llm().behave(Behaviour::Answer(explanation(HONEST)));
    let result = user.ended(&id).await;
    assert_eq!(result["status"], "completed", "{result}");
    let calls = calls().await;
    assert!(calls.iter().rev().skip(1).all(|call| call.outcome == "llm_unavailable"), "{calls:?}");
    assert_eq!(calls.last().unwrap().outcome, "ok", "{calls:?}");
}

#[tokio::test]
async fn a_second_delivery_changes_nothing() {
    let user = User::new("grace").await;
    let id = user.submit("?describe=false", sample("mole-drawn.png")).await;
    let queue = SqsJobQueue::new(&sdk().await, of_stage("QUEUE_URL"), None);
    let again = Message::Infer { id: id.parse().unwrap() };
    for _ in 0..3 {
        queue.send(again).await.unwrap();
    }
    user.ended(&id).await;
    let ended = job(&id).await;
    queue.send(again).await.unwrap();
    // Another job behind it has been worked, and so has it.
    user.ended(&user.submit("?describe=false", sample("mole-drawn.png")).await).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(job(&id).await, ended);
    assert_eq!(ended.attempts.inference, 1);
}

#[tokio::test]
async fn a_deleted_job_is_gone_with_its_photo_and_settles() {
    let user = User::new("heidi").await;
    let id = user.submit("?describe=false", sample("mole-drawn.png")).await;
    user.ended(&id).await;
    let blobs = S3BlobStore::new(&sdk().await, of_stage("BUCKET"), true, Clock::System);
    let photo = shared::job::photo_key(id.parse().unwrap());
    assert!(blobs.get(&photo).await.unwrap().is_some());
    let path = format!("/result/{id}");
    assert_eq!(user.request(Method::DELETE, &path).send().await.unwrap().status(), StatusCode::NO_CONTENT);
    assert_eq!(user.request(Method::GET, &path).send().await.unwrap().status(), StatusCode::NOT_FOUND);
    assert_eq!(blobs.get(&photo).await.unwrap(), None);
    within("the tombstone is settled", async || match record(&id).await {
        Some(Record::Tombstone(tombstone)) => tombstone.due_at.is_none() && tombstone.cache_key.is_none(),
        other => panic!("{other:?}"),
    })
    .await;
}

#[tokio::test]
async fn an_upload_takes_what_was_announced_and_becomes_a_job() {
    let user = User::new("ivan").await;
    let photo = sample("mole-drawn.png");
    let announce = async |size: usize| {
        let body = json!({"content_type": "image/png", "size_bytes": size, "sha256": hex_sha256(&photo)});
        user.request(Method::POST, "/uploads").json(&body).send().await.unwrap()
    };
    assert_eq!(announce(26 * 1024 * 1024).await.status(), StatusCode::PAYLOAD_TOO_LARGE);
    let permit: Value = announce(photo.len()).await.json().await.unwrap();
    let put = async |content_type: &str, bytes: &[u8]| {
        let mut put = user.http.put(permit["url"].as_str().unwrap()).body(bytes.to_vec());
        for (name, value) in permit["headers"].as_object().unwrap() {
            let value = if name == "content-type" { content_type } else { value.as_str().unwrap() };
            put = put.header(name, value);
        }
        put.send().await.unwrap().status()
    };
    assert_eq!(put("image/png", &[&photo[..], b"and more"].concat()).await, StatusCode::FORBIDDEN);
    assert_eq!(put("text/html", &photo).await, StatusCode::FORBIDDEN);
    assert_eq!(put("image/png", &photo).await, StatusCode::OK);
    let submit =
        user.request(Method::POST, "/submit").json(&json!({"image_key": permit["image_key"], "describe": false}));
    let submitted: Value = submit.send().await.unwrap().json().await.unwrap();
    let result = user.ended(submitted["request_id"].as_str().unwrap()).await;
    assert_eq!(result["status"], "completed", "{result}");
    let blobs = S3BlobStore::new(&sdk().await, of_stage("BUCKET"), true, Clock::System);
    assert_eq!(blobs.get(permit["image_key"].as_str().unwrap()).await.unwrap(), None, "the upload is erased");
    // Longer than a key of the table may be.
    let long = user.request(Method::POST, "/submit").json(&json!({"image_key": "x".repeat(3000)}));
    assert_eq!(long.send().await.unwrap().status(), StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn anybody_may_read_the_description_of_the_api() {
    let user = User::new("quinn").await;
    let answer = user.http.get(format!("{}/openapi.json", user.url)).send().await.unwrap();
    assert_eq!(
        (answer.status(), &answer.headers()["content-type"]),
        (StatusCode::OK, &"application/json".parse().unwrap())
    );
    let description: Value = answer.json().await.unwrap();
    for path in ["/submit", "/uploads", "/result/{request_id}", "/admin/keys"] {
        assert!(description["paths"][path].is_object(), "{path}");
    }
}

#[tokio::test]
async fn a_client_that_polls_for_five_minutes_gets_an_answer_of_a_megabyte_that_takes_four() {
    let (_alone, user) = (LLM_TURN.write().await, User::new("rupert").await);
    let answer = "A growth of \"pigment cells\".\n".repeat(1_000_000 / 29);
    llm().script([Behaviour::Late(Duration::from_secs(240), answer.clone())]);
    let calls = llm().calls();
    let id = user.ask(&json!({"prompt": "What is a naevus?", "max_tokens": 90_000})).await;
    let polled = async {
        let (started, mut pause) = (Instant::now(), 2);
        loop {
            assert!(started.elapsed() < Duration::from_secs(300), "no answer within five minutes");
            tokio::time::sleep(Duration::from_secs(pause)).await;
            pause = (pause + 1).min(10);
            let answer = user.request(Method::GET, &format!("/result/{id}")).send().await.unwrap();
            assert_eq!(answer.status(), StatusCode::OK);
            let result: Value = answer.json().await.unwrap();
            if result["status"] != "awaiting_description" {
                break result;
            }
            assert!(result["content"].is_null());
        }
    };
    // The prompt holds up no description.
    let described = async {
        within("the LLM is asked", async || llm().calls() > calls).await;
        let photo = user.ended(&user.submit("", sample("mole-drawn.png")).await).await;
        assert_eq!(
            (&photo["status"], &photo["description"]["source"]),
            (&json!("completed"), &json!("llm")),
            "{photo}"
        );
        user.request(Method::GET, &format!("/result/{id}")).send().await.unwrap().json::<Value>().await.unwrap()
    };
    let (result, meanwhile) = tokio::join!(polled, described);
    assert_eq!(meanwhile["status"], "awaiting_description");
    assert_eq!((&result["status"], &result["kind"]), (&json!("completed"), &json!("prompt")), "{}", result["error"]);
    assert!(result["content"] == answer, "not the answer");
    let took = (&result["finish_reason"], &result["token_usage"], result["cost_usd"].as_f64());
    let usage = json!({"prompt_tokens": 19, "completion_tokens": 10});
    assert_eq!(took, (&json!("stop"), &usage, Some(59e-6)));
    assert!(result.get("predictions").is_none() && result["latency_ms"].as_u64().unwrap() >= 240_000);
    let record = job(&id).await;
    assert_eq!((record.attempts.inference, record.attempts.enrichment, llm().calls() - calls), (0, 1, 2));
    let blobs = S3BlobStore::new(&sdk().await, of_stage("BUCKET"), true, Clock::System);
    let keys = [shared::job::prompt_key(record.id), shared::job::answer_key(record.id, 1)];
    let stored = async || {
        let found = keys.each_ref().map(async |key| blobs.get(key).await.unwrap().is_some());
        futures_util::future::join_all(found).await
    };
    assert_eq!(stored().await, [true, true]);
    let deleted = user.request(Method::DELETE, &format!("/result/{id}")).send().await.unwrap().status();
    assert_eq!(deleted, StatusCode::NO_CONTENT);
    assert_eq!(stored().await, [false, false]);
}

#[tokio::test]
async fn an_error_of_the_llm_fails_a_prompt_with_its_code_and_json_is_json() {
    let (_alone, user) = (LLM_TURN.write().await, User::new("sybil").await);
    for (behaviour, code) in [
        (Behaviour::Status(400, None), json!("llm_refused")),
        (Behaviour::Answer("no JSON".into()), json!("llm_invalid_json")),
        (Behaviour::Answer("{}".into()), Value::Null),
    ] {
        llm().behave(behaviour);
        let id = user.ask(&json!({"prompt": "Three naevi, as JSON.", "format": "json"})).await;
        let result = user.ended(&id).await;
        assert_eq!(result["error"].get("code").unwrap_or(&Value::Null), &code, "{result}");
        assert_eq!(result["content"], if code.is_null() { json!("{}") } else { Value::Null }, "{result}");
    }
    llm().behave(Behaviour::Answer(explanation(HONEST)));
}

/// The deployment writes the first key by a script of its own; the functions must know it as theirs.
#[tokio::test]
async fn the_first_key_of_the_deployment_makes_others_and_revokes_them() {
    let operator = User { key: of_stage("LESION_API_KEY"), ..User::new("nobody").await };
    let body = json!({"caller": "kim", "name": "a phone"});
    let answer = operator.request(Method::POST, "/admin/keys").json(&body).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::CREATED, "{}", answer.text().await.unwrap());
    let created: Value = answer.json().await.unwrap();
    let kim = User { key: created["key"].as_str().unwrap().to_owned(), ..User::new("nobody").await };
    let list = async || kim.request(Method::GET, "/results").send().await.unwrap().status();
    assert_eq!(list().await, StatusCode::OK);
    let admin = kim.request(Method::GET, "/admin/keys").send().await.unwrap().status();
    assert_eq!(admin, StatusCode::FORBIDDEN);
    let id = created["id"].as_str().unwrap();
    let revoke = operator.request(Method::DELETE, &format!("/admin/keys/{id}")).send().await.unwrap();
    assert!(revoke.status().is_success(), "{}", revoke.status());
    assert_eq!(list().await, StatusCode::UNAUTHORIZED);
    let keys: Value = operator.request(Method::GET, "/admin/keys").send().await.unwrap().json().await.unwrap();
    let shown = keys["keys"].as_array().unwrap();
    assert!(shown.iter().any(|key| key["caller"] == "operator" && key["name"] == "made by the deployment"), "{keys}");
}

/// Everything that the functions printed, and the emulator of them.
#[tokio::test]
async fn no_log_line_holds_a_photo_a_prompt_a_completion_or_a_key() {
    let (_turn, user) = (LLM_TURN.read().await, User::new("judy").await);
    let photo = sample("hairy-mole-drawn.png");
    llm();
    let id = user.submit("", photo.clone()).await;
    user.ended(&id).await;
    let asked = llm().requests();
    let key = asked.last().unwrap().0["authorization"].to_str().unwrap().trim_start_matches("Bearer ").to_owned();
    let prompt = asked.last().unwrap().1["messages"][0]["content"].as_str().unwrap().to_owned();
    let mut log = std::fs::read(of_stage("EMULATOR_LOG")).unwrap();
    let about = |log: &[u8]| log.windows(id.len()).any(|window| window == id.as_bytes());
    assert!(about(&log), "the log is that of these functions");
    // What answers HTTP is logged by the emulator's CloudWatch alone.
    let lambda = Lambda::new();
    for function in ["submit", "result", "admin"] {
        let lines = lambda.log(function).await.join("\n");
        assert!(about(lines.as_bytes()) || function == "admin", "{function} has logged nothing of the job");
        log.extend(lines.as_bytes());
    }
    let holds = |what: &[u8]| log.windows(what.len()).any(|window| window == what);
    let (user_key, user_secret) = (user.key.as_bytes(), user.key.rsplit('_').next().unwrap().as_bytes());
    assert!(!key.is_empty() && !holds(key.as_bytes()), "the LLM's key");
    assert!(!holds(user_key) && !holds(user_secret), "the caller's key");
    assert!(!holds(HONEST.as_bytes()) && !holds(&HONEST.as_bytes()[..40]), "the completion");
    assert!(!holds(&prompt.as_bytes()[..40]), "the prompt");
    let encoded = STANDARD.encode(&photo);
    assert!(!holds(&photo[..64]) && !holds(&encoded.as_bytes()[..64]), "the photo");
}
