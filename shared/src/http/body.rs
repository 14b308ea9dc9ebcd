//! Request bodies, JSON above all: read by the same rules on every route.
//!
//! No error repeats a byte of a body.

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;

use crate::error::{Code, Error};

/// The content type without its parameters, in lower case; empty where there is none.
#[must_use]
pub fn media_type(headers: &HeaderMap) -> String {
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    content_type.unwrap_or("").split(';').next().unwrap_or("").trim().to_ascii_lowercase()
}

/// A JSON object of at most `limit` bytes; `shape` tells the client what was expected.
///
/// # Errors
/// 415 where the content type is another, 413 where it is longer, 400 where it was cut off or is no
/// such object.
pub async fn json<T: DeserializeOwned>(request: Request, limit: usize, shape: &str) -> Result<T, Error> {
    if media_type(request.headers()) != "application/json" {
        return Err(Error::new(Code::UnsupportedMediaType, format!("Send application/json: {shape}.")));
    }
    let too_long = || Error::new(Code::PayloadTooLarge, format!("The body is longer than {} KiB.", limit / 1024));
    object(&bytes(request.into_body(), limit, too_long).await?, shape)
}

/// The whole body, of at most `limit` bytes. Each piece is copied as it comes and let go: the body is never there twice.
///
/// # Errors
/// `too_long` where it is longer, 400 where it was cut off.
pub async fn bytes(body: Body, limit: usize, too_long: impl FnOnce() -> Error) -> Result<Bytes, Error> {
    let expected = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    let mut pieces = body.into_data_stream();
    let mut next = async || pieces.next().await.transpose().map_err(|_| invalid("The body ended early."));
    let Some(first) = next().await? else { return Ok(Bytes::new()) };
    if first.len() > limit || expected > limit {
        return Err(too_long());
    }
    // Most bodies are one piece.
    if first.len() == expected {
        return Ok(first);
    }
    let mut whole = Vec::with_capacity(expected);
    whole.extend_from_slice(&first);
    drop(first);
    while let Some(piece) = next().await? {
        if piece.len() > limit - whole.len() {
            return Err(too_long());
        }
        whole.extend_from_slice(&piece);
    }
    Ok(whole.into())
}

/// One JSON object; `shape` tells the client what was expected.
///
/// # Errors
/// 400 with the place.
pub fn object<T: DeserializeOwned>(bytes: &[u8], shape: &str) -> Result<T, Error> {
    // serde takes an array of a struct's fields for the struct.
    if bytes.trim_ascii_start().first() != Some(&b'{') {
        return Err(invalid(format!("The body is no JSON object. Expected: {shape}.")));
    }
    serde_json::from_slice(bytes).map_err(|error| {
        // serde's own message may repeat a value.
        let place = format!("line {}, column {}", error.line(), error.column());
        invalid(format!("The body is not valid: {:?} error at {place}. Expected: {shape}.", error.classify()))
    })
}

/// 400, with words for the client.
pub fn invalid(message: impl Into<String>) -> Error {
    Error::new(Code::InvalidRequest, message)
}

#[cfg(test)]
mod tests {
    use std::io;

    use futures_util::stream;
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only whether it is read is of interest")]
    struct Named {
        name: String,
    }

    #[test]
    fn what_is_wrong_is_named_and_never_repeated() {
        object::<Named>(b" \n{\"name\": \"x\"}", "{\"name\"}").unwrap();
        for (body, named) in [
            ("", "no JSON object"),
            (r#"["secret"]"#, "no JSON object"),
            (r#""secret""#, "no JSON object"),
            ("{", "Eof error at line 1, column 1"),
            ("{secret", "Syntax"),
            ("{}", "Data"),
            (r#"{"name": 7}"#, "Data"),
            (r#"{"name": "secret", "secret": 1}"#, "Data"),
            (r#"{"name": "x"} secret"#, "Syntax"),
        ] {
            let error = object::<Named>(body.as_bytes(), "{\"name\"}").unwrap_err();
            assert_eq!(error.code(), Code::InvalidRequest, "{body}");
            assert!(error.message().contains(named), "{body}: {}", error.message());
            assert!(error.message().contains("{\"name\"}") && !error.message().contains("secret"), "{body}");
        }
    }

    #[tokio::test]
    async fn a_body_that_is_cut_off_is_no_longer_one() {
        let too_long = || Error::new(Code::PayloadTooLarge, "Long.");
        let cut_off = stream::iter([Ok(Bytes::from_static(b"{")), Err(io::Error::from(io::ErrorKind::UnexpectedEof))]);
        let error = bytes(Body::from_stream(cut_off), 10, too_long).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidRequest);
        let error = bytes(Body::from("x".repeat(11)), 10, too_long).await.unwrap_err();
        assert_eq!(error.code(), Code::PayloadTooLarge);
        assert_eq!(bytes(Body::from("x".repeat(10)), 10, too_long).await.unwrap().len(), 10);
        assert_eq!(bytes(Body::empty(), 10, too_long).await.unwrap().len(), 0);
    }

    #[tokio::test]
    async fn a_body_in_pieces_is_whole_and_no_longer_than_it_may() {
        let too_long = || Error::new(Code::PayloadTooLarge, "Long.");
        let body = |length: usize| {
            let pieces = (0..length).map(|at| Ok::<_, io::Error>(Bytes::from(vec![b'a' + at as u8])));
            Body::from_stream(stream::iter(pieces.collect::<Vec<_>>()))
        };
        assert_eq!(bytes(body(10), 10, too_long).await.unwrap(), "abcdefghij");
        assert_eq!(bytes(body(11), 10, too_long).await.unwrap_err().code(), Code::PayloadTooLarge);
    }
}
