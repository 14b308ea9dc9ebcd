//! One conditional write of one job: compute the next record, write it if the old one still
//! stands, otherwise read again and ask the state machine anew.

use crate::error::Error;
use crate::job::{Job, Record, Refused};
use crate::ports::JobStore;

/// How often a write that lost a race is computed again. Two writers meet rarely, three never.
const MAX_TRIES: u32 = 5;

/// Why a job was not moved.
#[derive(Debug)]
pub enum NotMoved {
    /// The state machine says no.
    Refused(Refused),
    /// The job was deleted or has expired.
    Gone,
    /// The store failed; another try may succeed.
    Store(Error),
}

/// Moves `job` by `step` and returns the record as written.
///
/// # Errors
/// [`NotMoved`]; nothing was written then.
pub async fn transition<T: Send>(
    store: &impl JobStore,
    job: &Job,
    step: impl Fn(&Job) -> Result<(Job, T), Refused> + Send + Sync,
) -> Result<(Job, T), NotMoved> {
    let mut current = job.clone();
    for _ in 0..MAX_TRIES {
        let (next, value) = step(&current).map_err(NotMoved::Refused)?;
        let record = Record::Job(next);
        if store.replace(current.fence(), &record).await.map_err(NotMoved::Store)? {
            let Record::Job(next) = record else { return Err(NotMoved::Gone) };
            return Ok((next, value));
        }
        let found = store.get(job.id).await.map_err(NotMoved::Store)?;
        current = found.and_then(Record::into_job).ok_or(NotMoved::Gone)?;
    }
    Err(NotMoved::Store(Error::unavailable("the job store", "a write kept losing its race")))
}
