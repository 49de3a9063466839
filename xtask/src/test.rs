//! `cargo xtask test`: everything that CI tests.
//!
//! In:    the repository
//! Out:   success; or, after all steps, the names of those that failed
//! Runs:  cargo as a child process, what is quick first, guests one after another
//! Trust: the repository

mod suites;
mod times;

use std::{path::Path, process::Command, time::Instant};

use anyhow::{Context, Result, bail, ensure};

use self::times::Times;
use crate::kernel::Kernel;
use crate::{build, cache, ebpf, fuzz, image, lab, packages, tidy};

/// Its fuzz targets need libFuzzer and are built only with this.
const FUZZ_LINT: [&str; 6] = ["clippy", "--package", "vtrace-fuzz", "--features", "fuzzing", "--bins"];

/// Which links are refused is in Cargo.toml.
const DOC_LINT: [&str; 5] = ["doc", "--workspace", "--no-deps", "--document-private-items", "--locked"];

/// One step: its name, and what it does; it adds the times of its tests.
type Step = (&'static str, fn(&mut Session) -> Result<()>);

/// What steps share.
#[derive(Debug, Default)]
struct Session {
    times: Times,
    /// Suites that the step `guest` runs; all if none is named.
    suites: Vec<String>,
}

const STEPS: [Step; 9] = [
    ("fmt", |_| cargo(&["fmt", "--all", "--check"])),
    ("tidy", |_| tidy::run(tidy::Arguments::default())),
    ("clippy", |_| clippy()),
    ("unit", unit),
    ("ebpf", |_| ebpf::run(true)),
    ("image", |_| make_guests()),
    ("guest", |session| suites::run(&mut session.times, &session.suites)),
    ("lab", |_| labs()),
    ("fuzz", |_| fuzz::run(&fuzz::Arguments::default())),
];

/// Which steps to run.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Arguments {
    /// Steps to run, of fmt, tidy, clippy, unit, ebpf, image, guest, lab, fuzz; all if none is named
    pub steps: Vec<String>,
    /// Suites of tests/tests to run in the step guest; all if none is named
    #[arg(long)]
    pub suite: Vec<String>,
}

/// Runs the steps in their order, all of them even if one fails; prints the slowest tests and the time of each step.
///
/// # Errors
/// When a step failed, or none has that name.
pub fn run(arguments: &Arguments) -> Result<()> {
    let steps = chosen(&arguments.steps)?;
    let mut table = String::new();
    let mut failed = Vec::new();
    let mut session = Session { times: Times::default(), suites: arguments.suite.clone() };
    for (name, step) in steps {
        println!("── {name}");
        let start = Instant::now();
        let verdict = match step(&mut session) {
            Ok(()) => "ok",
            Err(error) => {
                eprintln!("{name}: {error:#}");
                failed.push(name);
                "FAILED"
            }
        };
        table.push_str(&format!("{name:8} {:>5} s  {verdict}\n", start.elapsed().as_secs()));
    }
    print!("{}", session.times.slowest());
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

/// Everything that compiles, the fuzz targets too, and the links of the documentation.
fn clippy() -> Result<()> {
    packages::ensure(&packages::COMPILERS)?;
    let deny = ["--locked", "--", "--deny", "warnings"];
    cargo(&[&["clippy", "--workspace", "--all-targets"][..], &deny].concat())?;
    cargo(&[&FUZZ_LINT[..], &deny].concat())?;
    cargo(&DOC_LINT)
}

/// Unit tests with the time of each, then the examples in documentation, whose runner does not tell times.
fn unit(session: &mut Session) -> Result<()> {
    let kinds = ["--lib", "--bins", "--tests", "--examples"];
    let words = [&["test", "--no-fail-fast"][..], &build::UNIT_TESTS, &kinds, &["--"], &times::REPORT].concat();
    let mut tests = command(&words);
    // libtest tells times to those only who ask for what is not stable; cargo and rustc must not see that.
    tests.env(times::RUNNER, "env RUSTC_BOOTSTRAP=1");
    println!("cargo {}", words.join(" "));
    let run = session.times.read("unit", &mut tests, times::Clock::Reported)?;
    let documents = cargo(&[&["test", "--doc"][..], &build::UNIT_TESTS].concat());
    ensure!(run.is_success, "cargo test failed");
    documents
}

fn make_guests() -> Result<()> {
    packages::ensure_listed()?;
    image::run()
}

/// The clock on real kernels: on this machine's own KVM, if it has one; on the newest kernel's, where kvm_entry speaks; and
/// with everything else, in one recording of a guest whose TSC is moved. The other kernels and `lab vmx` are run by hand.
fn labs() -> Result<()> {
    if Path::new("/dev/kvm").exists() {
        let tests = build::unit_tests("vtrace_dp")?;
        let status =
            Command::new(&tests).args(["clock::feed", "recorder::kvm", "--ignored", "--test-threads=1"]).status();
        ensure!(status.context("cannot run the clock's tests")?.success(), "the clock's tests failed on this machine");
    } else {
        println!("no /dev/kvm: the clock's live tests run in the labs only");
    }
    lab::svm(&[Kernel::Newest])?;
    lab::nested::run(Kernel::V6_12)
}

fn cargo(words: &[&str]) -> Result<()> {
    println!("cargo {}", words.join(" "));
    let status = command(words).status().context("cannot run cargo")?;
    ensure!(status.success(), "cargo {} failed", words.join(" "));
    Ok(())
}

fn command(words: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(words).current_dir(cache::repository());
    command
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
