//! The time of each test, and which were the slowest; the names of those that failed.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

/// What makes libtest print times; it wants `RUSTC_BOOTSTRAP` in its own environment.
pub(super) const REPORT: [&str; 3] = ["-Zunstable-options", "--report-time", "--color=never"];
/// How cargo is told to start tests.
pub(super) const RUNNER: &str = "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER";
/// Tests that are printed.
const SLOWEST: usize = 12;

/// Times of tests, by step and name.
#[derive(Debug, Default)]
pub(super) struct Times {
    all: Vec<(Duration, String)>,
}

/// Where the time of a test comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Clock {
    /// `<1.234s>` at the end of its line.
    Reported,
    /// The time between two lines: tests run one after the other.
    Lines,
}

/// What a run of tests came to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Run {
    pub(super) is_success: bool,
    pub(super) failed: Vec<String>,
}

impl Times {
    /// Runs tests and shows what they print.
    pub(super) fn read(&mut self, step: &str, command: &mut Command, clock: Clock) -> Result<Run> {
        let mut child = command.stdout(Stdio::piped()).spawn().context("cannot run tests")?;
        let mut failed = Failed::default();
        let mut last = Instant::now();
        for line in BufReader::new(child.stdout.take().context("a pipe")?).lines() {
            let line = line?;
            println!("{line}");
            failed.read(&line);
            if line.starts_with("running ") {
                last = Instant::now();
            }
            let Some((name, reported)) = result(&line) else { continue };
            let elapsed = last.elapsed();
            last = Instant::now();
            let time = if clock == Clock::Lines { Some(elapsed) } else { reported };
            self.all.extend(time.map(|time| (time, format!("{step}: {name}"))));
        }
        Ok(Run { is_success: child.wait()?.success(), failed: failed.names })
    }

    /// The slowest tests, one a line; nothing if no time was taken.
    pub(super) fn slowest(&mut self) -> String {
        self.all.sort_by(|left, right| right.cmp(left));
        let line = |(time, name): &(Duration, String)| format!("{:>7.1} s  {name}\n", time.as_secs_f64());
        let lines: String = self.all.iter().take(SLOWEST).map(line).collect();
        if lines.is_empty() { lines } else { format!("── slowest tests\n{lines}") }
    }
}

/// Name and reported time of a test whose line this is: `test NAME ... ok <0.012s>`. What a test printed itself may stand
/// between the dots and the result.
fn result(line: &str) -> Option<(&str, Option<Duration>)> {
    let (name, rest) = line.strip_prefix("test ")?.split_once(" ... ").or_else(|| {
        // A test of a set that is run one by one: its own output ends the line.
        line.strip_prefix("test ")?.split_once(" ...")
    })?;
    if name.contains(' ') {
        return None;
    }
    let reported = rest.rsplit_once('<').and_then(|(_, time)| time.strip_suffix("s>")?.parse().ok());
    Some((name, reported.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_tests_are_read_from_their_list_and_not_from_their_output() {
        let mut failed = Failed::default();
        let output = "test a_b ... FAILED\n\nfailures:\n\n---- a_b stdout ----\n    indented\n\nfailures:\n    a_b\n    c::d_e\n\n\
                    test result: FAILED. 1 passed; 2 failed\n    indented\n";
        output.lines().for_each(|line| failed.read(line));
        assert_eq!(failed.names, ["a_b", "c::d_e"]);
    }

    #[test]
    fn time_of_a_test_is_read_from_its_line() {
        assert_eq!(result("test a::b_c ... ok <1.250s>"), Some(("a::b_c", Some(Duration::from_millis(1250)))));
        assert_eq!(result("test a_b ... ok"), Some(("a_b", None)));
        assert_eq!(result("test result: ok. 1 passed; finished in 2.00s"), None);
    }

    #[test]
    fn slowest_tests_come_first_and_only_a_few() {
        let mut times = Times::default();
        assert_eq!(times.slowest(), "");
        let mut tests = Command::new("sh");
        let lines = (0..20).map(|at| format!("test t{at} ... ok <{at}.5s>\n")).collect::<String>();
        tests.args(["-c", &format!("printf '{lines}'")]);
        assert!(times.read("unit", &mut tests, Clock::Reported).unwrap().is_success);
        let text = times.slowest();
        assert!(text.starts_with("── slowest tests\n   19.5 s  unit: t19\n") && text.lines().count() == 13, "{text}");
    }
}
