//! What the store holds under an id: a job, or what there is before one and after it.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Job, Status};
use crate::clock::Timestamp;

/// What is left of a deleted job: enough to erase late writes and to refuse stale workers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    pub id: Uuid,
    pub caller: String,
    /// The job's; absent in tombstones of earlier builds.
    #[serde(default)]
    pub trace_id: String,
    pub version: u64,
    /// Where the cache may still hold the outputs; absent once they are erased for good.
    pub cache_key: Option<String>,
    /// One lease after the delete: from then on no worker can still be writing.
    pub erase_after: Timestamp,
    /// How often sweep has come by.
    pub sweeps: u32,
    /// When sweep erases (again); absent when everything is gone.
    pub due_at: Option<Timestamp>,
    pub expires_at: Timestamp,
}

/// A photo that a caller may send straight to the blob store, until a job is made of it. Its size
/// counts against the caller's queued bytes from the start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upload {
    pub id: Uuid,
    pub caller: String,
    pub version: u64,
    /// Where the blob store puts it: `incoming/<digest of the caller>/<id>/photo`.
    pub image_key: String,
    /// As announced, and signed with the permission to upload.
    pub size_bytes: u64,
    /// Whether a job was made of it, or it was given up.
    pub used: bool,
    /// When sweep erases what was uploaded; absent when it is gone.
    pub due_at: Option<Timestamp>,
    pub expires_at: Timestamp,
}

/// What the store holds under an id.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
#[expect(clippy::large_enum_variant, reason = "the others are rare and short-lived in memory")]
pub enum Record {
    Job(Job),
    Tombstone(Tombstone),
    Upload(Upload),
}

/// The record that a write replaces. The version alone would do; naming the state and the claim
/// as well keeps the condition readable in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fence {
    pub id: Uuid,
    pub version: u64,
    pub claim: u64,
    /// Absent for what is no job.
    pub status: Option<Status>,
    /// What the record counts against its caller; the write settles the difference.
    pub queued_bytes: u64,
}

impl Record {
    #[must_use]
    pub fn id(&self) -> Uuid {
        match self {
            Self::Job(job) => job.id,
            Self::Tombstone(tombstone) => tombstone.id,
            Self::Upload(upload) => upload.id,
        }
    }

    #[must_use]
    pub fn caller(&self) -> &str {
        match self {
            Self::Job(job) => &job.caller,
            Self::Tombstone(tombstone) => &tombstone.caller,
            Self::Upload(upload) => &upload.caller,
        }
    }

    #[must_use]
    pub fn due_at(&self) -> Option<Timestamp> {
        match self {
            Self::Job(job) => job.due_at,
            Self::Tombstone(tombstone) => tombstone.due_at,
            Self::Upload(upload) => upload.due_at,
        }
    }

    #[must_use]
    pub fn expires_at(&self) -> Timestamp {
        match self {
            Self::Job(job) => job.expires_at,
            Self::Tombstone(tombstone) => tombstone.expires_at,
            Self::Upload(upload) => upload.expires_at,
        }
    }

    /// What the record counts against its caller's queued bytes: the photo or prompt of an open job,
    /// or the room kept for an upload.
    #[must_use]
    pub fn queued_bytes(&self) -> u64 {
        match self {
            Self::Job(job) => job.queued_bytes(),
            Self::Upload(upload) if !upload.used => upload.size_bytes,
            Self::Tombstone(_) | Self::Upload(_) => 0,
        }
    }

    #[must_use]
    pub fn fence(&self) -> Fence {
        match self {
            Self::Job(job) => job.fence(),
            Self::Tombstone(tombstone) => {
                Fence { id: tombstone.id, version: tombstone.version, claim: 0, status: None, queued_bytes: 0 }
            }
            Self::Upload(upload) => {
                let (id, version, queued_bytes) = (upload.id, upload.version, self.queued_bytes());
                Fence { id, version, claim: 0, status: None, queued_bytes }
            }
        }
    }

    /// The job, unless it was deleted.
    #[must_use]
    pub fn into_job(self) -> Option<Job> {
        match self {
            Self::Job(job) => Some(job),
            Self::Tombstone(_) | Self::Upload(_) => None,
        }
    }
}
