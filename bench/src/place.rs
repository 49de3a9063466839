//! Where files of measurements lie: in memory, and on this machine's disk.
//!
//! In:    `VTRACE_BENCH_DISK`, a folder on the disk to be measured; cargo's target folder if it is not set
//! Out:   files without a name: they are gone with their descriptors
//! Runs:  anywhere

use std::{fs::File, io, os::unix::fs::OpenOptionsExt, path::PathBuf};

use anyhow::{Context, Result};
use nix::{
    fcntl::OFlag,
    sys::statfs::{EXT4_SUPER_MAGIC, FsType, TMPFS_MAGIC, statfs},
};

/// A file system.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    Memory,
    Disk,
}

impl Place {
    /// Its folder.
    pub(crate) fn folder(self) -> Result<PathBuf> {
        let folder = match self {
            Self::Memory => PathBuf::from("/dev/shm"),
            Self::Disk => std::env::var_os("VTRACE_BENCH_DISK")
                .map_or_else(|| xtask::cache::target().join("bench"), PathBuf::from),
        };
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(folder)
    }

    /// What kind of file system it is.
    pub(crate) fn kind(self) -> Result<String> {
        const XFS_MAGIC: FsType = FsType(0x5846_5342);
        let folder = self.folder()?;
        Ok(match statfs(&folder)?.filesystem_type() {
            TMPFS_MAGIC => "tmpfs".into(),
            EXT4_SUPER_MAGIC => "ext4".into(),
            XFS_MAGIC => "xfs".into(),
            other => format!("file system {:#x}", other.0),
        })
    }

    /// An empty file without a name, open for reading and writing.
    pub(crate) fn file(self) -> Result<File> {
        self.open(OFlag::empty()).context("cannot make a file to measure with")
    }

    /// The same with O_DIRECT.
    pub(crate) fn direct_file(self) -> Result<File> {
        self.open(OFlag::O_DIRECT).context("this file system has no O_DIRECT")
    }

    fn open(self, flags: OFlag) -> io::Result<File> {
        let folder = self.folder().map_err(io::Error::other)?;
        let flags = (flags | OFlag::O_TMPFILE).bits();
        File::options().read(true).write(true).mode(0o600).custom_flags(flags).open(folder)
    }
}
