//! socket as a Lambda behind an HTTP API (payload format 2.0) and a WebSocket API.

use std::sync::Arc;

use axum::Router;
use axum::body::to_bytes;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use lambda_http::RequestExt;
use lambda_http::request::RequestContext;
use shared::aws::{DynamoCallers, DynamoConnections, DynamoJobStore, GatewayPush, S3BlobStore, SqsJobQueue};
use shared::aws::{Stage, flush_after};
use shared::http;
use socket::{Event, Socket, TicketDesk};

type Handler = Socket<DynamoJobStore, SqsJobQueue, S3BlobStore, DynamoCallers, DynamoConnections, GatewayPush>;

/// The largest message of API Gateway.
const MAX_MESSAGE_BYTES: usize = 128 * 1024;

#[tokio::main]
async fn main() -> Result<(), lambda_http::Error> {
    let stage = Stage::open(env!("CARGO_PKG_NAME")).await?;
    let access = stage.access()?;
    let (connections, clock) = (stage.connections()?, stage.clock.clone());
    let socket = Arc::new(Socket {
        jobs: stage.jobs()?,
        queue: stage.queue()?,
        blobs: stage.blobs()?,
        access: Arc::clone(&access),
        connections: connections.clone(),
        push: stage.push()?,
        clock: clock.clone(),
        policy: stage.policy,
        max_queued_bytes: shared::config::max_queued_bytes(&stage.env)?,
        has_llm: shared::config::has_llm(&stage.env)?,
    });
    let desk = TicketDesk { connections, clock, url: stage.socket_url()? };
    let app = http::app(socket::router(Arc::new(desk)), Router::new(), access);
    let app = app.layer(from_fn_with_state(socket, of_gateway)).layer(from_fn(http::trace));
    lambda_http::run(app.layer(from_fn_with_state(stage.metrics, flush_after))).await
}

/// Works what comes from the WebSocket API, which has no credentials but the ticket; the rest passes.
async fn of_gateway(State(socket): State<Arc<Handler>>, request: Request, next: Next) -> Response {
    let Some(RequestContext::WebSocket(context)) = request.request_context_ref() else {
        return next.run(request).await;
    };
    let (route, connection) = (context.route_key.clone(), context.connection_id.clone().unwrap_or_default());
    let ticket = request.query_string_parameters_ref().and_then(|query| query.first("ticket")).map(str::to_owned);
    let event = match route.as_deref() {
        Some("$connect") => Event::Connect { connection, ticket },
        Some("$disconnect") => Event::Disconnect { connection },
        _ => match to_bytes(request.into_body(), MAX_MESSAGE_BYTES).await.map(|body| String::from_utf8(body.into())) {
            Ok(Ok(text)) => Event::Message { connection, text },
            _ => return StatusCode::BAD_REQUEST.into_response(),
        },
    };
    match socket.handle(event).await {
        Ok(()) => StatusCode::OK.into_response(),
        Err(error) => error.into_response(),
    }
}
