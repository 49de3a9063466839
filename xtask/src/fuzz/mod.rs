//! `cargo xtask fuzz`: coverage-guided fuzzing with the pinned stable toolchain, without cargo-fuzz.
//!
//! In:    the bins of tests/fuzz that require the feature `fuzzing`
//! Out:   `target/fuzz/`: corpus/TARGET/, crashes/TARGET-*, logs/TARGET.log; an error if a target broke
//! Runs:  one process a target, `--jobs` at a time, after the canary has proved that coverage and reports work
//! Trust: our own code
//!
//! Stable rustc has LLVM's coverage pass (`-Cpasses=sancov-module`); libfuzzer-sys brings the fuzzer, which is C++.
//! AddressSanitizer's runtime comes with rustup's toolchain and only its flag is unstable, so RUSTC_BOOTSTRAP opens it;
//! a toolchain without the runtime fuzzes without it.

mod build;
mod launch;

use std::{
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use anyhow::{Context, Result, bail, ensure};

use build::Build;
use launch::{Limit, Outcome};

/// The target that must break; see `vtrace_fuzz::canary`.
const CANARY: &str = "canary";
/// Seconds after which a silent canary is dead; it sings within one or two.
const CANARY_SECONDS_MAX: u64 = 60;
/// Seconds of each target when all are run: with twelve of them, two at a time, as long as it takes to build them.
pub const SECONDS_DEFAULT: u64 = 12;

/// Targets that run at a time.
const JOBS_DEFAULT: usize = 2;

/// What to fuzz, and for how long.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    /// Targets to run; all if none is named.
    pub targets: Vec<String>,
    /// Seconds for each target [default: 12 for all, no limit for named ones].
    #[arg(long)]
    pub seconds: Option<u64>,
    /// Targets that run at a time.
    #[arg(long, default_value_t = JOBS_DEFAULT)]
    pub jobs: usize,
    /// Feeds this one file to the target, as a crash report names it.
    #[arg(long)]
    pub input: Option<PathBuf>,
}

impl Default for Arguments {
    fn default() -> Self {
        Self { targets: Vec::new(), seconds: None, jobs: JOBS_DEFAULT, input: None }
    }
}

/// Builds, proves that the fuzzer sees, fuzzes.
///
/// # Errors
/// When a target broke, the canary stayed silent, or something does not build.
pub fn run(arguments: &Arguments) -> Result<()> {
    let build = Build::new()?;
    let targets = chosen(arguments, &build.targets)?;
    build.compile()?;
    if let Some(input) = &arguments.input {
        return replay(&build, &targets, input);
    }
    build.write_seeds()?;
    prove_canary(&build)?;
    let outcomes = run_all(&build, &targets, limit(arguments), arguments.jobs)?;
    report(&outcomes)
}

fn chosen(arguments: &Arguments, known: &[String]) -> Result<Vec<String>> {
    let unknown = arguments.targets.iter().find(|name| !known.contains(name));
    if let Some(name) = unknown {
        bail!("no fuzz target `{name}`; there are: {}", known.join(", "));
    }
    let all = || known.iter().filter(|name| *name != CANARY).cloned().collect();
    let targets: Vec<String> = if arguments.targets.is_empty() { all() } else { arguments.targets.clone() };
    let endless = limit(arguments) == Limit::None;
    ensure!(
        !endless || targets.len() <= arguments.jobs,
        "without --seconds at most --jobs {} targets run",
        arguments.jobs
    );
    Ok(targets)
}

fn limit(arguments: &Arguments) -> Limit {
    match arguments.seconds {
        Some(seconds) => Limit::Seconds(seconds),
        None if arguments.targets.is_empty() => Limit::Seconds(SECONDS_DEFAULT),
        None => Limit::None,
    }
}

fn replay(build: &Build, targets: &[String], input: &Path) -> Result<()> {
    let [target] = targets else { bail!("--input needs one target") };
    let status = launch::replay(build, target, input)?;
    ensure!(status.success(), "{} breaks {target} ({status})", input.display());
    println!("fuzz {target}: {} does no harm", input.display());
    Ok(())
}

/// The canary has to sing, its input has to be kept, and the process has to fail.
fn prove_canary(build: &Build) -> Result<()> {
    let outcome = launch::fuzz(build, CANARY, Limit::Seconds(CANARY_SECONDS_MAX))?;
    ensure!(!outcome.status.success(), "the fuzzer is blind: {outcome} (log: {})", outcome.log.display());
    ensure!(outcome.says("the canary sings"), "the canary fell off its perch: see {}", outcome.log.display());
    let kept = outcome.broken_input().context("the canary sang, but its input was not kept")?;
    std::fs::remove_file(&kept).with_context(|| format!("{} was reported, but is not there", kept.display()))?;
    println!("fuzz {CANARY}: found after {} runs and reported, as it must be", outcome.runs());
    Ok(())
}

fn run_all(build: &Build, targets: &[String], limit: Limit, jobs: usize) -> Result<Vec<Outcome>> {
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(Vec::new());
    let work = || {
        while let Some(target) = targets.get(next.fetch_add(1, Ordering::Relaxed)) {
            let outcome = launch::fuzz(build, target, limit);
            if let Ok(outcome) = &outcome {
                println!("{outcome}");
            }
            outcomes.lock().expect("no worker panics").push(outcome);
        }
    };
    thread::scope(|scope| (0..jobs.max(1)).for_each(|_| drop(scope.spawn(work))));
    outcomes.into_inner().expect("no worker panics").into_iter().collect()
}

fn report(outcomes: &[Outcome]) -> Result<()> {
    let broken: Vec<&Outcome> = outcomes.iter().filter(|outcome| !outcome.status.success()).collect();
    for outcome in &broken {
        eprintln!("{}", outcome.complaint());
    }
    let names: Vec<&str> = broken.iter().map(|outcome| outcome.target.as_str()).collect();
    ensure!(broken.is_empty(), "{} of {} fuzz targets broke: {}", broken.len(), outcomes.len(), names.join(", "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Vec<String> {
        [CANARY, "page", "wire"].map(String::from).to_vec()
    }

    fn named(names: &[&str]) -> Arguments {
        Arguments { targets: names.iter().map(|name| (*name).into()).collect(), ..Arguments::default() }
    }

    #[test]
    fn all_targets_are_all_but_the_canary_for_some_seconds_each() {
        assert_eq!(chosen(&named(&[]), &known()).unwrap(), ["page", "wire"]);
        assert_eq!(limit(&named(&[])), Limit::Seconds(SECONDS_DEFAULT));
    }

    #[test]
    fn named_target_runs_without_limit() {
        assert_eq!(chosen(&named(&["wire"]), &known()).unwrap(), ["wire"]);
        assert_eq!(limit(&named(&["wire"])), Limit::None);
    }

    #[test]
    fn unknown_target_is_refused_with_the_names_there_are() {
        let refusal = chosen(&named(&["wires"]), &known()).unwrap_err().to_string();
        assert_eq!(refusal, "no fuzz target `wires`; there are: canary, page, wire");
    }

    #[test]
    fn endless_targets_beyond_the_jobs_are_refused_as_they_would_never_run() {
        let arguments = Arguments { jobs: 1, ..named(&["wire", "page"]) };
        assert!(chosen(&arguments, &known()).is_err());
    }
}
