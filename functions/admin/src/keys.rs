//! `POST /admin/keys`, `GET /admin/keys`, `DELETE /admin/keys/{id}`, `GET /admin/keys/{id}/usage`.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use secrecy::ExposeSecret;
use shared::account::Month;
use shared::api::admin::{CreatedKey, KeyList, KeyUsage, MonthUsage, NewKey};
use shared::auth::Admin as Allowed;
use shared::auth::keys::ApiKey;
use shared::crash::{self, Point};
use shared::error::{Code, Error, ErrorBody};
use shared::http::body;
use shared::ports::{Callers, JobQueue, JobStore};

use crate::{Admin, MAX_BODY_BYTES, log};

/// Make an API key
///
/// The answer holds the key, this once. Repeated after a lost answer it makes another key; revoke
/// the one that nobody has. A host that runs without keys demands them from its next start on.
#[utoipa::path(
    post,
    path = "/admin/keys",
    tag = "admin",
    request_body = NewKey,
    responses(
        (status = 201, description = "The key.", body = CreatedKey),
        (status = 400, description = "A field is missing or not valid.", body = ErrorBody),
        (status = 401, description = "No credentials.", body = ErrorBody),
        (status = 403, description = "Without the scope admin; or not addressed to a loopback name.", body = ErrorBody),
        (status = 413, description = "More than 128 KiB.", body = ErrorBody),
        (status = 415, description = "No JSON.", body = ErrorBody),
        (status = 429, description = "Too many requests in this minute.", body = ErrorBody),
        (status = 503, description = "The key store is not available.", body = ErrorBody),
    )
)]
pub(crate) async fn create_key<J: JobStore, Q: JobQueue, C: Callers>(
    State(admin): State<Arc<Admin<J, Q, C>>>,
    Allowed(who): Allowed,
    request: Request,
) -> Result<Response, Error> {
    let shape = r#"{"caller", "name", "scopes": ["jobs", "admin"], "expires_at", "models", "requests_per_minute", "tokens_per_minute", "budget_usd_per_month"}, all but the first optional"#;
    let new: NewKey = body::json(request, MAX_BODY_BYTES, shape).await?;
    let (key, text) = ApiKey::make(new, admin.clock.now())?;
    if !admin.callers.create_key(&key).await? {
        return Err(Error::unavailable("the key store", "the id is taken"));
    }
    crash::here(Point::AdminKeyWritten);
    log(&who, "key_created", &key.info.id);
    let created = CreatedKey { key: text.expose_secret().to_owned(), info: key.info };
    Ok((StatusCode::CREATED, [(header::CACHE_CONTROL, "no-store")], Json(created)).into_response())
}

/// List the API keys
///
/// Without their secrets; revoked and expired ones included.
#[utoipa::path(
    get,
    path = "/admin/keys",
    tag = "admin",
    responses(
        (status = 200, description = "Every key ever made.", body = KeyList),
        (status = 401, description = "No credentials.", body = ErrorBody),
        (status = 403, description = "Without the scope admin; or not addressed to a loopback name.", body = ErrorBody),
        (status = 429, description = "Too many requests in this minute.", body = ErrorBody),
        (status = 503, description = "The key store is not available.", body = ErrorBody),
    )
)]
pub(crate) async fn list_keys<J: JobStore, Q: JobQueue, C: Callers>(
    State(admin): State<Arc<Admin<J, Q, C>>>,
    _: Allowed,
) -> Result<Response, Error> {
    let keys = admin.callers.keys().await?.into_iter().map(|key| key.info).collect();
    Ok(([(header::CACHE_CONTROL, "no-store")], Json(KeyList { keys })).into_response())
}

/// Revoke an API key
///
/// The key stops working with the answer. Revoking again answers 204 as well.
#[utoipa::path(
    delete,
    path = "/admin/keys/{id}",
    tag = "admin",
    params(("id" = String, Path, description = "The id of the key, not the key.")),
    responses(
        (status = 204, description = "Revoked."),
        (status = 401, description = "No credentials.", body = ErrorBody),
        (status = 403, description = "Without the scope admin; or not addressed to a loopback name.", body = ErrorBody),
        (status = 404, description = "No such key.", body = ErrorBody),
        (status = 429, description = "Too many requests in this minute.", body = ErrorBody),
        (status = 503, description = "The key store is not available.", body = ErrorBody),
    )
)]
pub(crate) async fn revoke_key<J: JobStore, Q: JobQueue, C: Callers>(
    State(admin): State<Arc<Admin<J, Q, C>>>,
    Allowed(who): Allowed,
    id: Result<Path<String>, PathRejection>,
) -> Result<StatusCode, Error> {
    let Path(id) = id.map_err(|_| unknown())?;
    if !admin.callers.revoke_key(&id, admin.clock.now()).await? {
        return Err(unknown());
    }
    crash::here(Point::AdminKeyRevoked);
    log(&who, "key_revoked", &id);
    Ok(StatusCode::NO_CONTENT)
}

/// Look at what a key has had of the models
///
/// Requests below `/v1/`, by the month. What is not settled 20 minutes after its beginning counts as
/// if all that was reserved for it had been taken.
#[utoipa::path(
    get,
    path = "/admin/keys/{id}/usage",
    tag = "admin",
    params(("id" = String, Path, description = "The id of the key, not the key.")),
    responses(
        (status = 200, description = "The key's ledger.", body = KeyUsage),
        (status = 401, description = "No credentials.", body = ErrorBody),
        (status = 403, description = "Without the scope admin; or not addressed to a loopback name.", body = ErrorBody),
        (status = 404, description = "No such key.", body = ErrorBody),
        (status = 429, description = "Too many requests in this minute.", body = ErrorBody),
        (status = 503, description = "The key store is not available.", body = ErrorBody),
    )
)]
pub(crate) async fn key_usage<J: JobStore, Q: JobQueue, C: Callers>(
    State(admin): State<Arc<Admin<J, Q, C>>>,
    _: Allowed,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, Error> {
    let Path(id) = id.map_err(|_| unknown())?;
    let key = admin.callers.find_key(&id).await?.ok_or_else(unknown)?;
    let mut account = admin.callers.find_account(&id).await?;
    account.refill(&key.info.limits, admin.clock.now());
    let usd = |pico: u64| pico as f64 / 1e12;
    let month = |(name, month): (&String, &Month)| MonthUsage {
        month: name.clone(),
        requests: month.requests,
        prompt_tokens: month.prompt_tokens,
        completion_tokens: month.completion_tokens,
        cost_usd: usd(month.cost_pico),
        estimated_requests: month.estimated_requests,
        estimated_tokens: month.estimated_tokens,
        estimated_cost_usd: usd(month.estimated_cost_pico),
    };
    let usage = KeyUsage { under_way: account.under_way() as u64, months: account.months.iter().map(month).collect() };
    Ok(([(header::CACHE_CONTROL, "no-store")], Json(usage)).into_response())
}

fn unknown() -> Error {
    Error::new(Code::NotFound, "There is no key of this id. GET /admin/keys lists them.")
}
