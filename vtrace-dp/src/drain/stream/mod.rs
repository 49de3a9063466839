//! The drain of a guest's streams: what [`RingDrain`](crate::drain::ring::RingDrain) is for rings.
//!
//! In:    files and areas as a client asks for them
//! Out:   whole pages at their final place; a ledger for each lane
//! Runs:  [`StreamDrain`] is a handle: its calls are messages to the thread `vt-drain/NAME`; those that answer wait for it
//! Full:  a slow file blocks the guest's ports; nothing is dropped here without a count
//! Trust: guests with nothing, clients with the file they gave
//!
//! Host memory: a lane that is a socket has a pipe of 256 KiB, a FIFO holds as much; the pages go from there into the
//! page cache. There is no way past it: a stream has no memory that a disk could read from.

pub(crate) mod lane;
pub(crate) mod port;
mod source;
mod worker;

use std::{
    fs::File,
    io,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vtrace_common::{
    ids::Cpu,
    wire::client::{Area, LaneLedger, LaneSent},
};

use self::{
    lane::StreamLane,
    port::{LanePort, Peers},
    worker::{StreamCommand, StreamWorker},
};
use crate::drain::{Done, Drain, Portless, check, handle::Handle, session::Attachment};

/// Handle of the worker. When it is dropped the lanes are closed and the thread ends.
#[derive(Debug)]
pub(crate) struct StreamDrain {
    handle: Handle<StreamCommand>,
    there: Vec<(Cpu, String, Arc<AtomicBool>)>,
}

impl StreamDrain {
    /// Starts the thread for these ports.
    pub(crate) fn spawn(name: &str, ports: Vec<LanePort>, peers: Peers) -> io::Result<Self> {
        let there = ports.iter().map(|port| (port.cpu, port.path.clone(), Arc::clone(&port.is_there))).collect();
        let handle = Handle::spawn(name, |commands, wake| {
            let worker = StreamWorker::new(name, ports, peers, commands, wake)?;
            Ok(move || worker.run())
        })?;
        Ok(Self { handle, there })
    }
}

impl Drain for StreamDrain {
    /// Waits until what was sent before has gone by.
    fn attach(&self, file: &File, direct: Option<&File>, page_bytes: u32, areas: &[Area]) -> io::Result<()> {
        check(page_bytes, areas)?;
        let flags = OFlag::from_bits_truncate(fcntl(file.as_fd(), FcntlArg::F_GETFL)?);
        if flags & OFlag::O_ACCMODE != OFlag::O_RDWR {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "pages of a stream are looked at in the file: open it for reading too",
            ));
        }
        if direct.is_some() {
            log::debug!("streams go through the page cache");
        }
        let lane = |area, counters| StreamLane::new(area, page_bytes, counters);
        self.handle.attach(Attachment::new(file.try_clone()?, areas, lane))
    }

    fn ledger(&self) -> Vec<LaneLedger> {
        self.handle.ledger()
    }

    fn finish(&self, sent: Vec<LaneSent>, wait_ms_max: u32, done: Done) {
        self.handle.finish(sent, wait_ms_max, done);
    }

    fn detach(&self) {
        self.handle.detach();
    }

    fn portless(&self, cpu: Cpu) -> Option<Portless> {
        match self.there.iter().find(|(known, _, _)| *known == cpu) {
            Some((_, _, is_there)) if is_there.load(Ordering::Relaxed) => None,
            Some((_, path, _)) => Some(Portless::NoStream(path.clone())),
            None => Some(Portless::NotSetUp(self.there.len())),
        }
    }
}
