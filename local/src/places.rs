//! A few places for each of many names, so that none takes all there are: a receiver of webhooks that takes its time, a
//! caller whose photos arrive slowly.
//!
//! Reads and writes nothing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Names that are known before those without a place taken are forgotten.
const KNOWN: usize = 1000;

pub struct Places {
    each: usize,
    of: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl Places {
    pub(crate) fn new(each: usize) -> Self {
        Self { each, of: Mutex::default() }
    }

    /// A place, held until it is dropped. Waits for as long as all of this name are taken.
    pub(crate) async fn take(&self, name: &str) -> Option<OwnedSemaphorePermit> {
        let places = {
            let mut of = self.of.lock().unwrap_or_else(PoisonError::into_inner);
            if of.len() >= KNOWN {
                // Whoever holds a place or waits for one holds its semaphore as well.
                of.retain(|_, places| Arc::strong_count(places) > 1);
            }
            Arc::clone(of.entry(name.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(self.each))))
        };
        // None is ever closed.
        places.acquire_owned().await.ok()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn names_are_forgotten_but_not_their_places() {
        let places = Places::new(1);
        let held = places.take("held").await.unwrap();
        for name in 0..3 * KNOWN {
            assert!(places.take(&name.to_string()).await.is_some());
        }
        assert!(places.of.lock().unwrap().len() <= KNOWN);
        assert!(places.take("held").now_or_never().is_none());
        drop(held);
        assert!(places.take("held").now_or_never().is_some());
    }
}
