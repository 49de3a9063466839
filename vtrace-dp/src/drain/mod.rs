//! Empties rings into files: one worker thread per device.
//!
//! In:    rings as the VMM starts and stops them; a file and areas of it as a client asks for them
//! Out:   whole pages at their final place; a ledger for each lane
//! Runs:  [`Drain`] is a handle: its calls are messages to the thread `drain-NAME`, and those that must be over when
//!        they return wait for it
//! Full:  a slow file blocks the guest's ports; nothing is dropped here without a count
//! Trust: guests with nothing, the VMM with its guest's memory, clients with the file they gave
//!
//! What waits for a disk: pages, in the guest's memory, as long as it takes; nothing else while the machine runs. Who
//! takes a ring or the memory away (a VMM that stops, resets or migrates its machine, or ends in order) waits until the
//! writes are over that read the guest's memory: before, that memory may not be used for anything else. Nothing in here
//! bounds a write; what does is the disk: the kernel's time-outs, or none on a file system that waits for ever (hard NFS,
//! a frozen one). After [`handle::SLOW_WAIT`] it is said in the log. Other guests, the control queue until then, `vtrace list` and
//! clients are not held up. QEMU itself waits like this for the writes of its own disks.
//!
//! Host memory, all of it taken before pages flow: a lane has one batch (1024 vectors of 16 bytes, a page for headers of
//! our own) and a queue of at most 1024 chains of 12 bytes: 32 KiB. Past the page cache a guest has 16 more batches:
//! 320 KiB. A guest of 126 lanes comes to less than 5 MiB; the pages themselves never leave the guest's memory. Through
//! the page cache the kernel holds what its own limits of dirty memory allow.
//!
//! | file | what |
//! |---|---|
//! | [`worker`] | the thread: kicks, timer, commands |
//! | [`road`] | one CPU: its ring and its lane |
//! | [`lane`] | byte stream ─► pages ─► batches |
//! | [`sink`] | batches ─► file |
//! | [`direct`] | the same past the page cache, several writes at a time |
//! | [`handle`] | messages to the thread, and its answers |
//! | [`ledger`] | counts |

pub mod direct;
pub(crate) mod handle;
pub mod lane;
pub mod ledger;
mod road;
pub mod sink;
mod worker;

use std::{
    fs::File,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use vtrace_common::{
    ids::{Cpu, GuestId},
    limits::{DEVICE_LANES_MAX, PAGE_BYTES_MAX, PAGE_BYTES_MIN},
    wire::client::{Area, LaneEnd, LaneLedger},
};

use self::{
    direct::DirectSink,
    handle::Handle,
    lane::Lane,
    ledger::Counters,
    sink::{FileSink, Sink},
    worker::{Attachment, Command, Worker},
};
use crate::device::{memory::Memory, ring::Ring};

/// Handle of a device's drain worker. Every call is a message to its thread; those that answer wait for it. When it is
/// dropped the lanes are closed and the thread ends.
#[derive(Debug)]
pub struct Drain {
    handle: Handle<Command>,
    discarded_bytes: Arc<AtomicU64>,
}

impl Drain {
    /// Starts the thread.
    pub fn spawn(guest: GuestId, name: &str) -> io::Result<Self> {
        let discarded_bytes = Arc::default();
        let handle = Handle::spawn(
            name,
            || Command::Stop,
            |commands, wake| {
                let worker = Worker::new(guest, commands, wake, Arc::clone(&discarded_bytes))?;
                Ok(move || worker.run())
            },
        )?;
        Ok(Self { handle, discarded_bytes })
    }

    /// A lane's ring runs from now on. One that ran before is stopped.
    pub fn ring_started(&self, cpu: Cpu, ring: Ring) {
        self.handle.tell(Command::RingStarted(cpu, Box::new(ring)));
    }

    /// Finishes writes in flight, publishes, gives the ring up: the answer to GET_VRING_BASE. The lane stays and goes on
    /// with the next ring. None if there is no such ring. Waits.
    pub fn ring_stopped(&self, cpu: Cpu) -> Option<u16> {
        self.handle.ask(|answer| Command::RingStopped(cpu, answer)).flatten()
    }

    /// The memory table changed: writes in flight are finished, then the rings are remapped. Waits: afterwards the old
    /// mapping is not used any more.
    pub fn remap(&self, memory: Arc<Memory>) {
        self.handle.ask(|answer| Command::Remap(memory, answer));
    }

    /// QEMU gave another call eventfd for a running ring.
    pub fn call_changed(&self, cpu: Cpu, call: Option<std::os::fd::OwnedFd>) {
        self.handle.tell(Command::CallChanged(cpu, call));
    }

    /// Pages are written to these areas of `file` from now on. Without lanes, what comes is discarded. Rings may start
    /// later. Waits.
    ///
    /// Errors: `InvalidInput` for a file or an area that cannot be used, `ResourceBusy` if there are lanes.
    pub fn attach(&self, file: File, page_bytes: u32, areas: Vec<Area>) -> io::Result<()> {
        self.attach_sink(Box::new(FileSink::new(file)?), page_bytes, areas)
    }

    /// Like [`Drain::attach`], past the page cache: `direct` is another description of the same file, with O_DIRECT.
    ///
    /// Errors: also those of a kernel without io_uring.
    pub fn attach_direct(&self, file: File, direct: File, page_bytes: u32, areas: Vec<Area>) -> io::Result<()> {
        self.attach_sink(Box::new(DirectSink::new(file, direct)?), page_bytes, areas)
    }

    /// Like [`Drain::attach`], with any sink.
    pub fn attach_sink(&self, sink: Box<dyn Sink>, page_bytes: u32, areas: Vec<Area>) -> io::Result<()> {
        check(page_bytes, &areas)?;
        let counters: Vec<_> = areas.iter().map(|area| Arc::new(Counters::new(area.cpu))).collect();
        let lane = |(area, counters): (Area, &Arc<_>)| (area.cpu, Lane::new(area, page_bytes, Arc::clone(counters)));
        let lanes = areas.into_iter().zip(&counters).map(lane).collect();
        let attachment = Attachment { sink, lanes, counters: counters.clone() };
        self.handle.attach(counters, |answer| Command::Attach(attachment, answer))
    }

    /// Waits until each lane has received what its agent sent (or `wait_ms_max` has passed, or the rings are gone),
    /// writes everything, closes the lanes. The answer comes to `done` from the worker's thread, which must not call
    /// back into this handle; without lanes it is empty. Lanes without an end are not waited for.
    pub fn finish(&self, ends: Vec<LaneEnd>, wait_ms_max: u32, done: Box<dyn FnOnce(Vec<LaneLedger>) + Send>) {
        self.handle.tell(Command::Finish(ends, Duration::from_millis(wait_ms_max.into()), done));
    }

    /// Forgets the lanes at once, after writing what they hold; what comes is discarded. Waits: afterwards the file is
    /// closed.
    pub fn detach(&self) {
        self.handle.detach(Command::Detach);
    }

    /// What has come so far; after the lanes are closed, what has come at all, until they are detached.
    pub fn ledger(&self) -> Vec<LaneLedger> {
        self.handle.ledger()
    }

    /// Bytes that came while nobody wanted them.
    pub fn discarded_bytes(&self) -> u64 {
        self.discarded_bytes.load(Ordering::Relaxed)
    }
}

/// A page size and areas that a file can have.
pub(crate) fn check(page_bytes: u32, areas: &[Area]) -> io::Result<()> {
    let invalid = |what| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    let size = usize::try_from(page_bytes).unwrap_or(usize::MAX);
    if !page_bytes.is_power_of_two() || !(PAGE_BYTES_MIN..=PAGE_BYTES_MAX).contains(&size) {
        return invalid("no sub-buffer has this size");
    }
    if areas.is_empty() || areas.len() > DEVICE_LANES_MAX {
        return invalid("no areas, or more than lanes");
    }
    for (index, area) in areas.iter().enumerate() {
        let end = area.offset.checked_add(area.bytes_max).filter(|&end| i64::try_from(end).is_ok());
        let whole = !area.begins_again
            || area.bytes_max >= page_bytes.into() && area.bytes_max.is_multiple_of(page_bytes.into());
        let Some(end) = end.filter(|_| whole && area.offset.is_multiple_of(page_bytes.into())) else {
            return invalid("an area is not aligned to pages, or ends behind the largest file");
        };
        let clash = |other: &Area| {
            let meets = other.offset < end && area.offset < other.offset.saturating_add(other.bytes_max);
            other.cpu == area.cpu || meets
        };
        if areas[..index].iter().any(clash) {
            return invalid("two areas are of one CPU or overlap");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
