//! `lesion dead-letters` and `lesion redrive`: what was given up, once more.

use anyhow::Context;
use clap::Subcommand;
use shared::api::admin::{RedriveDeadLetters, RedrivenDeadLetters};
use uuid::Uuid;

use crate::client::Client;

#[derive(Subcommand)]
pub(crate) enum Command {
    /// List messages that were received too often and given up.
    List,
    /// Put messages back into the queue: those with these ids, or all.
    Redrive {
        /// As `dead-letters list` shows them.
        ids: Vec<String>,
    },
}

pub(crate) async fn run(client: &Client, command: Command, json: bool) -> anyhow::Result<u8> {
    match command {
        Command::List => {
            for letter in client.dead_letters().await?.dead_letters {
                if json {
                    say!("{}", serde_json::to_string(&letter)?);
                    continue;
                }
                let sent = letter.sent_at.format("%Y-%m-%d %H:%M");
                let about = match (&letter.kind, letter.job_id) {
                    (Some(kind), Some(id)) => format!("{kind} {id}"),
                    _ => format!("unreadable, {} bytes", letter.size_bytes),
                };
                say!("{} sent {sent}, received {} times, {about}", letter.id, letter.receive_count);
            }
        }
        Command::Redrive { ids } => {
            let ids = (!ids.is_empty()).then_some(ids);
            let (chosen, mut answer) = (RedriveDeadLetters { ids }, RedrivenDeadLetters { redriven: 0 });
            // One call on AWS moves some hundreds.
            loop {
                let RedrivenDeadLetters { redriven } = client.redrive_dead_letters(&chosen).await?;
                answer.redriven += redriven;
                if redriven == 0 || chosen.ids.is_some() {
                    break;
                }
            }
            if json {
                say!("{}", serde_json::to_string(&answer)?);
            } else {
                say!("{} back in the queue", answer.redriven);
            }
        }
    }
    Ok(0)
}

/// Sends failed jobs round again.
pub(crate) async fn jobs(client: &Client, ids: &[Uuid], json: bool) -> anyhow::Result<u8> {
    for &id in ids {
        let job = client.redrive(id).await.with_context(|| id.to_string())?;
        if json {
            say!("{}", serde_json::to_string(&job)?);
        } else {
            say!("{id} {}", job.status.as_str());
        }
    }
    Ok(0)
}
