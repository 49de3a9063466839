//! Writers of one file.
//!
//! In:    batches of guest memory, and where they belong in the file
//! Out:   bytes in the file
//! Runs:  on the worker's thread, which waits for each write, or is told later how far it came
//! Full:  says how far a write came and why it ended; the lane counts what is lost
//! Trust: the file is the client's: it may be full, slow, or fail in any way

pub mod choice;
pub mod direct;
pub mod writeback;

use std::{
    fmt,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::{
    sys::write_all::{Written, erase},
    virtq::memory::Batch,
};

/// How a write ended that [`Sink::submit`] had left under way.
#[derive(Debug)]
pub struct Landed {
    /// What was given with it.
    pub tag: u64,
    /// How far it came.
    pub written: Written,
}

/// A place that pages go to. The provided methods are those of a sink whose writes are over when they return.
pub trait Sink: Send + fmt::Debug {
    /// Writes a whole batch at `offset`. The batch is used up. Hot.
    fn write(&mut self, batch: &mut Batch, offset: u64) -> Written;
    /// Writes a whole batch at `offset`, or only starts to. `Some`: it is over, the batch is used up. `None`: it is under
    /// way, its end comes from [`Sink::landed`] with `tag`; the batch was taken, an empty one is in its place. Hot.
    fn submit(&mut self, batch: &mut Batch, offset: u64, _tag: u64) -> Option<Written> {
        Some(self.write(batch, offset))
    }
    /// The end of a write that was under way, in any order. `None`: none has ended yet, or, if it shall `wait`, none is
    /// under way. Ask until there is none: not every one makes [`Sink::ended_fd`] readable. Hot.
    fn landed(&mut self, _wait: bool) -> Option<Landed> {
        None
    }
    /// Readable when a write that was under way has ended. `None`: no write ever is.
    fn ended_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Bytes that are worth a write of their own; a batch with fewer waits for more, as long as it may.
    fn write_bytes(&self) -> u64 {
        u64::MAX
    }
    /// Makes a stretch, shorter than a page, zero again that held part of a page.
    fn erase(&mut self, offset: u64, bytes: u64) -> io::Result<()>;
}

/// Vectored writes through the page cache.
#[derive(Debug)]
pub struct FileSink {
    file: File,
}

impl FileSink {
    /// Takes a regular file that is open for writing. A file in append mode is refused: its writes ignore the offset
    /// (pwrite(2), BUGS).
    pub fn new(file: File) -> io::Result<Self> {
        let invalid = |what| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        let flags = OFlag::from_bits_truncate(fcntl(&file, FcntlArg::F_GETFL)?);
        if !file.metadata()?.is_file() {
            return invalid("not a regular file");
        }
        if flags & OFlag::O_ACCMODE == OFlag::O_RDONLY || flags.contains(OFlag::O_PATH) {
            return invalid("file is not open for writing");
        }
        if flags.contains(OFlag::O_APPEND) {
            return invalid("file is open for appending");
        }
        Ok(Self { file })
    }

    /// The file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// The file, to be written in another way.
    pub(crate) fn into_file(self) -> File {
        self.file
    }
}

impl Sink for FileSink {
    fn write(&mut self, batch: &mut Batch, offset: u64) -> Written {
        batch.write_at(self.file.as_fd(), offset)
    }

    fn erase(&mut self, offset: u64, bytes: u64) -> io::Result<()> {
        erase(&self.file, offset, bytes)
    }
}

/// Writes nothing and says that it did: what a drain without lanes holds, and what shows the cost of all the rest.
#[derive(Debug)]
pub struct NullSink;

impl Sink for NullSink {
    fn write(&mut self, batch: &mut Batch, _offset: u64) -> Written {
        Written { bytes: batch.bytes(), fault: None }
    }

    fn erase(&mut self, _offset: u64, _bytes: u64) -> io::Result<()> {
        Ok(())
    }
}
