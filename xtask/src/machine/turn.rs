//! One guest test at a time: two cores do not carry two.
//!
//! In: the cache folder. Out: a lock that lives as long as any machine booted under it. Runs: in tests of any process.
//! Full: waits, then gives up. Trust: the lock goes with its process; what a killed test left running is ended by the
//! next one, by the process id and folder that the lock file names.

use crate::cache;
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

/// How long a test waits for the ones before it.
const PATIENCE: Duration = Duration::from_secs(30 * 60);

/// The right to run guests; one process and one test at a time has it. Clones share it.
#[derive(Debug, Clone)]
pub struct Turn {
    lock: Arc<File>,
}

/// Waits until no other test runs guests, in this process or any other that shares the cache.
///
/// # Errors
/// When half an hour is over.
pub fn turn() -> Result<Turn> {
    let path = cache::dir("images")?.join(".machines");
    let lock = cache::lock(&path, "another test's virtual machines", PATIENCE)?;
    end_leftovers(&fs::read_to_string(&path)?);
    lock.set_len(0)?;
    Ok(Turn { lock: Arc::new(lock) })
}

impl Turn {
    /// Notes a QEMU that runs in this turn, so that the next turn can end it if this process cannot.
    pub(super) fn note(&self, pid: u32, dir: &Path) -> Result<()> {
        writeln!(&*self.lock, "{pid} {}", dir.display()).context("cannot note a machine")
    }
}

/// Ends the noted machines that still run.
fn end_leftovers(notes: &str) {
    for (pid, dir) in notes.lines().filter_map(|note| note.split_once(' ')) {
        // Another process may have the number by now; only ours names the folder.
        let is_ours = fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| names(&line, dir));
        if is_ours {
            eprintln!("ending a virtual machine that a killed test left running (process {pid})");
            let _ = Command::new("kill").args(["-KILL", pid]).status();
        }
    }
}

fn names(command_line: &[u8], dir: &str) -> bool {
    !dir.is_empty() && command_line.windows(dir.len()).any(|part| part == dir.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_process_that_names_the_folder_is_ended() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().to_str().unwrap();
        let sleep = |word: &str| {
            Command::new("sh").args(["-c", "read line", word]).stdin(std::process::Stdio::piped()).spawn().unwrap()
        };
        let (mut ours, mut other) = (sleep(dir), sleep("elsewhere"));
        end_leftovers(&format!("{} {dir}\n{} {dir}\n", ours.id(), other.id()));
        assert!(!ours.wait().unwrap().success());
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
