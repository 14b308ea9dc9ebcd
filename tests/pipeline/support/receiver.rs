//! A receiver of webhooks on loopback: keeps what it is sent, and answers as it was told to.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::State;
use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio::net::TcpListener;

/// The key that it shares with the hosts of these tests; it is that of Standard Webhooks' own examples.
pub const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// One request.
#[derive(Debug, Clone)]
pub struct Received {
    pub uri: Uri,
    pub headers: HeaderMap,
    pub body: String,
}

impl Received {
    pub fn header(&self, name: &str) -> &str {
        self.headers[name].to_str().unwrap()
    }

    /// `webhook-id`.
    pub fn id(&self) -> &str {
        self.header("webhook-id")
    }

    pub fn event(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

#[derive(Default)]
struct Inner {
    received: Mutex<Vec<Received>>,
    /// What it answers; nothing at all where it is 0.
    status: Mutex<u16>,
    /// `Retry-After`, where it says one.
    retry_after: Mutex<Option<String>>,
}

/// The running receiver; it ends with the test's runtime.
#[derive(Clone)]
pub struct Receiver {
    inner: Arc<Inner>,
    address: SocketAddr,
}

impl Receiver {
    pub async fn start(status: u16) -> Self {
        Self::start_at("127.0.0.1:0", status).await
    }

    /// At an address that somebody was told before.
    pub async fn start_at(address: &str, status: u16) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let inner = Arc::new(Inner { status: Mutex::new(status), ..Inner::default() });
        let router = Router::new().fallback(take).with_state(Arc::clone(&inner));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { inner, address }
    }

    /// What it answers from now on.
    pub fn answer(&self, status: u16) {
        *self.inner.status.lock().unwrap() = status;
    }

    /// What it says of when to come again, from now on.
    pub fn ask_to_wait(&self, retry_after: &str) {
        *self.inner.retry_after.lock().unwrap() = Some(retry_after.to_owned());
    }

    /// `host:port`, as `WEBHOOK_HOSTS` takes it.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// A `callback_url`.
    pub fn url(&self) -> String {
        format!("http://{}/hook?token=mine", self.address)
    }

    pub fn received(&self) -> Vec<Received> {
        self.inner.received.lock().unwrap().clone()
    }
}

async fn take(State(inner): State<Arc<Inner>>, uri: Uri, headers: HeaderMap, body: String) -> Response {
    inner.received.lock().unwrap().push(Received { uri, headers, body });
    let status = *inner.status.lock().unwrap();
    if status == 0 {
        std::future::pending::<()>().await;
    }
    let mut answer = StatusCode::from_u16(status).unwrap().into_response();
    if let Some(value) = inner.retry_after.lock().unwrap().as_ref() {
        answer.headers_mut().insert(RETRY_AFTER, value.parse().unwrap());
    }
    answer
}
