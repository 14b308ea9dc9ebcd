//! Results over the WebSocket API that Terraform has made, the function behind its routes and the one
//! behind the stream; and the table of connections against the contract of its port.

use reqwest::Method;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use shared::api::admin::{KeyLimits, Scope};
use shared::auth::{Identity, tickets};
use shared::aws::DynamoConnections;
use shared::clock::Clock;
use shared::ports::Connections;
use uuid::Uuid;

use crate::llm_server::{Behaviour, HONEST, explanation};
use crate::pipeline::{LLM_TURN, User};
use crate::ports::{connections_suite, tickets_suite};
use crate::runtime::Function;
use crate::support::{fresh_table, llm, of_stage, sample, sdk, within};
use crate::websocket::{Socket, Told, open, ticket};

const ANSWER: &str = "A growth of pigment cells, often round or oval, é and 🩺.";

#[tokio::test]
async fn the_store_of_connections_keeps_its_contract() {
    let sdk = sdk().await;
    let store = DynamoConnections::new(&sdk, fresh_table(&sdk, "CONNECTIONS_TABLE_NAME").await);
    connections_suite(&store).await;
    tickets_suite(&store).await;
}

async fn connect(user: &User) -> Socket {
    Socket::connect(&user.http, &of_stage("API_URL"), &user.key).await
}

/// Items of the table of connections that hold this text in their ids.
async fn items(with: &str) -> usize {
    let sdk = sdk().await;
    let client = aws_sdk_dynamodb::Client::new(&sdk);
    let found = client.scan().table_name(of_stage("CONNECTIONS_TABLE_NAME")).send().await.unwrap();
    found.items().iter().filter(|item| format!("{item:?}").contains(with)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_is_told_the_end_of_a_photo_and_what_get_says_of_it() {
    let user = User::new("sockets-photo").await;
    let mut socket = connect(&user).await;
    let id = user.submit("", sample("mole-drawn.png")).await;
    socket.subscribe(&id).await;
    let (frame, _) = socket.until_ended(&id).await.unwrap();
    assert_eq!((&frame["type"], &frame["status"]), (&json!("result"), &json!("completed")), "{frame}");
    let mut answer: Value =
        user.request(Method::GET, &format!("/result/{id}")).send().await.unwrap().json().await.unwrap();
    assert!(answer["map"].take().is_object(), "{answer}");
    assert_eq!(frame["result"], answer);
    assert!(items(&id).await > 0);
    // Its deletion is told as well.
    user.request(Method::DELETE, &format!("/result/{id}")).send().await.unwrap().error_for_status().unwrap();
    let deleted = loop {
        let frame = socket.next().await.unwrap();
        if frame["type"] != "result" {
            break frame;
        }
    };
    let seq = frame["seq"].as_u64().unwrap() + 1;
    assert_eq!(deleted, json!({"v": 1, "type": "deleted", "request_id": id, "seq": seq}));
    drop(socket);
    within("the connection is forgotten", async || items(&id).await == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_comes_as_text_and_then_whole() {
    let (_alone, user) = (LLM_TURN.write().await, User::new("sockets-ask").await);
    llm().behave(Behaviour::Answer(ANSWER.into()));
    let mut socket = connect(&user).await;
    socket.send(json!({"action": "ask", "prompt": "What is a naevus?", "tag": "7"})).await;
    let mut told = Told::default();
    let frame = loop {
        let frame = socket.next().await.unwrap();
        match frame["type"].as_str().unwrap() {
            "text" => told.add(&frame),
            "accepted" | "status" => {}
            _ => break frame,
        }
    };
    assert_eq!((told.text().as_str(), &frame["result"]["content"]), (ANSWER, &json!(ANSWER)), "{frame}");
    // The end may be told more than once, and this comes after all of it.
    socket.send(json!({"action": "ping", "tag": "8"})).await;
    loop {
        let frame = socket.next().await.unwrap();
        if frame["type"] == "pong" {
            assert_eq!(frame["tag"], "8");
            break;
        }
    }
    llm().behave(Behaviour::Answer(explanation(HONEST)));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_but_an_unused_ticket_opens_a_connection_and_another_callers_job_looks_like_none() {
    let (owner, other) = (User::new("sockets-owner").await, User::new("sockets-other").await);
    let first = ticket(&other.http, &of_stage("API_URL"), &other.key).await.unwrap();
    let url = first["url"].as_str().unwrap();
    assert!(url.starts_with("ws"), "{url}");
    let mut socket = open("", url, &[]).await.unwrap();
    assert!(open("", url, &[]).await.is_err(), "a ticket was used twice");
    let (bare, _) = url.split_once('?').unwrap();
    for url in [bare.to_owned(), format!("{bare}?ticket={}", "0".repeat(64)), format!("{bare}?ticket={}", other.key)] {
        assert!(open("", &url, &[]).await.is_err(), "{url}");
    }
    let id = owner.submit("?describe=false", sample("mole-drawn.png")).await;
    for id in [id, Uuid::new_v4().to_string()] {
        socket.subscribe(&id).await;
        let expected = json!({
            "v": 1, "type": "error", "code": "not_found", "message": "There is no such request.", "request_id": id,
        });
        assert_eq!(socket.next().await.unwrap(), expected);
    }
}

/// As API Gateway's developer guide and AWS's own runtime for Rust show the events of a WebSocket API.
fn event(route: &str, kind: &str, more: Value) -> Value {
    let mut event = json!({
        "headers": {
            "Host": "abcd1234.execute-api.us-east-1.amazonaws.com",
            "Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Version": "13",
            "X-Forwarded-For": "192.0.2.1",
            "X-Forwarded-Port": "443",
            "X-Forwarded-Proto": "https",
        },
        "multiValueHeaders": {"Host": ["abcd1234.execute-api.us-east-1.amazonaws.com"], "X-Forwarded-For": ["192.0.2.1"]},
        "requestContext": {
            "routeKey": route,
            "eventType": kind,
            "extendedRequestId": "ABCD1234=",
            "requestTime": "09/Feb/2026:18:23:28 +0000",
            "messageDirection": "IN",
            "stage": "live",
            "connectedAt": 1_707_503_007_396_i64,
            "requestTimeEpoch": 1_707_503_008_941_i64,
            "identity": {"sourceIp": "192.0.2.1"},
            "requestId": "ABCD1234=",
            "domainName": "abcd1234.execute-api.us-east-1.amazonaws.com",
            "connectionId": "AAAA1234=",
            "apiId": "abcd1234",
        },
        "isBase64Encoded": false,
    });
    event.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    event
}

#[tokio::test]
async fn the_function_takes_the_events_of_a_websocket_api_as_aws_documents_them() {
    let sdk = sdk().await;
    let table = fresh_table(&sdk, "CONNECTIONS_TABLE_NAME").await;
    let store = DynamoConnections::new(&sdk, table.clone());
    let mut socket = Function::start("socket", &[("CONNECTIONS_TABLE_NAME", table.as_str())]).await;
    let identity = Identity {
        caller: "wanda".to_owned(),
        scopes: vec![Scope::Jobs],
        key_id: None,
        limits: KeyLimits::default(),
        expires_at: None,
    };
    let (ticket, _) = tickets::make(&store, identity.clone(), Clock::System.now()).await.unwrap();
    let query = json!({"queryStringParameters": {"ticket": ticket.expose_secret()}});
    let status = |answer: Value| answer["statusCode"].as_u64().unwrap();
    assert_eq!(status(socket.invoke(&event("$connect", "CONNECT", json!({}))).await.unwrap()), 401);
    assert_eq!(status(socket.invoke(&event("$connect", "CONNECT", query.clone())).await.unwrap()), 200);
    assert_eq!(store.find("AAAA1234=").await.unwrap().unwrap().identity, identity);
    // DynamoDB's TTL takes away who never says goodbye, an hour or two after the connection's own end.
    let client = aws_sdk_dynamodb::Client::new(&sdk);
    let items = client.scan().table_name(&table).send().await.unwrap();
    let ttl: i64 = items.items()[0]["ttl"].as_n().unwrap().parse().unwrap();
    let left = ttl - Clock::System.now().timestamp();
    assert!(items.items().len() == 1 && (7_100..=7_200).contains(&left), "{left} s: {items:?}");
    assert_eq!(status(socket.invoke(&event("$connect", "CONNECT", query)).await.unwrap()), 401);
    let reason = json!({"disconnectStatusCode": 1005, "disconnectReason": "Client-side close frame status not set"});
    assert_eq!(status(socket.invoke(&event("$disconnect", "DISCONNECT", reason)).await.unwrap()), 200);
    assert_eq!(store.find("AAAA1234=").await.unwrap(), None);
    assert!(!socket.printed("stderr").contains(ticket.expose_secret()), "the ticket is in the log");
    // What comes after the end concerns nobody.
    let message = json!({"body": r#"{"action": "ping"}"#});
    assert_eq!(status(socket.invoke(&event("$default", "MESSAGE", message)).await.unwrap()), 200);
}
