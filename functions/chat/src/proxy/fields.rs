//! The few fields of a request that the proxy minds.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Error, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// A field that is `null` is there for the server, so no field may come twice.
#[derive(Default)]
pub(super) struct Fields<'a> {
    pub(super) model: Option<&'a RawValue>,
    pub(super) stream: Option<bool>,
    /// With `null` as `null`.
    pub(super) stream_options: Option<&'a RawValue>,
    pub(super) max_tokens: Option<u64>,
    pub(super) max_completion_tokens: Option<u64>,
    pub(super) n: Option<u64>,
    pub(super) temperature: Option<&'a RawValue>,
}

const NAMES: [&str; 7] =
    ["model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n", "temperature"];

/// One of [`NAMES`], or another.
struct Name(Option<usize>);

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
        let Text(text) = Text::deserialize(deserializer)?;
        let found = NAMES.iter().position(|name| folded(&text).eq(name.chars()));
        // Servers written in Go take such a name for the field, and the last one wins.
        if found.is_some_and(|found| NAMES[found] != text) {
            return Err(Error::custom("a field in other letters than it has"));
        }
        Ok(Self(found))
    }
}

/// As Go's `encoding/json` compares names: small letters are the same as large ones, and two signs of Unicode as the
/// letters whose large or small form they are.
fn folded(text: &str) -> impl Iterator<Item = char> {
    text.chars().map(|letter| match letter {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        other => other.to_ascii_lowercase(),
    })
}

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = Fields<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
                let (mut fields, mut seen) = (Fields::default(), [false; NAMES.len()]);
                while let Some(Name(name)) = map.next_key()? {
                    let Some(name) = name else {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    };
                    if std::mem::replace(&mut seen[name], true) {
                        return Err(Error::custom("a field that comes twice"));
                    }
                    match NAMES[name] {
                        "model" => fields.model = map.next_value()?,
                        "stream" => fields.stream = map.next_value()?,
                        "stream_options" => fields.stream_options = Some(map.next_value()?),
                        "max_tokens" => fields.max_tokens = map.next_value()?,
                        "max_completion_tokens" => fields.max_completion_tokens = map.next_value()?,
                        "n" => fields.n = map.next_value()?,
                        _ => fields.temperature = map.next_value()?,
                    }
                }
                Ok(fields)
            }
        }

        deserializer.deserialize_map(Object)
    }
}
