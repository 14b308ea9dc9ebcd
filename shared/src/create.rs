//! How a job comes into being, whatever asked for it.

use crate::crash::{self, Point};
use crate::error::Error;
use crate::job::Job;
use crate::message::Message;
use crate::ports::{Created, Idempotency, JobQueue, JobStore};

/// Writes a job with its idempotency item, then sends its message. A message that cannot be sent is
/// no error: the record is due, and sweep sends it.
///
/// # Errors
/// Where the record could not be written.
pub async fn create_job(
    jobs: &impl JobStore,
    queue: &impl JobQueue,
    job: &Job,
    idempotency: Option<&Idempotency>,
) -> Result<Created, Error> {
    let created = jobs.create(job, idempotency).await?;
    if created == Created::New {
        crash::here(Point::SubmitRecordWritten);
        match queue.send(Message::Infer { id: job.id }).await {
            Ok(()) => crash::here(Point::SubmitMessageSent),
            Err(error) => tracing::warn!(
                job.id = %job.id,
                trace.id = job.trace_id,
                error.chain = error.chain(),
                "message not sent; sweep will send it"
            ),
        }
    }
    Ok(created)
}
