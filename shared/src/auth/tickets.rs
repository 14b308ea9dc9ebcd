//! Tickets: what a client shows in the address of a WebSocket, where no key and no token may stand.
//!
//! Triggered by `POST /socket-tickets`, and by whoever opens a WebSocket. Writes and uses up tickets.

use chrono::TimeDelta;
use secrecy::SecretString;

use super::{Identity, keys, refused};
use crate::clock::Timestamp;
use crate::error::Error;
use crate::ports::{Connections, Ticket};

/// From the answer to the opened WebSocket.
pub(crate) const TTL: TimeDelta = TimeDelta::seconds(60);
const BYTES: usize = 32;

/// Writes a new ticket for `identity`; returns the only copy of its text, and until when it is good.
///
/// # Errors
/// Where the store cannot be reached, or the system gives no random numbers.
pub async fn make(
    connections: &impl Connections,
    identity: Identity,
    now: Timestamp,
) -> Result<(SecretString, Timestamp), Error> {
    let text = keys::random_hex::<BYTES>()?;
    let ticket = Ticket { sha256: sha256(&text), identity, expires_at: now + TTL };
    connections.put_ticket(&ticket).await?;
    Ok((SecretString::from(text), ticket.expires_at))
}

/// Uses a ticket up, and tells who it was made for.
///
/// # Errors
/// 401 where there is no such ticket, or no more; 503 where that cannot be known.
pub async fn take(connections: &impl Connections, text: &str, now: Timestamp) -> Result<Identity, Error> {
    let invalid = || refused("ticket", "This ticket is not valid: ask POST /socket-tickets for a new one.");
    if text.len() != 2 * BYTES {
        return Err(invalid());
    }
    // The hash is looked up, so no time depends on how much of a guess is right.
    connections.take_ticket(&sha256(text), now).await?.map(|ticket| ticket.identity).ok_or_else(invalid)
}

fn sha256(text: &str) -> String {
    keys::hash(text).iter().map(|byte| format!("{byte:02x}")).collect()
}
