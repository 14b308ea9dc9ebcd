//! All functions' routes behind the checks of a host without keys.

use std::sync::Arc;

use axum::extract::Request;
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::get;
use axum::{Json, Router};
use shared::embedded::uploads;
use shared::error::{Code, Error};
use shared::http::{self, Caller};
use tokio::sync::Semaphore;
use utoipa::OpenApi;

use crate::{Host, turns};

/// The one caller of a host without keys.
const LOCAL: &str = "local";

/// The description of the whole API.
#[must_use]
pub fn openapi() -> utoipa::openapi::OpenApi {
    #[derive(OpenApi)]
    #[openapi(info(
        title = "Skin-lesion pipeline",
        description = "Photo in, calibrated class probabilities and a plain-language description out. \
            Research demonstration, not a medical device.",
        license(name = "Apache-2.0 OR MIT"),
    ))]
    struct Whole;
    let mut whole = Whole::openapi();
    whole.merge(submit::Api::openapi());
    whole.merge(result::Api::openapi());
    whole
}

pub(crate) fn router(host: &Arc<Host>) -> Router {
    let description = openapi();
    let turns = Arc::new(Semaphore::new(turns::TURNS));
    let submit = submit::router(Arc::clone(&host.submit));
    Router::new()
        .merge(submit.layer(middleware::from_fn_with_state(turns, turns::in_turn)))
        .merge(result::router(Arc::clone(&host.results)))
        .merge(uploads::router(host.blobs.clone(), host.clock.clone()))
        .route("/openapi.json", get(|| async move { Json(description) }))
        .fallback(http::no_route)
        .method_not_allowed_fallback(http::no_method)
        .layer(middleware::from_fn(local_caller))
        .layer(middleware::from_fn(http::trace))
}

/// Lets in what was addressed to a loopback name, as the caller `local`.
async fn local_caller(mut request: Request, next: Next) -> Result<Response, Error> {
    if !http::is_loopback(request.headers()) {
        let message =
            "This host answers to loopback names only: call it as 127.0.0.1 or localhost, from a page of this machine.";
        return Err(Error::new(Code::Forbidden, message));
    }
    request.extensions_mut().insert(Caller(LOCAL.to_owned()));
    Ok(next.run(request).await)
}
