//! A model bundle: `models/<digest>/manifest.json` and the `.onnx` beside it, from the blob store
//! to the temporary directory, verified on the way and again at every load.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use shared::ports::BlobStore;

use crate::manifest::{Manifest, Network};

pub const MANIFEST: &str = "manifest.json";

/// A bundle that may not be used, and why.
#[derive(Debug, thiserror::Error)]
#[error("model bundle refused: {0}")]
pub struct Refused(pub String);

impl Refused {
    pub(crate) fn new(why: impl Into<String>) -> Self {
        Self(why.into())
    }
}

/// A verified bundle in memory.
#[derive(Debug)]
pub struct Bundle {
    /// SHA-256 of the manifest, in hex.
    pub digest: String,
    pub manifest: Manifest,
    /// The bytes of the `.onnx` file.
    pub network: Vec<u8>,
}

/// SHA-256 in hex.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn key(digest: &str, file: &str) -> String {
    format!("models/{digest}/{file}")
}

impl Bundle {
    /// A bundle from its bytes. With `pin`, the manifest must have that digest.
    ///
    /// # Errors
    /// [`Refused`] where a digest, the size or a field is wrong.
    pub fn verify(manifest_bytes: &[u8], network: Vec<u8>, pin: Option<&str>) -> Result<Self, Refused> {
        let (digest, manifest) = read_manifest(manifest_bytes, pin)?;
        let Network { file, sha256: wanted, size_bytes } = &manifest.network;
        // Of a file that was cut short this says more than a digest.
        if network.len() as u64 != *size_bytes {
            let found = network.len();
            return Err(Refused::new(format!("{file} has {found} bytes, the manifest says {size_bytes}")));
        }
        let found = sha256(&network);
        if !found.eq_ignore_ascii_case(wanted) {
            return Err(Refused::new(format!("{file} has SHA-256 {found}, the manifest says {wanted}")));
        }
        Ok(Self { digest, manifest, network })
    }

    /// A bundle from a directory.
    ///
    /// # Errors
    /// [`Refused`] where a file is missing or wrong.
    pub fn from_directory(directory: &Path, pin: Option<&str>) -> Result<Self, Refused> {
        let manifest_bytes = read(&directory.join(MANIFEST))?;
        let (_, manifest) = read_manifest(&manifest_bytes, pin)?;
        let network = read(&directory.join(&manifest.network.file))?;
        Self::verify(&manifest_bytes, network, pin)
    }

    /// Puts a directory's bundle into the blob store, where it is missing, and returns its digest.
    ///
    /// # Errors
    /// [`Refused`] where the bundle is wrong or the store fails.
    pub async fn publish(directory: &Path, pin: Option<&str>, blobs: &impl BlobStore) -> Result<String, Refused> {
        let bundle = Self::from_directory(directory, pin)?;
        let manifest_key = key(&bundle.digest, MANIFEST);
        if blobs.get(&manifest_key).await.map_err(|error| Refused::new(error.chain()))?.is_none() {
            let manifest_bytes = read(&directory.join(MANIFEST))?;
            let network_key = key(&bundle.digest, &bundle.manifest.network.file);
            // The manifest goes last: where it is, the bundle is whole.
            for (key, bytes) in [(network_key, bundle.network), (manifest_key, manifest_bytes)] {
                blobs.put(&key, bytes).await.map_err(|error| Refused::new(error.chain()))?;
            }
        }
        Ok(bundle.digest)
    }

    /// The bundle of that digest: from `cache` where an earlier start left it whole, otherwise from
    /// the blob store, leaving a copy in `cache`.
    ///
    /// # Errors
    /// [`Refused`] where it is nowhere or wrong.
    pub async fn fetch(blobs: &impl BlobStore, digest: &str, cache: &Path) -> Result<Self, Refused> {
        let directory = cache.join(digest);
        if let Ok(bundle) = Self::from_directory(&directory, Some(digest)) {
            return Ok(bundle);
        }
        let manifest_bytes = download(blobs, &key(digest, MANIFEST)).await?;
        let (_, manifest) = read_manifest(&manifest_bytes, Some(digest))?;
        let network = download(blobs, &key(digest, &manifest.network.file)).await?;
        let bundle = Self::verify(&manifest_bytes, network, Some(digest))?;
        if let Err(error) = keep(cache, &directory, &bundle, &manifest_bytes) {
            // The next start downloads again; this one has what it needs.
            tracing::warn!(error.chain = %error, "model bundle not kept in the temporary directory");
        }
        Ok(bundle)
    }
}

fn read_manifest(bytes: &[u8], pin: Option<&str>) -> Result<(String, Manifest), Refused> {
    let digest = sha256(bytes);
    if let Some(pin) = pin
        && !pin.eq_ignore_ascii_case(&digest)
    {
        return Err(Refused::new(format!("{MANIFEST} has SHA-256 {digest}, MODEL_DIGEST is {pin}")));
    }
    let manifest = Manifest::parse(bytes).map_err(|problem| Refused::new(format!("{MANIFEST}: {problem}")))?;
    Ok((digest, manifest))
}

fn read(path: &Path) -> Result<Vec<u8>, Refused> {
    std::fs::read(path).map_err(|error| Refused::new(format!("{}: {error}", path.display())))
}

async fn download(blobs: &impl BlobStore, key: &str) -> Result<Vec<u8>, Refused> {
    let found = blobs.get(key).await.map_err(|error| Refused::new(error.chain()))?;
    found.ok_or_else(|| Refused::new(format!("{key} is not in the blob store")))
}

/// Writes beside the place and renames, so that another process never reads half a bundle.
fn keep(cache: &Path, directory: &Path, bundle: &Bundle, manifest_bytes: &[u8]) -> std::io::Result<()> {
    let scratch: PathBuf = cache.join(format!(".{}.{}", bundle.digest, std::process::id()));
    std::fs::create_dir_all(&scratch)?;
    std::fs::write(scratch.join(&bundle.manifest.network.file), &bundle.network)?;
    std::fs::write(scratch.join(MANIFEST), manifest_bytes)?;
    // What is there failed its check above.
    let _ = std::fs::remove_dir_all(directory);
    std::fs::rename(&scratch, directory).inspect_err(|_| {
        let _ = std::fs::remove_dir_all(&scratch);
    })
}
