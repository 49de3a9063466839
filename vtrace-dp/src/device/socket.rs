//! The thread that serves one device: its socket, its VMM, its rings.
//!
//! In:    a socket that QEMU connects to, or one that it has connected already
//! Out:   a served device: see [`super`]
//! Runs:  one thread a device; it sleeps in epoll_wait until a request, a kick, a command or the owner's deadline comes,
//!        and there is no timer besides
//! Full:  [`TURN_REQUESTS_MAX`] requests a turn, then the rings; without a free descriptor whoever connects is turned away
//! Trust: the VMM with nothing. While a request arrives in pieces the thread goes on with the rings; one that is malformed
//!        is skipped. Only a request that never becomes whole ends the connection: see [`Connection`]
//!
//! When the VMM goes away, the next one to connect is the next boot.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::{
    Owner, Turn,
    backend::Backend,
    connection::{Connection, ConnectionError, Progress},
    device_rings::DeviceRings,
    lane_range::LaneRange,
};
use crate::{
    drain::ring::RingDrain,
    sys::{
        SysError,
        accept::accept,
        log_limit::PeerLog,
        socket::{Peer, is_listening},
    },
    virtq::memory::budget::MemoryShare,
};

/// Requests answered before the rings are looked at: QEMU sends seven for each ring when it starts the device.
const TURN_REQUESTS_MAX: usize = 64;
/// Events taken from epoll at a time; what is left comes at the next.
const EVENTS_MAX: usize = 8;
/// How long the listening socket is left alone after a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const LISTENER: u64 = 0;
const REQUESTS: u64 = 1;
const WAKE: u64 = 2;
const KICK: u64 = 3;

/// Where a guest's VMM comes from.
#[derive(Debug)]
pub enum Endpoint {
    /// VMMs connect here, one after the other.
    Listening(UnixListener),
    /// A VMM is connected here; after it there is no other.
    Connected(UnixStream),
}

impl Endpoint {
    /// What kind of socket an inherited descriptor is.
    pub fn of(descriptor: OwnedFd) -> Result<Self, SysError> {
        Ok(match is_listening(descriptor.as_fd())? {
            true => Self::Listening(descriptor.into()),
            false => Self::Connected(descriptor.into()),
        })
    }
}

/// A running device.
#[derive(Debug)]
pub struct Device {
    thread: JoinHandle<()>,
}

impl Device {
    /// Starts the thread of the device `name`, which is in this place among its guest's and maps memory out of `share`.
    /// It ends when `owner` says so.
    pub fn spawn(
        name: &str,
        lanes: LaneRange,
        endpoint: Endpoint,
        share: MemoryShare,
        drain: Arc<RingDrain>,
        owner: Box<dyn Owner>,
    ) -> io::Result<Self> {
        let mut device = DeviceThread::new(name, lanes, endpoint, share, drain, owner)?;
        let thread = thread::Builder::new().name(format!("vt-dev/{name}")).spawn(move || device.run())?;
        Ok(Self { thread })
    }

    /// Waits for the thread to end.
    pub fn join(self) {
        // Its panics are caught and logged where they happen.
        let _ = self.thread.join();
    }
}

/// The state of the thread.
struct DeviceThread {
    log: Arc<PeerLog>,
    epoll: Arc<Epoll>,
    listener: Option<UnixListener>,
    /// The listening socket is not watched until then.
    paused_until: Option<Instant>,
    connection: Option<Connection>,
    backend: Arc<Mutex<Backend>>,
}

impl DeviceThread {
    fn new(
        name: &str,
        lanes: LaneRange,
        endpoint: Endpoint,
        share: MemoryShare,
        drain: Arc<RingDrain>,
        owner: Box<dyn Owner>,
    ) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        epoll.add(owner.wake(), edge(WAKE))?;
        let log = Arc::new(PeerLog::new(name));
        let rings = DeviceRings::new(Arc::clone(&log), lanes, owner, Arc::clone(&epoll), KICK);
        let backend = Arc::new(Mutex::new(Backend::new(Arc::clone(&log), lanes, drain, rings, share)));
        let mut device = Self { log, epoll, listener: None, paused_until: None, connection: None, backend };
        match endpoint {
            Endpoint::Listening(listener) => {
                listener.set_nonblocking(true)?;
                device.epoll.add(&listener, level(LISTENER))?;
                device.listener = Some(listener);
            }
            Endpoint::Connected(socket) => device.connect(socket)?,
        }
        Ok(device)
    }

    fn run(&mut self) {
        let mut more = true;
        loop {
            // A panic outside the steps that catch their own: the state is as consistent as between two requests,
            // and ending would be worse for the guest than going on.
            match catch_unwind(AssertUnwindSafe(|| self.turn(more))) {
                Ok(Some(again)) => more = again,
                Ok(None) => return self.disconnect(),
                Err(_) => {
                    self.log.error(format_args!("the device panicked; it goes on"));
                    self.backend.clear_poison();
                    more = false;
                }
            }
        }
    }

    /// Waits and does what there is to do; whether more is left to be done at once. `None` when the owner is done.
    fn turn(&mut self, more: bool) -> Option<bool> {
        let accept = self.wait(more);
        self.resume();
        let mut more = self.requests();
        if accept {
            self.accept();
        }
        let mut backend = self.backend();
        if backend.rings.owner_turn() == Turn::Stop {
            return None;
        }
        more |= backend.rings.serve();
        Some(more)
    }

    /// Waits for something to happen; true if a VMM connects.
    fn wait(&self, more: bool) -> bool {
        let timeout = if more { EpollTimeout::ZERO } else { self.timeout() };
        let mut events = [EpollEvent::empty(); EVENTS_MAX];
        // An interrupted wait is a turn with nothing to do.
        let count = self.epoll.wait(&mut events, timeout).unwrap_or(0);
        events[..count].iter().any(|event| event.data() == LISTENER)
    }

    fn timeout(&self) -> EpollTimeout {
        let request = self.connection.as_ref().and_then(Connection::deadline);
        let deadlines = [self.backend().rings.owner.deadline(), request, self.paused_until];
        let Some(deadline) = deadlines.into_iter().flatten().min() else { return EpollTimeout::NONE };
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up: a turn that comes too early would come again and again.
        let left_ms = u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX);
        EpollTimeout::from(left_ms)
    }

    fn backend(&self) -> MutexGuard<'_, Backend> {
        self.backend.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Accepts the next VMM. One that cannot be accepted keeps the socket readable: it is not watched for a while.
    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        match accept(listener) {
            Ok(None) => {}
            Ok(Some(_)) if self.connection.is_some() => {
                self.log.warn(format_args!("a second VMM is turned away: one is connected"));
            }
            Ok(Some(socket)) => {
                if let Err(error) = self.connect(socket) {
                    self.log.error(format_args!("connection: {error}"));
                }
            }
            Err(error) => {
                self.log.warn(format_args!("a VMM is turned away: {error}"));
                if self.epoll.modify(listener, &mut EpollEvent::new(EpollFlags::empty(), LISTENER)).is_ok() {
                    self.paused_until = Some(Instant::now() + ACCEPT_PAUSE);
                }
            }
        }
    }

    /// Watches the listening socket again when its pause is over.
    fn resume(&mut self) {
        let Some(listener) =
            self.listener.as_ref().filter(|_| self.paused_until.is_some_and(|at| Instant::now() >= at))
        else {
            return;
        };
        self.paused_until = match self.epoll.modify(listener, &mut level(LISTENER)) {
            Ok(()) => None,
            Err(_) => Some(Instant::now() + ACCEPT_PAUSE),
        };
    }

    fn connect(&mut self, socket: UnixStream) -> io::Result<()> {
        let peer = Peer::of(&socket)?;
        let connection = Connection::new(socket, Arc::clone(&self.backend))?;
        self.epoll.add(connection.socket(), requests_edge())?;
        if let Err(foreign) = self.backend().rings.owner.admit(peer, connection.socket()) {
            // Closed before it has got an answer: no guest has the device yet.
            self.log.warn(format_args!("a VMM is turned away, pid {}, uid {}: {foreign}", peer.pid, peer.uid));
            return Ok(());
        }
        self.log.info(format_args!("VMM connected: pid {}, uid {}", peer.pid, peer.uid));
        self.backend().connected(peer);
        self.connection = Some(connection);
        Ok(())
    }

    fn disconnect(&mut self) {
        let Some(connection) = self.connection.take() else { return };
        let _ = self.epoll.delete(connection.socket());
        self.log.info(format_args!("VMM gone"));
        self.backend().disconnected();
    }

    /// Serves the requests that are there whole; true if there may be more.
    fn requests(&mut self) -> bool {
        for _ in 0..TURN_REQUESTS_MAX {
            let Some(connection) = &mut self.connection else { return false };
            match connection.step(&self.backend) {
                Ok(Progress::Waits) => return false,
                Ok(Progress::DeviceRings) => {}
                Ok(Progress::Faulty(fault)) => self.log.warn(format_args!("{fault}")),
                Err(error) => {
                    if !matches!(error, ConnectionError::Closed) {
                        self.log.warn(format_args!("the connection ends: {error}"));
                    }
                    self.disconnect();
                    return false;
                }
            }
        }
        true
    }
}

/// Readable, as long as it is.
fn level(token: u64) -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN, token)
}

/// A VMM's socket: requests, room for answers, its end.
fn requests_edge() -> EpollEvent {
    let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
    EpollEvent::new(flags, REQUESTS)
}

/// Watches for what comes from now on, not for what is there: nothing has to be read to be quiet again.
fn edge(token: u64) -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET, token)
}

#[cfg(test)]
mod tests;
