//! io_uring without pointers: poll, cancel. To wait for many descriptors with one system call, and to ask for the next
//! wait of each in the same call.
//!
//! In:    descriptors and a tag per operation
//! Out:   completions: the tag and what is ready
//! Runs:  on the caller's thread; a poll needs no kernel worker
//! Full:  a full submission queue is submitted; completions that find no room are kept by the kernel (5.5 and later)
//! Trust: the kernel
//!
//! Works from Linux 5.6 on (the probe of operations).
#![expect(unsafe_code, reason = "the kernel reads submission entries that only unsafe code may push")]

use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, Probe, opcode, squeue, types::Fd};
use nix::{errno::Errno, libc};

use super::SysError;

/// What a poll waits for: there is something to read.
pub const READABLE: u32 = libc::POLLIN.unsigned_abs() as u32;
/// What a poll waits for: there is room to write.
pub const WRITABLE: u32 = libc::POLLOUT.unsigned_abs() as u32;

/// One operation's end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Completion {
    /// The operation's.
    pub tag: u64,
    /// What is ready, or a negative errno.
    pub result: i32,
}

impl Completion {
    /// Whether it succeeded. Hot.
    pub fn outcome(self) -> Result<(), Errno> {
        if self.result >= 0 { Ok(()) } else { Err(Errno::from_raw(self.result.checked_neg().unwrap_or(libc::EIO))) }
    }
}

/// A submission and a completion queue.
pub struct Ring {
    ring: IoUring,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("fd", &self.ring.as_raw_fd()).finish_non_exhaustive()
    }
}

impl Ring {
    /// A ring with room for `operations` at a time.
    ///
    /// # Errors
    /// `ENOSYS` without io_uring, `EPERM` when `kernel.io_uring_disabled` or a seccomp filter
    /// forbids it, `ENOMEM` when the memlock limit is too low (kernels before 5.12).
    pub fn new(operations: usize) -> Result<Self, SysError> {
        let entries = u32::try_from(operations.next_power_of_two()).unwrap_or(u32::MAX);
        let ring = IoUring::new(entries).map_err(SysError::of_io("io_uring_setup"))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe).map_err(SysError::of_io("io_uring_register"))?;
        let needed = [opcode::PollAdd::CODE, opcode::AsyncCancel::CODE];
        if !needed.into_iter().all(|code| probe.is_supported(code)) {
            return Err(SysError { call: "IORING_OP_POLL_ADD", errno: Errno::ENOSYS });
        }
        Ok(Self { ring })
    }

    /// Completes once, when `fd` is ready for `events` (or in error). Hot.
    pub fn push_poll(&mut self, fd: BorrowedFd<'_>, events: u32, tag: u64) -> Result<(), SysError> {
        self.push(&opcode::PollAdd::new(Fd(fd.as_raw_fd()), events).build().user_data(tag))
    }

    /// Asks for the end of the operation tagged `target`, which completes with what it had got or an error. The
    /// request completes too, with `tag`.
    pub fn push_cancel(&mut self, target: u64, tag: u64) -> Result<(), SysError> {
        self.push(&opcode::AsyncCancel::new(target).build().user_data(tag))
    }

    /// Hands over what was pushed and sleeps until something has completed. Hot.
    pub fn submit_and_wait(&mut self) -> Result<(), SysError> {
        loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                // The completion queue has overflowed, or the kernel is short of memory: reap, then go on.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Ok(()),
                Err(error) => return Err(SysError::of_io("io_uring_enter")(error)),
            }
        }
    }

    /// Hands over what was pushed, if anything was. Hot.
    pub fn submit(&mut self) -> Result<(), SysError> {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Ok(()),
                Err(error) => return Err(SysError::of_io("io_uring_enter")(error)),
            }
        }
        Ok(())
    }

    /// The next completion, if there is one. Hot.
    pub fn pop(&mut self) -> Option<Completion> {
        let entry = self.ring.completion().next()?;
        Some(Completion { tag: entry.user_data(), result: entry.result() })
    }

    fn push(&mut self, entry: &squeue::Entry) -> Result<(), SysError> {
        if self.ring.submission().is_full() {
            self.ring.submit().map_err(SysError::of_io("io_uring_enter"))?;
        }
        // SAFETY: the entries built here hold descriptor numbers and no addresses, so nothing in this process has to
        // outlive the operation. A number whose descriptor is closed too early names nothing (EBADF) or another file:
        // wrong, but no memory is touched.
        unsafe { self.ring.submission().push(entry) }
            .map_err(|_| SysError { call: "io_uring submission", errno: Errno::EBUSY })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Write},
        os::fd::AsFd,
    };

    use super::*;
    use crate::sys::splice::Pipe;

    #[test]
    fn poll_of_a_pipe_that_is_emptied_says_that_there_is_room() {
        let pipe = Pipe::new(1 << 16).unwrap();
        let (mut writer, mut reader) = (File::from(pipe.writer), File::from(pipe.reader));
        while writer.write(&[0; 4096]).is_ok() {}
        let mut ring = Ring::new(4).unwrap();
        ring.push_poll(writer.as_fd(), WRITABLE, 7).unwrap();
        ring.submit().unwrap();
        assert_eq!(ring.pop(), None);
        reader.read_exact(&mut [0; 4096]).unwrap();
        ring.submit_and_wait().unwrap();
        assert_eq!(ring.pop().map(|end| (end.tag, end.outcome())), Some((7, Ok(()))));
    }

    #[test]
    fn cancelled_poll_completes_with_an_error() {
        let pipe = Pipe::new(1 << 16).unwrap();
        let mut ring = Ring::new(4).unwrap();
        ring.push_poll(pipe.reader.as_fd(), READABLE, 1).unwrap();
        ring.push_cancel(1, 2).unwrap();
        let mut ends = Vec::new();
        while ends.len() < 2 {
            ring.submit_and_wait().unwrap();
            ends.extend(std::iter::from_fn(|| ring.pop()));
        }
        ends.sort_unstable_by_key(|end| end.tag);
        assert_eq!(ends, [Completion { tag: 1, result: -libc::ECANCELED }, Completion { tag: 2, result: 0 }]);
    }

    #[test]
    fn more_operations_than_entries_are_taken() {
        let pipe = Pipe::new(1 << 16).unwrap();
        let mut ring = Ring::new(2).unwrap();
        for tag in 0..9 {
            ring.push_poll(pipe.reader.as_fd(), READABLE, tag).unwrap();
        }
        File::from(pipe.writer.try_clone().unwrap()).write_all(b"x").unwrap();
        let mut count = 0;
        while count < 9 {
            ring.submit_and_wait().unwrap();
            count += std::iter::from_fn(|| ring.pop()).count();
        }
        assert_eq!(count, 9);
    }
}
