//! The HTTP API as a client sees it.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use reqwest::Response;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};

use crate::support::{Running, mole, sample};

async fn assert_error(response: Response, status: u16, code: &str) -> String {
    let header = response.headers()["x-request-id"].to_str().unwrap().to_owned();
    assert_eq!(response.status().as_u16(), status, "{code}");
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["error"]["code"], code, "{body}");
    assert_eq!(body["error"]["request_id"], header.as_str(), "{body}");
    assert_eq!(body["error"].as_object().unwrap().len(), 3, "{body}");
    body["error"]["message"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_photo_comes_as_json_as_a_raw_body_and_as_a_form() {
    let host = Running::start(&[]).await;
    let submit = || host.http.post(format!("{}/submit", host.url));
    let form =
        Form::new().part("image", Part::bytes(mole()).file_name("IMG_0001.HEIC").mime_str("image/jpeg").unwrap());
    let requests = [
        submit().json(&json!({"image": STANDARD.encode(mole()), "describe": true})),
        submit().header("content-type", "image/jpeg").body(mole()),
        submit().multipart(form.text("describe", "true")),
    ];
    let mut seen = Vec::new();
    for request in requests {
        let response = request.send().await.unwrap();
        assert_eq!(response.status().as_u16(), 202);
        assert_eq!(response.headers()["retry-after"], "1");
        let location = response.headers()["location"].to_str().unwrap().to_owned();
        let body: Value = response.json().await.unwrap();
        assert_eq!(body["status"], "pending");
        assert_eq!(location, format!("/result/{}", body["request_id"].as_str().unwrap()));
        let result = host.ended(body["request_id"].as_str().unwrap()).await;
        assert_eq!(result["status"], "completed", "{result}");
        assert!(result["description"]["text"].is_string(), "{result}");
        seen.push(result["predictions"].clone());
    }
    assert!(seen.iter().all(|predictions| *predictions == seen[0]));
}

#[tokio::test]
async fn predictions_are_sorted_and_add_up_to_one() {
    let host = Running::start(&[]).await;
    let result = host.run(&mole()).await;
    let probabilities: Vec<f64> =
        result["predictions"].as_array().unwrap().iter().map(|one| one["probability"].as_f64().unwrap()).collect();
    assert_eq!(probabilities.len(), 7);
    assert!(probabilities.is_sorted_by(|one, next| one >= next), "{probabilities:?}");
    assert!((probabilities.iter().sum::<f64>() - 1.0).abs() < 1e-4);
    assert_eq!(result["model_digest"].as_str().unwrap().len(), 64);
    for stage in ["queued", "fetch", "decode", "quality", "preprocess", "inference", "describe", "total"] {
        assert!(result["timings_ms"][stage].is_number(), "{stage}: {result}");
    }
}

#[tokio::test]
async fn an_idempotency_key_gives_one_job_for_one_content() {
    let host = Running::start(&[]).await;
    let submit = |photo: Vec<u8>, query: &str| {
        let request = host.http.post(format!("{}/submit{query}", host.url)).header("content-type", "image/png");
        request.header("idempotency-key", "the-same").body(photo).send()
    };
    let id = |body: Value| body["request_id"].as_str().unwrap().to_owned();
    let first = id(submit(mole(), "").await.unwrap().json().await.unwrap());
    let second = id(submit(mole(), "").await.unwrap().json().await.unwrap());
    assert_eq!(first, second);
    assert_error(submit(sample("blurred.png"), "").await.unwrap(), 409, "idempotency_conflict").await;
    assert_error(submit(mole(), "?describe=false").await.unwrap(), 409, "idempotency_conflict").await;
    host.ended(&first).await;
    let list: Value = host.get("/results").await.json().await.unwrap();
    assert_eq!(list["results"].as_array().unwrap().len(), 1);
    let photos = std::fs::read_dir(host.folder.path().join("blobs/jobs")).unwrap().count();
    assert_eq!(photos, 1, "a repeated request stores no second photo");
}

#[tokio::test]
async fn twenty_requests_at_once_under_one_key_make_one_job() {
    let host = Running::start(&[]).await;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let (http, url) = (host.http.clone(), host.url.clone());
        tasks.spawn(async move { crate::support::submit(&http, &url, &mole(), Some("race")).await.unwrap() });
    }
    let mut ids = tasks.join_all().await;
    ids.dedup();
    assert_eq!(ids.len(), 1);
    host.ended(&ids[0]).await;
    assert_eq!(std::fs::read_dir(host.folder.path().join("blobs/jobs")).unwrap().count(), 1);
}

#[tokio::test]
async fn what_is_no_photo_is_refused_with_its_own_code() {
    let host = Running::start(&[]).await;
    let raw = |body: Vec<u8>| {
        host.http.post(format!("{}/submit", host.url)).header("content-type", "image/jpeg").body(body).send()
    };
    let json = |body: Value| host.http.post(format!("{}/submit", host.url)).json(&body).send();
    assert_error(raw(b"GIF89a, or so it says".to_vec()).await.unwrap(), 415, "unsupported_media_type").await;
    let heic = b"\0\0\0\x24ftypheic\0\0\0\0mif1heic".to_vec();
    let message = assert_error(raw(heic).await.unwrap(), 415, "heic_not_supported").await;
    assert!(message.contains("Most Compatible"), "{message}");
    assert_error(raw(mole()[..20].to_vec()).await.unwrap(), 422, "photo_unreadable").await;
    assert_error(raw(mole()[..mole().len() / 2].to_vec()).await.unwrap(), 422, "photo_unreadable").await;
    assert_error(raw(Vec::new()).await.unwrap(), 400, "invalid_request").await;
    assert_error(json(json!({"image": "no base64!"})).await.unwrap(), 400, "invalid_request").await;
    assert_error(json(json!({"image": "", "colour": 1})).await.unwrap(), 400, "invalid_request").await;
    assert_error(json(json!([])).await.unwrap(), 400, "invalid_request").await;
    let in_order = json!([STANDARD.encode(mole()), null, true]);
    assert_error(json(in_order).await.unwrap(), 400, "invalid_request").await;
    let text = host.http.post(format!("{}/submit", host.url)).header("content-type", "text/plain").body("hello");
    assert_error(text.send().await.unwrap(), 415, "unsupported_media_type").await;
    let form = Form::new().text("photo", "x");
    let form = host.http.post(format!("{}/submit", host.url)).multipart(form).send();
    assert_error(form.await.unwrap(), 400, "invalid_request").await;
    let boundary =
        host.http.post(format!("{}/submit", host.url)).header("content-type", "multipart/form-data").body("x");
    assert_error(boundary.send().await.unwrap(), 400, "invalid_request").await;
    let query =
        host.http.post(format!("{}/submit?discribe=no", host.url)).header("content-type", "image/png").body(mole());
    assert_error(query.send().await.unwrap(), 400, "invalid_request").await;
    let key = host.http.post(format!("{}/submit", host.url)).header("idempotency-key", "k".repeat(256)).body(mole());
    assert_error(key.send().await.unwrap(), 400, "invalid_request").await;
    assert_eq!(std::fs::read_dir(host.folder.path().join("blobs/jobs")).map_or(0, Iterator::count), 0);
}

#[tokio::test]
async fn a_photo_above_four_mebibytes_is_refused_however_it_comes() {
    let host = Running::start(&[]).await;
    let mut large = mole();
    large.resize(4 * 1024 * 1024 + 1, 0);
    let submit = || host.http.post(format!("{}/submit", host.url));
    let raw = submit().header("content-type", "image/png").body(large.clone()).send();
    assert_error(raw.await.unwrap(), 413, "payload_too_large").await;
    let json = submit().json(&json!({"image": STANDARD.encode(&large)})).send();
    assert_error(json.await.unwrap(), 413, "payload_too_large").await;
    let form = submit().multipart(Form::new().part("image", Part::bytes(large.clone()))).send();
    assert_error(form.await.unwrap(), 413, "payload_too_large").await;
    // What follows the picture in the file is dropped, so the limit itself is still a photo.
    large.truncate(4 * 1024 * 1024);
    let exact = submit().header("content-type", "image/png").body(large).send();
    assert_eq!(exact.await.unwrap().status().as_u16(), 202);
}

#[tokio::test]
async fn a_form_without_an_end_is_refused_before_it_fills_the_memory() {
    let host = Running::start(&[]).await;
    for content in [
        vec![0; 16 * 1024 * 1024],
        b"--b\r\nContent-Disposition: form-data; name=\"describe\"\r\n\r\ntrue\r\n".repeat(200_000),
    ] {
        let request =
            host.http.post(format!("{}/submit", host.url)).header("content-type", "multipart/form-data; boundary=b");
        // The answer comes before the body was sent whole; a client that insists sees the connection end.
        if let Ok(response) = request.body(content).send().await {
            assert_error(response, 413, "payload_too_large").await;
        }
    }
}

#[tokio::test]
async fn base64_comes_with_line_breaks_and_as_a_data_url() {
    let host = Running::start(&[]).await;
    let text = STANDARD.encode(mole());
    let broken =
        text.as_bytes().chunks(76).map(|line| std::str::from_utf8(line).unwrap()).collect::<Vec<_>>().join("\n");
    for image in [broken, format!("data:image/png;base64,{text}")] {
        let response =
            host.http.post(format!("{}/submit", host.url)).json(&json!({"image": image})).send().await.unwrap();
        assert_eq!(response.status().as_u16(), 202);
    }
    let query = host.http.post(format!("{}/submit?describe=false", host.url)).json(&json!({"image": text})).send();
    assert_error(query.await.unwrap(), 400, "invalid_request").await;
}

#[tokio::test]
async fn the_largest_photo_fits_into_json_as_android_writes_it() {
    let host = Running::start(&[]).await;
    let mut photo = vec![0; 4 * 1024 * 1024];
    SmallRng::seed_from_u64(6).fill(&mut photo[..]);
    let text = STANDARD.encode(photo);
    let lines: Vec<_> = text.as_bytes().chunks(76).map(|line| std::str::from_utf8(line).unwrap()).collect();
    let body = format!(r#"{{"image":"{}"}}"#, lines.join("\\n").replace('/', "\\/"));
    let request = host.http.post(format!("{}/submit", host.url)).header("content-type", "application/json");
    // It is no photo, but not too large for one.
    assert_error(request.body(body).send().await.unwrap(), 415, "unsupported_media_type").await;
}

#[tokio::test]
async fn wrong_addresses_methods_and_parameters_get_the_one_error_shape() {
    let host = Running::start(&[]).await;
    let unknown = "/result/00000000-0000-7000-8000-000000000000";
    assert_error(host.get("/nothing").await, 404, "not_found").await;
    assert_error(host.get("/submit").await, 405, "method_not_allowed").await;
    assert_error(host.get(unknown).await, 404, "not_found").await;
    assert_error(host.get("/result/42").await, 404, "not_found").await;
    assert_error(host.get("/result/%ff").await, 404, "not_found").await;
    let encoded = host.http.delete(format!("{}/result/%ff", host.url)).send();
    assert_error(encoded.await.unwrap(), 404, "not_found").await;
    assert_error(host.get("/result").await, 400, "invalid_request").await;
    assert_error(host.get(&format!("{unknown}?wait=26")).await, 400, "invalid_request").await;
    assert_error(host.get(&format!("{unknown}?wait=-1")).await, 400, "invalid_request").await;
    assert_error(host.get("/results?limit=0").await, 400, "invalid_request").await;
    assert_error(host.get("/results?limit=101").await, 400, "invalid_request").await;
    assert_error(host.get("/results?cursor=x").await, 400, "invalid_request").await;
    let delete = host.http.delete(format!("{}{unknown}", host.url)).send();
    assert_error(delete.await.unwrap(), 404, "not_found").await;
}

#[tokio::test]
async fn a_page_elsewhere_gets_nothing_from_a_host_without_keys() {
    let host = Running::start(&[]).await;
    for (name, value) in [("host", "rebound.example"), ("origin", "https://elsewhere.example"), ("origin", "null")] {
        let request = host.http.get(format!("{}/results", host.url)).header(name, value).send();
        assert_error(request.await.unwrap(), 403, "forbidden").await;
    }
}

#[tokio::test]
async fn an_etag_spares_an_unchanged_answer_and_wait_holds_an_open_one() {
    let host = Running::start(&[]).await;
    let id = host.submit(&mole()).await;
    let response = host.get(&format!("/result?request_id={id}&wait=25")).await;
    assert_eq!(response.status().as_u16(), 200);
    assert!(response.headers().get("retry-after").is_none(), "an ended job needs no other look");
    let etag = response.headers()["etag"].clone();
    let result: Value = response.json().await.unwrap();
    assert_eq!(result["status"], "completed");
    let again = host.http.get(format!("{}/result/{id}", host.url)).header("if-none-match", etag).send().await.unwrap();
    assert_eq!(again.status().as_u16(), 304);
    assert_eq!(again.text().await.unwrap(), "");
    let stale =
        host.http.get(format!("{}/result/{id}", host.url)).header("if-none-match", "\"0\"").send().await.unwrap();
    assert_eq!(stale.status().as_u16(), 200);
}

#[tokio::test]
async fn a_list_is_newest_first_and_pages_without_gap_or_overlap() {
    let host = Running::start(&[]).await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.push(host.submit(&mole()).await);
    }
    ids.reverse();
    let (mut seen, mut cursor) = (Vec::new(), String::new());
    loop {
        let page: Value = host.get(&format!("/results?limit=2{cursor}")).await.json().await.unwrap();
        seen.extend(
            page["results"].as_array().unwrap().iter().map(|one| one["request_id"].as_str().unwrap().to_owned()),
        );
        let Some(next) = page["next_cursor"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    assert_eq!(seen, ids);
}

#[tokio::test]
async fn a_deleted_job_is_gone_with_its_photo_and_deleting_again_is_no_error() {
    let host = Running::start(&[]).await;
    let id = host.submit(&mole()).await;
    host.ended(&id).await;
    let photo = host.folder.path().join("blobs/jobs").join(&id);
    assert!(photo.is_dir());
    for _ in 0..2 {
        let response = host.http.delete(format!("{}/result/{id}", host.url)).send().await.unwrap();
        assert_eq!(response.status().as_u16(), 204);
    }
    assert!(!photo.exists());
    assert_error(host.get(&format!("/result/{id}")).await, 404, "not_found").await;
    let list: Value = host.get("/results").await.json().await.unwrap();
    assert_eq!(list["results"], json!([]));
}

#[tokio::test]
async fn every_described_operation_answers_and_every_answer_is_described() {
    let host = Running::start(&[]).await;
    let id = host.submit(&mole()).await;
    let description: Value = host.get("/openapi.json").await.json().await.unwrap();
    assert!(description["openapi"].as_str().unwrap().starts_with("3."));
    let mut operations = Vec::new();
    for (path, methods) in description["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let query = if path == "/result" { format!("?request_id={id}") } else { String::new() };
            let url = format!("{}{}{query}", host.url, path.replace("{request_id}", &id));
            let method: reqwest::Method = method.to_uppercase().parse().unwrap();
            let response = host.http.request(method.clone(), url).send().await.unwrap();
            let status = response.status().as_u16().to_string();
            assert!(operation["responses"].get(&status).is_some(), "{method} {path} answers {status}");
            assert_ne!(status, "405", "{method} {path}");
            operations.push(format!("{method} {path}"));
        }
    }
    operations.sort();
    let expected = [
        "DELETE /admin/keys/{id}",
        "DELETE /result/{request_id}",
        "GET /admin/dead-letters",
        "GET /admin/keys",
        "GET /admin/keys/{id}/usage",
        "GET /healthz",
        "GET /result",
        "GET /result/{request_id}",
        "GET /results",
        "GET /v1/models",
        "GET /v1/models/{model}",
        "POST /admin/dead-letters/redrive",
        "POST /admin/jobs/{request_id}/redrive",
        "POST /admin/keys",
        "POST /chat",
        "POST /socket-tickets",
        "POST /submit",
        "POST /uploads",
        "POST /v1/chat/completions",
    ];
    assert_eq!(operations, expected);
}

#[tokio::test]
async fn a_store_that_is_down_is_503_and_the_same_request_succeeds_later() {
    let host = Running::start(&[]).await;
    // A file where the photos' folder should be.
    let photos = host.folder.path().join("blobs/jobs");
    std::fs::write(&photos, b"").unwrap();
    let submit = || {
        let request = host.http.post(format!("{}/submit", host.url)).header("content-type", "image/png");
        request.header("idempotency-key", "again").body(mole()).send()
    };
    let response = submit().await.unwrap();
    assert_eq!(response.headers()["retry-after"], "5");
    let message = assert_error(response, 503, "unavailable").await;
    assert!(!message.contains("blobs") && !message.contains("os error"), "{message}");
    std::fs::remove_file(&photos).unwrap();
    assert_eq!(submit().await.unwrap().status().as_u16(), 202);
}

#[tokio::test]
async fn wait_holds_an_open_job_and_an_etag_wakes_it_at_the_first_change() {
    use crate::support::llm_server::{Behaviour, LlmServer};
    let llm = LlmServer::start([Behaviour::Stall]).await;
    let base_url = llm.base_url();
    let host = Running::start(&[("LLM_BASE_URL", &base_url), ("LLM_MODEL", "m")]).await;
    let id = host.submit(&mole()).await;
    let (mut etag, mut statuses) = ("\"0\"".to_owned(), Vec::new());
    // The LLM stalls for longer than this waits: the last look is answered 304.
    loop {
        let request = host.http.get(format!("{}/result/{id}?wait=3", host.url)).header("if-none-match", &etag);
        let response = request.send().await.unwrap();
        if response.status().as_u16() == 304 {
            assert!(response.headers().contains_key("retry-after"));
            break;
        }
        etag = response.headers()["etag"].to_str().unwrap().to_owned();
        let result: Value = response.json().await.unwrap();
        statuses.push(result["status"].as_str().unwrap().to_owned());
    }
    assert_eq!(statuses.last().unwrap(), "awaiting_description");
    let started = std::time::Instant::now();
    let result: Value = host.get(&format!("/result/{id}?wait=1")).await.json().await.unwrap();
    assert_eq!(result["status"], "awaiting_description");
    assert!(started.elapsed() >= std::time::Duration::from_secs(1), "it was not held");
}
