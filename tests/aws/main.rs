//! Tests of the AWS column, beside an emulator on which Terraform has applied the local stage.
//!
//! `scripts/emulator` starts both and gives this binary their names in its environment.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bedrock;
mod chat;
mod events;
mod kill;
mod lambda;
#[path = "../pipeline/support/llm_server.rs"]
#[allow(dead_code, reason = "the pipeline's tests use all of it")]
mod llm_server;
mod metrics;
mod packages;
mod pipeline;
#[path = "../ports.rs"]
mod ports;
#[path = "../pipeline/support/receiver.rs"]
#[allow(dead_code, reason = "the pipeline's tests use all of it")]
mod receiver;
mod redis;
mod runtime;
mod sockets;
mod stores;
mod streaming;
mod support;
mod webhooks;
#[path = "../pipeline/support/websocket.rs"]
#[allow(dead_code, reason = "the pipeline's tests use all of it")]
mod websocket;
