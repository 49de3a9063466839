//! A real `vtrace server` in a folder of its own; ends with its owner.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

/// How long a server, its guests and their agents may take for one step.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server and its sockets.
#[derive(Debug)]
pub struct Server {
    child: Child,
    dir: TempDir,
    words: Vec<String>,
}

impl Server {
    /// Starts a server for `guests` and waits until it listens.
    pub fn start(guests: &[&str]) -> Result<Self> {
        Self::start_with(&guests.iter().flat_map(|guest| ["--dom", guest]).collect::<Vec<_>>())
    }

    /// Starts `vtrace server WORDS` and waits until it listens.
    pub fn start_with(words: &[&str]) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let server = Self { child: spawn(dir.path(), &words)?, dir, words };
        server.await_state("is there", |_| true)?;
        Ok(server)
    }

    /// Another one in the same folder, with the same words; the one before is killed if it still runs.
    pub fn restart(&mut self) -> Result<()> {
        self.kill()?;
        self.child = spawn(self.dir.path(), &self.words)?;
        self.await_state("is there again", |_| true)
    }

    /// Its folder: for `--dir`.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where a guest's device connects.
    pub fn socket(&self, guest: &str) -> PathBuf {
        self.dir.path().join(format!("{guest}.sock"))
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("server.log")).unwrap_or_default()
    }

    /// `vtrace list --json`.
    pub fn list(&self) -> Result<Value> {
        let list = Command::new(xtask::build::vtrace()?).args(["list", "--json", "--dir"]).arg(self.dir()).output()?;
        ensure!(list.status.success(), "vtrace list: {}", String::from_utf8_lossy(&list.stderr));
        Ok(serde_json::from_slice(&list.stdout)?)
    }

    /// Waits until the agent of `guest` has said hello and where it runs: it can be claimed.
    pub fn await_agent(&self, guest: &str) -> Result<()> {
        self.await_state("has an agent", |state| state["name"] == guest && state["agent"]["machine"].is_object())
    }

    /// Waits until one guest's state is as asked for.
    pub fn await_state(&self, what: &str, is_so: impl Fn(&Value) -> bool) -> Result<()> {
        let begun = Instant::now();
        let mut last = String::new();
        while begun.elapsed() < PATIENCE {
            match self.list() {
                Ok(Value::Array(guests)) if guests.iter().any(&is_so) => return Ok(()),
                Ok(other) => last = other.to_string(),
                Err(error) => last = format!("{error:#}"),
            }
            sleep(Duration::from_millis(50));
        }
        bail!("no guest {what}: {last}\n{}", self.log())
    }

    /// Waits until the recording under way has so many pages of a machine (`host` or a guest) in its file, as `vtrace status`
    /// shows them.
    pub fn await_pages(&self, machine: &str, pages: u64) -> Result<()> {
        let begun = Instant::now();
        while self.pages(machine)? < pages {
            ensure!(begun.elapsed() < PATIENCE, "{machine} traces too little\n{}", self.log());
            sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn pages(&self, name: &str) -> Result<u64> {
        let status =
            Command::new(xtask::build::vtrace()?).args(["status", "--json", "--dir"]).arg(self.dir()).output()?;
        let recordings: Value = serde_json::from_slice(&status.stdout)?;
        let machines = |recording: &Value| recording["state"]["progress"]["machines"].as_array().cloned();
        let machines = recordings.as_array().into_iter().flatten().filter_map(machines).flatten();
        Ok(machines.filter(|machine| machine["name"] == name).filter_map(|machine| machine["pages_out"].as_u64()).sum())
    }

    /// SIGKILL, as the kernel's OOM killer would.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

fn spawn(dir: &Path, words: &[String]) -> Result<Child> {
    let log = File::options().create(true).append(true).open(dir.join("server.log"))?;
    let mut command = Command::new(xtask::build::vtrace()?);
    command.arg("server").arg("--dir").arg(dir).args(words).stderr(log).env("VTRACE_LOG", "debug");
    command.spawn().context("cannot start vtrace server")
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.kill();
        if std::thread::panicking() {
            eprintln!("--- server log ---\n{}", self.log());
        }
    }
}
