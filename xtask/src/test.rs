//! `cargo xtask test`: everything that CI tests.
//!
//! In:    the repository
//! Out:   success; or, after all steps, the names of those that failed
//! Runs:  cargo as a child process, what is quick first, guests one after another
//! Trust: the repository

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};

use crate::kernel::Kernel;
use crate::{build, cache, ebpf, fuzz, image, lab, packages, tidy};

/// The package whose tests boot guests.
const GUEST_TESTS: &str = "vtrace-tests";
/// Its fuzz targets need libFuzzer and are built only with this.
const FUZZ_LINT: [&str; 6] = ["clippy", "--package", "vtrace-fuzz", "--features", "fuzzing", "--bins"];

/// More guest tests than these do not fail by accident.
const AGAIN_MAX: usize = 2;

/// One part of the whole: its name, and what it does.
type Step = (&'static str, fn() -> Result<()>);

const STEPS: [Step; 9] = [
    ("fmt", || cargo(&["fmt", "--all", "--check"])),
    ("tidy", || tidy::run(tidy::Arguments::default())),
    ("clippy", clippy),
    ("unit", || cargo(&[&["test", "--no-fail-fast"][..], &build::UNIT_TESTS].concat())),
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
    let test = ["test", "--locked", "--package", GUEST_TESTS];
    cargo(&[&test[..], &["--no-run"]].concat())?;
    let files = guest_files()?;
    let (mut failed, mut broken) = (Vec::new(), Vec::new());
    for file in &files {
        let words = [&test[..], &["--test", file, "--", "--test-threads=1"]].concat();
        match failures(&words)? {
            (true, _) => {}
            (false, names) if names.is_empty() => broken.push(file.as_str()),
            (false, names) => failed.push((words, names)),
        }
    }
    ensure!(broken.is_empty(), "these did not come to their end: {}", broken.join(", "));
    let names: Vec<&str> = failed.iter().flat_map(|(_, names)| names).map(String::as_str).collect();
    ensure!(names.len() <= AGAIN_MAX, "these tests failed: {}", names.join(", "));
    // An emulated guest on a busy machine may be late. A claim that holds holds again; that it did not at first is said.
    for (words, names) in &failed {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        cargo(&[&words[..], &["--exact"], &names].concat())?;
    }
    if !names.is_empty() {
        println!("UNSTEADY, failed and then passed: {}", names.join(", "));
    }
    Ok(())
}

/// Each file of guest tests, or folder of one, by the name cargo gives it.
fn guest_files() -> Result<Vec<String>> {
    let entries = std::fs::read_dir(cache::repository().join("tests/tests"))?.collect::<Result<Vec<_>, _>>()?;
    let name = |path: &Path| path.file_stem().and_then(|name| name.to_str()).map(str::to_owned);
    let mut names: Vec<String> = entries.iter().filter_map(|entry| name(&entry.path())).collect();
    names.sort_unstable();
    Ok(names)
}

/// Runs tests and shows what they print: whether all passed, and the names of those that did not.
fn failures(words: &[&str]) -> Result<(bool, Vec<String>)> {
    println!("cargo {}", words.join(" "));
    let mut child = command(words).stdout(Stdio::piped()).spawn().context("cannot run cargo")?;
    let mut failed = Failed::default();
    for line in BufReader::new(child.stdout.take().context("a pipe")?).lines() {
        let line = line?;
        println!("{line}");
        failed.read(&line);
    }
    Ok((child.wait()?.success(), failed.names))
}

/// The names under `failures:`, as libtest lists them when the tests of a file have run.
#[derive(Default)]
struct Failed {
    names: Vec<String>,
    is_listed: bool,
}

impl Failed {
    fn read(&mut self, line: &str) {
        match line.strip_prefix("    ") {
            Some(name) if self.is_listed && !name.contains(' ') => self.names.push(name.to_owned()),
            _ => self.is_listed = line == "failures:",
        }
    }
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
    fn failed_tests_are_read_from_their_list_and_not_from_their_output() {
        let mut failed = Failed::default();
        let said = "test a_b ... FAILED\n\nfailures:\n\n---- a_b stdout ----\n    indented\n\nfailures:\n    a_b\n    c::d_e\n\n\
                    test result: FAILED. 1 passed; 2 failed\n    indented\n";
        said.lines().for_each(|line| failed.read(line));
        assert_eq!(failed.names, ["a_b", "c::d_e"]);
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
