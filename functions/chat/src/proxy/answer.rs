//! What the proxy wants to know of an answer that it passes on: its usage, and whether it is whole.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use shared::llm::sse::Event;

/// What a server says that an answer took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
}

#[derive(Deserialize)]
struct Body<'a> {
    /// Some servers send an error with status 200.
    #[serde(rename = "choices")]
    _choices: Vec<IgnoredAny>,
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(borrow)]
    choices: Option<Vec<Choice<'a>>>,
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
    error: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(default)]
    index: u64,
    #[serde(borrow)]
    delta: Option<&'a RawValue>,
    #[serde(borrow)]
    finish_reason: Option<&'a RawValue>,
}

impl Choice<'_> {
    /// Some servers send an empty reason with every chunk.
    fn ends(&self) -> bool {
        self.finish_reason.is_some_and(|reason| reason.get() != "\"\"")
    }

    /// LiteLLM sends the usage with one of these.
    fn is_empty(&self) -> bool {
        !self.ends() && self.delta.is_none_or(|delta| matches!(delta.get(), "{}" | "null"))
    }
}

/// An answer is good without it, so also with one that is not understood or says half of it.
fn read(usage: Option<&RawValue>) -> Option<Usage> {
    serde_json::from_str(usage?.get()).ok()
}

/// The usage in a whole answer; `None` in the outer place where it is no completion at all.
pub(crate) fn usage_of(body: &[u8]) -> Option<Option<Usage>> {
    serde_json::from_slice::<Body<'_>>(body).ok().map(|body| read(body.usage))
}

/// One event of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Seen {
    /// `[DONE]`.
    Done,
    /// The chunk with the usage and nothing else, which only who asked for it gets.
    UsageAlone(Usage),
    /// A part of the answer. `tokens` are about as many as it has; the choices of these numbers are whole with it.
    Part { tokens: u64, ends: Vec<u64>, usage: Option<Usage> },
    /// The server has given up.
    Error,
    /// Nothing that the proxy understands; passed on.
    Other,
}

/// What `{"content":""}` takes beside the text.
const DELTA_BYTES: u64 = 14;

pub(crate) fn look(event: &Event) -> Seen {
    let data = event.data.trim();
    if data == "[DONE]" {
        return Seen::Done;
    }
    let Ok(Chunk { choices, usage, error }) = serde_json::from_str::<Chunk<'_>>(data) else {
        return if event.name == "error" { Seen::Error } else { Seen::Other };
    };
    if error.is_some() {
        return Seen::Error;
    }
    let usage = read(usage);
    if choices.is_none() && usage.is_none() {
        return Seen::Other;
    }
    let choices = choices.unwrap_or_default();
    match usage {
        Some(usage) if choices.iter().all(Choice::is_empty) => Seen::UsageAlone(usage),
        usage => {
            // Most servers send a token a chunk; where they send more there are about four bytes to one.
            let of = |choice: &Choice<'_>| {
                let bytes = choice.delta.map_or(0, |delta| delta.get().len() as u64);
                (bytes.saturating_sub(DELTA_BYTES) / 4).max(1)
            };
            let ends = choices.iter().filter(|choice| choice.ends()).map(|choice| choice.index).collect();
            Seen::Part { tokens: choices.iter().map(of).sum(), ends, usage }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(data: &str, expected: Seen) {
        assert_eq!(look(&Event { name: String::new(), data: data.to_owned() }), expected, "{data}");
    }

    const USAGE: Usage = Usage { prompt_tokens: 3, completion_tokens: 5 };

    #[test]
    fn the_events_of_a_stream_are_told_apart() {
        let part = |tokens, ends: &[u64], usage| Seen::Part { tokens, ends: ends.to_vec(), usage };
        check("[DONE]", Seen::Done);
        check(r#"{"choices":[{"index":0,"delta":{"content":"Hi"},"finish_reason":null}]}"#, part(1, &[], None));
        check(r#"{"choices":[{"delta":{"content":"Hi"},"finish_reason":""}]}"#, part(1, &[], None));
        check(r#"{"choices":[{"delta":{"content":"some more words than one"}}],"usage":null}"#, part(6, &[], None));
        check(r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#, part(1, &[0], None));
        let numbers = r#""usage":{"prompt_tokens":3,"completion_tokens":5,"total_tokens":8}"#;
        check(&format!(r#"{{"choices":[],{numbers}}}"#), Seen::UsageAlone(USAGE));
        check(&format!(r#"{{"choices":[{{"index":0,"delta":{{}}}}],{numbers}}}"#), Seen::UsageAlone(USAGE));
        check(
            &format!(r#"{{"choices":[{{"delta":{{}},"finish_reason":"stop"}}],{numbers}}}"#),
            part(1, &[0], Some(USAGE)),
        );
        check(r#"{"error":{"message":"x"}}"#, Seen::Error);
        check(r#"{"id":null,"choices":null,"error":{"message":"x"}}"#, Seen::Error);
        let two = r#"{"choices":[{"finish_reason":"stop"},{"index":1,"finish_reason":"length"}]}"#;
        check(two, part(2, &[0, 1], None));
        check(r#"{"object":"error","message":"x"}"#, Seen::Other);
        let odd = r#"{"choices":[{"delta":{"content":"Hi"}}],"usage":{"prompt_tokens":null}}"#;
        check(odd, part(1, &[], None));
        check("no JSON", Seen::Other);
        assert_eq!(look(&Event { name: "error".into(), data: "gone".into() }), Seen::Error);
    }

    #[test]
    fn a_whole_answer_says_its_usage_or_not() {
        let numbers = r#"{"prompt_tokens":3,"completion_tokens":5}"#;
        assert_eq!(usage_of(format!(r#"{{"choices":[{{}}],"usage":{numbers}}}"#).as_bytes()), Some(Some(USAGE)));
        for usage in
            ["null", "7", r#"{"prompt_tokens":null}"#, r#"{"prompt_tokens":12.5}"#, "{}", r#"{"total_tokens":8}"#]
        {
            let body = format!(r#"{{"choices":[],"usage":{usage}}}"#);
            assert_eq!(usage_of(body.as_bytes()), Some(None), "{usage}");
        }
        assert_eq!(usage_of(br#"{"choices":[]}"#), Some(None));
        for other in ["<html>", "[]", r#"{"error":{"message":"busy"}}"#, r#"{"choices":null}"#] {
            assert_eq!(usage_of(other.as_bytes()), None, "{other}");
        }
    }
}
