//! DynamoDB, S3 and SQS against the contract of the ports, and what only they do.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chat::{Closed, Meter};
use chrono::TimeDelta;
use futures_util::future::join_all;
use serde_json::Value;
use sha2::{Digest, Sha256};
use shared::account::{Ask, Refused, Taken, Used};
use shared::api::admin::KeyLimits;
use shared::aws::{DynamoCallers, DynamoJobStore, S3BlobStore, SqsJobQueue};
use shared::clock::Clock;
use shared::job::{AnswerContent, Dispatch, LlmAnswer, Policy, Record};
use shared::message::Message;
use shared::ports::{BlobStore, Callers, Created, Creation, GetTerms, JobQueue, JobStore, PutTerms};
use uuid::Uuid;

use crate::ports::{
    accounts_suite, blob_store_suite, callers_suite, creation, job_store_suite, new_job, new_prompt,
    presigned_get_suite, prompts_suite, queued_bytes_suite, start, unreadable_suite,
};
use crate::support::{fresh_table, of_stage, sdk};

#[tokio::test]
async fn the_job_store_keeps_its_contract() {
    let sdk = sdk().await;
    job_store_suite(DynamoJobStore::new(&sdk, fresh_table(&sdk, "TABLE_NAME").await)).await;
    prompts_suite(DynamoJobStore::new(&sdk, fresh_table(&sdk, "TABLE_NAME").await)).await;
}

#[tokio::test]
async fn records_that_cannot_be_read_hide_no_others() {
    let sdk = sdk().await;
    let table = fresh_table(&sdk, "TABLE_NAME").await;
    let client = aws_sdk_dynamodb::Client::new(&sdk);
    let text = |value: &str| aws_sdk_dynamodb::types::AttributeValue::S(value.to_owned());
    let spoil = async |id: Uuid| {
        let update = client.update_item().table_name(&table).key("id", text(&id.to_string()));
        let update = update.update_expression("SET #record = :record").expression_attribute_names("#record", "record");
        update.expression_attribute_values(":record", text("{}")).send().await.unwrap();
    };
    unreadable_suite(DynamoJobStore::new(&sdk, table.clone()), spoil).await;
}

#[tokio::test]
async fn the_job_store_counts_what_is_queued() {
    let sdk = sdk().await;
    queued_bytes_suite(DynamoJobStore::new(&sdk, fresh_table(&sdk, "TABLE_NAME").await)).await;
}

#[tokio::test]
async fn the_key_store_keeps_its_contract() {
    let sdk = sdk().await;
    callers_suite(DynamoCallers::new(&sdk, fresh_table(&sdk, "CALLERS_TABLE_NAME").await)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_holds_for_many_functions_at_once() {
    let sdk = sdk().await;
    accounts_suite(DynamoCallers::new(&sdk, fresh_table(&sdk, "CALLERS_TABLE_NAME").await)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_and_budgets_hold_for_many_functions_at_once_but_for_less_than_one_request() {
    let sdk = sdk().await;
    let callers = DynamoCallers::new(&sdk, fresh_table(&sdk, "CALLERS_TABLE_NAME").await);
    let clock = Clock::manual(start());
    // Two at once may take all of either limit. They take less: eight of them leave something, nine do not.
    let ask = Ask { prompt_tokens: 100, completion_tokens: 50, cost_pico: 150 };
    let used = Used::from(Taken { prompt_tokens: 20, completion_tokens: 15, cost_pico: 35 });
    let tokens = KeyLimits { tokens_per_minute: Some(300), ..KeyLimits::default() };
    let budget = KeyLimits { budget_usd_per_month: Some(300e-12), ..KeyLimits::default() };
    for (key, limits) in [("0123456789ab", tokens), ("ba9876543210", budget)] {
        // What functions share is the store alone.
        let function = || Meter::new(callers.clone(), clock.clone());
        let let_in = async |meter: &Meter<DynamoCallers>| match meter.admit(key, &limits, ask).await {
            Ok(admitted) => {
                meter.settle(&admitted, used).await;
                1_u64
            }
            Err(Closed::Limit(refused, _)) => match (refused, limits.tokens_per_minute) {
                (Refused::Tokens(_), Some(_)) | (Refused::Budget(_), None) => 0,
                other => panic!("{other:?}"),
            },
            Err(Closed::Store(error)) => panic!("{}", error.chain()),
        };
        let clients = (0..20).map(async |_| {
            let meter = function();
            let_in(&meter).await + let_in(&meter).await + let_in(&meter).await
        });
        let mut requests: u64 = join_all(clients).await.into_iter().sum();
        // Alone, a client gets as far as the limit goes.
        let alone = function();
        while let_in(&alone).await == 1 {
            requests += 1;
        }
        let account = callers.find_account(key).await.unwrap();
        let month = account.months["2023-11"];
        assert_eq!((requests, month.requests, account.under_way()), (9, 9, 0), "{limits:?}: {month:?}");
        let took = (month.prompt_tokens, month.completion_tokens, month.cost_pico, month.estimated_requests);
        assert_eq!(took, (9 * 20, 9 * 15, 9 * 35, 0), "{limits:?}");
    }
}

#[tokio::test]
async fn the_blob_store_keeps_its_contract() {
    let sdk = sdk().await;
    // Of its own: in the stage's the functions are at work.
    let bucket = format!("of-a-test-{}", Uuid::new_v4());
    let config = aws_sdk_s3::config::Builder::from(&sdk).force_path_style(true).build();
    aws_sdk_s3::Client::from_conf(config).create_bucket().bucket(&bucket).send().await.unwrap();
    let store = S3BlobStore::new(&sdk, bucket, true, Clock::System);
    blob_store_suite(&store).await;
    presigned_get_suite(&store, "http://unused.invalid", Clock::System.now()).await;
    // More than one request fetches.
    for size in [0, 1, 8 << 20, (8 << 20) + 1, 25 << 20] {
        let bytes: Vec<u8> = (0..size).map(|place: usize| (place % 251) as u8).collect();
        store.put("jobs/large/photo", bytes.clone()).await.unwrap();
        assert!(store.get("jobs/large/photo").await.unwrap() == Some(bytes), "{size} bytes");
    }
    // More than one request deletes.
    for number in 0..1_005 {
        store.put(&format!("jobs/many/{number}"), Vec::new()).await.unwrap();
    }
    store.delete_prefix("jobs/many/").await.unwrap();
    assert!(!store.list("jobs/", None, 10).await.unwrap().contains(&"many".to_owned()));
}

/// Fifty submits at once meet on the caller's counter; none may be lost or counted twice.
#[tokio::test(flavor = "multi_thread")]
async fn transactions_that_meet_are_tried_again() {
    let sdk = sdk().await;
    let store = DynamoJobStore::new(&sdk, fresh_table(&sdk, "TABLE_NAME").await);
    let create = |_| {
        let job = new_job("alice", start());
        let creation = Creation { max_queued_bytes: 30, ..creation(&job, None) };
        async { store.create(creation).await.unwrap() }
    };
    let created = join_all((0..50).map(create)).await;
    let new = created.iter().filter(|created| **created == Created::New).count();
    assert_eq!(new, 30, "each counts one byte");
    assert_eq!(store.list("alice", None, 100).await.unwrap().records.len(), 30);
    // Twenty workers claim each job at the same moment: one wins.
    let policy = Policy::default();
    for job in store.list("alice", None, 3).await.unwrap().records {
        let claimed = Record::Job(job.claim_inference(start(), start() + policy.lease, &policy).unwrap());
        let wins = join_all((0..20).map(|_| store.replace(job.fence(), &claimed))).await;
        assert_eq!(wins.into_iter().filter(|won| *won.as_ref().unwrap()).count(), 1);
    }
}

#[tokio::test]
async fn a_presigned_put_takes_what_was_signed_and_nothing_else() {
    let sdk = sdk().await;
    let store = S3BlobStore::new(&sdk, of_stage("BUCKET"), true, Clock::System);
    let _ = rustls::crypto::ring::default_provider().install_default();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let body = b"exactly these bytes".to_vec();
    let key = format!("incoming/a/{}/photo", Uuid::new_v4());
    let terms = PutTerms {
        content_type: "image/jpeg".into(),
        size_bytes: body.len() as u64,
        checksum_sha256: STANDARD.encode(Sha256::digest(&body)),
        expires_at: Clock::System.now() + TimeDelta::minutes(15),
    };
    let signed = store.presign_put(&key, &terms).await.unwrap();
    assert!(signed.url.contains("content-length"), "the length is signed: {:?}", signed.headers);
    let names = signed.headers.keys().map(String::as_str).collect::<std::collections::BTreeSet<_>>();
    assert_eq!(
        names.into_iter().collect::<Vec<_>>(),
        ["content-type", "x-amz-checksum-sha256"],
        "the bucket's CORS lets pages send these"
    );
    let send = async |url: &str, content_type: &str, body: &[u8]| {
        let request = signed.headers.iter().fold(http.put(url).body(body.to_vec()), |request, (name, value)| {
            request.header(name, if name == "content-type" { content_type } else { value })
        });
        request.send().await.unwrap().status().as_u16()
    };
    let elsewhere = signed.url.replace("incoming/a/", "incoming/c/");
    assert_eq!(send(&signed.url, "image/png", &body).await, 403, "another type");
    assert_eq!(send(&signed.url, "image/jpeg", b"exactly").await, 403, "fewer bytes");
    assert_eq!(send(&elsewhere, "image/jpeg", &body).await, 403, "another key");
    assert_eq!(store.get(&key).await.unwrap(), None);
    assert_eq!(send(&signed.url, "image/jpeg", &body).await, 200);
    assert_eq!(store.get(&key).await.unwrap(), Some(body));
}

#[tokio::test]
async fn a_presigned_put_ends_when_it_was_said_to() {
    let store = S3BlobStore::new(&sdk().await, of_stage("BUCKET"), true, Clock::System);
    let _ = rustls::crypto::ring::default_provider().install_default();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let terms = PutTerms {
        content_type: "image/jpeg".into(),
        size_bytes: 1,
        checksum_sha256: STANDARD.encode(Sha256::digest(b"x")),
        expires_at: Clock::System.now() + TimeDelta::milliseconds(1500),
    };
    let key = format!("incoming/a/{}/photo", Uuid::new_v4());
    let signed = store.presign_put(&key, &terms).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    let put = signed.headers.iter().fold(http.put(&signed.url).body("x"), |put, (name, value)| put.header(name, value));
    assert_eq!(put.send().await.unwrap().status().as_u16(), 403);
    assert_eq!(store.get(&key).await.unwrap(), None);
}

#[tokio::test]
async fn a_presigned_get_ends_when_it_was_said_to() {
    let store = S3BlobStore::new(&sdk().await, of_stage("BUCKET"), true, Clock::System);
    let _ = rustls::crypto::ring::default_provider().install_default();
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let key = format!("jobs/{}/map-1", Uuid::new_v4());
    store.put(&key, b"a picture".to_vec()).await.unwrap();
    let expires_at = Clock::System.now() + TimeDelta::milliseconds(1500);
    let url = store.presign_get(&key, &GetTerms { content_type: "image/png".into(), expires_at }).await.unwrap();
    assert_eq!(http.get(&url).send().await.unwrap().status().as_u16(), 200);
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert_eq!(http.get(&url).send().await.unwrap().status().as_u16(), 403);
}

/// A queue of its own, and one for its dead letters: the stage's has inference behind it.
async fn fresh_queue(sqs: &aws_sdk_sqs::Client) -> String {
    let made = sqs.create_queue().queue_name(format!("of-a-test-{}", Uuid::new_v4())).send().await.unwrap();
    made.queue_url.unwrap()
}

#[tokio::test]
async fn the_queue_sends_hides_and_forgives_an_old_receipt() {
    let sdk = sdk().await;
    let sqs = aws_sdk_sqs::Client::new(&sdk);
    let url = fresh_queue(&sqs).await;
    let queue = SqsJobQueue::new(&sdk, url.clone(), None);
    let message = Message::Infer { id: Uuid::new_v4() };
    queue.send(message).await.unwrap();
    let receive = async || {
        let received = sqs.receive_message().queue_url(&url).wait_time_seconds(1).send().await.unwrap();
        received.messages.unwrap_or_default().pop()
    };
    let first = receive().await.unwrap();
    assert_eq!(Message::decode(first.body.as_deref().unwrap()).unwrap(), message);
    assert!(receive().await.is_none(), "it is hidden");
    queue.set_visibility(first.receipt_handle.as_deref().unwrap(), 0).await.unwrap();
    let again = receive().await.unwrap();
    sqs.delete_message().queue_url(&url).receipt_handle(again.receipt_handle.as_deref().unwrap()).send().await.unwrap();
    queue.set_visibility(first.receipt_handle.as_deref().unwrap(), 5).await.unwrap();
}

#[tokio::test]
async fn dead_letters_are_shown_and_those_chosen_go_back() {
    let sdk = sdk().await;
    let sqs = aws_sdk_sqs::Client::new(&sdk);
    let (url, dead_url) = (fresh_queue(&sqs).await, fresh_queue(&sqs).await);
    let queue = SqsJobQueue::new(&sdk, url.clone(), Some(dead_url.clone()));
    let bodies: Vec<String> = (0..23).map(|number| format!("letter {number}")).collect();
    for body in &bodies {
        sqs.send_message().queue_url(&dead_url).message_body(body).send().await.unwrap();
    }
    // More than one request receives, and looking takes nothing away.
    for _ in 0..2 {
        let shown = queue.dead_letters(100).await.unwrap();
        let mut found: Vec<_> = shown.iter().map(|letter| letter.body.clone()).collect();
        found.sort();
        let mut all = bodies.clone();
        all.sort();
        assert_eq!(found, all);
        assert!(shown.iter().all(|letter| letter.sent_at.timestamp() > 1_700_000_000 && letter.receive_count > 0));
    }
    assert_eq!(queue.dead_letters(5).await.unwrap().len(), 5);

    let chosen: Vec<String> = queue.dead_letters(100).await.unwrap().into_iter().take(2).map(|it| it.id).collect();
    assert_eq!(queue.redrive_dead_letters(Some(&chosen)).await.unwrap(), 2);
    assert_eq!(queue.redrive_dead_letters(Some(&chosen)).await.unwrap(), 0);
    assert_eq!(queue.dead_letters(100).await.unwrap().len(), 21);
    assert_eq!(queue.redrive_dead_letters(None).await.unwrap(), 21);
    assert_eq!(queue.dead_letters(100).await.unwrap(), []);
    let all_back = SqsJobQueue::new(&sdk, url.clone(), Some(url));
    assert_eq!(all_back.dead_letters(100).await.unwrap().len(), 23);

    // A function that an admin waits for moves as many as it has time for.
    let entry = |id: usize| {
        let entry = aws_sdk_sqs::types::SendMessageBatchRequestEntry::builder().id(id.to_string());
        entry.message_body("letter").build().unwrap()
    };
    for _ in 0..52 {
        let batch = sqs.send_message_batch().queue_url(&dead_url).set_entries(Some((0..10).map(entry).collect()));
        batch.send().await.unwrap();
    }
    let moved = queue.redrive_dead_letters(None).await.unwrap();
    assert!((500..510).contains(&moved), "{moved}");
    assert_eq!(queue.redrive_dead_letters(None).await.unwrap(), 520 - moved);
}

/// Terraform writes the stream's filter from these names.
#[tokio::test]
async fn the_streams_filter_names_what_the_store_writes() {
    let sdk = sdk().await;
    let table = fresh_table(&sdk, "TABLE_NAME").await;
    let store = DynamoJobStore::new(&sdk, table.clone());
    let job = new_job("alice", start());
    store.create(creation(&job, None)).await.unwrap();
    let policy = Policy::default();
    let mut waiting = job.claim_inference(start(), start() + policy.lease, &policy).unwrap();
    waiting.dispatch = Some(Dispatch::Enrichment);
    assert!(store.replace(job.fence(), &Record::Job(waiting)).await.unwrap());

    let names: Value = serde_json::from_str(include_str!("../../terraform/names.json")).unwrap();
    let client = aws_sdk_dynamodb::Client::new(&sdk);
    let id = aws_sdk_dynamodb::types::AttributeValue::S(job.id.to_string());
    let item = client.get_item().table_name(table).key("id", id).send().await.unwrap().item.unwrap();
    let marker = &item[names["dispatch_attribute"].as_str().unwrap()];
    assert_eq!(marker.as_s().unwrap(), names["dispatch_enrichment"].as_str().unwrap());
    // Where the queue gives a message up is where the function does.
    assert_eq!(names["webhook_receives"].as_u64().unwrap(), u64::from(webhook::MAX_RECEIVES));
}

/// DynamoDB deletes an item some time after the second in its `ttl`; what is still due is swept before.
#[tokio::test]
async fn a_prompt_that_has_ended_is_deleted_when_it_expires_and_one_under_way_is_not() {
    let sdk = sdk().await;
    let table = fresh_table(&sdk, "TABLE_NAME").await;
    let (store, client) = (DynamoJobStore::new(&sdk, table.clone()), aws_sdk_dynamodb::Client::new(&sdk));
    let ttl = async |id: Uuid| {
        let id = aws_sdk_dynamodb::types::AttributeValue::S(id.to_string());
        let item = client.get_item().table_name(&table).key("id", id).send().await.unwrap().item.unwrap();
        item.get("ttl").map(|seconds| seconds.as_n().unwrap().parse::<i64>().unwrap())
    };
    let policy = Policy::default();
    // The short answer is in the record, the long one would be a blob.
    for (bytes, days) in [(1, 30), (300_000, 7)] {
        let job = new_prompt("alice", start());
        store.create(creation(&job, None)).await.unwrap();
        let claimed = job.claim_enrichment(start(), start() + policy.prompt_lease, &policy).unwrap();
        let answer = LlmAnswer {
            content: AnswerContent::of(&"x".repeat(bytes), job.id, claimed.claim),
            finish_reason: None,
            prompt_tokens: None,
            completion_tokens: None,
            latency_ms: 1,
            cost_usd: None,
        };
        let done = claimed.finish_answer(claimed.claim, answer, start(), &policy).unwrap();
        for (before, after) in [(&job, &claimed), (&claimed, &done)] {
            assert_eq!(ttl(job.id).await, None, "{bytes} bytes");
            assert!(store.replace(before.fence(), &Record::Job(after.clone())).await.unwrap());
        }
        let expires_at = start() + TimeDelta::days(days);
        assert_eq!((done.expires_at, ttl(job.id).await), (expires_at, Some(expires_at.timestamp())), "{bytes} bytes");
    }
}

/// What the functions' roles may not do is denied, not only left undone.
#[tokio::test]
async fn a_role_is_denied_what_terraform_did_not_give_it() {
    let sdk = sdk().await;
    let assume = async |function: &str| {
        let arn = format!("arn:aws:iam::000000000000:role/lesion-local-{function}");
        let provider =
            aws_config::sts::AssumeRoleProvider::builder(arn).session_name("test").configure(&sdk).build().await;
        let credentials = aws_sdk_sqs::config::SharedCredentialsProvider::new(provider);
        sdk.to_builder().credentials_provider(credentials).build()
    };
    let enrichment = assume("enrichment").await;
    let jobs = DynamoJobStore::new(&enrichment, of_stage("TABLE_NAME"));
    assert_eq!(jobs.get(Uuid::new_v4()).await.unwrap(), None, "what it may do works");
    let blobs = S3BlobStore::new(&enrichment, of_stage("BUCKET"), true, Clock::System);
    let denied = blobs.get("jobs/x/photo").await.unwrap_err().chain();
    assert!(denied.contains("AccessDenied"), "enrichment reads photos: {denied}");
    assert_eq!(blobs.get("jobs/x/prompt.json").await.unwrap(), None, "prompts it may read");
    let denied = blobs.put("jobs/x/prompt.json", Vec::new()).await.unwrap_err().chain();
    assert!(denied.contains("AccessDenied"), "enrichment writes prompts: {denied}");
    let queue = SqsJobQueue::new(&enrichment, of_stage("QUEUE_URL"), None);
    let denied = queue.send(Message::Infer { id: Uuid::new_v4() }).await.unwrap_err().chain();
    assert!(denied.contains("AccessDenied"), "enrichment sends: {denied}");
    let blobs = S3BlobStore::new(&assume("submit").await, of_stage("BUCKET"), true, Clock::System);
    let id = Uuid::new_v4();
    for name in ["photo", "prompt.json"] {
        blobs.put(&format!("jobs/{id}/{name}"), Vec::new()).await.expect("submit stores both");
    }
    blobs.delete_prefix(&format!("jobs/{id}/")).await.expect("and erases them where no job was made");
    let callers = DynamoCallers::new(&assume("inference").await, of_stage("CALLERS_TABLE_NAME"));
    let denied = callers.keys().await.unwrap_err().chain();
    assert!(denied.contains("AccessDenied"), "inference reads keys: {denied}");
    let blobs = S3BlobStore::new(&assume("result").await, of_stage("BUCKET"), true, Clock::System);
    let denied = blobs.get("jobs/x/photo").await.unwrap_err().chain();
    assert!(denied.contains("AccessDenied"), "result reads photos: {denied}");
    assert_eq!(blobs.get("jobs/x/answer-1").await.unwrap(), None, "answers it may read");
    assert_eq!(blobs.get("jobs/x/map-1").await.unwrap(), None, "maps it may read");
    let blobs = S3BlobStore::new(&assume("inference").await, of_stage("BUCKET"), true, Clock::System);
    blobs.put("jobs/x/map-1", Vec::new()).await.expect("maps inference may write");
    let denied = blobs.put("jobs/x/photo", Vec::new()).await.unwrap_err().chain();
    assert!(denied.contains("AccessDenied"), "inference writes photos: {denied}");
}
