//! A WebSocket client that this project did not write, and what it is told.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use reqwest::Client;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

/// What a client waits for at most.
const PATIENCE: Duration = Duration::from_secs(60);

/// An open connection.
pub struct Socket(pub WebSocketStream<MaybeTlsStream<TcpStream>>);

/// Asks for a ticket, with a key or without.
pub async fn ticket(http: &Client, url: &str, key: &str) -> reqwest::Result<Value> {
    let request = http.post(format!("{url}/socket-tickets"));
    let request = if key.is_empty() { request } else { request.bearer_auth(key) };
    request.send().await?.error_for_status()?.json().await
}

/// Opens what a ticket's `url` names, with these headers besides; the status where that is refused.
pub async fn open(url: &str, path: &str, headers: &[(&'static str, &str)]) -> Result<Socket, u16> {
    let address = if path.starts_with("ws") { path.to_owned() } else { format!("ws{}{path}", &url[4..]) };
    let mut request = address.into_client_request().unwrap();
    for (name, value) in headers {
        request.headers_mut().insert(*name, value.parse().unwrap());
    }
    match connect_async(request).await {
        Ok((socket, _)) => Ok(Socket(socket)),
        Err(Error::Http(response)) => Err(response.status().as_u16()),
        // The host is gone.
        Err(_) => Err(0),
    }
}

impl Socket {
    /// With a ticket of its own.
    pub async fn connect(http: &Client, url: &str, key: &str) -> Self {
        let ticket = ticket(http, url, key).await.unwrap();
        open(url, ticket["url"].as_str().unwrap(), &[]).await.unwrap()
    }

    pub async fn send(&mut self, message: Value) {
        self.say(&message.to_string()).await;
    }

    /// Sends text; the host may have gone.
    pub async fn say(&mut self, text: &str) {
        let _ = self.0.send(Message::text(text)).await;
    }

    pub async fn subscribe(&mut self, id: &str) {
        self.send(json!({"action": "subscribe", "request_id": id})).await;
    }

    /// The next frame; `None` where the connection has ended.
    pub async fn next(&mut self) -> Option<Value> {
        loop {
            match tokio::time::timeout(PATIENCE, self.0.next()).await.expect("no frame within a minute")? {
                Ok(Message::Text(text)) => {
                    let frame: Value = serde_json::from_str(&text).unwrap();
                    assert!(text.len() <= 32 * 1024 && frame["v"] == 1, "{frame}");
                    return Some(frame);
                }
                Ok(Message::Close(_)) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    /// The code by which the host ends the connection, whatever it sends before.
    pub async fn closed(&mut self) -> Option<CloseCode> {
        while let Some(message) = tokio::time::timeout(PATIENCE, self.0.next()).await.expect("not closed") {
            match message {
                Ok(Message::Close(close)) => return close.map(|close| close.code),
                Ok(_) => {}
                Err(_) => return None,
            }
        }
        None
    }

    /// Follows a job as a client does, what is older dropped, to its end: the last frame, and every `seq`
    /// that came, in the order in which it came.
    pub async fn until_ended(&mut self, id: &str) -> Option<(Value, Vec<u64>)> {
        let (mut came, mut newest) = (Vec::new(), 0);
        loop {
            let frame = self.next().await?;
            if frame["request_id"] != id || !frame["seq"].is_u64() {
                continue;
            }
            let seq = frame["seq"].as_u64().unwrap();
            came.push(seq);
            if seq >= newest {
                newest = seq;
                if frame["type"] != "status" {
                    return Some((frame, came));
                }
            }
        }
    }
}

/// What comes about a job behind its end, up to the answer to a ping: the end again at most.
impl Socket {
    pub async fn nothing_older_comes(&mut self, id: &str, newest: u64) {
        self.send(json!({"action": "ping", "tag": "behind the end"})).await;
        loop {
            let frame = self.next().await.unwrap();
            if frame["tag"] == "behind the end" {
                return;
            }
            assert!(frame["request_id"] != id || frame["seq"].as_u64() >= Some(newest), "older than {newest}: {frame}");
        }
    }
}

/// The text of one claim after another, put together as docs/API.md tells a client to.
#[derive(Default)]
pub struct Told {
    pub claim: u64,
    pub units: Vec<u16>,
    /// Frames that came.
    pub frames: usize,
}

impl Told {
    pub fn add(&mut self, frame: &Value) {
        let (claim, offset) = (frame["claim"].as_u64().unwrap(), frame["offset"].as_u64().unwrap());
        self.frames += 1;
        if claim < self.claim {
            return;
        }
        if claim > self.claim {
            self.claim = claim;
            self.units.clear();
        }
        self.units.truncate(usize::try_from(offset).unwrap());
        assert_eq!(self.units.len() as u64, offset, "a gap in the text");
        self.units.extend(frame["text"].as_str().unwrap().encode_utf16());
    }

    pub fn text(&self) -> String {
        String::from_utf16(&self.units).unwrap()
    }
}
