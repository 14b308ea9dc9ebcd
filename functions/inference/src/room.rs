//! How much is worked at once: photos on the processor, and bytes of decoded pixels in memory.
//!
//! A photo has its turn before it is claimed and its place before it is fetched, and leaves both when its reading is
//! made: few leases run, and fewer photos lie in memory, than there are photos that wait. The photos are worked by threads of the room's own, which give way to whatever else the process has
//! to do: a request that is taken in or a record that is written waits for no photo.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use shared::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

/// Decoded bytes at work at once: two photos of 12 megapixels. A photo that takes more by itself
/// waits until it is alone.
const MEMORY: u32 = 80_000_000;
/// Photos let in for each thread: while one is worked the next is fetched, and no thread waits for
/// the disk or the network.
const PLACES: usize = 2;
/// Photos that may be claimed for each thread, those with a place included: a claim waits for the disk, which must
/// leave no thread without work.
const TURNS: usize = 4;
/// Of the threads that work photos; a tenth of the usual share where the processor is wanted
/// elsewhere (sched(7)).
const NICE: i32 = 10;

type Work = Box<dyn FnOnce() + Send>;

/// Places for photos, fetched or being worked, and bytes in memory.
pub struct Room {
    turns: Arc<Semaphore>,
    places: Arc<Semaphore>,
    memory: Arc<Semaphore>,
    /// The threads end with it.
    work: Sender<Work>,
}

/// Held while a photo is worked.
pub struct Held {
    _permit: OwnedSemaphorePermit,
}

impl Room {
    /// Room for `threads` photos on the processor, and as many fetched ones.
    ///
    /// # Errors
    /// Where a thread cannot be started.
    pub fn new(threads: usize) -> Result<Self, Error> {
        let (work, inbox) = channel();
        let inbox = Arc::new(Mutex::new(inbox));
        for _ in 0..threads {
            let inbox = Arc::clone(&inbox);
            let thread = std::thread::Builder::new().name("photo".to_owned());
            thread.spawn(move || serve(&inbox)).map_err(|error| Error::unavailable("a thread", error))?;
        }
        let [turns, places] = [TURNS, PLACES].map(|each| Arc::new(Semaphore::new(threads * each)));
        let memory = Arc::new(Semaphore::new(MEMORY as usize));
        Ok(Self { turns, places, memory, work })
    }

    /// Runs `work` on one of the room's threads, as soon as one is free.
    ///
    /// # Errors
    /// Where `work` panics.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
        let (sender, receiver) = oneshot::channel();
        let work: Work = Box::new(move || {
            // Whoever waited may have gone.
            let _ = sender.send(work());
        });
        let unavailable = |error: &'static str| Error::unavailable("the model", error);
        self.work.send(work).map_err(|_| unavailable("its threads have ended"))?;
        receiver.await.map_err(|_| unavailable("its thread panicked"))
    }

    /// A photo's turn to be claimed, first come first served.
    ///
    /// # Errors
    /// Never, for as long as nobody closes the room.
    pub async fn turn(&self) -> Result<Held, Error> {
        held(&self.turns, 1).await
    }

    /// A place for a photo, first come first served.
    ///
    /// # Errors
    /// Never, for as long as nobody closes the room.
    pub async fn place(&self) -> Result<Held, Error> {
        held(&self.places, 1).await
    }

    /// Memory for a photo that takes `bytes` to decode.
    ///
    /// # Errors
    /// Never, for as long as nobody closes the room.
    pub async fn memory(&self, bytes: u64) -> Result<Held, Error> {
        let bytes = u32::try_from(bytes).unwrap_or(MEMORY).min(MEMORY);
        held(&self.memory, bytes).await
    }
}

async fn held(of: &Arc<Semaphore>, permits: u32) -> Result<Held, Error> {
    let permit = Arc::clone(of).acquire_many_owned(permits).await;
    permit.map(|permit| Held { _permit: permit }).map_err(Error::internal)
}

fn serve(inbox: &Mutex<Receiver<Work>>) {
    // Linux takes this for the thread that calls, not for the process (nice(2)). Where it is forbidden,
    // photos and requests share alike.
    let _ = rustix::process::nice(NICE);
    loop {
        let next = inbox.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(work) = next else { return };
        // A panic in a decoder fails this photo and no other; the hook has logged it.
        let _ = catch_unwind(AssertUnwindSafe(work));
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn photos_wait_for_memory_and_the_largest_one_gets_in_alone() {
        let room = Room::new(2).unwrap();
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
    async fn two_photos_are_let_in_for_each_thread_and_four_claimed() {
        let room = Room::new(1).unwrap();
        let held = (room.place().await.unwrap(), room.place().await.unwrap());
        assert!(room.place().now_or_never().is_none());
        drop(held);
        assert!(room.place().now_or_never().is_some());
        let turns: Vec<_> = (0..4).map(|_| room.turn().now_or_never().unwrap().unwrap()).collect();
        assert!(room.turn().now_or_never().is_none());
        drop(turns);
        assert!(room.turn().now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_panic_fails_one_photo_and_leaves_its_thread_working() {
        let room = Room::new(1).unwrap();
        assert!(room.run(|| panic!("expected by this test")).await.is_err());
        assert_eq!(room.run(|| 7).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn photos_give_way_to_everything_else() {
        let own = rustix::process::getpriority_process(None).unwrap();
        let room = Room::new(1).unwrap();
        let photos = room.run(|| rustix::process::getpriority_process(None)).await.unwrap().unwrap();
        assert_eq!(photos, (own + NICE).min(19));
        assert_eq!(rustix::process::getpriority_process(None).unwrap(), own, "the process is as it was");
    }
}
