//! One run of `vtrace record`: its words, its status, its files.

use std::{
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::judge::{lines, trace_cmd};

/// A folder to record in, and the words that are the same every time.
#[derive(Debug)]
pub struct Recorder<'a> {
    /// Where the server is.
    pub server: &'a Path,
    /// Where the files go.
    pub folder: &'a Path,
}

/// A finished recording.
#[derive(Debug)]
pub struct Recording {
    /// Exit status.
    pub status: i32,
    /// The closing table as JSON; null if none was printed.
    pub summary: Value,
    /// What it said on stderr.
    pub said: String,
    folder: PathBuf,
}

impl Recorder<'_> {
    /// The command for `vtrace record WORDS`. Words are split at blanks.
    pub fn command(&self, words: &str) -> Result<Command> {
        let mut command = Command::new(xtask::build::vtrace()?);
        command.arg("record").arg("--dir").arg(self.server).arg("-o").arg(self.folder.join("trace.dat"));
        command.args(words.split_whitespace()).stdin(Stdio::null());
        Ok(command)
    }

    /// Runs `vtrace record --json WORDS` to its end.
    pub fn run(&self, words: &str) -> Result<Recording> {
        let output = self.command(&format!("--json {words}"))?.output().context("cannot run vtrace record")?;
        Recording::new(output, self.folder)
    }

    /// Starts `vtrace record --json WORDS`.
    pub fn start(&self, words: &str) -> Result<Child> {
        let mut command = self.command(&format!("--json {words}"))?;
        Ok(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
    }

    /// What became of a started one.
    pub fn finish(&self, child: Child) -> Result<Recording> {
        Recording::new(child.wait_with_output()?, self.folder)
    }

    /// Ends a started one as Ctrl-C does.
    pub fn interrupt(&self, child: Child) -> Result<Recording> {
        kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGINT)?;
        self.finish(child)
    }
}

impl Recording {
    fn new(output: Output, folder: &Path) -> Result<Self> {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let status = output.status.code().or_else(|| output.status.signal().map(|signal| 128 + signal));
        let summary = if output.stdout.is_empty() { Value::Null } else { serde_json::from_slice(&output.stdout)? };
        Ok(Self { status: status.context("no status")?, summary, said, folder: folder.into() })
    }

    /// Fails unless it went well.
    pub fn ok(self) -> Result<Self> {
        ensure!(self.status == 0, "vtrace record: status {}\n{}\n{:#}", self.status, self.said, self.summary);
        Ok(self)
    }

    /// Fails unless a machine's file has pages as the summary says, and stock trace-cmd reads it.
    pub fn whole(self, machine: &str) -> Result<Self> {
        self.events_shown(machine)?;
        Ok(self)
    }

    /// As [`Recording::whole`]: how many events stock trace-cmd shows.
    pub fn events_shown(&self, machine: &str) -> Result<usize> {
        ensure!(self.sum(machine, "pages_out")? > 0, "{:#}", self.summary);
        let report = lines(&trace_cmd(&["report"], &[&self.file(machine)])?);
        ensure!(report.len() > 10, "{} lines", report.len());
        Ok(report.len())
    }

    /// The file of `host` or of a guest.
    pub fn file(&self, machine: &str) -> PathBuf {
        let suffix = if machine == "host" { String::new() } else { format!("-{machine}") };
        self.folder.join(format!("trace{suffix}.dat"))
    }

    /// A machine's part of the summary.
    pub fn machine(&self, name: &str) -> Result<&Value> {
        let machines = self.summary["machines"].as_array().context("a summary has machines")?;
        machines.iter().find(|machine| machine["name"] == name).with_context(|| format!("{name} is not in the summary"))
    }

    /// What it remarks on a machine.
    pub fn remarks(&self, machine: &str) -> Result<String> {
        Ok(self.machine(machine)?["remarks"].to_string())
    }

    /// The sum of one counter over a machine's lanes.
    pub fn sum(&self, machine: &str, counter: &str) -> Result<u64> {
        let lanes = self.machine(machine)?["lanes"].as_array().context("a machine has lanes")?;
        lanes.iter().map(|lane| lane[counter].as_u64().with_context(|| format!("a lane has {counter}"))).sum()
    }
}
