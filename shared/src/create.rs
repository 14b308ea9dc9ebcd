//! How a job comes into being, whatever asked for it.

use crate::crash::{self, Point};
use crate::error::Error;
use crate::job::Status;
use crate::message::Message;
use crate::ports::{Created, Creation, JobQueue, JobStore};
use crate::telemetry;

/// Writes a job with what belongs to it, then sends the message of a photo; a prompt's record is its
/// own dispatch. A message that cannot be sent is no error: the record is due, and sweep sends it.
///
/// # Errors
/// Where the record could not be written.
pub async fn create_job(jobs: &impl JobStore, queue: &impl JobQueue, creation: Creation) -> Result<Created, Error> {
    let (id, trace_id) = (creation.job.id, creation.job.trace_id.clone());
    let is_pending = creation.job.status == Status::Pending;
    let created = jobs.create(creation).await?;
    if created == Created::New {
        crash::here(Point::SubmitRecordWritten);
        telemetry::about_job(id, &trace_id);
        if !is_pending {
            return Ok(created);
        }
        match queue.send(Message::Infer { id }).await {
            Ok(()) => crash::here(Point::SubmitMessageSent),
            Err(error) => {
                tracing::warn!(error.chain = error.chain(), "message not sent; sweep will send it");
            }
        }
    }
    Ok(created)
}
