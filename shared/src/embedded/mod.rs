//! The ports of the embedded host: SQLite files and a directory, in one process.
//!
//! Records and queue lie in two files and commit apart, as DynamoDB and SQS do, so that the faults
//! between them can be found here. Both survive `kill -9` (WAL); what is flushed for a power cut besides is in
//! `sqlite.rs`.

mod blobs;
mod callers;
mod columns;
pub mod downloads;
mod jobs;
mod queue;
mod signer;
mod sockets;
mod sqlite;
pub mod uploads;

pub use blobs::DirBlobStore;
pub use callers::SqliteCallers;
pub use jobs::{Change, SqliteJobStore, Work, Writes};
pub use queue::{Delivery, SqliteJobQueue};
pub use sockets::{Hub, Outbox};
