//! The data folder: readable by its owner alone, used by one host at a time.

use std::fs::{DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use shared::crash::{self, Point};
use shared::embedded::SqliteCallers;

/// How long a lock is waited for: a host that ends still has it for a moment, and so has a process that another
/// host was just starting, until that begins its own program.
const PATIENCE: Duration = Duration::from_secs(1);

/// Held until it is dropped, also by `kill -9`.
pub(crate) struct Lock {
    _file: File,
}

/// Makes the folder where it is missing and takes its lock.
pub(crate) fn open(data_dir: &Path) -> anyhow::Result<Lock> {
    let place = || format!("DATA_DIR: cannot use {}", data_dir.display());
    DirBuilder::new().recursive(true).mode(0o700).create(data_dir).with_context(place)?;
    // A folder that was there before may be open to others.
    std::fs::set_permissions(data_dir, Permissions::from_mode(0o700)).with_context(place)?;
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(data_dir.join("lock"))
        .with_context(place)?;
    let until = Instant::now() + PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Lock { _file: file }),
            Err(TryLockError::WouldBlock) if Instant::now() < until => sleep(Duration::from_millis(20)),
            Err(TryLockError::WouldBlock) => bail!(
                "DATA_DIR: another host is running on {}. Stop it, or set DATA_DIR to another folder.",
                data_dir.display()
            ),
            Err(TryLockError::Error(error)) => return Err(error).with_context(place),
        }
    }
}

/// The key store.
pub(crate) fn callers(data_dir: &Path) -> anyhow::Result<SqliteCallers> {
    Ok(SqliteCallers::open(&data_dir.join("callers.sqlite"))?)
}

/// Where the model is unpacked, below the temporary directory: a folder of this user alone, since
/// others may write beside it.
pub(crate) fn model_folder(temporary: &Path) -> anyhow::Result<PathBuf> {
    let user = rustix::process::getuid().as_raw();
    let folder = temporary.join(format!("lesion-models-{user}"));
    let place = || format!("TMPDIR: cannot use {}", folder.display());
    match DirBuilder::new().mode(0o700).create(&folder) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error).with_context(place),
        _ => {}
    }
    let metadata = std::fs::symlink_metadata(&folder).with_context(place)?;
    if !metadata.is_dir() || metadata.uid() != user || metadata.mode() & 0o077 != 0 {
        bail!("TMPDIR: {} is not a folder that only its owner can use; delete it", folder.display());
    }
    Ok(folder)
}

/// What keys the cache and signs uploads, made at the first start.
pub(crate) fn secret(data_dir: &Path) -> anyhow::Result<Vec<u8>> {
    let path = data_dir.join("secret.key");
    let mut secret = Vec::new();
    match File::open(&path) {
        Ok(mut file) => {
            file.read_to_end(&mut secret)?;
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            secret = (0..2).flat_map(|_| uuid::Uuid::new_v4().into_bytes()).collect();
            // Renamed into place whole: half a key would keep every later start from starting.
            let unfinished = data_dir.join("secret.key.new");
            let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&unfinished)?;
            file.write_all(&secret)?;
            file.sync_all()?;
            crash::here(Point::StartSecretWritten);
            std::fs::rename(&unfinished, &path)?;
        }
        Err(error) => return Err(error).context("DATA_DIR: cannot read secret.key"),
    }
    if secret.len() < 16 {
        bail!("DATA_DIR: {} is too short; delete it, and a new one is made", path.display());
    }
    Ok(secret)
}
