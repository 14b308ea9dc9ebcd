//! A model bundle: `models/<digest>/manifest.json` and the `.onnx` beside it, from the blob store
//! to the temporary directory, verified on the way and again at every load.

use std::fs::File;
use std::io::Read;
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

/// A verified bundle.
#[derive(Debug)]
pub struct Bundle {
    /// SHA-256 of the manifest, in hex.
    pub digest: String,
    pub manifest: Manifest,
    pub network: Verified,
}

/// The `.onnx` file, after its size and digest were compared.
#[derive(Debug)]
pub enum Verified {
    /// ONNX Runtime reads it anew: bytes beside its own copies are the most that a process ever holds.
    File(OpenFile),
    Bytes(Vec<u8>),
}

/// A file, held open from before it was verified: on Linux what is put in its place later is another.
#[derive(Debug)]
pub struct OpenFile {
    file: File,
    path: PathBuf,
}

impl OpenFile {
    fn open(path: PathBuf) -> Result<Self, Refused> {
        let file = File::open(&path).map_err(|error| unreadable(&path, &error))?;
        Ok(Self { file, path })
    }

    /// Where it can be opened again.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        #[cfg(target_os = "linux")]
        return PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.file)));
        #[cfg(not(target_os = "linux"))]
        self.path.clone()
    }
}

/// SHA-256 in hex.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The length and SHA-256 of what is left to read.
fn measure(mut reader: impl Read) -> std::io::Result<(u64, String)> {
    let (mut hash, mut length, mut part) = (Sha256::new(), 0, [0; 16 * 1024]);
    loop {
        let count = reader.read(&mut part)?;
        if count == 0 {
            return Ok((length, hex(&hash.finalize())));
        }
        hash.update(&part[..count]);
        length += count as u64;
    }
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
        compare(&manifest.network, network.len() as u64, &sha256(&network))?;
        Ok(Self { digest, manifest, network: Verified::Bytes(network) })
    }

    /// A bundle from a directory.
    ///
    /// # Errors
    /// [`Refused`] where a file is missing or wrong.
    pub fn from_directory(directory: &Path, pin: Option<&str>) -> Result<Self, Refused> {
        let (digest, manifest) = read_manifest(&read(&directory.join(MANIFEST))?, pin)?;
        let network = OpenFile::open(directory.join(&manifest.network.file))?;
        let (length, found) = measure(&network.file).map_err(|error| unreadable(&network.path, &error))?;
        compare(&manifest.network, length, &found)?;
        Ok(Self { digest, manifest, network: Verified::File(network) })
    }

    /// Puts a directory's bundle into the blob store, where it is missing, and returns its digest.
    ///
    /// # Errors
    /// [`Refused`] where the bundle is wrong or the store fails.
    pub async fn publish(directory: &Path, pin: Option<&str>, blobs: &impl BlobStore) -> Result<String, Refused> {
        let manifest_bytes = read(&directory.join(MANIFEST))?;
        let (digest, manifest) = read_manifest(&manifest_bytes, pin)?;
        let Network { file, .. } = &manifest.network;
        let network = read(&directory.join(file))?;
        compare(&manifest.network, network.len() as u64, &sha256(&network))?;
        let manifest_key = key(&digest, MANIFEST);
        if blobs.get(&manifest_key).await.map_err(|error| Refused::new(error.chain()))?.is_none() {
            // The manifest goes last: where it is, the bundle is whole.
            for (key, bytes) in [(key(&digest, file), network), (manifest_key, manifest_bytes)] {
                blobs.put(&key, bytes).await.map_err(|error| Refused::new(error.chain()))?;
            }
        }
        Ok(digest)
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
        let (digest, manifest) = read_manifest(&manifest_bytes, Some(digest))?;
        let Network { file, .. } = &manifest.network;
        let network = download(blobs, &key(&digest, file)).await?;
        compare(&manifest.network, network.len() as u64, &sha256(&network))?;
        if let Err(error) = keep(&directory, [(MANIFEST, &manifest_bytes), (file, &network)]) {
            // The next start downloads again; this one has what it needs.
            tracing::warn!(error.chain = %error, "model bundle not kept in the temporary directory");
        }
        // Another that starts at this moment may have taken the folder away, to put its own there.
        Self::from_directory(&directory, Some(&digest))
            .or_else(|_| Self::verify(&manifest_bytes, network, Some(&digest)))
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

fn compare(Network { file, sha256: wanted, size_bytes }: &Network, length: u64, found: &str) -> Result<(), Refused> {
    // Of a file that was cut short this says more than a digest.
    if length != *size_bytes {
        return Err(Refused::new(format!("{file} has {length} bytes, the manifest says {size_bytes}")));
    }
    if !found.eq_ignore_ascii_case(wanted) {
        return Err(Refused::new(format!("{file} has SHA-256 {found}, the manifest says {wanted}")));
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>, Refused> {
    std::fs::read(path).map_err(|error| unreadable(path, &error))
}

fn unreadable(path: &Path, error: &std::io::Error) -> Refused {
    Refused::new(format!("{}: {error}", path.display()))
}

async fn download(blobs: &impl BlobStore, key: &str) -> Result<Vec<u8>, Refused> {
    let found = blobs.get(key).await.map_err(|error| Refused::new(error.chain()))?;
    found.ok_or_else(|| Refused::new(format!("{key} is not in the blob store")))
}

/// Writes beside the place and renames, so that nobody else reads half a bundle, or one that is written over.
fn keep(directory: &Path, files: [(&str, &[u8]); 2]) -> std::io::Result<()> {
    let scratch = directory.with_extension(uuid::Uuid::new_v4().to_string());
    std::fs::create_dir_all(&scratch)?;
    for (name, bytes) in files {
        std::fs::write(scratch.join(name), bytes)?;
    }
    // What is there failed its check above.
    let _ = std::fs::remove_dir_all(directory);
    std::fs::rename(&scratch, directory).inspect_err(|_| {
        let _ = std::fs::remove_dir_all(&scratch);
    })
}
