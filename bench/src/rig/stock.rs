//! Pages moved as trace-cmd's recorder moves them: wait, splice up to 64 KiB into a pipe, splice that out of it.
//!
//! In:    a source: a tap, a FIFO or a socket
//! Out:   its bytes in a port or a file
//! Runs:  on the caller's thread, which blocks where trace-cmd's does
//! Source: libtracefs 1.8, tracefs_cpu_write and wait_on_input in tracefs-record.c

use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vtrace_dp::sys::splice::{Pipe, SpliceFlags, read, splice};

/// Default size of a pipe.
const PIPE_BYTES: usize = 64 << 10;
const PAGE: usize = 4096;

/// The recorder's pipe. A step's answer: bytes that moved, 0 at the end of the source, none if there is nothing.
pub(crate) struct Mover {
    pipe: Pipe,
}

impl Mover {
    pub(crate) fn new() -> Result<Self> {
        let pipe = Pipe::new(PIPE_BYTES)?;
        nix::fcntl::fcntl(&pipe.reader, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()))?;
        Ok(Self { pipe })
    }

    /// Waits for something to be moved, as the recorder does before each step.
    pub(crate) fn wait(source: BorrowedFd<'_>, limit: PollTimeout) -> Result<()> {
        poll(&mut [PollFd::new(source, PollFlags::POLLIN)], limit)?;
        Ok(())
    }

    /// Moves up to 64 KiB. None if nothing is there.
    pub(crate) fn step(
        &self,
        source: BorrowedFd<'_>,
        target: BorrowedFd<'_>,
        mut offset: Option<&mut u64>,
    ) -> Result<Option<usize>> {
        let flags = SpliceFlags::SPLICE_F_MOVE | SpliceFlags::SPLICE_F_NONBLOCK;
        let taken = match splice(source, self.pipe.writer_fd(), None, PIPE_BYTES, flags) {
            Err(error) if error.would_block() => return Ok(None),
            taken => taken?,
        };
        let mut left = taken;
        while left > 0 {
            let moved = splice(self.pipe.reader_fd(), target, offset.as_deref_mut(), left, SpliceFlags::SPLICE_F_MOVE)?;
            ensure!(moved > 0, "a splice moved nothing: pages are lost");
            left -= moved;
        }
        Ok(Some(taken))
    }
}

/// Moves all full pages of a ring buffer that is not written to any more, then the rest. Bytes moved.
pub(crate) fn empty(tap: BorrowedFd<'_>, port: BorrowedFd<'_>) -> Result<u64> {
    let mover = Mover::new()?;
    let mut moved = 0;
    while let Some(bytes) = mover.step(tap, port, None)? {
        moved += u64::try_from(bytes)?;
        Mover::wait(tap, PollTimeout::ZERO)?;
    }
    let mut page = [0; PAGE];
    loop {
        match read(tap, &mut page) {
            Err(error) if error.would_block() => return Ok(moved),
            Ok(0) => return Ok(moved),
            taken => {
                page[taken?..].fill(0);
                write_all(port, &page)?;
                moved += u64::try_from(PAGE)?;
            }
        }
    }
}

fn write_all(port: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<()> {
    while !bytes.is_empty() {
        let written = nix::unistd::write(port.as_fd(), bytes)?;
        bytes = &bytes[written..];
    }
    Ok(())
}
