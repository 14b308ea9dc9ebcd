//! Hostile requests, from a fixed seed: what goes to the server is what came, but for the model's name and the wish
//! for usage, or the client is answered 400.

use std::fmt;

use axum::body::{Body, Bytes, to_bytes};
use futures_util::FutureExt;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::request::Asked;

const DAMAGED: u32 = 20_000;
const ASSEMBLED: u32 = 20_000;
/// The server's name for the model, and how it is written in JSON.
const NAME: &str = "tiny \"7\"\\é";
const NAME_WRITTEN: &str = r#""tiny \"7\"\\é""#;

/// Ways to say which model.
const MODELS: [&str; 9] = [
    r#""model":"fast""#,
    r#""model" : "fast""#,
    r#""mod\u0065l":"f\u0061st""#,
    r#""\u006do\u0064el":"{\"model\":\"x\"}""#,
    r#""model":"""#,
    r#""model":"}{,\\\"""#,
    r#""model":7"#,
    r#""model":null"#,
    r#""model":"\ud800""#,
];
/// What else may stand in a request; some of it in no valid one.
const OTHERS: [&str; 40] = [
    r#""Model":"other""#,
    r#""model ":"other""#,
    r#""mod\u0000el":"other""#,
    r#""stream":true"#,
    r#""stream": true"#,
    r#""stre\u0061m":true"#,
    r#""stream":true,"stream":false"#,
    r#""stream":false"#,
    r#""stream":null"#,
    r#""stream":"true""#,
    r#""stream_options":null"#,
    r#""stream_options":{}"#,
    "\"stream_options\":{ \t\r\n}",
    r#""stream_options":{"include_usage":true}"#,
    r#""stream_options":{ "include_usage" : false , "x":[{}]}"#,
    r#""stream_options":{"include_usage":null}"#,
    r#""stream_options":{"includ\u0065_usage":1e400}"#,
    r#""stream_options":{"x":{"include_usage":false},"model":"nested"}"#,
    r#""stream_options":{"x":"include_usage\":false"}"#,
    r#""stream_options":{"include_usage":true,"include_usage":false}"#,
    r#""stream_options":{"x":1,"x":2}"#,
    r#""stream_options":[true]"#,
    r#""stream\u005foptions":{"include_usage":{"a":"}"}}"#,
    r#""messages":[{"role":"user","content":"{\"model\":\"no\"}","model":"nested","model":"twice"}]"#,
    r#""messages":[{"content":"\ud800 \u0000"}]"#,
    r#""messages":[{"image_url":{"url":"data:image/png;base64,AAAA"}}]"#,
    r#""messages":"\"url\":\"data:""#,
    r#""url":"data:","url": "data:""#,
    r#""seed":1e400"#,
    r#""seed":-0.0000000000000000000000000000000000000000000001E-999"#,
    r#""logit_bias":{"1":-0,"1":123456789012345678901234567890}"#,
    r#""temperature":1e400"#,
    r#""max_tokens":18446744073709551615,"n":3"#,
    r#""max_tokens":18446744073709551616"#,
    r#""":[[[[[[{"":[]}]]]]]]"#,
    r#""x":"\\","y":"\\\"""#,
    "\"x\":\"\u{e9}\u{2028}\u{1f600}\"",
    r#""\ud83d\ude00":true"#,
    r#""\ud800":true"#,
    r#""x":01"#,
];
const SPACES: [&str; 6] = ["", "", "", " ", "\n\t", "\r\n  "];

/// The members of an object in their order, doubled ones too; values as they are written.
struct Members(Vec<Member>);

type Member = (String, String);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Each;

        impl<'de> Visitor<'de> for Each {
            type Value = Members;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, Box<RawValue>>()? {
                    members.push((name, value.get().to_owned()));
                }
                Ok(Members(members))
            }
        }

        deserializer.deserialize_map(Each)
    }
}

#[track_caller]
fn members(text: &[u8]) -> Vec<Member> {
    let members: Result<Members, _> = serde_json::from_slice(text);
    members.unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(text))).0
}

/// The value of the one member of this name.
#[track_caller]
fn only<'a>(members: &'a mut [Member], name: &str) -> Option<&'a mut String> {
    let mut found = members.iter_mut().filter(|(member, _)| member == name).map(|(_, value)| value);
    let first = found.next();
    assert!(found.next().is_none(), "{name} goes on twice");
    first
}

/// The options of a stream that go on: those that came, and the wish for usage.
#[track_caller]
fn check_options(came: Option<&str>, went: &str, asked: &Asked) {
    let mut expected = match came {
        None | Some("null") => Vec::new(),
        Some(options) => members(options.as_bytes()),
    };
    match only(&mut expected, "include_usage") {
        Some(wish) => {
            assert_eq!(asked.wants_usage, wish == "true");
            *wish = "true".to_owned();
        }
        None => {
            assert!(!asked.wants_usage);
            expected.insert(0, ("include_usage".to_owned(), "true".to_owned()));
        }
    }
    assert_eq!(members(went.as_bytes()), expected);
}

/// Whether the request goes on; if so, as what it is.
#[track_caller]
fn goes_on(body: &[u8]) -> bool {
    let asked = match Asked::read(Bytes::copy_from_slice(body)) {
        Ok(asked) => asked,
        Err(error) => {
            assert_eq!(error.http_status(), 400, "{error}");
            return false;
        }
    };
    let sent = to_bytes(Body::new(asked.body_for(NAME)), usize::MAX).now_or_never().unwrap().unwrap();
    let (mut came, mut went) = (members(body), members(&sent));
    let text = String::from_utf8_lossy(body);
    let model = only(&mut came, "model").unwrap();
    assert_eq!(serde_json::from_str::<String>(model).unwrap(), asked.model, "{text}");
    *model = NAME_WRITTEN.to_owned();
    let streams = only(&mut came, "stream").is_some_and(|stream| stream == "true");
    assert_eq!(asked.stream, streams, "{text}");
    if streams {
        let options = only(&mut went, "stream_options").unwrap().clone();
        let asked_options = only(&mut came, "stream_options");
        check_options(asked_options.as_deref().map(String::as_str), &options, &asked);
        match asked_options {
            Some(asked_options) => *asked_options = options,
            None => went.retain(|(name, _)| name != "stream_options"),
        }
    }
    assert_eq!(went, came, "{text}");
    true
}

fn one_of<'a>(random: &mut SmallRng, choices: &[&'a str]) -> &'a str {
    choices[random.random_range(0..choices.len())]
}

/// An object of members from the lists, in any order.
fn assembled(random: &mut SmallRng) -> String {
    let mut members: Vec<_> = (0..random.random_range(0..5)).map(|_| one_of(random, &OTHERS)).collect();
    for _ in 0..=u32::from(random.random_ratio(1, 8)) {
        let at = random.random_range(0..=members.len());
        members.insert(at, one_of(random, &MODELS));
    }
    let mut body = format!("{}{{", one_of(random, &SPACES));
    for (number, member) in members.into_iter().enumerate() {
        let comma = if number == 0 { "" } else { "," };
        body.extend([comma, one_of(random, &SPACES), member, one_of(random, &SPACES)]);
    }
    body.extend(["}", one_of(random, &SPACES)]);
    body
}

/// One or two bytes or stretches are another, missing or doubled.
fn damaged(random: &mut SmallRng, seed: &str) -> Vec<u8> {
    const TELLING: &[u8] = b"\"\\{}[]:, \ntu0\0\xFF";
    let mut bytes = seed.as_bytes().to_vec();
    for _ in 0..random.random_range(1..=2) {
        let at = random.random_range(0..bytes.len());
        let end = (at + random.random_range(1..=16)).min(bytes.len());
        match random.random_range(0..5) {
            0 => bytes[at] = random.random(),
            1 => bytes[at] = TELLING[random.random_range(0..TELLING.len())],
            2 => bytes.insert(at, TELLING[random.random_range(0..TELLING.len())]),
            3 if end - at < bytes.len() => drop(bytes.drain(at..end)),
            _ => {
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
        }
    }
    bytes
}

#[test]
fn what_is_written_oddly_goes_on_as_it_came_and_what_could_be_read_in_two_ways_does_not() {
    for (body, expected) in [
        (r#"{"mod\u0065l":"fast"}"#, true),
        (r#"{"model":"fast","messages":[{"model":"nested","model":"twice"}]}"#, true),
        (r#"{"messages":"{\"model\":\"no\"}","model":"fast"}"#, true),
        ("{\"model\":\"fast\"} \r\n\t ", true),
        (r#"{"model":"fast","seed":1e400,"temperature":1e400}"#, true),
        (r#"{"model":"fast","x":1,"x":2}"#, true),
        (r#"{"model":"fast","stre\u0061m":true,"stream\u005foptions":{"x":"}"}}"#, true),
        (r#"{"model":"fast","model":"fast"}"#, false),
        (r#"{"model":"fast","mod\u0065l":"slow"}"#, false),
        (r#"{"model":"fast","stream":true,"stre\u0061m":false}"#, false),
        (r#"{"model":"fast","stream":true,"stream_options":{},"stream\u005foptions":{}}"#, false),
        (r#"{"model":"fast","stream":true,"stream_options":{"include_usage":true,"includ\u0065_usage":false}}"#, false),
        (r#"{"model":"fast","max_tokens":1e400}"#, false),
        (r#"{"messages":[{"model":"fast"}]}"#, false),
        (r#"{"model":"fast"}{"model":"slow"}"#, false),
        ("{\"model\":\"fast\"}\0", false),
        ("\u{feff}{\"model\":\"fast\"}", false),
        ("\u{a0}{\"model\":\"fast\"}", false),
        ("{\"model\":\"fa\nst\"}", false),
    ] {
        assert_eq!(goes_on(body.as_bytes()), expected, "{body}");
    }
}

#[test]
fn no_hostile_request_goes_on_as_another() {
    let mut random = SmallRng::seed_from_u64(19);
    let mut passed = [0, 0];
    for _ in 0..ASSEMBLED {
        passed[0] += u32::from(goes_on(assembled(&mut random).as_bytes()));
    }
    for _ in 0..DAMAGED {
        let seed = assembled(&mut random);
        passed[1] += u32::from(goes_on(&damaged(&mut random, &seed)));
    }
    println!("{passed:?} of {ASSEMBLED} and {DAMAGED} went on");
    // Both ways are taken often.
    for (passed, all) in passed.into_iter().zip([ASSEMBLED, DAMAGED]) {
        assert!((all / 100..all * 9 / 10).contains(&passed), "{passed} of {all}");
    }
}
