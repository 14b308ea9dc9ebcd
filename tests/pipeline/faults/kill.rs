//! SIGKILL at every point between two writes with 500 jobs around it.
//!
//! For every point a folder of 500 jobs of its own: filled once, copied per point. The host is
//! killed when it meets the point for the 200th time and, started again, for the 100th time more, so
//! that both kills fall into the middle of the work and 200 jobs are left for the third start, which
//! is let finish. (`kill.rs` beside this folder kills at the first time, with one job.) What a lease
//! or a wait would cost in time is taken off the records while the host is down: leases are as long
//! as they are by default, so that a slow machine loses none.

mod clients;
mod folders;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use chrono::{TimeDelta, Utc};
use futures_util::StreamExt;
use reqwest::Client;
use shared::crash::Point;
use shared::job::{Attempts, DeliveryOutcome, Job, Status, new_id};
use tempfile::TempDir;
use uuid::Uuid;

use self::clients::{ask_all, delete_all, redrive_all, redrive_letters, submit_all, submit_all_told, upload_all};
use self::folders::Folders;
use crate::kill::{
    ADMIN_DEAD_LETTERS, ADMIN_JOB, ADMIN_KEYS, AWS_ALONE, CHAT, ENRICHMENT, ENRICHMENT_OFFLINE, ENRICHMENT_RETRY,
    FIRST, HOUSEKEEPING, INFERENCE, INFERENCE_MAP, INFERENCE_RETRY, PROMPT, RESULT, SOCKET, START, SUBMIT,
    SUBMIT_PROMPT, SWEEP, SWEEP_ORPHAN, SWEEP_TOMBSTONE, SWEEP_UPLOAD, UPLOAD, WEBHOOK, WEBHOOK_LAST, WEBHOOK_RETRY,
    WEBHOOK_SWEPT, WEBHOOK_UNREADABLE, long_answer,
};
use crate::support::backlog::{self, JOBS, PATIENCE, Whose};
use crate::support::llm_server::{Behaviour, LlmServer};
use crate::support::process::Process;
use crate::support::receiver::Receiver;
use crate::support::{client, report, within};
use crate::webhooks::variables;

/// The two kills of a scene: where, and how often the point is met before.
fn kills(kind: Kind, point: Point) -> [(Point, u32); 2] {
    match (kind, point) {
        // A start takes up what the kill before it cut off, a few jobs.
        (Kind::CutOff, _) => [(Point::InferenceClaimed, 200), (point, 1)],
        // All are moved at once.
        (Kind::Dead, _) => [(point, 1), (point, 1)],
        // A batch meets it once for up to ten jobs.
        (_, Point::FeedBeforeRemoval) => [(point, 20), (point, 10)],
        _ => [(point, 200), (point, 100)],
    }
}
/// Scenes at a time: they wait more than they work.
const AT_ONCE: usize = 3;

/// What the 500 jobs are when the host is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Being submitted over HTTP.
    Submitted,
    /// Being uploaded over HTTP, and submitted.
    Uploaded,
    /// Prompts, being submitted over HTTP and answered.
    Asked,
    /// Queued, beside 500 uploads that nobody has submitted in time.
    Reserved,
    /// Being submitted over HTTP, their ends to be told.
    Told,
    /// Accepted and queued.
    Queued,
    /// Queued, their photos out of reach until after the kills.
    Unreadable,
    /// Queued, and there is no LLM.
    Offline,
    /// Read for an LLM that is there no more.
    Read,
    /// Queued, and the LLM refuses until after the kills.
    Refused,
    /// Accepted, their messages lost.
    Lost,
    /// Failed at their deadline, and being redriven over HTTP.
    Failed,
    /// Queued, beside 500 photos without a record.
    Orphaned,
    /// Completed, and being deleted over HTTP.
    Deleted,
    /// Deleted, and due to be erased once more.
    Buried,
    /// Being submitted over HTTP, and who is to be told of their ends refuses until after the kills.
    Snubbed,
    /// Completed, and to be told for the last time; it is refused until after the kills.
    Untold,
    /// Completed and untold for days, their messages lost.
    Overdue,
    /// Queued, and cut off by a kill in the middle of inference.
    CutOff,
    /// Queued, their messages dead letters, and being redriven over HTTP.
    Dead,
}

/// Every point with what its jobs are; a new point of a list of `kill.rs` is met here as well.
const SCENES: &[(Kind, &[Point])] = &[
    (Kind::Submitted, SUBMIT),
    (Kind::Uploaded, UPLOAD),
    (Kind::Told, WEBHOOK),
    (Kind::Reserved, SWEEP_UPLOAD),
    (Kind::Asked, SUBMIT_PROMPT),
    (Kind::Asked, PROMPT),
    (Kind::Failed, ADMIN_JOB),
    (Kind::Queued, INFERENCE),
    (Kind::Queued, INFERENCE_MAP),
    (Kind::Unreadable, INFERENCE_RETRY),
    (Kind::Queued, ENRICHMENT),
    (Kind::Offline, INFERENCE),
    (Kind::Read, ENRICHMENT_OFFLINE),
    (Kind::Refused, ENRICHMENT_RETRY),
    (Kind::Lost, SWEEP),
    (Kind::Orphaned, SWEEP_ORPHAN),
    (Kind::Deleted, RESULT),
    (Kind::Buried, SWEEP_TOMBSTONE),
    (Kind::Snubbed, WEBHOOK_RETRY),
    (Kind::Untold, WEBHOOK_LAST),
    (Kind::Overdue, WEBHOOK_SWEPT),
    (Kind::CutOff, START),
    (Kind::Dead, ADMIN_DEAD_LETTERS),
];
/// Points that no job meets on its way: keys belong to none, nor does a chat, what is no message, or a folder that
/// nobody has used before; what has expired is deleted all at once; a WebSocket's points write no job, but for those of
/// `ask`, which are those of a prompt.
const NOT_ON_A_JOBS_WAY: &[&[Point]] = &[ADMIN_KEYS, CHAT, FIRST, HOUSEKEEPING, SOCKET, WEBHOOK_UNREADABLE, AWS_ALONE];

#[test]
fn every_crash_point_is_met_with_500_jobs_or_is_on_no_jobs_way() {
    let mut met: Vec<_> = SCENES.iter().flat_map(|(_, points)| *points).collect();
    met.extend(NOT_ON_A_JOBS_WAY.iter().copied().flatten());
    let mut all: Vec<_> = Point::ALL.iter().collect();
    met.sort_by_key(|point| point.name());
    met.dedup();
    all.sort_by_key(|point| point.name());
    assert_eq!(met, all);
}

/// The default times.
const UNHURRIED: &[(&str, &str)] =
    &[("LEASE_SECONDS", "120"), ("REDISPATCH_SECONDS", "120"), ("BACKOFF_SECONDS", "5"), ("INFERENCE_WORKERS", "4")];
/// Nobody works while jobs are erased, so that no lease can be lost: it may be short.
const ERASING: &[(&str, &str)] = &[("LEASE_SECONDS", "2"), ("REDISPATCH_SECONDS", "1"), ("BACKOFF_SECONDS", "1")];

async fn ids(data: &Path) -> Vec<Uuid> {
    backlog::jobs(data).await.iter().map(|job| job.id).collect()
}

/// One point's folder, and what happens on it.
struct Scene {
    kind: Kind,
    point: Point,
    folder: TempDir,
    model: PathBuf,
    http: Client,
    llm: LlmServer,
    receiver: Receiver,
    /// The jobs there were when the scene began.
    ids: Vec<Uuid>,
    /// The uploads that have arrived, by the number of their photo: they are not sent again.
    uploaded: Arc<Mutex<BTreeMap<usize, String>>>,
}

impl Scene {
    async fn set(kind: Kind, point: Point, folders: &Folders) -> Self {
        let folder = tempfile::tempdir().unwrap();
        backlog::copy(folders.of(kind), folder.path());
        let ids = match kind {
            Kind::Submitted | Kind::Uploaded | Kind::Asked | Kind::Told | Kind::Snubbed => Vec::new(),
            Kind::Buried => ids(folders.of(Kind::Deleted)).await,
            _ => ids(folder.path()).await,
        };
        let (llm, receiver, uploaded) = (LlmServer::start([]).await, Receiver::start(200).await, Arc::default());
        let model = folders.model();
        let scene = Self { kind, point, folder, model, http: client(), llm, receiver, ids, uploaded };
        let data = scene.folder.path();
        match kind {
            Kind::Unreadable => backlog::photos(data).iter().for_each(hide),
            Kind::Refused => scene.llm.behave(Behaviour::Status(503, Some(600))),
            Kind::Orphaned => (0..JOBS).for_each(|_| orphan(data)),
            Kind::Lost => {
                backlog::lose_messages(data);
                backlog::hurry(data, Whose::Open);
            }
            Kind::Reserved => backlog::hurry(data, Whose::Open),
            Kind::Asked if point == Point::EnrichmentAnswerStored => {
                scene.llm.behave(Behaviour::Answer(long_answer()));
            }
            Kind::Snubbed => scene.receiver.answer(503),
            Kind::Untold => {
                scene.receiver.answer(503);
                backlog::call_back(data, &scene.receiver.url());
            }
            Kind::Overdue => {
                scene.receiver.answer(503);
                backlog::call_back(data, &scene.receiver.url());
                backlog::overdue_deliveries(data);
            }
            Kind::Dead => backlog::bury_messages(data),
            Kind::Asked
            | Kind::Submitted
            | Kind::Uploaded
            | Kind::Told
            | Kind::Queued
            | Kind::CutOff
            | Kind::Offline
            | Kind::Read
            | Kind::Failed
            | Kind::Deleted
            | Kind::Buried => {}
        }
        scene
    }

    fn data(&self) -> &Path {
        self.folder.path()
    }

    /// Its descriptions are the template's.
    fn is_offline(&self) -> bool {
        [Kind::Offline, Kind::Read, Kind::Untold, Kind::Overdue].contains(&self.kind)
    }

    fn what(&self) -> String {
        format!("{} with {:?} jobs", self.point.name(), self.kind)
    }

    async fn start(&self, crash_at: Option<&str>) -> Option<Process> {
        let base_url = self.llm.base_url();
        let times = if matches!(self.kind, Kind::Deleted | Kind::Buried) { ERASING } else { UNHURRIED };
        let mut extra = times.to_vec();
        extra.push(("MODEL_DIR", self.model.to_str().unwrap()));
        if !self.is_offline() {
            extra.extend([("LLM_BASE_URL", base_url.as_str()), ("LLM_MODEL", "m")]);
        }
        extra.extend(crash_at.map(|at| ("CRASH_AT", at)));
        let receiver = self.receiver.host();
        extra.extend(variables(&receiver));
        Process::start(self.data(), &extra).await
    }

    /// What clients do meanwhile; `true` where every request was answered.
    async fn requests(&mut self, url: &str) -> bool {
        match self.kind {
            Kind::Submitted => match submit_all(&self.http, url).await {
                Some(ids) => {
                    self.ids = ids;
                    true
                }
                None => false,
            },
            Kind::Told | Kind::Snubbed => match submit_all_told(&self.http, url, &self.receiver).await {
                Some(ids) => {
                    self.ids = ids;
                    true
                }
                None => false,
            },
            Kind::Uploaded => match upload_all(&self.http, url, &self.uploaded).await {
                Some(ids) => {
                    self.ids = ids;
                    true
                }
                None => false,
            },
            Kind::Asked => match ask_all(&self.http, url).await {
                Some(ids) => {
                    self.ids = ids;
                    true
                }
                None => false,
            },
            Kind::Failed => redrive_all(&self.http, url, &self.ids).await,
            Kind::Deleted => delete_all(&self.http, url, &self.ids).await,
            Kind::Dead => redrive_letters(&self.http, url).await,
            _ => true,
        }
    }

    /// Starts the host and lets it die at the point. Returns how the jobs stood then.
    async fn kill(&mut self, point: Point, times: u32) -> BTreeMap<Uuid, (Status, Attempts)> {
        let at = format!("{}:{times}", point.name());
        // What a start does, and sweep behind it, may kill the host before it listens.
        if let Some(mut host) = self.start(Some(&at)).await {
            self.requests(&host.url).await;
            host.killed().await;
        }
        let standing = backlog::standing(self.data()).await;
        let whose = match self.kind {
            // The next start takes them up itself.
            Kind::CutOff => return standing,
            Kind::Queued | Kind::Offline | Kind::Read | Kind::Orphaned => Whose::Leased,
            Kind::Uploaded => Whose::Jobs,
            _ => Whose::Open,
        };
        backlog::hurry(self.data(), whose);
        standing
    }

    /// Starts a host that stays up, until nothing is left to do.
    async fn recover(&mut self) {
        let data = self.data().to_owned();
        if self.kind != Kind::Asked {
            self.llm.behave(Behaviour::After(Duration::ZERO));
        }
        if self.kind == Kind::Unreadable {
            backlog::photos(&data).iter().for_each(show);
        }
        // Before the host starts: one more refusal, and a delivery would wait for longer than the test does.
        self.receiver.answer(200);
        let host = self.start(None).await.unwrap();
        assert!(self.requests(&host.url).await, "{}: a request was not answered", self.what());
        within(PATIENCE, &self.what(), async || backlog::is_quiet(&data)).await;
        if matches!(self.kind, Kind::Untold | Kind::Overdue) {
            // What was given up an operator finds among the dead letters.
            assert!(redrive_letters(&self.http, &host.url).await, "{}: a request was not answered", self.what());
            within(PATIENCE, &self.what(), async || backlog::is_quiet(&data)).await;
        }
        assert!(host.terminate().await.success(), "{}", self.what());
    }

    /// Each job's end was told, under one id; what was killed behind the answer may have been told once more.
    fn all_were_told(&self, jobs: &[Job]) {
        let mut told: BTreeMap<String, usize> = BTreeMap::new();
        for received in self.receiver.received() {
            *told.entry(received.id().to_owned()).or_default() += 1;
        }
        let expected: BTreeMap<_, _> = jobs.iter().map(|job| (format!("msg_{}_{}", job.id, job.seq()), job)).collect();
        assert!(told.keys().eq(expected.keys()), "{}: who was told of what", self.what());
        for job in expected.values() {
            let outcome = job.delivery().and_then(|delivery| delivery.outcome);
            assert_eq!(outcome, Some(DeliveryOutcome::Delivered), "{}: {}", self.what(), job.id);
        }
    }

    /// A prompt was asked for the first time, and again where a kill came before its answer was committed.
    fn none_was_asked_too_often(&self, jobs: &[Job]) {
        let requests = self.llm.requests();
        let prompts: Vec<_> = requests.iter().map(|(_, body)| body["messages"].to_string()).collect();
        for (number, id) in self.ids.iter().enumerate() {
            let asked = prompts.iter().filter(|prompt| prompt.contains(&format!("(key-{number})"))).count();
            let claims = jobs.iter().find(|job| job.id == *id).unwrap().attempts.enrichment as usize;
            assert!((1..=claims).contains(&asked), "{}: {id} asked {asked} times, {claims} claims", self.what());
        }
    }

    async fn play(mut self) -> String {
        let what = self.what();
        let kills = kills(self.kind, self.point);
        let mut standing = BTreeMap::new();
        for (point, times) in kills {
            standing = self.kill(point, times).await;
        }
        self.recover().await;
        let kept = if matches!(self.kind, Kind::Deleted | Kind::Buried) { vec![] } else { self.ids.clone() };
        let jobs = backlog::ended_once(self.data(), kept.clone(), &what).await;
        assert_eq!(self.ids.len(), JOBS, "{what}");
        // What was done before the last kill was not done again, what was not was done once.
        for job in &jobs {
            let Some((status, before)) = standing.get(&job.id) else { continue };
            let unread = u32::from(matches!(status, Status::Pending | Status::Processing | Status::Failed));
            // What is read where there is no LLM is described with it.
            let undescribed = u32::from(*status != Status::Completed && self.kind != Kind::Offline);
            let expected =
                Attempts { inference: before.inference + unread, enrichment: before.enrichment + undescribed };
            assert_eq!(job.attempts, expected, "{what}: {} was {status:?}", job.id);
        }
        if matches!(self.kind, Kind::Told | Kind::Snubbed | Kind::Untold | Kind::Overdue) {
            self.all_were_told(&jobs);
        }
        if self.kind == Kind::Asked {
            self.none_was_asked_too_often(&jobs);
        }
        // Every call is in the ledger; those that a kill cut off may have been made or not.
        let ledger = || jobs.iter().flat_map(|job| &job.llm_calls);
        let cut_off = ledger().filter(|call| call.is_unknown()).count();
        let calls = self.llm.calls();
        let (least, most) = (ledger().count() - cut_off, ledger().count());
        assert!(least >= if self.is_offline() { 0 } else { kept.len() }, "{what}: {least} calls");
        assert!((least..=most).contains(&calls), "{what}: {calls} calls, expected {least} to {most}");
        format!(
            "{:<28} {:<10} {:>4} + {:<4} {:>4} {:>6} {:>8} {:>8}",
            self.point.name(),
            format!("{:?}", self.kind).to_lowercase(),
            kills[0].1,
            kills[1].1,
            JOBS,
            calls,
            cut_off,
            kills.len()
        )
    }
}

/// A folder in the photo's place: the store answers with an error, not with "nothing there".
fn hide(photo: &PathBuf) {
    std::fs::rename(photo, photo.with_extension("away")).unwrap();
    std::fs::create_dir(photo).unwrap();
}

fn show(photo: &PathBuf) {
    std::fs::remove_dir(photo).unwrap();
    std::fs::rename(photo.with_extension("away"), photo).unwrap();
}

fn orphan(data: &Path) {
    let folder = data.join("blobs/jobs").join(new_id(Utc::now() - TimeDelta::hours(3)).to_string());
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("photo"), b"x").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_any_two_writes_harms_none_of_500_jobs() {
    let folders = Folders::fill().await;
    let points = SCENES.iter().flat_map(|(kind, points)| points.iter().map(|point| (*kind, *point)));
    let scenes = points.map(async |(kind, point)| Scene::set(kind, point, &folders).await.play().await);
    let mut rows: Vec<String> = futures_util::stream::iter(scenes).buffer_unordered(AT_ONCE).collect().await;
    rows.sort();
    report(&format!(
        "\n{:<28} {:<10} {:<11} {:>4} {:>6} {:>8} {:>8}",
        "killed at", "jobs are", "  met", "jobs", "calls", "cut off", "restarts"
    ));
    rows.iter().for_each(|row| report(row));
    report(&format!("{} scenes, each with {JOBS} jobs and killed twice\n", rows.len()));
    assert_eq!(rows.len(), SCENES.iter().map(|(_, points)| points.len()).sum::<usize>());
}
