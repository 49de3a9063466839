//! `vtrace server`: one daemon a host, between the guests' devices and the clients that record.
//!
//! From the top down; each module uses only what stands below it, and this one's configuration:
//!
//! | module | what |
//! |---|---|
//! | `client` | one client: its requests, its claims, its answers |
//! | `target_file` | whether a client's file and areas can be written to |
//! | `stream` | guests whose ports come over sockets or FIFOs |
//! | `extra_device` | the owner of a guest's second or later device |
//! | `guest` | what is known of a guest, who holds it, what passes between holder and agent |
//! | `holder` | which client may send requests to a guest's agent |
//! | `devices` | the devices of a guest: their VMM, the state of their drivers |
//! | `guest_drain` | their drains, as one; why a CPU has no port |
//! | `outbox` | what waits for a client |
//! | `activation` | sockets that were open before the server was |
//! | `sockets` | the server's own |
//! | `confine` | what the server keeps of its rights |
//! | `link` | a client's side of the control socket |
//!
//! In:    VMMs on one socket a device, clients on the control socket, signals
//! Out:   see [`device`](crate::device) and [`drain`](crate::drain::ring) for guests, [`client`] for clients
//! Runs:  one thread for signals, one for connections, one a client; for each guest its devices' and their drains'.
//!        All of them sleep until something happens: there is no timer but those that a session starts
//! Full:  [`CLIENTS_MAX`] clients, [`USER_CLIENTS_MAX`] of one user who is not root, [`GUESTS_MAX`] guests
//! Trust: guests with nothing; users by the permissions of the sockets. [`confine`] limits what a bug can do
//!
//! A guest whose server ends has a device that is not served: its CPU spins when a process there opens or closes a port.
//! So the end first has the agents close their sessions, and says which guests still run.

pub mod activation;
mod client;
pub mod confine;
mod devices;
mod extra_device;
mod guest;
mod guest_drain;
mod holder;
pub mod link;
pub mod outbox;
mod sockets;
pub mod stream;
mod target_file;

use std::{
    io,
    os::{
        fd::{AsFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};
use vtrace_common::{
    ids::GuestId,
    limits::{CLIENTS_MAX, DEVICE_LANES_MAX, DEVICES_MAX, GUESTS_MAX, USER_CLIENTS_MAX},
    wire::{
        Hello,
        client::{FromServer, Refusal},
    },
};

use self::{
    activation::{ActivationFault, Passed},
    client::{Client, Registry},
    confine::{Confinement, ConfinementFault, Opens},
    devices::DeviceParts,
    extra_device::ExtraDevice,
    guest::{DeviceCommand, Guest},
    outbox::{Notifier, frame},
    sockets::{Access, Bound},
    stream::{StreamThread, Streams},
};
pub use self::{
    guest::{GuestSlot, NameFault, check_name},
    sockets::SocketFault,
};
use crate::{
    device::{
        Owner,
        socket::{Device, Endpoint},
    },
    drain::{Drain, ring::RingDrain},
    sys::{
        SysError,
        accept::{accept, reserve},
        limit::allow_descriptors,
        log_limit::UserLogLimits,
        socket::{Peer, inherited, send_now},
    },
    virtq::memory::budget::{MemoryBudget, MemoryShare, mapped_bytes_max},
    vmm::setup::Transport,
};

/// Default folder of the sockets.
pub const DIRECTORY: &str = "/run/vtrace";
/// The clients' socket in that directory.
pub const CONTROL_SOCKET: &str = "control.sock";
/// The group that may connect to it, if it exists.
pub const CONTROL_GROUP: &str = "vtrace";

/// How long no client is accepted after one could not be.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long a server that ends waits for its threads. One may be in a call that never returns: a write to a file of a
/// client, on a server of files that is gone.
const END_TIME_MAX: Duration = Duration::from_secs(30);

/// What a server is to do.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ServerConfig {
    /// Where the sockets go; made if it is missing.
    pub directory: PathBuf,
    /// The guests, in the order of `--dom`.
    pub guests: Vec<GuestConfig>,
    /// Descriptors of sockets that listen already, each at the path it would have had: [`activation`].
    pub passed: Vec<RawFd>,
    /// What [`run`] gives up before it serves.
    pub confinement: Confinement,
}

/// One guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GuestConfig {
    /// Its name: see [`check_name`].
    pub name: String,
    /// Where its VMM comes from.
    pub socket: GuestSocket,
    /// Its devices: 1 to [`DEVICES_MAX`], more than one only with [`GuestSocket::InDirectory`]; streams have none.
    pub devices: usize,
    /// Lanes of each device: 1 to [`DEVICE_LANES_MAX`].
    pub lanes: usize,
}

impl GuestConfig {
    /// A guest with one device of as many lanes as there can be.
    pub fn new(name: &str, socket: GuestSocket) -> Self {
        Self { name: name.into(), socket, devices: 1, lanes: DEVICE_LANES_MAX }
    }

    /// What is opened for it once it is served.
    fn opens(&self) -> Opens {
        match &self.socket {
            GuestSocket::Streams(streams) if streams.setup.transport == Transport::Pipe => Opens::Fifos,
            GuestSocket::Streams(_) => Opens::Nowhere,
            _ => Opens::Nothing,
        }
    }
}

/// Where a guest's VMM comes from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum GuestSocket {
    /// It connects to NAME.sock in the server's directory, and further devices to NAME@2.sock and so on.
    InDirectory,
    /// It connects to this socket (`--socket-path`).
    Path(PathBuf),
    /// It is connected, or connects, to a descriptor this process was started with (`--fd`).
    Inherited(RawFd),
    /// Not at all: its ports come over QEMU's own device, as sockets or FIFOs.
    Streams(Streams),
}

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// A guest's name is not valid.
    #[error(transparent)]
    Name(#[from] NameFault),
    /// Two guests of one name.
    #[error("guest {0} is named twice")]
    Twice(String),
    /// Devices that a guest cannot have.
    #[error(
        "guest {name}: {devices} devices of {lanes} CPUs: there can be {DEVICES_MAX} of {DEVICE_LANES_MAX} CPUs, and \
         only one with a socket of its own"
    )]
    Devices {
        /// The guest.
        name: String,
        /// Devices asked for.
        devices: usize,
        /// Lanes of each.
        lanes: usize,
    },
    /// No guests, or more than there may be.
    #[error("{0} guests: 1 to {GUESTS_MAX} can be served")]
    Count(usize),
    /// The directory cannot be made.
    #[error("directory {}", path.display())]
    Directory {
        /// Its path.
        path: PathBuf,
        /// The failed call.
        source: io::Error,
    },
    /// It cannot become the user it was given.
    #[error(transparent)]
    Confinement(#[from] ConfinementFault),
    /// A socket cannot be had.
    #[error(transparent)]
    Socket(#[from] SocketFault),
    /// A socket this process was started with cannot be taken.
    #[error(transparent)]
    Activation(#[from] ActivationFault),
    /// The descriptor is not one a VMM can come from.
    #[error("descriptor {number}")]
    Descriptor {
        /// Its number.
        number: RawFd,
        /// What is wrong with it.
        source: SysError,
    },
    /// A thread or what it needs cannot be had.
    #[error("guest {name}: thread")]
    Thread {
        /// The guest.
        name: String,
        /// The failed call.
        source: io::Error,
    },
    /// What the server itself needs cannot be had.
    #[error("{what}")]
    System {
        /// The call that failed.
        what: &'static str,
        /// Its error.
        source: io::Error,
    },
}

/// Serves until SIGTERM or SIGINT.
pub fn run(config: &ServerConfig) -> Result<(), ServerError> {
    let system = |what| move |errno: Errno| ServerError::System { what, source: errno.into() };
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT].into_iter().collect();
    // Blocked before any thread exists, so that all of them inherit it.
    signals.thread_block().map_err(system("block signals"))?;
    let arrivals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC).map_err(system("signalfd"))?;
    // A device has up to two a ring.
    if let Err(error) = allow_descriptors(u64::MAX) {
        log::warn!("the limit of open descriptors stays as it is: {error}");
    }
    let sockets = Listening::bind(config)?;
    let opens = config.guests.iter().map(GuestConfig::opens).max().unwrap_or_default();
    confine::enter(&config.confinement, opens, sockets.bound.iter().map(Bound::path))?;
    let server = sockets.serve(config)?;
    let count = config.guests.len();
    let plural = if count == 1 { "" } else { "s" };
    log::info!("serving {count} guest{plural} in {}", config.directory.display());
    let signal = arrivals.read_signal().map_err(system("read signals"))?;
    log::info!("ends: signal {:?}", signal.map(|signal| signal.ssi_signo));
    end_after(END_TIME_MAX);
    server.stop();
    Ok(())
}

/// Ends this process after `time`, whatever its threads wait for.
fn end_after(time: Duration) {
    let spawned = thread::Builder::new().name("end".into()).spawn(move || {
        thread::sleep(time);
        log::error!("ends although threads still run: {time:?} have passed");
        std::process::exit(1);
    });
    if let Err(error) = spawned {
        log::warn!("its end has no time limit: {error}");
    }
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    guests: Registry,
    /// The first of each guest.
    devices: Vec<Device>,
    further: Vec<Device>,
    /// Of guests whose ports are streams.
    stream_threads: Vec<StreamThread>,
    acceptor: JoinHandle<()>,
    stop: Arc<Notifier>,
    /// Unlinked when dropped.
    _sockets: Vec<Bound>,
}

/// Sockets that are not served yet.
struct Listening {
    listener: UnixListener,
    /// Of each guest, in their order.
    bind_guest: Vec<GuestPorts>,
    bound: Vec<Bound>,
}

impl Listening {
    fn bind(config: &ServerConfig) -> Result<Self, ServerError> {
        check_guests(&config.guests)?;
        let directory = &config.directory;
        std::fs::create_dir_all(directory)
            .map_err(|source| ServerError::Directory { path: directory.clone(), source })?;
        // Before anything else is opened: they have fixed numbers.
        let mut sockets = Sockets { passed: Passed::adopt(&config.passed)?, bound: Vec::new() };
        // First the one that tells whether another server is here.
        let listener = sockets.bind(&directory.join(CONTROL_SOCKET), Access::Clients)?;
        let bind_guest = config.guests.iter().map(|guest| bind_guest(config, guest, &mut sockets));
        let bind_guest = bind_guest.collect::<Result<Vec<_>, _>>()?;
        let Sockets { passed, bound } = sockets;
        passed.check_taken()?;
        Ok(Self { listener, bind_guest, bound })
    }

    fn serve(self, config: &ServerConfig) -> Result<Server, ServerError> {
        let Self { listener, bind_guest, bound } = self;
        reserve();
        let memory = MemoryBudget::new(mapped_bytes_max());
        let (mut slots, mut devices, mut further, mut stream_threads) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for ((number, guest), bind_guest) in (0..).zip(&config.guests).zip(bind_guest) {
            let fault = |source| ServerError::Thread { name: guest.name.clone(), source };
            match bind_guest {
                GuestPorts::Devices(endpoints) => {
                    let (slot, started) =
                        start_guest(GuestId(number), guest, &memory.share(), endpoints).map_err(fault)?;
                    slots.push(slot);
                    let mut started = started.into_iter();
                    devices.extend(started.next());
                    further.extend(started);
                }
                GuestPorts::Streams(ports) => {
                    let (slot, stream_thread) = stream::start(guest, ports).map_err(fault)?;
                    slots.push(slot);
                    stream_threads.push(stream_thread);
                }
            }
        }
        let (guests, stop) = (Arc::new(slots), Notifier::new().map(Arc::new));
        let system = |source| ServerError::System { what: "start the acceptor", source };
        let stop = stop.map_err(system)?;
        let acceptor = Acceptor {
            listener,
            guests: Arc::clone(&guests),
            stop: Arc::clone(&stop),
            log: Arc::default(),
            clients: Vec::new(),
        };
        let thread = thread::Builder::new().name("vt-accept".into()).spawn(move || acceptor.run()).map_err(system)?;
        Ok(Server { guests, devices, further, stream_threads, acceptor: thread, stop, _sockets: bound })
    }
}

impl Server {
    /// Makes the sockets and starts all threads.
    pub fn start(config: &ServerConfig) -> Result<Self, ServerError> {
        Listening::bind(config)?.serve(config)
    }

    /// The guests, in the order of the configuration.
    pub fn guests(&self) -> &[Arc<GuestSlot>] {
        &self.guests
    }

    /// Lets the clients go, has the agents close their sessions (one second at most), ends the devices.
    pub fn stop(self) {
        self.stop.notify();
        let _ = self.acceptor.join();
        for slot in self.guests.iter() {
            if let Some(pid) = slot.state().vmm_pid.filter(|_| !slot.devices.are_streams()) {
                log::warn!("{}: pid {pid} still runs, with a device that is no longer served", slot.name);
            }
            // Commands that end things are never refused.
            let _ = slot.command(DeviceCommand::Stop);
        }
        self.devices.into_iter().for_each(Device::join);
        self.stream_threads.into_iter().for_each(StreamThread::join);
        // Only now: an agent that closes its session closes the ports of all devices.
        self.guests.iter().for_each(|slot| slot.devices.end());
        self.further.into_iter().for_each(Device::join);
    }
}

fn check_guests(guests: &[GuestConfig]) -> Result<(), ServerError> {
    if !(1..=GUESTS_MAX).contains(&guests.len()) {
        return Err(ServerError::Count(guests.len()));
    }
    for (at, guest) in guests.iter().enumerate() {
        check_name(&guest.name)?;
        let GuestConfig { ref name, ref socket, devices, lanes } = *guest;
        let few = *socket == GuestSocket::InDirectory || devices == 1;
        if !(1..=DEVICES_MAX).contains(&devices) || !(1..=DEVICE_LANES_MAX).contains(&lanes) || !few {
            return Err(ServerError::Devices { name: name.clone(), devices, lanes });
        }
        if guests[..at].iter().any(|other| other.name == guest.name) {
            return Err(ServerError::Twice(guest.name.clone()));
        }
    }
    Ok(())
}

/// The server's sockets while it starts.
struct Sockets {
    passed: Passed,
    bound: Vec<Bound>,
}

impl Sockets {
    /// Listens at `path`, on the socket this process was started with if there is one.
    fn bind(&mut self, path: &Path, access: Access) -> Result<UnixListener, SocketFault> {
        let (listener, bound) = self.passed.bind(path, access)?;
        self.bound.extend(bound);
        Ok(listener)
    }
}

/// A device's name: its guest's, and for those after the first their number. No guest's name has an '@'.
fn device_name(guest: &str, device: usize) -> String {
    if device == 0 { guest.into() } else { format!("{guest}@{}", device + 1) }
}

/// Where a guest's ports come from.
enum GuestPorts {
    Devices(Vec<(Endpoint, String)>),
    Streams(stream::Ports),
}

fn bind_guest(config: &ServerConfig, guest: &GuestConfig, sockets: &mut Sockets) -> Result<GuestPorts, ServerError> {
    if let GuestSocket::Streams(streams) = &guest.socket {
        return Ok(GuestPorts::Streams(streams.ports(sockets)?));
    }
    let own = (0..guest.devices).map(|device| endpoint(config, guest, device, sockets));
    own.collect::<Result<_, _>>().map(GuestPorts::Devices)
}

/// Where the VMM of a device comes from, and what to call it.
fn endpoint(
    config: &ServerConfig,
    guest: &GuestConfig,
    device: usize,
    sockets: &mut Sockets,
) -> Result<(Endpoint, String), ServerError> {
    let path = match &guest.socket {
        GuestSocket::InDirectory | GuestSocket::Streams(_) => {
            config.directory.join(format!("{}.sock", device_name(&guest.name, device)))
        }
        GuestSocket::Path(path) => path.clone(),
        GuestSocket::Inherited(number) => {
            let fault = |source| ServerError::Descriptor { number: *number, source };
            let endpoint = inherited(*number).and_then(Endpoint::of).map_err(fault)?;
            return Ok((endpoint, format!("descriptor {number}")));
        }
    };
    let listener = sockets.bind(&path, Access::Vmm)?;
    Ok((Endpoint::Listening(listener), path.display().to_string()))
}

/// A guest and its devices, the first one first.
fn start_guest(
    id: GuestId,
    guest: &GuestConfig,
    share: &MemoryShare,
    endpoints: Vec<(Endpoint, String)>,
) -> io::Result<(Arc<GuestSlot>, Vec<Device>)> {
    let (mut parts, mut drains) = (Vec::new(), Vec::new());
    for (device, (endpoint, socket)) in endpoints.into_iter().enumerate() {
        let name = device_name(&guest.name, device);
        let drain = Arc::new(RingDrain::spawn(id, &name)?);
        let station: Arc<dyn Drain> = Arc::<RingDrain>::clone(&drain);
        parts.push(DeviceParts { socket, drain: station });
        drains.push((name, endpoint, drain));
    }
    let slot = GuestSlot::new(&guest.name, parts, guest.lanes)?;
    let devices = drains.into_iter().enumerate().map(|(device, (name, endpoint, drain))| {
        let place = slot.devices.place(device);
        let owner: Box<dyn Owner> = match device {
            0 => Box::new(Guest::new(Arc::clone(&slot))),
            _ => Box::new(ExtraDevice::new(Arc::clone(&slot), device)),
        };
        Device::spawn(&name, place, endpoint, share.clone(), drain, owner)
    });
    let devices = devices.collect::<io::Result<Vec<_>>>()?;
    Ok((slot, devices))
}

/// Accepts clients.
struct Acceptor {
    listener: UnixListener,
    guests: Registry,
    stop: Arc<Notifier>,
    /// What clients cause in the log.
    log: Arc<UserLogLimits>,
    /// With their users.
    clients: Vec<(u32, JoinHandle<()>)>,
}

impl Acceptor {
    fn run(mut self) {
        while self.wait() {
            self.clients.retain(|(_, client)| !client.is_finished());
            self.accept();
        }
        // They poll the same notifier.
        self.clients.into_iter().for_each(|(_, client)| drop(client.join()));
    }

    /// False when the server ends.
    fn wait(&self) -> bool {
        let mut polled =
            [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN), PollFd::new(self.stop.as_fd(), PollFlags::POLLIN)];
        // An interrupted or failed wait is followed by an accept that would block, and by the next wait.
        let _ = poll(&mut polled, PollTimeout::NONE);
        polled[1].any() != Some(true)
    }

    fn accept(&mut self) {
        match accept(&self.listener) {
            Ok(None) => {}
            Ok(Some(socket)) => {
                let peer = Peer::of(&socket).unwrap_or(Peer { pid: 0, uid: u32::MAX });
                if let Err(error) = self.serve(socket, peer) {
                    let Peer { pid, uid } = peer;
                    let line = format_args!("client: pid {pid}, uid {uid} is turned away: {error}");
                    self.log.log(uid, log::Level::Warn, line);
                }
            }
            Err(error) => {
                self.log.log(u32::MAX, log::Level::Error, format_args!("a client is turned away: {error}"));
                // Whoever could not be accepted still waits: not again at once.
                thread::sleep(ACCEPT_PAUSE);
            }
        }
    }

    fn serve(&mut self, socket: UnixStream, peer: Peer) -> io::Result<()> {
        if self.is_full_for(peer.uid) {
            let refusal = FromServer::Refused(Refusal::Full);
            let answer = [frame(&Hello::ours(vtrace_common::SOFTWARE)), frame(&refusal)].concat();
            let _ = send_now(socket.as_fd(), &answer, None);
            return Err(io::Error::other("too many clients"));
        }
        let client = Client::new(socket, Arc::clone(&self.guests), Arc::clone(&self.stop), Arc::clone(&self.log))?;
        let thread = thread::Builder::new().name("vt-client".into()).spawn(move || client.run())?;
        self.clients.push((peer.uid, thread));
        Ok(())
    }

    /// One user's clients leave room for others'.
    fn is_full_for(&self, uid: u32) -> bool {
        let own = self.clients.iter().filter(|(other, _)| *other == uid).count();
        self.clients.len() >= CLIENTS_MAX || (uid != 0 && own >= USER_CLIENTS_MAX)
    }
}

#[cfg(test)]
mod tests;
