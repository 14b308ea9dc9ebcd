//! All functions' routes, behind the check of credentials or, on a host without keys, of the address.

use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::middleware::{self, Next};
use axum::response::Response;
use shared::api::describe;
use shared::auth::Access;
use shared::embedded::{downloads, uploads};
use shared::error::{Code, Error};
use shared::http;
use tokio::sync::Semaphore;
use utoipa::OpenApi;

use crate::{Host, page, sockets, turns};

/// The description of the whole API.
#[must_use]
pub fn openapi() -> utoipa::openapi::OpenApi {
    describe([
        submit::Api::openapi(),
        result::Api::openapi(),
        admin::Api::openapi(),
        chat::Api::openapi(),
        socket::Api::openapi(),
    ])
}

/// # Errors
/// Where the page cannot be served.
pub(crate) fn router(host: &Arc<Host>) -> anyhow::Result<Router> {
    let turns = Arc::new(turns::Turns::new());
    let room = Arc::new(Semaphore::new(turns::ROOM_KIB));
    let submit = submit::router(Arc::clone(&host.submit));
    let admin = admin::router(Arc::clone(&host.admin));
    let chat = chat::router(Arc::clone(&host.chat));
    let protected = Router::new()
        .merge(submit.layer(middleware::from_fn_with_state(turns, turns::in_turn)))
        .merge(result::router(Arc::clone(&host.results)))
        .merge(admin.layer(middleware::from_fn(turns::in_time)))
        .merge(chat.layer(middleware::from_fn_with_state(room, turns::with_room)))
        .merge(socket::router(Arc::clone(&host.tickets)));
    let open = result::open_router(openapi())
        .merge(uploads::router(host.blobs.clone(), host.clock.clone()))
        .merge(downloads::router(host.blobs.clone(), host.clock.clone()))
        .merge(sockets::router(Arc::clone(host)))
        .merge(page::router(&host.model.manifest.quality)?);
    let router = http::app(protected, open, Arc::clone(&host.access));
    let router = match *host.access {
        Access::Keyless => router.layer(middleware::from_fn(loopback_only)),
        Access::Checked(_) => router,
    };
    Ok(router.layer(middleware::from_fn(http::trace)))
}

/// Lets in what was addressed to a loopback name: without keys there is nothing else to go by.
async fn loopback_only(request: Request, next: Next) -> Result<Response, Error> {
    if !http::is_loopback(request.headers()) {
        let message =
            "This host answers to loopback names only: call it as 127.0.0.1 or localhost, from a page of this machine.";
        return Err(Error::new(Code::Forbidden, message));
    }
    Ok(next.run(request).await)
}
