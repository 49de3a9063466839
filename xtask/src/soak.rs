//! `cargo xtask soak`: tests that take long by nature, run by hand: the same test over and over, or one long recording.
//!
//! In: cases, minutes for each. Out: a line for each run and a table; an error if a run failed. Runs: cargo test, one case
//! after another; `VTRACE_SOAK_MINUTES` tells a test how long it may record or how many sessions to run.

use crate::{cache, packages};
use anyhow::{Context, Result, bail, ensure};
use std::process::Command;
use std::time::{Duration, Instant};

/// What tests read: minutes.
pub const MINUTES: &str = "VTRACE_SOAK_MINUTES";

/// A test of tests/tests, and how it is made long.
struct Case {
    name: &'static str,
    suite: &'static str,
    test: &'static str,
    /// The test itself takes the minutes; else it is run again until they are over.
    is_long: bool,
}

const CASES: [Case; 6] = [
    Case { name: "sessions", suite: "sessions", test: "sessions_leave_nothing", is_long: true },
    Case { name: "kills", suite: "restore", test: "killed_recording_has_every_page_that_was_written", is_long: false },
    Case {
        name: "kills-at-end",
        suite: "restore",
        test: "recording_killed_anywhere_in_its_end_can_be_restored",
        is_long: false,
    },
    Case {
        name: "kills-set",
        suite: "restore_set",
        test: "set_whose_recorder_or_agent_was_killed_has_every_page_that_was_written",
        is_long: false,
    },
    Case { name: "guest", suite: "record_guest", test: "record_guest_on_newest_kernel", is_long: false },
    Case {
        name: "hostile",
        suite: "hostile_guest",
        test: "recording_is_whole_beside_a_vmm_and_an_agent_that_attack",
        is_long: true,
    },
];

/// Which cases, and how long each.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    /// Cases to run: sessions, kills, kills-at-end, kills-set, guest, hostile; all if none is named
    cases: Vec<String>,
    /// Minutes for each case
    #[arg(long, default_value_t = 20)]
    minutes: u64,
}

/// Runs the cases, prints how often and how long each ran.
///
/// # Errors
/// When a run failed, or there is no such case.
pub fn run(arguments: &Arguments) -> Result<()> {
    if let Some(unknown) = arguments.cases.iter().find(|name| CASES.iter().all(|case| case.name != **name)) {
        bail!("no case `{unknown}`; there are: {}", CASES.map(|case| case.name).join(", "));
    }
    packages::ensure_listed()?;
    let mut table = String::new();
    let mut failures = 0;
    for case in
        CASES.iter().filter(|case| arguments.cases.is_empty() || arguments.cases.iter().any(|name| name == case.name))
    {
        let outcome = soak(case, arguments.minutes)?;
        failures += outcome.failed;
        let Outcome { runs, failed, elapsed } = outcome;
        table += &format!("{:13} {runs:>4} runs, {failed:>2} failed, {:>6} s\n", case.name, elapsed.as_secs());
    }
    println!("──\n{}", table.trim_end());
    ensure!(failures == 0, "{failures} runs failed");
    Ok(())
}

/// What one case came to.
struct Outcome {
    runs: u32,
    failed: u32,
    elapsed: Duration,
}

fn soak(case: &Case, minutes: u64) -> Result<Outcome> {
    let start = Instant::now();
    let mut outcome = Outcome { runs: 0, failed: 0, elapsed: Duration::ZERO };
    loop {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(["test", "--quiet", "--locked", "--package", "vtrace-tests", "--test", case.suite, "--"]);
        cargo.args(["--exact", case.test, "--include-ignored"]).current_dir(cache::repository());
        if case.is_long {
            cargo.env(MINUTES, minutes.to_string());
        }
        let is_success = cargo.status().context("cannot run cargo")?.success();
        outcome.runs += 1;
        outcome.failed += u32::from(!is_success);
        outcome.elapsed = start.elapsed();
        println!("{}: run {}, {}", case.name, outcome.runs, if is_success { "ok" } else { "FAILED" });
        if case.is_long || outcome.elapsed >= Duration::from_secs(60 * minutes) {
            return Ok(outcome);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_is_a_test_that_exists() {
        for case in CASES {
            let path = cache::repository().join("tests/tests").join(format!("{}.rs", case.suite));
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.contains(&format!("#[test]\nfn {}(", case.test)), "{}: {}", case.name, case.test);
        }
    }

    #[test]
    fn unknown_case_is_refused_with_the_cases_there_are() {
        let error = run(&Arguments { cases: vec!["naps".into()], minutes: 1 }).unwrap_err().to_string();
        assert!(error.contains("naps") && error.contains("sessions, kills"), "{error}");
    }
}
