//! What inference is told by its environment, on either host.

use std::path::PathBuf;

use shared::config::{ConfigError, Env};

/// `MODEL_DIGEST`: SHA-256 of the manifest, in lower-case hex.
///
/// # Errors
/// [`ConfigError`] where it is no such digest.
pub fn model_digest(env: &Env) -> Result<Option<String>, ConfigError> {
    let digest = env.text("MODEL_DIGEST")?.map(str::to_ascii_lowercase);
    if digest.as_ref().is_some_and(|digest| digest.len() != 64 || !digest.bytes().all(|b| b.is_ascii_hexdigit())) {
        return Err(ConfigError::new("MODEL_DIGEST", "must be 64 hex digits, the SHA-256 of manifest.json"));
    }
    Ok(digest)
}

/// `ORT_DYLIB_PATH`: the ONNX Runtime shared library; unset, the one in `lib` beside the executable,
/// where a package puts it.
///
/// # Errors
/// [`ConfigError`] where it is not UTF-8.
pub fn ort_library(env: &Env) -> Result<PathBuf, ConfigError> {
    Ok(env.text("ORT_DYLIB_PATH")?.map_or_else(|| beside_executable("lib/libonnxruntime.so"), PathBuf::from))
}

/// A file or folder of the package that this executable came in.
#[must_use]
pub fn beside_executable(name: &str) -> PathBuf {
    std::env::current_exe().unwrap_or_default().with_file_name(name)
}
