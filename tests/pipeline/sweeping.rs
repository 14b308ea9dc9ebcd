//! What sweep gets to, however much lies before it.

use std::path::Path;

use aws_lambda_events::event::eventbridge::EventBridgeEvent;
use chrono::TimeDelta;
use serde_json::json;
use shared::clock::Clock;
use shared::http::Caller;
use shared::job::{Upload, new_id};
use shared::ports::JobStore;
use submit::Submission;
use sweep::{Report, Sweep};
use uuid::Uuid;

use crate::support::interrupt::{Interrupt, Interrupted};
use crate::support::{mole, standing};

/// A job whose message is lost.
pub async fn stuck_job(host: &local::Host) -> Uuid {
    let submission = Submission { image: mole(), describe: true, callback_url: None };
    let id = host.submit.accept(&Caller("local".into()), None, submission).await.unwrap();
    let lost = host.queue.receive(TimeDelta::seconds(1)).await.unwrap().unwrap();
    host.queue.acknowledge(&lost.receipt).await.unwrap();
    id
}

async fn run(host: &local::Host) -> Report {
    host.sweep.handle(EventBridgeEvent::default()).await.unwrap()
}

/// Photos' folders without a record. They are empty, which is all the same to sweep.
fn make_orphans(data: &Path, clock: &Clock, count: usize) {
    let folder = data.join("blobs/jobs");
    std::fs::create_dir_all(&folder).unwrap();
    for _ in 0..count {
        std::fs::create_dir(folder.join(new_id(clock.now()).to_string())).unwrap();
    }
}

fn orphans(data: &Path) -> usize {
    std::fs::read_dir(data.join("blobs/jobs")).unwrap().count()
}

#[tokio::test]
async fn a_job_behind_hundreds_of_records_that_cannot_be_read_is_swept() {
    let (folder, clock, host) = standing(&[]).await;
    let id = stuck_job(&host).await;
    let jobs = rusqlite::Connection::open(folder.path().join("jobs.sqlite")).unwrap();
    let sql = "WITH RECURSIVE numbers (number) AS (SELECT 1 UNION ALL SELECT number + 1 FROM numbers LIMIT 250)
        INSERT INTO jobs (id, caller, version, claim, status, due_at, expires_at, record)
        SELECT printf('00000000-0000-7000-8000-%012d', number), caller, version, claim, status, due_at - 1, expires_at,
            replace(record, '\"pending\"', '\"dancing\"')
        FROM numbers, jobs WHERE id = ?1";
    assert_eq!(jobs.execute(sql, [id.to_string()]).unwrap(), 250);
    clock.advance(TimeDelta::seconds(121));
    assert_eq!(run(&host).await, Report { sent: 1, ..Report::default() });
    assert_eq!(run(&host).await, Report::default());
}

#[tokio::test]
async fn a_job_behind_hundreds_of_records_that_fail_is_swept() {
    let (folder, clock, host) = standing(&[]).await;
    stuck_job(&host).await;
    // A file where a folder should be: nothing below it can be erased.
    let incoming = folder.path().join("blobs/incoming");
    std::fs::create_dir_all(&incoming).unwrap();
    std::fs::write(incoming.join("blocked"), "").unwrap();
    for _ in 0..150 {
        let id = new_id(clock.now());
        let key = format!("incoming/blocked/{id}/photo");
        let upload = Upload::new(id, "local".into(), key, 1, clock.now());
        assert!(host.store.reserve(&upload, 1 << 40).await.unwrap());
    }
    clock.advance(TimeDelta::seconds(121));
    assert_eq!(run(&host).await, Report { sent: 1, failed: 150, ..Report::default() });
    // They are tried again, once a run.
    assert_eq!(run(&host).await, Report { failed: 150, ..Report::default() });
}

#[tokio::test]
async fn more_photos_than_one_run_compares_are_compared_by_the_next() {
    let (folder, clock, host) = standing(&[]).await;
    let data = folder.path();
    make_orphans(data, &clock, 2_050);
    clock.advance(TimeDelta::minutes(61));
    assert_eq!((run(&host).await.orphans, orphans(data)), (2_000, 50));
    assert_eq!((run(&host).await.orphans, orphans(data)), (50, 0));
    // What is made from now on is found as ever.
    make_orphans(data, &clock, 1);
    assert_eq!((run(&host).await.orphans, orphans(data)), (0, 1));
    clock.advance(TimeDelta::minutes(61));
    assert_eq!((run(&host).await.orphans, orphans(data)), (1, 0));
}

/// Makes a job's record one of a later build, perhaps.
fn spoil(data: &Path, id: Uuid) {
    let jobs = rusqlite::Connection::open(data.join("jobs.sqlite")).unwrap();
    let sql = "UPDATE jobs SET record = replace(record, '\"pending\"', '\"dancing\"') WHERE id = ?1";
    assert_eq!(jobs.execute(sql, [id.to_string()]).unwrap(), 1);
}

#[tokio::test]
async fn a_photo_without_a_record_behind_a_record_that_cannot_be_read_is_deleted() {
    let (folder, clock, host) = standing(&[]).await;
    spoil(folder.path(), stuck_job(&host).await);
    clock.advance(TimeDelta::milliseconds(2));
    make_orphans(folder.path(), &clock, 1);
    clock.advance(TimeDelta::minutes(61));
    assert_eq!((run(&host).await.orphans, orphans(folder.path())), (1, 1));
}

#[tokio::test]
async fn a_change_of_a_record_that_cannot_be_read_does_not_come_back() {
    let (folder, _clock, host) = standing(&[]).await;
    let id = stuck_job(&host).await;
    spoil(folder.path(), id);
    let change = json!({
        "Keys": {"id": {"S": id}}, "NewImage": {"dispatch": {"S": "webhook"}}, "SequenceNumber": "1"
    });
    let event = serde_json::from_value(json!({"Records": [{"dynamodb": change}]})).unwrap();
    assert_eq!(host.notify.handle(event).await.batch_item_failures, []);
}

#[tokio::test]
async fn a_run_whose_time_is_over_leaves_the_rest_to_the_next() {
    let (folder, clock, host) = standing(&[]).await;
    let data = folder.path();
    make_orphans(data, &clock, 250);
    clock.advance(TimeDelta::minutes(61));
    let interrupt = Interrupt::default();
    let blobs = Interrupted(host.blobs.clone(), interrupt.clone());
    let queues = [host.queue.clone(), host.queue.clone()];
    let sweep = Sweep::new(host.store.clone(), queues, blobs, clock.clone(), host.config.policy);
    // Before the first page is listed.
    interrupt.arm(0, async move { clock.advance(TimeDelta::seconds(46)) });
    for expected in [(100, 150), (150, 0)] {
        let report = sweep.handle(EventBridgeEvent::default()).await.unwrap();
        assert_eq!((report.orphans, orphans(data)), expected);
    }
}
