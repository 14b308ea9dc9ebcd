//! Named points between two writes of a handler, where a test kills the process (SIGKILL).
//!
//! In a release build [`here`] is empty and the names are not in the binary.

#[cfg(debug_assertions)]
use std::sync::OnceLock;
#[cfg(debug_assertions)]
use std::sync::atomic::{AtomicU32, Ordering};

#[cfg(debug_assertions)]
use crate::config::{ConfigError, Env};

macro_rules! points {
    ($($variant:ident = $name:literal),+ $(,)?) => {
        /// A point between two writes.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Point { $($variant),+ }

        #[cfg(debug_assertions)]
        impl Point {
            /// Every point, in the order in which a job meets them.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The name that `CRASH_AT` takes.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }
        }
    };
}

points! {
    BlobWritten = "blobs.written_before_rename",
    SubmitUploadReserved = "submit.upload_reserved",
    SubmitPhotoStored = "submit.photo_stored",
    SubmitPromptStored = "submit.prompt_stored",
    SubmitRecordWritten = "submit.record_written",
    SubmitMessageSent = "submit.message_sent",
    SubmitOriginalErased = "submit.original_erased",
    QueueReceived = "queue.received",
    InferenceClaimed = "inference.claimed",
    InferenceMapStored = "inference.map_stored",
    InferenceFinished = "inference.finished",
    InferenceCached = "inference.cached",
    InferenceReleased = "inference.released",
    InferenceHidden = "inference.hidden",
    InferenceForgotten = "inference.forgotten",
    QueueBeforeAck = "queue.before_ack",
    EnrichmentQueued = "enrichment.queued",
    EnrichmentClaimed = "enrichment.claimed",
    EnrichmentTextPushed = "enrichment.text_pushed",
    EnrichmentAnswered = "enrichment.answered",
    EnrichmentAnswerStored = "enrichment.answer_stored",
    EnrichmentDeferred = "enrichment.deferred",
    EnrichmentFinished = "enrichment.finished",
    FeedBeforeRemoval = "feed.before_removal",
    ResultTombstoned = "result.tombstoned",
    ResultBlobsErased = "result.blobs_erased",
    ResultForgetSent = "result.forget_sent",
    SweepWritten = "sweep.written",
    SweepSent = "sweep.sent",
    SweepBuried = "sweep.buried",
    SweepErased = "sweep.erased",
    SweepTombstoneSettled = "sweep.tombstone_settled",
    SweepForgetSent = "sweep.forget_sent",
    SweepUploadErased = "sweep.upload_erased",
    SweepUploadSettled = "sweep.upload_settled",
    SweepOrphanErased = "sweep.orphan_erased",
    HousekeepingRecordsRemoved = "housekeeping.records_removed",
    HousekeepingPhotosRemoved = "housekeeping.photos_removed",
    StartSecretWritten = "start.secret_written_before_rename",
    InitKeyWritten = "init.key_written",
    StartLeaseEnded = "start.lease_ended",
    StartPhotosShown = "start.photos_shown",
    StartMessagesShown = "start.messages_shown",
    AdminKeyWritten = "admin.key_written",
    AdminKeyRevoked = "admin.key_revoked",
    AdminJobRedriven = "admin.job_redriven",
    AdminMessageSent = "admin.message_sent",
    AdminLettersReceived = "admin.letters_received",
    AdminLetterSent = "admin.letter_sent",
    AdminPhotoLettersMoved = "admin.photo_letters_moved",
    AdminDeadLettersMoved = "admin.dead_letters_moved",
    ChatReserved = "chat.reserved",
    ChatSettled = "chat.settled",
    SocketTicketWritten = "socket.ticket_written",
    SocketTicketTaken = "socket.ticket_taken",
    SocketOpened = "socket.opened",
    SocketSubscribed = "socket.subscribed",
    SocketAnswered = "socket.answered",
    SocketClosed = "socket.closed",
    NotifyPushed = "notify.pushed",
    NotifyClosed = "notify.closed",
    NotifyQueued = "notify.queued",
    WebhookUnreadableBuried = "webhook.unreadable_buried",
    WebhookAnswered = "webhook.answered",
    WebhookSettled = "webhook.settled",
    WebhookPostponed = "webhook.postponed",
    WebhookHidden = "webhook.hidden",
    WebhookBuried = "webhook.buried",
    WebhookGivenUp = "webhook.given_up",
}

/// The point, and how often it is still to be met.
#[cfg(debug_assertions)]
static ARMED: OnceLock<(Point, AtomicU32)> = OnceLock::new();

/// Chooses the point at which this process will die: `CRASH_AT` is `name`, or `name:times` for the time at
/// which it is met that often, in the middle of other work.
///
/// # Errors
/// [`ConfigError`] for the name of no point, or a number that is none.
#[cfg(debug_assertions)]
pub fn arm(env: &Env) -> Result<(), ConfigError> {
    let Some(at) = env.text("CRASH_AT")? else { return Ok(()) };
    let wrong = |problem: String| ConfigError::new("CRASH_AT", problem);
    let (name, times) = at.split_once(':').unwrap_or((at, "1"));
    let point = Point::ALL.iter().find(|point| point.name() == name);
    let point = point.ok_or_else(|| wrong(format!("there is no crash point {name:?}")))?;
    let number = times.parse().ok().filter(|&times: &u32| times > 0);
    let times = number.ok_or_else(|| wrong(format!("{times:?} is no number of times")))?;
    let _ = ARMED.set((*point, AtomicU32::new(times)));
    Ok(())
}

/// Kills this process if `point` was armed and has been met as often as it was to be.
#[cfg(debug_assertions)]
pub fn here(point: Point) {
    let Some((armed, left)) = ARMED.get() else { return };
    if *armed == point && left.fetch_sub(1, Ordering::SeqCst) == 1 {
        // A Lambda's end is seen in its log alone.
        eprintln!("killed at {}", point.name());
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        loop {
            std::thread::park();
        }
    }
}

/// Nothing, in a release build.
#[cfg(not(debug_assertions))]
#[inline]
pub fn here(_: Point) {}
