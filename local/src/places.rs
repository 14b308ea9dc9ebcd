//! Webhooks are sent to each receiver a few at a time: one that takes its time takes no more of the senders than that.
//!
//! Taken by the workers before they send. Reads and writes nothing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// Requests under way to one receiver.
const PLACES: usize = 2;
/// How long one is waited for: a receiver that answers at once is soon free.
const PATIENCE: Duration = Duration::from_millis(50);

/// The places of each receiver, by `host:port`. Receivers are those that the operator has named, so none is
/// ever taken out.
#[derive(Default)]
pub struct Places {
    of: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl Places {
    /// A place, held until it is dropped; `None` where all are taken.
    pub(crate) async fn take(&self, receiver: String) -> Option<OwnedSemaphorePermit> {
        let places = {
            let mut of = self.of.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(of.entry(receiver).or_insert_with(|| Arc::new(Semaphore::new(PLACES))))
        };
        timeout(PATIENCE, places.acquire_owned()).await.ok()?.ok()
    }
}
