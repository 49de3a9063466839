//! Port 0: frames between the server and the agent, over two data rings.
//!
//! In:    chains of the guest's out ring, or frames of a stream (bytes of an agent); requests of the server
//! Out:   [`AgentEvent`]s; frames cut into the guest's in-buffers, one piece in each, or whole for a stream
//! Runs:  on the device's thread
//! Full:  no chain is taken while bytes of the last one are unread; requests beyond [`FRAMES_WAITING_MAX`] are refused
//! Trust: nothing: after the first malformed frame the agent is not listened to until the port is opened again
//!
//! The host's clock is read right after a chain came out of the ring (echoes) and right before one is published (probes),
//! so that the two stamps enclose the guest and the two notifications, and no work of the server.

use std::collections::VecDeque;

use vtrace_common::{
    limits::{CONTROL_CHAIN_BYTES_MAX, FRAMES_WAITING_MAX, PROBES_WAITING_MAX},
    time::HostTsc,
    wire::{
        Decoder, Family, Fault, Frame, Hello,
        agent::{Echo, FromAgent, ToAgent},
        encode,
    },
};

use crate::{
    sys::tsc,
    virtq::{
        memory::{Memory, Outside, Span},
        ring::{Chain, Ring, RingFault},
    },
};

/// Bytes that are given to the decoder at a time: it moves what it holds for every frame it cuts off.
const PIECE_BYTES: usize = 4096;

/// What happens on the control port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AgentEvent {
    /// A process in the guest opened the port; it has sent nothing yet.
    Opened,
    /// The first frame it sends. A second hello begins anew: earlier requests are forgotten.
    Hello(Hello),
    /// Any other message but an echo.
    Says(FromAgent),
    /// An echo, and the host's time stamps before and after.
    Echo {
        /// Right before the probe was published.
        host_sent: HostTsc,
        /// The guest's message.
        echo: Echo,
        /// Right after the echo was taken.
        host_received: HostTsc,
    },
    /// What it sent is not a frame; nothing more will come from it.
    Garbled(Fault),
    /// The port was closed, or the driver is gone.
    Gone,
}

/// The agent does not read what was sent: nothing more is queued for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{FRAMES_WAITING_MAX} requests wait for the agent already")]
pub struct Full;

/// State of the connection with the agent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Listening {
    /// No process has the port open: bytes are discarded.
    Closed,
    /// The first frame must be a hello.
    Greeting,
    /// Frames of an agent of our version.
    Agent,
    /// After a fault, or a hello of another version: bytes are discarded until the port is opened again.
    Deaf,
}

/// A frame on its way to the guest.
#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    probe: Option<u32>,
    is_ping: bool,
}

impl Outgoing {
    fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, sent: 0, probe: None, is_ping: false }
    }
}

/// The control port of one device.
#[derive(Debug)]
pub struct ControlPort {
    listening: Listening,
    decoder: Decoder,
    /// The last chain's bytes, and how many of them the decoder has.
    unread: Vec<u8>,
    read: usize,
    taken_at: HostTsc,
    outgoing: VecDeque<Outgoing>,
    /// Probes that were sent and not answered.
    probes: VecDeque<(u32, HostTsc)>,
    fault: Option<Fault>,
}

impl ControlPort {
    /// A port that no process has open.
    pub fn new() -> Self {
        Self {
            listening: Listening::Closed,
            decoder: Decoder::default(),
            unread: Vec::new(),
            read: 0,
            taken_at: HostTsc(0),
            outgoing: VecDeque::new(),
            probes: VecDeque::new(),
            fault: None,
        }
    }

    /// Whether a process in the guest has the port open.
    pub fn is_open(&self) -> bool {
        self.listening != Listening::Closed
    }

    /// Whether the agent has sent a hello of our wire version.
    pub fn has_met(&self) -> bool {
        self.listening == Listening::Agent
    }

    /// A process opened the port: what was sent before is not for it. It gets a hello.
    pub fn opened(&mut self) {
        *self = Self { listening: Listening::Greeting, ..Self::new() };
        self.greet();
    }

    /// A process has sent a hello on a stream, which has no event for opening a port: what was sent before is not for it.
    /// Whether it needs our hello only the stream knows.
    pub fn met(&mut self) {
        *self = Self { listening: Listening::Greeting, ..Self::new() };
    }

    /// Takes bytes of a stream, whole frames, that had come by `at`. Those before were read to their end
    /// ([`ControlPort::next_event`] gave `None`).
    pub fn hear(&mut self, bytes: &[u8], at: HostTsc) {
        debug_assert!(self.unread.is_empty(), "what came before was read first");
        self.unread.extend_from_slice(bytes);
        self.taken_at = at;
    }

    /// The next frame for a stream, and the probe in it, if it is one.
    pub fn next_outgoing(&mut self) -> Option<(Vec<u8>, Option<u32>)> {
        let frame = self.outgoing.pop_front()?;
        Some((frame.bytes, frame.probe))
    }

    /// A probe is on its way, since `at`.
    pub fn departed(&mut self, probe: u32, at: HostTsc) {
        if self.probes.len() == PROBES_WAITING_MAX {
            self.probes.pop_front();
        }
        self.probes.push_back((probe, at));
    }

    /// The port was closed.
    pub fn closed(&mut self) {
        *self = Self::new();
    }

    /// Listens no more until the port is opened again.
    pub fn deafen(&mut self) {
        let listening = if self.is_open() { Listening::Deaf } else { Listening::Closed };
        *self = Self { listening, ..Self::new() };
    }

    /// Queues a request. A `Close` always finds room: it is what ends a session.
    pub fn send(&mut self, request: &ToAgent) -> Result<(), Full> {
        let is_ping = matches!(request, ToAgent::Ping { .. });
        if is_ping && self.outgoing.back().is_some_and(|last| last.is_ping) {
            return Ok(()); // for a guest that sleeps, one ping is enough
        }
        if self.outgoing.len() >= FRAMES_WAITING_MAX && *request != ToAgent::Close {
            return Err(Full);
        }
        let probe = if let ToAgent::Probe { id, .. } = request { Some(*id) } else { None };
        let bytes = encode(request).expect("requests are checked when they come from a client");
        self.outgoing.push_back(Outgoing { probe, is_ping, ..Outgoing::new(bytes) });
        Ok(())
    }

    /// The next thing that happened among the bytes taken so far.
    pub fn next_event(&mut self) -> Option<AgentEvent> {
        loop {
            if let Some(fault) = self.fault.take() {
                return Some(self.garbled(fault));
            }
            if matches!(self.listening, Listening::Closed | Listening::Deaf) {
                (self.unread, self.read) = (Vec::new(), 0);
                return None;
            }
            match self.next_frame().and_then(|frame| frame.map(|frame| self.understand(&frame)).transpose()) {
                Ok(Some(Some(event))) => return Some(event),
                // A frame that meant nothing: the next one.
                Ok(Some(None)) => {}
                Ok(None) => return None,
                Err(fault) => return Some(self.garbled(fault)),
            }
        }
    }

    fn garbled(&mut self, fault: Fault) -> AgentEvent {
        self.deafen();
        AgentEvent::Garbled(fault)
    }

    fn next_frame(&mut self) -> Result<Option<Frame>, Fault> {
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok(Some(frame));
            }
            let rest = &self.unread[self.read..];
            if rest.is_empty() {
                (self.unread, self.read) = (Vec::new(), 0);
                return Ok(None);
            }
            let piece = &rest[..rest.len().min(PIECE_BYTES)];
            self.decoder.push(piece);
            self.read += piece.len();
        }
    }

    fn understand(&mut self, frame: &Frame) -> Result<Option<AgentEvent>, Fault> {
        if self.listening == Listening::Greeting {
            return self.meet(frame).map(Some);
        }
        if frame.family == Family::Hello {
            // It took the server for gone, as an agent whose machine slept may: it begins anew and has forgotten all requests.
            self.probes.clear();
            self.outgoing.retain(|frame| frame.sent > 0);
            self.greet();
            return self.meet(frame).map(Some);
        }
        match frame.open()? {
            FromAgent::Echo(echo) => Ok(self.stamped(echo)),
            answer => Ok(Some(AgentEvent::Says(answer))),
        }
    }

    fn meet(&mut self, frame: &Frame) -> Result<AgentEvent, Fault> {
        let hello: Hello = frame.open()?;
        self.listening = if hello.speaks_ours() { Listening::Agent } else { Listening::Deaf };
        Ok(AgentEvent::Hello(hello))
    }

    fn greet(&mut self) {
        let hello = encode(&Hello::ours(vtrace_common::SOFTWARE)).expect("our own hello is within its bounds");
        self.outgoing.push_back(Outgoing::new(hello));
    }

    /// An echo of a probe that was not sent, or was forgotten, means nothing.
    fn stamped(&mut self, echo: Echo) -> Option<AgentEvent> {
        let at = self.probes.iter().position(|(id, _)| *id == echo.id)?;
        let (_, host_sent) = self.probes.remove(at)?;
        Some(AgentEvent::Echo { host_sent, echo, host_received: self.taken_at })
    }

    /// Takes one chain of the guest's; false if the ring is empty and the guest will kick at the next chain.
    pub fn take(&mut self, ring: &mut Ring, spans: &mut Vec<Span>) -> Result<bool, RingFault> {
        debug_assert!(self.unread.is_empty(), "the last chain was read first");
        spans.clear();
        let Some(chain) = ring.take(spans)? else { return ring.arm_kick() };
        self.taken_at = HostTsc(tsc::read());
        let bytes = usize::try_from(chain.readable_bytes).unwrap_or(usize::MAX);
        if bytes > CONTROL_CHAIN_BYTES_MAX {
            self.fault = Some(Fault::Length(bytes));
        } else if matches!(self.listening, Listening::Greeting | Listening::Agent) {
            self.unread.resize(bytes, 0);
            copy_readable(ring.memory(), spans, &mut self.unread)?;
        }
        ring.complete(chain, 0)?;
        ring.publish()?;
        Ok(true)
    }

    /// Puts waiting frames into the guest's buffers; true if there may be more to do at once.
    pub fn give(&mut self, ring: &mut Ring, spans: &mut Vec<Span>) -> Result<bool, RingFault> {
        for _ in 0..ring.entries() {
            if self.outgoing.is_empty() {
                return Ok(false);
            }
            spans.clear();
            match ring.take(spans)? {
                Some(chain) => self.fill(ring, chain, spans)?,
                None if ring.arm_kick()? => {}
                None => return Ok(false),
            }
        }
        Ok(!self.outgoing.is_empty())
    }

    fn fill(&mut self, ring: &mut Ring, chain: Chain, spans: &[Span]) -> Result<(), RingFault> {
        let frame = self.outgoing.front_mut().expect("the caller looked");
        let written = copy_writable(ring.memory(), chain, spans, &frame.bytes[frame.sent..])?;
        frame.sent += written;
        let done = frame.sent == frame.bytes.len();
        ring.complete(chain, u32::try_from(written).expect("a frame is far below 2^32 bytes"))?;
        let probe = frame.probe.filter(|_| done);
        if done {
            self.outgoing.pop_front();
        }
        if let Some(id) = probe {
            self.departed(id, HostTsc(tsc::read()));
        }
        ring.publish()?;
        Ok(())
    }
}

impl Default for ControlPort {
    fn default() -> Self {
        Self::new()
    }
}

/// Copies what the device may read, from the first byte, as much as `into` holds; returns how many bytes.
pub(super) fn copy_readable(memory: &Memory, spans: &[Span], into: &mut [u8]) -> Result<usize, Outside> {
    let mut done = 0;
    for span in spans {
        if done == into.len() {
            break;
        }
        done += memory.copy_out(*span, &mut into[done..])?;
    }
    Ok(done)
}

/// Copies into what the device may write, from its first byte; returns how many bytes found room.
pub(super) fn copy_writable(memory: &Memory, chain: Chain, spans: &[Span], from: &[u8]) -> Result<usize, Outside> {
    let (mut readable, mut done) = (chain.readable_bytes, 0);
    for span in spans {
        if readable > 0 {
            // Readable spans come first and end at a span's border.
            readable = readable.saturating_sub(span.bytes);
            continue;
        }
        if done == from.len() {
            break;
        }
        done += memory.copy_in(*span, &from[done..])?;
    }
    Ok(done)
}
