//! Blobs as files: written beside their place, flushed, and renamed into it.
//!
//! A client puts or gets a blob by itself through a URL that is signed here and honoured by
//! [`super::uploads`] or [`super::downloads`], as it would with S3.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use tempfile::NamedTempFile;

use super::signer::Signer;
use crate::crash;
use crate::error::Error;
use crate::ports::{BlobStore, GetTerms, PresignedPut, PutTerms};

const WHAT: &str = "the photo store";
/// Half-written files live here until they are whole.
const INCOMING: &str = ".incoming";

/// Blobs below one directory.
#[derive(Clone)]
pub struct DirBlobStore {
    root: PathBuf,
    signer: Signer,
}

impl DirBlobStore {
    /// Creates the directory and drops what a crash left half-written. `secret` signs URLs.
    ///
    /// # Errors
    /// Where the directory cannot be made.
    pub fn open(root: &Path, secret: &[u8]) -> Result<Self, Error> {
        let incoming = root.join(INCOMING);
        match std::fs::remove_dir_all(&incoming) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(Error::unavailable(WHAT, error)),
            _ => {}
        }
        std::fs::create_dir_all(&incoming)
            .and_then(|()| sync_folders(root))
            .map_err(|error| Error::unavailable(WHAT, error))?;
        Ok(Self { root: root.to_owned(), signer: Signer::new(secret)? })
    }

    pub(super) fn signer(&self) -> &Signer {
        &self.signer
    }

    /// An empty file that [`DirBlobStore::persist`] makes a blob; it goes when it is dropped.
    pub(super) async fn temporary(&self) -> Result<NamedTempFile, Error> {
        let incoming = self.root.join(INCOMING);
        blocking(move || NamedTempFile::new_in(incoming)).await
    }

    /// Makes a written file the blob under `key`.
    pub(super) async fn persist(&self, file: NamedTempFile, key: &str) -> Result<(), Error> {
        let path = self.path(key)?;
        blocking(move || persist(file, &path)).await
    }

    /// Deletes files below `prefix` that were written before `limit`, as an S3 lifecycle rule
    /// does. Returns how many went.
    ///
    /// # Errors
    /// Where the directory cannot be read.
    pub async fn remove_older(&self, prefix: &str, limit: SystemTime) -> Result<usize, Error> {
        let directory = self.path(prefix)?;
        blocking(move || remove_older(&directory, limit)).await
    }

    fn path(&self, key: &str) -> Result<PathBuf, Error> {
        let safe = key.split('/').all(|part| part != ".." && part != "." && !part.starts_with(INCOMING));
        if !safe || key.starts_with('/') || key.contains('\0') {
            return Err(Error::internal("a blob key that leaves the store"));
        }
        Ok(self.root.join(key))
    }
}

impl BlobStore for DirBlobStore {
    async fn presign_put(&self, key: &str, terms: &PutTerms) -> Result<PresignedPut, Error> {
        self.path(key)?;
        Ok(self.signer.presign_put(key, terms))
    }

    async fn presign_get(&self, key: &str, terms: &GetTerms) -> Result<String, Error> {
        self.path(key)?;
        Ok(self.signer.presign_get(key, terms))
    }

    async fn put(&self, key: &str, bytes: Vec<u8>) -> Result<(), Error> {
        let (path, incoming) = (self.path(key)?, self.root.join(INCOMING));
        blocking(move || {
            let mut file = NamedTempFile::new_in(&incoming)?;
            file.write_all(&bytes)?;
            persist(file, &path)
        })
        .await
    }

    async fn get(&self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        let path = self.path(key)?;
        blocking(move || match std::fs::read(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            read => read.map(Some),
        })
        .await
    }

    async fn delete_prefix(&self, prefix: &str) -> Result<(), Error> {
        let directory = self.path(prefix.trim_end_matches('/'))?;
        blocking(move || {
            loop {
                match std::fs::remove_dir_all(&directory) {
                    Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                    // A worker has put a blob into it since it was emptied.
                    Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {}
                    removed => return removed,
                }
            }
        })
        .await
    }

    async fn list(&self, prefix: &str, after: Option<&str>, limit: u32) -> Result<Vec<String>, Error> {
        let directory = self.path(prefix.trim_end_matches('/'))?;
        let after = after.map(str::to_owned);
        blocking(move || {
            let entries = match std::fs::read_dir(directory) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
                entries => entries?,
            };
            let mut names = Vec::new();
            for entry in entries {
                let Ok(name) = entry?.file_name().into_string() else { continue };
                if after.as_ref().is_none_or(|after| name > *after) {
                    names.push(name);
                }
            }
            names.sort_unstable();
            names.truncate(limit as usize);
            Ok(names)
        })
        .await
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await.map_err(|error| Error::unavailable(WHAT, error))?;
    // The operating system's message may name a path below DATA_DIR, which holds ids only.
    done.map_err(|error| Error::unavailable(WHAT, error))
}

fn persist(file: NamedTempFile, path: &Path) -> std::io::Result<()> {
    let directory = path.parent().unwrap_or(path);
    let new = directory.ancestors().take_while(|directory| !directory.is_dir()).count();
    std::fs::create_dir_all(directory)?;
    file.as_file().sync_all()?;
    crash::here(crash::Point::BlobWritten);
    file.persist(path).map_err(|error| error.error)?;
    // Without this the rename itself may be lost, and a new folder with all that is in it.
    directory.ancestors().take(new + 1).try_for_each(sync)
}

/// Whoever was killed may have made folders that a power cut would undo: they are taken for old from here on.
fn sync_folders(root: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(root)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync(&entry.path())?;
        }
    }
    sync(root)
}

fn sync(directory: &Path) -> std::io::Result<()> {
    std::fs::File::open(directory)?.sync_all()
}

fn remove_older(directory: &Path, limit: SystemTime) -> std::io::Result<usize> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    let mut removed = 0;
    for entry in entries {
        let entry = entry?;
        let metadata = match entry.metadata() {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            metadata => metadata?,
        };
        let is_old = metadata.modified()? < limit;
        if metadata.is_dir() {
            removed += remove_older(&entry.path(), limit)?;
            // A young folder may be waiting for its first file. An old one goes if it is empty now;
            // otherwise this fails, which is what is wanted.
            if is_old {
                let _ = std::fs::remove_dir(entry.path());
            }
        } else if is_old {
            match std::fs::remove_file(entry.path()) {
                // Deleted by its caller meanwhile.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                removed_now => {
                    removed_now?;
                    removed += 1;
                }
            }
        }
    }
    Ok(removed)
}
