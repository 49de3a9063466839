//! The cache folder: downloads, unpacked packages, guest images.
//!
//! In: the environment (`VTRACE_CACHE`, `CARGO_TARGET_DIR`). Out: paths, and locks between processes.
//! Runs: in every task and in every test that boots a guest. Full: disk errors go up.
//! Trust: what lies in the cache was put there by this program; a half-made entry never has its final name.

use anyhow::{Context, Result};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The root of the repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the repository").to_path_buf()
}

/// Where cargo builds: `CARGO_TARGET_DIR`, else `target` in the repository.
pub fn target() -> PathBuf {
    let chosen = std::env::var_os("CARGO_TARGET_DIR").filter(|dir| !dir.is_empty());
    repository().join(chosen.map_or_else(|| PathBuf::from("target"), PathBuf::from))
}

/// The folder `name` of the cache, made if it is not there. `VTRACE_CACHE` moves the whole cache, so that fresh clones
/// and several worktrees share one.
pub fn dir(name: &str) -> Result<PathBuf> {
    let chosen = std::env::var_os("VTRACE_CACHE").filter(|dir| !dir.is_empty());
    let base = chosen.map_or_else(|| repository().join("target/cache"), |dir| repository().join(dir));
    let dir = base.join(name);
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

/// An exclusive lock on `path`, held until the file is dropped; says on stderr whom it waits for.
///
/// # Errors
/// When `patience` is over, or the file cannot be opened.
pub fn lock(path: &Path, what: &str, patience: Duration) -> Result<File> {
    let file = File::options().create(true).append(true).open(path);
    let file = file.with_context(|| format!("cannot open the lock {}", path.display()))?;
    let (start, mut told) = (Instant::now(), false);
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(error).context(format!("cannot lock {}", path.display())),
            Err(TryLockError::WouldBlock) => {}
        }
        anyhow::ensure!(start.elapsed() < patience, "{} is still held after {patience:?} ({what})", path.display());
        if !told && start.elapsed() > Duration::from_secs(1) {
            eprintln!("waiting for {what}");
            told = true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
