//! The embedded adapters against the contract of their ports, and what only they do.

use chrono::TimeDelta;
use shared::clock::Clock;
use shared::embedded::{DirBlobStore, Hub, SqliteCallers, SqliteJobQueue, SqliteJobStore, Work, downloads};
use shared::job::{Policy, Record};
use shared::message::Message;
use shared::ports::{BlobStore, GetTerms, JobQueue, JobStore};
use uuid::Uuid;

use crate::ports::{
    accounts_suite, blob_store_suite, callers_suite, connections_suite, creation, job_store_suite, new_job,
    presigned_get_suite, prompts_suite, queued_bytes_suite, start, tickets_suite, unreadable_suite,
};
use crate::support::client;

#[tokio::test]
async fn the_job_store_keeps_its_contract() {
    let folder = tempfile::tempdir().unwrap();
    job_store_suite(SqliteJobStore::open(&folder.path().join("jobs.sqlite")).unwrap()).await;
    prompts_suite(SqliteJobStore::open(&folder.path().join("prompts.sqlite")).unwrap()).await;
    queued_bytes_suite(SqliteJobStore::open(&folder.path().join("queued.sqlite")).unwrap()).await;
}

#[tokio::test]
async fn records_that_cannot_be_read_hide_no_others() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("jobs.sqlite");
    let store = SqliteJobStore::open(&path).unwrap();
    let file = rusqlite::Connection::open(&path).unwrap();
    let spoil = async |id: Uuid| {
        assert_eq!(file.execute("UPDATE jobs SET record = '{}' WHERE id = ?1", [id.to_string()]).unwrap(), 1);
    };
    unreadable_suite(store, spoil).await;
}

#[tokio::test]
async fn the_hub_keeps_the_contract_of_connections() {
    connections_suite(&Hub::default()).await;
    tickets_suite(&Hub::default()).await;
}

#[tokio::test]
async fn the_blob_store_keeps_its_contract() {
    let folder = tempfile::tempdir().unwrap();
    blob_store_suite(&DirBlobStore::open(folder.path(), b"secret").unwrap()).await;
}

#[tokio::test]
async fn a_link_gives_one_blob_until_it_expires() {
    let folder = tempfile::tempdir().unwrap();
    let store = DirBlobStore::open(folder.path(), b"secret").unwrap();
    let clock = Clock::manual(start());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    let router = downloads::router(store.clone(), clock.clone());
    tokio::spawn(async move { axum::serve(listener, router).await });
    presigned_get_suite(&store, &base, clock.now()).await;

    store.put("jobs/a/map-1", b"a picture".to_vec()).await.unwrap();
    let terms = GetTerms { content_type: "image/png".into(), expires_at: start() + TimeDelta::minutes(15) };
    let url = format!("{base}{}", store.presign_get("jobs/a/map-1", &terms).await.unwrap());
    let strangers = DirBlobStore::open(&folder.path().join("stranger"), b"another").unwrap();
    let strangers = format!("{base}{}", strangers.presign_get("jobs/a/map-1", &terms).await.unwrap());
    let http = client();
    let status = async |url: &str| http.get(url).send().await.unwrap().status().as_u16();
    assert_eq!((status(&url).await, status(&strangers).await), (200, 403));
    let unsigned = &url[..url.rfind("ignature=").unwrap() - 2];
    assert!((400..500).contains(&status(unsigned).await), "{unsigned}");
    clock.advance(TimeDelta::minutes(15));
    assert_eq!(status(&url).await, 403);
}

#[tokio::test]
async fn expiry_takes_old_blobs_with_their_folders_and_leaves_a_folder_that_awaits_its_first() {
    let folder = tempfile::tempdir().unwrap();
    let store = DirBlobStore::open(folder.path(), b"secret").unwrap();
    store.put("jobs/old/photo", b"x".to_vec()).await.unwrap();
    let limit = std::time::SystemTime::now();
    std::thread::sleep(std::time::Duration::from_millis(20));
    std::fs::create_dir(folder.path().join("jobs/young")).unwrap();
    assert_eq!(store.remove_older("jobs/", limit).await.unwrap(), 1);
    assert_eq!(store.list("jobs/", None, 10).await.unwrap(), ["young"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_succeeds_while_a_worker_writes_below_the_same_prefix() {
    let folder = tempfile::tempdir().unwrap();
    let store = DirBlobStore::open(folder.path(), b"secret").unwrap();
    let writes = (0..4).map(|writer| {
        let store = store.clone();
        tokio::spawn(async move {
            for number in 0..200 {
                // May fail where its folder goes at that moment: the worker tries again, or finds the job deleted.
                let _ = store.put(&format!("jobs/raced/{writer}-{number}"), b"x".to_vec()).await;
            }
        })
    });
    let writes: Vec<_> = writes.collect();
    while writes.iter().any(|write| !write.is_finished()) {
        store.delete_prefix("jobs/raced/").await.unwrap();
    }
    store.delete_prefix("jobs/raced/").await.unwrap();
    assert_eq!(store.list("jobs/", None, 10).await.unwrap(), [] as [&str; 0]);
}

#[tokio::test]
async fn a_blob_key_cannot_leave_the_store() {
    let folder = tempfile::tempdir().unwrap();
    let store = DirBlobStore::open(&folder.path().join("blobs"), b"secret").unwrap();
    for key in ["../x", "jobs/../../x", "/etc/passwd", "jobs/./x", ".incoming/x"] {
        assert!(store.put(key, Vec::new()).await.is_err(), "{key}");
        assert!(store.get(key).await.is_err(), "{key}");
    }
}

#[tokio::test]
async fn the_queue_hides_redelivers_and_buries() {
    let folder = tempfile::tempdir().unwrap();
    let clock = Clock::manual(start());
    let queue = SqliteJobQueue::open(&folder.path().join("queue.sqlite"), clock.clone(), 3).unwrap();
    let visibility = TimeDelta::seconds(30);
    let message = Message::Infer { id: Uuid::from_u128(1) };
    queue.send(message).await.unwrap();

    // A received message is hidden, and comes back with another receipt.
    let first = queue.receive(visibility).await.unwrap().unwrap();
    assert_eq!((Message::decode(&first.body).unwrap(), first.receive_count), (message, 1));
    assert_eq!(queue.receive(visibility).await.unwrap(), None);
    clock.advance(visibility);
    let second = queue.receive(visibility).await.unwrap().unwrap();
    assert_eq!(second.receive_count, 2);
    assert_ne!(second.receipt, first.receipt);

    // An old receipt does nothing; the visibility can be changed.
    queue.acknowledge(&first.receipt).await.unwrap();
    assert_eq!(queue.depth().await.unwrap(), (1, 0));
    queue.set_visibility(&second.receipt, 5).await.unwrap();
    clock.advance(TimeDelta::seconds(5));
    let third = queue.receive(visibility).await.unwrap().unwrap();
    assert_eq!(third.receive_count, 3);

    // Received too often: a dead letter.
    clock.advance(visibility);
    assert_eq!(queue.receive(visibility).await.unwrap(), None);
    assert_eq!(queue.depth().await.unwrap(), (0, 1));

    // Dead letters are shown with their history.
    let dead = queue.dead_letters(10).await.unwrap();
    assert_eq!((dead.len(), Message::decode(&dead[0].body).unwrap(), dead[0].receive_count), (1, message, 3));
    assert_eq!((dead[0].sent_at, dead[0].given_up_at), (start(), Some(clock.now())));
    assert_eq!(queue.dead_letters(0).await.unwrap(), []);

    // Those named go back with a fresh count, or all; others are passed by.
    assert_eq!(queue.redrive_dead_letters(Some(&["x".to_owned()])).await.unwrap(), 0);
    assert_eq!(queue.redrive_dead_letters(Some(&[])).await.unwrap(), 0);
    assert_eq!(queue.depth().await.unwrap(), (0, 1));
    for ids in [Some(vec![dead[0].id.clone(), "x".to_owned()]), None] {
        assert_eq!(queue.redrive_dead_letters(ids.as_deref()).await.unwrap(), 1);
        assert_eq!(queue.redrive_dead_letters(ids.as_deref()).await.unwrap(), 0);
        assert_eq!(queue.depth().await.unwrap(), (1, 0));
        for count in 1..=3 {
            let again = queue.receive(visibility).await.unwrap().unwrap();
            assert_eq!((Message::decode(&again.body).unwrap(), again.receive_count), (message, count));
            clock.advance(visibility);
        }
        assert_eq!(queue.receive(visibility).await.unwrap(), None);
        assert_eq!(queue.depth().await.unwrap(), (0, 1));
    }

    // An acknowledged message is gone.
    queue.send(message).await.unwrap();
    let last = queue.receive(visibility).await.unwrap().unwrap();
    queue.acknowledge(&last.receipt).await.unwrap();
    assert_eq!(queue.depth().await.unwrap(), (0, 1));
}

#[tokio::test]
async fn the_feed_shows_each_mark_until_it_is_worked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("jobs.sqlite");
    let store = SqliteJobStore::open(&path).unwrap();
    let (now, policy) = (start(), Policy::default());
    let mut waiting = Vec::new();
    for _ in 0..3 {
        let job = new_job("alice", now);
        store.create(creation(&job, None)).await.unwrap();
        let claimed = job.claim_inference(now, now + policy.lease, &policy).unwrap();
        let mut marked = claimed.sweep(now + policy.lease, &policy, |_| unreachable!()).unwrap().0;
        marked.dispatch = Some(shared::job::Dispatch::Enrichment);
        store.replace(job.fence(), &Record::Job(claimed.clone())).await.unwrap();
        store.replace(claimed.fence(), &Record::Job(marked)).await.unwrap();
        waiting.push(job.id);
    }
    let behind = async |store: &SqliteJobStore, read_to| {
        let changes = store.changes_behind(Work::Description, read_to, 2).await.unwrap();
        changes.into_iter().map(|change| (change.seq, change.id)).collect::<Vec<_>>()
    };
    let first = behind(&store, 0).await;
    assert_eq!(first.iter().map(|(_, id)| *id).collect::<Vec<_>>(), waiting[..2]);
    assert_eq!(behind(&store, 0).await, first, "what was not worked is shown again");
    let third = behind(&store, first[1].0).await;
    assert_eq!(third.iter().map(|(_, id)| *id).collect::<Vec<_>>(), waiting[2..]);
    // Out of order: what is worked is gone, whatever is before it.
    store.worked(vec![first[1].0]).await.unwrap();
    drop(store);
    let store = SqliteJobStore::open(&path).unwrap();
    assert_eq!(behind(&store, 0).await, [first[0], third[0]]);
    store.worked(vec![first[0].0, third[0].0]).await.unwrap();
    store.worked(vec![first[0].0]).await.unwrap();
    assert_eq!(behind(&store, 0).await, []);
    assert_eq!(store.changes_behind(Work::Prompt, 0, 2).await.unwrap(), []);
}

#[tokio::test]
async fn the_key_store_keeps_its_contract() {
    let folder = tempfile::tempdir().unwrap();
    callers_suite(SqliteCallers::open(&folder.path().join("callers.sqlite")).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_holds_for_many_meters_at_once() {
    let folder = tempfile::tempdir().unwrap();
    accounts_suite(SqliteCallers::open(&folder.path().join("callers.sqlite")).unwrap()).await;
}
