//! What the scenes begin with: filled once, copied for each.

use std::path::{Path, PathBuf};

use aws_lambda_events::event::eventbridge::EventBridgeEvent;
use chrono::{TimeDelta, Utc};
use inference::Outcome;
use local::Host;
use shared::clock::Clock;
use shared::http::Caller;
use shared::message::Message;
use shared::ports::BlobStore;
use tempfile::TempDir;

use super::clients::{delete_all, submit_all_told};
use super::{ERASING, Kind, UNHURRIED, ids};
use crate::support::backlog::{self, JOBS, PATIENCE};
use crate::support::network::Network;
use crate::support::process::Process;
use crate::support::receiver::Receiver;
use crate::support::{client, numbered_mole, open, within};
use crate::uploads;
use crate::webhooks::variables;

/// The folders that scenes begin with.
pub(super) struct Folders {
    /// Draws a map of every photo, and takes no time: it is not the network that is tried.
    model: TempDir,
    /// Nothing but the model.
    empty: TempDir,
    queued: TempDir,
    /// Read, their descriptions in the feed.
    read: TempDir,
    reserved: TempDir,
    failed: TempDir,
    completed: TempDir,
    /// Deleted a lease ago.
    buried: TempDir,
    /// Completed; who was to be told refused it all times but the last, which is due.
    untold: TempDir,
}

impl Folders {
    pub(super) async fn fill() -> Self {
        let [model, empty, queued, read, reserved, failed, completed, buried, untold] =
            std::array::from_fn(|_| tempfile::tempdir().unwrap());
        // Of skin it says what the LLM's description speaks of.
        let classes = vec![("melanocytic naevus", [9.0, 0.0, 0.0]), ("other", [0.0, 0.0, 9.0])];
        Network { classes, ..Network::default() }.write(model.path());
        let model_dir = [("MODEL_DIR", model.path().to_str().unwrap())];
        drop(open(empty.path(), Clock::System, &model_dir).await);
        backlog::closed(empty.path()).await;
        backlog::copy(empty.path(), queued.path());
        backlog::accept(&open(queued.path(), Clock::System, &model_dir).await, JOBS).await;
        backlog::closed(queued.path()).await;

        backlog::copy(queued.path(), read.path());
        let asking = [&model_dir[..], &[("LLM_BASE_URL", "http://127.0.0.1:1"), ("LLM_MODEL", "m")]].concat();
        read_all(&open(read.path(), Clock::System, &asking).await).await;
        backlog::closed(read.path()).await;

        backlog::copy(queued.path(), reserved.path());
        reserve(&open(reserved.path(), Clock::System, &model_dir).await).await;
        backlog::closed(reserved.path()).await;

        backlog::copy(queued.path(), failed.path());
        let two_days_on = Clock::manual(Utc::now() + TimeDelta::days(2));
        let host = open(failed.path(), two_days_on, &model_dir).await;
        assert_eq!(host.sweep.handle(EventBridgeEvent::default()).await.unwrap().ended, JOBS as u32);
        drop(host);
        backlog::closed(failed.path()).await;
        backlog::lose_messages(failed.path());

        backlog::copy(queued.path(), completed.path());
        let host = Process::start(completed.path(), &[UNHURRIED, &model_dir].concat()).await.unwrap();
        within(PATIENCE, "all are completed", async || backlog::is_quiet(completed.path())).await;
        host.terminate().await;
        backlog::closed(completed.path()).await;

        backlog::copy(completed.path(), buried.path());
        let unswept = [ERASING, &model_dir, &[("SWEEP_INTERVAL_SECONDS", "3600")]].concat();
        let ids = ids(buried.path()).await;
        let host = Process::start(buried.path(), &unswept).await.unwrap();
        assert!(delete_all(&client(), &host.url, &ids).await);
        host.terminate().await;
        backlog::closed(buried.path()).await;

        backlog::copy(empty.path(), untold.path());
        let receiver = Receiver::start(503).await;
        let address = receiver.host();
        let host =
            Process::start(untold.path(), &[UNHURRIED, &model_dir, &variables(&address)].concat()).await.unwrap();
        submit_all_told(&client(), &host.url, &receiver).await.unwrap();
        within(PATIENCE, "all are refused", async || backlog::refused_deliveries(untold.path()) == JOBS).await;
        host.terminate().await;
        backlog::closed(untold.path()).await;
        backlog::leave_one_try(untold.path());
        Self { model, empty, queued, read, reserved, failed, completed, buried, untold }
    }

    pub(super) fn model(&self) -> PathBuf {
        self.model.path().to_owned()
    }

    pub(super) fn of(&self, kind: Kind) -> &Path {
        match kind {
            Kind::Submitted | Kind::Uploaded | Kind::Asked | Kind::Told | Kind::Snubbed => self.empty.path(),
            Kind::Read => self.read.path(),
            Kind::Reserved => self.reserved.path(),
            Kind::Failed => self.failed.path(),
            Kind::Deleted => self.completed.path(),
            Kind::Buried => self.buried.path(),
            Kind::Untold | Kind::Overdue => self.untold.path(),
            _ => self.queued.path(),
        }
    }
}

/// Has all photos read, and nobody asked about them.
async fn read_all(host: &Host) {
    let lease = host.config.policy.lease;
    while let Some(delivery) = host.queue.receive(lease).await.unwrap() {
        let message = Message::decode(&delivery.body).unwrap();
        assert_eq!(host.inference.process(message, host.clock.now() + lease, None).await, Outcome::Acknowledge);
        host.queue.acknowledge(&delivery.receipt).await.unwrap();
    }
}

/// Uploads photos of which no job is made, and lets them arrive.
async fn reserve(host: &Host) {
    let caller = Caller("local".into());
    for number in 0..JOBS {
        let body = uploads::upload_body(&numbered_mole(number));
        let permit = host.submit.permit(&caller, &body).await.unwrap();
        host.blobs.put(&permit.image_key, b"x".to_vec()).await.unwrap();
    }
}
