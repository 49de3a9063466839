//! Debian's cloud kernels and their modules.
//!
//! In: an unpacked package set. Out: the path of vmlinuz, and modules with all they depend on, in loading order.
//! Runs: before an image is made. Full: does not apply. Trust: packages checked by apt.

use crate::debian::{self, Set};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Which kernel: each is the newest of its line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kernel {
    /// bullseye's, the oldest that is recorded: no BTF for modules, one TSC ratio, pages of one size.
    #[value(name = "5.10")]
    V5_10,
    /// bookworm's: virtio is built as modules.
    #[value(name = "6.1")]
    V6_1,
    /// trixie's.
    #[value(name = "6.12")]
    V6_12,
    /// The long-term kernel in trixie-backports. For the clock's lab only.
    #[value(name = "6.18")]
    V6_18,
    /// trixie-backports', 7.3 and later.
    #[value(name = "newest", alias = "7.3")]
    Newest,
}

impl Kernel {
    /// Every kernel that vtrace records.
    pub const ALL: [Self; 4] = [Self::V5_10, Self::V6_1, Self::V6_12, Self::Newest];

    fn set(self) -> Set {
        let (name, suites, packages): (_, &'static [&'static str], &'static [&'static str]) = match self {
            Self::V5_10 => ("linux-5.10", &["bullseye"], &["linux-image-5.10.0-*-cloud-amd64"]),
            Self::V6_1 => ("linux-6.1", &["bookworm"], &["linux-image-6.1.0-*-cloud-amd64"]),
            Self::V6_12 => ("linux-6.12", &["trixie"], &["linux-image-6.12.*+deb13-cloud-amd64"]),
            Self::V6_18 => ("linux-6.18", &["trixie", "trixie-backports"], &["linux-image-6.18.*+deb13-cloud-amd64"]),
            Self::Newest => (
                "linux-newest",
                &["trixie", "trixie-backports"],
                &[
                    "linux-binary-*+deb13-cloud-amd64",
                    "linux-modules-*+deb13-cloud-amd64",
                    "linux-base-*+deb13-cloud-amd64",
                ],
            ),
        };
        Set { name, suites, packages, with_dependencies: false }
    }

    /// Fetches it if the cache does not have it.
    pub fn unpack(self) -> Result<Files> {
        Files::find(&debian::unpack(&self.set())?)
    }
}

/// An unpacked kernel.
#[derive(Debug, Clone)]
pub struct Files {
    /// What `uname -r` says in it.
    pub release: String,
    /// The compressed kernel that QEMU boots.
    pub vmlinuz: PathBuf,
    modules: PathBuf,
}

/// A module ready to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// With underscores, as in /proc/modules.
    pub name: String,
    /// The uncompressed file.
    pub bytes: Vec<u8>,
}

impl Files {
    fn find(root: &Path) -> Result<Self> {
        let folders = ["usr/lib/modules", "lib/modules"].map(|dir| root.join(dir));
        let mut entries = folders.iter().filter_map(|dir| fs::read_dir(dir).ok()).flatten();
        let modules = entries.next().with_context(|| format!("no kernel modules in {}", root.display()))??.path();
        let release = modules.file_name().context("a modules folder has a name")?.to_string_lossy().into_owned();
        let places = [modules.join("vmlinuz"), root.join(format!("boot/vmlinuz-{release}"))];
        let vmlinuz = places.into_iter().find(|path| path.exists());
        Ok(Self { vmlinuz: vmlinuz.with_context(|| format!("no vmlinuz in {}", root.display()))?, release, modules })
    }

    /// The named modules after all that they depend on; those built into the kernel are left out.
    ///
    /// # Errors
    /// When this kernel has no such module.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<Module>> {
        let builtin = fs::read_to_string(self.modules.join("modules.builtin"))?;
        let builtin: Vec<String> = builtin.lines().filter_map(|line| module_name(Path::new(line))).collect();
        let mut paths = BTreeMap::new();
        collect(&self.modules.join("kernel"), &mut paths)?;
        let mut order = Vec::new();
        for name in names {
            visit(name, &builtin, &paths, &mut order)
                .with_context(|| format!("cannot load {name} in kernel {}", self.release))?;
        }
        Ok(order)
    }
}

/// Appends the module `name` to the order, after its dependencies.
fn visit(name: &str, builtin: &[String], paths: &BTreeMap<String, PathBuf>, order: &mut Vec<Module>) -> Result<()> {
    let name = name.replace('-', "_");
    if builtin.contains(&name) || order.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let path = paths.get(&name).with_context(|| format!("there is no module {name}"))?;
    let bytes = read_module(path)?;
    for dependency in depends(&bytes) {
        visit(&dependency, builtin, paths, order)?;
    }
    order.push(Module { name, bytes });
    Ok(())
}

/// Every module below `dir` by name.
fn collect(dir: &Path, paths: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, paths)?;
        } else if let Some(name) = module_name(&path) {
            paths.insert(name, path);
        }
    }
    Ok(())
}

fn module_name(path: &Path) -> Option<String> {
    let (name, rest) = path.file_name()?.to_str()?.split_once(".ko")?;
    ["", ".xz"].contains(&rest).then(|| name.replace('-', "_"))
}

fn read_module(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|extension| extension != "xz") {
        return fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    }
    let output = Command::new("xz").arg("-dc").arg(path).output().context("cannot run xz")?;
    ensure!(output.status.success(), "xz cannot unpack {}", path.display());
    Ok(output.stdout)
}

/// The field `depends` of a module's `.modinfo`: what depmod would read, without depmod.
fn depends(module: &[u8]) -> Vec<String> {
    let text = module.split(|&byte| byte == 0).find_map(|entry| entry.strip_prefix(b"depends="));
    let text = String::from_utf8_lossy(text.unwrap_or_default()).into_owned();
    text.split(',').filter(|name| !name.is_empty()).map(ToOwned::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_is_ordered_after_what_it_depends_on() {
        let dir = tempfile::tempdir().unwrap();
        let mut paths = BTreeMap::new();
        for (name, needs) in [("console", "ring,base"), ("ring", "base,core"), ("base", "")] {
            let path = dir.path().join(format!("{name}.ko"));
            fs::write(&path, format!("ELF\0license=GPL\0depends={needs}\0retpoline=Y\0")).unwrap();
            paths.insert(name.to_owned(), path);
        }
        let mut order = Vec::new();
        visit("console", &["core".to_owned()], &paths, &mut order).unwrap();
        let names: Vec<&str> = order.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["base", "ring", "console"]);
        assert!(visit("nothing", &[], &paths, &mut order).is_err());
    }

    #[test]
    fn module_names_are_those_of_proc_modules() {
        assert_eq!(module_name(Path::new("kernel/a/kvm-amd.ko.xz")).as_deref(), Some("kvm_amd"));
        assert_eq!(module_name(Path::new("virtio.ko")).as_deref(), Some("virtio"));
        assert_eq!(module_name(Path::new("modules.order")), None);
    }
}
