//! How much is worked at once: photos on the processor, and bytes of decoded pixels in memory.
//!
//! Entered by each photo between its claim and its decoding, left when its reading is made.

use std::sync::Arc;

use shared::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Decoded bytes at work at once: two photos of 12 megapixels. A photo that takes more by itself
/// waits until it is alone.
const MEMORY: u32 = 80_000_000;

/// Places on the processor and bytes in memory.
pub struct Room {
    places: Arc<Semaphore>,
    memory: Arc<Semaphore>,
}

/// Held while a photo is worked.
pub struct Held {
    _permit: OwnedSemaphorePermit,
}

impl Room {
    /// Room for `places` photos on the processor.
    #[must_use]
    pub fn new(places: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(places)), memory: Arc::new(Semaphore::new(MEMORY as usize)) }
    }

    /// A place on the processor, first come first served.
    ///
    /// # Errors
    /// Never, for as long as nobody closes the room.
    pub async fn place(&self) -> Result<Held, Error> {
        let permit = Arc::clone(&self.places).acquire_owned().await;
        permit.map(|permit| Held { _permit: permit }).map_err(Error::internal)
    }

    /// Memory for a photo that takes `bytes` to decode.
    ///
    /// # Errors
    /// Never, for as long as nobody closes the room.
    pub async fn memory(&self, bytes: u64) -> Result<Held, Error> {
        let bytes = u32::try_from(bytes).unwrap_or(MEMORY).min(MEMORY);
        let permit = Arc::clone(&self.memory).acquire_many_owned(bytes).await;
        permit.map(|permit| Held { _permit: permit }).map_err(Error::internal)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn photos_wait_for_memory_and_the_largest_one_gets_in_alone() {
        let room = Room::new(2);
        let first = room.memory(u64::from(MEMORY) / 2).await.unwrap();
        let second = room.memory(u64::from(MEMORY) / 2).now_or_never().unwrap().unwrap();
        assert!(room.memory(1).now_or_never().is_none());
        drop((first, second));
        let alone = room.memory(u64::MAX).now_or_never().unwrap().unwrap();
        assert!(room.memory(1).now_or_never().is_none());
        drop(alone);
        assert!(room.memory(1).now_or_never().is_some());
    }

    #[tokio::test]
    async fn no_more_photos_than_places_are_on_the_processor() {
        let room = Room::new(2);
        let held = (room.place().await.unwrap(), room.place().await.unwrap());
        assert!(room.place().now_or_never().is_none());
        drop(held);
        assert!(room.place().now_or_never().is_some());
    }
}
