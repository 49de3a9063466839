//! The four rings that the device's own thread serves: port 0's and the control queue's.
//!
//! In:    chains of the guest
//! Out:   answers of the control protocol; what the agent says, to the owner
//! Runs:  on the device's thread
//! Full:  [`TURN_CHAINS_MAX`] a turn, so that no ring of a busy guest keeps the thread from the socket
//! Trust: nothing: a ring at fault is no longer served; a panic while a message is served is caught, and the message
//!        still counts as served

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};

use super::{
    AgentEvent, ControlPort, Owner,
    console::{CONTROL_BYTES, Console, PortEvent},
    control_port::{copy_readable, copy_writable},
    lane_range::LaneRange,
    negotiate::RINGS_MIN,
};
use crate::{
    sys::log_limit::PeerLog,
    virtq::{
        memory::{Memory, Span},
        ring::{Ring, RingFault},
    },
};

/// Chains taken from one ring before the others are looked at.
const TURN_CHAINS_MAX: usize = 64;

/// Port 0, host to guest.
const PORT_IN: usize = 0;
/// Port 0, guest to host.
pub(super) const PORT_OUT: usize = 1;
/// Control messages for the guest.
const CONTROL_IN: usize = 2;
/// Control messages of the guest.
pub(super) const CONTROL_OUT: usize = 3;

/// The rings and their state. Port 0 of a further device is never open: what comes over it is discarded.
pub(super) struct DeviceRings {
    log: Arc<PeerLog>,
    lanes: LaneRange,
    rings: [Option<Ring>; RINGS_MIN],
    /// Next available index of a ring that is no longer served.
    bases: [u16; RINGS_MIN],
    console: Console,
    port: ControlPort,
    pub(super) owner: Box<dyn Owner>,
    /// A driver began anew while an agent was there; whether it is another driver or the same after a sleep is not known yet.
    asleep: bool,
    epoll: Arc<Epoll>,
    kick_token: u64,
    spans: Vec<Span>,
}

impl DeviceRings {
    /// Nothing runs yet. Kicks come to `epoll` with `kick_token`, edge-triggered and never read.
    pub(super) fn new(
        log: Arc<PeerLog>,
        lanes: LaneRange,
        owner: Box<dyn Owner>,
        epoll: Arc<Epoll>,
        kick_token: u64,
    ) -> Self {
        Self {
            log,
            lanes,
            rings: [const { None }; RINGS_MIN],
            bases: [0; RINGS_MIN],
            console: Console::new(lanes, 0),
            port: ControlPort::new(),
            owner,
            asleep: false,
            epoll,
            kick_token,
            spans: Vec::new(),
        }
    }

    /// A driver begins: it has `ports` ports, and nothing is open. Whether the agent is gone shows what the driver says
    /// first: DEVICE_READY if it is a new one; if it was only asleep, PORT_READY and PORT_OPEN of what was open before
    /// (Linux drivers/char/virtio_console.c, virtcons_freeze() and virtcons_restore()).
    pub(super) fn start_over(&mut self, ports: usize) {
        self.forget_ports(ports);
        self.asleep = self.port.has_met();
        if !self.asleep {
            self.agent_gone();
        }
        if ports > self.lanes.lanes() + 1 {
            let lanes = self.lanes.lanes();
            self.log.warn(format_args!("{ports} ports, {lanes} lanes: the ports beyond are not there"));
        }
    }

    /// The VMM is gone, and with it ports and agent; the caller reports it to the owner.
    pub(super) fn forget(&mut self) {
        self.forget_ports(0);
        self.port.closed();
        self.asleep = false;
    }

    fn forget_ports(&mut self, ports: usize) {
        if self.console.ignored() > 0 {
            self.log.info(format_args!("ignored {} unknown control messages", self.console.ignored()));
        }
        self.console = Console::new(self.lanes, ports);
    }

    /// Ring `index` runs from now on.
    pub(super) fn start(&mut self, index: usize, ring: Ring) {
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, self.kick_token);
        if let Err(error) = self.epoll.add(ring.kick(), event) {
            // Without kicks it is served only when something else happens: better than not at all.
            self.log.error(format_args!("ring {index}: its kicks cannot be watched: {error}"));
        }
        self.rings[index] = Some(ring);
    }

    /// Takes what waits in ring `index`, which is about to stop: a driver that falls asleep frees what was not taken.
    pub(super) fn settle(&mut self, index: usize) {
        let settled = match index {
            // The guest waits for each before it sends the next.
            CONTROL_OUT => self.guarded(|rings| _ = rings.serve_control_out()),
            PORT_OUT => self.guarded(Self::drain_agent),
            _ => Some(()),
        };
        if settled.is_none() {
            self.agent_panicked();
        }
    }

    /// Gives ring `index` up; the answer to GET_VRING_BASE if it ran since it was last asked.
    pub(super) fn stop(&mut self, index: usize) -> Option<u16> {
        let ring = self.rings[index].take()?;
        // The VMM keeps the eventfd open, so closing ours would not take it out of the epoll set.
        let _ = self.epoll.delete(ring.kick());
        self.bases[index] = ring.base();
        Some(ring.base())
    }

    /// Where ring `index` stood when it was given up.
    pub(super) fn base(&self, index: usize) -> u16 {
        self.bases[index]
    }

    /// Whether ring `index` runs.
    pub(super) fn runs(&self, index: usize) -> bool {
        self.rings[index].is_some()
    }

    /// The VMM gave another call eventfd.
    pub(super) fn set_call(&mut self, index: usize, call: Option<std::os::fd::OwnedFd>) {
        if let Some(ring) = self.rings[index].as_mut() {
            ring.set_call(call);
        }
    }

    /// The memory table changed.
    pub(super) fn remap(&mut self, memory: &Arc<Memory>) {
        for index in 0..RINGS_MIN {
            let result = self.rings[index].as_mut().map_or(Ok(()), |ring| ring.remap(Arc::clone(memory)));
            if let Err(fault) = result {
                self.give_up(index, fault);
            }
        }
    }

    /// The agent, if there was one, is no more.
    pub(super) fn agent_gone(&mut self) {
        self.asleep = false;
        if self.port.is_open() {
            self.port.closed();
            self.tell(AgentEvent::Gone);
        }
    }

    /// Lets the owner do what it was woken for.
    pub(super) fn owner_turn(&mut self) -> super::Turn {
        self.owner.turn(&mut self.port)
    }

    /// Serves all four rings once; true if there is more to do at once.
    pub(super) fn serve(&mut self) -> bool {
        let mut more = self.guarded(Self::serve_control_out).unwrap_or(true);
        more |= self.guarded(Self::serve_control_in).unwrap_or(true);
        more |= self.guarded(Self::serve_agent).unwrap_or_else(|| {
            self.agent_panicked();
            true
        });
        more
    }

    /// Runs `step`; `None` if it panicked.
    fn guarded<T>(&mut self, step: impl FnOnce(&mut Self) -> T) -> Option<T> {
        // Unwind safety: each step leaves rings and queues consistent before it calls anything that may panic.
        catch_unwind(AssertUnwindSafe(|| step(self))).ok()
    }

    /// Passes an event to the owner. If it panics, frames of the agent are ignored from then on; all else goes on.
    fn tell(&mut self, event: AgentEvent) {
        if self.guarded(|rings| rings.owner.agent(event, &mut rings.port)).is_none() {
            self.agent_panicked();
        }
    }

    fn agent_panicked(&mut self) {
        self.log
            .error(format_args!("serving the agent panicked; what it sends is ignored until it opens its port again"));
        self.port.deafen();
    }

    /// Takes steps on ring `index` until there is nothing to do (false) or the others have their turn (true).
    fn serve_ring(&mut self, index: usize, step: fn(&mut Self) -> Result<bool, RingFault>) -> bool {
        for _ in 0..TURN_CHAINS_MAX {
            match step(self) {
                Ok(true) => {}
                Ok(false) => return false,
                Err(fault) => {
                    self.give_up(index, fault);
                    return false;
                }
            }
        }
        true
    }

    fn serve_control_out(&mut self) -> bool {
        self.serve_ring(CONTROL_OUT, Self::take_control)
    }

    /// Takes one control message; false if the ring is empty and the guest will kick.
    fn take_control(&mut self) -> Result<bool, RingFault> {
        let Some(ring) = self.rings[CONTROL_OUT].as_mut() else { return Ok(false) };
        self.spans.clear();
        let Some(chain) = ring.take(&mut self.spans)? else { return ring.arm_kick() };
        let mut bytes = [0; CONTROL_BYTES];
        let length = usize::try_from(chain.readable_bytes).map_or(CONTROL_BYTES, |length| length.min(CONTROL_BYTES));
        let length = copy_readable(ring.memory(), &self.spans, &mut bytes[..length])?;
        // The guest's CPU spins until its message is used: before that, what the message means must have happened
        // (what a closing agent wrote was taken), and after that nothing may keep it from being used.
        if self.guarded(|rings| rings.control(&bytes[..length])).is_none() {
            self.log.error(format_args!("serving a control message panicked"));
        }
        let Some(ring) = self.rings[CONTROL_OUT].as_mut() else { return Ok(false) };
        ring.complete(chain, 0)?;
        ring.publish()?;
        Ok(true)
    }

    fn control(&mut self, bytes: &[u8]) {
        match self.console.receive(bytes) {
            Some(PortEvent::DriverReady) => self.agent_gone(),
            Some(PortEvent::Opened(0)) if std::mem::take(&mut self.asleep) => {
                self.log.info(format_args!("the guest was asleep; its agent goes on"));
            }
            Some(PortEvent::Opened(0)) => {
                self.drain_agent();
                self.agent_gone();
                self.port.opened();
                self.tell(AgentEvent::Opened);
            }
            Some(PortEvent::Closed(0)) => {
                self.drain_agent();
                self.agent_gone();
            }
            Some(PortEvent::Opened(_) | PortEvent::Closed(_)) | None => {}
        }
    }

    /// Takes whatever the agent wrote before it closed the port, room or not: it is at most one ring full.
    fn drain_agent(&mut self) {
        let chains = self.rings[PORT_OUT].as_ref().map_or(0, Ring::entries);
        for _ in 0..=chains {
            while let Some(event) = self.port.next_event() {
                self.tell(event);
            }
            let Some(ring) = self.rings[PORT_OUT].as_mut() else { return };
            match self.port.take(ring, &mut self.spans) {
                Ok(true) => {}
                Ok(false) => return,
                Err(fault) => return self.give_up(PORT_OUT, fault),
            }
        }
    }

    fn serve_control_in(&mut self) -> bool {
        self.serve_ring(CONTROL_IN, Self::give_control)
    }

    /// Gives the guest one control message; false if no message is due, or no buffer is free for it.
    fn give_control(&mut self) -> Result<bool, RingFault> {
        let Some(ring) = self.rings[CONTROL_IN].as_mut() else { return Ok(false) };
        let Some(message) = self.console.next() else { return Ok(false) };
        self.spans.clear();
        let Some(chain) = ring.take(&mut self.spans)? else { return ring.arm_kick() };
        let written = copy_writable(ring.memory(), chain, &self.spans, &message)?;
        self.console.sent();
        ring.complete(chain, u32::try_from(written).expect("a control message is short"))?;
        ring.publish()?;
        Ok(true)
    }

    fn serve_agent(&mut self) -> bool {
        let more = self.serve_ring(PORT_OUT, Self::take_agent);
        if self.asleep {
            return more; // what is sent before its port is open again would look to it like a host that went away
        }
        let Some(ring) = self.rings[PORT_IN].as_mut() else { return more };
        match self.port.give(ring, &mut self.spans) {
            Ok(unsent) => more || unsent,
            Err(fault) => {
                self.give_up(PORT_IN, fault);
                more
            }
        }
    }

    /// Takes one event or one chain of the agent; false if neither is there, or the owner has no room.
    fn take_agent(&mut self) -> Result<bool, RingFault> {
        if !self.owner.has_room() {
            return Ok(false);
        }
        if let Some(event) = self.port.next_event() {
            self.tell(event);
            return Ok(true);
        }
        let Some(ring) = self.rings[PORT_OUT].as_mut() else { return Ok(false) };
        self.port.take(ring, &mut self.spans)
    }

    fn give_up(&mut self, index: usize, fault: RingFault) {
        self.log.warn(format_args!("ring {index} is malformed and no longer served: {fault}"));
        self.stop(index);
    }
}
