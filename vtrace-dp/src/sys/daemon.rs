//! A process that goes on in the background once it has got going.
//!
//! In:    a process with one thread
//! Out:   two of them: one that waits for the other to get going, or for its end
//! Runs:  before any thread is started
//! Full:  does not apply
#![expect(unsafe_code, reason = "fork(2)")]

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::AsFd,
};

use nix::{
    sys::wait::{WaitStatus, waitpid},
    unistd::{ForkResult, Pid, dup2_stderr, dup2_stdin, dup2_stdout, fork, pipe, setsid},
};

/// Which of the two this is.
#[derive(Debug)]
pub enum Side {
    /// The process that was started.
    Parent(Waiting),
    /// The process that does the work, in a session of its own; it keeps the parent's terminal until
    /// [`Ready::release`].
    Child(Ready),
}

/// Waits for the background process.
#[derive(Debug)]
pub struct Waiting {
    child: Pid,
    pipe: File,
}

/// Has not got going yet.
#[derive(Debug)]
pub struct Ready {
    pipe: File,
}

/// How the background process started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Started {
    /// It goes on, with this process id.
    Going(u32),
    /// It has ended, with this exit code (128 + signal), and has said why.
    Ended(u8),
}

/// Makes two of this process.
///
/// # Panics
/// Where there is a second thread: it would be missing in one of the two.
pub fn split() -> io::Result<Side> {
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    assert_eq!(threads, 1, "a process with threads cannot be forked");
    let (reader, writer) = pipe()?;
    // SAFETY: this is the only thread, so nothing (a lock, the allocator) is in the middle of something in the child.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(Side::Parent(Waiting { child, pipe: reader.into() })),
        ForkResult::Child => {
            setsid()?;
            nix::fcntl::fcntl(writer.as_fd(), nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
            Ok(Side::Child(Ready { pipe: writer.into() }))
        }
    }
}

impl Waiting {
    /// Returns when the background process is ready, or has ended.
    pub fn wait(mut self) -> io::Result<Started> {
        let mut byte = [0];
        if self.pipe.read(&mut byte)? == 1 {
            return Ok(Started::Going(u32::try_from(self.child.as_raw()).unwrap_or(0)));
        }
        Ok(Started::Ended(match waitpid(self.child, None)? {
            WaitStatus::Exited(_, code) => u8::try_from(code & 0xff).unwrap_or(1),
            WaitStatus::Signaled(_, signal, _) => 128_u8.saturating_add(u8::try_from(signal as i32).unwrap_or(1)),
            _ => 1,
        }))
    }
}

impl Ready {
    /// Leaves the terminal: from now on all output goes to `log`, and the parent returns.
    pub fn release(mut self, log: &File) -> io::Result<()> {
        dup2_stdin(File::open("/dev/null")?)?;
        dup2_stdout(log)?;
        dup2_stderr(log)?;
        // One that was killed does not wait any more.
        let _ = self.pipe.write_all(&[1]);
        Ok(())
    }
}
