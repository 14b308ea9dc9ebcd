//! `local`: the whole pipeline in one process.

mod model;

use std::num::NonZero;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use local::{Config, Host};
use secrecy::ExposeSecret;
use shared::clock::Clock;
use shared::config::Env;
use tokio::signal::unix::{SignalKind, signal};

/// The skin-lesion pipeline in one process: nothing to deploy, and as it comes nothing leaves this machine.
///
/// Settings come from the environment; README.md has the table. Without any, the API is served on
/// 127.0.0.1:8080 and descriptions come from a template.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the API and work the jobs until SIGINT or SIGTERM (the default).
    Serve,
    /// Make the first admin key, print it once, and from the next start on let nobody in without one.
    ///
    /// Until then the host listens on loopback only and asks nobody for a key.
    Init {
        /// Make a further admin key where keys exist already, for who has lost theirs.
        #[arg(long)]
        another: bool,
    },
    /// Check a model bundle, or begin one. docs/MODEL.md has the fields of a manifest.
    ///
    /// A bundle is a folder with manifest.json and the network that it describes, an image classifier in ONNX's format.
    #[command(
        subcommand,
        after_help = "From a network to a host that works by it:
  local model new mine/model.onnx     begin mine/manifest.json, with what is to be filled in
  $EDITOR mine/manifest.json
  local model check mine              say whether a host would take it; print its digest
  MODEL_DIR=mine MODEL_DIGEST=<the digest> local serve

Exit codes:
  0  done
  1  not, and why
  2  the command line is wrong"
    )]
    Model(model::Command),
    /// Print the API's description as JSON.
    Openapi,
    /// List the points at which CRASH_AT kills a debug build.
    #[cfg(debug_assertions)]
    CrashPoints,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line with its causes; a configuration error begins with the variable's name.
            eprintln!("local: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<()> {
    match arguments.command.unwrap_or(Command::Serve) {
        Command::Serve => serve(),
        Command::Init { another } => init(another),
        Command::Model(command) => model::run(command, &Env::of_process()),
        Command::Openapi => {
            println!("{}", local::openapi().to_pretty_json()?);
            Ok(())
        }
        #[cfg(debug_assertions)]
        Command::CrashPoints => {
            shared::crash::Point::ALL.iter().for_each(|point| println!("{}", point.name()));
            Ok(())
        }
    }
}

#[tokio::main]
async fn init(another: bool) -> anyhow::Result<()> {
    let env = Env::of_process();
    #[cfg(debug_assertions)]
    shared::crash::arm(&env)?;
    let key = local::init(&env, &Clock::System, another).await?;
    eprintln!("The key of an admin, shown this once and kept nowhere in clear:");
    println!("{}", key.expose_secret());
    eprintln!(
        "
Keep it like a password. The `lesion` command and curl use it so:
  export LESION_API_KEY=...
  lesion keys create --caller NAME     a key for somebody else
  curl -H \"authorization: Bearer $LESION_API_KEY\" http://127.0.0.1:8080/results
From its next start on the host demands a key of everybody, and LISTEN_ADDR may be any address."
    );
    Ok(())
}

/// The photos have threads of their own, one a processor. Everything else shares half as many: more of them wake
/// each other and interrupt the photos, and get no more done.
fn serve() -> anyhow::Result<()> {
    let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    runtime.worker_threads(processors.div_ceil(2)).enable_all().build()?.block_on(host())
}

async fn host() -> anyhow::Result<()> {
    let env = Env::of_process();
    shared::telemetry::init(&env)?;
    #[cfg(debug_assertions)]
    shared::crash::arm(&env)?;
    let config = Config::from_env(&env)?;
    let host = Host::open(config, &env, Clock::System).await?;
    let (data_dir, model) = (host.config.data_dir.clone(), std::sync::Arc::clone(&host.model));
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    host.run(stop, |address| {
        println!("listening on http://{address}");
        println!("  page         http://{address}/");
        println!("  description  http://{address}/openapi.json");
        println!("  data         {}", data_dir.display());
        println!("  model        {} {} ({})", model.manifest.name, model.manifest.version, model.digest);
    })
    .await
}
