//! Static programs, `vtrace` first of all: they run on the host and can be copied into any guest.
//!
//! In: the sources. Out: a path. Runs: cargo as a child process with a target folder of its own, once per process and program.
//! Full: does not apply. Trust: the repository.

use crate::cache;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;

pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds `vtrace` for this machine and any guest, and says where it lies.
///
/// # Errors
/// When it does not compile.
pub fn vtrace() -> Result<PathBuf> {
    program("vtrace-dp", "vtrace")
}

/// Builds a program of ours for this machine and any guest, and says where it lies.
///
/// # Errors
/// When it does not compile.
pub fn program(package: &str, name: &str) -> Result<PathBuf> {
    static BUILT: Mutex<BTreeMap<String, PathBuf>> = Mutex::new(BTreeMap::new());
    let mut built = BUILT.lock().map_err(|_| anyhow::anyhow!("another thread failed to build"))?;
    if let Some(path) = built.get(name) {
        return Ok(path.clone());
    }
    let target = cache::target().join("static");
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--quiet", "--locked", "--release", "--package", package, "--bin", name])
        .args(["--target", TARGET])
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("CARGO_TARGET_DIR", &target)
        .current_dir(cache::repository())
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "{name} does not build");
    let path = target.join(TARGET).join("release").join(name);
    built.insert(name.to_owned(), path.clone());
    Ok(path)
}
