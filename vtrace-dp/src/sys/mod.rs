//! The only system calls, and with `virtq::memory` the only unsafe code.
//!
//! In:    descriptors and plain values
//! Out:   plain values, or a [`SysError`]: which call, which errno
//! Runs:  on the caller's thread; nothing here keeps state
//! Full:  a call that would block on a non-blocking descriptor says so with [`SysError::would_block`]
//! Trust: the kernel

pub mod accept;
pub mod account;
pub mod confine;
pub mod cpuid;
pub mod daemon;
pub mod descriptor;
pub mod direct;
pub mod folder_entry;
pub mod limit;
pub mod log_limit;
pub mod oom;
pub mod page_guest;
pub mod perf;
pub mod poll_set;
pub mod program;
pub mod realtime;
pub mod signal;
pub mod socket;
pub mod splice;
pub mod tsc;
pub mod uring;
pub mod wait;
pub mod write_all;
pub mod write_lock;
pub mod writes;

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    io,
};

use nix::errno::Errno;

/// A random number: names of sessions and files of one machine do not collide.
pub fn random() -> u64 {
    // A fresh RandomState is keyed by the system's random numbers.
    RandomState::new().build_hasher().finish()
}

/// A system call that failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{call}: {errno}")]
pub struct SysError {
    /// Its name.
    pub call: &'static str,
    /// The error that it returned.
    pub errno: Errno,
}

impl SysError {
    /// Nothing to move now: ask again when `poll` says so.
    pub fn would_block(&self) -> bool {
        self.errno == Errno::EAGAIN
    }

    /// Turns nix's answer into ours.
    pub(crate) fn of(call: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Self { call, errno }
    }

    /// Turns the standard library's answer into ours.
    pub(crate) fn of_io(call: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self { call, errno: Errno::from_raw(error.raw_os_error().unwrap_or(Errno::EIO as i32)) }
    }
}

impl From<SysError> for io::Error {
    fn from(error: SysError) -> Self {
        Self::from_raw_os_error(error.errno as i32)
    }
}
