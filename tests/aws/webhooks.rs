//! The end of a job told by a webhook over the stream, the queue and the functions that Terraform has made.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use shared::job::{DeliveryOutcome, Record};

use crate::pipeline::{User, record};
use crate::receiver::Received;
use crate::support::{of_stage, receiver, sample, sdk, within};

/// Submits a photo whose end is to be told.
pub async fn submit(user: &User, key: &str) -> reqwest::Response {
    let body = json!({"image": STANDARD.encode(sample("mole-drawn.png")), "callback_url": receiver().url()});
    let request = user.request(Method::POST, "/submit").header("idempotency-key", key);
    request.json(&body).send().await.unwrap()
}

/// What the receiver was told of a job.
pub fn told(id: &str) -> Vec<Received> {
    receiver().received().into_iter().filter(|it| it.event()["data"]["request_id"] == id).collect()
}

/// Whether the record says that the receiver has it.
pub async fn is_delivered(id: &str) -> bool {
    match record(id).await {
        Some(Record::Job(job)) => {
            job.delivery().is_some_and(|delivery| delivery.outcome == Some(DeliveryOutcome::Delivered))
        }
        other => panic!("{id}: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_is_told_the_end_of_a_photo_signed_with_the_key_of_the_stages_secret() {
    receiver().answer(204);
    let user = User::new("webhooks").await;
    let answer = submit(&user, "key").await;
    assert_eq!(answer.status(), StatusCode::ACCEPTED);
    let id = answer.json::<Value>().await.unwrap()["request_id"].as_str().unwrap().to_owned();
    within("the receiver is told", async || is_delivered(&id).await).await;
    let received = told(&id);
    let mut result = user.ended(&id).await;
    result["map"] = Value::Null;
    for received in &received {
        assert_eq!(received.event()["data"], result);
        assert_eq!(received.id(), id_of_delivery(&id).await);
    }
    let secrets = aws_sdk_secretsmanager::Client::new(&sdk().await);
    let secret = secrets.get_secret_value().secret_id(of_stage("SECRET_ARN")).send().await.unwrap();
    let secret: Value = serde_json::from_str(&secret.secret_string.unwrap()).unwrap();
    let key = STANDARD.decode(secret["WEBHOOK_SECRET"].as_str().unwrap().strip_prefix("whsec_").unwrap()).unwrap();
    let received = &received[0];
    let signed = format!("{}.{}.{}", received.id(), received.header("webhook-timestamp"), received.body);
    let signature = STANDARD.decode(received.header("webhook-signature").strip_prefix("v1,").unwrap()).unwrap();
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &key);
    assert!(ring::hmac::verify(&key, signed.as_bytes(), &signature).is_ok());
}

/// The id that the record gives.
async fn id_of_delivery(id: &str) -> String {
    let Some(Record::Job(job)) = record(id).await else { panic!("no job") };
    format!("msg_{id}_{}", job.seq())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_the_stage_does_not_name_is_refused() {
    let user = User::new("webhooks-refused").await;
    let body = json!({"image": "iVBORw0KGgo=", "callback_url": "https://hooks.example/"});
    let answer = user.request(Method::POST, "/submit").json(&body).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(answer.json::<Value>().await.unwrap()["error"]["code"], "callback_not_allowed");
}
