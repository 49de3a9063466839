//! The vhost-user connection of one device, and the thread that serves the device behind it.
//!
//! In:    a socket that QEMU connects to, or one that it has connected already
//! Out:   a served device: see [`super`]
//! Runs:  one thread a device; it sleeps in epoll_wait until a request, a kick, a command or the owner's deadline comes,
//!        and there is no timer besides
//! Full:  [`TURN_REQUESTS_MAX`] requests a turn, then the rings
//! Trust: the VMM: requests are short and come whole. Should one come in pieces, the thread goes on with the rings until
//!        the rest is there; should one be malformed, it is skipped, never answered by closing
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
    time::Instant,
};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use vhost::vhost_user::{BackendReqHandler, Error};

use super::{
    Owner, Turn,
    backend::Front,
    device_rings::Served,
    lane_range::Place,
    request_check::{self, Arrival},
};
use crate::{
    drain::ring::RingDrain,
    sys::{
        SysError,
        socket::{Peer, is_listening},
    },
};

/// Requests answered before the rings are looked at: QEMU sends seven for each ring when it starts the device.
const TURN_REQUESTS_MAX: usize = 64;
/// Events taken from epoll at a time; what is left comes at the next.
const EVENTS_MAX: usize = 8;

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
    /// Starts the thread of the device `name`, which is in this place among its guest's. It ends when `owner` says so.
    pub fn spawn(
        name: &str,
        place: Place,
        endpoint: Endpoint,
        drain: Arc<RingDrain>,
        owner: Box<dyn Owner>,
    ) -> io::Result<Self> {
        let mut serving = Serving::new(name, place, endpoint, drain, owner)?;
        let thread = thread::Builder::new().name(format!("device {name}")).spawn(move || serving.run())?;
        Ok(Self { thread })
    }

    /// Waits for the thread to end.
    pub fn join(self) {
        // Its panics are caught and logged where they happen.
        let _ = self.thread.join();
    }
}

/// The state of the thread.
struct Serving {
    name: String,
    epoll: Arc<Epoll>,
    listener: Option<UnixListener>,
    connection: Option<Connection>,
    front: Arc<Mutex<Front>>,
}

/// One VMM.
struct Connection {
    /// The same socket as the handler's, to look at what has come.
    socket: UnixStream,
    handler: BackendReqHandler<Mutex<Front>>,
}

impl Serving {
    fn new(
        name: &str,
        place: Place,
        endpoint: Endpoint,
        drain: Arc<RingDrain>,
        owner: Box<dyn Owner>,
    ) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?);
        epoll.add(owner.wake(), edge(WAKE))?;
        let served = Served::new(name, place, owner, Arc::clone(&epoll), KICK);
        let front = Arc::new(Mutex::new(Front::new(name, place, drain, served)));
        let mut serving = Self { name: name.to_owned(), epoll, listener: None, connection: None, front };
        match endpoint {
            Endpoint::Listening(listener) => {
                listener.set_nonblocking(true)?;
                serving.epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
                serving.listener = Some(listener);
            }
            Endpoint::Connected(socket) => serving.connect(socket)?,
        }
        Ok(serving)
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
                    log::error!("{}: a mistake of ours in the device; it goes on", self.name);
                    self.front.clear_poison();
                    more = false;
                }
            }
        }
    }

    /// Waits and does what there is to do; whether more is left to be done at once. `None` when the owner is done.
    fn turn(&mut self, more: bool) -> Option<bool> {
        let accept = self.wait(more);
        let mut more = self.requests();
        if accept {
            self.accept();
        }
        let mut front = self.front();
        if front.served.owner_turn() == Turn::Stop {
            return None;
        }
        more |= front.served.serve();
        Some(more)
    }

    /// Waits for something to happen; true if somebody wants to connect.
    fn wait(&self, more: bool) -> bool {
        let timeout = if more { EpollTimeout::ZERO } else { self.timeout() };
        let mut events = [EpollEvent::empty(); EVENTS_MAX];
        // An interrupted wait is a turn with nothing to do.
        let count = self.epoll.wait(&mut events, timeout).unwrap_or(0);
        events[..count].iter().any(|event| event.data() == LISTENER)
    }

    fn timeout(&self) -> EpollTimeout {
        let Some(deadline) = self.front().served.owner.deadline() else { return EpollTimeout::NONE };
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up: a turn that comes too early would come again and again.
        let left_ms = u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX);
        EpollTimeout::from(left_ms)
    }

    fn front(&self) -> MutexGuard<'_, Front> {
        self.front.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        match listener.accept() {
            Ok((socket, _)) if self.connection.is_none() => {
                if let Err(error) = self.connect(socket) {
                    log::error!("{}: connection: {error}", self.name);
                }
            }
            Ok(_) => log::warn!("{}: a second VMM is turned away: one is connected", self.name),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => log::warn!("{}: accept: {error}", self.name),
        }
    }

    fn connect(&mut self, socket: UnixStream) -> io::Result<()> {
        let peer = Peer::of(&socket)?;
        socket.set_nonblocking(false)?;
        let handler = BackendReqHandler::from_stream(socket.try_clone()?, Arc::clone(&self.front));
        self.epoll.add(&socket, edge(REQUESTS))?;
        if let Err(foreign) = self.front().served.owner.admit(peer, &socket) {
            // Closed before it has got an answer: no guest has the device yet.
            log::warn!("{}: a VMM is turned away, pid {}, uid {}: {foreign}", self.name, peer.pid, peer.uid);
            return Ok(());
        }
        log::info!("{}: VMM connected: pid {}, uid {}", self.name, peer.pid, peer.uid);
        self.front().connected(peer);
        self.connection = Some(Connection { socket, handler });
        Ok(())
    }

    fn disconnect(&mut self) {
        let Some(connection) = self.connection.take() else { return };
        let _ = self.epoll.delete(&connection.socket);
        log::info!("{}: VMM gone", self.name);
        self.front().disconnected();
    }

    /// Answers what has come whole; true if there may be more.
    fn requests(&mut self) -> bool {
        for _ in 0..TURN_REQUESTS_MAX {
            let Some(connection) = &mut self.connection else { return false };
            let arrival = match request_check::look(&connection.socket) {
                Ok(arrival) => arrival,
                Err(error) => {
                    log::warn!("{}: socket: {error}", self.name);
                    self.disconnect();
                    return false;
                }
            };
            match arrival {
                Arrival::Nothing => return false,
                Arrival::Closed => {
                    self.disconnect();
                    return false;
                }
                Arrival::Whole => self.request(),
                Arrival::PrivateMemory(request) => {
                    self.front().memory_is_private();
                    self.skip(&request, 0);
                }
                Arrival::Unknown(request) => {
                    log::warn!("{}: the VMM sent a request we do not know: {request:?}", self.name);
                    self.skip(&request, 1);
                }
            }
        }
        true
    }

    fn request(&mut self) {
        let Some(connection) = &mut self.connection else { return };
        match connection.handler.handle_request() {
            Ok(()) => {}
            Err(
                error @ (Error::Disconnected | Error::PartialMessage | Error::SocketBroken(_) | Error::SocketError(_)),
            ) => {
                log::warn!("{}: socket: {error}", self.name);
                self.disconnect();
            }
            Err(error) => log::warn!("{}: a request of the VMM is ignored: {error}", self.name),
        }
    }

    fn skip(&mut self, request: &request_check::Request, answer: u64) {
        let Some(connection) = &self.connection else { return };
        if let Err(error) = request_check::skip(&connection.socket, request, answer) {
            log::warn!("{}: socket: {error}", self.name);
        }
    }
}

/// Watches for what comes from now on, not for what is there: nothing has to be read to be quiet again.
fn edge(token: u64) -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET, token)
}

#[cfg(test)]
mod tests;
