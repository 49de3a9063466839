//! The step `guest`: every suite of the package vtrace-tests, one after the other.
//!
//! Suites that boot no guest run in an empty Debian root with the packages of [`packages::LISTED`] only, so that a
//! program or header that no listed package has is found on every machine.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use super::{
    cargo, command,
    times::{Clock, Times},
};
use crate::{cache, debian::bare::BareRoot, packages};

const TEST: [&str; 4] = ["test", "--locked", "--package", "vtrace-tests"];
/// Suites that boot no guest.
const BARE: [&str; 10] = [
    "background",
    "clock_files",
    "completions_man",
    "doctor",
    "hostile_vmm",
    "kernel_fields",
    "libvirt",
    "restore",
    "systemd_units",
    "tracedat",
];
/// More failed tests than these are not run again.
const AGAIN_MAX: usize = 2;

/// A suite's cargo words, and the names of tests that failed.
type Failures = (String, Vec<String>);

/// Runs the chosen suites (all if none is chosen), then a few failed tests once more: an emulated guest on a busy machine may be late.
pub(super) fn run(times: &mut Times, chosen: &[String]) -> Result<()> {
    cargo(&[&TEST[..], &["--no-run"]].concat())?;
    let root = bare_root()?;
    let mut failed: Vec<Failures> = Vec::new();
    let mut broken = Vec::new();
    let suites = suites()?;
    if let Some(unknown) = chosen.iter().find(|name| !suites.contains(name)) {
        bail!("no suite `{unknown}`; there are: {}", suites.join(", "));
    }
    for suite in suites.into_iter().filter(|suite| chosen.is_empty() || chosen.contains(suite)) {
        let mut words = Vec::from(TEST);
        words.extend(["--test", &suite, "--", "--test-threads=1"]);
        println!("cargo {}", words.join(" "));
        let room = tempfile::tempdir()?;
        let mut tests =
            if BARE.contains(&&*suite) { in_bare_root(&root, room.path(), &words)? } else { command(&words) };
        let run = times.read("guest", &mut tests, Clock::Lines)?;
        match (run.is_success, run.failed) {
            (true, _) => {}
            (false, names) if names.is_empty() => broken.push(suite),
            (false, names) => failed.push((suite, names)),
        }
    }
    ensure!(broken.is_empty(), "these did not come to their end: {}", broken.join(", "));
    run_again(&root, &failed)
}

/// Fails unless the failed tests are few and pass now; prints which they were.
fn run_again(root: &BareRoot, failed: &[Failures]) -> Result<()> {
    let names: Vec<&str> = failed.iter().flat_map(|(_, names)| names).map(String::as_str).collect();
    ensure!(names.len() <= AGAIN_MAX, "these tests failed: {}", names.join(", "));
    for (suite, names) in failed {
        let mut words = Vec::from(TEST);
        words.extend(["--test", suite, "--", "--test-threads=1", "--exact"]);
        words.extend(names.iter().map(String::as_str));
        println!("cargo {}", words.join(" "));
        let room = tempfile::tempdir()?;
        let mut tests =
            if BARE.contains(&&**suite) { in_bare_root(root, room.path(), &words)? } else { command(&words) };
        let status = tests.status().context("cannot run cargo")?;
        ensure!(status.success(), "these tests failed twice: {}", names.join(", "));
    }
    if !names.is_empty() {
        println!("UNSTEADY, failed and then passed: {}", names.join(", "));
    }
    Ok(())
}

/// The root with all listed packages, each file that a package is listed for in its place.
fn bare_root() -> Result<BareRoot> {
    let root = BareRoot::with("tests", &packages::LISTED.map(|(package, _)| package))?;
    for (package, files) in packages::LISTED {
        for file in files {
            let path = root.path().join(file.trim_start_matches('/'));
            ensure!(path.symlink_metadata().is_ok(), "{package} has no {file} in an empty Debian");
        }
    }
    Ok(root)
}

/// cargo with these words in a copy of the root, with this machine's toolchain, sources and caches.
fn in_bare_root(root: &BareRoot, room: &Path, words: &[&str]) -> Result<Command> {
    let home = PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?);
    let folder = |name: &str, default: &str| std::env::var_os(name).map_or_else(|| home.join(default), PathBuf::from);
    let (cargo_home, rustup_home) = (folder("CARGO_HOME", ".cargo"), folder("RUSTUP_HOME", ".rustup"));
    let cache = cache::dir("")?;
    let (repository, target) = (cache::repository(), cache::target());
    let folders = [&*repository, &*target, &*cache, &*cargo_home, &*rustup_home, Path::new("/tmp")];
    let folders: Vec<&Path> = folders.into_iter().filter(|folder| folder.exists()).collect();
    let mut command = root.command(room, &folders, &repository, "cargo");
    let path =
        format!("{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", cargo_home.join("bin").display());
    command.args(words).env("PATH", path);
    Ok(command)
}

/// Each file of tests, or folder of one, by the name cargo gives it.
fn suites() -> Result<Vec<String>> {
    let entries = std::fs::read_dir(cache::repository().join("tests/tests"))?.collect::<Result<Vec<_>, _>>()?;
    let name = |path: &Path| path.file_stem().and_then(|name| name.to_str()).map(str::to_owned);
    let mut names: Vec<String> = entries.iter().filter_map(|entry| name(&entry.path())).collect();
    names.sort_unstable();
    let strange: Vec<&str> = BARE.into_iter().filter(|suite| !names.iter().any(|name| name == suite)).collect();
    ensure!(strange.is_empty(), "no suites of these names: {}", strange.join(", "));
    Ok(names)
}
