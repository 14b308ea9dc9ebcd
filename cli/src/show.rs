//! What a person sees: a table, a bar, a line of progress.

use std::fmt::Arguments;
use std::io::{ErrorKind, IsTerminal, Write, stdout};
use std::process::exit;

use shared::api::{JobResult, Outcome, PhotoOutcome, PromptOutcome};
use shared::job::{AbstainReason, DescriptionSource, RetakeReason, Status};

const BAR_CELLS: f64 = 20.0;
const TEXT_COLUMNS: usize = 88;

/// Where things stand: one line that is written over on a terminal, a line per change in a pipe.
pub(crate) struct Progress {
    of: usize,
    done: usize,
    terminal: bool,
}

impl Progress {
    pub(crate) fn new(of: usize) -> Self {
        Self { of, done: 0, terminal: std::io::stderr().is_terminal() }
    }

    pub(crate) fn show(&mut self, name: &str, result: &JobResult) {
        let (number, of, status) = (self.done + 1, self.of, result.status.as_str());
        if self.terminal {
            eprint!("\r\x1b[K[{number}/{of}] {name}: {status}");
            let _ = std::io::stderr().flush();
        } else {
            eprintln!("[{number}/{of}] {name}: {status}");
        }
    }

    pub(crate) fn done(&mut self) {
        self.done += 1;
    }

    pub(crate) fn clear(&self) {
        if self.terminal {
            eprint!("\r\x1b[K");
        }
    }
}

/// A line for whoever reads. Where nobody does any more, what is to be done is done all the same.
pub(crate) fn say(what: Arguments<'_>) {
    let Err(error) = writeln!(stdout(), "{what}") else { return };
    if error.kind() != ErrorKind::BrokenPipe {
        eprintln!("lesion: the output cannot be written: {error}");
        exit(1);
    }
}

/// One object a line; `photo` is the file that was submitted.
pub(crate) fn json(photo: Option<&str>, result: &JobResult) -> serde_json::Result<()> {
    let mut value = serde_json::to_value(result)?;
    if let Some(photo) = photo {
        value["photo"] = photo.into();
    }
    say!("{value}");
    Ok(())
}

/// A job in one line, for lists.
pub(crate) fn line(result: &JobResult) {
    let created = result.created_at.format("%Y-%m-%d %H:%M");
    say!("{} {created} {:<20} {}", result.request_id, result.status.as_str(), summary(result));
}

/// A job with its bars, description and timings, or with its answer.
pub(crate) fn table(name: &str, result: &JobResult) {
    say!("{name}");
    say!("  state        {}", result.status.as_str());
    say!("  id           {}", result.request_id);
    match &result.outcome {
        Outcome::Photo(outcome) => photo(result, outcome),
        Outcome::Prompt(outcome) => prompt(result, outcome),
    }
    say!("  timings      {}\n", timings(result));
}

fn prompt(result: &JobResult, outcome: &PromptOutcome) {
    let Some(content) = &outcome.content else { return say!("  outcome      {}", summary(result)) };
    // As it is: line breaks and code are the LLM's.
    for (row, line) in content.lines().enumerate() {
        say!("  {:<12} {line}", if row == 0 { "answer" } else { "" });
    }
    say!("  ended by     {}", outcome.finish_reason.as_deref().unwrap_or("unknown"));
    let count = |tokens: Option<u64>| tokens.map_or("unknown".to_owned(), |tokens| tokens.to_string());
    if let Some(usage) = &outcome.token_usage {
        say!("  tokens       {} in, {} out", count(usage.prompt_tokens), count(usage.completion_tokens));
    }
    if let Some(cost) = outcome.cost_usd {
        say!("  cost         ${cost:.6}");
    }
}

fn photo(result: &JobResult, outcome: &PhotoOutcome) {
    if outcome.predictions.is_empty() {
        say!("  outcome      {}", summary(result));
    }
    let shown = outcome.predictions.iter().filter(|prediction| prediction.probability >= 0.05);
    for (row, prediction) in shown.enumerate() {
        let title = if row == 0 { "prediction" } else { "" };
        say!(
            "  {title:<12} {} {:>8}  {}",
            bar(prediction.probability),
            percent(prediction.probability),
            prediction.name
        );
    }
    if let Some(description) = &outcome.description {
        let title = match description.source {
            DescriptionSource::Llm => "by the LLM",
            DescriptionSource::Template => "by template",
        };
        for (row, text) in wrapped(&description.text).iter().enumerate() {
            say!("  {:<12} {text}", if row == 0 { title } else { "" });
        }
    }
}

/// Never a rounded 0 or 100: the model is sure of nothing.
fn percent(probability: f64) -> String {
    match probability * 100.0 {
        p if p < 0.1 => "< 0.1 %".to_owned(),
        p if p > 99.9 => "> 99.9 %".to_owned(),
        p => format!("{p:.1} %"),
    }
}

fn summary(result: &JobResult) -> String {
    if let Some(error) = &result.error {
        return error.message.clone();
    }
    let outcome = match &result.outcome {
        Outcome::Photo(outcome) => outcome,
        Outcome::Prompt(_) if result.status == Status::Completed => return "answered".to_owned(),
        Outcome::Prompt(_) => return "not answered yet".to_owned(),
    };
    if let Some(abstained) = outcome.abstained {
        return match abstained.reason {
            AbstainReason::LowConfidence => "no label: the model is not sure enough".to_owned(),
            AbstainReason::OutOfDistribution => {
                "no label: this does not look like the photos the model knows".to_owned()
            }
        };
    }
    match (result.status, &outcome.quality, outcome.predictions.first()) {
        (Status::NeedsRetake, Some(quality), _) => {
            let reasons: Vec<_> = quality.reasons.iter().map(|reason| advice(*reason)).collect();
            format!("take the photo again: {}", reasons.join("; "))
        }
        (_, _, Some(first)) => format!("{} {}", first.name, percent(first.probability)),
        _ => "not finished yet".to_owned(),
    }
}

fn advice(reason: RetakeReason) -> &'static str {
    match reason {
        RetakeReason::TooSmall => "it has too few pixels, go closer or send a larger one",
        RetakeReason::Blurred => "it is blurred, hold still and let the camera focus",
        RetakeReason::TooDark => "it is too dark, add light",
        RetakeReason::TooBright => "it is too bright, avoid flash and direct sun",
        RetakeReason::LowContrast => "it shows hardly any contrast, wipe the lens and light evenly",
    }
}

fn bar(probability: f64) -> String {
    let full = (probability * BAR_CELLS).round() as usize;
    format!("{}{}", "█".repeat(full), "░".repeat(BAR_CELLS as usize - full.min(BAR_CELLS as usize)))
}

fn timings(result: &JobResult) -> String {
    let timings = &result.timings_ms;
    let stages = [
        ("queued", timings.queued),
        ("decode", timings.decode),
        ("quality", timings.quality),
        ("preprocess", timings.preprocess),
        ("inference", timings.inference),
        ("describe", timings.describe),
        ("total", timings.total),
    ];
    let known = stages.iter().filter_map(|(name, millis)| Some(format!("{name} {:.1} ms", (*millis)?)));
    known.collect::<Vec<_>>().join(" · ")
}

/// Breaks a text at blanks.
fn wrapped(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let fits = lines
            .last()
            .is_some_and(|line| line.is_empty() || line.chars().count() + 1 + word.chars().count() <= TEXT_COLUMNS);
        if !fits {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_probability_is_rounded_to_nothing_or_to_certainty() {
        let shown = [0.0, 0.0009, 0.001, 0.64, 0.9987, 0.999, 0.9997, 1.0].map(percent);
        assert_eq!(shown, ["< 0.1 %", "< 0.1 %", "0.1 %", "64.0 %", "99.9 %", "99.9 %", "> 99.9 %", "> 99.9 %"]);
    }
}
