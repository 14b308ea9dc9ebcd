//! What 500 clients ask of a host that may be gone at any moment.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use futures_util::future::join_all;
use reqwest::{Client, StatusCode};
use uuid::Uuid;

use crate::kill::ask;
use crate::support::backlog::JOBS;
use crate::support::receiver::Receiver;
use crate::support::{numbered_mole, submit};
use crate::uploads;
use crate::webhooks::submit_told;

/// Makes a request for each of 500, eight at a time, and returns the answers in this order; `None` once the host is
/// gone.
async fn each<T: Send + 'static, F: Future<Output = Option<T>> + Send + 'static>(
    request: impl Fn(usize) -> F + Clone + Send + 'static,
) -> Option<Vec<T>> {
    let numbers: Vec<usize> = (0..JOBS).collect();
    let lanes = numbers.chunks(JOBS.div_ceil(8)).map(<[usize]>::to_vec).map(|lane| {
        let request = request.clone();
        tokio::spawn(async move {
            let mut answers = Vec::new();
            for number in lane {
                answers.push(request(number).await?);
            }
            Some(answers)
        })
    });
    let lanes: Option<Vec<Vec<T>>> = join_all(lanes).await.into_iter().map(Result::unwrap).collect();
    Some(lanes?.into_iter().flatten().collect())
}

/// Submits all photos, each under its key.
pub(super) async fn submit_all(http: &Client, url: &str) -> Option<Vec<Uuid>> {
    let (http, url) = (http.clone(), url.to_owned());
    let request = move |number| {
        let (http, url) = (http.clone(), url.clone());
        async move {
            let key = format!("key-{number}");
            submit(&http, &url, &numbered_mole(number), Some(&key)).await.ok()?.parse().ok()
        }
    };
    each(request).await
}

/// As [`submit_all`], with a receiver that is to be told of the ends.
pub(super) async fn submit_all_told(http: &Client, url: &str, receiver: &Receiver) -> Option<Vec<Uuid>> {
    let (http, url, callback_url) = (http.clone(), url.to_owned(), receiver.url());
    let request = move |number| {
        let (http, url, callback_url) = (http.clone(), url.clone(), callback_url.clone());
        async move {
            let key = format!("key-{number}");
            let id = submit_told(&http, &url, numbered_mole(number), &callback_url, Some(&key)).await;
            id.ok()?.parse().ok()
        }
    };
    each(request).await
}

/// Submits as many prompts, each under its key.
pub(super) async fn ask_all(http: &Client, url: &str) -> Option<Vec<Uuid>> {
    let (http, url) = (http.clone(), url.to_owned());
    let request = move |number| {
        let (http, url) = (http.clone(), url.clone());
        async move { ask(&http, &url, &format!("key-{number}")).await.ok()?.parse().ok() }
    };
    each(request).await
}

/// Uploads and submits all photos; whatever step fails is begun again with the next host.
pub(super) async fn upload_all(
    http: &Client,
    url: &str,
    uploaded: &Arc<Mutex<BTreeMap<usize, String>>>,
) -> Option<Vec<Uuid>> {
    let (http, url, uploaded) = (http.clone(), url.to_owned(), Arc::clone(uploaded));
    let request = move |number| {
        let (http, url, uploaded) = (http.clone(), url.clone(), Arc::clone(&uploaded));
        async move {
            let known = uploaded.lock().unwrap().get(&number).cloned();
            let image_key = match known {
                Some(image_key) => image_key,
                None => {
                    let photo = numbered_mole(number);
                    let permit = uploads::permit(&http, &url, &photo).await.ok()?;
                    assert_eq!(uploads::put(&http, &url, &permit, &photo).await.ok()?.status(), StatusCode::OK);
                    let image_key = permit["image_key"].as_str().unwrap().to_owned();
                    uploaded.lock().unwrap().insert(number, image_key.clone());
                    image_key
                }
            };
            let answer = uploads::submit_key(&http, &url, &image_key).await.ok()?;
            assert_eq!(answer.status(), StatusCode::ACCEPTED);
            let body: serde_json::Value = answer.json().await.ok()?;
            body["request_id"].as_str().unwrap().parse().ok()
        }
    };
    each(request).await
}

/// Redrives all jobs; one that a killed host had redriven already is no longer failed.
pub(super) async fn redrive_all(http: &Client, url: &str, ids: &[Uuid]) -> bool {
    let (http, url, ids) = (http.clone(), url.to_owned(), ids.to_vec());
    let request = move |number: usize| {
        let request = http.post(format!("{url}/admin/jobs/{}/redrive", ids[number]));
        async move {
            let status = request.send().await.ok()?.status();
            assert!([StatusCode::ACCEPTED, StatusCode::CONFLICT].contains(&status), "{status}");
            Some(())
        }
    };
    each(request).await.is_some()
}

/// Deletes jobs; `false` once the host is gone.
pub(super) async fn delete_all(http: &Client, url: &str, ids: &[Uuid]) -> bool {
    let (http, url, ids) = (http.clone(), url.to_owned(), ids.to_vec());
    let request = move |number: usize| {
        let request = http.delete(format!("{url}/result/{}", ids[number]));
        async move {
            assert_eq!(request.send().await.ok()?.status(), StatusCode::NO_CONTENT);
            Some(())
        }
    };
    each(request).await.is_some()
}

/// Sends all dead letters round again; `false` once the host is gone.
pub(super) async fn redrive_letters(http: &Client, url: &str) -> bool {
    let request = http.post(format!("{url}/admin/dead-letters/redrive")).json(&serde_json::json!({}));
    let Ok(answer) = request.send().await else { return false };
    assert_eq!(answer.status(), StatusCode::OK);
    true
}
