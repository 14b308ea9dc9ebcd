//! Tests across functions, on the embedded host: in this process, or as the real binary where it
//! is to be killed.
//!
//! They need the ONNX Runtime library (`scripts/onnxruntime`), `redis-server`, and the binaries of
//! `cargo build --workspace`; `scripts/test` brings all three.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod admin;
mod api;
mod bombs;
mod callers;
mod chat;
mod cli;
mod decoding;
mod docs;
mod embedded;
mod faults;
mod fuzz;
mod kill;
mod leaks;
mod limits;
mod llm;
mod logs;
mod maps;
mod metrics;
mod model_check;
mod models;
mod mutations;
mod page;
mod photos;
#[path = "../ports.rs"]
mod ports;
mod prompts;
mod proxy;
mod proxy_cache;
mod redis;
mod requests;
mod sockets;
mod stages;
mod start;
mod streams;
mod support;
mod sweeping;
mod tokens;
mod trace;
mod uploads;
mod webhooks;
mod words;
