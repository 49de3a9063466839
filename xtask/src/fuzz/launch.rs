//! Runs one fuzz target and reads what libFuzzer says.

use std::{
    fmt,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use super::build::Build;

/// Lines of a log that say what broke; the one after a panic's place is its message.
const TELLING: [&str; 3] = ["ERROR: ", "SUMMARY: ", PANIC];
const PANIC: &str = "panicked at ";

/// When a target ends by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Limit {
    /// It does not; Ctrl-C ends it.
    None,
    /// After this long.
    Seconds(u64),
}

/// How a target's run went.
#[derive(Debug)]
pub(super) struct Outcome {
    /// Its name.
    pub(super) target: String,
    /// Not successful if it broke.
    pub(super) status: ExitStatus,
    /// Where everything it said is.
    pub(super) log: PathBuf,
    text: String,
    took: Duration,
}

/// Fuzzes one target. What it finds stays in its corpus for the next time.
pub(super) fn fuzz(build: &Build, target: &str, limit: Limit) -> Result<Outcome> {
    let [corpus, crashes, logs] = ["corpus", "crashes", "logs"].map(|name| build.folder.join(name));
    let corpus = corpus.join(target);
    for folder in [&corpus, &crashes, &logs] {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    let log = logs.join(format!("{target}.log"));
    let mut command = program(build, target);
    command.args(["-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1"]);
    command.arg(format!("-artifact_prefix={}/{target}-", crashes.display())).arg(&corpus);
    let regressions = build.package.join("regressions").join(target);
    command.args(regressions.exists().then_some(regressions));
    match limit {
        Limit::Seconds(seconds) => drop(command.arg(format!("-max_total_time={seconds}"))),
        Limit::None => println!("fuzz {target}: until Ctrl-C; tail -f {}", log.display()),
    }
    let start = Instant::now();
    let file = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
    let status = command.stdout(file.try_clone()?).stderr(file).status();
    let status = status.with_context(|| format!("cannot start {}", build.program(target).display()))?;
    let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    Ok(Outcome { target: target.into(), status, log, text, took: start.elapsed() })
}

/// Feeds one file, talking to the terminal.
pub(super) fn replay(build: &Build, target: &str, input: &Path) -> Result<ExitStatus> {
    program(build, target).arg(input).status().context("cannot start the target")
}

fn program(build: &Build, target: &str) -> Command {
    let mut command = Command::new(build.program(target));
    command.env("RUST_BACKTRACE", "1");
    command
}

impl Outcome {
    /// Whether this stands in the log.
    pub(super) fn says(&self, words: &str) -> bool {
        self.text.contains(words)
    }

    /// Inputs tried.
    pub(super) fn runs(&self) -> &str {
        word_after(&self.text, "stat::number_of_executed_units:").unwrap_or("no")
    }

    /// The input that broke it.
    pub(super) fn broken_input(&self) -> Option<PathBuf> {
        word_after(&self.text, "Test unit written to ").map(PathBuf::from)
    }

    /// What broke, and how to see it break again.
    pub(super) fn complaint(&self) -> String {
        let lines: Vec<&str> = self.text.lines().collect();
        let is_telling = |at: usize| {
            let after_panic = at.checked_sub(1).is_some_and(|before| lines[before].contains(PANIC));
            after_panic || TELLING.iter().any(|words| lines[at].contains(words))
        };
        let telling = (0..lines.len()).filter(|&at| is_telling(at)).map(|at| format!("  {}\n", lines[at].trim()));
        let again = match self.broken_input() {
            Some(input) => format!("  again: cargo xtask fuzz {} --input {}\n", self.target, input.display()),
            None => String::new(),
        };
        format!("{self}\n{}{again}  all it said: {}", telling.collect::<String>(), self.log.display())
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let edges = word_after(&self.text, "cov: ").unwrap_or("no");
        let found = word_after(&self.text, "stat::new_units_added:").unwrap_or("0");
        let (target, runs, seconds) = (&self.target, self.runs(), self.took.as_secs());
        write!(f, "fuzz {target}: {runs} runs in {seconds} s, {edges} edges, {found} new inputs: ")?;
        if self.status.success() { write!(f, "ok") } else { write!(f, "BROKEN ({})", self.status) }
    }
}

/// The word after the last `key`.
fn word_after<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.rsplit_once(key)?.1.split_whitespace().next()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    fn outcome(code: i32, text: &str) -> Outcome {
        let status = ExitStatus::from_raw(code << 8);
        Outcome {
            target: "wire".into(),
            status,
            log: "wire.log".into(),
            text: text.into(),
            took: Duration::from_secs(60),
        }
    }

    #[test]
    fn run_that_ended_by_itself_is_summed_up() {
        let log = "#2 INITED cov: 12 ft: 13\n#90 DONE cov: 81 ft: 99\nstat::number_of_executed_units: 90\nstat::new_units_added: 7\n";
        assert_eq!(outcome(0, log).to_string(), "fuzz wire: 90 runs in 60 s, 81 edges, 7 new inputs: ok");
    }

    #[test]
    fn broken_target_is_reported_with_its_reason_and_its_input() {
        let log = "#3 NEW\nthread panicked at wire.rs:7:5:\ntwo families\nstack:\nTest unit written to crashes/wire-1\nBase64: AA==\n";
        let broken = outcome(77, log);
        assert_eq!(broken.broken_input().unwrap(), Path::new("crashes/wire-1"));
        assert_eq!(
            broken.complaint(),
            "fuzz wire: no runs in 60 s, no edges, 0 new inputs: BROKEN (exit status: 77)\n  \
             thread panicked at wire.rs:7:5:\n  two families\n  \
             again: cargo xtask fuzz wire --input crashes/wire-1\n  all it said: wire.log"
        );
    }
}
