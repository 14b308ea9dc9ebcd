//! What every implementation of a port must do: one suite, over the embedded adapters and over
//! those on AWS.

// By their paths, as this file itself is included: they would be looked for beside it.
#[path = "ports/callers.rs"]
mod callers;
#[path = "ports/connections.rs"]
mod connections;

use chrono::TimeDelta;
use shared::clock::{Timestamp, from_millis};
use shared::job::{
    AnswerContent, Input, Job, LlmAnswer, NewJob, Photo, Policy, Record, StoredPrompt, Tombstone, Upload, new_id,
};
use shared::ports::{BlobStore, Created, Creation, GetTerms, Idempotency, JobStore};
use uuid::Uuid;

pub use callers::{accounts_suite, callers_suite};
pub use connections::{connections_suite, tickets_suite};

pub fn start() -> Timestamp {
    from_millis(1_700_000_000_000)
}

pub fn new_job(caller: &str, now: Timestamp) -> Job {
    let photo = Photo {
        content_type: "image/png".into(),
        width: 1,
        height: 1,
        orientation: 1,
        size_bytes: 1,
        expires_at: now + TimeDelta::days(7),
    };
    let new = NewJob {
        id: new_id(now),
        caller: caller.into(),
        trace_id: String::new(),
        describe: true,
        idempotency_key: None,
        callback_url: None,
        input: Input::Photo(photo),
    };
    Job::new(new, now, &Policy::default())
}

pub fn new_prompt(caller: &str, now: Timestamp) -> Job {
    let stored = StoredPrompt { size_bytes: 1, expires_at: now + TimeDelta::days(7), connection: None };
    let new = NewJob {
        id: new_id(now),
        caller: caller.into(),
        trace_id: String::new(),
        describe: false,
        idempotency_key: None,
        callback_url: None,
        input: Input::Prompt(stored),
    };
    Job::new(new, now, &Policy::default())
}

pub fn creation(job: &Job, idempotency: Option<&Idempotency>) -> Creation {
    Creation { job: job.clone(), idempotency: idempotency.cloned(), upload: None, max_queued_bytes: u64::MAX }
}

pub async fn job_store_suite(store: impl JobStore) {
    let now = start();
    let policy = Policy::default();
    let job = new_job("alice", now);

    // A job is written once, with its idempotency item.
    let item = Idempotency {
        caller: "alice".into(),
        key: "k".into(),
        fingerprint: "f".into(),
        id: job.id,
        expires_at: now + TimeDelta::hours(24),
    };
    assert_eq!(store.create(creation(&job, Some(&item))).await.unwrap(), Created::New);
    assert_eq!(store.get(job.id).await.unwrap(), Some(Record::Job(job.clone())));
    let rival = new_job("alice", now);
    let rival_item = Idempotency { id: rival.id, ..item.clone() };
    assert_eq!(store.create(creation(&rival, Some(&rival_item))).await.unwrap(), Created::KeyTaken(item.clone()));
    assert_eq!(store.get(rival.id).await.unwrap(), None, "the job of a taken key is not written");

    // A key belongs to its caller and expires.
    assert_eq!(store.idempotency("alice", "k", now).await.unwrap(), Some(item.clone()));
    assert_eq!(store.idempotency("bob", "k", now).await.unwrap(), None);
    let later = now + TimeDelta::hours(25);
    assert_eq!(store.idempotency("alice", "k", later).await.unwrap(), None);
    let second = new_job("alice", later);
    let second_item = Idempotency { id: second.id, expires_at: later + TimeDelta::hours(24), ..item };
    assert_eq!(store.create(creation(&second, Some(&second_item))).await.unwrap(), Created::New);

    // A write happens once: the record that it replaces must still stand.
    let claimed = job.claim_inference(now, now + policy.lease, &policy).unwrap();
    let after = Record::Job(claimed.clone());
    assert!(store.replace(job.fence(), &after).await.unwrap());
    assert!(!store.replace(job.fence(), &after).await.unwrap());
    assert_eq!(store.get(job.id).await.unwrap(), Some(after));
    let mut wrong_claim = claimed.fence();
    wrong_claim.claim += 1;
    assert!(!store.replace(wrong_claim, &Record::Job(claimed.clone())).await.unwrap());
    assert!(!store.replace(new_job("alice", now).fence(), &Record::Job(claimed.clone())).await.unwrap());

    // What is due comes longest due first; a later due time hides it.
    let due = async |now, limit| store.due(now, None, limit).await.unwrap().records;
    let late = now + TimeDelta::hours(26);
    assert_eq!(due(late, 10).await.iter().map(Record::id).collect::<Vec<_>>(), [job.id, second.id]);
    assert_eq!(due(now + policy.lease - TimeDelta::seconds(1), 10).await, []);
    assert_eq!(due(now + policy.lease, 10).await.len(), 1);
    assert_eq!(due(late, 1).await.len(), 1);

    // A delete takes the key with it: the same request may come again.
    let third = Job { idempotency_key: Some("again".into()), ..new_job("carol", now) };
    let third_item = Idempotency {
        caller: "carol".into(),
        key: "again".into(),
        fingerprint: "f".into(),
        id: third.id,
        expires_at: now + TimeDelta::hours(24),
    };
    assert_eq!(store.create(creation(&third, Some(&third_item))).await.unwrap(), Created::New);
    assert!(store.bury(&third, &third.tombstone(now, &policy)).await.unwrap());
    assert_eq!(store.idempotency("carol", "again", now).await.unwrap(), None);

    // A list is its caller's, newest first, without tombstones.
    let ids = |jobs: Vec<Job>| jobs.into_iter().map(|job| job.id).collect::<Vec<Uuid>>();
    assert_eq!(ids(store.list("alice", None, 10).await.unwrap().records), [second.id, job.id]);
    assert_eq!(ids(store.list("alice", Some(second.id), 10).await.unwrap().records), [job.id]);
    let page = store.list("alice", None, 1).await.unwrap();
    assert_eq!((page.next, ids(page.records)), (Some(second.id), vec![second.id]));
    assert_eq!(store.list("alice", None, 2).await.unwrap().next, None);
    assert_eq!(ids(store.list("bob", None, 10).await.unwrap().records), [] as [Uuid; 0]);
    let tombstone = claimed.tombstone(now, &policy);
    assert!(!store.bury(&job, &tombstone).await.unwrap(), "buried by a stale record");
    assert!(store.bury(&claimed, &tombstone).await.unwrap());
    assert_eq!(ids(store.list("alice", None, 10).await.unwrap().records), [second.id]);
    let record = Record::Tombstone(tombstone.clone());
    assert_eq!(store.get(job.id).await.unwrap(), Some(record.clone()));
    assert!(!store.replace(claimed.fence(), &Record::Job(claimed)).await.unwrap());

    // A settled tombstone is due no more.
    assert!(
        store
            .replace(record.fence(), &Record::Tombstone(Tombstone { due_at: None, version: 9, ..tombstone }))
            .await
            .unwrap()
    );
    assert_eq!(due(late, 10).await.len(), 2);
    a_key_that_was_used_again_stays_with_its_job(&store).await;
}

/// A delete takes the key of its own job alone.
async fn a_key_that_was_used_again_stays_with_its_job(store: &impl JobStore) {
    let policy = Policy::default();
    let make = async |key: &str, now: Timestamp| {
        let job = Job { idempotency_key: Some(key.into()), ..new_job("dora", now) };
        let expires_at = now + TimeDelta::hours(24);
        let [caller, key, fingerprint] = ["dora", key, "f"].map(String::from);
        let item = Idempotency { caller, key, fingerprint, id: job.id, expires_at };
        assert_eq!(store.create(creation(&job, Some(&item))).await.unwrap(), Created::New);
        (job, item)
    };
    let later = start() + TimeDelta::hours(25);
    let ((first, _), (_, item)) = (make("twice", start()).await, make("twice", later).await);
    assert!(store.bury(&first, &first.tombstone(later, &policy)).await.unwrap());
    assert_eq!(store.idempotency("dora", "twice", later).await.unwrap(), Some(item));
    // Its own goes also when its time is over: it holds the photo's digest.
    let (job, _) = make("once", start()).await;
    assert!(store.bury(&job, &job.tombstone(later, &policy)).await.unwrap());
    assert_eq!(store.idempotency("dora", "once", start()).await.unwrap(), None);
}

/// What is due and what is listed, page by page, around records that `spoil` makes unreadable.
pub async fn unreadable_suite(store: impl JobStore, spoil: impl AsyncFn(Uuid)) {
    let (now, policy) = (start(), Policy::default());
    let make = async |now: Timestamp| {
        let job = new_job("alice", now);
        assert_eq!(store.create(creation(&job, None)).await.unwrap(), Created::New);
        job.id
    };
    let mut ids = vec![make(now - TimeDelta::seconds(1)).await];
    for _ in 0..120 {
        spoil(make(now).await).await;
    }
    for second in 1..=25 {
        ids.push(make(now + TimeDelta::seconds(second)).await);
    }

    let later = now + TimeDelta::hours(1);
    let (mut found, mut after, mut pages) = (Vec::new(), None, 0);
    loop {
        let due = store.due(later, after.as_ref(), 10).await.unwrap();
        assert!(due.records.len() <= 10);
        for job in due.records.into_iter().filter_map(Record::into_job) {
            // As sweep does: the record that the page ends with is due no more, or due elsewhere.
            let (swept, _) = job.sweep(later, &policy, |_| panic!("no description is due")).unwrap();
            assert!(store.replace(job.fence(), &Record::Job(swept)).await.unwrap());
            found.push(job.id);
        }
        pages += 1;
        assert!(pages < 100, "it goes round in circles");
        after = due.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(found, ids, "each once, in their order");
    assert!(pages >= 14, "146 were due, and {pages} pages of ten were read");
    // From the start again: those that cannot be read, and nothing else.
    assert!(store.due(later, None, 1000).await.unwrap().records.is_empty());

    let (mut listed, mut before, mut pages) = (Vec::new(), None, 0);
    loop {
        let page = store.list("alice", before, 10).await.unwrap();
        listed.extend(page.records.into_iter().map(|job| job.id));
        pages += 1;
        assert!(pages < 100, "it goes round in circles");
        before = page.next;
        if before.is_none() {
            break;
        }
    }
    listed.reverse();
    assert_eq!((listed, pages), (ids, 15), "each once, in their order");
}

/// Prompts and their answers, some of which are as large as a record may be.
pub async fn prompts_suite(store: impl JobStore) {
    let (now, policy) = (start(), Policy::default());
    let mut ids = Vec::new();
    for number in 0..6 {
        let job = new_prompt("alice", now + TimeDelta::seconds(number));
        assert_eq!(store.create(creation(&job, None)).await.unwrap(), Created::New);
        let due = store.due(job.due_at.unwrap(), None, 10).await.unwrap().records;
        assert_eq!(due, [Record::Job(job.clone())], "it is due from the start");
        let claimed = job.claim_enrichment(now, now + policy.prompt_lease, &policy).unwrap();
        assert!(store.replace(job.fence(), &Record::Job(claimed.clone())).await.unwrap());
        // With its quotation marks the longest that is kept in a record.
        let text = "x".repeat(256 * 1024 - 2);
        let content = AnswerContent::of(&text, job.id, claimed.claim);
        assert_eq!(content, AnswerContent::Text(text));
        let (finish_reason, prompt_tokens, completion_tokens) = (Some("stop".into()), Some(1), None);
        let answer =
            LlmAnswer { content, finish_reason, prompt_tokens, completion_tokens, latency_ms: 1, cost_usd: Some(0.1) };
        let done = claimed.finish_answer(claimed.claim, answer, now, &policy).unwrap();
        assert!(store.replace(claimed.fence(), &Record::Job(done.clone())).await.unwrap());
        assert_eq!(store.get(job.id).await.unwrap(), Some(Record::Job(done)));
        ids.insert(0, job.id);
    }
    let listed = async |before, limit| -> Vec<Uuid> {
        store.list("alice", before, limit).await.unwrap().records.into_iter().map(|job| job.id).collect()
    };
    assert_eq!(listed(None, 10).await, ids, "more than a megabyte is listed whole");
    assert_eq!(listed(None, 5).await, ids[..5]);
    assert_eq!(listed(Some(ids[4]), 10).await, ids[5..]);
}

/// What a caller has queued grows and shrinks with the records, in their own transactions.
pub async fn queued_bytes_suite(store: impl JobStore) {
    let (now, policy) = (start(), Policy::default());
    let job_of = |size_bytes: u64| {
        let job = new_job("alice", now);
        let Input::Photo(photo) = job.input.clone() else { panic!() };
        Job { input: Input::Photo(Photo { size_bytes, ..photo }), ..job }
    };
    let limited = |job: &Job, upload: Option<&Upload>| Creation {
        upload: upload.cloned(),
        max_queued_bytes: 100,
        ..creation(job, None)
    };
    let upload_of = |caller: &str, size: u64| {
        let id = new_id(now);
        Upload::new(id, caller.into(), format!("incoming/x/{id}/photo"), size, now + TimeDelta::hours(1))
    };
    // Room left, by asking for it and giving it back.
    let has_room = async |bytes: u64| {
        let probe = upload_of("alice", bytes);
        let granted = store.reserve(&probe, 100).await.unwrap();
        if granted {
            let fence = Record::Upload(probe.clone()).fence();
            assert!(store.replace(fence, &Record::Upload(probe.erased(now))).await.unwrap());
        }
        granted
    };

    let first = job_of(60);
    assert_eq!(store.create(limited(&first, None)).await.unwrap(), Created::New);
    let second = job_of(41);
    assert_eq!(store.create(limited(&second, None)).await.unwrap(), Created::QueueFull);
    assert_eq!(store.get(second.id).await.unwrap(), None, "what is refused is not written");
    assert!(has_room(40).await && !has_room(41).await);
    assert!(store.reserve(&upload_of("bob", 100), 100).await.unwrap(), "another caller has a queue of its own");

    // An open job counts until its end; a refused write changes nothing.
    let claimed = first.claim_inference(now, now + policy.lease, &policy).unwrap();
    assert!(store.replace(first.fence(), &Record::Job(claimed.clone())).await.unwrap());
    assert!(!has_room(41).await);
    let quality = shared::job::Quality { accepted: false, reasons: Vec::new(), measures: Default::default() };
    let outcome = shared::job::InferenceOutcome::Retake { quality };
    let ended = claimed.finish_inference(claimed.claim, outcome, now, &policy).unwrap();
    assert!(!store.replace(first.fence(), &Record::Job(ended.clone())).await.unwrap());
    assert!(!has_room(41).await);
    assert!(store.replace(claimed.fence(), &Record::Job(ended.clone())).await.unwrap());
    assert!(has_room(100).await);

    // A delete gives back what was still open, and only that.
    assert!(store.bury(&ended, &ended.tombstone(now, &policy)).await.unwrap());
    let third = job_of(100);
    assert_eq!(store.create(limited(&third, None)).await.unwrap(), Created::New);
    assert!(!has_room(1).await);
    assert!(store.bury(&third, &third.tombstone(now, &policy)).await.unwrap());
    assert!(has_room(100).await);

    // An upload keeps its room, is used up by one job, and falls due when it is not.
    let upload = upload_of("alice", 90);
    assert!(store.reserve(&upload, 100).await.unwrap());
    assert!(!has_room(11).await);
    let due = store.due(upload.due_at.unwrap(), None, 100).await.unwrap().records;
    assert!(due.contains(&Record::Upload(upload.clone())));
    let fourth = job_of(80);
    assert_eq!(store.create(limited(&fourth, Some(&upload))).await.unwrap(), Created::New);
    assert!(has_room(20).await && !has_room(21).await);
    let Some(Record::Upload(used)) = store.get(upload.id).await.unwrap() else { panic!("the upload is still known") };
    assert_eq!((used.used, used.due_at), (true, Some(now)));
    let fifth = job_of(1);
    assert_eq!(store.create(limited(&fifth, Some(&upload))).await.unwrap(), Created::UploadTaken);
    assert_eq!(store.get(fifth.id).await.unwrap(), None);
    assert!(
        store.list("alice", None, 10).await.unwrap().records.iter().all(|job| job.id == fourth.id),
        "uploads are no jobs"
    );
}

pub async fn blob_store_suite(store: &impl BlobStore) {
    assert_eq!(store.get("jobs/a/photo").await.unwrap(), None);
    store.put("jobs/a/photo", b"one".to_vec()).await.unwrap();
    store.put("jobs/a/photo", b"two".to_vec()).await.unwrap();
    store.put("jobs/b/photo", Vec::new()).await.unwrap();
    store.put("models/x/manifest.json", b"{}".to_vec()).await.unwrap();
    assert_eq!(store.get("jobs/a/photo").await.unwrap().as_deref(), Some(b"two".as_slice()));
    assert_eq!(store.get("jobs/b/photo").await.unwrap().as_deref(), Some(b"".as_slice()));
    assert_eq!(store.list("jobs/", None, 10).await.unwrap(), ["a", "b"]);
    assert_eq!(store.list("jobs/", Some("a"), 10).await.unwrap(), ["b"]);
    assert_eq!(store.list("jobs/", None, 1).await.unwrap(), ["a"]);
    assert_eq!(store.list("none/", None, 10).await.unwrap(), [] as [&str; 0]);
    store.delete_prefix("jobs/a/").await.unwrap();
    store.delete_prefix("jobs/a/").await.unwrap();
    assert_eq!(store.get("jobs/a/photo").await.unwrap(), None);
    assert_eq!(store.list("jobs/", None, 10).await.unwrap(), ["b"]);
}

/// Signed links, to be resolved against `base`. (What S3 makes of one without a signature its bucket's policy says;
/// the emulator asks no policy.)
pub async fn presigned_get_suite(store: &impl BlobStore, base: &str, now: Timestamp) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let get = async |url: &str| {
        let url = reqwest::Url::parse(base).unwrap().join(url).unwrap();
        let answer = http.get(url).send().await.unwrap();
        let content_type = answer.headers().get("content-type").map(|value| value.to_str().unwrap().to_owned());
        (answer.status().as_u16(), content_type, answer.bytes().await.unwrap())
    };
    let terms = GetTerms { content_type: "image/png".into(), expires_at: now + TimeDelta::minutes(15) };
    let url = store.presign_get("jobs/linked/map-1", &terms).await.unwrap();
    assert_eq!(get(&url).await.0, 404, "nothing is there yet");
    store.put("jobs/linked/map-1", b"a picture".to_vec()).await.unwrap();
    store.put("jobs/linked/photo", b"a photo".to_vec()).await.unwrap();
    let (status, content_type, body) = get(&url).await;
    assert_eq!((status, content_type.as_deref(), &body[..]), (200, Some("image/png"), &b"a picture"[..]));

    let altered = [
        ("another blob", url.replace("map-1", "photo")),
        ("another type", url.replace("image", "audio")),
        ("a later end", url.replace("xpires=", "xpires=9")),
        ("another signature", url.replace("ignature=", "ignature=0")),
    ];
    for (what, altered) in &altered {
        assert_ne!(*altered, url, "{what}");
        let (status, _, body) = get(altered).await;
        assert!((400..500).contains(&status), "{what}: {status}");
        assert!(!body.windows(7).any(|window| window == b"a photo"), "{what}");
    }

    store.delete_prefix("jobs/linked/").await.unwrap();
    assert_eq!(get(&url).await.0, 404, "a deleted blob is gone, whoever holds a link");
}
