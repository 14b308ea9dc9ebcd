//! The cache on a real Redis (`redis-server`, on a free port, ended with the test).

use crate::support::redis_server::Redis;
use crate::support::{Running, eventually, mole, sample};

#[tokio::test(flavor = "multi_thread")]
async fn outputs_are_kept_in_redis_until_the_photo_expires_or_its_job_is_deleted() {
    let redis = Redis::start(None);
    let url = redis.url();
    let host = Running::start(&[("REDIS_URL", &url)]).await;
    let first = host.run(&mole()).await;
    eventually("the outputs are in Redis", async || redis.keys().len() == 1).await;
    let key = redis.keys().remove(0);
    let week = 7 * 24 * 3600;
    assert!((week - 120..=week).contains(&redis.ttl_seconds(&key)));
    let second = host.run(&mole()).await;
    assert!(second["timings_ms"]["inference"].is_null(), "{second}");
    assert_eq!(first["predictions"], second["predictions"]);
    assert_eq!(redis.keys().len(), 1);
    let id = first["request_id"].as_str().unwrap();
    host.http.delete(format!("{}/result/{id}", host.url)).send().await.unwrap();
    eventually("the outputs are erased", async || redis.keys().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_going_and_coming_back_stops_no_job() {
    let redis = Redis::start(None);
    let (url, port) = (redis.url(), redis.port);
    let host = Running::start(&[("REDIS_URL", &url)]).await;
    assert_eq!(host.run(&mole()).await["status"], "completed");
    drop(redis);
    assert_eq!(host.run(&mole()).await["status"], "completed");
    let redis = Redis::start(Some(port));
    eventually("Redis is used again", async || {
        host.run(&sample("hairy-mole-drawn.png")).await;
        !redis.keys().is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_host_starts_without_its_redis() {
    let host = Running::start(&[("REDIS_URL", "redis://127.0.0.1:1")]).await;
    assert_eq!(host.run(&mole()).await["status"], "completed");
}
