//! `vtrace server`: one daemon a host, between the guests' devices and the clients that record.
//!
//! In:    VMMs on one socket a guest, clients on the control socket, signals
//! Out:   see [`device`](crate::device) and [`drain`](crate::drain) for guests, [`client`] for clients
//! Runs:  one thread for signals, one for connections, one a client; for each guest its device's and its drain's.
//!        All of them sleep until something happens: there is no timer but those that a session starts
//! Full:  [`CLIENTS_MAX`] clients, [`GUESTS_MAX`] guests
//! Trust: guests with nothing; users by the permissions of the sockets
//!
//! A guest whose server ends has a device that nobody serves: its CPU spins when a process there opens or closes a port.
//! So the end first has the agents close their sessions, and says which guests still run.

mod client;
mod guest;
mod lanes;
pub mod link;
pub mod outbox;
mod seat;
mod sockets;

use std::{
    io,
    os::{
        fd::{AsFd, RawFd},
        unix::net::UnixListener,
    },
    path::PathBuf,
    sync::Arc,
    thread::{self, JoinHandle},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};
use vtrace_common::{
    ids::GuestId,
    limits::{CLIENTS_MAX, GUESTS_MAX},
    wire::{
        Hello,
        client::{FromServer, Refusal},
    },
};

use self::{
    client::{Client, Registry, frame},
    guest::{Command, Guest},
    outbox::Bell,
    sockets::{Access, Bound},
};
pub use self::{
    guest::{GuestSlot, NameFault, check_name},
    sockets::SocketFault,
};
use crate::{
    device::socket::{Device, Endpoint},
    drain::Drain,
    sys::{
        SysError,
        socket::{inherited, send_now},
    },
};

/// Where the sockets are unless told otherwise.
pub const DIRECTORY: &str = "/run/vtrace";
/// The clients' socket in that directory.
pub const CONTROL_SOCKET: &str = "control.sock";
/// The group that may connect to it, if it exists.
pub const CONTROL_GROUP: &str = "vtrace";

/// What a server is to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServerConfig {
    /// Where the sockets go; made if it is missing.
    pub directory: PathBuf,
    /// The guests, in the order of `--dom`.
    pub guests: Vec<GuestConfig>,
}

/// One guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GuestConfig {
    /// Its name: see [`check_name`].
    pub name: String,
    /// Where its VMM comes from.
    pub socket: GuestSocket,
}

/// Where a guest's VMM comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum GuestSocket {
    /// It connects to NAME.sock in the server's directory.
    InDirectory,
    /// It connects to this socket (`--socket-path`).
    Path(PathBuf),
    /// It is connected, or connects, to a descriptor this process was started with (`--fd`).
    Inherited(RawFd),
}

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// A guest's name is none.
    #[error(transparent)]
    Name(#[from] NameFault),
    /// Two guests of one name.
    #[error("guest {0} is named twice")]
    Twice(String),
    /// No guests, or more than there may be.
    #[error("{0} guests: 1 to {GUESTS_MAX} can be served")]
    Count(usize),
    /// The directory cannot be made.
    #[error("directory {}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A socket cannot be had.
    #[error(transparent)]
    Socket(#[from] SocketFault),
    /// The descriptor is not one a VMM can come from.
    #[error("descriptor {number}")]
    Descriptor {
        /// Its number.
        number: RawFd,
        /// Why.
        source: SysError,
    },
    /// A thread or what it needs cannot be had.
    #[error("guest {name}: thread")]
    Thread {
        /// Whose.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// What the server itself needs cannot be had.
    #[error("{what}")]
    System {
        /// Which call.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// What `--print-capabilities` prints (QEMU docs/interop/vhost-user.rst, "Backend programs").
pub fn capabilities() -> serde_json::Value {
    serde_json::json!({ "type": "console", "features": [] })
}

/// Serves until SIGTERM or SIGINT.
pub fn run(config: &ServerConfig) -> Result<(), ServerError> {
    let system = |what| move |errno: Errno| ServerError::System { what, source: errno.into() };
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
    // Blocked before any thread exists, so that all of them inherit it.
    signals.thread_block().map_err(system("block signals"))?;
    let arrivals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC).map_err(system("signalfd"))?;
    raise_descriptor_limit();
    let server = Server::start(config)?;
    log::info!("serving {} guests in {}", config.guests.len(), config.directory.display());
    let signal = arrivals.read_signal().map_err(system("read signals"))?;
    log::info!("ends: signal {:?}", signal.map(|signal| signal.ssi_signo));
    server.stop();
    Ok(())
}

/// A device has up to two descriptors a ring, and the soft limit is often less than two guests need.
fn raise_descriptor_limit() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(errno) = raised {
        log::warn!("the limit of open descriptors stays as it is: {errno}");
    }
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    guests: Registry,
    devices: Vec<Device>,
    acceptor: JoinHandle<()>,
    stop: Arc<Bell>,
    /// Unlinked when dropped.
    _sockets: Vec<Bound>,
}

impl Server {
    /// Makes the sockets and starts all threads.
    pub fn start(config: &ServerConfig) -> Result<Self, ServerError> {
        check_guests(&config.guests)?;
        let directory = &config.directory;
        std::fs::create_dir_all(directory)
            .map_err(|source| ServerError::Directory { path: directory.clone(), source })?;
        // First the one that tells whether another server is here.
        let (listener, control) = sockets::bind(&directory.join(CONTROL_SOCKET), Access::Clients)?;
        let (mut sockets, mut endpoints) = (vec![control], Vec::new());
        for guest in &config.guests {
            let (endpoint, path) = endpoint(config, guest, &mut sockets)?;
            endpoints.push((guest.name.clone(), endpoint, path));
        }
        let (mut slots, mut devices) = (Vec::new(), Vec::new());
        for (number, (name, endpoint, path)) in (0..).zip(endpoints) {
            let (slot, device) = start_guest(GuestId(number), &name, endpoint, &path)
                .map_err(|source| ServerError::Thread { name, source })?;
            slots.push(slot);
            devices.push(device);
        }
        let (guests, stop) = (Arc::new(slots), Bell::new().map(Arc::new));
        let system = |source| ServerError::System { what: "start the acceptor", source };
        let stop = stop.map_err(system)?;
        let acceptor = Acceptor { listener, guests: Arc::clone(&guests), stop: Arc::clone(&stop), clients: Vec::new() };
        let thread = thread::Builder::new().name("acceptor".into()).spawn(move || acceptor.run()).map_err(system)?;
        Ok(Self { guests, devices, acceptor: thread, stop, _sockets: sockets })
    }

    /// The guests, in the order of the configuration.
    pub fn guests(&self) -> &[Arc<GuestSlot>] {
        &self.guests
    }

    /// Lets the clients go, has the agents close their sessions (one second at most), ends the devices.
    pub fn stop(self) {
        self.stop.ring();
        let _ = self.acceptor.join();
        for slot in self.guests.iter() {
            if let Some(pid) = slot.state().vmm_pid {
                log::warn!("{}: pid {pid} still runs, with a device that nobody serves from now on", slot.name);
            }
            // Commands that end things are never refused.
            let _ = slot.command(Command::Stop);
        }
        self.devices.into_iter().for_each(Device::join);
    }
}

fn check_guests(guests: &[GuestConfig]) -> Result<(), ServerError> {
    if !(1..=GUESTS_MAX).contains(&guests.len()) {
        return Err(ServerError::Count(guests.len()));
    }
    for (at, guest) in guests.iter().enumerate() {
        check_name(&guest.name)?;
        if guests[..at].iter().any(|other| other.name == guest.name) {
            return Err(ServerError::Twice(guest.name.clone()));
        }
    }
    Ok(())
}

/// Where a guest's VMM comes from, and what to call it.
fn endpoint(
    config: &ServerConfig,
    guest: &GuestConfig,
    sockets: &mut Vec<Bound>,
) -> Result<(Endpoint, String), ServerError> {
    let path = match &guest.socket {
        GuestSocket::InDirectory => config.directory.join(format!("{}.sock", guest.name)),
        GuestSocket::Path(path) => path.clone(),
        GuestSocket::Inherited(number) => {
            let fault = |source| ServerError::Descriptor { number: *number, source };
            let endpoint = inherited(*number).and_then(Endpoint::of).map_err(fault)?;
            return Ok((endpoint, format!("descriptor {number}")));
        }
    };
    let (listener, bound) = sockets::bind(&path, Access::Vmm)?;
    sockets.push(bound);
    Ok((Endpoint::Listening(listener), path.display().to_string()))
}

fn start_guest(id: GuestId, name: &str, endpoint: Endpoint, path: &str) -> io::Result<(Arc<GuestSlot>, Device)> {
    let drain = Arc::new(Drain::spawn(id, name)?);
    let slot = GuestSlot::new(name, path, Arc::clone(&drain))?;
    let device = Device::spawn(name, endpoint, drain, Box::new(Guest::new(Arc::clone(&slot))))?;
    Ok((slot, device))
}

/// Lets clients in.
struct Acceptor {
    listener: UnixListener,
    guests: Registry,
    stop: Arc<Bell>,
    clients: Vec<JoinHandle<()>>,
}

impl Acceptor {
    fn run(mut self) {
        while self.wait() {
            self.clients.retain(|client| !client.is_finished());
            if let Err(error) = self.accept() {
                log::error!("a client is turned away: {error}");
            }
        }
        // They poll the same bell.
        self.clients.into_iter().for_each(|client| drop(client.join()));
    }

    /// False when the server ends.
    fn wait(&self) -> bool {
        let mut polled =
            [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN), PollFd::new(self.stop.as_fd(), PollFlags::POLLIN)];
        // An interrupted or failed wait is followed by an accept that would block, and by the next wait.
        let _ = poll(&mut polled, PollTimeout::NONE);
        polled[1].any() != Some(true)
    }

    fn accept(&mut self) -> io::Result<()> {
        let socket = match self.listener.accept() {
            Ok((socket, _)) => socket,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => {
                // Out of descriptors, most likely, and the connection still waits: not again at once.
                thread::sleep(std::time::Duration::from_millis(100));
                return Err(error);
            }
        };
        if self.clients.len() >= CLIENTS_MAX {
            let words = [frame(&Hello::ours(crate::SOFTWARE)), frame(&FromServer::Refused(Refusal::Full))].concat();
            let _ = send_now(socket.as_fd(), &words, None);
            return Ok(());
        }
        let client = Client::new(socket, Arc::clone(&self.guests), Arc::clone(&self.stop))?;
        self.clients.push(thread::Builder::new().name("client".into()).spawn(move || client.run())?);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
