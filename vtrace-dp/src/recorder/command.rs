//! The host's command, which runs while the recording does.

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

/// Time between SIGTERM and SIGKILL.
const STOP_TIME_MAX: Duration = Duration::from_secs(5);

/// The command; `None`: the recording waits for a stop signal.
#[derive(Debug)]
pub struct HostCommand {
    child: Option<Child>,
}

/// Why the command cannot run.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// PATH has no such executable.
    #[error("{}: command not found", .0.display())]
    NotFound(OsString),
    /// A system call failed.
    #[error("{}: {source}", .command.display())]
    Start {
        /// The program, or the call.
        command: OsString,
        /// The error.
        source: io::Error,
    },
}

impl HostCommand {
    /// Checks that the program exists, before anything is armed.
    pub fn check(words: &[OsString]) -> Result<(), CommandError> {
        let Some(program) = words.first() else { return Ok(()) };
        if program::find(program).is_some() { Ok(()) } else { Err(CommandError::NotFound(program.clone())) }
    }

    /// Starts the command; without one, the recording waits for a stop signal. `buffers`: directories of instances that
    /// record only processes that join them; the command joins before its first instruction.
    pub fn start(words: &[OsString], buffers: &[&Path]) -> Result<Self, CommandError> {
        let Some(program) = words.first() else { return Ok(Self { child: None }) };
        let mut command = program::command(words, buffers.iter().copied());
        unblock_in(&mut command);
        match command.spawn() {
            Ok(child) => Ok(Self { child: Some(child) }),
            Err(source) => Err(CommandError::Start { command: program.clone(), source }),
        }
    }

    /// `Some(status)` once it has ended: its exit code, or 128 + signal.
    pub fn ended(&mut self, signals: &Signals) -> Result<Option<Option<u8>>, CommandError> {
        let Some(child) = &mut self.child else { return Ok(None) };
        signals.take_child();
        let ended = child.try_wait().map_err(waiting)?;
        Ok(ended.map(|status| Some(program::code(status))))
    }

    /// Sends SIGTERM and waits. A second stop signal, or [`STOP_TIME_MAX`], kills it.
    pub fn stop(mut self, signals: &Signals) -> Result<Option<u8>, CommandError> {
        let Some(child) = &mut self.child else { return Ok(None) };
        let asked = Instant::now();
        if let Ok(pid) = i32::try_from(child.id()) {
            // It may have ended already.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        loop {
            if let Some(status) = child.try_wait().map_err(waiting)? {
                return Ok(Some(program::code(status)));
            }
            if signals.take_stop() > 0 || asked.elapsed() > STOP_TIME_MAX {
                child.kill().map_err(waiting)?;
                return Ok(Some(program::code(child.wait().map_err(waiting)?)));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for HostCommand {
    fn drop(&mut self) {
        let Some(child) = &mut self.child else { return };
        // It still runs only if the recording failed, and that error is reported already.
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
    fn missing_program_is_refused_before_the_start() {
        assert!(HostCommand::check(&words("sh -c true")).is_ok());
        assert!(HostCommand::check(&[]).is_ok());
        assert!(matches!(HostCommand::check(&words("no-such-program-here")), Err(CommandError::NotFound(_))));
        assert!(matches!(HostCommand::check(&words("/etc/passwd")), Err(CommandError::NotFound(_))));
    }

    #[test]
    fn stopped_command_says_which_signal_ended_it() {
        let signals = Signals::open().unwrap();
        let command = HostCommand::start(&words("sleep 1000"), &[]).unwrap();
        assert_eq!(command.stop(&signals).unwrap(), Some(128 + 15));
    }
}
