//! One lane's descriptors, and what the pump does with them.
//!
//! In:    a tap and a port; what [`PumpLane`] wants next
//! Out:   pages in the port; what the lane waits for
//! Runs:  on the pump's thread; no call here sleeps
//! Full:  a port without room says EAGAIN, and its pages stay in the pipe
//! Trust: the kernel; a splice that moved nothing although pages waited is counted as loss
//!
//! Memory of a lane in the guest: a pipe and the pages in it, at most 256 KiB (1 MiB with pages larger than 4 KiB); and
//! in the driver a copy of each page that the host has not taken yet, at most 256 KiB for each entry of the port's queue
//! (32 MiB with 128). The host needs none for a page on its way: it lies in guest memory.
//!
//! The rest of a ring buffer (a page that is not full can only be read(2)) goes through the same pipe as every other
//! page, so there is one way into a port, one place that counts, and one place that tees.

use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
};
use vtrace_common::{ids::Cpu, ledger::Ledger};

use super::lane::{Next, PumpLane, Wait};
use crate::{
    sys::{
        SysError,
        folder_entry::FolderEntry,
        splice::{Pipe, SpliceFlags, splice, tee},
    },
    tracefs::Tap,
};

/// Pages that one splice moves at most, and so what a lane keeps on its way between tap and port. A quarter or four times
/// as many cost as much CPU or more (docs/pump.md), and what is given to virtio_console at a time decides how much a slow
/// host makes the guest hold.
const PAGES_A_PIPE: usize = 64;
/// The largest pipe an ordinary system allows: fewer pages where they are larger than 16 KiB.
const PIPE_BYTES_MAX: usize = 1 << 20;
/// Pages are moved, never waited for.
const FLAGS: SpliceFlags = SpliceFlags::SPLICE_F_MOVE.union(SpliceFlags::SPLICE_F_NONBLOCK);

/// Why a pump, or a lane of it, cannot start.
#[derive(Debug, thiserror::Error)]
#[error("{object}: {source}")]
pub(super) struct PumpError {
    /// What it is about.
    pub(super) object: String,
    /// What the kernel said.
    pub(super) source: std::io::Error,
}

impl PumpError {
    pub(super) fn of<E: Into<std::io::Error>>(object: impl Into<String>) -> impl FnOnce(E) -> Self {
        let object = object.into();
        move |source| Self { object, source: source.into() }
    }
}

/// One lane's end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct LaneEnd {
    pub(super) cpu: Cpu,
    pub(super) ledger: Ledger,
    /// Why it ended early; empty if it did not.
    pub(super) trouble: String,
}

impl LaneEnd {
    /// A lane that moved nothing, for this reason.
    pub(super) fn nothing(cpu: Cpu, trouble: String) -> Self {
        Self { cpu, ledger: Ledger::default(), trouble }
    }
}

/// One lane's descriptors.
#[derive(Debug)]
pub(super) struct LaneIo {
    pub(super) tap: Tap,
    pub(super) port: OwnedFd,
    pub(super) lane: PumpLane,
    pipe: Pipe,
    tee: Option<Tee>,
    /// It has lost pages, and the log says so.
    is_lossy: bool,
}

impl LaneIo {
    /// A lane from `tap` to `port`, which does not block from now on.
    pub(super) fn new(tap: Tap, port: OwnedFd, page_bytes: u32, tee: Option<&Path>) -> Result<Self, PumpError> {
        let flags = fcntl(&port, FcntlArg::F_GETFL).map_err(PumpError::of("port"))?;
        let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
        fcntl(&port, FcntlArg::F_SETFL(flags)).map_err(PumpError::of("port"))?;
        let pipe = Pipe::new(pipe_bytes_max(page_bytes)).map_err(PumpError::of("pipe"))?;
        let pipe_bytes = u32::try_from(pipe.bytes_max).unwrap_or(u32::MAX / 2);
        if pipe_bytes < page_bytes {
            let object = format!("pipe of {pipe_bytes} bytes for pages of {page_bytes}");
            return Err(PumpError::of(object)(Errno::EINVAL));
        }
        let tee = tee.map(|directory| Tee::new(directory, tap.cpu, pipe.bytes_max)).transpose()?;
        Ok(Self { tap, port, pipe, lane: PumpLane::new(page_bytes, pipe_bytes), tee, is_lossy: false })
    }

    /// Does what the lane wants next, until it has to wait. `scratch` has room for a page. Hot.
    pub(super) fn go(&mut self, mut next: Next, scratch: &mut [u8]) -> Wait {
        loop {
            next = match next {
                Next::Fill => self.fill(),
                Next::Send(bytes) => {
                    let moved = splice(self.pipe.reader_fd(), self.port.as_fd(), None, size(bytes), FLAGS);
                    self.lane.sent(counted(moved))
                }
                Next::ReadRest => self.rest(scratch),
                Next::Discard => self.discard(),
                Next::Wait(wait) => return wait,
            };
        }
    }

    /// Hot.
    fn fill(&mut self) -> Next {
        let bytes_max = size(self.lane.fill_bytes());
        let moved = splice(self.tap.fd.as_fd(), self.pipe.writer_fd(), None, bytes_max, FLAGS);
        let next = self.lane.filled(counted(moved));
        self.tee(next);
        next
    }

    fn rest(&mut self, scratch: &mut [u8]) -> Next {
        let next = match self.read_rest(scratch) {
            Ok(bytes) => self.lane.read_rest(bytes),
            Err(errno) => self.lane.rest_failed(errno),
        };
        self.tee(next);
        next
    }

    /// Reads what is no full page into the pipe: a page per read(2), each padded to a whole one.
    fn read_rest(&mut self, scratch: &mut [u8]) -> Result<u32, Errno> {
        let page_bytes = u32::try_from(scratch.len()).expect("a page");
        let mut taken = 0;
        while taken + page_bytes <= self.lane.fill_bytes() {
            let count = match nix::unistd::read(&self.tap.fd, scratch) {
                Ok(0) | Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => continue,
                Ok(count) => count,
                Err(errno) => return Err(errno),
            };
            scratch[count..].fill(0);
            if nix::unistd::write(&self.pipe.writer, scratch)? != scratch.len() {
                return Err(Errno::ENOBUFS);
            }
            taken += page_bytes;
        }
        Ok(taken)
    }

    /// Empties the pipe: another one takes its place.
    fn discard(&mut self) -> Next {
        if !std::mem::replace(&mut self.is_lossy, true) {
            log::warn!("{}: the port takes pages and loses them", self.tap.cpu);
        }
        match Pipe::new(self.pipe.bytes_max) {
            Ok(pipe) => {
                self.pipe = pipe;
                self.lane.discarded()
            }
            Err(error) => self.lane.rest_failed(error.errno),
        }
    }

    /// Copies pages that have just come into the pipe, when that is wanted. Hot (when it is not).
    fn tee(&mut self, next: Next) {
        let (Some(tee), Next::Send(bytes)) = (&self.tee, next) else { return };
        if let Err(error) = tee.copy(&self.pipe, size(bytes)) {
            log::error!("{}: the copy ends here: {error}", tee.path.display());
            self.tee = None;
        }
    }

    /// What it did. Says why if it has ended early.
    pub(super) fn end(&self) -> LaneEnd {
        LaneEnd { cpu: self.tap.cpu, ledger: self.lane.ledger(), trouble: self.lane.trouble() }
    }
}

/// How large a pipe to ask for; where the system's limits refuse it, 64 KiB have to do.
fn pipe_bytes_max(page_bytes: u32) -> usize {
    (PAGES_A_PIPE * size(page_bytes)).min(PIPE_BYTES_MAX)
}

fn size(bytes: u32) -> usize {
    usize::try_from(bytes).expect("a pipe fits memory")
}

fn counted(moved: Result<usize, SysError>) -> Result<u32, Errno> {
    moved.map(|bytes| u32::try_from(bytes).expect("no more than was asked for")).map_err(|error| error.errno)
}

/// A copy of a lane's pages in a file.
#[derive(Debug)]
struct Tee {
    pipe: Pipe,
    file: File,
    path: PathBuf,
}

impl Tee {
    fn new(directory: &Path, cpu: Cpu, pipe_bytes: usize) -> Result<Self, PumpError> {
        let path = directory.join(format!("{cpu}.raw"));
        // The folder may be /tmp: a link in the place of the file is not followed.
        let file = FolderEntry::resolve(&path).and_then(|entry| entry.create_anew());
        let file = file.map_err(PumpError::of(path.display().to_string()))?;
        let pipe = Pipe::new(pipe_bytes).map_err(PumpError::of("pipe"))?;
        Ok(Self { pipe, file, path })
    }

    fn copy(&self, source: &Pipe, bytes: usize) -> Result<(), SysError> {
        let mut left = tee(source.reader.as_fd(), self.pipe.writer.as_fd(), bytes, SpliceFlags::SPLICE_F_NONBLOCK)?;
        if left != bytes {
            return Err(SysError { call: "tee", errno: Errno::ENOSPC });
        }
        while left > 0 {
            left -= splice(self.pipe.reader.as_fd(), self.file.as_fd(), None, left, SpliceFlags::empty())?;
        }
        Ok(())
    }
}
