//! Signals as a descriptor, and what a child inherits: SIGINT, SIGTERM, SIGUSR1 and others ask to stop, SIGCHLD reports
//! that the command has ended.

#![expect(unsafe_code, reason = "sigaction; pre_exec: the command must not inherit our blocked signals")]

use std::{
    cell::Cell,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::process::CommandExt,
    },
    process::Command,
    time::{Duration, Instant},
};

use nix::sys::{
    signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
    signalfd::{SfdFlags, SignalFd},
};

/// The signals that ask a recording to stop: all that would end the process and are not a crash, SIGQUIT or SIGKILL.
const STOP: [Signal; 10] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGIO,
    Signal::SIGPWR,
];

/// The signals a recording reacts to. They stay blocked for the rest of the process.
#[derive(Debug)]
pub struct Signals {
    stop: SignalFd,
    child: SignalFd,
    /// Time of the last SIGINT that counted.
    interrupted: Cell<Option<Instant>>,
}

/// SIGINTs within this time are one request to stop.
const REPEAT_MAX: Duration = Duration::from_secs(1);

impl Signals {
    /// Blocks them for this thread and those it starts: call it before any thread is started.
    pub fn open() -> io::Result<Self> {
        Ok(Self { stop: open(&STOP)?, child: open(&[Signal::SIGCHLD])?, interrupted: Cell::new(None) })
    }

    /// Number of requests to stop since the last call. SIGINTs within [`REPEAT_MAX`] are one: `timeout -s INT` sends one
    /// to the process and one to its group, and people press Ctrl-C twice.
    pub fn take_stop(&self) -> u32 {
        let mut count = 0;
        while let Ok(Some(info)) = self.stop.read_signal() {
            if i32::try_from(info.ssi_signo) == Ok(Signal::SIGINT as i32) {
                let now = Instant::now();
                if self.interrupted.get().is_some_and(|before| now.duration_since(before) < REPEAT_MAX) {
                    continue;
                }
                self.interrupted.set(Some(now));
            }
            count += 1;
        }
        count
    }

    /// Forgets that children have ended.
    pub fn take_child(&self) {
        while let Ok(Some(_)) = self.child.read_signal() {}
    }

    /// Readable when a stop was asked for.
    pub fn stop(&self) -> BorrowedFd<'_> {
        self.stop.as_fd()
    }

    /// Readable when a child has ended.
    pub fn child(&self) -> BorrowedFd<'_> {
        self.child.as_fd()
    }
}

/// A file that hits the process's size limit shall fail with EFBIG instead of ending the process.
pub fn ignore_file_size() -> io::Result<()> {
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    // SAFETY: no handler is installed, so no code of ours can run in a signal's context. No other code sets SIGXFSZ.
    unsafe { sigaction(Signal::SIGXFSZ, &ignore) }?;
    Ok(())
}

/// Lets `command` get the signals that [`Signals`] and [`ignore_file_size`] keep from this process: a child inherits
/// what is blocked or ignored.
pub fn unblock_in(command: &mut Command) {
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; these are a sigprocmask(2) on the child's
    // only thread and a sigaction(2) that installs no handler. No other code can touch the child's mask.
    let _ = unsafe { command.pre_exec(restore) };
}

/// The mask and the dispositions that a program expects.
fn restore() -> io::Result<()> {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: no handler is installed, so no code of ours can run in a signal's context.
    unsafe { sigaction(Signal::SIGXFSZ, &default) }?;
    Ok(SigSet::empty().thread_set_mask()?)
}

fn open(signals: &[Signal]) -> io::Result<SignalFd> {
    let set: SigSet = signals.iter().copied().collect();
    set.thread_block()?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?)
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::raise;

    use super::*;

    #[test]
    fn every_signal_that_would_end_a_recording_unfinished_asks_it_to_stop() {
        let signals = Signals::open().unwrap();
        for signal in STOP {
            raise(signal).unwrap();
            assert_eq!(signals.take_stop(), 1, "{signal}");
        }
    }

    #[test]
    fn interrupts_within_a_second_are_one_request() {
        let signals = Signals::open().unwrap();
        let interrupt = || {
            raise(Signal::SIGINT).unwrap();
            signals.take_stop()
        };
        let begun = Instant::now();
        let counts = [interrupt(), interrupt()];
        if begun.elapsed() < REPEAT_MAX {
            assert_eq!(counts, [1, 0]);
        }
        signals.interrupted.set(Instant::now().checked_sub(REPEAT_MAX));
        assert_eq!(interrupt(), 1);
    }
}
