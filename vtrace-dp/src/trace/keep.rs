//! Which pages of a lane stay when only the newest are wanted.
//!
//! In:    how many bytes an area has, how many of the newest shall stay; every write
//! Out:   where the next write goes, which stretch is too old and can be punched out, where the kept pages are
//! Runs:  with the writer of a lane; pure
//! Full:  never: at the end of its area a lane begins again at the start, where all is too old by then
//!
//! At least `newest_bytes` stay, at most a step ([`Newest::step_bytes`]) more: a step is what one hole costs one call
//! for. [`kept`] says from the number of bytes alone where the pages are, so writer and finisher need not meet.

use super::areas::Extent;

/// Smallest step: a hole costs a call and a change of the file's map.
const STEP_BYTES_MIN: u64 = 1 << 20;
/// A step is this part of what is kept, or the smallest step.
const STEPS: u64 = 8;

/// How one lane keeps its newest pages. Offsets are bytes from the start of its area.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Newest {
    area_bytes: u64,
    newest_bytes: u64,
    step_bytes: u64,
    written: u64,
    punched: u64,
}

/// Where the pages of a lane are at its end: first `older`, then `newer` (both may be empty). Offsets are bytes from
/// the start of its area.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Kept {
    /// Behind a wrap: from somewhere to the area's end.
    pub older: Extent,
    /// Up to the last page.
    pub newer: Extent,
}

/// What an area needs at least to keep so many bytes.
pub fn area_bytes_min(newest_bytes: u64, unit: u64) -> u64 {
    (newest_bytes + 3 * step_bytes(newest_bytes, unit)).next_multiple_of(unit)
}

/// Bytes behind an area that its pages may need to be put in order at the end.
pub fn slack_bytes(newest_bytes: u64, unit: u64) -> u64 {
    (newest_bytes + step_bytes(newest_bytes, unit)).next_multiple_of(unit)
}

/// `unit`: holes have to begin and end at its multiples.
fn step_bytes(newest_bytes: u64, unit: u64) -> u64 {
    (newest_bytes / STEPS).max(STEP_BYTES_MIN).next_multiple_of(unit)
}

/// Where the pages of a lane are that has written `written` bytes in all.
pub fn kept(area_bytes: u64, newest_bytes: u64, unit: u64, written: u64) -> Kept {
    let step = step_bytes(newest_bytes, unit);
    let from = written.saturating_sub(newest_bytes) / step * step;
    let (begin, end) = (from % area_bytes, written % area_bytes);
    if written / area_bytes == from / area_bytes {
        return Kept { older: Extent::default(), newer: Extent { offset: begin, bytes: end - begin } };
    }
    let older = Extent { offset: begin, bytes: area_bytes - begin };
    Kept { older, newer: Extent { offset: 0, bytes: end } }
}

impl Newest {
    /// A lane that has written nothing. `area_bytes` is a multiple of the page and at least [`area_bytes_min`].
    pub fn new(area_bytes: u64, newest_bytes: u64, unit: u64) -> Self {
        assert!(area_bytes >= area_bytes_min(newest_bytes, unit), "an area holds what is kept and three steps");
        Self { area_bytes, newest_bytes, step_bytes: step_bytes(newest_bytes, unit), written: 0, punched: 0 }
    }

    /// Bytes that were written in all.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Bytes of one step.
    pub fn step_bytes(&self) -> u64 {
        self.step_bytes
    }

    /// Where the next write goes, and how long it may be at most: up to the area's end, or to what must not be
    /// overwritten as long as [`wrote`](Self::wrote) has not been asked again. Hot.
    pub fn place(&self) -> Extent {
        let at = self.written % self.area_bytes;
        let free = self.area_bytes - (self.written - self.punched);
        Extent { offset: at, bytes: (self.area_bytes - at).min(free) }
    }

    /// `bytes` more are in the file. If that made a step of pages too old: the stretch to punch out
    /// (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE); call again with 0 until there is none. Hot.
    pub fn wrote(&mut self, bytes: u64) -> Option<Extent> {
        self.written += bytes;
        let from = self.written.saturating_sub(self.newest_bytes) / self.step_bytes * self.step_bytes;
        if from == self.punched {
            return None;
        }
        let offset = self.punched % self.area_bytes;
        let old = Extent { offset, bytes: (from - self.punched).min(self.area_bytes - offset) };
        self.punched += old.bytes;
        Some(old)
    }

    /// Where the kept pages are now.
    pub fn kept(&self) -> Kept {
        let (begin, end) = (self.punched % self.area_bytes, self.written % self.area_bytes);
        if self.punched / self.area_bytes == self.written / self.area_bytes {
            return Kept { older: Extent::default(), newer: Extent { offset: begin, bytes: end - begin } };
        }
        let older = Extent { offset: begin, bytes: self.area_bytes - begin };
        Kept { older, newer: Extent { offset: 0, bytes: end } }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = 4096;

    /// A file that is a list of page numbers.
    fn written(newest_bytes: u64, spare: u64, writes: &[u64]) -> (Newest, Vec<Option<u64>>, u64) {
        let area_bytes = area_bytes_min(newest_bytes, PAGE) + spare * PAGE;
        let mut lane = Newest::new(area_bytes, newest_bytes, PAGE);
        let mut pages = vec![None; usize::try_from(area_bytes / PAGE).unwrap()];
        let mut next = 0;
        for count in writes {
            let mut left = count * PAGE;
            while left > 0 {
                let place = lane.place();
                let bytes = left.min(place.bytes);
                assert!(bytes > 0, "there is always room");
                for page in place.offset / PAGE..(place.offset + bytes) / PAGE {
                    pages[usize::try_from(page).unwrap()] = Some(next);
                    next += 1;
                }
                left -= bytes;
                let mut punch = lane.wrote(bytes);
                while let Some(old) = punch {
                    assert!(old.offset % PAGE == 0 && old.bytes > 0);
                    for page in old.offset / PAGE..old.end() / PAGE {
                        pages[usize::try_from(page).unwrap()] = None;
                    }
                    punch = lane.wrote(0);
                }
            }
        }
        (lane, pages, next)
    }

    proptest! {
        #[test]
        fn newest_pages_stay_in_order_and_all_others_go(
            newest in 1u64..2000, spare in 0u64..700, writes in prop::collection::vec(1u64..900, 0..30),
        ) {
            let newest_bytes = newest * PAGE;
            let (lane, pages, count) = written(newest_bytes, spare, &writes);
            let Kept { older, newer } = lane.kept();
            prop_assert_eq!(kept(lane.area_bytes, newest_bytes, PAGE, lane.written), lane.kept());
            let found: Vec<u64> = [older, newer]
                .into_iter()
                .flat_map(|part| part.offset / PAGE..part.end() / PAGE)
                .map(|page| pages[usize::try_from(page).unwrap()].expect("a kept page is there"))
                .collect();
            let first = count - u64::try_from(found.len()).unwrap();
            prop_assert!(found.into_iter().eq(first..count), "the last ones, in their order");
            prop_assert!(count - first >= newest.min(count), "at least what is wanted");
            prop_assert!((count - first) * PAGE < newest_bytes + lane.step_bytes() + PAGE, "at most a step more");
            let there = pages.iter().flatten().count();
            prop_assert_eq!(u64::try_from(there).unwrap(), count - first, "nothing else takes room");
        }
    }

    #[test]
    fn lane_that_never_filled_keeps_everything() {
        let (lane, _, count) = written(100 * PAGE, 0, &[40, 59]);
        assert_eq!((lane.kept().newer, count), (Extent { offset: 0, bytes: 99 * PAGE }, 99));
    }
}
