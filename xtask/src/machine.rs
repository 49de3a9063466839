//! Virtual machines for tests and the demo: boot, talk, kill.
//!
//! In: a [`Builder`]. Out: a running guest with a shell, QMP and a console log. Runs: QEMU as a child process; calls
//! block with a time limit. Full: a guest that does not answer in time is an error that shows its console.
//! Trust: the guest is ours, QEMU too.

mod builder;
mod channel;
mod hang_report;
mod qmp;
mod shell;
mod turn;

pub use builder::{Builder, Chardev};
pub use shell::Output;
pub use turn::{Turn, turn};

use anyhow::{Context, Result, anyhow, bail};
use channel::Channel;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// How long a command in a guest, or an answer of QEMU, may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a guest that is no longer needed may take to say that it lives.
const PULSE_WAIT_MAX: Duration = Duration::from_secs(20);
/// How much of a console an error shows, in lines.
const CONSOLE_LINES: usize = 20;
/// As much of one that has a dead kernel's words, with the stacks of all its tasks.
const LAST_WORDS_LINES: usize = 1500;

/// A running guest. Dropping it kills QEMU; one that then does not answer is asked why, on standard error.
#[derive(Debug)]
pub struct Machine {
    child: Mutex<Child>,
    shell: Mutex<shell::Shell>,
    qmp: Mutex<qmp::Qmp>,
    /// Sockets and logs.
    dir: tempfile::TempDir,
    boot_wait_max: Duration,
    _turn: Turn,
}

impl Machine {
    /// Waits until the guest's shell greets: after the first boot, and after a reset or reboot.
    ///
    /// # Errors
    /// When QEMU ends or the time is over; the error shows the end of the console.
    pub fn await_boot(&self) -> Result<()> {
        let result = self.lock_shell().and_then(|mut shell| shell.await_greeting(self.boot_wait_max));
        self.explain(result.context("the guest did not boot"))
    }

    /// Runs a busybox sh script in the guest and waits for its end, at most a minute. Every call is a shell of its own
    /// in `/tmp`; what it leaves running in the background goes on.
    ///
    /// # Errors
    /// When the guest does not answer; a failing command is no error (see [`Output::ok`]).
    pub fn shell(&self, script: &str) -> Result<Output> {
        self.shell_within(script, PATIENCE)
    }

    /// As [`shell`](Self::shell) with another time limit.
    pub fn shell_within(&self, script: &str, wait_max: Duration) -> Result<Output> {
        let begun = Instant::now();
        let result = self.lock_shell().and_then(|mut shell| shell.run(script, wait_max));
        let result = result.with_context(|| format!("in the guest: {script}"));
        match self.ended() {
            Ok(None) if result.is_err() && begun.elapsed() >= PATIENCE => result.context(self.hang_report()),
            _ => self.explain(result),
        }
    }

    /// Writes a file in the guest.
    pub fn put(&self, bytes: &[u8], guest: &str) -> Result<()> {
        let result = self.lock_shell().and_then(|mut shell| shell.put(bytes, guest, PATIENCE));
        self.explain(result.with_context(|| format!("cannot write {guest} in the guest")))
    }

    /// Reads a file of the guest.
    pub fn get(&self, guest: &str) -> Result<Vec<u8>> {
        let output = self.shell(&format!("cat '{guest}'"))?;
        anyhow::ensure!(output.status == 0, "cannot read {guest} in the guest: {}", output.text());
        Ok(output.bytes)
    }

    /// Sends a QMP command and gives what it returns.
    ///
    /// # Errors
    /// When QEMU refuses it or does not answer.
    pub fn qmp(&self, command: &str, arguments: &Value) -> Result<Value> {
        let mut qmp = self.qmp.lock().map_err(|_| anyhow!("another thread failed in QMP"))?;
        qmp.execute(command, arguments, PATIENCE).with_context(|| format!("QMP {command} {arguments}"))
    }

    /// Waits for a QMP event, one that came since the last call included, and gives its data.
    pub fn qmp_event(&self, event: &str, wait_max: Duration) -> Result<Value> {
        let mut qmp = self.qmp.lock().map_err(|_| anyhow!("another thread failed in QMP"))?;
        qmp.event(event, wait_max).with_context(|| format!("waiting for the QMP event {event}"))
    }

    /// Resets the guest and waits until it is up again; the machine must have been built with `reboots`.
    pub fn reset(&self) -> Result<()> {
        self.qmp("system_reset", &Value::Null)?;
        self.await_boot()
    }

    /// What the guest wrote to its console so far.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.console_path()).unwrap_or_default()).into_owned()
    }

    /// The console log; gone with the machine.
    pub fn console_path(&self) -> PathBuf {
        self.dir.path().join("console.log")
    }

    /// The folder of this machine's sockets and logs; gone with the machine.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// QEMU's process.
    pub fn pid(&self) -> Result<u32> {
        Ok(self.child()?.id())
    }

    /// How QEMU ended, `None` while it runs.
    pub fn ended(&self) -> Result<Option<ExitStatus>> {
        Ok(self.child()?.try_wait()?)
    }

    /// Waits until QEMU ends by itself, as after `poweroff -f` in the guest.
    pub fn await_end(&self, wait_max: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + wait_max;
        while Instant::now() < end {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!("QEMU still runs after {wait_max:?}");
    }

    /// Kills QEMU at once, as a host crash would.
    pub fn kill(self) -> Result<()> {
        let mut child = self.child()?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    fn child(&self) -> Result<MutexGuard<'_, Child>> {
        self.child.lock().map_err(|_| anyhow!("another thread failed with this machine"))
    }

    fn lock_shell(&self) -> Result<MutexGuard<'_, shell::Shell>> {
        self.shell.lock().map_err(|_| anyhow!("another thread failed in this guest's shell"))
    }

    /// Adds what QEMU and the guest said last to an error.
    fn explain<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| {
            let ended = self.ended().ok().flatten().map_or_else(String::new, |status| format!("QEMU: {status}\n"));
            let qemu = fs::read_to_string(self.dir.path().join("qemu.log")).unwrap_or_default();
            error.context(format!("{ended}{qemu}console:\n{}\n", self.console_end(CONSOLE_LINES)))
        })
    }

    /// The end of the console; where the kernel panicked, what it said of that first.
    fn console_end(&self, lines_max: usize) -> String {
        let console = self.console();
        let lines: Vec<&str> = console.lines().collect();
        let panic = lines.iter().position(|line| line.contains("Kernel panic"));
        let start = panic.unwrap_or(lines.len()).min(lines.len().saturating_sub(lines_max));
        lines[start..].iter().take(lines_max).copied().collect::<Vec<_>>().join("\n")
    }

    /// Panics a guest that does not answer, and gives the state of its CPUs and tasks; empty for one that has ended.
    pub fn hang_report(&self) -> String {
        match (self.ended(), self.pid(), self.qmp.lock()) {
            (Ok(None), Ok(pid), Ok(mut qmp)) => {
                let said = hang_report::of(&mut qmp, pid, &self.console_path());
                format!("the guest hangs\n{said}console:\n{}\n", self.console_end(LAST_WORDS_LINES))
            }
            _ => String::new(),
        }
    }

    /// Whether it runs without answering.
    fn hangs(&self) -> bool {
        let runs = |status: &Value| status.get("status").and_then(Value::as_str) == Some("running");
        let Ok(mut shell) = self.shell.lock() else { return false };
        shell.has_greeted()
            && self.ended().is_ok_and(|ended| ended.is_none())
            && self.qmp("query-status", &Value::Null).is_ok_and(|status| runs(&status))
            && shell.run("true", PULSE_WAIT_MAX).is_err()
            && self.ended().is_ok_and(|ended| ended.is_none())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.hangs() {
            eprintln!("{}", self.hang_report());
        }
        let child = self.child.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        // It may have ended by itself.
        let _ = child.kill();
        let _ = child.wait();
    }
}
