//! The command that runs while we record.

use std::{
    ffi::OsString,
    io,
    path::Path,
    process::Child,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::sys::{
    program,
    signal::{Signals, unblock_in},
};

/// How long a command may take to end when it is asked to.
const PATIENCE: Duration = Duration::from_secs(5);

/// The command, running or not.
#[derive(Debug)]
pub struct Command {
    child: Option<Child>,
}

/// Why the command cannot run.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// No such program in PATH, or it cannot be executed.
    #[error("{}: command not found", .0.display())]
    NotFound(OsString),
    /// It did not start.
    #[error("{}: {source}", .command.display())]
    Start {
        /// Which.
        command: OsString,
        /// Why.
        source: io::Error,
    },
}

impl Command {
    /// Whether it could run: asked before anything is armed.
    pub fn check(words: &[OsString]) -> Result<(), CommandError> {
        let Some(program) = words.first() else { return Ok(()) };
        if program::find(program).is_some() { Ok(()) } else { Err(CommandError::NotFound(program.clone())) }
    }

    /// Starts it; an empty one is a wait for Ctrl-C. With `buffers` (directories of tracefs) that are bound
    /// to processes it is one of them from its first instruction on.
    pub fn start(words: &[OsString], buffers: &[&Path]) -> Result<Self, CommandError> {
        let Some(program) = words.first() else { return Ok(Self { child: None }) };
        let mut command = program::command(words, buffers.iter().copied());
        unblock_in(&mut command);
        match command.spawn() {
            Ok(child) => Ok(Self { child: Some(child) }),
            Err(source) => Err(CommandError::Start { command: program.clone(), source }),
        }
    }

    /// `Some(status)` once it has ended: its exit code, or 128 + signal as a shell gives it.
    pub fn ended(&mut self, signals: &Signals) -> Result<Option<Option<u8>>, CommandError> {
        let Some(child) = &mut self.child else { return Ok(None) };
        signals.take_child();
        let ended = child.try_wait().map_err(waiting)?;
        Ok(ended.map(|status| Some(program::code(status))))
    }

    /// Asks it to end (Ctrl-C has reached it already if it shares our terminal) and waits for it; when somebody asks
    /// again, or it takes longer than [`PATIENCE`], it is killed.
    pub fn stop(mut self, signals: &Signals) -> Result<Option<u8>, CommandError> {
        let Some(child) = &mut self.child else { return Ok(None) };
        let asked = Instant::now();
        if let Ok(pid) = i32::try_from(child.id()) {
            // It may have ended by itself; then there is nobody to ask.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        loop {
            if let Some(status) = child.try_wait().map_err(waiting)? {
                return Ok(Some(program::code(status)));
            }
            if signals.take_stop() > 0 || asked.elapsed() > PATIENCE {
                child.kill().map_err(waiting)?;
                return Ok(Some(program::code(child.wait().map_err(waiting)?)));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Command {
    fn drop(&mut self) {
        let Some(child) = &mut self.child else { return };
        // Only where recording has failed is it still running; there is nobody left to tell about it.
        if matches!(child.try_wait(), Ok(None)) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn waiting(source: io::Error) -> CommandError {
    CommandError::Start { command: "waitpid".into(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(Into::into).collect()
    }

    #[test]
    fn program_that_is_not_there_is_found_out_before_it_starts() {
        assert!(Command::check(&words("sh -c true")).is_ok());
        assert!(Command::check(&[]).is_ok());
        assert!(matches!(Command::check(&words("no-such-program-here")), Err(CommandError::NotFound(_))));
        assert!(matches!(Command::check(&words("/etc/passwd")), Err(CommandError::NotFound(_))));
    }

    #[test]
    fn stopped_command_says_which_signal_ended_it() {
        let signals = Signals::open().unwrap();
        let command = Command::start(&words("sleep 1000"), &[]).unwrap();
        assert_eq!(command.stop(&signals).unwrap(), Some(128 + 15));
    }
}
