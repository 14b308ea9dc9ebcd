//! The class activation map: from the network's output to the overlay that its link gives, and when
//! there is none.

use chrono::{TimeDelta, Utc};
use image::{ImageFormat, Rgb, RgbImage};
use reqwest::Client;
use serde_json::{Value, json};
use shared::clock::Clock;
use shared::http::Caller;
use shared::job::{Status, map_key};
use shared::message::Message;
use shared::ports::JobStore;
use submit::Submission;
use tempfile::TempDir;
use tokio::process::Command;

use crate::support::network::Network;
use crate::support::process::binary;
use crate::support::{Running, eventually, mole, standing};

/// Black on the left, red on the right; 300×400 and stored lying on its side.
fn half_red() -> RgbImage {
    RgbImage::from_fn(300, 400, |x, _| if x < 150 { Rgb([0, 0, 0]) } else { Rgb([250, 0, 0]) })
}

fn png(picture: &RgbImage) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut bytes, ImageFormat::Png).unwrap();
    bytes.into_inner()
}

fn bundle(network: &Network) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    network.write(folder.path());
    folder
}

async fn host(model: &TempDir) -> Running {
    Running::start(&[("MODEL_DIR", model.path().to_str().unwrap())]).await
}

/// Follows a link as a browser does: without credentials.
async fn download(host: &Running, result: &Value) -> reqwest::Response {
    let url = result["map"]["url"].as_str().unwrap_or_else(|| panic!("no map: {result}"));
    Client::builder().no_proxy().build().unwrap().get(format!("{}{url}", host.url)).send().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reading_comes_with_an_overlay_of_what_spoke_for_it_and_none_of_the_photo() {
    let model = bundle(&Network::default());
    let host = host(&model).await;
    let result = host.run(&png(&half_red())).await;
    assert_eq!(result["predictions"][0]["label"], "red", "{result}");
    assert!(result["map"]["note"].as_str().unwrap().starts_with("Non-diagnostic"), "{result}");
    let expires_at: chrono::DateTime<Utc> = result["map"]["expires_at"].as_str().unwrap().parse().unwrap();
    assert!(expires_at - Utc::now() <= TimeDelta::minutes(15));
    let answer = download(&host, &result).await;
    assert_eq!((answer.status().as_u16(), &answer.headers()["content-type"]), (200, &"image/png".parse().unwrap()));
    let overlay = image::load_from_memory(&answer.bytes().await.unwrap()).unwrap().into_rgba8();
    assert_eq!(overlay.dimensions(), (192, 256), "in the photo's proportions");
    let opacity = |x, y| overlay.get_pixel(x, y).0[3];
    for y in [0, 128, 255] {
        assert_eq!((opacity(0, y), opacity(191, y)), (0, 160), "the red half alone spoke for it");
    }
    let colour = &overlay.get_pixel(0, 0).0[..3];
    assert!(overlay.pixels().all(|pixel| &pixel.0[..3] == colour), "no pixel of the photo is in it");

    // The same photo again is not run again, and has a map all the same.
    let again = host.run(&png(&half_red())).await;
    assert!(again["timings_ms"]["inference"].is_null(), "{again}");
    assert_eq!(download(&host, &again).await.status().as_u16(), 200);
    // A list tells nobody.
    let listed: Value = host.get("/results").await.json().await.unwrap();
    assert!(listed["results"].as_array().unwrap().iter().all(|result| result["map"].is_null()), "{listed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abstention_and_a_network_without_maps_leave_none() {
    let unsure = Network { classes: vec![("one", [0.0; 3]), ("other", [0.0; 3])], ..Network::default() };
    let folder = bundle(&unsure);
    let mut manifest = unsure.manifest();
    manifest["abstention"]["min_probability"] = json!(0.9);
    std::fs::write(folder.path().join("manifest.json"), manifest.to_string()).unwrap();
    for model in [folder, bundle(&Network { map: false, ..Network::default() })] {
        let host = host(&model).await;
        let result = host.run(&mole()).await;
        assert_eq!((&result["status"], &result["map"]), (&json!("completed"), &Value::Null), "{result}");
        let id = result["request_id"].as_str().unwrap();
        let files = std::fs::read_dir(host.folder.path().join("blobs/jobs").join(id)).unwrap();
        assert_eq!(files.map(|file| file.unwrap().file_name()).collect::<Vec<_>>(), ["photo"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_takes_the_map_with_the_photo_and_with_it_every_link() {
    let model = bundle(&Network::default());
    let host = host(&model).await;
    let result = host.run(&mole()).await;
    assert_eq!(download(&host, &result).await.status().as_u16(), 200);
    let altered = json!({"map": {"url": result["map"]["url"].as_str().unwrap().replace("/map-", "/photo?")}});
    assert_eq!(download(&host, &altered).await.status().as_u16(), 403, "the photo has no link");
    let id = result["request_id"].as_str().unwrap();
    let deleted = host.http.delete(format!("{}/result/{id}", host.url)).send().await.unwrap();
    assert_eq!(deleted.status().as_u16(), 204);
    assert_eq!(download(&host, &result).await.status().as_u16(), 404);
    assert!(!host.folder.path().join("blobs/jobs").join(id).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_map_is_linked_no_longer_than_the_photo_is_kept() {
    let model = bundle(&Network::default());
    let running = host(&model).await;
    let id = running.run(&mole()).await["request_id"].as_str().unwrap().to_owned();
    let mut folder = running.stop().await;
    let settings = [("MODEL_DIR", model.path().to_str().unwrap())];
    for (age, linked) in [(TimeDelta::days(7) - TimeDelta::minutes(5), true), (TimeDelta::days(8), false)] {
        let now = Utc::now() + age;
        let running = Running::on(folder, Clock::manual(now), &settings).await;
        let result = running.result(&id).await;
        assert_eq!(result["map"].is_object(), linked, "{result}");
        if linked {
            let expires_at: chrono::DateTime<Utc> = result["map"]["expires_at"].as_str().unwrap().parse().unwrap();
            assert!(expires_at - now <= TimeDelta::minutes(5), "{result}");
            assert_eq!(download(&running, &result).await.status().as_u16(), 200);
        } else {
            let blobs = running.folder.path().join("blobs/jobs").join(&id);
            eventually("the map is erased with the photo", async || !blobs.exists()).await;
        }
        folder = running.stop().await;
    }
}

#[tokio::test]
async fn a_map_that_cannot_be_stored_holds_up_no_reading_and_no_record_names_it() {
    let model = bundle(&Network::default());
    let (folder, clock, host) = standing(&[("MODEL_DIR", model.path().to_str().unwrap())]).await;
    let submission = Submission { image: mole(), describe: false, callback_url: None };
    let id = host.submit.accept(&Caller("local".into()), None, submission).await.unwrap();
    let place = folder.path().join("blobs").join(map_key(id, &host.model.digest));
    // A folder in its place: the store answers with an error.
    std::fs::create_dir_all(place.join("in the way")).unwrap();
    let deadline = clock.now() + TimeDelta::seconds(60);
    assert_eq!(host.inference.process(Message::Infer { id }, deadline, None).await, inference::Outcome::Acknowledge);
    let job = host.store.get(id).await.unwrap().unwrap().into_job().unwrap();
    assert_eq!((job.status, job.reading.unwrap().has_map), (Status::Completed, false));
}

/// The record of a build that knew no maps.
#[test]
fn a_record_of_an_earlier_build_is_read_as_one_without_a_map() {
    let reading = json!({"model_digest": "d", "predictions": [], "abstained": null});
    let reading: shared::job::Reading = serde_json::from_value(reading).unwrap();
    assert!(!reading.has_map);
    assert!(!serde_json::to_string(&reading).unwrap().contains("has_map"), "and an earlier build reads ours");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cli_saves_a_map_and_says_what_it_is_not() {
    let model = bundle(&Network::default());
    let running = host(&model).await;
    let file = model.path().join("map.png");
    let id = running.run(&mole()).await["request_id"].as_str().unwrap().to_owned();
    let mut lesion = Command::new(binary("lesion"));
    lesion.env_clear().args(["--api", &running.url, "result", &id, "--map"]).arg(&file);
    let output = lesion.output().await.unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("Non-diagnostic"), "{output:?}");
    assert_eq!(image::open(&file).unwrap().width(), 256);

    let plain = bundle(&Network { map: false, ..Network::default() });
    let running = host(&plain).await;
    let id = running.run(&mole()).await["request_id"].as_str().unwrap().to_owned();
    let other = model.path().join("none.png");
    let mut lesion = Command::new(binary("lesion"));
    lesion.env_clear().args(["--api", &running.url, "result", &id, "--map"]).arg(&other);
    let output = lesion.output().await.unwrap();
    assert_eq!((output.status.code(), other.exists()), (Some(1), false));
    assert!(String::from_utf8_lossy(&output.stderr).contains("there is no map"), "{output:?}");
}
