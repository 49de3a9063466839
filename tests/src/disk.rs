//! Small file systems of a test's own, that fill up, or stop taking writes.

use std::{fs::File, path::Path, process::Command};

use anyhow::{Result, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    unistd::sync,
};
use tempfile::TempDir;

/// A mounted file system; unmounted with its owner.
#[derive(Debug)]
pub struct Disk(TempDir);

/// A disk that hangs: whoever writes waits. Works again when this is dropped.
#[derive(Debug)]
pub struct Frozen<'a>(&'a Disk);

impl Disk {
    /// A tmpfs of so many bytes.
    pub fn tmpfs(bytes: u64) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        mount(Some("tmpfs"), folder.path(), Some("tmpfs"), MsFlags::empty(), Some(&*format!("size={bytes}")))?;
        Ok(Self(folder))
    }

    /// An ext4 of so many bytes.
    pub fn ext4(bytes: u64) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let image = folder.path().with_extension("img");
        File::create(&image)?.set_len(bytes)?;
        xtask::packages::ensure(&["e2fsprogs", "mount"])?;
        let made = Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&image).status()?;
        ensure!(made.success(), "mkfs.ext4: {made}");
        let mounted = Command::new("mount").args(["-o", "loop"]).args([&*image, folder.path()]).status()?;
        ensure!(mounted.success(), "mount: {mounted}");
        Ok(Self(folder))
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Lets every write wait, as a disk does that does not answer. Not for a tmpfs.
    pub fn freeze(&self) -> Result<Frozen<'_>> {
        sync();
        let frozen = Command::new("fsfreeze").arg("--freeze").arg(self.path()).status()?;
        ensure!(frozen.success(), "fsfreeze: {frozen}");
        Ok(Frozen(self))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // What stays mounted goes with the machine; the test has said what it had to say.
        let _ = umount2(self.path(), MntFlags::MNT_DETACH);
        let _ = std::fs::remove_file(self.path().with_extension("img"));
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        // If it fails, whoever waits says so.
        let _ = Command::new("fsfreeze").arg("--unfreeze").arg(self.0.path()).status();
    }
}
