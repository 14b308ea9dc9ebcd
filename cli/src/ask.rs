//! `lesion ask`: a prompt for the LLM, and its answer on standard output.

use std::io::{IsTerminal, Read};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use shared::api::Outcome;
use shared::api::prompt::{AnswerFormat, PromptBody};
use tokio::time::Instant;

use crate::client::Client;
use crate::show::{self, Progress};
use crate::{exit_code, settle};

#[derive(Args)]
#[command(after_help = "Examples:
  lesion ask 'What is a naevus?'                        waits, prints the answer
  lesion ask --system 'Be short.' - < question.txt      the prompt from standard input
  lesion ask --format json 'Three naevi, as JSON' | jq  an answer that parses
  lesion ask --no-wait 'Write a long report'            prints the id at once
  lesion result ID --wait --timeout 900                 and the answer later

The answer is the LLM's own: it is checked against nothing and is no reading of a photo.")]
pub(crate) struct Ask {
    /// What to ask; `-` reads it from standard input.
    prompt: String,
    /// How the LLM is to behave.
    #[arg(long)]
    system: Option<String>,
    /// The longest answer, in tokens, 1 to 100000; the host's setting without.
    #[arg(long)]
    max_tokens: Option<u32>,
    /// 0 (always the likeliest word) to 2; the host's setting without.
    #[arg(long)]
    temperature: Option<f64>,
    /// What the answer must be; one that is not the JSON that was asked for fails the job.
    #[arg(long, value_name = "text|json", value_parser = format, default_value = "text")]
    format: AnswerFormat,
    /// Where the host is to tell of the end, by a webhook.
    #[arg(long, value_name = "URL")]
    callback_url: Option<String>,
    /// Print the id at once instead.
    #[arg(long)]
    no_wait: bool,
    /// How long to wait, in seconds; the job goes on afterwards.
    #[arg(long, default_value_t = 900)]
    timeout: u32,
}

pub(crate) async fn run(client: &Client, ask: Ask, json: bool) -> anyhow::Result<u8> {
    let Ask { prompt, system, max_tokens, temperature, format, callback_url, no_wait, timeout } = ask;
    let prompt = if prompt == "-" { from_stdin()? } else { prompt };
    let body = PromptBody { prompt, system, max_tokens, temperature, format, callback_url };
    let id = client.submit_prompt(&body).await?;
    if no_wait {
        if json {
            say!("{}", serde_json::json!({"request_id": id}))
        } else {
            say!("{id}")
        }
        return Ok(0);
    }
    let mut progress = Progress::new(1);
    let deadline = Instant::now() + Duration::from_secs(timeout.into());
    let result = settle(client, id, deadline, |result| progress.show(&id.to_string(), result)).await?;
    progress.clear();
    if json {
        show::json(None, &result)?;
        return Ok(exit_code(&result));
    }
    match (&result.outcome, &result.error) {
        (Outcome::Prompt(outcome), _) if outcome.content.is_some() => {
            say!("{}", outcome.content.as_deref().unwrap_or(""));
            if outcome.finish_reason.as_deref() == Some("length") {
                eprintln!("lesion: the answer was cut off; --max-tokens asks for a longer one");
            }
        }
        (_, Some(error)) => eprintln!("lesion: {} ({id})", error.message),
        _ => eprintln!("lesion: not answered yet; lesion result {id} --wait"),
    }
    Ok(exit_code(&result))
}

fn from_stdin() -> anyhow::Result<String> {
    if std::io::stdin().is_terminal() {
        eprintln!("lesion: reading the prompt; end it with Ctrl-D");
    }
    let mut prompt = String::new();
    std::io::stdin().read_to_string(&mut prompt).context("the prompt is no text")?;
    if prompt.trim().is_empty() {
        bail!("the prompt is empty");
    }
    Ok(prompt)
}

fn format(text: &str) -> Result<AnswerFormat, String> {
    match text {
        "text" => Ok(AnswerFormat::Text),
        "json" => Ok(AnswerFormat::Json),
        _ => Err("text or json".to_owned()),
    }
}
