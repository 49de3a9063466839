//! Several vectored writes in flight at a time, by io_uring.
//!
//! In:    batches of vectors into memory that they keep in place, a file, offsets
//! Out:   for each write what pwritev would have returned, and the batch again
//! Runs:  on the caller's thread; where the file system cannot start a write at once, in the kernel's workers
//! Full:  [`Writes::start`] hands the batch back: wait for an end first
//! Trust: the kernel
//!
//! A batch in flight belongs to the [`Writes`]: its memory is mapped until the kernel is done with it, whatever becomes
//! of its sender. Works from Linux 5.19 on (IORING_SETUP_COOP_TASKRUN).
#![expect(unsafe_code, reason = "the kernel reads the memory that the vectors name")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use io_uring::{IoUring, opcode, types::Fd};
use nix::libc;

use super::SysError;

/// Something the kernel can write from.
///
/// # Safety
/// What [`Vectors::vectors`] names stays mapped as long as the value lives, wherever it is moved to, and the vectors
/// themselves stay where they are until the value is changed.
pub unsafe trait Vectors {
    /// At most 1024 stretches of memory (IOV_MAX).
    fn vectors(&self) -> &[libc::iovec];
}

/// Whether this kernel lets us.
pub fn is_available() -> bool {
    ring(1).is_ok()
}

fn ring(entries: u32) -> Result<IoUring, SysError> {
    IoUring::builder().setup_coop_taskrun().build(entries).map_err(SysError::of_io("io_uring_setup"))
}

/// One write's end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct End {
    /// Where its batch is.
    pub slot: usize,
    /// Bytes, or a negative errno.
    pub result: i32,
}

/// A ring, and the batches of the writes in flight.
pub struct Writes<B: Vectors> {
    /// Ends before the slots do: the kernel no longer reads a batch when it goes.
    ring: IoUring,
    slots: Vec<B>,
    /// Slots that nothing is in.
    free: Vec<usize>,
}

impl<B: Vectors> std::fmt::Debug for Writes<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writes").field("fd", &self.ring.as_raw_fd()).field("flying", &self.flying()).finish()
    }
}

impl<B: Vectors> Writes<B> {
    /// Room for as many writes as `empty` has batches.
    ///
    /// # Errors
    /// `ENOSYS` or `EINVAL` without io_uring or with an old one, `EPERM` when `kernel.io_uring_disabled` or a seccomp
    /// filter forbids it.
    pub fn new(empty: Vec<B>) -> Result<Self, SysError> {
        let entries = u32::try_from(empty.len().next_power_of_two()).unwrap_or(u32::MAX);
        Ok(Self { ring: ring(entries)?, free: (0..empty.len()).collect(), slots: empty })
    }

    /// Writes in flight.
    pub fn flying(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Starts to write the whole batch at `offset` and puts an old one into its place. `None` if there is no room. `file`
    /// stays open until the end. Hot.
    pub fn start(&mut self, file: BorrowedFd<'_>, batch: &mut B, offset: u64) -> Result<Option<usize>, SysError> {
        let Some(&slot) = self.free.last() else { return Ok(None) };
        std::mem::swap(&mut self.slots[slot], batch);
        let vectors = self.slots[slot].vectors();
        let count = u32::try_from(vectors.len()).expect("at most 1024 vectors");
        let entry = opcode::Writev::new(Fd(file.as_raw_fd()), vectors.as_ptr(), count).offset(offset);
        let entry = entry.build().user_data(u64::try_from(slot).expect("slots are few"));
        // SAFETY: the vectors and what they name stay until this slot's end is taken: the batch lies in `slots`, which
        // no code changes while the slot is not free, and drop waits for the kernel. The guest and its VMM may write to
        // that memory meanwhile, which can change what the file gets and nothing else.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("there are as many entries as slots, and all of them were submitted");
        self.free.pop();
        self.submit()?;
        Ok(Some(slot))
    }

    fn submit(&mut self) -> Result<(), SysError> {
        loop {
            match self.ring.submit() {
                Ok(_) => return Ok(()),
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
                Err(error) => return Err(SysError::of_io("io_uring_enter")(error)),
            }
        }
    }

    /// The next end, if there is one; its slot keeps the batch until [`Writes::release`]. Hot.
    pub fn ended(&mut self) -> Option<End> {
        let entry = self.ring.completion().next()?;
        let slot = usize::try_from(entry.user_data()).expect("a slot's number");
        Some(End { slot, result: entry.result() })
    }

    /// Sleeps until there is an end to take. Something is in flight.
    pub fn wait(&mut self) -> Result<(), SysError> {
        match self.ring.submit_and_wait(1) {
            Ok(_) => Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => Ok(()),
            Err(error) => Err(SysError::of_io("io_uring_enter")(error)),
        }
    }

    /// The batch of a write that has ended. Hot.
    pub fn batch(&mut self, end: End) -> &mut B {
        &mut self.slots[end.slot]
    }

    /// Makes room: the batch of an end is not needed any more. Hot.
    pub fn release(&mut self, end: End) {
        self.free.push(end.slot);
    }
}

/// Readable while there are ends to take.
impl<B: Vectors> AsFd for Writes<B> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as the ring lives, and the borrow is of `self`.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl<B: Vectors> Drop for Writes<B> {
    fn drop(&mut self) {
        while self.flying() > 0 {
            match self.ended() {
                Some(end) => self.release(end),
                None if self.wait().is_ok() => {}
                // Whether the kernel still reads is not known any more: the memory stays mapped for ever.
                None => return std::mem::forget(std::mem::take(&mut self.slots)),
            }
        }
    }
}
