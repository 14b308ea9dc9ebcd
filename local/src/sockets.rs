//! `/ws`, as API Gateway serves it on AWS: opens WebSockets, hands what comes over them to `socket`,
//! and sends what lies in each one's outbox. And what stands there between the table's stream and
//! `notify`.

use std::sync::Arc;
use std::time::Duration;

use aws_lambda_events::event::streams::DynamoDbBatchItemFailure;
use axum::extract::rejection::QueryRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::extract::{Query, State};
use axum::response::Response;
use axum::routing::get;
use axum::{Extension, Router};
use serde::Deserialize;
use serde_json::json;
use shared::Error;
use shared::embedded::{Outbox, Writes};
use shared::error::Code;
use shared::http::{exchanged, request_id};
use shared::push::MAX_FRAME_BYTES;
use socket::{CONNECTION_TTL, Event};
use tokio::sync::watch::Receiver;
use tokio::time::{Instant, sleep_until, timeout};
use uuid::Uuid;

use crate::Host;
use crate::server::Place;
use crate::workers::{PAUSE, failed};

/// API Gateway's: so long may nothing go over a connection.
const IDLE: Duration = Duration::from_secs(10 * 60);
/// How long one frame may take on its way to a client that does not read.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// A message above [`MAX_FRAME_BYTES`] is answered; one that is above this ends the connection.
const MAX_MESSAGE_BYTES: usize = 128 * 1024;
/// Held for every connection, whether it says something or not.
const READ_BUFFER_BYTES: usize = 8 * 1024;
/// How long a client has to answer that it has heard of the end.
const GOODBYE: Duration = Duration::from_secs(2);

#[derive(Deserialize)]
struct Parameters {
    ticket: Option<String>,
}

/// Open: the ticket is the credential.
pub(crate) fn router(host: Arc<Host>) -> Router {
    Router::new().route("/ws", get(open)).with_state(host)
}

async fn open(
    State(host): State<Arc<Host>>,
    Extension(place): Extension<Place>,
    parameters: Result<Query<Parameters>, QueryRejection>,
    upgrade: Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>,
) -> Result<Response, Error> {
    let Query(parameters) = parameters.map_err(|_| Error::new(Code::InvalidRequest, "Send one ticket."))?;
    // Before the ticket is used up.
    let upgrade = upgrade.map_err(|_| Error::new(Code::InvalidRequest, "Open a WebSocket here (RFC 6455)."))?;
    let connection = Uuid::new_v4().to_string();
    let connect = Event::Connect { connection: connection.clone(), ticket: parameters.ticket };
    host.socket.handle(connect).await?;
    let outbox = host.hub.outbox(&connection).ok_or_else(|| Error::internal("a connection without an outbox"))?;
    let (leaving, left) = (Arc::clone(&host), connection.clone());
    let upgrade = upgrade
        .max_message_size(MAX_MESSAGE_BYTES)
        .max_frame_size(MAX_MESSAGE_BYTES)
        .read_buffer_size(READ_BUFFER_BYTES)
        // Or what the client does not read would be held here a second time.
        .max_write_buffer_size(2 * MAX_FRAME_BYTES)
        .write_buffer_size(0)
        .on_failed_upgrade(move |_| drop(tokio::spawn(async move { disconnect(&leaving, left).await })));
    let opened = request_id();
    Ok(upgrade.on_upgrade(async move |socket| {
        tracing::info!(request.id = opened, "socket opened");
        let (answering, id) = (Arc::clone(&host), connection.clone());
        let answer = move |text| {
            let (host, connection) = (Arc::clone(&answering), id.clone());
            async move { exchanged(host.socket.handle(Event::Message { connection, text })).await }
        };
        // In a task of its own: after a panic in it there is still somebody to take the connection out.
        let _ = tokio::spawn(serve(socket, outbox, answer)).await;
        drop(place);
        exchanged(disconnect(&host, connection)).await;
    }))
}

async fn disconnect(host: &Host, connection: String) {
    if let Err(error) = host.socket.handle(Event::Disconnect { connection }).await {
        failed("connection not ended", &error);
    }
}

/// Carries frames both ways until one side ends it.
async fn serve<A: Future<Output = Result<(), Error>>>(
    mut socket: WebSocket,
    mut outbox: Outbox,
    answer: impl Fn(String) -> A,
) {
    let end = Instant::now() + CONNECTION_TTL.to_std().unwrap_or(IDLE);
    let mut idle_at = Instant::now() + IDLE;
    let why = loop {
        let received = tokio::select! {
            // In this order: who sends without end keeps neither the end nor the answers back.
            biased;
            () = sleep_until(end) => break (close_code::AWAY, "open for two hours"),
            frame = outbox.next() => {
                let Some(frame) = frame else { break (close_code::AWAY, "subscribe again over a new connection") };
                if !sent(&mut socket, Message::text(frame)).await {
                    return;
                }
                idle_at = Instant::now() + IDLE;
                continue;
            }
            received = socket.recv() => received,
            () = sleep_until(idle_at) => break (close_code::AWAY, "idle"),
        };
        idle_at = Instant::now() + IDLE;
        let text = match received {
            Some(Ok(Message::Text(text))) => text,
            Some(Ok(Message::Binary(_))) => break (close_code::UNSUPPORTED, "send text"),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
            // The answer to it goes out with the next read.
            Some(Ok(Message::Close(_))) => return drop(timeout(GOODBYE, socket.recv()).await),
            None => return,
            // Broken, no UTF-8, or larger than a message may be; to the first this is not sent.
            Some(Err(_)) => break (close_code::SIZE, "no message of at most 128 KiB"),
        };
        if let Err(error) = answer(text.as_str().to_owned()).await {
            failed("message not answered", &error);
            break (close_code::ERROR, "try again");
        }
    };
    let (code, reason) = why;
    let close = CloseFrame { code, reason: reason.into() };
    if sent(&mut socket, Message::Close(Some(close))).await {
        // What lies unread when a connection is dropped resets it, and its client might not hear why.
        let _ = timeout(GOODBYE, async { while let Some(Ok(_)) = socket.recv().await {} }).await;
    }
}

async fn sent(socket: &mut WebSocket, message: Message) -> bool {
    matches!(timeout(SEND_TIMEOUT, socket.send(message)).await, Ok(Ok(())))
}

/// Tells of every record that is written, in the order of their ids, and has ends delivered.
pub(crate) async fn notify(host: Arc<Host>, mut stopped: Receiver<bool>) {
    let mut untold = Writes::new();
    while !*stopped.borrow() {
        let mut written = tokio::select! {
            written = host.store.written() => written,
            // What could not be told is told again.
            () = tokio::time::sleep(PAUSE), if !untold.is_empty() => Writes::new(),
            _ = stopped.wait_for(|stopped| *stopped) => break,
        };
        // Nobody to tell over a connection; who connects now is told the latest state when it subscribes.
        if host.hub.is_empty() {
            written.retain(|_, dispatch| dispatch.is_some());
            untold.retain(|_, dispatch| dispatch.is_some());
        }
        untold.extend(written);
        if untold.is_empty() {
            continue;
        }
        let event = match serde_json::from_value(event(&untold)) {
            Ok(event) => event,
            Err(error) => {
                failed("changes not told", &Error::internal(error));
                untold.clear();
                continue;
            }
        };
        let failures = host.notify.handle(event).await.batch_item_failures;
        let failed = |failure: DynamoDbBatchItemFailure| Uuid::parse_str(failure.item_identifier.as_deref()?).ok();
        let failed: Vec<Uuid> = failures.into_iter().filter_map(failed).collect();
        untold.retain(|id, _| failed.contains(id));
    }
    host.hub.shut();
}

/// The writes in the shape of DynamoDB Streams.
fn event(writes: &Writes) -> serde_json::Value {
    let record = |(id, dispatch): (&Uuid, &Option<&str>)| {
        let image = dispatch.map_or(json!({}), |dispatch| json!({"dispatch": {"S": dispatch}}));
        let change = json!({"Keys": {"id": {"S": id}}, "NewImage": image, "SequenceNumber": id});
        json!({"eventName": "MODIFY", "dynamodb": change})
    };
    json!({"Records": writes.iter().map(record).collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use futures_util::{SinkExt, StreamExt};
    use shared::auth::Identity;
    use shared::clock::from_millis;
    use shared::embedded::Hub;
    use shared::ports::{Connection, Connections};
    use tokio::net::TcpStream;
    use tokio::sync::oneshot;
    use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
    use tokio_tungstenite::tungstenite::{Message as Said, protocol::CloseFrame as Closed};
    use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

    use super::*;

    /// Tells of every message that has arrived.
    type Heard = std::sync::mpsc::Receiver<()>;

    /// A client of a connection that answers nothing, and how long that is served, by a clock that goes on when
    /// all wait.
    async fn client() -> (WebSocketStream<MaybeTlsStream<TcpStream>>, oneshot::Receiver<Duration>, Heard) {
        let hub = Hub::default();
        let (ended, served) = oneshot::channel();
        let (hears, heard) = std::sync::mpsc::channel();
        let ended = Arc::new(Mutex::new(Some(ended)));
        let open = async move |upgrade: WebSocketUpgrade| {
            let identity = Identity {
                caller: String::new(),
                scopes: Vec::new(),
                key_id: None,
                limits: Default::default(),
                expires_at: None,
            };
            let connection = Connection { id: "one".to_owned(), identity, expires_at: from_millis(0) };
            hub.open(&connection).await.unwrap();
            let outbox = hub.outbox("one").unwrap();
            upgrade.on_upgrade(async move |socket| {
                // The hub lives as long as its connection.
                let _hub = hub;
                let began = Instant::now();
                let answer = |_| {
                    let _ = hears.send(());
                    async { Ok(()) }
                };
                serve(socket, outbox, answer).await;
                ended.lock().unwrap().take().unwrap().send(began.elapsed()).unwrap();
            })
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/ws", get(open));
        tokio::spawn(async move { axum::serve(listener, router).await });
        (tokio_tungstenite::connect_async(format!("ws://{address}/ws")).await.unwrap().0, served, heard)
    }

    fn is_away(said: Option<Result<Said, tokio_tungstenite::tungstenite::Error>>) -> bool {
        matches!(said, Some(Ok(Said::Close(Some(Closed { code: CloseCode::Away, .. })))))
    }

    /// With the time that a client has to say goodbye.
    fn is_about(found: Duration, expected: Duration) -> bool {
        (expected..=expected + GOODBYE + Duration::from_secs(1)).contains(&found)
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_is_kept_open_ends_after_two_hours() {
        let (mut client, served, mut heard) = client().await;
        // Not a part of the two hours: what is sent at their very end would lie unread.
        let (mut sent, pause) = (0, IDLE / 2 + Duration::from_secs(7));
        let said = loop {
            tokio::select! {
                said = client.next() => break said,
                () = tokio::time::sleep(pause) => {
                    sent += 1;
                    client.send(Said::text("{}")).await.unwrap();
                    // The clock stands while a thread waits, so that it arrives when it was sent.
                    let arrived = tokio::task::spawn_blocking(move || heard.recv().map(|()| heard));
                    heard = arrived.await.unwrap().unwrap();
                }
            }
        };
        let said = format!("{said:?}");
        drop(client);
        let (served, whole) = (served.await.unwrap(), CONNECTION_TTL.to_std().unwrap());
        assert!(said.contains("open for two hours"), "{said} after {sent} messages and {served:?}");
        assert!(is_about(served, whole) && sent >= 20, "{served:?}, {sent}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_over_which_nothing_goes_ends_after_ten_minutes() {
        let (mut client, served, _) = client().await;
        assert!(is_away(client.next().await));
        drop(client);
        let served = served.await.unwrap();
        assert!(is_about(served, IDLE), "{served:?}");
    }
}
