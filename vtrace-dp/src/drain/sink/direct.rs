//! Writes past the page cache, from guest memory to the disk, several at a time.
//!
//! In:    batches of guest memory; two descriptors of one file, one of them O_DIRECT
//! Out:   bytes in the file
//! Runs:  on the worker's thread; a write is under way while the worker does something else
//! Full:  with [`WRITES_MAX`] writes under way it waits for one
//! Trust: guests with nothing: unaligned data goes through the page cache after all writes under way have ended, so
//!        that the two never meet in one block. The file is the client's: it may be full, slow, or fail in any way
//!
//! Nothing is allocated ahead (fallocate). Ext4 starts writes into holes in the kernel's workers, those into an area that
//! was allocated before on this thread: the CPU time is the same in sum, and with everything allocated before the start
//! it was 5 % faster, within the noise (6.18; the disk is the bound).
//!
//! Buffers are not registered: a guest's pages lie anywhere, so a write has hundreds of entries, which kernels before
//! 6.15 cannot take from registered memory, and all of the guest's memory would be pinned for as long as it is recorded.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
};

use nix::errno::Errno;

use super::{FileSink, Landed, Sink};
use crate::{
    sys::{
        SysError,
        write_all::Written,
        writes::{End, Writes},
    },
    virtq::memory::{Batch, Memory},
};

/// Writes under way of one guest.
pub const WRITES_MAX: usize = 16;
/// What addresses, lengths and offsets have to be multiples of. Devices ask for this or less.
pub const ALIGNMENT: usize = 4096;
/// Bytes from which on a write is as good as a longer one.
const WRITE_BYTES: u64 = 1 << 20;

/// Direct writes where they are possible, vectored writes through the page cache where not.
#[derive(Debug)]
pub struct DirectSink {
    buffered: FileSink,
    direct: File,
    writes: Writes<Batch>,
    /// Of the batch in the slot of this index: its tag and its offset.
    flights: Vec<(u64, u64)>,
    /// Ends that were taken and not looked at.
    ended: VecDeque<End>,
    /// Ends that are to be told.
    told: VecDeque<Landed>,
    /// What batches point to that hold nothing: no guest's memory stays mapped for them.
    nowhere: Arc<Memory>,
}

impl DirectSink {
    /// Takes two descriptions of one regular file, open for writing, the second one with O_DIRECT.
    ///
    /// Errors: what [`FileSink::new`] refuses, and a kernel without io_uring.
    pub fn new(file: File, direct: File) -> io::Result<Self> {
        let nowhere = Arc::<Memory>::default();
        let empty = (0..WRITES_MAX).map(|_| Batch::new(Arc::clone(&nowhere))).collect();
        let direct = FileSink::new(direct)?.into_file();
        let (buffered, writes) = (FileSink::new(file)?, Writes::new(empty)?);
        let (flights, ended) = (vec![(0, 0); WRITES_MAX], VecDeque::with_capacity(WRITES_MAX));
        let told = VecDeque::with_capacity(4 * WRITES_MAX);
        Ok(Self { buffered, direct, writes, flights, ended, told, nowhere })
    }

    /// The next end that was not looked at. `None`: there is none, or, if it shall `wait`, nothing is under way. Hot.
    fn next(&mut self, wait: bool) -> Option<End> {
        loop {
            if let Some(end) = self.ended.pop_front().or_else(|| self.writes.ended()) {
                return Some(end);
            }
            if !wait || self.writes.flying() == 0 {
                return None;
            }
            self.writes.wait().expect("a ring of our own can be waited for");
        }
    }

    /// Waits until the kernel is done with everything. `held`: writes whose ends were taken and are looked at.
    fn quiesce(&mut self, held: usize) {
        while self.writes.flying() > self.ended.len() + held {
            match self.writes.ended() {
                Some(end) => self.ended.push_back(end),
                None => self.writes.wait().expect("a ring of our own can be waited for"),
            }
        }
    }

    /// How a write ended. One that did not come to its end is tried again through the page cache, which knows neither
    /// alignment nor unwritten blocks, and says exactly where the file ends and why. Hot.
    fn land(&mut self, end: End) -> Landed {
        let (tag, offset) = self.flights[end.slot];
        let bytes = self.writes.batch(end).bytes();
        let result = u64::try_from(end.result);
        let written = match result {
            Ok(done) if done == bytes => Written { bytes, fault: None },
            // A disk that fails: the page cache would only hide it.
            Err(_) if end.result == -(Errno::EIO as i32) => {
                Written { bytes: 0, fault: Some(SysError { call: "pwritev", errno: Errno::EIO }) }
            }
            _ => {
                self.quiesce(1);
                let file = self.buffered.file().as_fd();
                self.writes.batch(end).write_rest(file, offset, result.unwrap_or(0))
            }
        };
        let batch = self.writes.batch(end);
        batch.clear();
        batch.remap(&self.nowhere);
        self.writes.release(end);
        Landed { tag, written }
    }
}

impl Sink for DirectSink {
    fn write(&mut self, batch: &mut Batch, offset: u64) -> Written {
        self.quiesce(0);
        self.buffered.write(batch, offset)
    }

    fn submit(&mut self, batch: &mut Batch, offset: u64, tag: u64) -> Option<Written> {
        let unit = u64::try_from(ALIGNMENT).expect("4096");
        if !offset.is_multiple_of(unit) || !batch.is_aligned(ALIGNMENT) {
            return Some(self.write(batch, offset));
        }
        let memory = Arc::clone(batch.memory());
        while self.writes.flying() == WRITES_MAX {
            if let Some(end) = self.next(true) {
                let landed = self.land(end);
                self.told.push_back(landed);
            }
        }
        let started = self.writes.start(self.direct.as_fd(), batch, offset);
        batch.remap(&memory);
        match started {
            Ok(slot) => {
                self.flights[slot.expect("room was made")] = (tag, offset);
                None
            }
            Err(error) => Some(Written { bytes: 0, fault: Some(error) }),
        }
    }

    fn landed(&mut self, wait: bool) -> Option<Landed> {
        if let Some(landed) = self.told.pop_front() {
            return Some(landed);
        }
        let end = self.next(wait)?;
        Some(self.land(end))
    }

    fn ended_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.writes.as_fd())
    }

    fn write_bytes(&self) -> u64 {
        WRITE_BYTES
    }

    fn erase(&mut self, offset: u64, bytes: u64) -> io::Result<()> {
        self.buffered.erase(offset, bytes)
    }
}

#[cfg(test)]
mod tests;
