//! `GET /result/{request_id}`, `GET /results`, `DELETE /result/{request_id}`, `GET /healthz`,
//! `GET /openapi.json`.
//!
//! Triggered by HTTP. Reads the records, and answers that are too large for one. A delete writes, in
//! this order: the tombstone, then it erases the blobs, then it sends the order to erase the cache;
//! sweep does the last two once more a lease later, when no worker can still be writing.

mod poll;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use chrono::TimeDelta;
use serde::Deserialize;
use shared::api::{Health, JobPage, JobResult, MAP_NOTE, MAX_WAIT_SECONDS, MapLink, PAGE_DEFAULT, PAGE_MAX};
use shared::clock::{Clock, Timestamp};
use shared::crash::{self, Point};
use shared::error::{Code, Error, ErrorBody};
use shared::http::Caller;
use shared::job::{self, AnswerContent, Job, Policy, Record};
use shared::message::Message;
use shared::ports::{BlobStore, GetTerms, JobQueue, JobStore};
use shared::telemetry;
use utoipa::OpenApi;
use uuid::Uuid;

/// How long the link to a map holds.
const MAP_LINK_TTL: TimeDelta = TimeDelta::minutes(15);

/// What result works with.
pub struct Results<J, Q, B> {
    pub jobs: J,
    pub queue: Q,
    pub blobs: B,
    pub clock: Clock,
    pub policy: Policy,
}

/// This function's part of the API's description.
#[derive(OpenApi)]
#[openapi(
    paths(get_result, get_result_by_query, list_results, delete_result, healthz),
    components(schemas(JobResult, JobPage, Health, ErrorBody))
)]
pub struct Api;

/// This function's routes, to be put behind authentication.
pub fn router<J: JobStore, Q: JobQueue, B: BlobStore>(results: Arc<Results<J, Q, B>>) -> Router {
    Router::new()
        .route("/result", get(get_result_by_query::<J, Q, B>))
        .route("/result/{request_id}", get(get_result::<J, Q, B>).delete(delete_result::<J, Q, B>))
        .route("/results", get(list_results::<J, Q, B>))
        .with_state(results)
}

/// This function's routes that need no credentials. `description` is that of the whole API.
pub fn open_router(description: utoipa::openapi::OpenApi) -> Router {
    // Shared: every connection has a router of its own, and the description is a megabyte in memory.
    let description = Arc::new(description);
    let answer = || async move { Json(&*description).into_response() };
    Router::new().route("/healthz", get(healthz)).route("/openapi.json", get(answer))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ResultQuery {
    request_id: Option<String>,
    wait: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ListQuery {
    cursor: Option<Uuid>,
    limit: Option<u32>,
}

/// Get a result
///
/// While the job is open the answer carries `Retry-After`. With `wait` the answer is held back
/// until the job ends, or with `If-None-Match` until it changes, at most that many seconds.
#[utoipa::path(
    get,
    path = "/result/{request_id}",
    tag = "jobs",
    params(
        ("request_id" = String, Path, description = "The id that submit answered."),
        ("wait" = Option<u32>, Query, description = "Seconds to wait for the end, 0 to 25.", minimum = 0, maximum = 25),
        ("If-None-Match" = Option<String>, Header, description = "The ETag of an earlier answer; 304 where nothing has changed."),
    ),
    responses(
        (status = 200, description = "The job as it stands.", body = JobResult, headers(("ETag" = String), ("Retry-After" = u32))),
        (status = 304, description = "Not changed."),
        (status = 400, description = "A parameter is not valid.", body = ErrorBody),
        (status = 401, description = "No credentials.", body = ErrorBody),
        (status = 403, description = "Without the scope jobs; or not addressed to a loopback name.", body = ErrorBody),
        (status = 404, description = "No such job of this caller.", body = ErrorBody),
        (status = 429, description = "Too many requests in this minute.", body = ErrorBody),
        (status = 503, description = "The store is not available.", body = ErrorBody),
    )
)]
async fn get_result<J: JobStore, Q: JobQueue, B: BlobStore>(
    State(results): State<Arc<Results<J, Q, B>>>,
    caller: Caller,
    request_id: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
    uri: Uri,
) -> Result<Response, Error> {
    let Path(request_id) = request_id.map_err(|_| Error::not_found())?;
    let query: ResultQuery = parameters(&uri, "wait=SECONDS")?;
    if query.request_id.is_some() {
        return Err(Error::new(Code::InvalidRequest, "Give the id in the path or in the query, not in both."));
    }
    results.answer(&caller, &request_id, query.wait, &headers).await
}

/// Get a result by query
///
/// The same as `GET /result/{request_id}`.
#[utoipa::path(
    get,
    path = "/result",
    tag = "jobs",
    params(
        ("request_id" = String, Query, description = "The id that submit answered."),
        ("wait" = Option<u32>, Query, description = "Seconds to wait for the end, 0 to 25.", minimum = 0, maximum = 25),
        ("If-None-Match" = Option<String>, Header, description = "The ETag of an earlier answer; 304 where nothing has changed."),
    ),
    responses(
        (status = 200, description = "The job as it stands.", body = JobResult, headers(("ETag" = String), ("Retry-After" = u32))),
        (status = 304, description = "Not changed."),
        (status = 400, description = "A parameter is missing or not valid.", body = ErrorBody),
        (status = 401, description = "No credentials.", body = ErrorBody),
        (status = 403, description = "Without the scope jobs; or not addressed to a loopback name.", body = ErrorBody),
        (status = 404, description = "No such job of this caller.", body = ErrorBody),
        (status = 429, description = "Too many requests in this minute.", body = ErrorBody),
        (status = 503, description = "The store is not available.", body = ErrorBody),
    )
)]
async fn get_result_by_query<J: JobStore, Q: JobQueue, B: BlobStore>(
    State(results): State<Arc<Results<J, Q, B>>>,
    caller: Caller,
    headers: HeaderMap,
    uri: Uri,
) -> Result<Response, Error> {
    let query: ResultQuery = parameters(&uri, "request_id=ID and wait=SECONDS")?;
    let missing = || Error::new(Code::InvalidRequest, "The parameter request_id is missing.");
    let request_id = query.request_id.ok_or_else(missing)?;
    results.answer(&caller, &request_id, query.wait, &headers).await
}

/// List results
///
/// The caller's own jobs, newest first.
#[utoipa::path(
    get,
    path = "/results",
    tag = "jobs",
    params(
        ("limit" = Option<u32>, Query, description = "Page size, 1 to 100 (default 20).", minimum = 1, maximum = 100),
        ("cursor" = Option<Uuid>, Query, description = "`next_cursor` of the page before."),
    ),
    responses(
        (status = 200, description = "A page.", body = JobPage),
        (status = 400, description = "A parameter is not valid.", body = ErrorBody),
        (status = 401, description = "No credentials.", body = ErrorBody),
        (status = 403, description = "Without the scope jobs; or not addressed to a loopback name.", body = ErrorBody),
        (status = 429, description = "Too many requests in this minute.", body = ErrorBody),
        (status = 503, description = "The store is not available.", body = ErrorBody),
    )
)]
async fn list_results<J: JobStore, Q: JobQueue, B: BlobStore>(
    State(results): State<Arc<Results<J, Q, B>>>,
    caller: Caller,
    uri: Uri,
) -> Result<Response, Error> {
    if caller.is_guest() {
        let message = "Requests without credentials are all one caller: they read by id, and have no list.";
        return Err(Error::new(Code::Forbidden, message));
    }
    let query: ListQuery = parameters(&uri, "limit=1..100 and cursor=NEXT_CURSOR")?;
    let limit = query.limit.unwrap_or(PAGE_DEFAULT);
    if !(1..=PAGE_MAX).contains(&limit) {
        return Err(Error::new(Code::InvalidRequest, format!("limit must lie between 1 and {PAGE_MAX}.")));
    }
    let listed = results.jobs.list(&caller.0, query.cursor, limit).await?;
    let results = listed.records.iter().map(JobResult::from).collect();
    let page = JobPage { results, next_cursor: listed.next.map(|id| id.to_string()) };
    Ok(([(header::CACHE_CONTROL, "no-store")], Json(page)).into_response())
}

/// Delete a job
///
/// Erases photo or prompt, the result and what the cache holds. Deleting again answers 204 as well.
#[utoipa::path(
    delete,
    path = "/result/{request_id}",
    tag = "jobs",
    params(("request_id" = String, Path, description = "The id that submit answered.")),
    responses(
        (status = 204, description = "Deleted."),
        (status = 401, description = "No credentials.", body = ErrorBody),
        (status = 403, description = "Without the scope jobs; or not addressed to a loopback name.", body = ErrorBody),
        (status = 404, description = "No such job of this caller.", body = ErrorBody),
        (status = 429, description = "Too many requests in this minute.", body = ErrorBody),
        (status = 503, description = "A store is not available.", body = ErrorBody),
    )
)]
async fn delete_result<J: JobStore, Q: JobQueue, B: BlobStore>(
    State(results): State<Arc<Results<J, Q, B>>>,
    caller: Caller,
    request_id: Result<Path<String>, PathRejection>,
) -> Result<StatusCode, Error> {
    let Path(request_id) = request_id.map_err(|_| Error::not_found())?;
    results.delete(&caller, &request_id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Health
///
/// Answers as soon as the service takes requests.
#[utoipa::path(get, path = "/healthz", tag = "service", security(()), responses((status = 200, body = Health)))]
async fn healthz() -> Json<Health> {
    Json(Health { status: "ok".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() })
}

fn parameters<T: serde::de::DeserializeOwned>(uri: &Uri, allowed: &str) -> Result<T, Error> {
    let wrong =
        |_| Error::new(Code::InvalidRequest, format!("A query parameter is unknown or not valid. Allowed: {allowed}."));
    Query::try_from_uri(uri).map(|Query(parameters)| parameters).map_err(wrong)
}

impl<J: JobStore, Q: JobQueue, B: BlobStore> Results<J, Q, B> {
    async fn answer(
        &self,
        caller: &Caller,
        request_id: &str,
        wait: Option<u32>,
        headers: &HeaderMap,
    ) -> Result<Response, Error> {
        let wait = wait.unwrap_or(0);
        if wait > MAX_WAIT_SECONDS {
            return Err(Error::new(
                Code::InvalidRequest,
                format!("wait must lie between 0 and {MAX_WAIT_SECONDS} seconds."),
            ));
        }
        let known = poll::known_version(headers);
        let wait = Duration::from_secs(u64::from(wait));
        let job = poll::until_settled(wait, known.as_deref(), || self.own(caller, request_id)).await?;
        let now = self.clock.now();
        if known.is_some_and(|known| poll::matches(&known, &job)) {
            return Ok((StatusCode::NOT_MODIFIED, poll::headers(&job, now)).into_response());
        }
        Ok((poll::headers(&job, now), Json(self.shown(&job, now).await?)).into_response())
    }

    /// The job as its caller sees it, with the text of an answer or a link to the map.
    async fn shown(&self, job: &Job, now: Timestamp) -> Result<JobResult, Error> {
        let text = match job.answer.as_ref().map(|answer| &answer.content) {
            None => None,
            Some(AnswerContent::Text(text)) => Some(text.clone()),
            // Erased or expired between the two reads: then so is the job.
            Some(AnswerContent::Blob { key }) => {
                let bytes = self.blobs.get(key).await?.ok_or_else(Error::not_found)?;
                Some(String::from_utf8(bytes).map_err(Error::internal)?)
            }
        };
        Ok(JobResult::from(job).with_content(text).with_map(self.map_link(job, now).await))
    }

    /// `None` where there is no map, or none any more: the link ends with the photo. One that cannot be signed
    /// hides no result.
    async fn map_link(&self, job: &Job, now: Timestamp) -> Option<MapLink> {
        let reading = job.reading.as_ref().filter(|reading| reading.has_map)?;
        let expires_at = (now + MAP_LINK_TTL).min(job.input.expires_at());
        // S3 counts in whole seconds.
        if expires_at < now + TimeDelta::seconds(2) {
            return None;
        }
        let terms = GetTerms { content_type: "image/png".to_owned(), expires_at };
        match self.blobs.presign_get(&job::map_key(job.id, &reading.model_digest), &terms).await {
            Ok(url) => Some(MapLink { url, expires_at, note: MAP_NOTE.to_owned() }),
            Err(error) => {
                tracing::warn!(error.code = error.code().as_str(), error.chain = error.chain(), "map not linked");
                None
            }
        }
    }

    async fn own_record(&self, caller: &Caller, request_id: &str) -> Result<Record, Error> {
        // What is no id is the id of nothing.
        let id = Uuid::parse_str(request_id).map_err(|_| Error::not_found())?;
        let record = self.jobs.get(id).await?.ok_or_else(Error::not_found)?;
        match &record {
            Record::Job(job) => telemetry::about_job(job.id, &job.trace_id),
            Record::Tombstone(tombstone) => telemetry::about_job(tombstone.id, &tombstone.trace_id),
            Record::Upload(_) => {}
        }
        if record.caller() == caller.0 { Ok(record) } else { Err(Error::not_found()) }
    }

    async fn own(&self, caller: &Caller, request_id: &str) -> Result<Job, Error> {
        self.own_record(caller, request_id).await?.into_job().ok_or_else(Error::not_found)
    }

    /// Erases a job. What a crash leaves undone, sweep does when the tombstone is due.
    ///
    /// # Errors
    /// 404 for another's job, 503 where a store is not available; the client may repeat it.
    pub async fn delete(&self, caller: &Caller, request_id: &str) -> Result<(), Error> {
        let (id, cache_key) = loop {
            match self.own_record(caller, request_id).await? {
                Record::Tombstone(tombstone) => break (tombstone.id, tombstone.cache_key),
                Record::Upload(_) => return Err(Error::not_found()),
                Record::Job(job) => {
                    let tombstone = job.tombstone(self.clock.now(), &self.policy);
                    let (id, cache_key) = (tombstone.id, tombstone.cache_key.clone());
                    if self.jobs.bury(&job, &tombstone).await? {
                        tracing::info!("job deleted");
                        break (id, cache_key);
                    }
                    // A worker wrote in between: read again.
                }
            }
        };
        crash::here(Point::ResultTombstoned);
        self.blobs.delete_prefix(&job::blob_prefix(id)).await?;
        crash::here(Point::ResultBlobsErased);
        if cache_key.is_some() {
            self.queue.send(Message::Forget { id }).await?;
        }
        crash::here(Point::ResultForgetSent);
        Ok(())
    }
}
