//! `cargo xtask ebpf`: the eBPF object from its Rust source, and the proof that the two agree.
//!
//! In:    vtrace-ebpf and vtrace-common, the pinned toolchain. Out: vtrace-ebpf/vtrace.bpf.o.
//! Runs:  cargo as a child process, on stable Rust with its unstable switches on; no other task needs them, because the
//!        object is committed. Full: disk errors go up. Trust: the toolchain, crates.io through Cargo.lock, Debian.
//!
//! Two things are made on first use and kept in the cache: bpf-linker, linked with the LLVM of this very rustc, and the
//! source of `core` (the toolchain's own if rustup has installed it, else Debian's package of the same version). The
//! toolchain itself is left as it is.

use crate::cache;
use crate::debian::{self, Set};
use anyhow::{Context, Result, bail, ensure};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const LINKER: &str = "bpf-linker";
const LINKER_VERSION: &str = "0.13.0";
const TARGET: &str = "bpfel-unknown-none";
const OBJECT: &str = "vtrace-ebpf/vtrace.bpf.o";
/// What the object is made of, beside crates.io and `core`.
const SOURCES: [&str; 5] =
    ["Cargo.toml", "vtrace-common/Cargo.toml", "vtrace-common/src", "vtrace-ebpf/Cargo.toml", "vtrace-ebpf/src"];
const LOCK: &str = "vtrace-ebpf/Cargo.lock";
/// Paths of this machine that must not show in the object.
const MARKS: [&str; 2] = ["/registry/", "/home/"];
/// How long one process waits while another builds the linker.
const PATIENCE: Duration = Duration::from_secs(900);

/// Builds the object and writes it, or with `check` builds it in another folder and compares.
///
/// # Errors
/// When something does not build; with `check` also when the committed object is not what its source gives.
pub fn run(check: bool) -> Result<()> {
    let start = Instant::now();
    let rustc = Rustc::find()?;
    let tools = Tools { linker: linker(&rustc)?, core: core_source(&rustc)?, rustc };
    let committed = cache::repository().join(OBJECT);
    let built = if check { build_elsewhere(&tools)? } else { build(&tools, &cache::repository(), &target())? };
    let shown = String::from_utf8_lossy(&built);
    if let Some(mark) = MARKS.iter().find(|mark| shown.contains(**mark)) {
        bail!("the object names a path of this machine ({mark})");
    }
    if check {
        let old = fs::read(&committed).with_context(|| format!("cannot read {}", committed.display()))?;
        ensure!(old == built, "{OBJECT} is not what its source gives; `cargo xtask ebpf` writes it anew");
    } else {
        fs::write(&committed, &built).with_context(|| format!("cannot write {}", committed.display()))?;
    }
    let done = if check { "is what its source gives" } else { "written" };
    println!("{OBJECT} {done}: {} bytes, {:.1} s", built.len(), start.elapsed().as_secs_f64());
    Ok(())
}

struct Tools {
    rustc: Rustc,
    linker: PathBuf,
    /// The folder `library` of the source of this rustc.
    core: PathBuf,
}

/// The compiler in use, from `rustc -vV`.
struct Rustc {
    sysroot: PathBuf,
    /// As 1.95.0.
    release: String,
    /// As 22.
    llvm_major: String,
}

impl Rustc {
    fn find() -> Result<Self> {
        let ask = |arguments: &[&str]| -> Result<String> {
            let output = Command::new("rustc").args(arguments).current_dir(cache::repository()).output();
            let output = output.context("cannot run rustc")?;
            ensure!(output.status.success(), "rustc {} failed", arguments.join(" "));
            Ok(String::from_utf8(output.stdout)?.trim().to_owned())
        };
        let version = ask(&["-vV"])?;
        let field = |name: &str| {
            let value = version.lines().find_map(|line| line.strip_prefix(name));
            value.map(str::to_owned).with_context(|| format!("rustc -vV has no line {name}"))
        };
        let llvm = field("LLVM version: ")?;
        let llvm_major = llvm.split('.').next().unwrap_or_default().to_owned();
        Ok(Self { sysroot: ask(&["--print", "sysroot"])?.into(), release: field("release: ")?, llvm_major })
    }

    /// The LLVM that this rustc is linked with: `libLLVM.so.22.1-rust-1.95.0-stable`.
    fn llvm(&self) -> Result<PathBuf> {
        let dir = self.sysroot.join("lib");
        let prefix = format!("libLLVM.so.{}.", self.llvm_major);
        for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                return Ok(entry.path());
            }
        }
        bail!("{} has no {prefix}*: bpf-linker needs rustc's LLVM as a shared library", dir.display())
    }
}

/// bpf-linker, built on first use. A copy whose LLVM is gone (the toolchain moved) is built again.
fn linker(rustc: &Rustc) -> Result<PathBuf> {
    let dir = cache::dir(&format!("{LINKER}-{LINKER_VERSION}-rustc-{}", rustc.release))?;
    let _turn = cache::lock(&dir.join(".lock"), "the build of bpf-linker", PATIENCE)?;
    let program = dir.join("bin").join(LINKER);
    if Command::new(&program).arg("--version").output().is_ok_and(|output| output.status.success()) {
        return Ok(program);
    }
    eprintln!("building {LINKER} {LINKER_VERSION} with rustc's LLVM {}, once, in a minute or two", rustc.llvm_major);
    let (llvm, scratch) = (rustc.llvm()?, tempfile::tempdir_in(&dir)?);
    let search = llvm.parent().context("a library lies in a folder")?;
    let flags = [
        format!("-Clink-arg={}", llvm.display()),
        // Found again at run time, where it lies.
        format!("-Clink-arg=-Wl,-rpath,{}", search.display()),
    ];
    let mut install = cargo(&flags);
    install.args(["install", "--quiet", "--locked", "--force", "--no-default-features", LINKER]);
    install.args(["--version", LINKER_VERSION, "--features"]);
    install.arg(format!("llvm-{},no-llvm-linking", rustc.llvm_major));
    let status = install.arg("--root").arg(&dir).env("CARGO_TARGET_DIR", scratch.path()).status()?;
    ensure!(status.success(), "{LINKER} does not build");
    Ok(program)
}

/// The source of `core` for this rustc.
fn core_source(rustc: &Rustc) -> Result<PathBuf> {
    let own = rustc.sysroot.join("lib/rustlib/src/rust/library");
    if own.join("core/Cargo.toml").exists() {
        return Ok(own);
    }
    let package: &'static str = format!("rust-src={}*", rustc.release).leak();
    let packages: &'static [&'static str] = vec![package].leak();
    let set = Set { name: "rust-src", suites: &["trixie", "trixie-backports"], packages, with_dependencies: false };
    let root = debian::unpack(&set).with_context(|| {
        format!("no source of core for rustc {}; `rustup component add rust-src` also brings it", rustc.release)
    })?;
    let library = root.join(format!("usr/src/rustc-{}/library", rustc.release));
    ensure!(library.join("core/Cargo.toml").exists(), "rust-src has no {}", library.display());
    Ok(library)
}

fn target() -> PathBuf {
    cache::target().join("ebpf")
}

/// Copies the sources to a folder of another name and builds there: what comes out must not depend on where.
fn build_elsewhere(tools: &Tools) -> Result<Vec<u8>> {
    let dir = tempfile::tempdir().context("cannot make a folder to build in")?;
    for source in SOURCES.into_iter().chain([LOCK]) {
        copy(&cache::repository().join(source), &dir.path().join(source))?;
    }
    build(tools, dir.path(), &dir.path().join("built"))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if !from.is_dir() {
        fs::create_dir_all(to.parent().context("a file lies in a folder")?)?;
        return fs::copy(from, to).map(drop).with_context(|| format!("cannot copy {}", from.display()));
    }
    for entry in fs::read_dir(from)? {
        let name = entry?.file_name();
        copy(&from.join(&name), &to.join(&name))?;
    }
    Ok(())
}

/// The object's bytes, built from the sources under `repository`.
fn build(tools: &Tools, repository: &Path, target: &Path) -> Result<Vec<u8>> {
    let flags = [
        format!("-Clinker={}", tools.linker.display()),
        "-Cdebuginfo=0".to_owned(),
        format!("--remap-path-prefix={}=/vtrace", repository.display()),
        format!("--remap-path-prefix={}=/rust/library", tools.core.display()),
        format!("--remap-path-prefix={}=/cargo", cargo_home()?.display()),
    ];
    let status = cargo(&flags)
        .args(["build", "--quiet", "--locked", "--release", "-Zbuild-std=core", "--target", TARGET])
        // Stable Rust, but `core` for this target is not shipped: it is built, which is unstable. The source root is
        // cargo's own switch for a sysroot without rust-src, so that the toolchain need not be touched.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("__CARGO_TESTS_ONLY_SRC_ROOT", &tools.core)
        .env("CARGO_TARGET_DIR", target)
        .current_dir(repository.join("vtrace-ebpf"))
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "vtrace-ebpf does not build (rustc {})", tools.rustc.release);
    let object = target.join(TARGET).join("release/vtrace");
    fs::read(&object).with_context(|| format!("cannot read {}", object.display()))
}

/// Cargo with exactly these flags for the compiler, whatever the environment says.
fn cargo(flags: &[String]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}")).env_remove("RUSTFLAGS").env_remove("RUSTC_WRAPPER");
    command
}

fn cargo_home() -> Result<PathBuf> {
    let chosen = std::env::var_os("CARGO_HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    let home: Option<OsString> = std::env::var_os("HOME");
    chosen.or_else(|| Some(PathBuf::from(home?).join(".cargo"))).context("neither CARGO_HOME nor HOME is set")
}
