//! What the functions need of the world. Each trait has two implementations that users run:
//! AWS's and the embedded host's.
//!
//! Every method is safe to call twice. Errors are [`Error::unavailable`] where another try may
//! succeed.

use std::collections::BTreeMap;
use std::future::Future;

use uuid::Uuid;

use crate::account::Account;
use crate::auth::Identity;
use crate::auth::keys::ApiKey;
use crate::clock::Timestamp;
use crate::error::Error;
use crate::job::{Fence, Job, Record, Tombstone, Upload};
use crate::message::Message;
use crate::push::Subscriber;

type Result<T> = std::result::Result<T, Error>;

/// What remembers a client's `Idempotency-Key`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Idempotency {
    pub caller: String,
    pub key: String,
    /// SHA-256 of the parsed fields and the bytes as received, in hex.
    pub fingerprint: String,
    pub id: Uuid,
    pub expires_at: Timestamp,
}

/// What is written in one transaction when a job comes into being.
#[derive(Debug, Clone)]
pub struct Creation {
    pub job: Job,
    pub idempotency: Option<Idempotency>,
    /// The upload that the job is made of; it is used up.
    pub upload: Option<Upload>,
    /// The most that the caller may have queued, this job included.
    pub max_queued_bytes: u64,
}

/// What [`JobStore::create`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Created {
    New,
    /// The key was taken first by another request.
    KeyTaken(Idempotency),
    /// The upload was used or given up in the meantime.
    UploadTaken,
    /// The caller has too much queued.
    QueueFull,
}

/// A page of what a store holds. `T` is what it is of, `P` a place in the store's order.
#[derive(Debug)]
pub struct Page<T, P> {
    /// In the store's order. One that this build cannot read is left out and logged.
    pub records: Vec<T>,
    /// Where the page ends, behind what was left out too; `None` where nothing follows. A page without a
    /// record need not be the last.
    pub next: Option<P>,
}

/// The records. A write that marks a job for enrichment reaches it by the store's change feed.
pub trait JobStore: Send + Sync + 'static {
    /// Where a page of due records ended.
    type Position: Clone + Send + Sync + 'static;

    /// Writes all of a creation, or nothing.
    fn create(&self, creation: Creation) -> impl Future<Output = Result<Created>> + Send;

    /// Writes a new upload; `false` where its caller would have more than `max_queued_bytes` queued.
    fn reserve(&self, upload: &Upload, max_queued_bytes: u64) -> impl Future<Output = Result<bool>> + Send;

    /// A live idempotency item.
    fn idempotency(
        &self,
        caller: &str,
        key: &str,
        now: Timestamp,
    ) -> impl Future<Output = Result<Option<Idempotency>>> + Send;

    fn get(&self, id: Uuid) -> impl Future<Output = Result<Option<Record>>> + Send;

    /// Writes `after` where the record that `fence` names still stands; `false` where it does not.
    /// What the caller has queued changes with it.
    fn replace(&self, fence: Fence, after: &Record) -> impl Future<Output = Result<bool>> + Send;

    /// Puts a tombstone in the place of `job`, where it still stands, and deletes its idempotency
    /// item in the same transaction; `false` where the record is another.
    fn bury(&self, job: &Job, tombstone: &Tombstone) -> impl Future<Output = Result<bool>> + Send;

    /// Records with `due_at` at or before `now`, longest due first, at most `limit`: from the first on, or
    /// behind where an earlier page ended, whatever has become of its records. `now` is not before that page's.
    fn due(
        &self,
        now: Timestamp,
        after: Option<&Self::Position>,
        limit: u32,
    ) -> impl Future<Output = Result<Page<Record, Self::Position>>> + Send;

    /// A caller's live jobs with ids below `before`, newest first, at most `limit`, which is 1 or more.
    fn list(
        &self,
        caller: &str,
        before: Option<Uuid>,
        limit: u32,
    ) -> impl Future<Output = Result<Page<Job, Uuid>>> + Send;
}

/// A queue in front of a function: at least once, in no promised order.
pub trait JobQueue: Send + Sync + 'static {
    fn send(&self, message: Message) -> impl Future<Output = Result<()>> + Send;

    /// Hides a received message for `seconds` from now; whoever does so is done with it.
    fn set_visibility(&self, receipt: &str, seconds: u32) -> impl Future<Output = Result<()>> + Send;

    /// Makes a dead letter of what no message need be received for any more. Twice, there are two of it.
    fn bury(&self, body: String) -> impl Future<Output = Result<()>> + Send;

    /// Messages that were received too often and given up, at most `limit`.
    fn dead_letters(&self, limit: u32) -> impl Future<Output = Result<Vec<DeadLetter>>> + Send;

    /// Puts dead letters back into the queue with a fresh receive count: those with these ids, or
    /// all. An id of none is passed by. Returns how many were moved.
    fn redrive_dead_letters(&self, ids: Option<&[String]>) -> impl Future<Output = Result<u64>> + Send;
}

/// A message that was given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    pub id: String,
    pub body: String,
    pub receive_count: u32,
    pub sent_at: Timestamp,
    /// SQS does not tell.
    pub given_up_at: Option<Timestamp>,
}

/// Who may call: API keys, what each has had of the models, and how much each caller has asked in
/// this minute.
pub trait Callers: Send + Sync + 'static {
    /// Writes a new key; `false` where its id is taken.
    fn create_key(&self, key: &ApiKey) -> impl Future<Output = Result<bool>> + Send;

    fn find_key(&self, id: &str) -> impl Future<Output = Result<Option<ApiKey>>> + Send;

    /// Every key ever made, oldest first. There are as many as callers, so no pages.
    fn keys(&self) -> impl Future<Output = Result<Vec<ApiKey>>> + Send;

    /// Revokes a key at `now`; one that was revoked before keeps its moment. `false` where there is
    /// no such key.
    fn revoke_key(&self, id: &str, now: Timestamp) -> impl Future<Output = Result<bool>> + Send;

    /// The account of a key; a new one where nothing was written yet.
    fn find_account(&self, key_id: &str) -> impl Future<Output = Result<Account>> + Send;

    /// Writes `after` where the account still stands at `version`; `false` where it does not.
    fn replace_account(&self, key_id: &str, version: u64, after: &Account)
    -> impl Future<Output = Result<bool>> + Send;

    /// Counts one request of `caller` in `window` and returns how many it has made there. Windows
    /// are numbered; a count of one that is over may be forgotten.
    fn count_request(&self, caller: &str, window: i64) -> impl Future<Output = Result<u32>> + Send;
}

/// A permission to open one WebSocket, as it is stored: under its hash.
#[derive(Debug, Clone, PartialEq)]
pub struct Ticket {
    /// SHA-256 of its text, in hex.
    pub sha256: String,
    pub identity: Identity,
    pub expires_at: Timestamp,
}

/// An open WebSocket.
#[derive(Debug, Clone, PartialEq)]
pub struct Connection {
    pub id: String,
    /// Who opened it.
    pub identity: Identity,
    /// When it is forgotten, whatever became of it.
    pub expires_at: Timestamp,
}

/// What [`Connections::subscribe`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subscribed {
    Done,
    /// The connection is subscribed to [`crate::push::MAX_SUBSCRIPTIONS`] jobs.
    TooMany,
    /// There is no such connection any more.
    Gone,
}

/// Who is connected, what each wants to be told of, and who may connect.
pub trait Connections: Send + Sync + 'static {
    fn put_ticket(&self, ticket: &Ticket) -> impl Future<Output = Result<()>> + Send;

    /// Uses a ticket up; `None` where there is none that lives. Of two that use it one gets it. An error where
    /// nobody can be let in leaves it as it is.
    fn take_ticket(&self, sha256: &str, now: Timestamp) -> impl Future<Output = Result<Option<Ticket>>> + Send;

    /// Remembers a connection.
    fn open(&self, connection: &Connection) -> impl Future<Output = Result<()>> + Send;

    fn find(&self, id: &str) -> impl Future<Output = Result<Option<Connection>>> + Send;

    /// From now on the connection wants to be told of the job. A change that is written after this is
    /// told.
    fn subscribe(&self, connection: &Connection, job: Uuid) -> impl Future<Output = Result<Subscribed>> + Send;

    fn subscribers(&self, job: Uuid) -> impl Future<Output = Result<Vec<Subscriber>>> + Send;

    /// Forgets a connection with its subscriptions.
    fn close(&self, id: &str) -> impl Future<Output = Result<()>> + Send;
}

/// What [`Push::push`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    Sent,
    /// Nobody is there any more, or nobody who reads.
    Gone,
}

/// The way to an open WebSocket.
pub trait Push: Send + Sync + 'static {
    /// Sends one frame ([`crate::push::Frame::to_json`]).
    fn push(&self, connection: &str, frame: String) -> impl Future<Output = Result<Pushed>> + Send;
}

/// What a client may put under one key, once signed: exactly this.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PutTerms {
    pub content_type: String,
    pub size_bytes: u64,
    /// SHA-256 of the body, in standard base64.
    pub checksum_sha256: String,
    pub expires_at: Timestamp,
}

/// A permission to put one blob, for whoever holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PresignedPut {
    /// To be resolved against the address of the API.
    pub url: String,
    /// To be sent with the body as they are.
    pub headers: BTreeMap<String, String>,
}

/// What a client may get under one key, once signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GetTerms {
    /// As what the answer is declared.
    pub content_type: String,
    pub expires_at: Timestamp,
}

/// Photos, what was drawn of them, and model bundles, by key. Keys use `/` and hold no `..`.
pub trait BlobStore: Send + Sync + 'static {
    /// A permission to put one blob under `key`.
    fn presign_put(&self, key: &str, terms: &PutTerms) -> impl Future<Output = Result<PresignedPut>> + Send;

    /// A URL that gives whoever holds it the blob under `key`, which need not be there yet. To be
    /// resolved against the address of the API.
    fn presign_get(&self, key: &str, terms: &GetTerms) -> impl Future<Output = Result<String>> + Send;

    /// Writes the whole blob or nothing; an existing one is replaced.
    fn put(&self, key: &str, bytes: Vec<u8>) -> impl Future<Output = Result<()>> + Send;

    fn get(&self, key: &str) -> impl Future<Output = Result<Option<Vec<u8>>>> + Send;

    /// Deletes everything under `prefix`, which ends in `/`.
    fn delete_prefix(&self, prefix: &str) -> impl Future<Output = Result<()>> + Send;

    /// The next level of names under `prefix` that sort after `after`, in order, at most `limit`.
    fn list(&self, prefix: &str, after: Option<&str>, limit: u32) -> impl Future<Output = Result<Vec<String>>> + Send;
}
