//! The ways in which a photo arrives: JSON, a raw body, a form, or the key of an upload in JSON; and
//! prompts, in JSON.

use axum::body::Body;
use axum::extract::multipart::{Field, MultipartError};
use axum::extract::{FromRequest, Multipart, Query, Request};
use axum::http::StatusCode;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer};
use shared::api::chat::{ChatMessage, Role};
use shared::api::prompt::{AnswerFormat, PromptRequest};
use shared::api::{MAX_PHOTO_BYTES, MAX_UPLOAD_BYTES, yes};
use shared::callback::MAX_URL_BYTES;
use shared::create::check_prompt;
use shared::error::{Code, Error};
use shared::http::body::{bytes, invalid, media_type, object};
use utoipa::ToSchema;

/// A form's boundaries and part headers are small as well.
pub(crate) const MAX_FORM_BYTES: usize = MAX_PHOTO_BYTES + 64 * 1024;
/// Base64 takes four bytes for three, a break of its lines two more of 76, and some write `\/` for its `/`. Escaped
/// once more in Lambda's event all of it stays below the 6 MiB that one may have.
const MAX_JSON_BYTES: usize = MAX_PHOTO_BYTES.div_ceil(3) * 4 + 256 * 1024;

const ONE_OF: &str = "Give \"image\" or \"image_key\", and with it \"describe\"; or \"prompt\" or \"messages\", and with \
    it \"system\", \"max_tokens\", \"temperature\" and \"format\". \"callback_url\" goes with each.";

const FIELDS: &str = "The form's fields are \"image\" (the photo), \"describe\" (true or false) and \"callback_url\".";

/// A photo in the fields of a form.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "the description alone")]
pub struct PhotoForm {
    /// A JPEG, PNG or WebP photo of at most 4 MiB.
    #[schema(content_media_type = "application/octet-stream", min_length = 1)]
    image: String,
    /// Whether a description is wanted: `true`, where it is absent, or `false`.
    #[schema(nullable = false, pattern = "^(true|false)$")]
    describe: Option<String>,
    /// Where to tell of the end over HTTP: a URL of a host that the operator allows.
    #[schema(nullable = false, max_length = 2048, example = "https://hooks.example/lesion")]
    callback_url: Option<String>,
}

/// A photo as it was received, and what is wanted.
#[derive(Debug)]
pub struct Submission {
    pub image: Vec<u8>,
    pub describe: bool,
    /// Where to tell of the end.
    pub callback_url: Option<String>,
}

/// A photo that was uploaded before, and what is wanted.
#[derive(Debug)]
pub struct ImageKey {
    pub image_key: String,
    pub describe: bool,
    /// Where to tell of the end.
    pub callback_url: Option<String>,
}

/// What a body may ask for.
#[derive(Debug)]
pub enum Asked {
    Photo(Submission),
    /// A job of what was uploaded.
    Upload(ImageKey),
    /// An answer of the LLM.
    Prompt {
        request: PromptRequest,
        /// Where to tell of the end.
        callback_url: Option<String>,
    },
}

impl Asked {
    /// Where to tell of the end; as it came, and still to be checked.
    pub(crate) fn callback_url(&mut self) -> Option<&mut String> {
        match self {
            Self::Photo(Submission { callback_url, .. })
            | Self::Upload(ImageKey { callback_url, .. })
            | Self::Prompt { callback_url, .. } => callback_url.as_mut(),
        }
    }
}

/// [`shared::api::SubmitBody`], read so that an error can say where it is.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Json {
    #[serde(default, deserialize_with = "given")]
    image: Option<String>,
    #[serde(default, deserialize_with = "given")]
    image_key: Option<String>,
    #[serde(default, deserialize_with = "given")]
    describe: Option<bool>,
    #[serde(default, deserialize_with = "given")]
    prompt: Option<String>,
    #[serde(default, deserialize_with = "given")]
    messages: Option<Vec<ChatMessage>>,
    system: Option<String>,
    max_tokens: Option<u32>,
    temperature: Option<f64>,
    #[serde(default, deserialize_with = "given")]
    format: Option<AnswerFormat>,
    callback_url: Option<String>,
}

/// A field that may be left out, and may not be null.
fn given<'de, T: Deserialize<'de>, D: Deserializer<'de>>(field: D) -> Result<Option<T>, D::Error> {
    T::deserialize(field).map(Some)
}

impl Json {
    /// Whether one of the fields is there that prompts alone have.
    fn has_settings(&self) -> bool {
        self.system.is_some() || self.max_tokens.is_some() || self.temperature.is_some() || self.format.is_some()
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    #[serde(default = "yes")]
    describe: bool,
    callback_url: Option<String>,
}

/// Reads whichever of the three the content type announces.
///
/// # Errors
/// What is wrong with the body: 400, 413 or 415.
pub async fn read(request: Request) -> Result<Asked, Error> {
    let media_type = media_type(request.headers());
    let has_query = request.uri().query().is_some_and(|query| !query.is_empty());
    match media_type.as_str() {
        "application/json" | "multipart/form-data" if has_query => {
            Err(invalid("Only raw bodies take query parameters; put \"describe\" into the body."))
        }
        "application/json" => from_json(request.into_body()).await,
        "multipart/form-data" => from_form(request).await.map(Asked::Photo),
        "application/octet-stream" => from_raw(request).await.map(Asked::Photo),
        other if other.starts_with("image/") => from_raw(request).await.map(Asked::Photo),
        _ => Err(Error::new(
            Code::UnsupportedMediaType,
            "Send the photo as image/jpeg, image/png, image/webp, multipart/form-data or application/json.",
        )),
    }
}

async fn from_json(body: Body) -> Result<Asked, Error> {
    let shape = r#"{"image": base64, "describe": bool} or {"prompt": text, ...}"#;
    let mut body: Json = object(&bytes(body, MAX_JSON_BYTES, too_large).await?, shape)?;
    let image = match (body.image.take(), body.image_key.take(), body.prompt.take(), body.messages.take()) {
        (Some(image), None, None, None) if !body.has_settings() => image,
        (None, Some(image_key), None, None) if !body.has_settings() => {
            let (describe, callback_url) = (body.describe.unwrap_or(true), body.callback_url);
            return Ok(Asked::Upload(ImageKey { image_key, describe, callback_url }));
        }
        (None, None, Some(content), None) => return asked(vec![ChatMessage { role: Role::User, content }], body),
        (None, None, None, Some(messages)) => return asked(messages, body),
        _ => return Err(invalid(ONE_OF)),
    };
    // Android's encoder breaks lines, a browser's canvas gives a data URL.
    let text = image.split_once(";base64,").filter(|(scheme, _)| scheme.starts_with("data:"));
    let mut text = text.map_or(image.as_str(), |(_, text)| text).to_owned();
    text.retain(|letter| !letter.is_ascii_whitespace());
    let image = STANDARD.decode(text).map_err(|_| invalid("\"image\" is not standard base64."))?;
    checked(image, body.describe.unwrap_or(true), body.callback_url).map(Asked::Photo)
}

fn asked(messages: Vec<ChatMessage>, body: Json) -> Result<Asked, Error> {
    let Json { describe, system, max_tokens, temperature, format, callback_url, .. } = body;
    if describe.is_some() {
        return Err(invalid(ONE_OF));
    }
    let format = format.unwrap_or_default();
    let request = PromptRequest { messages, max_tokens, temperature, format }.with_system(system);
    check_prompt(&request)?;
    Ok(Asked::Prompt { request, callback_url })
}

async fn from_raw(request: Request) -> Result<Submission, Error> {
    let parameters = Query::<Parameters>::try_from_uri(request.uri());
    let Query(parameters) =
        parameters.map_err(|_| invalid("The query parameters are describe=true|false and callback_url."))?;
    let image = bytes(request.into_body(), MAX_PHOTO_BYTES, too_large).await?;
    checked(image.to_vec(), parameters.describe, parameters.callback_url)
}

async fn from_form(request: Request) -> Result<Submission, Error> {
    let form = Multipart::from_request(request, &()).await;
    let mut form = form.map_err(|_| invalid("The multipart body has no valid boundary."))?;
    let (mut image, mut describe, mut callback_url) = (None, true, None);
    while let Some(mut field) = form.next_field().await.map_err(broken_form)? {
        match field.name() {
            Some("image") => image = Some(part(&mut field, MAX_PHOTO_BYTES).await?),
            Some("describe") => {
                let text = part(&mut field, 16).await?;
                describe = match text.as_slice() {
                    b"true" => true,
                    b"false" => false,
                    _ => return Err(invalid("The field \"describe\" must be true or false.")),
                };
            }
            Some("callback_url") => {
                // Its own limit is checked with the rest of it.
                let text = part(&mut field, 2 * MAX_URL_BYTES).await?;
                let text = String::from_utf8(text).map_err(|_| invalid("The field \"callback_url\" is no UTF-8."))?;
                callback_url = Some(text);
            }
            _ => return Err(invalid(FIELDS)),
        }
    }
    let image = image.ok_or_else(|| invalid("The form has no field \"image\"."))?;
    checked(image, describe, callback_url)
}

async fn part(field: &mut Field<'_>, limit: usize) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    while let Some(chunk) = field.chunk().await.map_err(broken_form)? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > limit {
            return Err(too_large());
        }
    }
    Ok(bytes)
}

fn broken_form(error: MultipartError) -> Error {
    match error.status() {
        StatusCode::PAYLOAD_TOO_LARGE => too_large(),
        _ => invalid("The multipart body is broken."),
    }
}

fn checked(image: Vec<u8>, describe: bool, callback_url: Option<String>) -> Result<Submission, Error> {
    if image.is_empty() {
        return Err(invalid("The photo is empty."));
    }
    if image.len() > MAX_PHOTO_BYTES {
        return Err(too_large());
    }
    Ok(Submission { image, describe, callback_url })
}

fn too_large() -> Error {
    let mib = MAX_PHOTO_BYTES / (1024 * 1024);
    let upload_mib = MAX_UPLOAD_BYTES / (1024 * 1024);
    Error::new(
        Code::PayloadTooLarge,
        format!(
            "The photo is larger than {mib} MiB. Send it smaller (1,000 pixels across are plenty), or upload it: \
             POST /uploads takes up to {upload_mib} MiB and answers an image_key to submit."
        ),
    )
}
