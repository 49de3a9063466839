//! Debian packages that must be installed on this machine: stock tools that judge our files, the C compiler.
//!
//! In: package names. Out: they are installed. Runs: dpkg-query, and apt-get where something is missing.
//! Full: apt's error goes up. Trust: the machine's own apt.

use crate::debian::{self, Set};
use anyhow::{Context, Result, ensure};
use std::process::Command;

/// What compiles and links C and C++: libFuzzer is C++.
pub const COMPILERS: [&str; 3] = ["gcc", "g++", "libc6-dev"];

/// Stock tools that read what vtrace writes: trace-cmd, and KernelShark's library with what a program needs to open a
/// file as KernelShark does; what reads man pages and units; and what makes small disks.
///
/// Debian 12's libkshark-dev does not depend on libjson-c-dev, whose header its own headers include.
pub const JUDGES: [&str; 11] = [
    "trace-cmd",
    "libkshark-dev",
    "libjson-c-dev",
    "gcc",
    "g++",
    "libc6-dev",
    "man-db",
    "systemd",
    "e2fsprogs",
    "mount",
    "procps",
];

/// trace-cmd of the next Debian, which reads files by newer code.
const TRACE_CMD_NEWEST: Set =
    Set { name: "trace-cmd-newest", suites: &["forky"], packages: &["trace-cmd"], with_dependencies: true };

/// `trace-cmd` of Debian forky, run with its own libraries; unpacked into the cache if it is not there.
///
/// # Errors
/// When it cannot be had.
pub fn trace_cmd_newest() -> Result<Command> {
    debian::command(&debian::unpack(&TRACE_CMD_NEWEST)?, "usr/bin/trace-cmd")
}

/// Installs those of the packages that are not installed; says so only then.
///
/// # Errors
/// When apt-get fails, as it does for a user who may not install.
pub fn ensure(names: &[&str]) -> Result<()> {
    let missing = missing(names)?;
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("installing {}", missing.join(" "));
    if install(&missing).is_err() {
        // The machine may have no package lists yet, or old ones.
        apt_get(&["update"])?;
        install(&missing).with_context(|| format!("cannot install {}", missing.join(" ")))?;
    }
    Ok(())
}

fn missing(names: &[&str]) -> Result<Vec<String>> {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat", "${Package} ${db:Status-Status}\n"]).args(names);
    let output = query.output().context("cannot run dpkg-query: is this Debian?")?;
    let found = String::from_utf8_lossy(&output.stdout).into_owned();
    let is_missing = |name: &&&str| !found.lines().any(|line| line == format!("{name} installed"));
    Ok(names.iter().filter(is_missing).map(ToString::to_string).collect())
}

fn install(names: &[String]) -> Result<()> {
    let names = names.iter().map(String::as_str);
    apt_get(&["install", "--yes", "--no-install-recommends"].into_iter().chain(names).collect::<Vec<_>>())
}

fn apt_get(words: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.arg("--quiet").args(words).env("DEBIAN_FRONTEND", "noninteractive");
    let output = command.output().context("cannot run apt-get")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "apt-get {} failed: {}", words.join(" "), said.trim());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_that_is_not_installed_is_missing() {
        assert_eq!(missing(&["dpkg", "no-such-package-of-debian"]).unwrap(), ["no-such-package-of-debian"]);
    }
}
