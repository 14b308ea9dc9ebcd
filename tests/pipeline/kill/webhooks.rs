//! Webhooks: told, tried again, given up.

use std::path::Path;

use chrono::{TimeDelta, Utc};
use shared::clock::Clock;
use shared::crash::Point;
use shared::ports::JobQueue;

use super::{Scene, WEBHOOK, WEBHOOK_LAST, WEBHOOK_RETRY, WEBHOOK_SWEPT, WEBHOOK_UNREADABLE, hurry};
use crate::support::process::Process;
use crate::support::receiver::Receiver;
use crate::support::{ended, eventually, mole, open};
use crate::webhooks::{submit_told, variables};

/// Whether the end of the one job was told, and its record says so.
fn is_delivered(data: &Path) -> bool {
    let jobs = rusqlite::Connection::open(data.join("jobs.sqlite")).unwrap();
    let sql = "SELECT json_extract(record, '$.callback.delivery.outcome') FROM jobs";
    jobs.query_row(sql, [], |row| row.get::<_, Option<String>>(0)).unwrap().is_some_and(|it| it == "delivered")
}

/// Lets the hours pass that lie between two tries, and counts them all but the last.
fn hurry_webhook(data: &Path, tries: u32) {
    hurry(data);
    let past = Utc::now() - TimeDelta::hours(1);
    let jobs = rusqlite::Connection::open(data.join("jobs.sqlite")).unwrap();
    let text = past.to_rfc3339_opts(chrono::SecondsFormat::Millis, true);
    let delivery = "$.callback.delivery";
    let record = format!("json_replace(record, '{delivery}.not_before', '{text}', '{delivery}.tries', {tries})");
    assert_eq!(jobs.execute(&format!("UPDATE jobs SET record = {record}"), []).unwrap(), 1);
    let queue = rusqlite::Connection::open(data.join("webhooks.sqlite")).unwrap();
    let sql = format!("UPDATE messages SET visible_at = {}", past.timestamp_millis());
    assert_eq!(queue.execute(&sql, []).unwrap(), 1, "the message was not there any more");
}

/// Sends all dead letters round again, and says how many they were.
async fn redrive(scene: &Scene, host: &Process) -> u64 {
    let request = scene.http.post(format!("{}/admin/dead-letters/redrive", host.url));
    let answer = request.json(&serde_json::json!({})).send().await.unwrap();
    answer.json::<serde_json::Value>().await.unwrap()["redriven"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_any_two_steps_of_a_webhook_tells_the_receiver_under_one_id() {
    for &point in [WEBHOOK, WEBHOOK_RETRY, WEBHOOK_LAST].iter().copied().flatten() {
        let scene = Scene::new([]).await;
        let fails = !WEBHOOK.contains(&point);
        let receiver = Receiver::start(if fails { 503 } else { 200 }).await;
        let host = receiver.host();
        let told = variables(&host);
        let armed = [&told[..], &[("CRASH_AT", point.name())]].concat();
        let submit =
            async |host: &Process| submit_told(&scene.http, &host.url, mole(), &receiver.url(), Some("key")).await;
        let last = WEBHOOK_LAST.contains(&point);
        let mut killed = scene.start_with(None, if last { &told } else { &armed }).await.unwrap();
        let _ = submit(&killed).await;
        if last {
            eventually("it has failed once", async || !receiver.received().is_empty()).await;
            // Behind its answer the try is written down and the message hidden.
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            killed.kill().await;
            hurry_webhook(scene.data(), webhook::MAX_TRIES - 1);
            killed = scene.start_with(None, &armed).await.unwrap();
        }
        killed.killed().await;
        let before = receiver.received().len();
        receiver.answer(200);
        let host = scene.start_with(None, &told).await.unwrap();
        let id = submit(&host).await.unwrap();
        assert_eq!(ended(&scene.http, &host.url, &id).await["status"], "completed", "{}", point.name());
        if last && point != Point::QueueReceived {
            // What was cut off was the last try: its dead letter is there.
            // Two, where sweep has sent a second message meanwhile, and that one has failed as well.
            eventually("an operator finds the dead letter", async || redrive(&scene, &host).await > 0).await;
        }
        eventually(&format!("{}: the receiver is told", point.name()), async || is_delivered(scene.data())).await;
        let received = receiver.received();
        let first = received[0].id().to_owned();
        assert!(first.starts_with(&format!("msg_{id}_")), "{first}");
        assert!(received.iter().all(|it| it.id() == first && it.body == received[0].body), "{}", point.name());
        match point {
            // The record says that the receiver has it: it is not told again.
            Point::WebhookSettled => assert_eq!(received.len(), before, "{}", point.name()),
            // An answer that nobody has written down is as none.
            Point::WebhookAnswered => assert!(received.len() > before, "{}", point.name()),
            _ if fails => assert!(received.len() > before, "{}", point.name()),
            _ => assert!(!received.is_empty(), "{}", point.name()),
        }
        scene.settled(host, &[id], point).await;
    }
    println!("webhooks: killed at {} points", WEBHOOK.len() + WEBHOOK_RETRY.len() + WEBHOOK_LAST.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_while_sweep_gives_a_delivery_up_leaves_a_dead_letter_of_it() {
    for &point in WEBHOOK_SWEPT {
        let scene = Scene::new([]).await;
        let receiver = Receiver::start(503).await;
        let host = receiver.host();
        let told = variables(&host);
        let killed = scene.start_with(None, &told).await.unwrap();
        let id = submit_told(&scene.http, &killed.url, mole(), &receiver.url(), Some("key")).await.unwrap();
        eventually("it has failed once", async || !receiver.received().is_empty()).await;
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        killed.kill().await;
        hurry_webhook(scene.data(), 1);
        let text = (Utc::now() - TimeDelta::hours(1)).to_rfc3339_opts(chrono::SecondsFormat::Millis, true);
        let jobs = rusqlite::Connection::open(scene.data().join("jobs.sqlite")).unwrap();
        let sql = format!("UPDATE jobs SET record = json_replace(record, '$.callback.delivery.until', '{text}')");
        assert_eq!(jobs.execute(&sql, []).unwrap(), 1);
        drop(jobs);
        // Its message was lost.
        let queue = rusqlite::Connection::open(scene.data().join("webhooks.sqlite")).unwrap();
        assert_eq!(queue.execute("DELETE FROM messages", []).unwrap(), 1);
        drop(queue);
        let armed = [&told[..], &[("CRASH_AT", point.name())]].concat();
        // Sweep meets it at once; the host may be dead before it listens.
        if let Some(mut host) = scene.start_with(None, &armed).await {
            host.killed().await;
        }
        receiver.answer(200);
        let host = scene.start_with(None, &told).await.unwrap();
        eventually("an operator finds the dead letter", async || redrive(&scene, &host).await > 0).await;
        eventually(&format!("{}: the receiver is told", point.name()), async || is_delivered(scene.data())).await;
        // The second of it, where there is one, does nothing.
        redrive(&scene, &host).await;
        scene.settled(host, &[id], point).await;
    }
    println!("given up by sweep: killed at {} points", WEBHOOK_SWEPT.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_while_what_is_no_message_is_put_aside_loses_none() {
    for &point in WEBHOOK_UNREADABLE {
        let scene = Scene::new([]).await;
        let host = open(scene.data(), Clock::System, &[]).await;
        host.webhooks.send_body("no message".to_owned()).await.unwrap();
        drop(host);
        if let Some(mut host) = scene.start_with(Some(point), &[]).await {
            host.killed().await;
        }
        let host = scene.start(None).await;
        eventually(&format!("{}: it is put aside", point.name()), async || {
            let queue = rusqlite::Connection::open(scene.data().join("webhooks.sqlite")).unwrap();
            queue.query_row("SELECT count(*) FROM messages", [], |row| row.get::<_, u32>(0)).unwrap() == 0
        })
        .await;
        host.kill().await;
        let host = open(scene.data(), Clock::System, &[]).await;
        let letters = host.webhooks.dead_letters(10).await.unwrap();
        // Twice, since the first message was not acknowledged: an operator sees both.
        assert_eq!(letters.iter().map(|letter| letter.body.as_str()).collect::<Vec<_>>(), ["no message"; 2]);
    }
    println!("no message: killed at {} points", WEBHOOK_UNREADABLE.len());
}
