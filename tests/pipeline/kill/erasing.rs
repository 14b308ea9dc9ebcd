//! Deleted jobs, and what sweep finds.

use chrono::{TimeDelta, Utc};
use shared::clock::Clock;
use shared::crash::Point;
use shared::job::{Record, photo_key};
use shared::ports::{BlobStore, JobStore};
use uuid::Uuid;

use super::{HOUSEKEEPING, RESULT, SWEEP, SWEEP_ORPHAN, SWEEP_TOMBSTONE, Scene};
use crate::support::process::Process;
use crate::support::{eventually, open};

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_any_two_writes_of_a_delete_leaves_nothing_behind() {
    for &point in RESULT {
        let scene = Scene::new([]).await;
        let id = scene.one_that_ended().await;
        let mut host = scene.start(Some(point)).await;
        // The order to erase the cache may be worked, and the host killed, after the answer.
        let _ = scene.http.delete(format!("{}/result/{id}", host.url)).send().await;
        host.killed().await;
        assert_erased(&scene, &id, point).await;
    }
    println!("result: killed at {} points", RESULT.len());
}

/// Waits until sweep has erased a deleted job for good.
async fn assert_erased(scene: &Scene, id: &str, point: Point) {
    let host = scene.start(None).await;
    let gone = scene.http.get(format!("{}/result/{id}", host.url)).send().await.unwrap();
    assert_eq!(gone.status().as_u16(), 404, "{}", point.name());
    eventually(&format!("{}: the tombstone is settled", point.name()), async || {
        let jobs = rusqlite::Connection::open(scene.data().join("jobs.sqlite")).unwrap();
        jobs.query_row("SELECT count(*) FROM jobs WHERE due_at IS NOT NULL", [], |row| row.get::<_, u32>(0)).unwrap()
            == 0
    })
    .await;
    scene.settled(host, &[], point).await;
    let host = open(scene.data(), Clock::System, &[]).await;
    let id: Uuid = id.parse().unwrap();
    assert!(matches!(host.store.get(id).await.unwrap(), Some(Record::Tombstone(_))), "{}", point.name());
    assert_eq!(host.blobs.get(&photo_key(id)).await.unwrap(), None, "{}", point.name());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_any_two_writes_of_sweep_loses_and_doubles_nothing() {
    for &point in SWEEP {
        let scene = Scene::new([]).await;
        let mut host = scene.start(Some(Point::SubmitRecordWritten)).await;
        assert!(scene.submit(&host, "key").await.is_err());
        host.killed().await;
        scene.start(Some(point)).await.killed().await;
        scene.recover("key", point).await;
        assert_eq!(scene.llm.calls(), 1, "{}", point.name());
    }
    for &point in SWEEP_TOMBSTONE {
        let scene = Scene::new([]).await;
        let id = scene.one_that_ended().await;
        let mut host = scene.start(Some(point)).await;
        let deleted = scene.http.delete(format!("{}/result/{id}", host.url)).send().await.unwrap();
        assert_eq!(deleted.status().as_u16(), 204);
        host.killed().await;
        assert_erased(&scene, &id, point).await;
    }
    for &point in SWEEP_ORPHAN {
        let scene = Scene::new([]).await;
        let orphan = shared::job::new_id(Utc::now() - TimeDelta::hours(3));
        let folder = scene.data().join("blobs/jobs").join(orphan.to_string());
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("photo"), b"x").unwrap();
        if let Some(mut host) = Process::start(scene.data(), &[("CRASH_AT", point.name())]).await {
            host.killed().await;
        }
        assert!(!folder.exists());
        scene.recover("key", point).await;
    }
    println!("sweep: killed at {} points", SWEEP.len() + SWEEP_TOMBSTONE.len() + SWEEP_ORPHAN.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_any_two_deletes_of_what_has_expired_leaves_the_rest_to_the_next_start() {
    for &point in HOUSEKEEPING {
        let scene = Scene::new([]).await;
        let id = scene.one_that_ended().await;
        let long_ago = Utc::now() - TimeDelta::days(400);
        let jobs = rusqlite::Connection::open(scene.data().join("jobs.sqlite")).unwrap();
        let sql = "UPDATE jobs SET expires_at = ?1 WHERE due_at IS NULL";
        assert_eq!(jobs.execute(sql, [long_ago.timestamp_millis()]).unwrap(), 1);
        drop(jobs);
        let photo = scene.data().join("blobs/jobs").join(&id).join("photo");
        std::fs::File::options().write(true).open(&photo).unwrap().set_modified(long_ago.into()).unwrap();
        // It is done at once; the host may be dead before it listens.
        if let Some(mut host) = scene.start_with(Some(point), &[]).await {
            host.killed().await;
        }
        assert_eq!(photo.exists(), point == Point::HousekeepingRecordsRemoved, "{}", point.name());
        // The next host deletes the rest, and the one job that `settled` finds is that of the other key.
        scene.recover("another key", point).await;
        assert!(!photo.exists(), "{}", point.name());
    }
    println!("housekeeping: killed at {} points", HOUSEKEEPING.len());
}
