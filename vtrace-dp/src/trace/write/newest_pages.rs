//! Which pages of a lane stay when only the newest are wanted.
//!
//! In:    the bytes of an area, how many of the newest to keep; how many were written
//! Out:   which stretch is too old and can be punched out; where the kept pages are
//! Runs:  beside the writer of a lane, which begins again at its area's start ([`Area::begins_again`]); pure
//! Full:  never: by the time a lane wraps, everything it overwrites is too old
//!
//! At least `newest_bytes` stay, and at most one step more: one call punches out one step. [`kept`] computes where the
//! pages are from the byte count alone, so the writer and the finisher share no state.
//!
//! The puncher learns late how much was written, and must not punch pages that were overwritten meanwhile: it leaves
//! alone the next [`LATE_BYTES`] of an area, and does not punch an area that is not much larger than that. Such an
//! area is overwritten instead, and never grows.
//!
//! [`Area::begins_again`]: vtrace_common::wire::client::Area::begins_again

use crate::trace::format::areas::Extent;

/// Smallest step: a hole costs a system call and a change of the file's extent map.
const STEP_BYTES_MIN: u64 = 1 << 20;
/// A step is one part in so many of the kept bytes, but at least the smallest step.
const STEPS: u64 = 8;
/// The most that one lane may have in flight or queued: two writes must not overlap.
const FLIGHT_BYTES: u64 = 64 << 20;
/// More than one CPU can trace between two reads of the byte count.
const LATE_BYTES: u64 = 1 << 30;

/// What is punched out of one lane. Offsets are bytes from the start of its area.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Newest {
    area_bytes: u64,
    newest_bytes: u64,
    step_bytes: u64,
    late_bytes: u64,
    written: u64,
    punched: u64,
}

/// Where the pages of a lane are at its end: first `older`, then `newer` (both may be empty). Offsets are bytes from
/// the start of its area.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Kept {
    /// Pages written before the wrap: from `offset` to the area's end.
    pub older: Extent,
    /// Up to the last page.
    pub newer: Extent,
}

/// The smallest area that keeps `newest_bytes` while more are being written.
pub fn area_bytes_min(newest_bytes: u64, unit: u64) -> u64 {
    (newest_bytes + 3 * step_bytes(newest_bytes, unit) + FLIGHT_BYTES).next_multiple_of(unit)
}

/// Bytes after an area that its pages may need at the end, when they are put in order.
pub fn slack_bytes(newest_bytes: u64, unit: u64) -> u64 {
    (newest_bytes + step_bytes(newest_bytes, unit)).next_multiple_of(unit)
}

/// `unit`: holes have to begin and end at its multiples.
fn step_bytes(newest_bytes: u64, unit: u64) -> u64 {
    (newest_bytes / STEPS).max(STEP_BYTES_MIN).next_multiple_of(unit)
}

/// Where the kept pages of a lane are, once `written` bytes were written in all.
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
        Self::late_by(LATE_BYTES, area_bytes, newest_bytes, unit)
    }

    fn late_by(late_bytes: u64, area_bytes: u64, newest_bytes: u64, unit: u64) -> Self {
        let step_bytes = step_bytes(newest_bytes, unit);
        Self { area_bytes, newest_bytes, step_bytes, late_bytes, written: 0, punched: 0 }
    }

    /// A stretch that is too old and can be punched out (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE), once that is a
    /// step or more; call again until it gives `None`. `written`: bytes written in all, as last read.
    pub fn too_old(&mut self, written: u64) -> Option<Extent> {
        self.written = self.written.max(written);
        let Self { area_bytes, newest_bytes, step_bytes, late_bytes, .. } = *self;
        if area_bytes < newest_bytes + 3 * step_bytes + late_bytes {
            return None;
        }
        // What was overwritten, or may have been by now.
        let again = (self.written + late_bytes).saturating_sub(area_bytes).next_multiple_of(step_bytes);
        self.punched = self.punched.max(again);
        let from = self.written.saturating_sub(newest_bytes) / step_bytes * step_bytes;
        if from <= self.punched {
            return None;
        }
        let offset = self.punched % area_bytes;
        let old = Extent { offset, bytes: (from - self.punched).min(area_bytes - offset) };
        self.punched += old.bytes;
        Some(old)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = 4096;
    const LATE: u64 = 64 * PAGE;

    /// A file as a list of page numbers; the puncher learns late how many were written.
    struct WrappingLane {
        newest: Newest,
        pages: Vec<Option<u64>>,
        count: u64,
    }

    impl WrappingLane {
        fn new(newest_bytes: u64, spare: u64) -> Self {
            let step = step_bytes(newest_bytes, PAGE);
            let area_bytes = newest_bytes + 3 * step + LATE + spare * PAGE;
            let newest = Newest::late_by(LATE, area_bytes, newest_bytes, PAGE);
            Self { newest, pages: vec![None; usize::try_from(area_bytes / PAGE).unwrap()], count: 0 }
        }

        fn write(&mut self, pages: u64) {
            for _ in 0..pages {
                let at = usize::try_from(self.count).unwrap() % self.pages.len();
                self.pages[at] = Some(self.count);
                self.count += 1;
            }
        }

        /// Punches what was too old when `written` pages were there.
        fn punch(&mut self, written: u64) {
            while let Some(old) = self.newest.too_old(written * PAGE) {
                assert!(old.offset % PAGE == 0 && old.bytes > 0);
                for page in old.offset / PAGE..old.end() / PAGE {
                    self.pages[usize::try_from(page).unwrap()] = None;
                }
            }
        }
    }

    proptest! {
        #[test]
        fn newest_pages_stay_in_order_and_all_others_go(
            newest in 1u64..2000, spare in 0u64..700, writes in prop::collection::vec((1u64..3000, 0u64..64), 0..30),
        ) {
            let newest_bytes = newest * PAGE;
            let mut lane = WrappingLane::new(newest_bytes, spare);
            for (pages, later) in writes {
                lane.write(pages);
                let seen = lane.count;
                // The lane goes on writing before the puncher starts.
                lane.write(later);
                lane.punch(seen);
            }
            let written = lane.count * PAGE;
            let Kept { older, newer } = kept(lane.newest.area_bytes, newest_bytes, PAGE, written);
            let found: Vec<u64> = [older, newer]
                .into_iter()
                .flat_map(|part| part.offset / PAGE..part.end() / PAGE)
                .map(|page| lane.pages[usize::try_from(page).unwrap()].expect("a kept page is there"))
                .collect();
            let first = lane.count - u64::try_from(found.len()).unwrap();
            prop_assert!(found.into_iter().eq(first..lane.count), "the last ones, in their order");
            prop_assert!(lane.count - first >= newest.min(lane.count), "at least what is wanted");
            let more = lane.newest.step_bytes + PAGE;
            prop_assert!((lane.count - first) * PAGE < newest_bytes + more, "at most a step more");
            let there = u64::try_from(lane.pages.iter().flatten().count()).unwrap() * PAGE;
            prop_assert!(there < newest_bytes + more + 2 * LATE + lane.newest.step_bytes, "nothing else takes room");
        }
    }

    #[test]
    fn lane_that_never_filled_keeps_everything() {
        let mut lane = WrappingLane::new(100 * PAGE, 0);
        lane.write(99);
        lane.punch(99);
        assert!(lane.pages[..99].iter().all(Option::is_some));
        let kept = kept(lane.newest.area_bytes, 100 * PAGE, PAGE, 99 * PAGE);
        assert_eq!(kept.newer, Extent { offset: 0, bytes: 99 * PAGE });
    }

    #[test]
    fn area_that_is_hardly_larger_than_what_is_kept_is_overwritten_and_not_punched() {
        let mut newest = Newest::new(area_bytes_min(1 << 20, PAGE), 1 << 20, PAGE);
        assert_eq!(newest.too_old(1 << 40), None);
        let mut newest = Newest::new(2 << 30, 1 << 20, PAGE);
        assert_eq!(newest.too_old(3 << 20), Some(Extent { offset: 0, bytes: 2 << 20 }));
    }
}
