//! Removes the holes between the lanes of a file, in place.
//!
//! In:    a file, where its lanes lie ([`Areas`], closed), where the first one is to begin
//! Out:   adjacent lanes; `areas` records where; the file ends with the last one
//! Runs:  on the writer's thread, after the last page is written
//! Full:  copying needs room for one step; without it the lane stays where it is, after its hole
//! Trust: the file is ours, and nothing else writes to it
//!
//! There are two methods. FALLOC_FL_COLLAPSE_RANGE (ext4, xfs) moves no bytes; the kernel first writes back the dirty
//! pages after the hole, so a recording writes back continuously ([`crate::recorder`]'s write-back). Elsewhere bytes are
//! copied downwards step by step with copy_file_range (which shares blocks on btrfs), and what was copied is punched
//! out, so that no second copy of the data ever exists. Before each step that cannot be repeated, `save` has put the new places
//! into the file. Where copying would really move bytes, and more than [`COPY_BYTES_MAX`] (a tmpfs), the holes stay: a
//! sparse file is just as valid, and this module exists to avoid a copy of gigabytes at the end.

use std::{fs::File, io, os::unix::fs::FileExt};

use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, copy_file_range, fallocate},
    sys::statfs::{BTRFS_SUPER_MAGIC, fstatfs},
};

use crate::trace::format::areas::{Areas, Extent, LaneArea};

/// What became of the holes between lanes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Compaction {
    /// The file system removed them, or there were none.
    Collapsed,
    /// Bytes were copied downwards.
    Copied,
    /// They are still there: there was no room to copy, or too much to move. The file is valid, but sparse.
    Left,
}

/// Most bytes that are moved by really copying them: some hundredths of a second.
pub(crate) const COPY_BYTES_MAX: u64 = 64 << 20;

/// Most bytes copied between two saves.
pub(crate) const STEP_BYTES: u64 = 64 << 20;
/// Bytes of the buffer where the kernel does not copy.
const BUFFER_BYTES: usize = 1 << 20;

/// A file and its lanes, to be moved together.
pub(crate) struct Collapse<'a> {
    /// The file, readable and writable.
    pub(crate) file: &'a File,
    /// Where its lanes are; in the order of their offsets.
    pub(crate) areas: &'a mut Areas,
    /// Lanes begin at multiples of this; a power of two.
    pub(crate) unit: u64,
    /// Most bytes copied between two saves; a multiple of the unit.
    pub(crate) step_bytes: u64,
    /// Most bytes copied in all where a copy does not share blocks.
    pub(crate) copy_bytes_max: u64,
    /// Puts the areas into the file.
    pub(crate) save: &'a mut dyn FnMut(&Areas) -> io::Result<()>,
}

impl Collapse<'_> {
    /// Moves the lanes together, the first one to `start` (a multiple of the unit, not after its current place).
    pub(crate) fn run(&mut self, start: u64) -> io::Result<Compaction> {
        self.join()?;
        self.cut()?;
        match self.collapse(start) {
            Ok(()) => return Ok(Compaction::Collapsed),
            Err(error) if is_refusal(&error) || is_full(&error) => {}
            Err(error) => return Err(error),
        }
        let bytes = self.areas.lanes.iter().filter(|lane| lane.rest.offset > start).map(|lane| lane.rest.bytes);
        if bytes.sum::<u64>() > self.copy_bytes_max && !shares_blocks(self.file) {
            return Ok(Compaction::Left);
        }
        let compaction = self.copy(start)?;
        self.cut()?;
        Ok(compaction)
    }

    /// Puts lanes that lie in two places into one, the first: those that began again at their area's start, and those
    /// a crash met half moved.
    fn join(&mut self) -> io::Result<()> {
        for index in 0..self.areas.lanes.len() {
            let lane = &mut self.areas.lanes[index];
            if lane.moved.bytes > 0 && lane.rest.bytes == 0 {
                lane.rest = lane.moved;
            } else if lane.moved.bytes > 0 {
                self.move_rest(index)?;
            }
            self.areas.lanes[index].moved = Extent::default();
        }
        Ok(())
    }

    /// Ends the file with its last lane.
    fn cut(&mut self) -> io::Result<()> {
        let ends = self.areas.lanes.iter().filter(|lane| lane.rest.bytes > 0).map(|lane| lane.rest.end());
        if let Some(end) = ends.max() {
            self.areas.file_bytes = end;
            (self.save)(self.areas)?;
            self.file.set_len(self.areas.file_bytes)?;
        }
        Ok(())
    }

    fn collapse(&mut self, start: u64) -> io::Result<()> {
        let mut from = start;
        let mut holes = Vec::new();
        for lane in self.areas.lanes.iter().filter(|lane| lane.rest.bytes > 0) {
            let bytes = lane.rest.offset.saturating_sub(from);
            if bytes > 0 {
                holes.push(Extent { offset: from, bytes });
            }
            from = lane.rest.end().next_multiple_of(self.unit);
        }
        // From the last one on, so that the places of those in front stay right.
        for hole in holes.into_iter().rev() {
            self.areas.pending = hole;
            (self.save)(self.areas)?;
            let result = allocate(self.file, FallocateFlags::FALLOC_FL_COLLAPSE_RANGE, hole);
            if let Err(error) = result {
                self.areas.pending = Extent::default();
                (self.save)(self.areas)?;
                return Err(error);
            }
            self.areas.take_out(hole);
        }
        (self.save)(self.areas)
    }

    fn copy(&mut self, start: u64) -> io::Result<Compaction> {
        let mut to = start;
        for index in 0..self.areas.lanes.len() {
            let from = self.areas.lanes[index].rest;
            if from.bytes == 0 {
                continue;
            }
            if from.offset > to {
                match self.move_lane(index, to) {
                    Err(error) if is_full(&error) && self.areas.lanes[index].moved.bytes == 0 => {
                        // What the failed step wrote in front of the lane is of no use.
                        let dead = Extent { offset: to, bytes: from.offset - to };
                        let _ = punch(self.file, dead);
                        return Ok(Compaction::Left);
                    }
                    result => result?,
                }
            }
            to = self.areas.lanes[index].rest.end().next_multiple_of(self.unit);
        }
        Ok(Compaction::Copied)
    }

    fn move_lane(&mut self, index: usize, to: u64) -> io::Result<()> {
        self.areas.lanes[index].moved = Extent { offset: to, bytes: 0 };
        self.move_rest(index)
    }

    /// Copies `rest` to the end of `moved` and joins both.
    fn move_rest(&mut self, index: usize) -> io::Result<()> {
        let LaneArea { moved, rest, .. } = self.areas.lanes[index];
        // A step never reaches into what is not copied yet: it can be repeated. The distance stays the same.
        let distance = moved.end().abs_diff(rest.offset);
        let mut step_max = self.step_bytes.min(distance);
        if step_max == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a lane in two places that are one"));
        }
        while self.areas.lanes[index].rest.bytes > 0 {
            let lane = self.areas.lanes[index];
            let step = step_max.min(lane.rest.bytes);
            match copy(self.file, lane.rest.offset, lane.moved.end(), step) {
                Ok(()) => {}
                Err(error) if is_full(&error) && step_max > self.unit => {
                    step_max = (step_max / 2).next_multiple_of(self.unit).min(step_max - self.unit);
                    continue;
                }
                Err(error) => return Err(error),
            }
            let lane = &mut self.areas.lanes[index];
            lane.moved.bytes += step;
            lane.rest = Extent { offset: lane.rest.offset + step, bytes: lane.rest.bytes - step };
            (self.save)(self.areas)?;
            let copied = Extent { offset: self.areas.lanes[index].rest.offset - step, bytes: step };
            let _ = punch(self.file, copied);
        }
        let lane = &mut self.areas.lanes[index];
        lane.rest = std::mem::take(&mut lane.moved);
        (self.save)(self.areas)
    }
}

/// Whether a copy within a file of this file system moves no bytes. (xfs does too, and collapses.)
fn shares_blocks(file: &File) -> bool {
    fstatfs(file).is_ok_and(|about| about.filesystem_type() == BTRFS_SUPER_MAGIC)
}

fn allocate(file: &File, flags: FallocateFlags, extent: Extent) -> io::Result<()> {
    Ok(fallocate(file, flags, signed(extent.offset)?, signed(extent.bytes)?)?)
}

/// Gives the room of a stretch back. Where that is not possible it comes back when the file is cut.
pub(crate) fn punch(file: &File, extent: Extent) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    allocate(file, flags, extent)
}

/// Takes room for a stretch, if the file system can, so that what is written there later does not meet a full disk.
pub(crate) fn reserve(file: &File, extent: Extent) {
    let _ = allocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, extent);
}

fn signed(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| io::ErrorKind::FileTooLarge.into())
}

/// Copies within a file; the stretches do not overlap.
fn copy(file: &File, from: u64, to: u64, bytes: u64) -> io::Result<()> {
    let (mut from, mut to) = (signed(from)?, signed(to)?);
    let end = from + signed(bytes)?;
    while from < end {
        let left = usize::try_from(end - from).unwrap_or(usize::MAX);
        match copy_file_range(file, Some(&mut from), file, Some(&mut to), left) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(Errno::EINTR) => {}
            Err(error) if is_refusal(&error.into()) => copy_by_hand(file, &mut from, &mut to, end)?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_by_hand(file: &File, from: &mut i64, to: &mut i64, end: i64) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    while *from < end {
        let bytes = usize::try_from(end - *from).unwrap_or(BUFFER_BYTES).min(BUFFER_BYTES);
        file.read_exact_at(&mut buffer[..bytes], from.cast_unsigned())?;
        file.write_all_at(&buffer[..bytes], to.cast_unsigned())?;
        let bytes = i64::try_from(bytes).expect("a buffer is shorter than a file");
        (*from, *to) = (*from + bytes, *to + bytes);
    }
    Ok(())
}

/// Whether the error means that the file system cannot do this.
fn is_refusal(error: &io::Error) -> bool {
    let refusals = [Errno::EOPNOTSUPP, Errno::EINVAL, Errno::ENOSYS, Errno::EXDEV, Errno::EPERM, Errno::ETXTBSY];
    error.raw_os_error().is_some_and(|raw| refusals.contains(&Errno::from_raw(raw)))
}

/// Whether the error means that the disk is full.
fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use vtrace_common::ids::Cpu;

    use super::*;
    use crate::trace::format::areas::WriteState;

    const UNIT: u64 = 4096;
    const AREA: u64 = 64 * UNIT;
    const COUNTS: [u64; 4] = [9, 0, 17, 1];

    fn content(lane: u64) -> Vec<u8> {
        (0..COUNTS[usize::try_from(lane).unwrap()])
            .flat_map(|page| vec![u8::try_from(lane * 40 + page + 1).unwrap(); 4096])
            .collect()
    }

    fn recorded(file: &File) -> Areas {
        file.set_len(5 * AREA).unwrap();
        let mut lanes = Vec::new();
        for index in 0..4 {
            let rest = Extent { offset: AREA * (index + 1), bytes: COUNTS[usize::try_from(index).unwrap()] * UNIT };
            file.write_all_at(&content(index), rest.offset).unwrap();
            lanes.push(LaneArea {
                cpu: Cpu(u32::try_from(index).unwrap()),
                moved: Extent::default(),
                rest,
                is_hosted: false,
            });
        }
        Areas {
            state: WriteState::Closed,
            page_bytes: 4096,
            file_bytes: 5 * AREA,
            pending: Extent::default(),
            early_at: 0,
            newest_bytes: 0,
            lanes,
        }
    }

    fn assert_whole(file: &File, areas: &Areas) {
        for (index, lane) in (0..).zip(&areas.lanes) {
            let mut found = Vec::new();
            for extent in [lane.moved, lane.rest] {
                let mut bytes = vec![0; usize::try_from(extent.bytes).unwrap()];
                if extent.bytes > 0 {
                    file.read_exact_at(&mut bytes, extent.offset).unwrap();
                }
                found.extend(bytes);
            }
            assert!(found == content(index), "lane {index}: {areas:?}");
        }
    }

    /// Stops at every save in turn, as a crash would, and looks for all pages where the last save says they are.
    fn crash_everywhere(folder: &Path, expected: Compaction) {
        for limit in 0.. {
            let file = tempfile::tempfile_in(folder).unwrap();
            let mut areas = recorded(&file);
            let (mut saves, mut saved) = (0, areas.clone());
            let mut save = |areas: &Areas| {
                saves += 1;
                if saves > limit {
                    return Err(io::Error::other("crash"));
                }
                saved = areas.clone();
                Ok(())
            };
            let (step_bytes, copy_bytes_max) = (2 * UNIT, COPY_BYTES_MAX);
            let mut collapse =
                Collapse { file: &file, areas: &mut areas, unit: UNIT, step_bytes, copy_bytes_max, save: &mut save };
            let result = collapse.run(UNIT);
            let file_bytes = file.metadata().unwrap().len();
            assert_whole(&file, &saved.settle(file_bytes));
            if let Ok(compaction) = result {
                assert_whole(&file, &areas);
                assert_eq!((compaction, areas.file_bytes, file_bytes), (expected, 28 * UNIT, 28 * UNIT));
                assert!(limit > 4, "it was interrupted {limit} times");
                return;
            }
        }
    }

    #[test]
    fn pages_are_found_after_a_crash_at_any_step_of_copying() {
        crash_everywhere(Path::new("/dev/shm"), Compaction::Copied);
    }

    #[test]
    fn pages_are_found_after_a_crash_at_any_step_of_a_collapse() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        let probe = tempfile::tempfile_in(folder).unwrap();
        probe.set_len(1 << 20).unwrap();
        let hole = Extent { offset: 4096, bytes: 4096 };
        match allocate(&probe, FallocateFlags::FALLOC_FL_COLLAPSE_RANGE, hole) {
            Ok(()) => crash_everywhere(folder, Compaction::Collapsed),
            Err(error) => {
                assert!(is_refusal(&error), "{error}");
                crash_everywhere(folder, Compaction::Copied);
            }
        }
    }
}
