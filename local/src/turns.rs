//! Photos are taken in a few at a time, and none for ever: what clients send bounds what we hold.
//!
//! Triggered by every request to submit, before its body is read. Reads and writes nothing.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use shared::error::{Code, Error};
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// Photos taken in at the same time; one as JSON holds some 25 MB for as long as it takes.
pub(crate) const TURNS: usize = 16;
/// How long a request waits for its turn, its body unread.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a turn may last: 4 MiB at 70 kB a second.
const TURN: Duration = Duration::from_secs(60);

/// Lets a request in when it is its turn.
pub(crate) async fn in_turn(
    State(turns): State<Arc<Semaphore>>,
    request: Request,
    next: Next,
) -> Result<Response, Error> {
    let busy = || Error::too_many_requests("Too many photos are arriving at the moment. Try again.", 5);
    let turn = timeout(PATIENCE, turns.acquire()).await.map_err(|_| busy())?;
    let _turn = turn.map_err(|_| busy())?;
    let slow = |_| Error::new(Code::InvalidRequest, "The photo did not arrive within 60 seconds.");
    timeout(TURN, next.run(request)).await.map_err(slow)
}
