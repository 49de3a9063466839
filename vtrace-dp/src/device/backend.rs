//! What the VMM has set for the device: memory, features, rings. Starts rings and stops them.
//!
//! In:    vhost-user requests, already parsed (`requests`)
//! Out:   running rings: those of port 0 and the control queue to [`DeviceRings`], those that carry pages to the [`RingDrain`]
//! Runs:  on the device's thread
//! Full:  rings and regions beyond the limits are refused
//! Trust: the VMM. What it gets wrong leaves a ring stopped and a line in the log; no request is refused while it starts the
//!        device, because that can end it together with its guest
//!
//! Source: QEMU docs/interop/vhost-user.rst, "Ring states". A ring runs when it has addresses, a kick, memory and, with
//! protocol features, SET_VRING_ENABLE; it runs until GET_VRING_BASE. SET_VRING_ENABLE 0 before that changes nothing:
//! what the guest has put into the ring is taken.

use std::{fs::File, os::fd::OwnedFd, sync::Arc};

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vtrace_common::{
    ids::Cpu,
    limits::{PORTS_MAX, RINGS_MAX},
    wire::client::DriverState,
};

use super::{
    device_rings::{CONTROL_OUT, DeviceRings, PORT_OUT},
    lane_range::LaneRange,
    negotiate::{self, RINGS_MIN},
};
use crate::{
    drain::ring::RingDrain,
    printable::chain,
    sys::{log_limit::PeerLog, socket::Peer},
    virtq::{
        memory::{Memory, MemoryFault, budget::MemoryShare},
        ring::{Ring, RingFault, RingSetup},
    },
};

/// What the VMM has set for one ring.
#[derive(Default, Debug)]
pub(super) struct RingState {
    pub(super) entries: u16,
    pub(super) addresses: Option<Addresses>,
    pub(super) base: u16,
    pub(super) kick: Option<OwnedFd>,
    pub(super) call: Option<OwnedFd>,
    pub(super) enabled: bool,
    /// It runs, on this thread or in the drain.
    pub(super) running: bool,
}

/// The VMM's virtual addresses of a ring's parts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Addresses {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// One connection's state.
pub(super) struct Backend {
    pub(super) log: Arc<PeerLog>,
    lanes: LaneRange,
    drain: Arc<RingDrain>,
    pub(super) rings: DeviceRings,
    pub(super) slots: Vec<RingState>,
    /// Features the driver accepted.
    pub(super) accepted: u64,
    memory: Option<Arc<Memory>>,
    share: MemoryShare,
    /// The VMM started rings and has shared no memory.
    not_shared: bool,
    /// Highest ring the VMM has named.
    ring_index_max: Option<u8>,
    reported: (DriverState, usize),
}

impl Backend {
    pub(super) fn new(
        log: Arc<PeerLog>,
        lanes: LaneRange,
        drain: Arc<RingDrain>,
        rings: DeviceRings,
        share: MemoryShare,
    ) -> Self {
        Self {
            log,
            lanes,
            drain,
            rings,
            slots: (0..RINGS_MAX).map(|_| RingState::default()).collect(),
            accepted: 0,
            memory: None,
            share,
            not_shared: false,
            ring_index_max: None,
            reported: (DriverState::Absent, 0),
        }
    }

    /// A VMM connected.
    pub(super) fn connected(&mut self, peer: Peer) {
        self.rings.owner.vmm(Some(peer));
    }

    /// The VMM is gone, and with it its guest.
    pub(super) fn disconnected(&mut self) {
        for index in 0..self.slots.len() {
            self.stop(index);
        }
        self.slots.iter_mut().for_each(|slot| *slot = RingState::default());
        self.rings.forget();
        (self.accepted, self.memory, self.not_shared, self.ring_index_max) = (0, None, false, None);
        self.report();
        self.rings.owner.vmm(None);
    }

    /// Ports the device has, as far as the VMM has named its rings.
    pub(super) fn ports(&self) -> usize {
        negotiate::ports_of(self.ring_index_max)
    }

    /// The VMM named a ring.
    pub(super) fn name_ring(&mut self, index: u8) {
        self.ring_index_max = self.ring_index_max.max(Some(index));
    }

    /// The whole memory table.
    pub(super) fn set_memory(&mut self, regions: &[VhostUserMemoryRegion], files: Vec<File>) {
        let memory = Memory::empty(self.share.clone()).with_table(regions, files);
        self.memory_changed(memory);
    }

    /// No region came with a descriptor: the VMM's memory is private to it.
    pub(super) fn memory_is_private(&mut self) {
        self.memory_changed(Ok(Arc::new(Memory::empty(self.share.clone()))));
    }

    pub(super) fn add_region(&mut self, region: &VhostUserMemoryRegion, file: File) {
        let memory = self.known_memory().with_region(region, file);
        self.memory_changed(memory);
    }

    pub(super) fn remove_region(&mut self, region: &VhostUserMemoryRegion) {
        let memory = self.known_memory().without_region(region);
        self.memory_changed(memory);
    }

    /// The memory as it is, to be changed.
    fn known_memory(&self) -> Arc<Memory> {
        self.memory.clone().unwrap_or_else(|| Arc::new(Memory::empty(self.share.clone())))
    }

    fn memory_changed(&mut self, memory: Result<Arc<Memory>, MemoryFault>) {
        match memory {
            Ok(memory) => {
                self.drain.remap(Arc::clone(&memory));
                self.rings.remap(&memory);
                self.memory = Some(memory);
                (0..self.slots.len()).for_each(|index| self.start_if_ready(index));
            }
            Err(fault) => self.log.error(format_args!("guest memory: {}", chain(&fault))),
        }
    }

    /// Starts a ring if it has all it needs.
    pub(super) fn start_if_ready(&mut self, index: usize) {
        let Some(slot) = self.slots.get(index) else { return };
        let enabled = slot.enabled || !negotiate::rings_wait(self.accepted);
        if slot.running || !enabled || slot.kick.is_none() || slot.entries == 0 || slot.addresses.is_none() {
            return;
        }
        let shared = self.memory.as_ref().filter(|memory| memory.bytes() > 0).cloned();
        let Some(memory) = shared else {
            if !std::mem::replace(&mut self.not_shared, true) {
                self.log.error(format_args!("the VMM starts the device and has shared no memory with it"));
            }
            return self.report();
        };
        self.not_shared = false;
        if index < RINGS_MIN || (self.lane(index).is_some() && negotiate::missing(self.accepted).is_none()) {
            self.start(index, memory);
        }
    }

    fn start(&mut self, index: usize, memory: Arc<Memory>) {
        if index < RINGS_MIN && self.is_fresh() {
            self.rings.start_over(self.ports());
        }
        let slot = &mut self.slots[index];
        let (Some(addresses), Some(kick)) = (slot.addresses, slot.kick.take()) else { return };
        let setup = RingSetup {
            entries: slot.entries,
            descriptors: addresses.descriptors,
            available: addresses.available,
            used: addresses.used,
            base: slot.base,
            event_idx: negotiate::event_idx(self.accepted),
            kick,
            call: slot.call.take(),
        };
        match Ring::start(setup, memory) {
            Ok(ring) => {
                slot.running = true;
                match self.lane(index) {
                    Some(cpu) => self.drain.ring_started(cpu, ring),
                    None => self.rings.start(index, ring),
                }
            }
            Err(fault) => {
                // A ring outside what was shared lies in memory that was not.
                self.not_shared |= matches!(fault, RingFault::Address(_));
                self.log.warn(format_args!("ring {index} cannot start: {fault}"));
            }
        }
        self.report();
    }

    /// Whether the next ring to start is a driver's first. A guest that was only stopped goes on where its control queue
    /// was, and that moved when its driver said it was ready.
    fn is_fresh(&self) -> bool {
        let first = !(0..RINGS_MIN).any(|ring| self.rings.runs(ring));
        first && self.slots[CONTROL_OUT].base == 0 && self.slots[PORT_OUT].base == 0
    }

    /// Stops a ring; where it stood is the answer to GET_VRING_BASE. Waits for pages on their way to a file.
    pub(super) fn stop(&mut self, index: usize) -> u16 {
        let Some(slot) = self.slots.get_mut(index) else { return 0 };
        (slot.kick, slot.call) = (None, None);
        if !std::mem::take(&mut slot.running) {
            return slot.base;
        }
        let base = match self.lane(index) {
            Some(cpu) => self.drain.ring_stopped(cpu),
            None => Some({
                self.rings.settle(index);
                self.rings.stop(index).unwrap_or_else(|| self.rings.base(index))
            }),
        };
        let slot = &mut self.slots[index];
        slot.base = base.unwrap_or(slot.base);
        let base = slot.base;
        self.report();
        base
    }

    /// The VMM gave another call eventfd.
    pub(super) fn set_call(&mut self, index: usize, call: Option<OwnedFd>) {
        let lane = self.lane(index);
        let Some(slot) = self.slots.get_mut(index) else { return };
        match lane {
            _ if !slot.running => slot.call = call,
            Some(cpu) => self.drain.call_changed(cpu, call),
            None => self.rings.set_call(index, call),
        }
    }

    /// The CPU whose pages come over ring `index`.
    fn lane(&self, index: usize) -> Option<Cpu> {
        out_port(index).and_then(|port| self.lanes.lane(port))
    }

    /// Reports the driver's state to the owner, if it changed.
    fn report(&mut self) {
        let running = (0..RINGS_MIN).any(|index| self.slots[index].running);
        let driver = match negotiate::missing(self.accepted) {
            _ if self.not_shared => DriverState::MemoryNotShared,
            _ if !running => DriverState::Absent,
            Some(feature) => DriverState::Unfit(feature.to_owned()),
            None => DriverState::Running,
        };
        let now = (driver, self.ports());
        if self.reported == now {
            return;
        }
        if let (DriverState::Unfit(feature), _) = &now {
            self.log.error(format_args!("the driver did not accept {feature}: this guest cannot be traced"));
        }
        self.reported = now.clone();
        self.rings.owner.driver(now.0, now.1);
    }
}

/// The port, other than the first, whose out ring this is. Port i ≥ 1 has rings 2i + 2 (in) and 2i + 3 (out) (virtio 1.3,
/// 5.3.2).
fn out_port(index: usize) -> Option<usize> {
    let port = (index.checked_sub(RINGS_MIN)? / 2) + 1;
    (index % 2 == 1 && port < PORTS_MAX).then_some(port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn out_ring_of_each_port_but_the_first_may_carry_pages() {
        let ports: Vec<_> = (0..10).map(out_port).collect();
        assert_eq!(ports, [None, None, None, None, None, Some(1), None, Some(2), None, Some(3)]);
    }

    #[test]
    fn last_ring_there_can_be_belongs_to_the_last_port() {
        assert_eq!(out_port(RINGS_MAX - 1), Some(PORTS_MAX - 1));
        assert_eq!(out_port(RINGS_MAX + 1), None);
    }
}
