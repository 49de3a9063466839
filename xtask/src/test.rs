//! `cargo xtask test`: everything that CI tests.
//!
//! In:    the repository
//! Out:   success; or, after all steps, the names of those that failed
//! Runs:  cargo as a child process, what is quick first, guests one after another
//! Trust: the repository

use std::{path::Path, process::Command, time::Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::kernel::Kernel;
use crate::{cache, ebpf, fuzz, image, lab, packages, tidy};

/// The package whose tests boot guests.
const GUEST_TESTS: &str = "vtrace-tests";
/// Its fuzz targets need libFuzzer and are built only with this.
const FUZZ_LINT: [&str; 6] = ["clippy", "--package", "vtrace-fuzz", "--features", "fuzzing", "--bins"];

/// One part of the whole: its name, and what it does.
type Step = (&'static str, fn() -> Result<()>);

const STEPS: [Step; 9] = [
    ("fmt", || cargo(&["fmt", "--all", "--check"])),
    ("tidy", tidy::run),
    ("clippy", clippy),
    ("unit", || cargo(&["test", "--locked", "--no-fail-fast", "--workspace", "--exclude", GUEST_TESTS])),
    ("ebpf", || ebpf::run(true)),
    ("image", make_guests),
    ("guest", guests),
    ("lab", labs),
    ("fuzz", || fuzz::run(&fuzz::Arguments::default())),
];

/// Which steps to run.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Arguments {
    /// Steps to run, of fmt, tidy, clippy, unit, ebpf, image, guest, lab, fuzz; all if none is named
    pub steps: Vec<String>,
}

/// Runs the steps in their order. One that fails does not keep the others from telling what they find.
///
/// # Errors
/// When a step failed, or none has that name.
pub fn run(arguments: &Arguments) -> Result<()> {
    let steps = chosen(&arguments.steps)?;
    let (mut table, mut failed) = (String::new(), Vec::new());
    for (name, step) in steps {
        println!("── {name}");
        let start = Instant::now();
        let verdict = match step() {
            Ok(()) => "ok",
            Err(error) => {
                eprintln!("{name}: {error:#}");
                failed.push(name);
                "FAILED"
            }
        };
        table.push_str(&format!("{name:8} {:>5} s  {verdict}\n", start.elapsed().as_secs()));
    }
    println!("──\n{}", table.trim_end());
    ensure!(failed.is_empty(), "these steps failed: {}", failed.join(", "));
    Ok(())
}

fn chosen(names: &[String]) -> Result<Vec<Step>> {
    if let Some(unknown) = names.iter().find(|name| STEPS.iter().all(|(step, _)| step != name)) {
        bail!("no step `{unknown}`; there are: {}", STEPS.map(|(name, _)| name).join(", "));
    }
    let is_chosen = |(name, _): &Step| names.is_empty() || names.iter().any(|chosen| chosen == name);
    Ok(STEPS.into_iter().filter(is_chosen).collect())
}

/// Everything that compiles, the fuzz targets too.
fn clippy() -> Result<()> {
    packages::ensure(&packages::COMPILERS)?;
    let deny = ["--locked", "--", "--deny", "warnings"];
    cargo(&[&["clippy", "--workspace", "--all-targets"][..], &deny].concat())?;
    cargo(&[&FUZZ_LINT[..], &deny].concat())
}

fn make_guests() -> Result<()> {
    packages::ensure(&packages::JUDGES)?;
    image::run()
}

/// Guests take turns anyway; one thread keeps the output of a failed boot with its test.
fn guests() -> Result<()> {
    cargo(&["test", "--locked", "--no-fail-fast", "--package", GUEST_TESTS, "--", "--test-threads=1"])
}

/// The clock on real kernels: on this machine's own KVM, if it has one; on the newest kernel's, where kvm_entry speaks; and
/// with everything else, in one recording of a guest whose TSC is moved. The other kernels and `lab vmx` are run by hand.
fn labs() -> Result<()> {
    if Path::new("/dev/kvm").exists() {
        let only = ["clock::feed", "recorder::kvm", "--ignored", "--test-threads=1"];
        cargo(&[&["test", "--locked", "--package", "vtrace-dp", "--lib", "--"][..], &only].concat())?;
    } else {
        println!("no /dev/kvm: the clock's live tests run in the labs only");
    }
    lab::svm(&[Kernel::Newest])?;
    lab::nested::run(Kernel::V6_12)
}

fn cargo(words: &[&str]) -> Result<()> {
    println!("cargo {}", words.join(" "));
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let status = command.args(words).current_dir(cache::repository()).status().context("cannot run cargo")?;
    ensure!(status.success(), "cargo {} failed", words.join(" "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(steps: &[&str]) -> Result<Vec<&'static str>> {
        let steps: Vec<String> = steps.iter().map(|&step| step.into()).collect();
        Ok(chosen(&steps)?.into_iter().map(|(name, _)| name).collect())
    }

    #[test]
    fn steps_keep_their_order_and_all_are_run_if_none_is_named() {
        assert_eq!(names(&["unit", "fmt"]).unwrap(), ["fmt", "unit"]);
        assert_eq!(names(&[]).unwrap().len(), STEPS.len());
    }

    #[test]
    fn unknown_step_is_refused_with_the_names_there_are() {
        assert!(
            names(&["lint"])
                .unwrap_err()
                .to_string()
                .ends_with("fmt, tidy, clippy, unit, ebpf, image, guest, lab, fuzz")
        );
    }
}
