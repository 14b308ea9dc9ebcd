//! The way to an open WebSocket: `POST /@connections/{id}` of API Gateway's management API.

use std::time::Duration;

use aws_config::SdkConfig;
use aws_config::timeout::TimeoutConfig;
use aws_sdk_apigatewaymanagement::Client;
use aws_sdk_apigatewaymanagement::config::Builder;
use aws_sdk_apigatewaymanagement::operation::post_to_connection::PostToConnectionError;
use aws_sdk_apigatewaymanagement::primitives::Blob;

use crate::error::Error;
use crate::ports::{Push, Pushed};

/// For one frame, other tries included: the answer that is told of must not wait for the telling.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The connections of one WebSocket API.
#[derive(Debug, Clone)]
pub struct GatewayPush {
    client: Client,
}

impl GatewayPush {
    /// `endpoint` is the stage's address over https.
    #[must_use]
    pub fn new(config: &SdkConfig, endpoint: &str) -> Self {
        let timeouts = TimeoutConfig::builder().operation_timeout(TIMEOUT).build();
        let config = Builder::from(config).endpoint_url(endpoint).timeout_config(timeouts).build();
        Self { client: Client::from_conf(config) }
    }
}

impl Push for GatewayPush {
    async fn push(&self, connection: &str, frame: String) -> Result<Pushed, Error> {
        let post = self.client.post_to_connection().connection_id(connection).data(Blob::new(frame));
        match post.send().await {
            Ok(_) => Ok(Pushed::Sent),
            Err(error) if error.as_service_error().is_some_and(PostToConnectionError::is_gone_exception) => {
                Ok(Pushed::Gone)
            }
            Err(error) => Err(Error::unavailable("the way to the connection", error)),
        }
    }
}
