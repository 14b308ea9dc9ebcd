//! The ports on AWS: one file a service.
//!
//! Credentials, region and (for an emulator) `AWS_ENDPOINT_URL` are read by the SDK's own chain.

mod callers;
mod connections;
mod dynamodb;
mod emf;
mod gateway;
mod s3;
mod secrets;
mod sqs;
mod stage;

use aws_config::{BehaviorVersion, SdkConfig};
use aws_smithy_http_client::Builder;
use aws_smithy_http_client::tls::{Provider, rustls_provider::CryptoMode};

pub use callers::DynamoCallers;
pub use connections::DynamoConnections;
pub use dynamodb::DynamoJobStore;
pub use emf::{Emf, flush_after};
pub use gateway::GatewayPush;
pub use s3::S3BlobStore;
pub use secrets::Secrets;
pub use sqs::SqsJobQueue;
pub use stage::Stage;

/// What every client of this process shares: credentials, region, connections.
pub async fn sdk_config() -> SdkConfig {
    let http = Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring)).build_https();
    aws_config::defaults(BehaviorVersion::v2026_01_12()).http_client(http).load().await
}
