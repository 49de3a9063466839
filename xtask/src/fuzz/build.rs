//! Builds the fuzz targets with coverage counters and, where the toolchain has it, AddressSanitizer.
//!
//! In:    cargo's own description of the workspace
//! Out:   bins under `target/fuzz/build`, apart from all other builds because of their flags

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::packages;

/// The only machine vtrace runs on. Named, so that the flags do not reach build scripts.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";
const PACKAGE: &str = "vtrace-fuzz";
const FEATURE: &str = "fuzzing";
/// Counters for every edge, a table of their addresses, and operands of comparisons: what libFuzzer steers by.
const FLAGS: [&str; 7] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
];

/// Where things are, and which targets there are.
#[derive(Debug)]
pub(super) struct Build {
    /// `target/fuzz`.
    pub(super) folder: PathBuf,
    /// tests/fuzz.
    pub(super) package: PathBuf,
    /// Names of the bins that need the feature.
    pub(super) targets: Vec<String>,
}

impl Build {
    /// Asks cargo.
    pub(super) fn new() -> Result<Self> {
        let output = cargo().args(["metadata", "--no-deps", "--format-version=1"]).stderr(Stdio::inherit()).output()?;
        ensure!(output.status.success(), "cargo metadata failed ({})", output.status);
        Self::parse(&serde_json::from_slice(&output.stdout)?).context("cargo metadata knows no fuzz targets")
    }

    fn parse(metadata: &Value) -> Option<Self> {
        let folder = Path::new(metadata["target_directory"].as_str()?).join("fuzz");
        let package = metadata["packages"].as_array()?.iter().find(|package| package["name"] == PACKAGE)?;
        let needs_feature =
            |target: &&Value| target["required-features"].as_array().is_some_and(|list| list.contains(&FEATURE.into()));
        let targets = package["targets"].as_array()?.iter().filter(needs_feature);
        let targets = targets.filter_map(|target| target["name"].as_str().map(String::from)).collect();
        let package = Path::new(package["manifest_path"].as_str()?).parent()?.to_path_buf();
        Some(Self { folder, package, targets })
    }

    /// The program of a target.
    pub(super) fn program(&self, target: &str) -> PathBuf {
        self.folder.join("build").join(TRIPLE).join("release").join(target)
    }

    /// Builds all targets, optimised, with debug assertions and overflow checks.
    pub(super) fn compile(&self) -> Result<()> {
        require_cxx()?;
        let sanitizer = sanitizer_runtime()?;
        match &sanitizer {
            Some(_) => println!("fuzz: building with coverage, overflow checks and AddressSanitizer"),
            None => {
                println!("fuzz: building with coverage and overflow checks; this toolchain has no AddressSanitizer")
            }
        }
        let mut build = cargo();
        build.args(["build", "--quiet", "--release", "--bins", "--package", PACKAGE, "--features", FEATURE]);
        build.args(["--target", TRIPLE, "--target-dir"]).arg(self.folder.join("build"));
        build.env("CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS", "true");
        build.env("CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS", "true");
        build.env("RUSTFLAGS", rustflags(sanitizer.is_some())).env_remove("CARGO_ENCODED_RUSTFLAGS");
        if sanitizer.is_some() {
            build.env("RUSTC_BOOTSTRAP", "1"); // opens -Zsanitizer on a stable rustc
        }
        succeed(build)
    }

    /// Lets each target's own builders fill its corpus.
    pub(super) fn write_seeds(&self) -> Result<()> {
        let mut seeds = cargo();
        seeds.args(["run", "--quiet", "--package", PACKAGE, "--bin", "seeds", "--"]).arg(self.folder.join("corpus"));
        succeed(seeds)
    }
}

fn rustflags(sanitizer: bool) -> String {
    let sanitizer = sanitizer.then_some("-Zsanitizer=address");
    FLAGS.into_iter().chain(sanitizer).collect::<Vec<_>>().join(" ")
}

fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

fn succeed(mut command: Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start {}", command.get_program().display()))?;
    ensure!(status.success(), "{} failed ({status})", command.get_program().display());
    Ok(())
}

/// libFuzzer is C++.
fn require_cxx() -> Result<()> {
    let compiler = env::var_os("CXX").unwrap_or_else(|| OsString::from("c++"));
    let found = Command::new(&compiler).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if found.is_ok() {
        Ok(())
    } else {
        packages::ensure(&packages::COMPILERS).context("libFuzzer needs a C++ compiler")
    }
}

/// AddressSanitizer's runtime, if the toolchain brings it.
fn sanitizer_runtime() -> Result<Option<PathBuf>> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc).args(["--print", "sysroot"]).output().context("cannot start rustc")?;
    let sysroot = PathBuf::from(String::from_utf8(output.stdout)?.trim());
    let folder = sysroot.join("lib/rustlib").join(TRIPLE).join("lib");
    let names = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let paths = names.flatten().map(|entry| entry.path());
    Ok(paths.into_iter().find(|path| path.to_string_lossy().ends_with("_rt.asan.a")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn targets_are_the_bins_that_need_the_feature() {
        let bins = json!([
            { "name": "vtrace-fuzz" },
            { "name": "seeds", "required-features": [] },
            { "name": "wire", "required-features": ["fuzzing"] },
        ]);
        let package =
            json!({ "name": "vtrace-fuzz", "manifest_path": "/there/tests/fuzz/Cargo.toml", "targets": bins });
        let build = Build::parse(&json!({ "target_directory": "/there/target", "packages": [package] })).unwrap();
        assert_eq!(build.targets, ["wire"]);
        assert_eq!(build.package, Path::new("/there/tests/fuzz"));
        assert!(build.program("wire").ends_with("target/fuzz/build/x86_64-unknown-linux-gnu/release/wire"));
    }

    #[test]
    fn sanitizer_flag_is_given_only_with_its_runtime() {
        assert!(rustflags(true).ends_with(" -Zsanitizer=address"));
        assert!(!rustflags(false).contains("-Z"));
    }
}
