//! What [`super::uring`] does where the kernel forbids io_uring (`kernel.io_uring_disabled`, seccomp): one epoll set and a
//! system call for each wait.
//!
//! In:    descriptors and a tag per operation
//! Out:   completions: the tag and the outcome
//! Runs:  on the caller's thread
//! Full:  allocates no more than one entry an operation
//! Trust: the kernel

use std::{
    collections::{BTreeSet, VecDeque},
    os::fd::BorrowedFd,
};

use nix::{
    errno::Errno,
    libc,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
};

use super::{
    SysError,
    uring::{Completion, Ring},
    wait::take_events,
};

/// Events that are read with one system call.
const EVENTS: usize = 32;

/// Waits for descriptors: with io_uring, or with epoll where that is forbidden.
#[derive(Debug)]
pub enum Waits {
    /// io_uring.
    Ring(Box<Ring>),
    /// epoll.
    Set(PollSet),
}

impl Waits {
    /// With room for `operations` at a time.
    ///
    /// # Errors
    /// `ENOMEM`, `EMFILE`
    pub fn new(operations: usize) -> Result<Self, SysError> {
        match Ring::new(operations) {
            Ok(ring) => Ok(Self::Ring(Box::new(ring))),
            Err(error) if matches!(error.errno, Errno::EPERM | Errno::EACCES | Errno::ENOSYS) => {
                log::info!("without io_uring ({error}): epoll");
                Ok(Self::Set(PollSet::new()?))
            }
            Err(error) => Err(error),
        }
    }

    /// Completes once, when `fd` is ready for `events` (or in error). A descriptor has one poll at a time. Hot.
    pub fn push_poll(&mut self, fd: BorrowedFd<'_>, events: u32, tag: u64) -> Result<(), SysError> {
        match self {
            Self::Ring(ring) => ring.push_poll(fd, events, tag),
            Self::Set(set) => set.push_poll(fd, events, tag),
        }
    }

    /// Ends the operation tagged `target`, which completes with an error; the request completes with `tag`.
    pub fn push_cancel(&mut self, target: u64, tag: u64) -> Result<(), SysError> {
        match self {
            Self::Ring(ring) => ring.push_cancel(target, tag),
            Self::Set(set) => {
                set.cancel(target, tag);
                Ok(())
            }
        }
    }

    /// Sleeps until something has completed. Hot.
    pub fn submit_and_wait(&mut self) -> Result<(), SysError> {
        match self {
            Self::Ring(ring) => ring.submit_and_wait(),
            Self::Set(set) => set.wait(EpollTimeout::NONE),
        }
    }

    /// Looks for completions without sleeping. Hot.
    pub fn submit(&mut self) -> Result<(), SysError> {
        match self {
            Self::Ring(ring) => ring.submit(),
            Self::Set(set) => set.wait(EpollTimeout::ZERO),
        }
    }

    /// The next completion, if there is one. Hot.
    pub fn pop(&mut self) -> Option<Completion> {
        match self {
            Self::Ring(ring) => ring.pop(),
            Self::Set(set) => set.completed.pop_front(),
        }
    }
}

/// One epoll set.
#[derive(Debug)]
pub struct PollSet {
    epoll: Epoll,
    /// Tags of the polls that have not completed.
    waiting: BTreeSet<u64>,
    completed: VecDeque<Completion>,
}

impl PollSet {
    /// An empty one.
    ///
    /// # Errors
    /// `EMFILE`, `ENOMEM`
    pub fn new() -> Result<Self, SysError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(SysError::of("epoll_create1"))?;
        Ok(Self { epoll, waiting: BTreeSet::new(), completed: VecDeque::new() })
    }

    fn push_poll(&mut self, fd: BorrowedFd<'_>, events: u32, tag: u64) -> Result<(), SysError> {
        // The numbers of poll(2) and epoll(7) are the same.
        let flags = EpollFlags::from_bits_retain(i32::try_from(events).unwrap_or(0)) | EpollFlags::EPOLLONESHOT;
        let mut event = EpollEvent::new(flags, tag);
        let set = match self.epoll.modify(fd, &mut event) {
            Err(Errno::ENOENT) => self.epoll.add(fd, event),
            modified => modified,
        };
        set.map_err(SysError::of("epoll_ctl"))?;
        self.waiting.insert(tag);
        Ok(())
    }

    fn cancel(&mut self, target: u64, tag: u64) {
        let is_waiting = self.waiting.remove(&target);
        if is_waiting {
            self.completed.push_back(Completion { tag: target, result: -libc::ECANCELED });
        }
        let result = if is_waiting { 0 } else { -libc::ENOENT };
        self.completed.push_back(Completion { tag, result });
    }

    fn wait(&mut self, timeout: EpollTimeout) -> Result<(), SysError> {
        let timeout = if self.completed.is_empty() { timeout } else { EpollTimeout::ZERO };
        let mut events = [EpollEvent::empty(); EVENTS];
        let count = take_events(&self.epoll, &mut events, timeout)?;
        for event in &events[..count] {
            // One that was cancelled has completed before.
            if self.waiting.remove(&event.data()) {
                self.completed.push_back(Completion { tag: event.data(), result: event.events().bits() });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write, os::fd::AsFd};

    use super::*;
    use crate::sys::{splice::Pipe, uring::READABLE};

    #[test]
    fn poll_completes_once_and_again_when_it_is_asked_for_again() {
        let pipe = Pipe::new(1 << 16).unwrap();
        let mut waits = Waits::Set(PollSet::new().unwrap());
        File::from(pipe.writer.try_clone().unwrap()).write_all(b"x").unwrap();
        for tag in [7, 8] {
            waits.push_poll(pipe.reader.as_fd(), READABLE, tag).unwrap();
            waits.submit_and_wait().unwrap();
            assert_eq!(waits.pop().map(|end| (end.tag, end.outcome())), Some((tag, Ok(()))));
            waits.submit().unwrap();
            assert_eq!(waits.pop(), None);
        }
    }

    #[test]
    fn cancelled_poll_completes_with_an_error_and_never_again() {
        let pipe = Pipe::new(1 << 16).unwrap();
        let mut waits = Waits::Set(PollSet::new().unwrap());
        waits.push_poll(pipe.reader.as_fd(), READABLE, 1).unwrap();
        waits.push_cancel(1, 2).unwrap();
        waits.push_cancel(1, 3).unwrap();
        File::from(pipe.writer.try_clone().unwrap()).write_all(b"x").unwrap();
        waits.submit_and_wait().unwrap();
        let ends: Vec<_> = std::iter::from_fn(|| waits.pop()).map(|end| (end.tag, end.outcome())).collect();
        assert_eq!(ends, [(1, Err(Errno::ECANCELED)), (2, Ok(())), (3, Err(Errno::ENOENT))]);
    }
}
