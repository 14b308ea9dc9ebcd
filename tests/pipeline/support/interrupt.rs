//! Ports that let something happen at a chosen moment: before or after the n-th call that a handler
//! makes to any of them.

use std::pin::Pin;
use std::sync::{Arc, Mutex};

use shared::clock::Timestamp;
use shared::error::Error;
use shared::job::{Fence, Job, Record, Tombstone, Upload};
use shared::message::Message;
use shared::ports::{
    BlobStore, Created, Creation, DeadLetter, GetTerms, Idempotency, JobQueue, JobStore, Page, PresignedPut, PutTerms,
};
use uuid::Uuid;

type Action = Pin<Box<dyn Future<Output = ()> + Send>>;
type Result<T> = std::result::Result<T, Error>;

/// What happens, and how many moments from now.
#[derive(Clone, Default)]
pub struct Interrupt(Arc<Mutex<Option<(usize, Action)>>>);

impl Interrupt {
    /// `action` happens at the n-th moment from now, the first being 0.
    pub fn arm(&self, moment: usize, action: impl Future<Output = ()> + Send + 'static) {
        *self.0.lock().unwrap() = Some((moment, Box::pin(action)));
    }

    /// Whether it has not happened; it will not any more.
    pub fn disarm(&self) -> bool {
        self.0.lock().unwrap().take().is_some()
    }

    async fn pass(&self) {
        let action = {
            let mut armed = self.0.lock().unwrap();
            match armed.take() {
                Some((0, action)) => Some(action),
                later => {
                    *armed = later.map(|(left, action)| (left - 1, action));
                    None
                }
            }
        };
        if let Some(action) = action {
            action.await;
        }
    }

    async fn around<T>(&self, call: impl Future<Output = T>) -> T {
        self.pass().await;
        let value = call.await;
        self.pass().await;
        value
    }
}

/// A port with its interrupt.
#[derive(Clone)]
pub struct Interrupted<P>(pub P, pub Interrupt);

impl<P: JobStore> JobStore for Interrupted<P> {
    type Position = P::Position;

    async fn create(&self, creation: Creation) -> Result<Created> {
        self.1.around(self.0.create(creation)).await
    }

    async fn reserve(&self, upload: &Upload, max_queued_bytes: u64) -> Result<bool> {
        self.1.around(self.0.reserve(upload, max_queued_bytes)).await
    }

    async fn idempotency(&self, caller: &str, key: &str, now: Timestamp) -> Result<Option<Idempotency>> {
        self.1.around(self.0.idempotency(caller, key, now)).await
    }

    async fn get(&self, id: Uuid) -> Result<Option<Record>> {
        self.1.around(self.0.get(id)).await
    }

    async fn replace(&self, fence: Fence, after: &Record) -> Result<bool> {
        self.1.around(self.0.replace(fence, after)).await
    }

    async fn bury(&self, job: &Job, tombstone: &Tombstone) -> Result<bool> {
        self.1.around(self.0.bury(job, tombstone)).await
    }

    async fn due(&self, now: Timestamp, after: Option<&P::Position>, limit: u32) -> Result<Page<Record, P::Position>> {
        self.1.around(self.0.due(now, after, limit)).await
    }

    async fn list(&self, caller: &str, before: Option<Uuid>, limit: u32) -> Result<Page<Job, Uuid>> {
        self.1.around(self.0.list(caller, before, limit)).await
    }
}

impl<P: JobQueue> JobQueue for Interrupted<P> {
    async fn send(&self, message: Message) -> Result<()> {
        self.1.around(self.0.send(message)).await
    }

    async fn set_visibility(&self, receipt: &str, seconds: u32) -> Result<()> {
        self.1.around(self.0.set_visibility(receipt, seconds)).await
    }

    async fn bury(&self, body: String) -> Result<()> {
        self.1.around(self.0.bury(body)).await
    }

    async fn dead_letters(&self, limit: u32) -> Result<Vec<DeadLetter>> {
        self.1.around(self.0.dead_letters(limit)).await
    }

    async fn redrive_dead_letters(&self, ids: Option<&[String]>) -> Result<u64> {
        self.1.around(self.0.redrive_dead_letters(ids)).await
    }
}

impl<P: BlobStore> BlobStore for Interrupted<P> {
    async fn presign_put(&self, key: &str, terms: &PutTerms) -> Result<PresignedPut> {
        self.1.around(self.0.presign_put(key, terms)).await
    }

    async fn presign_get(&self, key: &str, terms: &GetTerms) -> Result<String> {
        self.1.around(self.0.presign_get(key, terms)).await
    }

    async fn put(&self, key: &str, bytes: Vec<u8>) -> Result<()> {
        self.1.around(self.0.put(key, bytes)).await
    }

    async fn get(&self, key: &str) -> Result<Option<Vec<u8>>> {
        self.1.around(self.0.get(key)).await
    }

    async fn delete_prefix(&self, prefix: &str) -> Result<()> {
        self.1.around(self.0.delete_prefix(prefix)).await
    }

    async fn list(&self, prefix: &str, after: Option<&str>, limit: u32) -> Result<Vec<String>> {
        self.1.around(self.0.list(prefix, after, limit)).await
    }
}
