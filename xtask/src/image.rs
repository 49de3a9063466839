//! Guest images: a Debian kernel and an initramfs with busybox, our init and our binary.
//!
//! In: a [`Recipe`]. Out: the paths of a kernel and an initramfs. Runs: in memory, then one write if the cache has no
//! such image. Full: disk errors go up. Trust: an image is named by the hash of its bytes, so an old one is never taken
//! for a new one.

use crate::cpio::Archive;
use crate::debian::{self, Set};
use crate::kernel::Kernel;
use crate::{build, cache};
use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::PathBuf;

const INIT: &str = include_str!("image/init.sh");
const START_AGENT: &str = include_str!("image/start-agent.sh");
const BUSYBOX: Set =
    Set { name: "busybox", suites: &["trixie"], packages: &["busybox-static"], with_dependencies: false };
/// What a guest needs for virtio-serial where it is not built in.
const VIRTIO: [&str; 2] = ["virtio_pci", "virtio_console"];
/// Images not used for this long are removed.
const UNUSED_AGE_MAX: std::time::Duration = std::time::Duration::from_secs(7 * 24 * 60 * 60);

/// What goes into an image.
#[derive(Debug, Clone)]
pub struct Recipe {
    kernel: Kernel,
    modules: Vec<String>,
    run_script: Option<String>,
    files: Vec<(String, PathBuf)>,
}

/// A bootable image.
#[derive(Debug, Clone)]
pub struct Image {
    /// What `uname -r` says in it.
    pub release: String,
    /// The kernel.
    pub vmlinuz: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// Whether the cache had no such image.
    pub is_new: bool,
}

impl Recipe {
    /// The usual guest: busybox, `vtrace`, virtio.
    pub fn new(kernel: Kernel) -> Self {
        Self { kernel, modules: VIRTIO.map(ToOwned::to_owned).to_vec(), run_script: None, files: Vec::new() }
    }

    /// One more kernel module, loaded at boot.
    pub fn module(&mut self, name: &str) {
        self.modules.push(name.to_owned());
    }

    /// A busybox sh script that runs before the agent starts.
    pub fn run_script(&mut self, text: &str) {
        self.run_script = Some(text.to_owned());
    }

    /// One more file, executable, from `host` on this machine.
    pub fn file(&mut self, guest: &str, host: PathBuf) {
        self.files.push((guest.to_owned(), host));
    }

    /// Makes the image, or finds it in the cache.
    ///
    /// # Errors
    /// When a download or the build of `vtrace` fails, or a file or module is not there.
    pub fn make(&self) -> Result<Image> {
        let kernel = self.kernel.unpack()?;
        let mut archive = Archive::default();
        archive.program("/init", INIT.as_bytes())?;
        archive.program("/bin/busybox", &fs::read(busybox()?)?)?;
        archive.program("/bin/vtrace", &fs::read(build::vtrace()?)?)?;
        archive.program("/bin/start-agent", START_AGENT.as_bytes())?;
        let names: Vec<&str> = self.modules.iter().map(String::as_str).collect();
        let mut order = String::new();
        for module in kernel.modules(&names)? {
            archive.file(&format!("/lib/modules/{}.ko", module.name), &module.bytes)?;
            order.push_str(&format!("{}\n", module.name));
        }
        archive.file("/lib/modules/order", order.as_bytes())?;
        for (guest, host) in &self.files {
            let bytes = fs::read(host).with_context(|| format!("cannot read {}", host.display()))?;
            archive.program(guest, &bytes)?;
        }
        if let Some(text) = &self.run_script {
            archive.file("/run.sh", text.as_bytes())?;
        }
        let (initramfs, is_new) = store(&kernel.release, &archive.finish()?)?;
        Ok(Image { release: kernel.release, vmlinuz: kernel.vmlinuz, initramfs, is_new })
    }
}

fn busybox() -> Result<PathBuf> {
    let root = debian::unpack(&BUSYBOX)?;
    let places = ["usr/bin/busybox", "bin/busybox"].map(|path| root.join(path));
    places.into_iter().find(|path| path.exists()).context("busybox-static has no busybox")
}

/// Puts the bytes into the cache under their hash; says whether they were not there.
fn store(release: &str, bytes: &[u8]) -> Result<(PathBuf, bool)> {
    let hash: String = Sha256::digest(bytes).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let dir = cache::dir("images")?;
    let path = dir.join(format!("{release}-{hash}.cpio"));
    if let Ok(file) = fs::File::options().append(true).open(&path) {
        // Its time says when it was last used.
        file.set_modified(std::time::SystemTime::now())?;
        return Ok((path, false));
    }
    let fresh = tempfile::NamedTempFile::new_in(&dir)?;
    fs::write(fresh.path(), bytes)?;
    fresh.persist(&path)?;
    remove_unused(&dir)?;
    Ok((path, true))
}

fn remove_unused(dir: &std::path::Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        let is_image = path.extension().is_some_and(|extension| extension == "cpio");
        let age = entry.metadata().ok().and_then(|found| found.modified().ok()?.elapsed().ok());
        if is_image && age.is_some_and(|age| age > UNUSED_AGE_MAX) {
            // Another process may have removed it already.
            let _ = fs::remove_file(path);
        }
    }
    Ok(())
}

/// `cargo xtask image`: everything that a guest needs, made now rather than in the middle of a test.
pub fn run() -> Result<()> {
    let start = std::time::Instant::now();
    let vtrace = build::vtrace()?;
    println!("vtrace     {}", vtrace.display());
    let qemu = crate::qemu::Qemu::unpack(crate::qemu::Release::Newest)?;
    let (major, minor) = qemu.version()?;
    ensure!(qemu.takes_vhost_user()?, "QEMU {major}.{minor} does not take a generic vhost-user device");
    println!("QEMU       {major}.{minor} in {}", qemu.root().display());
    for kernel in Kernel::ALL {
        let image = Recipe::new(kernel).make()?;
        let note = if image.is_new { "made" } else { "was there" };
        println!("guest      {} {note}: {}", image.release, image.initramfs.display());
    }
    println!("ready after {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}
