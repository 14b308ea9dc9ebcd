//! `POST /socket-tickets`, and the three routes of a WebSocket: `$connect`, `$default`, `$disconnect`.
//!
//! Triggered by HTTP, and by a client that opens, uses or leaves a WebSocket. Writes, in this order: a
//! ticket; on connecting, its end, then the connection; on `subscribe` the subscription; on `ask` the
//! job as `POST /submit` does, then the subscription; on leaving the connection's end. Answers go over
//! the connection. A subscription is written before the record is read that answers it, so no change
//! falls between the two.

mod action;

use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Extension, Json, Router};
use chrono::TimeDelta;
use secrecy::ExposeSecret;
use serde::Serialize;
use shared::auth::{Access, Identity, tickets};
use shared::clock::{Clock, Timestamp};
use shared::crash::{self, Point};
use shared::create::{Maker, PromptDraft, checked_key};
use shared::error::{Code, Error, ErrorBody};
use shared::http::Caller;
use shared::job::{Policy, Record};
use shared::ports::{BlobStore, Callers, Connection, Connections, JobQueue, JobStore, Push, Pushed, Subscribed};
use shared::push::{self, Frame, Subscriber, Told};
use utoipa::{OpenApi, ToSchema};
use uuid::Uuid;

pub use action::Action;

/// A connection is forgotten after this, whatever became of it: API Gateway ends each after two hours.
pub const CONNECTION_TTL: TimeDelta = TimeDelta::hours(2);
/// Ids are shorter; what is longer is not repeated to the client.
const MAX_ID_BYTES: usize = 64;

/// What socket works with.
pub struct Socket<J, Q, B, K, C, P> {
    pub jobs: J,
    pub queue: Q,
    pub blobs: B,
    pub access: Arc<Access<K>>,
    pub connections: C,
    pub push: P,
    pub clock: Clock,
    pub policy: Policy,
    pub max_queued_bytes: u64,
    pub has_llm: bool,
}

/// What `POST /socket-tickets` works with.
pub struct TicketDesk<C> {
    pub connections: C,
    pub clock: Clock,
    /// Where WebSockets are opened: absolute, or to be resolved against the address of the API.
    pub url: String,
}

/// What happened to a WebSocket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Somebody opens it, with this ticket.
    Connect { connection: String, ticket: Option<String> },
    /// The client has sent a message.
    Message { connection: String, text: String },
    /// It has ended.
    Disconnect { connection: String },
}

/// The answer to `POST /socket-tickets`.
#[derive(Debug, Serialize, ToSchema)]
pub struct SocketTicket {
    /// Opens one WebSocket, once.
    pub ticket: String,
    /// Where, with the ticket: absolute (`wss://…`), or to be resolved against the address of the API.
    pub url: String,
    #[schema(value_type = String, format = DateTime)]
    pub expires_at: Timestamp,
}

/// This function's part of the API's description.
#[derive(OpenApi)]
#[openapi(paths(create_ticket), components(schemas(SocketTicket, ErrorBody)))]
pub struct Api;

/// This function's routes, to be put behind authentication.
pub fn router<C: Connections>(desk: Arc<TicketDesk<C>>) -> Router {
    Router::new().route("/socket-tickets", post(create_ticket::<C>)).with_state(desk)
}

/// Get a ticket for a WebSocket
///
/// Good for one connection, within a minute. Open `url`; see docs/API.md for what goes over it.
#[utoipa::path(
    post,
    path = "/socket-tickets",
    tag = "jobs",
    responses(
        (status = 201, description = "A ticket, this once.", body = SocketTicket),
        (status = 401, description = "No credentials.", body = ErrorBody),
        (status = 403, description = "Without the scope jobs; or not addressed to a loopback name.", body = ErrorBody),
        (status = 429, description = "Too many requests in this minute.", body = ErrorBody),
        (status = 503, description = "The store is not available.", body = ErrorBody),
    )
)]
async fn create_ticket<C: Connections>(
    State(desk): State<Arc<TicketDesk<C>>>,
    _: Caller,
    Extension(identity): Extension<Identity>,
) -> Result<Response, Error> {
    let (ticket, expires_at) = tickets::make(&desk.connections, identity, desk.clock.now()).await?;
    crash::here(Point::SocketTicketWritten);
    let ticket = ticket.expose_secret();
    let body = SocketTicket { ticket: ticket.to_owned(), url: format!("{}?ticket={ticket}", desk.url), expires_at };
    Ok((StatusCode::CREATED, [(header::CACHE_CONTROL, "no-store")], Json(body)).into_response())
}

impl<J, Q, B, K, C, P> Socket<J, Q, B, K, C, P>
where
    J: JobStore,
    Q: JobQueue,
    B: BlobStore,
    K: Callers,
    C: Connections,
    P: Push,
{
    /// The rule for one event. An error answers `$connect`; a message is answered over the connection.
    ///
    /// # Errors
    /// Why nobody is let in, or 503 where a store cannot be reached.
    pub async fn handle(&self, event: Event) -> Result<(), Error> {
        match event {
            Event::Connect { connection, ticket } => self.connect(connection, ticket.as_deref()).await,
            Event::Message { connection, text } => self.message(&connection, &text).await,
            Event::Disconnect { connection } => self.disconnect(&connection).await,
        }
    }

    async fn connect(&self, id: String, ticket: Option<&str>) -> Result<(), Error> {
        let now = self.clock.now();
        let identity = tickets::take(&self.connections, ticket.unwrap_or(""), now).await?;
        crash::here(Point::SocketTicketTaken);
        self.connections.open(&Connection { id, identity, expires_at: now + CONNECTION_TTL }).await?;
        crash::here(Point::SocketOpened);
        Ok(())
    }

    async fn disconnect(&self, id: &str) -> Result<(), Error> {
        self.connections.close(id).await?;
        crash::here(Point::SocketClosed);
        Ok(())
    }

    async fn message(&self, id: &str, text: &str) -> Result<(), Error> {
        // One that ends while its last message is on its way.
        let Some(connection) = self.connections.find(id).await? else { return Ok(()) };
        let (name, tag, done) = match self.admitted(&connection, text).await {
            Ok(action) => {
                let (name, tag) = (action.name(), action.tag().map(str::to_owned));
                let mut about = match &action {
                    Action::Subscribe { request_id, .. } if request_id.len() <= MAX_ID_BYTES => {
                        Some(request_id.clone())
                    }
                    _ => None,
                };
                let done = self.act(&connection, action, &mut about).await;
                (name, tag, done.map_err(|error| (error, about)))
            }
            Err(error) => ("none", Action::tag_of(text), Err((error, None))),
        };
        let code = done.as_ref().err().map(|(error, _)| error.code());
        // Not of what a client may send without end.
        if name != "ping" && code != Some(Code::TooManyRequests) {
            tracing::info!(socket.action = name, error.code = code.map(Code::as_str), "message answered");
        }
        let Err((error, request_id)) = done else { return Ok(()) };
        if error.http_status() >= 500 {
            tracing::error!(error.code = error.code().as_str(), error.chain = error.chain(), "message failed");
        }
        let (code, message) = (error.code(), error.message().to_owned());
        self.answer(&connection, Frame::Error { code, message, request_id, tag }).await
    }

    /// What a client asks for. Every message is counted, also one that cannot be read, and wants a key that is
    /// still good.
    async fn admitted(&self, connection: &Connection, text: &str) -> Result<Action, Error> {
        self.access.still_admits(&connection.identity).await?;
        Action::read(text)
    }

    /// `about` becomes the job that was made, so that a later failure is not taken for one to make it.
    async fn act(&self, connection: &Connection, action: Action, about: &mut Option<String>) -> Result<(), Error> {
        let id = match action {
            Action::Ping { tag } => return self.answer(connection, Frame::Pong { tag }).await,
            Action::Subscribe { request_id, .. } => {
                let id = Uuid::parse_str(&request_id).map_err(|_| Error::not_found())?;
                // Before anything is written: another's job looks like none.
                self.own(connection, id).await?;
                id
            }
            asked => {
                let tag = asked.tag().map(str::to_owned);
                let request_id = self.ask(connection, asked).await?;
                *about = Some(request_id.to_string());
                self.answer(connection, Frame::Accepted { request_id, tag }).await?;
                request_id
            }
        };
        self.subscribe(connection, id).await
    }

    /// Makes the job.
    async fn ask(&self, connection: &Connection, asked: Action) -> Result<Uuid, Error> {
        connection.identity.without_limits()?;
        let (request, key) = asked.asked()?;
        let key = key.as_deref().map(checked_key).transpose()?;
        let caller = Caller(connection.identity.caller.clone());
        let draft = PromptDraft {
            now: self.clock.now(),
            caller: &caller,
            key,
            request: &request,
            connection: Some(connection.id.clone()),
            callback_url: None,
        };
        let maker = Maker {
            jobs: &self.jobs,
            queue: &self.queue,
            blobs: &self.blobs,
            policy: &self.policy,
            max_queued_bytes: self.max_queued_bytes,
            has_llm: self.has_llm,
        };
        maker.make_prompt(draft).await
    }

    /// Writes the subscription, then says how the job stands.
    async fn subscribe(&self, connection: &Connection, id: Uuid) -> Result<(), Error> {
        match self.connections.subscribe(connection, id).await? {
            Subscribed::Done => {}
            Subscribed::Gone => return Ok(()),
            Subscribed::TooMany => {
                let words = "This connection is subscribed to 500 jobs. Open another one for more.";
                return Err(Error::new(Code::TooManyRequests, words));
            }
        }
        crash::here(Point::SocketSubscribed);
        let record = self.own(connection, id).await?;
        let subscriber = Subscriber { caller: connection.identity.caller.clone(), connection: connection.id.clone() };
        for told in push::deliveries(&record, vec![subscriber]) {
            if let Told::Frame(_, frame) = told {
                self.answer(connection, frame).await?;
            }
        }
        Ok(())
    }

    async fn own(&self, connection: &Connection, id: Uuid) -> Result<Record, Error> {
        match self.jobs.get(id).await? {
            Some(Record::Job(job)) if job.caller == connection.identity.caller => Ok(Record::Job(job)),
            _ => Err(Error::not_found()),
        }
    }

    async fn answer(&self, connection: &Connection, frame: Frame) -> Result<(), Error> {
        let pushed = self.push.push(&connection.id, frame.to_json()?).await?;
        crash::here(Point::SocketAnswered);
        if pushed == Pushed::Gone {
            self.disconnect(&connection.id).await?;
        }
        Ok(())
    }
}
