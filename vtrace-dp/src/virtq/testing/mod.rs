//! A guest made of a memory file: its memory table, and the driver's side of a ring. For tests, fuzz targets and
//! benchmarks of the device; the code under test sees what it would see of a real guest.
//!
//! In:    bytes to be sent; sizes
//! Out:   [`Memory`], [`RingSetup`], chains in guest memory, kicks
//! Runs:  anywhere
//! Full:  [`Driver::send`] says false
//! Trust: its caller: mistakes panic

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout},
    sys::{eventfd, memfd},
};
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vtrace_common::limits::CHAIN_SEGMENTS_MAX;

use super::{
    memory::{Memory, Span, Window, full_fence},
    ring::RingSetup,
};

/// Where the pretended VMM sees guest-physical address 0.
pub const VMM_BASE: u64 = 0x7000_0000_0000;

const NEXT: u16 = 1;
const INDIRECT: u16 = 4;
const TABLE_BYTES: u64 = 16 * CHAIN_SEGMENTS_MAX as u64;

/// A memory file of `bytes`.
pub fn memory_file(bytes: u64) -> io::Result<File> {
    let file = File::from(memfd::memfd_create(c"guest", memfd::MFdFlags::MFD_CLOEXEC)?);
    file.set_len(bytes)?;
    Ok(file)
}

/// A file that cannot grow: a write past its end fails (EPERM), as if a disk were full there.
pub fn sealed_file(bytes: u64) -> io::Result<File> {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    let flags = memfd::MFdFlags::MFD_CLOEXEC | memfd::MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd::memfd_create(c"sealed", flags)?);
    file.set_len(bytes)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW))?;
    Ok(file)
}

/// The table's entry of a region that begins at `gpa`.
pub fn region(gpa: u64, bytes: u64) -> VhostUserMemoryRegion {
    VhostUserMemoryRegion::new(gpa, bytes, VMM_BASE.wrapping_add(gpa), 0)
}

/// Guest memory of these regions (address, bytes), each in its own file.
pub fn guest_memory(regions: &[(u64, u64)]) -> Arc<Memory> {
    let files = regions.iter().map(|&(_, bytes)| memory_file(bytes).expect("memory file")).collect();
    let table: Vec<_> = regions.iter().map(|&(gpa, bytes)| region(gpa, bytes)).collect();
    Memory::map(&table, files).expect("the caller's regions are sound")
}

/// A non-blocking eventfd.
pub fn event() -> OwnedFd {
    let flags = eventfd::EfdFlags::EFD_NONBLOCK | eventfd::EfdFlags::EFD_CLOEXEC;
    eventfd::EventFd::from_flags(flags).expect("eventfd").into()
}

/// Reads an eventfd's counter; 0 if nothing happened.
pub fn events(event: &OwnedFd) -> u64 {
    let mut counter = [0; 8];
    nix::unistd::read(event.as_fd(), &mut counter).map_or(0, |_| u64::from_ne_bytes(counter))
}

/// The driver's side of one ring that sends: every entry has its own indirect table and buffer.
#[derive(Debug)]
pub struct Driver {
    memory: Arc<Memory>,
    base: u64,
    entries: u16,
    event_idx: bool,
    buffer_bytes: u32,
    descriptors: Window,
    available: Window,
    used: Window,
    free: VecDeque<u16>,
    next_available: u16,
    last_used: u16,
    kick: OwnedFd,
    call: OwnedFd,
    /// Kicks the device asked for and got.
    pub kicks: u64,
    /// Interrupts that were counted by [`Driver::reclaim`].
    pub interrupts: u64,
}

impl Driver {
    /// Guest memory that a ring, its tables and its buffers take.
    pub fn footprint(entries: u16, buffer_bytes: u32) -> u64 {
        Self::buffers_at(entries) + u64::from(entries) * u64::from(buffer_bytes)
    }

    fn available_at(entries: u16) -> u64 {
        16 * u64::from(entries)
    }

    fn used_at(entries: u16) -> u64 {
        (Self::available_at(entries) + 6 + 2 * u64::from(entries)).next_multiple_of(4)
    }

    fn tables_at(entries: u16) -> u64 {
        (Self::used_at(entries) + 6 + 8 * u64::from(entries)).next_multiple_of(4096)
    }

    fn buffers_at(entries: u16) -> u64 {
        Self::tables_at(entries) + u64::from(entries) * TABLE_BYTES
    }

    /// A ring at guest-physical `base` (a page) with buffers of `buffer_bytes`.
    pub fn new(memory: Arc<Memory>, base: u64, entries: u16, buffer_bytes: u32, event_idx: bool) -> Self {
        Self::with_events(memory, base, entries, buffer_bytes, event_idx, [event(), event()])
    }

    /// The same with a kick and a call that the caller made.
    pub fn with_events(
        memory: Arc<Memory>,
        base: u64,
        entries: u16,
        buffer_bytes: u32,
        event_idx: bool,
        [kick, call]: [OwnedFd; 2],
    ) -> Self {
        let window = |at: u64, bytes: u64| {
            memory.window(base + at, usize::try_from(bytes).expect("small")).expect("the caller gave enough memory")
        };
        let wide = u64::from(entries);
        let descriptors = window(0, 16 * wide);
        let available = window(Self::available_at(entries), 6 + 2 * wide);
        let used = window(Self::used_at(entries), 6 + 8 * wide);
        let free = (0..entries).collect();
        let (next_available, last_used, kicks, interrupts) = (0, 0, 0, 0);
        Self {
            memory,
            base,
            entries,
            event_idx,
            buffer_bytes,
            descriptors,
            available,
            used,
            free,
            next_available,
            last_used,
            kick,
            call,
            kicks,
            interrupts,
        }
    }

    /// Begins at another index, as a ring does that has run for long. Before anything is sent.
    pub fn begin_at(&mut self, index: u16) {
        (self.next_available, self.last_used) = (index, index);
        self.available.store_u16(2, index, Ordering::Release);
        self.used.store_u16(2, index, Ordering::Release);
        self.rearm();
    }

    /// What the VMM would say of the ring.
    pub fn setup(&self, base: u16) -> RingSetup {
        RingSetup {
            entries: self.entries,
            descriptors: VMM_BASE + self.base,
            available: VMM_BASE + self.base + Self::available_at(self.entries),
            used: VMM_BASE + self.base + Self::used_at(self.entries),
            base,
            event_idx: self.event_idx,
            kick: self.kick.try_clone().expect("descriptors left"),
            call: Some(self.call.try_clone().expect("descriptors left")),
        }
    }

    /// Entries that are free.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Sends bytes as one chain of segments of `segment_bytes`, kicks if the device wants it. False if the ring is full.
    pub fn send(&mut self, bytes: &[u8], segment_bytes: u32) -> bool {
        let Some(head) = self.free.pop_front() else { return false };
        let buffer = self.buffer(head);
        let total = u32::try_from(bytes.len()).expect("small");
        assert!(total <= self.buffer_bytes, "a chain fits its buffer");
        self.memory.copy_in(Span { gpa: buffer, bytes: total }, bytes).expect("buffers are in memory");
        self.chain(head, buffer, total, segment_bytes, false);
        self.make_available(head);
        true
    }

    /// Sends a buffer again as it is: `bytes` of whatever it holds, the last segment first, so that no two segments are
    /// neighbours, as a guest's pages are not.
    pub fn send_again(&mut self, bytes: u32, segment_bytes: u32) -> bool {
        let Some(head) = self.free.pop_front() else { return false };
        self.chain(head, self.buffer(head), bytes, segment_bytes, true);
        self.make_available(head);
        true
    }

    fn buffer(&self, head: u16) -> u64 {
        self.base + Self::buffers_at(self.entries) + u64::from(head) * u64::from(self.buffer_bytes)
    }

    fn chain(&self, head: u16, buffer: u64, total: u32, segment_bytes: u32, backwards: bool) {
        let table_gpa = self.base + Self::tables_at(self.entries) + u64::from(head) * TABLE_BYTES;
        let table = self.memory.window(table_gpa, 16 * CHAIN_SEGMENTS_MAX).expect("tables are in memory");
        let segments = total.div_ceil(segment_bytes).max(1);
        for index in 0..segments {
            let at = if backwards { segments - 1 - index } else { index } * segment_bytes;
            let last = index + 1 == segments;
            let flags = if last { 0 } else { NEXT };
            let next = u16::try_from(index + 1).expect("small");
            let bytes = segment_bytes.min(total - at);
            descriptor(&table, u16::try_from(index).expect("small"), buffer + u64::from(at), bytes, flags, next);
        }
        descriptor(&self.descriptors, head, table_gpa, 16 * segments, INDIRECT, 0);
    }

    fn make_available(&mut self, head: u16) {
        let slot = usize::from(self.next_available & (self.entries - 1));
        self.available.store_u16(4 + 2 * slot, head, Ordering::Relaxed);
        let before = self.next_available;
        self.next_available = before.wrapping_add(1);
        self.available.store_u16(2, self.next_available, Ordering::Release);
        full_fence();
        if self.kick_wanted(before) {
            self.kicks += 1;
            self.kick();
        }
    }

    fn kick_wanted(&self, before: u16) -> bool {
        if self.event_idx {
            return self.used.load_u16(4 + 8 * usize::from(self.entries), Ordering::Relaxed) == before;
        }
        self.used.load_u16(0, Ordering::Relaxed) & 1 == 0
    }

    /// Kicks, wanted or not.
    pub fn kick(&self) {
        nix::unistd::write(self.kick.as_fd(), &1u64.to_ne_bytes()).expect("an eventfd takes a kick");
    }

    /// Takes used entries back; returns how many. Asks for an interrupt at the next one.
    pub fn reclaim(&mut self) -> usize {
        self.interrupts += events(&self.call);
        let before = self.free.len();
        while self.used.load_u16(2, Ordering::Acquire) != self.last_used {
            let slot = usize::from(self.last_used & (self.entries - 1));
            let head = self.used.load_u32(4 + 8 * slot, Ordering::Relaxed);
            self.free.push_back(u16::try_from(head).expect("the device gives back what it got"));
            self.last_used = self.last_used.wrapping_add(1);
        }
        self.rearm();
        self.free.len() - before
    }

    fn rearm(&self) {
        if self.event_idx {
            self.available.store_u16(4 + 2 * usize::from(self.entries), self.last_used, Ordering::Relaxed);
            full_fence();
        }
    }

    /// Whether entries can be taken back.
    pub fn has_used(&self) -> bool {
        self.used.load_u16(2, Ordering::Acquire) != self.last_used
    }

    /// Becomes readable at an interrupt, which comes after [`Driver::reclaim`] has asked for one.
    pub fn call(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// Waits for an interrupt, unless used entries are there; false if none came in time.
    pub fn wait(&self, limit: Duration) -> bool {
        if self.has_used() {
            return true;
        }
        let limit = PollTimeout::try_from(limit).expect("short");
        let mut descriptors = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
        nix::poll::poll(&mut descriptors, limit).is_ok_and(|ready| ready == 1)
    }

    /// Sends, waiting for room as long as it takes.
    pub fn send_blocking(&mut self, bytes: &[u8], segment_bytes: u32) {
        while !self.send(bytes, segment_bytes) {
            assert!(self.wait(Duration::from_secs(20)), "the device gives entries back");
            self.reclaim();
        }
    }

    /// Sends old buffers, waiting for room as long as it takes.
    pub fn send_again_blocking(&mut self, bytes: u32, segment_bytes: u32) {
        while !self.send_again(bytes, segment_bytes) {
            assert!(self.wait(Duration::from_secs(20)), "the device gives entries back");
            self.reclaim();
        }
    }
}

/// Stores a descriptor into a table.
pub fn descriptor(table: &Window, index: u16, gpa: u64, bytes: u32, flags: u16, next: u16) {
    let at = 16 * usize::from(index);
    table.store_u64(at, gpa, Ordering::Relaxed);
    table.store_u64(at + 8, u64::from(bytes) | u64::from(flags) << 32 | u64::from(next) << 48, Ordering::Relaxed);
}
