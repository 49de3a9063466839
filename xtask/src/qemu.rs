//! QEMU of a chosen Debian suite, run beside the host's own libraries.
//!
//! In: the unpacked packages of one suite. Out: a command that starts that QEMU with its own loader, libraries and
//! firmware. Runs: as a child process. Full: does not apply. Trust: packages checked by apt.

use crate::debian::{self, Set};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The oldest QEMU that lets a user create `vhost-user-test-device-pci`.
const VHOST_USER_SINCE: (u32, u32) = (10, 2);

/// Which QEMU: each is the newest of its suite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Release {
    /// trixie-backports: 11.1 and later, takes vtrace's vhost-user device.
    Newest,
    /// bookworm-backports: 10.0, has the device but refuses it.
    Middle,
    /// bookworm: 7.2, has no such device.
    Oldest,
}

impl Release {
    fn set(self) -> Set {
        let (name, suites): (_, &'static [&'static str]) = match self {
            Self::Newest => ("qemu-newest", &["trixie", "trixie-backports"]),
            Self::Middle => ("qemu-middle", &["bookworm", "bookworm-backports"]),
            Self::Oldest => ("qemu-oldest", &["bookworm"]),
        };
        Set { name, suites, packages: &["qemu-system-x86"], with_dependencies: true }
    }
}

/// An unpacked QEMU.
#[derive(Debug, Clone)]
pub struct Qemu {
    root: PathBuf,
}

impl Qemu {
    /// Fetches it if the cache does not have it.
    pub fn unpack(release: Release) -> Result<Self> {
        Ok(Self { root: debian::unpack(&release.set())? })
    }

    /// `qemu-system-x86_64` without a device, told where its firmware lies.
    pub fn command(&self) -> Result<Command> {
        let mut command = debian::command(&self.root, "usr/bin/qemu-system-x86_64")?;
        // QEMU seeks its modules beside the running file, which is the loader.
        command.env("QEMU_MODULE_DIR", self.root.join("usr/lib/x86_64-linux-gnu/qemu"));
        for firmware in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            command.arg("-L").arg(self.root.join(firmware));
        }
        Ok(command)
    }

    /// Major and minor version, as QEMU says it.
    pub fn version(&self) -> Result<(u32, u32)> {
        let output = self.command()?.arg("--version").output().context("cannot run QEMU")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        version_of(&text)
            .with_context(|| format!("QEMU says no version: {text} {}", String::from_utf8_lossy(&output.stderr).trim()))
    }

    /// Whether it lets a user create the generic vhost-user device.
    pub fn takes_vhost_user(&self) -> Result<bool> {
        Ok(self.version()? >= VHOST_USER_SINCE)
    }

    /// Where it lies.
    pub fn root(&self) -> &Path {
        &self.root
    }
}

fn version_of(text: &str) -> Option<(u32, u32)> {
    let number = text.split_once("version ")?.1.split_whitespace().next()?;
    let mut parts = number.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_is_read_from_what_qemu_says() {
        let said = "QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)\nCopyright (c) 2003";
        assert_eq!(version_of(said), Some((11, 1)));
        assert_eq!(version_of("QEMU emulator"), None);
    }
}
