//! `lesion`: submits photos and prompts to the pipeline and looks results up, over the HTTP API.

/// As `println!`, which panics where nobody reads on, as behind `| head`.
macro_rules! say {
    ($($what:tt)*) => { $crate::show::say(format_args!($($what)*)) };
}

mod ask;
mod client;
mod keys;
mod redrive;
mod show;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use shared::api::{JobResult, Outcome, PhotoOutcome};
use shared::job::Status;
use tokio::time::{Instant, sleep, timeout_at};
use uuid::Uuid;

use crate::client::{Client, Problem};
use crate::show::Progress;

/// Between two looks while the API cannot be reached: a host that is restarted is back in seconds.
const UNREACHABLE_PAUSE: Duration = Duration::from_secs(2);
/// The answer to the last look comes a moment after the deadline.
const LAST_LOOK: Duration = Duration::from_secs(5);

/// Submit photos of skin lesions, ask the LLM, and look results up.
///
/// Research demonstration, not a medical device.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  lesion submit --wait photo.jpg             submit, wait, print what came out
  lesion submit --no-describe --json *.jpg   ids for a program; no description
  lesion result ID --wait                    wait for a job submitted before
  lesion result ID --map map.png             save what speaks for the label, non-diagnostic
  lesion list --limit 5                      your newest jobs
  lesion delete ID                           erase photo and result
  lesion ask 'What is a naevus?'             ask the LLM of the host, however long it takes

Where the host asks for a key, set LESION_API_KEY. With an admin's key:
  lesion keys create --caller ward-3         a key for somebody; shown once
  lesion dead-letters list                   messages that were given up
  lesion redrive ID                          a failed job once more

Exit codes:
  0  done
  1  the API could not be reached or refused
  2  the command line is wrong
  3  a photo must be retaken
  4  a job failed
  5  a job was not finished in time"
)]
struct Arguments {
    /// Where the API is.
    #[arg(long, env = "LESION_API_URL", default_value = "http://127.0.0.1:8080", global = true)]
    api: String,
    /// API key or token; better set as the variable, which no list of processes shows.
    #[arg(long, env = "LESION_API_KEY", hide_env_values = true, global = true)]
    api_key: Option<String>,
    /// Print JSON, one object a line, for programs.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Submit photos (JPEG, PNG or WebP, at most 25 MiB each) and print their ids.
    Submit {
        /// Files; the format is read from their bytes.
        #[arg(required = true)]
        photos: Vec<PathBuf>,
        /// Ask for no description.
        #[arg(long)]
        no_describe: bool,
        /// Where the host is to tell of each end, by a webhook.
        #[arg(long, value_name = "URL")]
        callback_url: Option<String>,
        #[command(flatten)]
        wait: Wait,
    },
    /// Print a result.
    Result {
        id: Uuid,
        /// Save the class activation map here, a PNG to be laid over the upright photo. Non-diagnostic.
        #[arg(long, value_name = "FILE")]
        map: Option<PathBuf>,
        #[command(flatten)]
        wait: Wait,
    },
    /// Ask the LLM of the host and print its answer, which may take minutes.
    Ask(ask::Ask),
    /// List your jobs, newest first.
    List {
        /// How many, at most.
        #[arg(long, default_value_t = 20)]
        limit: usize,
    },
    /// Delete jobs with their photos.
    Delete {
        #[arg(required = true)]
        ids: Vec<Uuid>,
    },
    /// Make, list and revoke API keys (scope admin).
    #[command(subcommand)]
    Keys(keys::Command),
    /// Show messages that were given up, and send them again (scope admin).
    #[command(subcommand)]
    DeadLetters(redrive::Command),
    /// Send jobs that failed retryably round again, whoever's they are (scope admin).
    Redrive {
        #[arg(required = true)]
        ids: Vec<Uuid>,
    },
}

#[derive(Args)]
struct Wait {
    /// Wait for the end and print the result.
    #[arg(long)]
    wait: bool,
    /// How long to wait, in seconds.
    #[arg(long, default_value_t = 120, requires = "wait")]
    timeout: u32,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("lesion: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<u8> {
    let client = Client::new(&arguments.api, arguments.api_key.as_deref())?;
    let json = arguments.json;
    match arguments.command {
        Command::Submit { photos, no_describe, callback_url, wait } => {
            let terms = Terms { describe: !no_describe, callback_url };
            submit(&client, &photos, &terms, &wait, json).await
        }
        Command::Result { id, map, wait } => result(&client, id, map.as_deref(), &wait, json).await,
        Command::Ask(ask) => ask::run(&client, ask, json).await,
        Command::List { limit } => {
            for result in client.list(limit).await? {
                if json { show::json(None, &result)? } else { show::line(&result) }
            }
            Ok(0)
        }
        Command::Keys(command) => keys::run(&client, command, json).await,
        Command::DeadLetters(command) => redrive::run(&client, command, json).await,
        Command::Redrive { ids } => redrive::jobs(&client, &ids, json).await,
        Command::Delete { ids } => {
            for id in ids {
                client.delete(id).await.with_context(|| id.to_string())?;
                if !json {
                    say!("{id} deleted");
                }
            }
            Ok(0)
        }
    }
}

/// What is wanted of each photo.
struct Terms {
    describe: bool,
    callback_url: Option<String>,
}

async fn submit(client: &Client, photos: &[PathBuf], terms: &Terms, wait: &Wait, json: bool) -> anyhow::Result<u8> {
    let mut code = 0;
    let mut submitted = Vec::new();
    for photo in photos {
        // One photo that cannot be sent must not keep the others back.
        match send(client, photo, terms).await {
            Ok(id) => submitted.push((photo, id)),
            Err(error) => {
                eprintln!("lesion: {}: {error:#}", photo.display());
                code = 1;
            }
        }
    }
    if !wait.wait {
        for (photo, id) in submitted {
            match json {
                true => say!("{}", serde_json::json!({"photo": photo, "request_id": id})),
                false => say!("{id} {}", photo.display()),
            }
        }
        return Ok(code);
    }
    let deadline = Instant::now() + Duration::from_secs(wait.timeout.into());
    let mut progress = Progress::new(submitted.len());
    let mut results = Vec::new();
    for (photo, id) in submitted {
        let name = photo.display().to_string();
        match settle(client, id, deadline, |result| progress.show(&name, result)).await {
            Ok(result) => results.push((name, result)),
            Err(error) => {
                eprintln!("lesion: {name}, {id}: {error}");
                code = 1;
            }
        }
        progress.done();
    }
    progress.clear();
    for (name, result) in &results {
        if json { show::json(Some(name), result)? } else { show::table(name, result) }
    }
    Ok(results.iter().map(|(_, result)| exit_code(result)).fold(code, u8::max))
}

async fn send(client: &Client, photo: &PathBuf, terms: &Terms) -> anyhow::Result<Uuid> {
    let bytes = std::fs::read(photo)?;
    Ok(client.submit(bytes, terms.describe, terms.callback_url.as_deref()).await?)
}

async fn result(client: &Client, id: Uuid, map: Option<&Path>, wait: &Wait, json: bool) -> anyhow::Result<u8> {
    let result = if wait.wait {
        let mut progress = Progress::new(1);
        let deadline = Instant::now() + Duration::from_secs(wait.timeout.into());
        let result = settle(client, id, deadline, |result| progress.show(&id.to_string(), result)).await?;
        progress.clear();
        result
    } else {
        client.result(id, None, Duration::ZERO).await?.context("the API answered nothing")?.0
    };
    if json {
        show::json(None, &result)?
    } else {
        show::table(&id.to_string(), &result)
    }
    if let Some(file) = map {
        save_map(client, &result, file).await?;
    }
    // An open job is no failure where nobody asked to wait.
    Ok(if result.status.is_open() && !wait.wait { 0 } else { exit_code(&result) })
}

async fn save_map(client: &Client, result: &JobResult, file: &Path) -> anyhow::Result<()> {
    let Outcome::Photo(PhotoOutcome { map: Some(map), .. }) = &result.outcome else {
        let why = "the job is still open, the model gave no label or draws none, or the photo has expired";
        bail!("there is no map: {why}");
    };
    let png = client.download(&map.url).await?;
    std::fs::write(file, png).with_context(|| file.display().to_string())?;
    eprintln!("{}: {}", file.display(), map.note);
    Ok(())
}

/// Long-polls until the job has ended or `deadline` has passed, telling `seen` of every change. The job goes on
/// while the API cannot be reached, so it is waited for then as well.
async fn settle(
    client: &Client,
    id: Uuid,
    deadline: Instant,
    mut seen: impl FnMut(&JobResult),
) -> Result<JobResult, Problem> {
    let mut known: Option<(JobResult, String)> = None;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let etag = known.as_ref().map(|(_, etag)| etag.as_str());
        // However long the pauses between its tries are.
        let look = timeout_at(deadline.max(Instant::now()) + LAST_LOOK, client.result(id, etag, left));
        match look.await.unwrap_or_else(|_| Err(client.unreachable())) {
            Ok(Some(changed)) => {
                seen(&changed.0);
                known = Some(changed);
            }
            Ok(None) => {}
            Err(problem) if problem.is_passing() && !left.is_zero() => {
                eprintln!("lesion: {problem}; the job goes on, and is asked for again");
                sleep(UNREACHABLE_PAUSE.min(left)).await;
            }
            Err(problem) => return Err(problem),
        }
        if let Some((result, _)) = &known
            && (!result.status.is_open() || left.is_zero())
        {
            return Ok(result.clone());
        }
    }
}

fn exit_code(result: &JobResult) -> u8 {
    match result.status {
        Status::Completed => 0,
        Status::NeedsRetake => 3,
        Status::Failed => 4,
        Status::Pending | Status::Processing | Status::AwaitingDescription => 5,
    }
}
