//! Waiting for several descriptors at once, and being woken by another thread.
//!
//! In:    descriptors, a time limit
//! Out:   which of them can be read
//! Runs:  blocks the caller's thread
//! Trust: the kernel

use std::{
    os::fd::{AsFd, BorrowedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        epoll::{Epoll, EpollEvent, EpollTimeout},
        eventfd::{EfdFlags, EventFd},
    },
};

use super::SysError;

/// Waits until one of `sources` can be read, or failed, and puts the places of those into `ready`. Without a limit it
/// waits for good. `ready` stays empty when the limit has passed or a signal came.
pub fn readable(sources: &[BorrowedFd<'_>], limit: Option<Duration>, ready: &mut Vec<usize>) -> Result<(), SysError> {
    ready.clear();
    let mut polled: Vec<PollFd<'_>> = sources.iter().map(|source| PollFd::new(*source, PollFlags::POLLIN)).collect();
    let limit = limit.map_or(PollTimeout::NONE, |limit| PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX));
    match poll(&mut polled, limit) {
        Ok(_) => ready.extend((0..polled.len()).filter(|at| polled[*at].any().unwrap_or(true))),
        Err(Errno::EINTR) => {}
        Err(errno) => return Err(SysError { call: "poll", errno }),
    }
    Ok(())
}

/// Waits for events of an epoll set: how many came, 0 also when a signal did. Hot.
pub fn take_events(epoll: &Epoll, events: &mut [EpollEvent], limit: EpollTimeout) -> Result<usize, SysError> {
    match epoll.wait(events, limit) {
        Err(Errno::EINTR) => Ok(0),
        taken => taken.map_err(SysError::of("epoll_wait")),
    }
}

/// Wakes a thread that waits for it. Stays readable: it is used once.
#[derive(Debug)]
pub struct Waker(EventFd);

impl Waker {
    /// A new one, not yet woken.
    pub fn new() -> Result<Self, SysError> {
        let made = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        made.map(Self).map_err(SysError::of("eventfd"))
    }

    /// Wakes whoever waits, now or later.
    pub fn wake(&self) {
        self.0.write(1).expect("a counter this far from its end takes one more");
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_ready_is_named() {
        let (idle, woken) = (Waker::new().unwrap(), Waker::new().unwrap());
        woken.wake();
        let mut ready = vec![7];
        readable(&[idle.as_fd(), woken.as_fd()], None, &mut ready).unwrap();
        assert_eq!(ready, [1]);
    }

    #[test]
    fn limit_passes_when_nothing_is_ready() {
        let mut ready = vec![7];
        readable(&[Waker::new().unwrap().as_fd()], Some(Duration::from_millis(1)), &mut ready).unwrap();
        assert!(ready.is_empty());
    }
}
