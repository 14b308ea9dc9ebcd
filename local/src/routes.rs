//! All functions' routes, behind the check of credentials or, on a host without keys, of the address.

use std::sync::Arc;

use axum::extract::Request;
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::get;
use axum::{Json, Router};
use shared::auth::Access;
use shared::embedded::uploads;
use shared::error::{Code, Error};
use shared::http;
use tokio::sync::Semaphore;
use utoipa::OpenApi;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};

use crate::{Host, turns};

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
    whole.merge(admin::Api::openapi());
    let bearer = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some("An API key, or a token of the host's issuer. A host without keys asks for neither."));
    let components = whole.components.get_or_insert_default();
    components.add_security_scheme("bearer", SecurityScheme::Http(bearer.build()));
    // Either: a host without keys, or with guests, takes requests without.
    whole.security =
        Some(vec![SecurityRequirement::default(), SecurityRequirement::new("bearer", Vec::<String>::new())]);
    whole
}

pub(crate) fn router(host: &Arc<Host>) -> Router {
    let description = openapi();
    let turns = Arc::new(Semaphore::new(turns::TURNS));
    let submit = submit::router(Arc::clone(&host.submit));
    let protected = Router::new()
        .merge(submit.layer(middleware::from_fn_with_state(turns, turns::in_turn)))
        .merge(result::router(Arc::clone(&host.results)))
        .merge(admin::router(Arc::clone(&host.admin)));
    let open = result::open_router()
        .merge(uploads::router(host.blobs.clone(), host.clock.clone()))
        .route("/openapi.json", get(|| async move { Json(description) }));
    let router = http::app(protected, open, Arc::clone(&host.access));
    let router = match *host.access {
        Access::Keyless => router.layer(middleware::from_fn(loopback_only)),
        Access::Checked(_) => router,
    };
    router.layer(middleware::from_fn(http::trace))
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
