//! The plain ways: the same bytes from memory to a file, and nothing else.
//!
//! In:    guests' memory, or memory of our own
//! Out:   bytes in a file
//! Runs:  on the caller's thread

use std::{
    fs::File,
    os::{fd::AsFd, unix::fs::FileExt},
    sync::Arc,
};

use anyhow::{Result, ensure};
use memmap2::{MmapMut, MmapOptions};
use vtrace_dp::virtq::memory::{Batch, Span};

use super::lanes::{CHAIN, ENTRIES, Guest, PAGE};

/// Bytes of a vectored write: half a ring, as the drain gathers them.
const STEP: u64 = ENTRIES as u64 / 2 * CHAIN as u64;

/// Writes `bytes_each` of each lane to its place in its guest's file by vectored writes of 4 MiB, lane after lane.
pub(crate) fn vectored(guests: &[Guest], files: &[File], bytes_each: u64) -> Result<()> {
    let mut batches: Vec<Batch> = guests.iter().map(|guest| Batch::new(Arc::clone(&guest.memory))).collect();
    for step in 0..bytes_each.div_ceil(STEP) {
        for ((guest, file), batch) in guests.iter().zip(files).zip(&mut batches) {
            for (area, lane) in guest.areas(bytes_each).iter().zip(&guest.lanes) {
                let bytes = STEP.min(bytes_each - step * STEP);
                gather(batch, lane.buffers + step % 2 * STEP, bytes)?;
                let written = batch.write_at(file.as_fd(), area.offset + step * STEP);
                ensure!(written.fault.is_none() && written.bytes == bytes, "a write failed: {written:?}");
                batch.clear();
            }
        }
    }
    Ok(())
}

/// Every second page first, so that the kernel gets as many entries as from a real guest.
fn gather(batch: &mut Batch, base: u64, bytes: u64) -> Result<()> {
    let pair = usize::try_from(2 * PAGE)?;
    for page in (0..bytes).step_by(pair).chain((u64::from(PAGE)..bytes).step_by(pair)) {
        ensure!(batch.push(Span { gpa: base + page, bytes: PAGE })?, "a batch holds 1024 pages");
    }
    Ok(())
}

/// Page-aligned memory that was written to.
pub(crate) fn memory(bytes: usize) -> Result<MmapMut> {
    let mut memory = MmapOptions::new().len(bytes).map_anon()?;
    memory.fill(0xa5);
    Ok(memory)
}

/// Writes `bytes` from the beginning of `file`, `step` at a time, always from somewhere else in `memory`. With O_DIRECT
/// on `file` that is the raw direct write.
pub(crate) fn steps(memory: &[u8], file: &File, bytes: u64, step: usize) -> Result<()> {
    let places = memory.len() / step;
    for (index, offset) in (0..bytes).step_by(step).enumerate() {
        let from = index % places * step;
        file.write_all_at(&memory[from..from + step], offset)?;
    }
    Ok(())
}
