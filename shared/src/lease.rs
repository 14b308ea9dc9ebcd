//! What a worker writes beside the record of a job that it holds.

use crate::clock::Timestamp;
use crate::error::Error;
use crate::job::Job;
use crate::ports::BlobStore;

/// Stores a blob of `job`, a claimed one. Behind the lease's end nobody does: a delete erases once more by then,
/// and no later.
///
/// # Errors
/// [`Error::unavailable`] where the lease has ended or the store fails.
pub async fn put_leased(
    blobs: &impl BlobStore,
    job: &Job,
    now: Timestamp,
    key: &str,
    bytes: Vec<u8>,
) -> Result<(), Error> {
    if !job.is_leased(now) {
        return Err(Error::unavailable("the lease", "it has ended"));
    }
    blobs.put(key, bytes).await
}
