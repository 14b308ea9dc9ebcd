use std::net::IpAddr;
use std::sync::Mutex;

use reqwest::Url;
use shared::clock::from_millis;
use shared::job::Status;
use shared::push::{Event, EventData};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use uuid::Uuid;

use super::*;

pub(super) const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// A receiver on loopback that answers each request with the same bytes and then says nothing more.
struct Receiver {
    port: u16,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Receiver {
    async fn start(answer: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (port, requests) = (listener.local_addr().unwrap().port(), Arc::default());
        let kept: Arc<Mutex<Vec<String>>> = Arc::clone(&requests);
        tokio::spawn(async move {
            let mut open = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let (mut request, mut part) = (Vec::new(), [0; 4096]);
                // A body ends with the last brace of its JSON.
                while !request.ends_with(b"}") && !request.starts_with(TLS) {
                    match stream.read(&mut part).await {
                        Ok(0) | Err(_) => break,
                        Ok(read) => request.extend_from_slice(&part[..read]),
                    }
                }
                kept.lock().unwrap().push(String::from_utf8_lossy(&request).into_owned());
                let _ = stream.write_all(answer.as_bytes()).await;
                open.push(stream);
            }
        });
        Self { port, requests }
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

/// The first byte of a handshake.
const TLS: &[u8] = &[0x16];

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";

/// A name server that answers what it is told to, one answer after the other and then the last again.
pub(super) struct Scripted {
    answers: Mutex<Vec<Vec<IpAddr>>>,
    asked: Arc<Mutex<usize>>,
}

impl Scripted {
    pub(super) fn new(answers: &[&[&str]]) -> (Self, Arc<Mutex<usize>>) {
        let parse = |answer: &&[&str]| answer.iter().map(|address| address.parse().unwrap()).collect();
        let (answers, asked) = (Mutex::new(answers.iter().map(parse).collect()), Arc::default());
        (Self { answers, asked: Arc::clone(&asked) }, asked)
    }
}

impl Resolve for Scripted {
    fn resolve(&self, _: Name) -> Resolving {
        *self.asked.lock().unwrap() += 1;
        let mut answers = self.answers.lock().unwrap();
        let answer = if answers.len() > 1 { answers.remove(0) } else { answers[0].clone() };
        let found = answer.into_iter().map(|address| SocketAddr::new(address, 0));
        Box::pin(async move { Ok(Box::new(found) as Addrs) })
    }
}

pub(super) fn destinations(hosts: &str, stage: &str) -> Destinations {
    Destinations::from_env(&Env::of([("WEBHOOK_HOSTS", hosts), ("STAGE", stage)])).unwrap()
}

fn courier(hosts: &str, names: impl Resolve + 'static) -> Courier {
    Courier::new(destinations(hosts, "local"), Key::Fixed(Some(SECRET.into())), names).unwrap()
}

fn webhook(url: &str) -> Webhook {
    let data =
        EventData::Elsewhere { request_id: Uuid::nil(), status: Status::Completed, location: "/result/0".into() };
    let event = Event { kind: "job.completed".into(), timestamp: from_millis(0), caller: "alice".into(), data };
    Webhook { url: url.to_owned(), id: "msg_0_3".into(), seq: 3, event }
}

pub(super) async fn send(courier: &Courier, url: &str) -> Result<(), Refusal> {
    courier.send(&webhook(url), from_millis(1_614_265_330_999)).await.unwrap()
}

#[tokio::test]
async fn a_receiver_gets_one_signed_request() {
    let receiver = Receiver::start(OK).await;
    let host = format!("127.0.0.1:{}", receiver.port);
    send(&courier(&host, System), &format!("http://{host}/a?b=c")).await.unwrap();
    let [request] = receiver.requests().try_into().unwrap();
    let (head, body) = request.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("POST /a?b=c HTTP/1.1\r\n"), "{head}");
    for line in ["content-type: application/json", "webhook-id: msg_0_3", "webhook-timestamp: 1614265330"] {
        assert!(head.lines().any(|found| found == line), "{line}: {head}");
    }
    let key = Keyring::read(&SECRET.into()).unwrap();
    let url = Url::parse(&format!("http://{host}/")).unwrap();
    let signature = key.sign(&url, "msg_0_3", from_millis(1_614_265_330_000), body).unwrap();
    assert!(head.contains(&format!("webhook-signature: {signature}\r\n")), "{head}");
    assert_eq!(body, webhook("").event.to_json().unwrap());
}

#[tokio::test]
async fn a_redirect_is_a_failure_and_its_target_gets_no_request() {
    let target = Receiver::start(OK).await;
    // Leaked, as a receiver's answer lives as long as the test.
    let location = format!("HTTP/1.1 307 Temporary Redirect\r\nlocation: http://127.0.0.1:{}/\r\n\r\n", target.port);
    let receiver = Receiver::start(location.leak()).await;
    let hosts = format!("127.0.0.1:{},127.0.0.1:{}", receiver.port, target.port);
    let refusal = send(&courier(&hosts, System), &format!("http://127.0.0.1:{}/", receiver.port)).await.unwrap_err();
    assert_eq!((refusal.code, refusal.status), ("callback_refused", Some(307)));
    assert_eq!((receiver.requests().len(), target.requests().len()), (1, 0));
}

#[tokio::test]
async fn a_listed_name_that_resolves_to_what_is_not_public_is_not_connected_to() {
    let receiver = Receiver::start(OK).await;
    let host = format!("hooks.example:{}", receiver.port);
    for found in [
        &["127.0.0.1"][..],
        &["::1"],
        &["::ffff:127.0.0.1"],
        &["::127.0.0.1"],
        &["64:ff9b::7f00:1"],
        &["2002:7f00:1::1"],
        &["0.0.0.0"],
        &["10.0.0.1", "127.0.0.1", "169.254.169.254", "192.168.1.1", "fd00:ec2::254", "fe80::1"],
        &[],
    ] {
        let (names, asked) = Scripted::new(&[found]);
        let refusal = send(&courier(&host, names), &format!("https://{host}/")).await.unwrap_err();
        assert_eq!((refusal.code, refusal.status), ("callback_unreachable", None), "{found:?}");
        assert!(refusal.cause.contains("no public address"), "{found:?}: {}", refusal.cause);
        assert_eq!(*asked.lock().unwrap(), 1, "{found:?}");
    }
    assert_eq!(receiver.requests(), [] as [&str; 0]);
}

#[tokio::test]
async fn what_is_connected_to_is_what_was_judged_whatever_the_name_says_later() {
    // The first answer is harmless, the next is this machine: there is no next within a request, and the next
    // request judges its own.
    let (names, asked) = Scripted::new(&[&["93.184.215.14", "127.0.0.1"], &["127.0.0.1"]]);
    let guard = Guard { names: Arc::new(names), destinations: Arc::new(destinations("hooks.example", "local")) };
    let judged = async || guard.resolve("hooks.example".parse().unwrap()).await.map(Iterator::collect::<Vec<_>>);
    let public: SocketAddr = "93.184.215.14:0".parse().unwrap();
    assert_eq!(judged().await.unwrap(), [public]);
    assert!(judged().await.is_err());
    assert_eq!(*asked.lock().unwrap(), 2);

    let receiver = Receiver::start(OK).await;
    let host = format!("localhost:{}", receiver.port);
    let (names, asked) = Scripted::new(&[&["127.0.0.1"], &["10.0.0.1"]]);
    send(&courier(&host, names), &format!("http://{host}/")).await.unwrap();
    assert_eq!((*asked.lock().unwrap(), receiver.requests().len()), (1, 1), "asked once, and that was connected to");
}

#[tokio::test]
async fn a_name_that_is_rebound_is_not_followed_by_the_whole_client() {
    // Nobody listens at the first address. A client that asked again would find the receiver.
    let receiver = Receiver::start(OK).await;
    let host = format!("localhost:{}", receiver.port);
    let (names, asked) = Scripted::new(&[&["127.0.0.2"], &["127.0.0.1"]]);
    let refusal = send(&courier(&host, names), &format!("http://{host}/")).await.unwrap_err();
    assert_eq!((refusal.code, *asked.lock().unwrap()), ("callback_unreachable", 1));
    // Nor is what another try has found kept for the next: that one is judged anew.
    let (names, asked) = Scripted::new(&[&["127.0.0.1"], &["10.0.0.1"], &["169.254.169.254", "::ffff:127.0.0.1"]]);
    let courier = courier(&host, names);
    send(&courier, &format!("http://{host}/")).await.unwrap();
    for tries in 2..4 {
        let refusal = send(&courier, &format!("http://{host}/")).await.unwrap_err();
        assert!(refusal.cause.contains("no public address"), "{}", refusal.cause);
        assert_eq!((*asked.lock().unwrap(), receiver.requests().len()), (tries, 1));
    }
}

#[tokio::test]
async fn a_url_that_is_not_allowed_any_more_is_not_called_and_not_repeated() {
    let receiver = Receiver::start(OK).await;
    let url = format!("http://127.0.0.1:{}/?token=mine", receiver.port);
    let refusal = send(&courier("hooks.example", System), &url).await.unwrap_err();
    assert_eq!(refusal.code, "callback_not_allowed");
    assert!(!format!("{refusal:?}").contains("mine"), "{refusal:?}");
    assert_eq!(receiver.requests(), [] as [&str; 0]);
}

#[tokio::test]
async fn the_answers_body_is_not_waited_for_and_another_status_is_a_failure() {
    let empty = "HTTP/1.1 204 No Content\r\n\r\n";
    let long = "HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\nx";
    for (answer, expected) in [
        (empty, None),
        (long, None),
        ("HTTP/1.1 400 Bad\r\ncontent-length: 9999\r\n\r\nsecret", Some(Some(400))),
        ("HTTP/1.1 500 Internal Server Error\r\n\r\nsecret", Some(Some(500))),
        ("nothing of HTTP", Some(None)),
    ] {
        let receiver = Receiver::start(answer).await;
        let host = format!("127.0.0.1:{}", receiver.port);
        let found = send(&courier(&host, System), &format!("http://{host}/?token=mine")).await;
        assert_eq!(found.as_ref().err().map(|refusal| refusal.status), expected, "{answer}");
        let told = format!("{found:?}");
        assert!(!told.contains("secret") && !told.contains("mine"), "{told}");
    }
}

#[tokio::test]
async fn who_does_not_speak_tls_is_told_nothing_over_https() {
    let receiver = Receiver::start(OK).await;
    let host = format!("localhost:{}", receiver.port);
    let (names, _) = Scripted::new(&[&["127.0.0.1"]]);
    let refusal = send(&courier(&host, names), &format!("https://{host}/")).await.unwrap_err();
    assert_eq!(refusal.code, "callback_unreachable");
    assert_eq!(receiver.requests().len(), 1);
    assert!(receiver.requests().iter().all(|said| !said.contains("webhook-id")));
}

#[tokio::test]
async fn without_a_key_nothing_is_sent_and_that_is_a_try_that_failed() {
    let receiver = Receiver::start(OK).await;
    let host = format!("127.0.0.1:{}", receiver.port);
    for secret in [None, Some("".into()), Some("whsec_short".into()), Some(format!("hooks.example={SECRET}").into())] {
        let courier = Courier::new(destinations(&host, "local"), Key::Fixed(secret), System).unwrap();
        let refusal = send(&courier, &format!("http://{host}/")).await.unwrap_err();
        assert_eq!((refusal.code, refusal.status), ("callback_unsigned", None));
        assert!(!refusal.cause.contains("short"), "{refusal:?}");
    }
    assert_eq!(receiver.requests(), [] as [&str; 0]);
}

#[tokio::test]
async fn a_receiver_may_say_when_to_come_again() {
    let now = from_millis(1_614_265_330_000);
    for (said, expected) in [
        ("120", Some(120)),
        (" 7 ", Some(7)),
        ("Thu, 25 Feb 2021 15:03:10 GMT", Some(60)),
        ("soon", None),
        ("99999999999999999999", None),
    ] {
        let mut headers = HeaderMap::new();
        headers.insert(RETRY_AFTER, said.parse().unwrap());
        assert_eq!(retry_after(&headers, now).map(|wait| wait.num_seconds()), expected, "{said}");
    }
    let receiver = Receiver::start("HTTP/1.1 503 Busy\r\nretry-after: 30\r\ncontent-length: 0\r\n\r\n").await;
    let host = format!("127.0.0.1:{}", receiver.port);
    let refusal = send(&courier(&host, System), &format!("http://{host}/")).await.unwrap_err();
    assert_eq!((refusal.status, refusal.retry_after), (Some(503), Some(TimeDelta::seconds(30))));
}

#[test]
fn hosts_without_a_key_keep_the_process_from_starting() {
    let open = |variables: &[(&str, &str)]| Courier::from_env(&Env::of(variables.iter().copied())).map(|_| ());
    assert!(open(&[]).is_ok());
    assert!(open(&[("WEBHOOK_HOSTS", "hooks.example"), ("WEBHOOK_SECRET", SECRET)]).is_ok());
    for wrong in [&[("WEBHOOK_HOSTS", "hooks.example")][..], &[("WEBHOOK_SECRET", "whsec_short")]] {
        let error = open(wrong).unwrap_err();
        assert_eq!(error.name, "WEBHOOK_SECRET");
        assert!(!error.to_string().contains("short"), "{error}");
    }
}
