//! The HTTP API as this program calls it.

use std::time::Duration;

use anyhow::Context;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, ETAG, HeaderMap, HeaderValue, IF_NONE_MATCH, RETRY_AFTER};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use sha2::{Digest, Sha256};
use shared::api::admin::{
    CreatedKey, DeadLetterList, KeyList, NewKey, RedriveDeadLetters, RedrivenDeadLetters, RedrivenJob,
};
use shared::api::prompt::PromptBody;
use shared::api::{
    ImageKeyBody, JobPage, JobResult, MAX_PHOTO_BYTES, MAX_WAIT_SECONDS, PAGE_MAX, Submitted, UploadBody, UploadPermit,
};
use shared::error::{Code, ErrorBody};
use uuid::Uuid;

/// Tries of a call that the network or a busy server refused. Every call is safe to repeat.
const MAX_TRIES: u32 = 4;
/// A photo that is sent directly may take longer than the minute after which a host refuses it in its own words.
const PHOTO_TIMEOUT: Duration = Duration::from_secs(90);
/// An upload may go over a phone's line.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(15 * 60);
/// A limit is counted by the minute.
const LONGEST_PAUSE: Duration = Duration::from_secs(61);

/// Why a call gave no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Problem {
    #[error("the API at {0} cannot be reached; is it running? (scripts/run starts one, --api names another)")]
    Unreachable(String),
    #[error("{message} LESION_API_KEY or --api-key sets the key. (unauthorized, exchange {request_id})")]
    Unauthorized { message: String, request_id: String },
    #[error("{message} ({code}, exchange {request_id})")]
    Refused { code: String, message: String, request_id: String },
    #[error("unexpected answer: HTTP {0}")]
    Unexpected(StatusCode),
}

impl Problem {
    /// Whether it may be over in a moment.
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable(_) => true,
            // A gateway whose server is away.
            Self::Unexpected(status) => matches!(status.as_u16(), 502..=504),
            Self::Unauthorized { .. } | Self::Refused { .. } => false,
        }
    }
}

pub(crate) struct Client {
    http: reqwest::Client,
    /// For the API alone: an upload goes to another server, and is its own credential.
    credentials: HeaderMap,
    api: String,
}

impl Client {
    /// `key` goes into every request; empty is none.
    pub(crate) fn new(api: &str, key: Option<&str>) -> anyhow::Result<Self> {
        Url::parse(api).with_context(|| format!("--api: {api:?} is no URL"))?;
        let mut credentials = HeaderMap::new();
        if let Some(key) = key.filter(|key| !key.is_empty()) {
            // The error does not repeat the value.
            let mut value = HeaderValue::from_str(&format!("Bearer {key}"))
                .ok()
                .context("LESION_API_KEY: holds characters that no key has")?;
            value.set_sensitive(true);
            credentials.insert(AUTHORIZATION, value);
        }
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            // A photo goes to the API and nowhere else, whatever HTTP_PROXY says.
            .no_proxy()
            .connect_timeout(Duration::from_secs(5))
            .timeout(Duration::from_secs(u64::from(MAX_WAIT_SECONDS) + 30))
            .build()?;
        Ok(Self { http, credentials, api: api.trim_end_matches('/').to_owned() })
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.api)).headers(self.credentials.clone())
    }

    /// That nobody has answered.
    pub(crate) fn unreachable(&self) -> Problem {
        Problem::Unreachable(self.api.clone())
    }

    /// Sends, and sends again where that may help.
    async fn call(&self, build: impl Fn() -> RequestBuilder) -> Result<Response, Problem> {
        let mut tries = 1;
        loop {
            let answer = build().send().await;
            let again = match &answer {
                Ok(response) => matches!(response.status().as_u16(), 429 | 502..=504),
                Err(error) => !error.is_builder(),
            };
            if !again || tries == MAX_TRIES {
                let response = answer.map_err(|_| self.unreachable())?;
                return accepted(response).await;
            }
            tokio::time::sleep(pause(answer.as_ref().ok(), tries)).await;
            tries += 1;
        }
    }

    /// Submits a photo under a key of its own, so that a repeated call makes no second job. One that
    /// is too large for a request is uploaded first.
    pub(crate) async fn submit(
        &self,
        photo: Vec<u8>,
        describe: bool,
        callback_url: Option<&str>,
    ) -> Result<Uuid, Problem> {
        if photo.len() > MAX_PHOTO_BYTES {
            let (image_key, callback_url) = (self.upload(photo).await?, callback_url.map(str::to_owned));
            let body = ImageKeyBody { image_key, describe, callback_url };
            // The image key does what an Idempotency-Key would.
            return self.submitted(|| self.request(Method::POST, "/submit").json(&body)).await;
        }
        let key = Uuid::new_v4().to_string();
        let mut path = format!("/submit?describe={describe}");
        if let Some(url) = callback_url {
            path.push_str("&callback_url=");
            path.extend(form_urlencoded::byte_serialize(url.as_bytes()));
        }
        let build = || {
            // The server reads the format from the bytes.
            self.request(Method::POST, &path)
                .header(CONTENT_TYPE, "application/octet-stream")
                .header("idempotency-key", &key)
                .timeout(PHOTO_TIMEOUT)
                .body(photo.clone())
        };
        self.submitted(build).await
    }

    /// Submits a prompt, under a key of its own as well.
    pub(crate) async fn submit_prompt(&self, prompt: &PromptBody) -> Result<Uuid, Problem> {
        let key = Uuid::new_v4().to_string();
        let build = || self.request(Method::POST, "/submit").header("idempotency-key", &key).json(prompt);
        self.submitted(build).await
    }

    async fn submitted(&self, build: impl Fn() -> RequestBuilder) -> Result<Uuid, Problem> {
        let submitted: Submitted = read(self.call(build).await?).await?;
        Ok(submitted.request_id)
    }

    /// Puts a photo into the blob store and returns its key.
    async fn upload(&self, photo: Vec<u8>) -> Result<String, Problem> {
        let sha256 = Sha256::digest(&photo).iter().map(|byte| format!("{byte:02x}")).collect();
        let content_type = content_type(&photo).to_owned();
        let body = UploadBody { content_type, size_bytes: photo.len() as u64, sha256 };
        let permit: UploadPermit =
            read(self.call(|| self.request(Method::POST, "/uploads").json(&body)).await?).await?;
        let url = self.resolved(&permit.url)?;
        let build = || {
            let request = self.http.put(url.clone()).timeout(UPLOAD_TIMEOUT).body(photo.clone());
            permit.headers.iter().fold(request, |request, (name, value)| request.header(name, value))
        };
        self.call(build).await?;
        Ok(permit.image_key)
    }

    /// What a signed link gives.
    pub(crate) async fn download(&self, url: &str) -> Result<Vec<u8>, Problem> {
        let url = self.resolved(url)?;
        let response = self.call(|| self.http.get(url.clone())).await?;
        let status = response.status();
        response.bytes().await.map(Into::into).map_err(|_| Problem::Unexpected(status))
    }

    fn resolved(&self, url: &str) -> Result<Url, Problem> {
        let url = Url::parse(&self.api).and_then(|api| api.join(url));
        url.map_err(|_| self.unreachable())
    }

    /// A result and its ETag; `None` where it is still the one that `etag` names.
    pub(crate) async fn result(
        &self,
        id: Uuid,
        etag: Option<&str>,
        wait: Duration,
    ) -> Result<Option<(JobResult, String)>, Problem> {
        // Rounded up: a last part of a second must not become a loop without a pause.
        let wait = wait.as_millis().div_ceil(1000).min(u128::from(MAX_WAIT_SECONDS));
        let path = format!("/result/{id}?wait={wait}");
        let build = || match etag {
            Some(etag) => self.request(Method::GET, &path).header(IF_NONE_MATCH, etag),
            None => self.request(Method::GET, &path),
        };
        let response = self.call(build).await?;
        if response.status() == StatusCode::NOT_MODIFIED {
            return Ok(None);
        }
        let etag = response.headers().get(ETAG).and_then(|etag| etag.to_str().ok()).unwrap_or("").to_owned();
        Ok(Some((read(response).await?, etag)))
    }

    /// The newest `limit` jobs.
    pub(crate) async fn list(&self, limit: usize) -> Result<Vec<JobResult>, Problem> {
        let mut results = Vec::new();
        let mut cursor = String::new();
        while results.len() < limit {
            let page = (limit - results.len()).min(PAGE_MAX as usize);
            let path = format!("/results?limit={page}{cursor}");
            let page: JobPage = read(self.call(|| self.request(Method::GET, &path)).await?).await?;
            results.extend(page.results);
            let Some(next) = page.next_cursor else { break };
            cursor = format!("&cursor={next}");
        }
        Ok(results)
    }

    /// Makes a key. Not repeated where the answer is lost: that would make another.
    pub(crate) async fn create_key(&self, new: &NewKey) -> Result<CreatedKey, Problem> {
        let answer = self.request(Method::POST, "/admin/keys").json(new).send().await;
        let response = answer.map_err(|_| self.unreachable())?;
        read(accepted(response).await?).await
    }

    pub(crate) async fn keys(&self) -> Result<KeyList, Problem> {
        read(self.call(|| self.request(Method::GET, "/admin/keys")).await?).await
    }

    pub(crate) async fn revoke_key(&self, id: &str) -> Result<(), Problem> {
        let path = format!("/admin/keys/{id}");
        self.call(|| self.request(Method::DELETE, &path)).await.map(|_| ())
    }

    pub(crate) async fn dead_letters(&self) -> Result<DeadLetterList, Problem> {
        read(self.call(|| self.request(Method::GET, "/admin/dead-letters")).await?).await
    }

    pub(crate) async fn redrive_dead_letters(
        &self,
        chosen: &RedriveDeadLetters,
    ) -> Result<RedrivenDeadLetters, Problem> {
        read(self.call(|| self.request(Method::POST, "/admin/dead-letters/redrive").json(chosen)).await?).await
    }

    pub(crate) async fn redrive(&self, id: Uuid) -> Result<RedrivenJob, Problem> {
        let path = format!("/admin/jobs/{id}/redrive");
        read(self.call(|| self.request(Method::POST, &path)).await?).await
    }

    pub(crate) async fn delete(&self, id: Uuid) -> Result<(), Problem> {
        let path = format!("/result/{id}");
        self.call(|| self.request(Method::DELETE, &path)).await.map(|_| ())
    }
}

/// The media type by the first bytes; a photo that is none is refused by the server.
fn content_type(photo: &[u8]) -> &'static str {
    match photo {
        [0x89, b'P', b'N', b'G', ..] => "image/png",
        [b'R', b'I', b'F', b'F', ..] => "image/webp",
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => "image/heic",
        _ => "image/jpeg",
    }
}

/// As long as the API asks for, or a moment that doubles.
fn pause(answer: Option<&Response>, tries: u32) -> Duration {
    let asked = answer.and_then(|response| response.headers().get(RETRY_AFTER)?.to_str().ok()?.parse().ok());
    let Some(seconds) = asked else { return Duration::from_millis(250 << tries) };
    if answer.is_some_and(|response| response.status() == StatusCode::TOO_MANY_REQUESTS) {
        eprintln!("lesion: too many requests in this minute; waiting {seconds} s");
    }
    Duration::from_secs(seconds).min(LONGEST_PAUSE)
}

async fn accepted(response: Response) -> Result<Response, Problem> {
    let status = response.status();
    if status.is_success() || status == StatusCode::NOT_MODIFIED {
        return Ok(response);
    }
    let body: ErrorBody = response.json().await.map_err(|_| Problem::Unexpected(status))?;
    let error = body.error;
    if error.code == Code::Unauthorized {
        return Err(Problem::Unauthorized { message: error.message, request_id: error.request_id });
    }
    Err(Problem::Refused { code: error.code.as_str().to_owned(), message: error.message, request_id: error.request_id })
}

async fn read<T: serde::de::DeserializeOwned>(response: Response) -> Result<T, Problem> {
    let status = response.status();
    response.json().await.map_err(|_| Problem::Unexpected(status))
}
