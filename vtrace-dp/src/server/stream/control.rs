//! The thread that serves a guest's agent over a stream.
//!
//! In:    bytes of the control port; commands of the server through [`Guest`]
//! Out:   what the agent says, to the guest; frames into the stream
//! Runs:  the thread `vt-dev/NAME`. It sleeps in epoll_wait; while an agent is there it wakes every [`PING_EVERY`], for
//!        a stream does not show that an agent is gone
//! Full:  the stream is left alone while the guest's holder has no room
//! Trust: nothing of the guest; the folder's permissions for who may be its QEMU
//!
//! A stream tells less than a device: neither side sees the other come or go. So each says hello when it comes:
//! * ours goes out when a connection is made, and to each agent that says hello and was not met before. One that says
//!   nothing more is greeted again ([`GREET_EVERY`]): it may have taken our hello for the end of another frame.
//! * An agent that was met says so with its machine. A hello in the middle of a session is another agent's.
//! * An agent that answers no ping for [`SILENCE_MAX`] is gone, unless it has a session: that goes on when a guest that
//!   was paused or asleep does. Who records decides how long that is waited for.

use std::{
    io::{self, Read, Write},
    os::fd::OwnedFd,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use vtrace_common::{
    time::HostTsc,
    wire::{
        Hello,
        agent::{FromAgent, ToAgent},
        client::DriverState,
        encode,
    },
};

use super::cutter::{Cutter, Piece};
use crate::{
    device::{AgentEvent, ControlPort, Owner, Turn},
    drain::stream::port::{Admission, Peers, Port, accept, holder, open_reader, open_writer},
    server::guest::{Guest, GuestSlot},
    sys::{socket::Peer, tsc},
};

/// An agent that has said nothing for so long is asked whether it is there.
pub(super) const PING_EVERY: Duration = Duration::from_secs(5);
/// One that still says nothing, and has no session, is gone. Arming can keep an agent silent for some seconds.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(20);
/// How long an agent that has said hello may take to say where it runs.
const GREET_EVERY: Duration = Duration::from_secs(3);
/// No recorder numbers its pings so.
const PING_ID: u32 = u32::MAX;
/// Bytes read at a time, and reads of one turn.
const PIECE_BYTES: usize = 16 << 10;
const TURN_READS_MAX: usize = 64;
/// Events taken from epoll at a time; what is left comes at the next.
const EVENTS_MAX: usize = 8;

const WAKE: u64 = 0;
const PORT: u64 = 1;
const STREAM: u64 = 2;

/// A stream to a guest's agent.
struct Wire {
    reader: std::fs::File,
    writer: std::fs::File,
    _admission: Option<Admission>,
}

/// Bytes on their way to the agent.
#[derive(Default)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    probe: Option<u32>,
}

/// The thread's state.
pub(super) struct Control {
    slot: Arc<GuestSlot>,
    guest: Guest,
    agent: ControlPort,
    port: Port,
    ports: usize,
    peers: Peers,
    epoll: Epoll,
    wire: Option<Wire>,
    /// A FIFO that no QEMU is known to have open.
    waiting: Option<std::fs::File>,
    cutter: Cutter,
    outgoing: Outgoing,
    greeting: HelloState,
    heard_at: Instant,
    pinged_at: Instant,
    /// The log says that the agent is silent.
    silence_said: bool,
}

/// How far we and the agent know each other.
#[derive(Default)]
struct HelloState {
    /// Our hello has to go out.
    due: bool,
    /// It has gone out, and no agent has said that it met us since.
    unanswered: bool,
    /// The agent that said hello has met us.
    met: bool,
    /// When the agent is to be greeted again.
    again_at: Option<Instant>,
}

impl Control {
    /// `ports` is how many the guest has.
    pub(super) fn new(slot: Arc<GuestSlot>, port: Port, ports: usize, peers: Peers) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let guest = Guest::new(Arc::clone(&slot));
        epoll.add(guest.wake(), edge(WAKE))?;
        if let Port::Socket(listener) = &port {
            epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, PORT))?;
        }
        let now = Instant::now();
        let mut control = Self {
            slot,
            guest,
            agent: ControlPort::new(),
            port,
            ports,
            peers,
            epoll,
            wire: None,
            waiting: None,
            cutter: Cutter::default(),
            outgoing: Outgoing::default(),
            greeting: HelloState::default(),
            heard_at: now,
            pinged_at: now,
            silence_said: false,
        };
        control.open()?;
        Ok(control)
    }

    /// Runs until the guest says that the server ends.
    pub(super) fn run(mut self) {
        loop {
            match catch_unwind(AssertUnwindSafe(|| self.turn())) {
                Ok(Ok(true)) => {}
                Ok(Ok(false)) => return,
                Ok(Err(error)) => {
                    self.slot.log.info(format_args!("VMM gone: {error}"));
                    self.disconnect();
                }
                Err(_) => {
                    self.slot.log.error(format_args!(
                        "serving the agent panicked; what it sends is ignored until its next hello"
                    ));
                    self.agent.closed();
                }
            }
        }
    }

    /// Waits and does what there is to do; false when the server ends. An error is the stream's end.
    fn turn(&mut self) -> io::Result<bool> {
        let mut events = [EpollEvent::empty(); EVENTS_MAX];
        // An interrupted wait is a turn with nothing to do.
        let count = self.epoll.wait(&mut events, self.timeout()).unwrap_or(0);
        if events[..count].iter().any(|event| event.data() == PORT) {
            self.accept();
        }
        if self.waiting.is_some() && count > 0 {
            self.open()?;
        }
        let read = self.read();
        if self.guest.turn(&mut self.agent) == Turn::Stop {
            return Ok(false);
        }
        read?;
        self.watch_silence();
        self.write()?;
        Ok(true)
    }

    fn timeout(&self) -> EpollTimeout {
        let is_open = self.agent.is_open();
        let gone = (is_open && !self.silence_said).then(|| self.heard_at + SILENCE_MAX);
        let ping = (is_open && self.greeting.met).then(|| self.heard_at.max(self.pinged_at) + PING_EVERY);
        let due = [gone, ping, self.greeting.again_at, self.guest.deadline()].into_iter().flatten().min();
        let Some(due) = due else { return EpollTimeout::NONE };
        let left = due.saturating_duration_since(Instant::now());
        // Rounded up: a turn that comes too early would come again and again.
        EpollTimeout::from(u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX))
    }

    /// Looks whether QEMU has the other end of FIFOs, and gets ready for it if not.
    fn open(&mut self) -> io::Result<()> {
        let Port::Fifos { to_guest, from_guest } = &self.port else { return Ok(()) };
        let reader = match self.waiting.take() {
            Some(reader) => reader,
            None => {
                let reader = open_reader(from_guest)?.into();
                self.epoll.add(&reader, edge(STREAM))?;
                reader
            }
        };
        match open_writer(to_guest)? {
            None => self.waiting = Some(reader),
            Some(writer) => {
                let peer = holder(to_guest);
                self.epoll.add(&writer, edge(STREAM))?;
                self.connected(Wire { reader, writer: writer.into(), _admission: None }, peer);
            }
        }
        Ok(())
    }

    fn accept(&mut self) {
        let Port::Socket(listener) = &self.port else { return };
        match accept(listener, &self.peers) {
            Ok(None) => {}
            Ok(Some((_, peer, _))) if self.wire.is_some() => {
                self.slot.log.warn(format_args!("pid {} is turned away: a VMM is connected", peer.pid));
            }
            Ok(Some((socket, peer, admission))) => {
                if let Err(error) = self.connect(socket, peer, admission) {
                    self.slot.log.error(format_args!("connection: {error}"));
                }
            }
            Err(error) => {
                // Out of descriptors, most likely, and the connection still waits: not again at once.
                std::thread::sleep(Duration::from_millis(100));
                self.slot.log.warn(format_args!("{error}"));
            }
        }
    }

    fn connect(&mut self, socket: OwnedFd, peer: Peer, admission: Admission) -> io::Result<()> {
        let writer = socket.try_clone()?.into();
        self.epoll.add(&socket, edge(STREAM))?;
        self.connected(Wire { reader: socket.into(), writer, _admission: Some(admission) }, peer);
        Ok(())
    }

    fn connected(&mut self, wire: Wire, peer: Peer) {
        self.slot.log.info(format_args!("VMM connected: pid {}, uid {}", peer.pid, peer.uid));
        self.wire = Some(wire);
        self.cutter.reset();
        self.outgoing = Outgoing::default();
        self.greeting = HelloState { due: true, ..HelloState::default() };
        self.guest.vmm(Some(peer));
        self.guest.driver(DriverState::Running, self.ports);
        self.slot.devices.streams(Some(peer));
    }

    fn disconnect(&mut self) {
        let Some(wire) = self.wire.take() else {
            // A FIFO that could not be opened: it was removed.
            return std::thread::sleep(Duration::from_secs(1));
        };
        // Closing them would do, were they not duplicates of one another.
        let _ = self.epoll.delete(&wire.reader);
        let _ = self.epoll.delete(&wire.writer);
        drop(wire);
        self.agent_gone();
        self.greeting = HelloState::default();
        self.guest.vmm(None);
        self.guest.driver(DriverState::Absent, 0);
        self.slot.devices.streams(None);
        if let Err(error) = self.open() {
            self.slot.log.error(format_args!("FIFOs: {error}"));
        }
    }

    /// Reads and understands all there is, while the holder has room.
    fn read(&mut self) -> io::Result<()> {
        let mut piece = [0; PIECE_BYTES];
        for _ in 0..TURN_READS_MAX {
            while self.guest.has_room() {
                let Some(frame) = self.cutter.next_piece() else { break };
                self.frame(&frame);
            }
            if !self.guest.has_room() {
                // It is not the agent that is silent.
                self.heard_at = Instant::now();
                return Ok(());
            }
            let Some(wire) = &mut self.wire else { return Ok(()) };
            match wire.reader.read(&mut piece) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.cutter.push(&piece[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        // The rest at once, after the others had their turn.
        self.slot.notifier.notify();
        Ok(())
    }

    fn frame(&mut self, frame: &Piece) {
        let now = Instant::now();
        (self.heard_at, self.silence_said) = (now, false);
        self.guest.heard();
        if frame.is_hello {
            self.agent_gone();
            self.agent.met();
            self.greeting.met = false;
            // Our last hello may still be on its way to this one.
            self.greeting.due |= !self.greeting.unanswered;
            self.greeting.again_at = Some(now + GREET_EVERY);
            self.guest.agent(AgentEvent::Opened, &mut self.agent);
        }
        if !self.agent.is_open() {
            // An agent that takes itself for known: it is asked for its hello.
            self.greeting.again_at.get_or_insert(now + GREET_EVERY);
        }
        self.agent.hear(&frame.bytes, HostTsc(tsc::read()));
        while let Some(event) = self.agent.next_event() {
            self.hear(event);
        }
    }

    fn hear(&mut self, event: AgentEvent) {
        match &event {
            AgentEvent::Hello(hello) if !hello.speaks_ours() => self.greeting.again_at = None,
            AgentEvent::Hello(_) | AgentEvent::Opened | AgentEvent::Gone => {}
            AgentEvent::Garbled(_) => {
                self.guest.agent(event, &mut self.agent);
                // What it says next may be a hello.
                self.agent.closed();
                self.greeting = HelloState { again_at: Some(Instant::now() + GREET_EVERY), ..HelloState::default() };
                return;
            }
            AgentEvent::Says(FromAgent::Machine(_)) => {
                self.greeting = HelloState { met: true, ..HelloState::default() };
            }
            // What it says to a request of another server, or to one that its predecessor was asked.
            _ if !self.greeting.met => return,
            AgentEvent::Says(FromAgent::Pong { id: PING_ID }) => return,
            AgentEvent::Says(_) | AgentEvent::Echo { .. } => {}
        }
        self.guest.agent(event, &mut self.agent);
    }

    fn agent_gone(&mut self) {
        if self.agent.is_open() {
            self.agent.closed();
            self.guest.agent(AgentEvent::Gone, &mut self.agent);
        }
    }

    /// Sends a hello or a ping when it is due, or sees that the agent is gone.
    fn watch_silence(&mut self) {
        let now = Instant::now();
        if self.greeting.again_at.is_some_and(|at| now >= at) {
            self.greeting.due = true;
            // Without an agent once; what it answers begins everything anew.
            self.greeting.again_at = self.agent.is_open().then(|| now + GREET_EVERY);
        }
        if !self.agent.is_open() {
            return;
        }
        let is_silent = now >= self.heard_at + SILENCE_MAX;
        if is_silent && !self.guest.is_in_session() {
            self.slot.log.warn(format_args!("agent has sent nothing for {} s", SILENCE_MAX.as_secs()));
            self.agent_gone();
            // One that only was asleep answers this.
            self.greeting = HelloState { due: true, ..HelloState::default() };
            return;
        }
        if is_silent && !std::mem::replace(&mut self.silence_said, true) {
            self.slot
                .log
                .warn(format_args!("agent has sent nothing for {} s; its session waits", SILENCE_MAX.as_secs()));
        }
        if self.greeting.met && now >= self.heard_at.max(self.pinged_at) + PING_EVERY {
            self.pinged_at = now;
            self.guest.asked();
            // With a full queue, one more request would show nothing.
            let _ = self.agent.send(&ToAgent::Ping { id: PING_ID });
        }
    }

    /// Sends what waits, as much as the stream takes.
    fn write(&mut self) -> io::Result<()> {
        loop {
            if self.outgoing.sent == self.outgoing.bytes.len() && !self.next_outgoing() {
                return Ok(());
            }
            let Some(wire) = &mut self.wire else { return Ok(()) };
            let Outgoing { bytes, sent, probe } = &mut self.outgoing;
            let at = HostTsc(tsc::read());
            match wire.writer.write(&bytes[*sent..]) {
                Ok(count) => {
                    *sent += count;
                    if let Some(probe) = probe.take_if(|_| *sent == bytes.len()) {
                        self.agent.departed(probe, at);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes the next frame, our own hello first; a frame that was begun is always finished before it.
    fn next_outgoing(&mut self) -> bool {
        if std::mem::take(&mut self.greeting.due) {
            self.greeting.unanswered = true;
            let bytes = encode(&Hello::ours(vtrace_common::SOFTWARE)).expect("our own hello is within its bounds");
            self.outgoing = Outgoing { bytes, sent: 0, probe: None };
            return true;
        }
        let Some((bytes, probe)) = self.agent.next_outgoing() else { return false };
        self.outgoing = Outgoing { bytes, sent: 0, probe };
        true
    }
}

/// Watches for what comes from now on: what cannot be read or written now is tried again then.
fn edge(token: u64) -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET, token)
}
