//! Debian packages that must be installed on this machine: stock tools that read our files, compilers, small tools.
//!
//! In: package names. Out: they are installed. Runs: dpkg-query, and apt-get where something is missing.
//! Trust: the machine's own apt.

use crate::debian::{self, Set};
use anyhow::{Context, Result, ensure};
use std::process::Command;

/// What compiles and links C and C++: libFuzzer is C++.
pub const COMPILERS: [&str; 3] = ["gcc", "g++", "libc6-dev"];

/// Every package that a task or test needs, with the programs and headers that it is installed for. Programs of other
/// machines (QEMU, kernels, the newest trace-cmd) are unpacked into the cache instead.
///
/// The suites that boot no guest run in an empty Debian root that has these packages only (`cargo xtask test guest`).
/// Debian 12's libkshark-dev does not depend on libjson-c-dev, whose header its own headers include.
pub const LISTED: [(&str, &[&str]); 26] = [
    ("bash", &["/bin/bash"]),
    ("binutils", &["/usr/bin/strip"]),
    ("bsdutils", &["/usr/bin/script"]),
    ("btrfs-progs", &["/sbin/mkfs.btrfs"]),
    ("ca-certificates", &["/etc/ssl/certs/ca-certificates.crt"]),
    ("e2fsprogs", &["/sbin/mkfs.ext4"]),
    ("g++", &["/usr/bin/c++"]),
    ("gcc", &["/usr/bin/cc", "/usr/bin/gcc"]),
    ("git", &["/usr/bin/git"]),
    ("libc6-dev", &["/usr/include/stdio.h"]),
    ("libjson-c-dev", &["/usr/include/json-c/json.h"]),
    ("libkshark-dev", &["/usr/include/kernelshark/libkshark.h"]),
    ("libxml2-utils", &["/usr/bin/xmllint"]),
    ("lz4", &["/usr/bin/lz4"]),
    ("man-db", &["/usr/bin/man"]),
    ("mmdebstrap", &["/usr/bin/mmdebstrap"]),
    ("mount", &["/bin/mount", "/bin/umount"]),
    ("procps", &["/bin/kill"]),
    (
        "systemd",
        &["/bin/systemd-analyze", "/bin/systemd-socket-activate", "/bin/systemd-sysusers", "/bin/systemd-tmpfiles"],
    ),
    ("systemd-container", &["/usr/bin/systemd-nspawn"]),
    ("trace-cmd", &["/usr/bin/trace-cmd"]),
    ("udev", &["/bin/udevadm"]),
    ("util-linux", &["/usr/bin/setpriv", "/usr/bin/unshare", "/sbin/fsfreeze"]),
    ("xfsprogs", &["/sbin/mkfs.xfs"]),
    ("xz-utils", &["/usr/bin/xz"]),
    ("zstd", &["/usr/bin/zstd"]),
];
/// Programs of packages that every Debian has (`Essential: yes`), and those that rustup brings.
#[cfg(test)]
const EVERYWHERE: [&str; 16] = [
    "apt-config",
    "apt-get",
    "cargo",
    "chmod",
    "dpkg-deb",
    "dpkg-query",
    "grep",
    "gzip",
    "ls",
    "rustc",
    "sh",
    "tar",
    "timeout",
    "true",
    "/bin/true",
    "/proc/self/exe",
];

/// Installs every package of [`LISTED`] that is missing.
///
/// # Errors
/// As [`ensure()`].
pub fn ensure_listed() -> Result<()> {
    ensure(&LISTED.map(|(package, _)| package))
}

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

/// Installs those of the packages that are missing, and prints their names first.
///
/// # Errors
/// When apt-get fails, as it does for a user who may not install; and for a missing package in a bare root.
///
/// # Panics
/// For a package that [`LISTED`] does not have.
pub fn ensure(names: &[&str]) -> Result<()> {
    let unlisted = names.iter().find(|name| LISTED.iter().all(|(package, _)| package != *name));
    assert!(unlisted.is_none(), "{unlisted:?} is not in LISTED");
    let missing = missing(names)?;
    if missing.is_empty() {
        return Ok(());
    }
    let is_bare = std::env::var_os(debian::bare::MARK).is_some();
    ensure!(!is_bare, "an empty Debian with the listed packages has no {}", missing.join(" "));
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
    use std::{collections::BTreeSet, path::Path};

    use super::*;

    /// The names of started programs in the sources of tasks, tests and benchmarks.
    fn programs_named(dir: &Path) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                names.extend(programs_named(&path));
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let ends = text.split(concat!("Command::new", "(\"")).skip(1);
                names.extend(ends.filter_map(|end| Some(end.split_once('"')?.0.to_owned())));
            }
        }
        names
    }

    #[test]
    fn every_program_that_is_started_is_in_a_listed_package() {
        let folders = ["xtask/src", "tests/src", "tests/tests", "bench/src"];
        let named: BTreeSet<String> =
            folders.iter().flat_map(|folder| programs_named(&crate::cache::repository().join(folder))).collect();
        assert!(named.contains("trace-cmd") && named.len() > 20, "{named:?}");
        let listed = |name: &str| {
            let mut files = LISTED.iter().flat_map(|(_, files)| *files);
            EVERYWHERE.contains(&name) || files.any(|file| file.rsplit('/').next() == Some(name))
        };
        let unlisted: Vec<&String> = named.iter().filter(|name| !listed(name)).collect();
        assert!(unlisted.is_empty(), "in no package of LISTED: {unlisted:?}");
    }

    #[test]
    fn package_that_is_not_installed_is_missing() {
        assert_eq!(missing(&["dpkg", "no-such-package-of-debian"]).unwrap(), ["no-such-package-of-debian"]);
    }
}
