//! Empties rings into files: one worker thread per device.
//!
//! In:    rings as the VMM starts and stops them; a file and areas of it as a client asks for them
//! Out:   whole pages at their final place; a ledger for each lane
//! Runs:  [`RingDrain`] is a handle: its calls are messages to the thread `vt-drain/NAME`, and those that must be over when
//!        they return wait for it
//! Full:  a slow file blocks the guest's ports; nothing is dropped here without a count
//! Trust: guests with nothing, the VMM with its guest's memory, clients with the file they gave
//!
//! What waits for a disk: pages, in the guest's memory, as long as it takes; nothing else while the machine runs. Who
//! takes a ring or the memory away (a VMM that stops, resets or migrates its machine, or ends in order) waits until the
//! writes are over that read the guest's memory: before, that memory may not be used for anything else. Nothing in here
//! bounds a write; what does is the disk: the kernel's time-outs, or none on a file system that waits for ever (hard NFS,
//! a frozen one). After [`super::handle::SLOW_WAIT`] it is said in the log. Other guests, the control queue until then, `vtrace list` and
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
//! | [`source`] | one CPU: its ring and its lane |
//! | [`lane`] | byte stream ─► pages ─► batches |

pub mod lane;
mod source;
pub(crate) mod worker;

use std::{fs::File, io, sync::Arc};

use vtrace_common::{
    ids::{Cpu, GuestId},
    wire::client::{Area, LaneLedger, LaneSent},
};

use self::{
    lane::RingLane,
    worker::{RingCommand, RingWorker},
};
use super::{
    Done, Drain, check,
    handle::Handle,
    session::Attachment,
    sink::{FileSink, Sink, direct::DirectSink},
};
use crate::virtq::{memory::Memory, ring::Ring};

/// Handle of a device's drain worker. Every call is a message to its thread; those that answer wait for it. When it is
/// dropped the lanes are closed and the thread ends.
#[derive(Debug)]
pub struct RingDrain {
    pub(crate) handle: Handle<RingCommand>,
}

impl RingDrain {
    /// Starts the thread.
    pub fn spawn(guest: GuestId, name: &str) -> io::Result<Self> {
        let handle = Handle::spawn(name, |commands, wake| {
            let worker = RingWorker::new(guest, commands, wake)?;
            Ok(move || worker.run())
        })?;
        Ok(Self { handle })
    }

    /// A lane's ring runs from now on. One that ran before is stopped.
    pub fn ring_started(&self, cpu: Cpu, ring: Ring) {
        self.handle.tell(RingCommand::RingStarted(cpu, Box::new(ring)));
    }

    /// Finishes writes in flight, publishes, gives the ring up: the answer to GET_VRING_BASE. The lane stays and goes on
    /// with the next ring. None if there is no such ring. Waits.
    pub fn ring_stopped(&self, cpu: Cpu) -> Option<u16> {
        self.handle.ask(|answer| RingCommand::RingStopped(cpu, answer)).flatten()
    }

    /// The memory table changed: writes in flight are finished, then the rings are remapped. Waits: afterwards the old
    /// mapping is not used any more.
    pub fn remap(&self, memory: Arc<Memory>) {
        self.handle.ask(|answer| RingCommand::Remap(memory, answer));
    }

    /// QEMU gave another call eventfd for a running ring.
    pub fn call_changed(&self, cpu: Cpu, call: Option<std::os::fd::OwnedFd>) {
        self.handle.tell(RingCommand::CallChanged(cpu, call));
    }

    /// Pages are written to these areas of `file` from now on. Without lanes, what comes is discarded. Rings may start
    /// later. Waits.
    ///
    /// Errors: `InvalidInput` for a file or an area that cannot be used, `ResourceBusy` if there are lanes.
    pub fn attach(&self, file: File, page_bytes: u32, areas: Vec<Area>) -> io::Result<()> {
        self.attach_sink(Box::new(FileSink::new(file)?), page_bytes, areas)
    }

    /// Like [`RingDrain::attach`], past the page cache: `direct` is another description of the same file, with O_DIRECT.
    ///
    /// Errors: also those of a kernel without io_uring.
    pub fn attach_direct(&self, file: File, direct: File, page_bytes: u32, areas: Vec<Area>) -> io::Result<()> {
        self.attach_sink(Box::new(DirectSink::new(file, direct)?), page_bytes, areas)
    }

    /// Like [`RingDrain::attach`], with any sink.
    pub fn attach_sink(&self, sink: Box<dyn Sink>, page_bytes: u32, areas: Vec<Area>) -> io::Result<()> {
        check(page_bytes, &areas)?;
        let lane = |area, counters| RingLane::new(area, page_bytes, counters);
        self.handle.attach(Attachment::new(sink, &areas, lane))
    }

    /// Waits until each lane has received what its agent sent (or `wait_ms_max` has passed, or the rings are gone),
    /// writes everything, closes the lanes. The answer comes to `done` from the worker's thread, which must not call
    /// back into this handle; without lanes it is empty. Lanes without an end are not waited for.
    pub fn finish(&self, sent: Vec<LaneSent>, wait_ms_max: u32, done: Box<dyn FnOnce(Vec<LaneLedger>) + Send>) {
        self.handle.finish(sent, wait_ms_max, done);
    }

    /// Forgets the lanes at once, after writing what they hold; what comes is discarded. Waits: afterwards the file is
    /// closed.
    pub fn detach(&self) {
        self.handle.detach();
    }

    /// What has come so far; after the lanes are closed, what has come at all, until they are detached.
    pub fn ledger(&self) -> Vec<LaneLedger> {
        self.handle.ledger()
    }
}

impl Drain for RingDrain {
    fn attach(&self, file: &File, direct: Option<&File>, page_bytes: u32, areas: &[Area]) -> io::Result<()> {
        match direct {
            Some(direct) => self.attach_direct(file.try_clone()?, direct.try_clone()?, page_bytes, areas.to_vec()),
            None => Self::attach(self, file.try_clone()?, page_bytes, areas.to_vec()),
        }
    }

    fn ledger(&self) -> Vec<LaneLedger> {
        Self::ledger(self)
    }

    fn finish(&self, sent: Vec<LaneSent>, wait_ms_max: u32, done: Done) {
        Self::finish(self, sent, wait_ms_max, done);
    }

    fn detach(&self) {
        Self::detach(self);
    }
}

#[cfg(test)]
mod tests;
