//! One client: its requests, its claims, its answers.
//!
//! In:    frames and descriptors of a process that may open the control socket
//! Out:   commands to devices, calls of drains, frames to the client
//! Runs:  one thread a client. It may wait for a drain's disk; no other thread waits for it.
//! Full:  while [`ANSWER_BYTES_MAX`](super::outbox::ANSWER_BYTES_MAX) of answers wait for the client to read, no request of
//!        it is served, and none is read
//! Trust: the socket's permissions decide who comes in; what comes is checked. Only who holds a guest reaches its agent, its
//!        lanes and its ledger, and process ids of other users are hidden. A client never gets the server to open a
//!        path, and a descriptor that comes uninvited is closed.
//!
//! A client that goes away has released everything.

use std::{
    collections::HashMap,
    fs::File,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vtrace_common::wire::{
    Decoder, Fault, Hello,
    client::{FromServer, LaneSent, Lanes, Refusal, ToServer},
    encode,
};

use super::{
    guest::{DeviceCommand, GuestSlot, Holder},
    outbox::{Meaning, Notifier, Outbox, Session},
    target_file::{LanesFault, check_areas, check_direct, check_file},
};
use crate::sys::{
    log_limit::UserLogLimits,
    socket::{Peer, receive, send_now},
};

/// Descriptors of a request: a file, and the same past the page cache.
const FILES_MAX: usize = 2;
/// Bytes read at a time.
const PIECE_BYTES: usize = 16 << 10;
/// Longest wait a client may ask for when it finishes.
const WAIT_MS_MAX: u32 = 60_000;

/// All guests of a server, by the order of `--dom`.
pub(super) type Registry = Arc<Vec<Arc<GuestSlot>>>;

/// How far a claim has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Asked,
    Held,
    /// Held, and its pages go to a file.
    Attached,
    Releasing,
}

#[derive(Debug)]
struct Held {
    slot: Arc<GuestSlot>,
    session: Arc<Session>,
    phase: Phase,
}

/// Why a client's connection ends.
#[derive(Debug, thiserror::Error)]
enum ClientEnd {
    #[error("it closed its socket")]
    Closed,
    #[error(
        "it ({}) speaks wire versions {} to {}, this server speaks {}: use the same vtrace for both",
        .0.software, .0.version_min, .0.version_max, vtrace_common::wire::VERSION
    )]
    Version(Hello),
    #[error("{0}")]
    Fault(Fault),
    #[error("{0}")]
    Socket(#[from] crate::sys::SysError),
    #[error("poll: {0}")]
    Poll(nix::errno::Errno),
    #[error("the server ends")]
    Stop,
}

impl From<Fault> for ClientEnd {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// One connection.
pub(super) struct Client {
    socket: UnixStream,
    peer: Peer,
    guests: Registry,
    stop: Arc<Notifier>,
    log: Arc<UserLogLimits>,
    outbox: Arc<Outbox>,
    decoder: Decoder,
    greeted: bool,
    /// Bytes that the socket has not taken yet.
    unsent: Vec<u8>,
    /// The descriptors that came with bytes of a frame that is not whole yet.
    passed: Vec<OwnedFd>,
    held: HashMap<String, Held>,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.outbox.close();
    }
}

impl Client {
    pub(super) fn new(
        socket: UnixStream,
        guests: Registry,
        stop: Arc<Notifier>,
        log: Arc<UserLogLimits>,
    ) -> std::io::Result<Self> {
        let peer = Peer::of(&socket)?;
        Ok(Self {
            socket,
            peer,
            guests,
            stop,
            log,
            outbox: Outbox::new()?,
            decoder: Decoder::default(),
            greeted: false,
            unsent: encode(&Hello::ours(vtrace_common::SOFTWARE)).expect("our own hello is within its bounds"),
            passed: Vec::new(),
            held: HashMap::new(),
        })
    }

    /// Serves until the client goes away.
    pub(super) fn run(mut self) {
        let Peer { pid, uid } = self.peer;
        self.log.log(uid, log::Level::Info, format_args!("client: pid {pid}, uid {uid}"));
        let end = loop {
            if let Err(end) = self.turn() {
                break end;
            }
        };
        // What was said last (our hello, to one of another version) may still fit.
        let _ = self.write();
        for (_, held) in std::mem::take(&mut self.held) {
            Self::let_go(&held, self.peer);
        }
        self.log.log(uid, log::Level::Info, format_args!("client: pid {pid} is gone: {end}"));
    }

    fn turn(&mut self) -> Result<(), ClientEnd> {
        self.write()?;
        self.serve()?;
        // Requests that are not served yet come first.
        let reads = self.outbox.has_room();
        let mut wanted = if reads { PollFlags::POLLIN } else { PollFlags::empty() };
        // While something is unsent, what else waits cannot be sent either.
        let notifier = if self.unsent.is_empty() { PollFlags::POLLIN } else { PollFlags::empty() };
        wanted.set(PollFlags::POLLOUT, !self.unsent.is_empty());
        let mut polled = [
            PollFd::new(self.socket.as_fd(), wanted),
            PollFd::new(self.outbox.notifier().as_fd(), notifier),
            PollFd::new(self.stop.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(ClientEnd::Poll(errno)),
        }
        let [socket, _, stop] = polled.map(|polled| polled.revents().unwrap_or(PollFlags::empty()));
        if !stop.is_empty() {
            return Err(ClientEnd::Stop);
        }
        if socket.intersects(PollFlags::POLLHUP | PollFlags::POLLERR) && !reads {
            return Err(ClientEnd::Closed);
        }
        if reads && socket.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
            self.read()?;
        }
        Ok(())
    }

    /// Sends what waits, as much as the socket takes.
    fn write(&mut self) -> Result<(), ClientEnd> {
        self.outbox.notifier().clear();
        loop {
            if self.unsent.is_empty() {
                let Some(waiting) = self.outbox.take() else { return Ok(()) };
                self.progress(waiting.session.as_ref(), waiting.meaning);
                self.unsent = waiting.frame;
            }
            match send_now(self.socket.as_fd(), &self.unsent, None) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(error) if error.would_block() => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// A claim has come as far as a message says.
    fn progress(&mut self, session: Option<&Arc<Session>>, meaning: Meaning) {
        let Some(session) = session else { return };
        let Some((guest, held)) = self.held.iter_mut().find(|(_, held)| Arc::ptr_eq(&held.session, session)) else {
            return;
        };
        match (meaning, held.phase) {
            (Meaning::Claimed, _) => held.phase = Phase::Held,
            (Meaning::Released, _) | (Meaning::Refused, Phase::Asked) => {
                session.end();
                let guest = guest.clone();
                self.held.remove(&guest);
            }
            _ => {}
        }
    }

    fn read(&mut self) -> Result<(), ClientEnd> {
        let mut piece = [0; PIECE_BYTES];
        let (count, descriptors) = match receive(self.socket.as_fd(), &mut piece) {
            Ok((0, _)) => return Err(ClientEnd::Closed),
            Ok(read) => read,
            Err(error) if error.would_block() => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        self.passed.extend(descriptors);
        if self.passed.len() > FILES_MAX {
            self.passed.clear();
        }
        self.decoder.push(&piece[..count]);
        Ok(())
    }

    /// Serves the requests that have come, while there is room for their answers.
    fn serve(&mut self) -> Result<(), ClientEnd> {
        while self.outbox.has_room() {
            let Some(frame) = self.decoder.next_frame()? else { break };
            if !self.greeted {
                let hello: Hello = frame.open()?;
                if !hello.speaks_ours() {
                    return Err(ClientEnd::Version(hello));
                }
                self.greeted = true;
                continue;
            }
            let request = frame.open()?;
            self.request(request);
        }
        if self.decoder.is_empty() {
            // It came with no request that takes one.
            self.passed.clear();
        }
        Ok(())
    }

    fn request(&mut self, request: ToServer) {
        let answer = match request {
            ToServer::List => Ok(Some(self.list())),
            ToServer::Claim { guest } => self.claim(guest),
            ToServer::Agent { guest, request } => {
                self.holder(&guest).and_then(|(slot, holder)| command(&slot, DeviceCommand::Request(holder, request)))
            }
            ToServer::Lanes(lanes) => self.attach(&lanes),
            ToServer::Ledger { guest } => self
                .attached(&guest)
                .map(|held| Some(FromServer::Ledger { guest, lanes: held.slot.devices.drains.ledger() })),
            ToServer::Finish { guest, sent, wait_ms_max } => self.finish(guest, sent, wait_ms_max),
            ToServer::Release { guest } => self.release(&guest),
        };
        match answer {
            Ok(None) => {}
            Ok(Some(message)) => self.outbox.post(&message),
            Err(refusal) => self.outbox.post(&FromServer::Refused(refusal)),
        }
    }

    /// All guests. If they tell too much for one frame, without what their agents say of their machines: a guest must not
    /// keep the others from being seen.
    fn list(&self) -> FromServer {
        let mut states: Vec<_> = self.guests.iter().map(|slot| slot.state_for(self.peer)).collect();
        let whole = FromServer::Guests(states.clone());
        if encode(&whole).is_ok() {
            return whole;
        }
        states.iter_mut().filter_map(|state| state.agent.as_mut()).for_each(|agent| agent.machine = None);
        FromServer::Guests(states)
    }

    fn slot(&self, guest: &str) -> Result<&Arc<GuestSlot>, Refusal> {
        self.guests.iter().find(|slot| slot.name == guest).ok_or_else(|| Refusal::NoSuchGuest {
            guest: guest.into(),
            known: self.guests.iter().map(|slot| slot.name.clone()).collect(),
        })
    }

    /// The claim on `guest`, if this client holds it.
    fn claimed(&mut self, guest: &str) -> Result<&mut Held, Refusal> {
        self.slot(guest)?;
        match self.held.get_mut(guest) {
            Some(held) if matches!(held.phase, Phase::Held | Phase::Attached) => Ok(held),
            _ => Err(state(guest, "this client has not claimed the guest")),
        }
    }

    fn attached(&mut self, guest: &str) -> Result<&mut Held, Refusal> {
        match self.claimed(guest)? {
            held if held.phase == Phase::Attached => Ok(held),
            _ => Err(state(guest, "the guest has no lanes yet")),
        }
    }

    fn holder(&mut self, guest: &str) -> Result<(Arc<GuestSlot>, Holder), Refusal> {
        let peer = self.peer;
        let held = self.claimed(guest)?;
        Ok((Arc::clone(&held.slot), Holder { peer, session: Arc::clone(&held.session) }))
    }

    fn claim(&mut self, guest: String) -> Result<Option<FromServer>, Refusal> {
        let slot = Arc::clone(self.slot(&guest)?);
        if self.held.contains_key(&guest) {
            return Err(state(&guest, "this client has claimed the guest already"));
        }
        let session = Session::new(Arc::clone(&self.outbox), Arc::clone(&slot.notifier));
        command(&slot, DeviceCommand::Claim(Holder { peer: self.peer, session: Arc::clone(&session) }))?;
        self.held.insert(guest, Held { slot, session, phase: Phase::Asked });
        Ok(None)
    }

    fn attach(&mut self, lanes: &Lanes) -> Result<Option<FromServer>, Refusal> {
        let mut files = std::mem::take(&mut self.passed).into_iter().map(File::from);
        let (file, direct) = (files.next(), files.next());
        let guest = lanes.guest.clone();
        let held = self.claimed(&guest)?;
        if held.phase == Phase::Attached {
            return Err(state(&guest, "the guest has lanes already"));
        }
        let file =
            file.ok_or_else(|| Refusal::Request { detail: "not one descriptor or two came with the lanes".into() })?;
        let wrong = |fault: LanesFault| Refusal::Request { detail: fault.to_string() };
        check_file(&file).map_err(wrong)?;
        if let Some(direct) = &direct {
            check_direct(&file, direct).map_err(wrong)?;
        }
        let devices = &held.slot.devices;
        check_areas(lanes, |cpu| devices.has_port(cpu)).map_err(wrong)?;
        let attached = devices.drains.attach(&file, direct.as_ref(), lanes.page_bytes, lanes.areas.clone());
        attached.map_err(|error| state(&guest, &error.to_string()))?;
        held.phase = Phase::Attached;
        Ok(Some(FromServer::LanesReady { guest }))
    }

    fn finish(&mut self, guest: String, sent: Vec<LaneSent>, wait_ms_max: u32) -> Result<Option<FromServer>, Refusal> {
        let held = self.attached(&guest)?;
        held.phase = Phase::Held;
        let session = Arc::clone(&held.session);
        let done = move |lanes| session.post(&FromServer::Finished { guest, lanes });
        held.slot.devices.drains.finish(sent, wait_ms_max.min(WAIT_MS_MAX), Box::new(done));
        Ok(None)
    }

    fn release(&mut self, guest: &str) -> Result<Option<FromServer>, Refusal> {
        let peer = self.peer;
        let held = self.claimed(guest)?;
        held.phase = Phase::Releasing;
        // Before the guest can be anybody else's.
        held.slot.devices.drains.detach();
        command(&held.slot, DeviceCommand::Release(Holder { peer, session: Arc::clone(&held.session) }))
    }

    /// The client is gone.
    fn let_go(held: &Held, peer: Peer) {
        held.session.end();
        // Only a holder may: another client's pages may be on their way by now.
        if matches!(held.phase, Phase::Held | Phase::Attached) {
            held.slot.devices.drains.detach();
        }
        let _ = command(&held.slot, DeviceCommand::Release(Holder { peer, session: Arc::clone(&held.session) }));
    }
}

fn command(slot: &GuestSlot, command: DeviceCommand) -> Result<Option<FromServer>, Refusal> {
    slot.command(command).map(|()| None).map_err(|_busy| state(&slot.name, "the device has too much to do"))
}

fn state(guest: &str, detail: &str) -> Refusal {
    Refusal::State { guest: guest.into(), detail: detail.into() }
}
