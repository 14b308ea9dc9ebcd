//! The events that AWS documents (`events/README.md`), handed to the packaged functions as Lambda does:
//! as they stand, with fields that nobody has heard of yet, and without those that may be missing.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use shared::api::admin::{NewKey, Scope};
use shared::auth::keys::ApiKey;
use shared::aws::{DynamoCallers, DynamoJobStore};
use shared::clock::Clock;
use shared::job::{DescriptionSource, FailureCode, Job, Record, Status};
use shared::message::Message;
use shared::ports::{Callers, JobStore};
use uuid::Uuid;

use crate::llm_server::LlmServer;
use crate::ports::{creation, new_job, start};
use crate::runtime::Function;
use crate::support::{fresh_table, of_stage, sample, sdk};

/// A documented event.
fn documented(json: &str) -> Value {
    serde_json::from_str(json).unwrap()
}

/// What becomes of a documented event before a function gets it.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Variant {
    Documented,
    /// With a field of a later version of the format in each object.
    Extended,
    /// Without the fields that are not needed, or not always there.
    Reduced,
}

impl Variant {
    /// `objects` are JSON pointers to what may be extended, `optional` to what may be missing.
    fn of(self, mut event: Value, objects: &[&str], optional: &[&str]) -> Value {
        match self {
            Self::Documented => {}
            Self::Extended => {
                for object in objects {
                    event.pointer_mut(object).unwrap()["fieldOfALaterVersion"] = json!({"a": [1, null, "b"]});
                }
            }
            Self::Reduced => {
                for field in optional {
                    let (object, name) = field.rsplit_once('/').unwrap();
                    let removed = event.pointer_mut(object).unwrap().as_object_mut().unwrap().remove(name);
                    assert!(removed.is_some(), "{field} is not in the documented event");
                }
            }
        }
        event
    }

    /// A request to the HTTP API.
    fn http(self, method: &str, path: &str, key: &str, body: Option<(&str, &str, bool)>) -> Value {
        let mut event = documented(include_str!("events/http.json"));
        let route = format!("{method} {path}");
        for name in ["/routeKey", "/requestContext/routeKey"] {
            *event.pointer_mut(name).unwrap() = json!(route);
        }
        event["rawPath"] = json!(path);
        event["rawQueryString"] = json!("");
        event["requestContext"]["http"]["method"] = json!(method);
        event["requestContext"]["http"]["path"] = json!(path);
        event["headers"]["authorization"] = json!(format!("Bearer {key}"));
        event.as_object_mut().unwrap().remove("body");
        if let Some((content_type, text, is_base64)) = body {
            event["headers"]["content-type"] = json!(content_type);
            (event["body"], event["isBase64Encoded"]) = (json!(text), json!(is_base64));
        }
        let objects = ["", "/requestContext", "/requestContext/http", "/requestContext/authorizer"];
        let optional = [
            "/cookies",
            "/queryStringParameters",
            "/pathParameters",
            "/stageVariables",
            "/requestContext/authentication",
            "/requestContext/authorizer",
            "/requestContext/domainPrefix",
            "/requestContext/http/userAgent",
        ];
        self.of(event, &objects, &optional)
    }

    /// Two messages, of which the second is the documented "test".
    fn messages(self, first: Message) -> Value {
        let mut event = documented(include_str!("events/sqs.json"));
        event["Records"][0]["body"] = json!(first.encode());
        if self == Self::Extended {
            event["Records"][0]["attributes"]["AWSTraceHeader"] = json!("Root=1-5e9f0c65-1de4d666d4dd26aced652b6c");
            event["Records"][0]["messageAttributes"]["a"] = json!({"dataType": "String", "stringValue": "b"});
        }
        let names = ["messageAttributes", "attributes", "md5OfBody", "eventSource", "eventSourceARN", "awsRegion"];
        let optional: Vec<_> = (0..2).flat_map(|at| names.map(|name| format!("/Records/{at}/{name}"))).collect();
        let optional: Vec<_> = optional.iter().map(String::as_str).collect();
        self.of(event, &["", "/Records/0", "/Records/1"], &optional)
    }

    /// Three changes, of which the second is of this job and the others are of the documented table.
    fn changes(self, id: Uuid) -> Value {
        let mut event = documented(include_str!("events/stream.json"));
        event["Records"][1]["dynamodb"]["Keys"] = json!({"id": {"S": id.to_string()}});
        if self == Self::Extended {
            // Of an item that its time to live has removed.
            let ttl = json!({"type": "Service", "principalId": "dynamodb.amazonaws.com"});
            event["Records"][2]["userIdentity"] = ttl;
            event["Records"][1]["dynamodb"]["ApproximateCreationDateTime"] = json!(1_693_997_155.5);
        }
        // DynamoDB's API reference calls every field of a record optional.
        let optional = [
            "eventID",
            "eventName",
            "eventVersion",
            "eventSource",
            "awsRegion",
            "eventSourceARN",
            "dynamodb/NewImage",
            "dynamodb/OldImage",
            "dynamodb/SizeBytes",
            "dynamodb/StreamViewType",
        ];
        let optional: Vec<_> = optional.iter().map(|name| format!("/Records/1/{name}")).collect();
        let optional: Vec<_> = optional.iter().map(String::as_str).collect();
        self.of(event, &["", "/Records/0", "/Records/1", "/Records/1/dynamodb"], &optional)
    }

    fn schedule(self) -> Value {
        let optional = ["/version", "/account", "/region", "/time", "/id", "/resources"];
        self.of(documented(include_str!("events/schedule.json")), &["", "/detail"], &optional)
    }
}

/// A key for a caller of its own.
pub async fn key_of(caller: &str, scopes: &[Scope]) -> String {
    let callers = DynamoCallers::new(&sdk().await, of_stage("CALLERS_TABLE_NAME"));
    let new = NewKey::plain(caller.into(), String::new(), scopes.to_vec());
    let (key, text) = ApiKey::make(new, Clock::System.now()).unwrap();
    assert!(callers.create_key(&key).await.unwrap());
    text.expose_secret().to_owned()
}

/// The functions on a table of their own, so that the stage's do not work the same jobs.
pub struct Functions {
    pub submit: Function,
    pub inference: Function,
    pub enrichment: Function,
    pub sweep: Function,
    pub store: DynamoJobStore,
    pub table: String,
    pub key: String,
}

impl Functions {
    /// With settings of enrichment, of which submit and inference get those that say which LLM there is.
    pub async fn start(caller: &str, enrichment: &[(&str, &str)]) -> Self {
        let sdk = sdk().await;
        let table = fresh_table(&sdk, "TABLE_NAME").await;
        let own = [("TABLE_NAME", table.as_str())];
        let which = |name: &str| name == "LLM_BASE_URL" || name == "BEDROCK_AGENT_ID";
        let llm: Vec<_> = enrichment.iter().copied().filter(|(name, _)| which(name)).collect();
        Self {
            submit: Function::start("submit", &[&own[..], &llm[..]].concat()).await,
            inference: Function::start("inference", &[&own[..], &llm[..]].concat()).await,
            enrichment: Function::start("enrichment", &[&own, enrichment].concat()).await,
            sweep: Function::start("sweep", &own).await,
            store: DynamoJobStore::new(&sdk, table.clone()),
            key: key_of(caller, &[Scope::Jobs]).await,
            table,
        }
    }

    pub async fn job(&self, id: Uuid) -> Job {
        self.store.get(id).await.unwrap().and_then(Record::into_job).unwrap()
    }

    /// Submits a photo and runs it through inference and, where it waits for it, enrichment.
    pub async fn run(&mut self, photo: &str) -> Job {
        self.run_as(Variant::Documented, photo).await
    }

    async fn run_as(&mut self, variant: Variant, photo: &str) -> Job {
        let body = STANDARD.encode(sample(photo));
        let request = variant.http("POST", "/submit", &self.key, Some(("image/png", &body, true)));
        let id = submitted(self.submit.invoke(&request).await.unwrap());
        assert_eq!(self.job(id).await.status, Status::Pending, "{variant:?}");
        let answer = self.inference.invoke(&variant.messages(Message::Infer { id })).await.unwrap();
        let reported = &answer["batchItemFailures"];
        assert_eq!(*reported, not_a_message(), "{variant:?}: what is no message is named, and nothing else");
        if self.job(id).await.status == Status::AwaitingDescription {
            let answer = self.enrichment.invoke(&variant.changes(id)).await.unwrap();
            assert_eq!(answer["batchItemFailures"], json!([]), "{variant:?}");
        }
        self.job(id).await
    }

    /// A request of the caller's, as a function behind HTTP gets it.
    pub fn request(&self, path: &str, body: &Value) -> Value {
        Variant::Documented.http("POST", path, &self.key, Some(("application/json", &body.to_string(), false)))
    }

    /// Submits a prompt, of whose change nobody is told yet.
    pub async fn ask(&mut self, prompt: &Value) -> Uuid {
        let request = self.request("/submit", prompt);
        let id = submitted(self.submit.invoke(&request).await.unwrap());
        assert_eq!(self.job(id).await.status, Status::AwaitingDescription);
        id
    }

    /// Tells enrichment of a prompt's change, which sends it on, and then hands it the message; the job then.
    pub async fn answer(&mut self, id: Uuid) -> Job {
        self.answer_as(Variant::Documented, id).await
    }

    async fn answer_as(&mut self, variant: Variant, id: Uuid) -> Job {
        let (before, answer) = (self.job(id).await, self.enrichment.invoke(&variant.changes(id)).await.unwrap());
        assert_eq!((&answer["batchItemFailures"], self.job(id).await), (&json!([]), before), "{variant:?}");
        let answer = self.enrichment.invoke(&variant.messages(Message::Answer { id })).await.unwrap();
        assert_eq!(answer["batchItemFailures"], not_a_message(), "{variant:?}");
        self.job(id).await
    }

    /// One run of sweep; what it reports.
    pub async fn sweep(&mut self) -> Value {
        self.sweep.invoke(&Variant::Documented.schedule()).await.unwrap()
    }

    /// A job that nobody has worked in time.
    pub async fn forgotten(&self) -> Uuid {
        let job = new_job("nobody", start());
        self.store.create(creation(&job, None)).await.unwrap();
        job.id
    }
}

/// A prompt's message, as its queue hands it over, and the documented one behind it.
pub fn message(id: Uuid) -> Value {
    Variant::Documented.messages(Message::Answer { id })
}

/// What is answered to the documented message, whose body is no message.
fn not_a_message() -> Value {
    json!([{"itemIdentifier": "2e1424d4-f796-459a-8184-9c92662be6da"}])
}

/// The id in the answer of submit, in API Gateway's response format 2.0.
fn submitted(answer: Value) -> Uuid {
    assert_eq!(answer["statusCode"], 202, "{answer}");
    let body: Value = serde_json::from_str(answer["body"].as_str().unwrap()).unwrap();
    body["request_id"].as_str().unwrap().parse().unwrap()
}

/// Each of a function's lines about a job, of which there are some, carries the id of its trace.
fn follows(job: &Job, log: &str) {
    let id = job.id.to_string();
    let lines: Vec<Value> =
        log.lines().filter(|line| line.contains(&id)).map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(!lines.is_empty() && job.trace_id.len() > 16, "{log}");
    for line in lines {
        assert_eq!((&line["span"]["trace.id"], &line["span"]["job.id"]), (&json!(job.trace_id), &json!(id)), "{line}");
    }
}

#[tokio::test]
async fn a_prompts_change_and_message_are_taken_as_documented_with_more_fields_and_with_fewer() {
    let llm = LlmServer::start([]).await;
    let base_url = llm.base_url();
    let mut functions = Functions::start("lars", &[("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m")]).await;
    for (calls, variant) in (1..).zip([Variant::Documented, Variant::Extended, Variant::Reduced]) {
        let id = functions.ask(&json!({"prompt": "What is a naevus?"})).await;
        let job = functions.answer_as(variant, id).await;
        assert_eq!((job.status, llm.calls()), (Status::Completed, calls), "{variant:?}");
        follows(&job, &functions.enrichment.printed("stderr"));
    }
}

#[tokio::test]
async fn every_function_takes_the_documented_event_with_more_fields_and_with_fewer() {
    let mut functions = Functions::start("lena", &[]).await;
    let key = functions.key.clone();
    let own = [("TABLE_NAME", functions.table.as_str())];
    // Reads for an LLM that enrichment then has not: else its event would not come.
    functions.inference = Function::start("inference", &[own[0], ("LLM_BASE_URL", "http://127.0.0.1:1")]).await;
    let mut result = Function::start("result", &own).await;
    let mut admin = Function::start("admin", &own).await;
    for variant in [Variant::Documented, Variant::Extended, Variant::Reduced] {
        let job = functions.run_as(variant, "mole-drawn.png").await;
        assert_eq!(job.status, Status::Completed, "{variant:?}");
        assert_eq!(job.description.as_ref().unwrap().source, DescriptionSource::Template, "{variant:?}");
        assert_eq!((job.attempts.inference, job.attempts.enrichment), (1, 1), "{variant:?}");

        // A body that is text comes as it is, not in base64.
        let photo = json!({"image": STANDARD.encode(sample("mole-drawn.png")), "describe": false}).to_string();
        let request = variant.http("POST", "/submit", &key, Some(("application/json", &photo, false)));
        let id = submitted(functions.submit.invoke(&request).await.unwrap());
        assert!(!functions.job(id).await.describe, "{variant:?}");

        let answer = result.invoke(&variant.http("GET", &format!("/result/{}", job.id), &key, None)).await.unwrap();
        for function in [&functions.submit, &functions.inference, &functions.enrichment, &result] {
            follows(&job, &function.printed("stderr"));
        }
        assert_eq!((&answer["statusCode"], &answer["isBase64Encoded"]), (&json!(200), &json!(false)), "{answer}");
        let body: Value = serde_json::from_str(answer["body"].as_str().unwrap()).unwrap();
        assert_eq!((&body["status"], &body["request_id"]), (&json!("completed"), &json!(job.id)), "{variant:?}");
        let refused = result.invoke(&variant.http("GET", "/results", "no key", None)).await.unwrap();
        assert_eq!(refused["statusCode"], 401, "{refused}");
        let forbidden = admin.invoke(&variant.http("GET", "/admin/keys", &key, None)).await.unwrap();
        assert_eq!(forbidden["statusCode"], 403, "{forbidden}");

        let forgotten = functions.forgotten().await;
        let report = functions.sweep.invoke(&variant.schedule()).await.unwrap();
        assert_eq!((&report["ended"], &report["failed"]), (&json!(1), &json!(0)), "{variant:?}: {report}");
        let failure = functions.job(forgotten).await.failure.unwrap();
        assert_eq!((failure.code, failure.retryable), (FailureCode::DeadlineExceeded, true), "{variant:?}");
    }
}
