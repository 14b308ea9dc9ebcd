//! What the functions share: the job and its state machine, the wire types, the ports, and the
//! adapters behind them.
//!
//! Without features this crate is pure and small: the job, the messages, the API's bodies. `server`
//! adds what a function needs (HTTP, photos, LLM, cache, logs), `embedded` the ports of the
//! embedded host.

pub mod account;
pub mod api;
#[cfg(feature = "aws")]
pub mod aws;
pub mod clock;
pub mod error;
pub mod job;
pub mod message;
pub mod push;
pub mod stream;

#[cfg(feature = "server")]
pub mod auth;
#[cfg(feature = "server")]
pub mod bounded;
#[cfg(feature = "server")]
pub mod cache;
#[cfg(feature = "server")]
pub mod callback;
#[cfg(feature = "server")]
pub mod config;
#[cfg(feature = "server")]
pub mod crash;
#[cfg(feature = "server")]
pub mod create;
#[cfg(feature = "embedded")]
pub mod embedded;
#[cfg(feature = "server")]
pub mod http;
#[cfg(feature = "server")]
pub mod lease;
#[cfg(feature = "server")]
pub mod llm;
#[cfg(feature = "server")]
pub mod metrics;
#[cfg(feature = "server")]
pub mod photo;
#[cfg(feature = "server")]
pub mod ports;
#[cfg(feature = "server")]
pub mod telemetry;
#[cfg(feature = "server")]
pub mod transition;

pub use error::Error;
