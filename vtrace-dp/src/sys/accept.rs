//! Accepting connections when the process has no descriptors left.
//!
//! In:    listening sockets, non-blocking
//! Out:   connections; an error that says whether the peer still waits
//! Runs:  on the caller's thread; never waits
//! Full:  a descriptor kept in reserve accepts the peer and closes the connection: it learns at once that it is not
//!        served, and the socket does not stay readable for ever
//! Trust: the peer with nothing

use std::{
    io,
    os::unix::net::{UnixListener, UnixStream},
    sync::{Mutex, PoisonError},
};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// One descriptor of the process, closed when it is needed.
static RESERVE: Mutex<Option<EventFd>> = Mutex::new(None);

/// Calls of [`accept`] in this process.
#[cfg(test)]
pub(crate) static ATTEMPTS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// The process or the system is out of descriptors; the peer's connection was closed.
    #[error("no descriptor is left for a connection: it was closed")]
    Closed,
    /// The call failed. Where it is out of descriptors the peer still waits: try again later, not at once.
    #[error("accept: {0}")]
    Failed(#[from] io::Error),
}

/// Sets a descriptor aside, unless there is one. Call it before anything is served.
pub fn reserve() {
    let mut kept = RESERVE.lock().unwrap_or_else(PoisonError::into_inner);
    if kept.is_none() {
        *kept = spare();
    }
}

/// The next connection; `None` if no client waits.
pub fn accept(listener: &UnixListener) -> Result<Option<UnixStream>, AcceptError> {
    #[cfg(test)]
    ATTEMPTS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    match listener.accept() {
        Ok((socket, _)) => {
            // It may have been given up when not even one descriptor was left.
            reserve();
            Ok(Some(socket))
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
            Err(turn_away(listener, error))
        }
        Err(error) => Err(error.into()),
    }
}

/// Gives the reserve up for one connection, which is closed, and takes it again.
fn turn_away(listener: &UnixListener, error: io::Error) -> AcceptError {
    let mut kept = RESERVE.lock().unwrap_or_else(PoisonError::into_inner);
    drop(kept.take());
    let closed = listener.accept().map(drop);
    *kept = spare();
    match closed {
        Ok(()) => AcceptError::Closed,
        Err(_) => error.into(),
    }
}

fn spare() -> Option<EventFd> {
    EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).ok()
}

impl From<AcceptError> for io::Error {
    fn from(error: AcceptError) -> Self {
        match error {
            AcceptError::Closed => Self::other(error.to_string()),
            AcceptError::Failed(error) => error,
        }
    }
}
