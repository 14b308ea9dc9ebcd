//! `/admin/…`: keys, dead letters, and jobs that failed.
//!
//! Triggered by HTTP, for callers with the scope `admin`. Reads and writes the key store; moves
//! dead letters back into the queue; writes a failed job's record, then sends its message. Every
//! action is logged with who did it.

mod dead_letters;
mod jobs;
mod keys;

use std::sync::Arc;

use axum::Router;
use axum::routing::{delete, get, post};
use shared::api::admin::{
    CreatedKey, DeadLetterList, KeyList, KeyUsage, NewKey, RedriveDeadLetters, RedrivenDeadLetters, RedrivenJob,
};
use shared::auth::Identity;
use shared::clock::Clock;
use shared::error::ErrorBody;
use shared::job::Policy;
use shared::ports::{Callers, JobQueue, JobStore};
use utoipa::OpenApi;

/// The longest body: a thousand ids of dead letters.
const MAX_BODY_BYTES: usize = 128 * 1024;

/// What admin works with.
pub struct Admin<J, Q, C> {
    pub jobs: J,
    pub queue: Q,
    /// The queue before webhook; here for its dead letters.
    pub webhooks: Q,
    pub callers: C,
    pub clock: Clock,
    pub policy: Policy,
}

/// This function's part of the API's description.
#[derive(OpenApi)]
#[openapi(
    paths(
        keys::create_key,
        keys::list_keys,
        keys::revoke_key,
        keys::key_usage,
        dead_letters::list_dead_letters,
        dead_letters::redrive_dead_letters,
        jobs::redrive_job
    ),
    components(schemas(
        NewKey,
        CreatedKey,
        KeyList,
        KeyUsage,
        DeadLetterList,
        RedriveDeadLetters,
        RedrivenDeadLetters,
        RedrivenJob,
        ErrorBody
    ))
)]
pub struct Api;

/// This function's routes.
pub fn router<J: JobStore, Q: JobQueue, C: Callers>(admin: Arc<Admin<J, Q, C>>) -> Router {
    Router::new()
        .route("/admin/keys", post(keys::create_key::<J, Q, C>).get(keys::list_keys::<J, Q, C>))
        .route("/admin/keys/{id}", delete(keys::revoke_key::<J, Q, C>))
        .route("/admin/keys/{id}/usage", get(keys::key_usage::<J, Q, C>))
        .route("/admin/dead-letters", get(dead_letters::list_dead_letters::<J, Q, C>))
        .route("/admin/dead-letters/redrive", post(dead_letters::redrive_dead_letters::<J, Q, C>))
        .route("/admin/jobs/{request_id}/redrive", post(jobs::redrive_job::<J, Q, C>))
        .with_state(admin)
}

/// One line for what an admin has done. `subject` is an id or a number, never a key.
fn log(admin: &Identity, action: &'static str, subject: &str) {
    tracing::info!(
        admin.action = action,
        admin.subject = subject,
        admin.caller = admin.caller,
        admin.key_id = admin.key_id.as_deref().unwrap_or("none"),
        "admin action"
    );
}
