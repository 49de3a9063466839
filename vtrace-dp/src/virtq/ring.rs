//! One split virtqueue, seen by the device: the guest's descriptors in, used entries out.
//!
//! In:    descriptor table and available ring in guest memory (guest-controlled)
//! Out:   spans inside guest memory; used entries; interrupts
//! Runs:  on the thread that owns the ring
//! Full:  a driver that makes more available than the ring holds is at fault
//! Trust: nothing: every word is loaded once into a local and then checked; walks are bounded by the table and by
//!        [`CHAIN_SEGMENTS_MAX`]. The kick and call eventfds come from the VMM.
//!
//! Source: virtio 1.3, 2.7 (split virtqueues). A chain may end in an indirect table, which may be longer than the ring:
//! Linux builds such ones.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
};

use vtrace_common::limits::{CHAIN_BYTES_MAX, CHAIN_SEGMENTS_MAX, MEMORY_REGIONS_MAX, RING_ENTRIES_MAX};

use super::memory::{Memory, Outside, Span, Window, full_fence};

/// Spans of one chain: its segments, and one more for each border between regions that it crosses.
pub const CHAIN_SPANS_MAX: usize = CHAIN_SEGMENTS_MAX + MEMORY_REGIONS_MAX;

/// Bytes of a descriptor: u64 address, u32 length, u16 flags, u16 next (virtio 1.3, 2.7.5).
const DESCRIPTOR_BYTES: usize = 16;
/// Bytes of flags and index that the available and used rings begin with.
const RING_HEADER_BYTES: usize = 4;
/// Bytes of an element of the used ring.
const USED_BYTES: usize = 8;
/// Where both rings hold their flags and their index.
const FLAGS: usize = 0;
const INDEX: usize = 2;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Available ring's flag: do not interrupt. Used ring's flag of the same value: do not kick.
const QUIET: u16 = 1;

/// What vhost-user says about a ring before it starts. Addresses are the VMM's virtual ones.
#[derive(Debug)]
pub struct RingSetup {
    /// Entries, a power of two.
    pub entries: u16,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
    /// Next available index to take.
    pub base: u16,
    /// The driver accepted VIRTIO_RING_F_EVENT_IDX.
    pub event_idx: bool,
    /// The guest kicks here (non-blocking eventfd).
    pub kick: OwnedFd,
    /// We interrupt the guest here.
    pub call: Option<OwnedFd>,
}

/// A running ring. Owned by one thread.
#[derive(Debug)]
pub struct Ring {
    setup: RingSetup,
    memory: Arc<Memory>,
    descriptors: Window,
    available: Window,
    used: Window,
    next_available: u16,
    next_used: u16,
    /// Chains taken and not yet completed.
    taken: u16,
    /// Chains completed and not yet published.
    completed: u16,
    /// Entries of the descriptor table that the chains of both kinds occupy.
    occupied: u32,
    /// Those of the completed ones.
    occupied_completed: u32,
    /// The guest has not been interrupted yet since the start: it may have waited before.
    fresh: bool,
    /// The guest is asked not to kick (without EVENT_IDX only).
    quiet: bool,
}

/// A chain taken from the available ring: `ring.complete(chain, written)` gives it back.
#[derive(Clone, Copy, Debug)]
pub struct Chain {
    /// Index of its first descriptor.
    pub head: u16,
    /// Entries of the ring's descriptor table that it occupies; an indirect table is one.
    pub entries: u16,
    /// Bytes the device may read.
    pub readable_bytes: u32,
    /// Bytes the device may write.
    pub writable_bytes: u32,
}

/// Why a ring cannot be used any more. That guest's lane ends; other guests are not affected.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RingFault {
    /// An address outside guest memory.
    #[error("address {0:#x} is outside guest memory")]
    Address(u64),
    /// A ring's part is not aligned (virtio 1.3, 2.7: 16, 2 and 4 bytes).
    #[error("address {0:#x} is not aligned as a ring's part must be")]
    Alignment(u64),
    /// Not a power of two, or more than [`RING_ENTRIES_MAX`].
    #[error("a ring cannot have {0} entries")]
    Entries(u16),
    /// More chains available than the ring has entries.
    #[error("available index {available} is too far from {next}, with {held} chains held")]
    Jump {
        /// The index the driver wrote.
        available: u16,
        /// The next one to take.
        next: u16,
        /// Chains taken and not yet published.
        held: u16,
    },
    /// A descriptor's index lies outside its table.
    #[error("descriptor {index} of a table of {entries}")]
    Descriptor {
        /// The index.
        index: u16,
        /// Entries of the table.
        entries: u16,
    },
    /// The chain has more descriptors than its table: it must be a loop.
    #[error("the chain from descriptor {0} is a loop")]
    Loop(u16),
    /// The chain has more segments or bytes than is bearable.
    #[error("the chain from descriptor {0} is too long")]
    Long(u16),
    /// A readable segment after a writable one (2.7.4.2).
    #[error("the chain from descriptor {0} has a readable segment after a writable one")]
    Order(u16),
    /// An indirect table that is empty, not a multiple of a descriptor, inside another, or not last (2.7.5.3.1).
    #[error("the chain from descriptor {0} has a malformed indirect table")]
    Indirect(u16),
}

impl From<Outside> for RingFault {
    fn from(outside: Outside) -> Self {
        Self::Address(outside.0)
    }
}

/// One descriptor, loaded once.
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    bytes: u32,
    flags: u16,
    next: u16,
}

/// A walk along one chain.
struct Walk<'a> {
    memory: &'a Memory,
    head: u16,
    segments: usize,
    readable: u64,
    writable: u64,
    spans: &'a mut Vec<Span>,
    /// Spans that were there before.
    before: usize,
}

impl Ring {
    /// Starts a ring; the used index is read from guest memory.
    pub fn start(setup: RingSetup, memory: Arc<Memory>) -> Result<Self, RingFault> {
        if !setup.entries.is_power_of_two() || setup.entries > RING_ENTRIES_MAX {
            return Err(RingFault::Entries(setup.entries));
        }
        let (descriptors, available, used) = windows(&setup, &memory)?;
        let next_used = used.load_u16(INDEX, Ordering::Acquire);
        let next_available = setup.base;
        let (taken, completed, occupied, occupied_completed) = (0, 0, 0, 0);
        let (fresh, quiet) = (true, false);
        Ok(Self {
            setup,
            memory,
            descriptors,
            available,
            used,
            next_available,
            next_used,
            taken,
            completed,
            occupied,
            occupied_completed,
            fresh,
            quiet,
        })
    }

    /// Takes the next chain and appends its spans, device-readable first. `spans` is never longer than it was plus
    /// [`CHAIN_SPANS_MAX`], and as it was after a fault. Hot.
    pub fn take(&mut self, spans: &mut Vec<Span>) -> Result<Option<Chain>, RingFault> {
        if self.waiting()? == 0 {
            return Ok(None);
        }
        self.quieten();
        let slot = usize::from(self.next_available & (self.setup.entries - 1));
        let head = self.available.load_u16(RING_HEADER_BYTES + 2 * slot, Ordering::Relaxed);
        let before = spans.len();
        let walk = Walk { memory: &self.memory, head, segments: 0, readable: 0, writable: 0, spans, before };
        let result = walk.chain(&self.descriptors, self.setup.entries);
        match result {
            Ok(chain) => {
                self.next_available = self.next_available.wrapping_add(1);
                self.taken += 1;
                self.occupied += u32::from(chain.entries);
                Ok(Some(chain))
            }
            Err(fault) => {
                spans.truncate(before);
                Err(fault)
            }
        }
    }

    /// Chains the driver has made available and we have not taken. Hot.
    fn waiting(&self) -> Result<u16, RingFault> {
        let available = self.available.load_u16(INDEX, Ordering::Acquire);
        let waiting = available.wrapping_sub(self.next_available);
        let held = self.held();
        if waiting > self.setup.entries - held.min(self.setup.entries) {
            return Err(RingFault::Jump { available, next: self.next_available, held });
        }
        Ok(waiting)
    }

    /// Without EVENT_IDX: no kicks while we are looking anyway.
    fn quieten(&mut self) {
        if !self.setup.event_idx && !self.quiet {
            self.used.store_u16(FLAGS, QUIET, Ordering::Relaxed);
            self.quiet = true;
        }
    }

    /// Puts a chain into the used ring, not yet visible to the guest. Hot.
    pub fn complete(&mut self, chain: Chain, written: u32) -> Result<(), RingFault> {
        assert!(self.taken > 0, "a chain is completed once");
        let slot = usize::from(self.next_used & (self.setup.entries - 1));
        let at = RING_HEADER_BYTES + USED_BYTES * slot;
        self.used.store_u32(at, u32::from(chain.head), Ordering::Relaxed);
        self.used.store_u32(at + 4, written, Ordering::Relaxed);
        self.next_used = self.next_used.wrapping_add(1);
        self.taken -= 1;
        self.completed += 1;
        self.occupied_completed += u32::from(chain.entries);
        Ok(())
    }

    /// Makes completed chains visible and interrupts the guest if it wants to know; true if it did. Hot.
    pub fn publish(&mut self) -> Result<bool, RingFault> {
        if self.completed == 0 {
            return Ok(false);
        }
        let before = self.next_used.wrapping_sub(self.completed);
        self.used.store_u16(INDEX, self.next_used, Ordering::Release);
        self.occupied -= self.occupied_completed;
        (self.completed, self.occupied_completed) = (0, 0);
        full_fence();
        let wanted = std::mem::take(&mut self.fresh) || self.interrupt_wanted(before);
        if wanted {
            self.interrupt();
        }
        Ok(wanted)
    }

    /// virtio 1.3, 2.7.7.1: with EVENT_IDX, if the index moved past what the driver asked for.
    fn interrupt_wanted(&self, before: u16) -> bool {
        if !self.setup.event_idx {
            return self.available.load_u16(FLAGS, Ordering::Relaxed) & QUIET == 0;
        }
        let used_event = RING_HEADER_BYTES + 2 * usize::from(self.setup.entries);
        let event = self.available.load_u16(used_event, Ordering::Relaxed);
        self.next_used.wrapping_sub(event).wrapping_sub(1) < self.next_used.wrapping_sub(before)
    }

    fn interrupt(&self) {
        if let Some(call) = &self.setup.call {
            // The only failure is a counter that is full: then an interrupt is pending anyway.
            let _ = nix::unistd::write(call.as_fd(), &1u64.to_ne_bytes());
        }
    }

    /// Asks for a kick at the next chain; true if one is waiting already. Hot.
    pub fn arm_kick(&mut self) -> Result<bool, RingFault> {
        self.arm_kick_after(1)
    }

    /// Asks for a kick when `chains` more have come; true if that many are waiting already. Without EVENT_IDX the kick
    /// comes at the first, and one is enough for true. Hot.
    pub fn arm_kick_after(&mut self, chains: u16) -> Result<bool, RingFault> {
        let chains = chains.max(1);
        if self.setup.event_idx {
            let avail_event = RING_HEADER_BYTES + USED_BYTES * usize::from(self.setup.entries);
            self.used.store_u16(avail_event, self.next_available.wrapping_add(chains - 1), Ordering::Relaxed);
        } else {
            self.used.store_u16(FLAGS, 0, Ordering::Relaxed);
            self.quiet = false;
        }
        full_fence();
        let enough = if self.setup.event_idx { chains } else { 1 };
        Ok(self.waiting()? >= enough)
    }

    /// Chains taken and not yet published.
    pub fn held(&self) -> u16 {
        self.taken.saturating_add(self.completed)
    }

    /// Entries of the descriptor table that those occupy: what the guest cannot use meanwhile.
    pub fn entries_held(&self) -> u32 {
        self.occupied
    }

    /// Entries of the ring.
    pub fn entries(&self) -> u16 {
        self.setup.entries
    }

    /// The next available index: the answer to GET_VRING_BASE.
    pub fn base(&self) -> u16 {
        self.next_available
    }

    /// The memory the ring lies in.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// The memory table changed while the ring runs. After a fault the ring is where it was.
    pub fn remap(&mut self, memory: Arc<Memory>) -> Result<(), RingFault> {
        (self.descriptors, self.available, self.used) = windows(&self.setup, &memory)?;
        self.memory = memory;
        Ok(())
    }

    /// The eventfd the guest kicks.
    pub fn kick(&self) -> &OwnedFd {
        &self.setup.kick
    }

    /// QEMU gave another call eventfd. The guest is interrupted there at once: QEMU may have looked at the old one for
    /// the last time before our last interrupt arrived there, and an interrupt too many does no harm.
    pub fn set_call(&mut self, call: Option<OwnedFd>) {
        self.setup.call = call;
        self.interrupt();
    }
}

/// The three parts of a ring, checked (sizes and alignment: virtio 1.3, 2.7).
fn windows(setup: &RingSetup, memory: &Memory) -> Result<(Window, Window, Window), RingFault> {
    let entries = usize::from(setup.entries);
    let part = |vmm: u64, bytes: usize, alignment: u64| {
        if !vmm.is_multiple_of(alignment) {
            return Err(RingFault::Alignment(vmm));
        }
        Ok(memory.window(memory.translate(vmm)?, bytes)?)
    };
    let descriptors = part(setup.descriptors, DESCRIPTOR_BYTES * entries, 16)?;
    let available = part(setup.available, RING_HEADER_BYTES + 2 * entries + 2, 2)?;
    let used = part(setup.used, RING_HEADER_BYTES + USED_BYTES * entries + 2, 4)?;
    Ok((descriptors, available, used))
}

impl Walk<'_> {
    fn chain(mut self, table: &Window, entries: u16) -> Result<Chain, RingFault> {
        let (head, mut index) = (self.head, self.head);
        for occupied in 1..=entries {
            let descriptor = Descriptor::load(table, index, entries)?;
            if descriptor.flags & INDIRECT != 0 {
                self.indirect(descriptor)?;
            } else {
                self.segment(descriptor)?;
            }
            if descriptor.flags & NEXT == 0 {
                return Ok(self.end(occupied));
            }
            index = descriptor.next;
        }
        Err(RingFault::Loop(head))
    }

    fn end(self, entries: u16) -> Chain {
        let bytes = |bytes: u64| u32::try_from(bytes).expect("CHAIN_BYTES_MAX is far below 2^32");
        Chain { head: self.head, entries, readable_bytes: bytes(self.readable), writable_bytes: bytes(self.writable) }
    }

    fn indirect(&mut self, outer: Descriptor) -> Result<(), RingFault> {
        let bytes = usize::try_from(outer.bytes).map_err(|_| RingFault::Indirect(self.head))?;
        if outer.flags & NEXT != 0 || bytes == 0 || bytes % DESCRIPTOR_BYTES != 0 {
            return Err(RingFault::Indirect(self.head));
        }
        // 2.7.5.3 asks for no alignment of indirect tables; every driver's allocator gives at least 8 bytes.
        if !outer.address.is_multiple_of(8) {
            return Err(RingFault::Alignment(outer.address));
        }
        let entries = u16::try_from(bytes / DESCRIPTOR_BYTES).map_err(|_| RingFault::Long(self.head))?;
        let table = self.memory.window(outer.address, bytes)?;
        let mut index = 0;
        for _ in 0..entries {
            let descriptor = Descriptor::load(&table, index, entries)?;
            if descriptor.flags & INDIRECT != 0 {
                return Err(RingFault::Indirect(self.head));
            }
            self.segment(descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(RingFault::Loop(self.head))
    }

    fn segment(&mut self, descriptor: Descriptor) -> Result<(), RingFault> {
        let writable = descriptor.flags & WRITE != 0;
        if !writable && self.writable > 0 {
            return Err(RingFault::Order(self.head));
        }
        self.segments += 1;
        let bytes = u64::from(descriptor.bytes);
        let total = self.readable + self.writable + bytes;
        if self.segments > CHAIN_SEGMENTS_MAX || usize::try_from(total).map_or(true, |total| total > CHAIN_BYTES_MAX) {
            return Err(RingFault::Long(self.head));
        }
        *(if writable { &mut self.writable } else { &mut self.readable }) += bytes;
        self.spans(descriptor.address, descriptor.bytes)
    }

    fn spans(&mut self, mut gpa: u64, mut left: u32) -> Result<(), RingFault> {
        while left > 0 {
            let span = self.memory.span(gpa, left)?;
            if self.spans.len() - self.before >= CHAIN_SPANS_MAX {
                return Err(RingFault::Long(self.head));
            }
            self.spans.push(span);
            left -= span.bytes;
            gpa += u64::from(span.bytes);
        }
        Ok(())
    }
}

impl Descriptor {
    /// Loads a descriptor, in two words; what the guest changes later is not seen.
    fn load(table: &Window, index: u16, entries: u16) -> Result<Self, RingFault> {
        if index >= entries {
            return Err(RingFault::Descriptor { index, entries });
        }
        let at = DESCRIPTOR_BYTES * usize::from(index);
        let address = table.load_u64(at, Ordering::Relaxed);
        let [a, b, c, d, e, f, g, h] = table.load_u64(at + 8, Ordering::Relaxed).to_le_bytes();
        let bytes = u32::from_le_bytes([a, b, c, d]);
        Ok(Self { address, bytes, flags: u16::from_le_bytes([e, f]), next: u16::from_le_bytes([g, h]) })
    }
}

#[cfg(test)]
mod tests;
