//! A request for a completion as it came, and as it goes on: only the few fields that the proxy
//! needs are looked at, and only the model's name and the wish for usage are changed. All other
//! bytes stay what they were.

use std::ops::Range;
use std::time::Duration;

use axum::body::Bytes;
use axum::http::{HeaderMap, HeaderName, header};
use memchr::{memchr, memmem};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use shared::error::Error;
use shared::http::body::invalid;
use shared::llm::parts::Parts;

use super::cache::Key;
use super::fields::Fields;

/// What one mention of a picture counts in a bound of the prompt's tokens; a picture has two.
const PICTURE_TOKENS: u64 = 1500;
/// About so many bytes of a prompt or an answer are a token, where nobody has counted.
pub(crate) const TOKEN_BYTES: u64 = 4;
/// About so many tokens a second does a model write, where nobody has seen them.
const UNSEEN_TOKENS: u64 = 50;
/// Nobody answers with more; a bucket counts so many exactly.
pub(crate) const MOST_TOKENS: u64 = 1_000_000_000;
const WITH_USAGE: &str = r#"{"include_usage":true}"#;

/// What tells of the cache in an answer, and lets it be used in a request.
pub(crate) const CACHE: HeaderName = HeaderName::from_static("x-cache");

/// What the client wants of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    /// That what is the same each time anyway comes from there.
    Default,
    /// `x-cache: use`: that this request's answer does, be it another each time.
    Use,
    /// `cache-control: no-cache` or `no-store`: to be asked anew, and not kept.
    Avoid,
}

impl Wish {
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let has = |name: HeaderName, word: &str| {
            let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
            values.flat_map(|value| value.split(',')).any(|value| value.trim().eq_ignore_ascii_case(word))
        };
        match () {
            () if has(header::CACHE_CONTROL, "no-cache") || has(header::CACHE_CONTROL, "no-store") => Self::Avoid,
            () if has(CACHE, "use") => Self::Use,
            () => Self::Default,
        }
    }
}

/// A request that can be passed on.
#[derive(Debug)]
pub(crate) struct Asked {
    body: Bytes,
    /// The alias.
    pub(crate) model: String,
    pub(crate) stream: bool,
    /// Whether the client wants the chunk with the usage that ends a stream.
    pub(crate) wants_usage: bool,
    /// No more than so many tokens are in the prompt: a token has at least a byte, and pictures are
    /// counted apart.
    pub(crate) most_prompt_tokens: u64,
    /// What the client lets all choices together have at most.
    pub(crate) max_completion_tokens: Option<u64>,
    /// How many answers are asked for.
    pub(crate) choices: u64,
    /// The same request has the same answer, as far as a model can.
    deterministic: bool,
    /// The model's name, quotes included.
    name: Range<usize>,
    usage: Edit,
}

/// How the upstream is asked for usage.
#[derive(Debug)]
enum Edit {
    /// It answers whole, and says it anyway; or it is asked already.
    None,
    /// This part of the body is replaced.
    Replace(Range<usize>, &'static str),
    /// This is written there.
    Insert(usize, &'static str),
}

#[derive(Deserialize)]
struct StreamOptions<'a> {
    #[serde(borrow, default, deserialize_with = "as_it_is")]
    include_usage: Option<&'a RawValue>,
}

/// A field that is there, be it null: `Option` alone would take that for absent.
fn as_it_is<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

impl Asked {
    /// # Errors
    /// 400 where the body is no object, or one of the few fields is not what it must be.
    pub(crate) fn read(body: Bytes) -> Result<Self, Error> {
        let text = std::str::from_utf8(&body).map_err(|_| invalid("The body is not UTF-8."))?;
        // serde takes an array of a struct's fields for the struct.
        if !text.trim_start().starts_with('{') {
            return Err(invalid("The body is no JSON object."));
        }
        // serde's own message may repeat a value.
        let fields: Fields<'_> = serde_json::from_str(text).map_err(|error| {
            let (kind, line, column) = (error.classify(), error.line(), error.column());
            invalid(format!("The body is not valid: {kind:?} at line {line}, column {column}."))
        })?;
        let name = fields.model.ok_or_else(|| invalid("\"model\" is missing; GET /v1/models lists them."))?;
        let model: String = serde_json::from_str(name.get()).map_err(|_| invalid("\"model\" is no string."))?;
        let stream = fields.stream.unwrap_or(false);
        let (wants_usage, usage) = if stream { usage(text, fields.stream_options)? } else { (true, Edit::None) };
        let choices = fields.n.unwrap_or(1).max(1);
        // To some servers 0 is no bound.
        let max_tokens = fields.max_completion_tokens.max(fields.max_tokens).filter(|tokens| *tokens > 0);
        Ok(Self {
            model,
            stream,
            wants_usage,
            most_prompt_tokens: most_tokens(text),
            max_completion_tokens: max_tokens.map(|tokens| tokens.saturating_mul(choices)),
            choices,
            deterministic: fields.temperature.is_some_and(|value| value.get().parse() == Ok(0.0)),
            name: place(text, name),
            usage,
            body,
        })
    }

    /// Under which the answer may be kept for `caller`, if it may.
    pub(crate) fn key(&self, caller: &str, wish: Wish) -> Option<Key> {
        let may = !self.stream && (wish == Wish::Use || wish == Wish::Default && self.deterministic);
        may.then(|| Key::of(caller, &self.body))
    }

    /// About so many tokens are in the prompt, where nobody has counted.
    pub(crate) fn about_prompt_tokens(&self) -> u64 {
        self.most_prompt_tokens.div_ceil(TOKEN_BYTES)
    }

    /// About so many tokens were written in a time in which none came: of an answer in one piece, any; of a stream,
    /// none.
    pub(crate) fn about_unseen_tokens(&self, time: Duration) -> u64 {
        if self.stream { 0 } else { (time.as_secs() * UNSEEN_TOKENS).saturating_mul(self.choices) }
    }

    /// The body for the upstream, which calls the model `name`.
    pub(crate) fn body_for(&self, name: &str) -> Parts {
        let name = Bytes::from(serde_json::Value::from(name).to_string());
        let mut edits = vec![(self.name.clone(), name)];
        match &self.usage {
            Edit::None => {}
            Edit::Replace(range, text) => edits.push((range.clone(), Bytes::from_static(text.as_bytes()))),
            Edit::Insert(at, text) => edits.push((*at..*at, Bytes::from_static(text.as_bytes()))),
        }
        edits.sort_by_key(|(range, _)| range.start);
        let mut parts = Vec::with_capacity(2 * edits.len() + 1);
        let mut from = 0;
        for (range, text) in edits {
            parts.extend([self.body.slice(from..range.start), text]);
            from = range.end;
        }
        parts.push(self.body.slice(from..));
        parts.into_iter().collect()
    }
}

/// Whether the client asks for the usage of a stream, and what must be changed for it to be told.
fn usage(text: &str, options: Option<&RawValue>) -> Result<(bool, Edit), Error> {
    let Some(options) = options else {
        let at = text.find('{').map_or(0, |brace| brace + 1);
        return Ok((false, Edit::Insert(at, r#""stream_options":{"include_usage":true},"#)));
    };
    let all = place(text, options);
    if options.get() == "null" {
        return Ok((false, Edit::Replace(all, WITH_USAGE)));
    }
    let wrong = || invalid("\"stream_options\" is not an object such as {\"include_usage\": true}.");
    if !options.get().starts_with('{') {
        return Err(wrong());
    }
    let fields: StreamOptions<'_> = serde_json::from_str(options.get()).map_err(|_| wrong())?;
    Ok(match fields.include_usage {
        Some(asked) if asked.get() == "true" => (true, Edit::None),
        Some(not) => (false, Edit::Replace(place(text, not), "true")),
        None if options.get()[1..].trim_start() == "}" => (false, Edit::Replace(all, WITH_USAGE)),
        None => (false, Edit::Insert(all.start + 1, r#""include_usage":true,"#)),
    })
}

/// Where in `text` a value that was borrowed from it lies.
fn place(text: &str, value: &RawValue) -> Range<usize> {
    let start = value.get().as_ptr().addr() - text.as_ptr().addr();
    start..start + value.get().len()
}

/// No tokenizer makes more tokens than there are bytes. The bytes of pictures that are sent along are
/// none of the prompt's; nobody's pictures cost what their base64 is long.
fn most_tokens(text: &str) -> u64 {
    let (text, name) = (text.as_bytes(), memmem::Finder::new("url\""));
    let (mut from, mut data, mut pictures) = (0, 0, 0);
    // Once over the text, but for the pictures, of which only the end is looked for.
    while let Some(at) = name.find(&text[from..]) {
        let (before, after) = text[from..].split_at(at);
        from += at + name.needle().len();
        pictures += u64::from(before.ends_with(b"\"image_"));
        let value = [b"url\":\"data:".as_slice(), b"url\": \"data:"].into_iter().find(|start| after.starts_with(start));
        if let Some(start) = value.filter(|_| before.ends_with(b"\"")) {
            let bytes = &after[start.len()..];
            let length = memchr(b'"', bytes).unwrap_or(bytes.len());
            data += length;
            from += start.len() - name.needle().len() + length;
        }
    }
    (text.len() - data) as u64 + pictures * PICTURE_TOKENS
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, HttpBody, to_bytes};
    use futures_util::FutureExt;

    use super::*;

    fn read(body: &str) -> Asked {
        Asked::read(Bytes::copy_from_slice(body.as_bytes())).unwrap()
    }

    #[track_caller]
    fn check(body: &str, name: &str, expected: &str) {
        let parts = read(body).body_for(name);
        assert_eq!(parts.size_hint().exact(), Some(expected.len() as u64));
        let sent = to_bytes(Body::new(parts), usize::MAX).now_or_never().unwrap().unwrap();
        assert_eq!(std::str::from_utf8(&sent).unwrap(), expected);
    }

    #[test]
    fn nothing_but_the_models_name_is_changed_in_a_plain_request() {
        check(
            r#" { "seed":1.0e2 ,"model" : "fast","x": {"model": "é\u00e9"}, "logit_bias":{"1":  -0}, "x":1 } "#,
            "gpt \"4\"",
            r#" { "seed":1.0e2 ,"model" : "gpt \"4\"","x": {"model": "é\u00e9"}, "logit_bias":{"1":  -0}, "x":1 } "#,
        );
        check(r#"{"model":"fast"}"#, "", r#"{"model":""}"#);
        // An escaped name of a field is that field.
        check(r#"{"mod\u0065l":"fast"}"#, "a", r#"{"mod\u0065l":"a"}"#);
        check(r#"{"model":"fast","stream_options":null}"#, "a", r#"{"model":"a","stream_options":null}"#);
    }

    #[test]
    fn a_stream_is_always_asked_for_its_usage() {
        for (options, wants_usage, expected) in [
            ("", false, r#"{"stream_options":{"include_usage":true},"model":"a","stream":true}"#),
            (
                r#","stream_options":null"#,
                false,
                r#"{"model":"a","stream":true,"stream_options":{"include_usage":true}}"#,
            ),
            (
                r#","stream_options":{ }"#,
                false,
                r#"{"model":"a","stream":true,"stream_options":{"include_usage":true}}"#,
            ),
            (
                r#","stream_options":{"x":1}"#,
                false,
                r#"{"model":"a","stream":true,"stream_options":{"include_usage":true,"x":1}}"#,
            ),
            (
                r#","stream_options":{"x":1,"include_usage": false }"#,
                false,
                r#"{"model":"a","stream":true,"stream_options":{"x":1,"include_usage": true }}"#,
            ),
            (
                r#","stream_options":{"include_usage":true}"#,
                true,
                r#"{"model":"a","stream":true,"stream_options":{"include_usage":true}}"#,
            ),
        ] {
            let body = format!(r#"{{"model":"fast","stream":true{options}}}"#);
            check(&body, "a", expected);
            assert_eq!(read(&body).wants_usage, wants_usage, "{body}");
        }
    }

    #[test]
    fn what_the_proxy_cannot_read_is_refused_and_never_repeated() {
        for body in [
            "",
            "[]",
            r#"["secret"]"#,
            r#"{"model": 7}"#,
            r#"{"messages": "secret"}"#,
            r#"{"model": "secret", "model": "secret"}"#,
            r#"{"model": "secret", "stream": "yes"}"#,
            r#"{"model": "secret", "stream": true, "stream_options": ["secret"]}"#,
            r#"{"model": "secret", "stream": true, "stream_options": {"include_usage": true, "include_usage": false}}"#,
            r#"{"model": "secret", "max_tokens": -1}"#,
            r#"{"model": "secret", "stream": null, "stream": true}"#,
            r#"{"model": "secret", "Model": "secret"}"#,
            r#"{"model": "secret", "MAX_TOKENS": 9}"#,
            r#"{"model": "secret", "stream_Options": {}}"#,
            "{\"model\": \"secret\", \"max_token\u{17f}\": 9}",
            r#"{"model": "secret", "#,
        ] {
            let error = Asked::read(Bytes::copy_from_slice(body.as_bytes())).unwrap_err();
            assert_eq!(error.http_status(), 400, "{body}");
            assert!(!error.message().contains("secret"), "{error}");
        }
        assert_eq!(Asked::read(Bytes::from_static(b"{\"model\": \"\xff\"}")).unwrap_err().http_status(), 400);
    }

    #[test]
    fn a_picture_counts_as_one_and_not_as_its_bytes() {
        let text = r#"{"model":"a","messages":[{"role":"user","content":"hello"}]}"#;
        assert_eq!(read(text).most_prompt_tokens, text.len() as u64);
        let picture = "A".repeat(100_000);
        for colon in [":", ": "] {
            let part =
                format!(r#"{{"type":"image_url","image_url":{{"url"{colon}"data:image/png;base64,{picture}"}}}}"#);
            let body = format!(r#"{{"model":"a","messages":[{{"role":"user","content":[{part},{part}]}}]}}"#);
            // Two mentions each, and what is around the pictures.
            let counted = read(&body).most_prompt_tokens;
            assert!((6000..6400).contains(&counted), "{counted}");
        }
        for text in ["\\\"url\\\":\\\"data:", "url\\\": \\\"data:", "curl\\\""] {
            let body = format!(r#"{{"model":"a","messages":[{{"role":"user","content":"{text}{picture}"}}]}}"#);
            assert_eq!(read(&body).most_prompt_tokens, body.len() as u64, "{text}");
        }
    }

    #[test]
    fn the_bound_of_an_answer_is_for_all_its_choices() {
        let bound = |body: &str| (read(body).max_completion_tokens, read(body).choices);
        assert_eq!(bound(r#"{"model":"a"}"#), (None, 1));
        assert_eq!(bound(r#"{"model":"a","max_tokens":7,"n":3}"#), (Some(21), 3));
        // Which of them a server heeds is not known.
        assert_eq!(bound(r#"{"model":"a","max_tokens":7,"max_completion_tokens":9}"#), (Some(9), 1));
        assert_eq!(bound(r#"{"model":"a","max_tokens":9,"max_completion_tokens":7}"#), (Some(9), 1));
    }
}
