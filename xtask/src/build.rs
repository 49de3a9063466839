//! The static `vtrace`: the binary that runs on the host and can be copied into any guest.
//!
//! In: the sources. Out: a path. Runs: cargo as a child process with a target folder of its own, once per process.
//! Full: does not apply. Trust: the repository.

use crate::cache;
use anyhow::{Context, Result, ensure};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;

pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds `vtrace` for this machine and any guest, and says where it lies.
///
/// # Errors
/// When it does not compile.
pub fn vtrace() -> Result<PathBuf> {
    static BUILT: Mutex<Option<PathBuf>> = Mutex::new(None);
    let mut built = BUILT.lock().map_err(|_| anyhow::anyhow!("another thread failed to build vtrace"))?;
    if let Some(path) = built.as_ref() {
        return Ok(path.clone());
    }
    let target = cache::target().join("static");
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--quiet", "--locked", "--release", "--package", "vtrace-dp", "--bin", "vtrace"])
        .args(["--target", TARGET])
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("CARGO_TARGET_DIR", &target)
        .current_dir(cache::repository())
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "vtrace does not build");
    let path = target.join(TARGET).join("release/vtrace");
    *built = Some(path.clone());
    Ok(path)
}
