//! The stage's functions by Lambda's own API: their environment, and invoking them.

use std::time::Duration;

use reqwest::{Client, Method, RequestBuilder};
use serde_json::{Map, Value, json};
use shared::crash::Point;

use crate::support::{of_stage, within};

/// What crashes a process says on its way (`shared/src/crash.rs`).
const LAST_WORDS: &str = "killed at ";

pub struct Lambda {
    http: Client,
}

impl Lambda {
    pub fn new() -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        Self { http: Client::builder().no_proxy().timeout(Duration::from_secs(60)).build().unwrap() }
    }

    fn request(&self, method: Method, service: &str, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", of_stage("AWS_ENDPOINT_URL")));
        // The emulator takes its root key without a signature, which spares tests another SDK.
        let credential = format!("Credential=test/20260101/us-east-1/{service}/aws4_request");
        request.header("authorization", format!("AWS4-HMAC-SHA256 {credential}, SignedHeaders=host, Signature=0"))
    }

    fn of_function(&self, method: Method, function: &str, what: &str) -> RequestBuilder {
        self.request(method, "lambda", &format!("/2015-03-31/functions/lesion-local-{function}/{what}"))
    }

    /// What the function has logged so far, a line each.
    pub async fn log(&self, function: &str) -> Vec<String> {
        let request = self.request(Method::POST, "logs", "/").header("x-amz-target", "Logs_20140328.FilterLogEvents");
        let body = json!({"logGroupName": format!("/aws/lambda/lesion-local-{function}")}).to_string();
        let answer = request.header("content-type", "application/x-amz-json-1.1").body(body).send().await.unwrap();
        let found: Value = answer.json().await.unwrap();
        assert!(found["nextToken"].is_null(), "the log of {function} has more pages");
        let events = found["events"].as_array().unwrap().iter();
        events.filter_map(|event| event["message"].as_str().map(str::to_owned)).collect()
    }

    /// How many of the function's processes have killed themselves at `point`, by its log.
    async fn kills(&self, function: &str, point: Point) -> usize {
        let words = format!("{LAST_WORDS}{}", point.name());
        self.log(function).await.iter().filter(|line| line.trim_end().ends_with(&words)).count()
    }

    /// From now on sweep runs only where it is invoked.
    pub async fn stop_schedule(&self) {
        let request = self.request(Method::POST, "events", "/").header("x-amz-target", "AWSEvents.DisableRule");
        let request =
            request.header("content-type", "application/x-amz-json-1.1").body(r#"{"Name":"lesion-local-sweep"}"#);
        assert!(request.send().await.unwrap().status().is_success());
    }

    pub async fn environment(&self, function: &str) -> Map<String, Value> {
        let answer = self.of_function(Method::GET, function, "configuration").send().await.unwrap();
        let configuration: Value = answer.json().await.unwrap();
        configuration["Environment"]["Variables"].as_object().unwrap().clone()
    }

    /// New processes of the function have this environment; those that run are ended.
    pub async fn set_environment(&self, function: &str, environment: &Map<String, Value>) {
        let body = json!({"Environment": {"Variables": environment}});
        let request = self.of_function(Method::PUT, function, "configuration").json(&body);
        assert!(request.send().await.unwrap().status().is_success(), "{function}");
    }

    /// Does `act` while `function` kills itself at `point`, once, and then lets it go on. `other` is set
    /// meanwhile as well.
    pub async fn killed(&self, function: &str, point: Point, other: &[(&str, &str)], act: impl AsyncFnOnce()) {
        let kills = self.kill(function, point, other, act).await;
        assert_eq!(kills, 1, "{}: killed more than once", point.name());
    }

    /// How often it has killed itself meanwhile, once at least.
    async fn kill(&self, function: &str, point: Point, other: &[(&str, &str)], act: impl AsyncFnOnce()) -> usize {
        let usual = self.environment(function).await;
        let mut armed = usual.clone();
        let crash_at = ("CRASH_AT", point.name());
        armed.extend(other.iter().chain([&crash_at]).map(|(name, value)| ((*name).to_owned(), json!(value))));
        let before = self.kills(function, point).await;
        self.set_environment(function, &armed).await;
        act().await;
        within(&format!("{function} is killed at {}", point.name()), async || {
            self.kills(function, point).await > before
        })
        .await;
        self.set_environment(function, &usual).await;
        self.kills(function, point).await - before
    }

    /// As [`Lambda::killed`], for a function that may meet the point a second time before it is let go on: one
    /// that the stream calls again until it answers, or that hears the end of an earlier scene's connection.
    pub async fn killed_at_least_once(&self, function: &str, point: Point, act: impl AsyncFnOnce()) {
        self.kill(function, point, &[], act).await;
    }

    /// Runs sweep as the schedule does; `false` where it died.
    pub async fn sweep(&self) -> bool {
        let event = json!({
            "version": "0",
            "detail-type": "Scheduled Event",
            "source": "aws.events",
            "region": "us-east-1",
            "resources": [],
            "detail": {},
        });
        self.invoke("sweep", &event).await
    }

    /// Hands a function an event; `false` where it died.
    pub async fn invoke(&self, function: &str, event: &Value) -> bool {
        let answer = self.of_function(Method::POST, function, "invocations").json(event).send().await.unwrap();
        assert!(answer.status().is_success(), "{}", answer.status());
        !answer.headers().contains_key("x-amz-function-error")
    }
}
