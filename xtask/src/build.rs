//! Programs of ours: static ones, `vtrace` first of all, which run on the host and can be copied into any guest; and unit
//! tests as the step `unit` builds them, with the libraries that they need in a guest.
//!
//! In: the sources. Out: paths. Runs: cargo as a child process, for static programs with a target folder of its own and
//! once per process and program.
//! Full: does not apply. Trust: the repository.

use crate::cache;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";
/// What the step `unit` tests. Another choice of packages has other features, and builds most of it again.
pub(crate) const UNIT_TESTS: [&str; 4] = ["--locked", "--workspace", "--exclude", "vtrace-tests"];
/// How a program of this machine finds its libraries.
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";

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
        .env_remove("RUSTC_BOOTSTRAP")
        .env("CARGO_TARGET_DIR", &target)
        .current_dir(cache::repository())
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "{name} does not build");
    let path = target.join(TARGET).join("release").join(name);
    built.insert(name.to_owned(), path.clone());
    Ok(path)
}

/// The unit tests of a library as a program, by the name of its crate; built by the step `unit` already, or now.
///
/// # Errors
/// When something does not compile, or there is no such library.
pub fn unit_tests(library: &str) -> Result<PathBuf> {
    let mut command = cargo(&["test", "--quiet", "--no-run", "--message-format=json-render-diagnostics"]);
    let output = command.args(UNIT_TESTS).stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "the unit tests do not build");
    test_program(&String::from_utf8(output.stdout)?, library)
}

/// The test program of a library among cargo's messages.
pub(crate) fn test_program(messages: &str, library: &str) -> Result<PathBuf> {
    let mut programs = messages.lines().filter_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let target = message.get("target")?;
        let is_meant = target.get("name")? == library && target.get("kind")?.get(0)? == "lib";
        message.get("executable")?.as_str().filter(|_| is_meant).map(PathBuf::from)
    });
    programs.next_back().with_context(|| format!("cargo named no test program of {library}"))
}

/// A program of this machine for a guest: without what only a debugger reads, and its libraries; where each goes, and
/// where it lies.
///
/// # Errors
/// When there is no `strip`, or a library is missing.
pub fn for_guest(name: &str, program: &Path) -> Result<Vec<(String, PathBuf)>> {
    let stripped = cache::target().join(format!("{name}-for-guest"));
    let status = Command::new("strip").arg("-o").args([&stripped, program]).status().context("cannot run strip")?;
    ensure!(status.success(), "strip refuses {}", program.display());
    let said = Command::new(LOADER).arg("--list").arg(program).output().context("cannot run the loader")?;
    ensure!(said.status.success(), "{} cannot be loaded", program.display());
    let said = String::from_utf8(said.stdout)?;
    // `NAME => PATH (ADDRESS)`; the loader and the kernel's own stand without an arrow.
    let paths = said.lines().filter_map(|line| line.split_once(" => ")?.1.split_whitespace().next());
    let mut files = vec![(format!("/bin/{name}"), stripped)];
    files.extend(paths.chain([LOADER]).map(|path| (path.to_owned(), PathBuf::from(path))));
    Ok(files)
}

fn cargo(words: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(words).current_dir(cache::repository()).env_remove("RUSTC_BOOTSTRAP");
    command
}
