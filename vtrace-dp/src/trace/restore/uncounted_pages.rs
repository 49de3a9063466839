//! The uncounted pages of a lane: what a crash left in its area.
//!
//! In:    an area of a file, the size of a page
//! Out:   runs of adjacent whole pages; then the lane in a form that a file can hold ([`FoundLane`])
//! Runs:  on any thread; holds one chunk of pages in memory. Time grows with the bytes present: holes cost nothing
//! Full:  pages beyond the bounds (number of runs, bytes of gaps) are left out and counted
//! Trust: nothing: a page counts as whole if its header is sane and its events can be walked to the end
//!
//! A page that was never written reads as zeros, and so does the missing part of a page that was written partly: its
//! events cannot be walked. With several writes in flight, the last pages of a lane can have gaps between them. A lane
//! in a file has no gaps: a gap is filled with pages without events, and the page after it says that events are missing.

use vtrace_common::page::{HEADER_BYTES, Header, MISSED_EVENTS};

use crate::{
    ftrace::events::Events,
    trace::{
        format::areas::Extent,
        read::input::{Input, ReadFault, Source},
    },
};

/// Bytes read at a time.
const CHUNK_BYTES: usize = 1 << 20;
/// Runs of one lane.
const RUNS_MAX: usize = 4096;
/// Most bytes of gaps per lane that are filled with empty pages. Writes in flight never leave more.
const GAP_BYTES_MAX: u64 = 64 << 20;

/// Adjacent whole pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageRun {
    /// Where they are.
    pub extent: Extent,
    /// Time stamp of the first page.
    pub first: u64,
    /// Time stamp of the last page.
    pub last: u64,
}

/// What is in an area.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Scan {
    /// Whole pages.
    pub runs: Vec<PageRun>,
    /// Pages that were written partly.
    pub torn: u64,
    /// Whole pages older than the preceding one.
    pub backward: u64,
    /// The area has more runs than [`RUNS_MAX`]: the rest was not scanned.
    pub cut: bool,
}

/// A lane in a form that a file can hold.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct FoundLane {
    /// Its older pages, if it wrapped to its area's start.
    pub older: Extent,
    /// Its newer pages; all of them, if it did not wrap.
    pub newer: Extent,
    /// Pages without events that fill gaps: offset and time.
    pub fillers: Vec<(u64, u64)>,
    /// Offsets of whole pages after a gap, to be marked.
    pub marks: Vec<u64>,
    /// Whole pages.
    pub pages: u64,
    /// Pages in gaps.
    pub missing: u64,
    /// Whole pages that are left out: those after a gap that is too wide.
    pub left_out: u64,
}

enum Page {
    Empty,
    Torn,
    Whole(u64),
}

fn look(page: &[u8]) -> Page {
    match Header::parse(page, page.len()) {
        Ok(header) if header.data_bytes == 0 => Page::Empty,
        Ok(header) if header.time > 0 && is_whole(page) => Page::Whole(header.time),
        _ => Page::Torn,
    }
}

fn is_whole(page: &[u8]) -> bool {
    Events::new(page).is_ok_and(|mut events| events.all(|event| event.is_ok()))
}

/// Scans every page of an area.
///
/// # Errors
/// The file cannot be read.
pub fn scan<S: Source>(source: &S, area: Extent, page_bytes: u32) -> Result<Scan, ReadFault> {
    let page = u64::from(page_bytes);
    let page_len = usize::try_from(page_bytes).expect("usize is 64 bits");
    let end = area.end().min(source.bytes());
    let end = area.offset + end.saturating_sub(area.offset) / page * page;
    let (mut found, mut at) = (Scan::default(), area.offset);
    while at < end && !found.cut {
        let data = source.data_at(at);
        at += data.saturating_sub(at) / page * page;
        let chunk = u64::try_from(CHUNK_BYTES).expect("a chunk fits").max(page).min(end.saturating_sub(at));
        let pages = Input::new(source, at, end).bytes(chunk, CHUNK_BYTES.max(page_len), "pages")?;
        for bytes in pages.chunks_exact(page_len) {
            found.add(at, page, &look(bytes));
            at += page;
        }
    }
    Ok(found)
}

impl Scan {
    fn add(&mut self, at: u64, page: u64, what: &Page) {
        let time = match what {
            Page::Empty => return,
            Page::Torn => return self.torn += 1,
            Page::Whole(time) => *time,
        };
        if let Some(run) = self.runs.last_mut() {
            self.backward += u64::from(time < run.last);
            // A step back in time is where the lane wrapped: a run ends there, so that the lane can be cut.
            if run.extent.end() == at && time >= run.last {
                (run.extent.bytes, run.last) = (run.extent.bytes + page, time);
                return;
            }
        }
        if self.runs.len() == RUNS_MAX {
            self.cut = true;
            return;
        }
        self.runs.push(PageRun { extent: Extent { offset: at, bytes: page }, first: time, last: time });
    }

    /// The lane in the form that a file holds. `unit`: lanes begin at its multiples; `newest`: the lane kept its newest
    /// pages only; `room_end`: where the area of the next lane begins.
    pub fn lane(&self, area: Extent, page: u64, unit: u64, newest: bool, room_end: u64) -> FoundLane {
        let mut lane = FoundLane::default();
        let mut back = (1..self.runs.len()).filter(|at| newest && self.runs[*at].first < self.runs[*at - 1].last);
        // Writes in flight may have left new pages among old ones where the lane wrapped: these are left out.
        let first = back.next().unwrap_or(self.runs.len());
        let (newer, older) = (&self.runs[..first], after_wide_gap(&self.runs[back.next_back().unwrap_or(first)..]));
        let mut room = GAP_BYTES_MAX;
        lane.older = lane.put(older, page, (area.offset, unit), &mut room);
        lane.newer = lane.put(newer, page, (area.offset, unit), &mut room);
        if !newest && lane.newer.bytes > 0 {
            lane.missing += (lane.newer.offset - area.offset.min(lane.newer.offset)) / page;
            if lane.newer.offset > area.offset {
                lane.marks.push(lane.newer.offset);
            }
        }
        if lane.older.bytes > 0 && lane.older.end().saturating_add(lane.newer.bytes) > room_end {
            // The newer pages alone are more than was to be kept.
            lane.pages -= older.iter().map(|run| run.extent.bytes / page).sum::<u64>().min(lane.pages);
            lane.older = Extent::default();
        }
        lane
    }
}

/// The runs after the last wide gap: where a lane's older pages have a hole, those after it are newer.
fn after_wide_gap(runs: &[PageRun]) -> &[PageRun] {
    let wide = |pair: &[PageRun]| pair[1].extent.offset - pair[0].extent.end() > GAP_BYTES_MAX;
    &runs[runs.windows(2).rposition(wide).map_or(0, |at| at + 1)..]
}

/// The time of a page, if the page is whole.
pub fn whole_at(page: &[u8]) -> Option<u64> {
    match look(page) {
        Page::Whole(time) => Some(time),
        Page::Empty | Page::Torn => None,
    }
}

impl FoundLane {
    /// Joins runs into one stretch, as long as the gaps between them fit into `room`.
    fn put(&mut self, runs: &[PageRun], page: u64, (least, unit): (u64, u64), room: &mut u64) -> Extent {
        let Some(first) = runs.first() else { return Extent::default() };
        let offset = (first.extent.offset / unit * unit).max(least);
        let mut whole = Extent { offset, bytes: 0 };
        let mut time = first.first;
        for (index, run) in runs.iter().enumerate() {
            let gap = run.extent.offset - whole.end();
            if gap > *room {
                self.left_out += runs[index..].iter().map(|run| run.extent.bytes / page).sum::<u64>();
                break;
            }
            *room -= gap;
            self.missing += gap / page;
            let pages = (whole.end()..run.extent.offset).step_by(usize::try_from(page).expect("a page fits"));
            self.fillers.extend(pages.map(|at| (at, time)));
            if gap > 0 {
                self.marks.push(run.extent.offset);
            }
            whole.bytes += gap + run.extent.bytes;
            self.pages += run.extent.bytes / page;
            time = run.last;
        }
        whole
    }
}

/// The header of a page without events.
pub(crate) fn filler(time: u64) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(&time.to_le_bytes());
    header
}

/// `commit` with the mark that events before the page are missing; `None` if it has the mark already.
pub(crate) fn marked(commit: u64) -> Option<u64> {
    (commit & MISSED_EVENTS == 0).then_some(commit | MISSED_EVENTS)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::trace::format::section::bytes_of;

    const PAGE: u64 = 4096;

    /// A page with one event of four bytes.
    fn page(time: u64) -> Vec<u8> {
        let mut page = [time.to_le_bytes(), 8u64.to_le_bytes()].concat();
        page.extend([1u32.to_le_bytes(), 7u32.to_le_bytes()].concat());
        page.resize(4096, 0);
        page
    }

    /// 0: never written, 1: torn, else a page of that time.
    fn file(times: &[u64]) -> Vec<u8> {
        let of = |time: &u64| match time {
            0 => vec![0; 4096],
            1 => [5u64.to_le_bytes(), 80u64.to_le_bytes()].concat().into_iter().chain(vec![0; 4080]).collect(),
            time => page(*time),
        };
        times.iter().flat_map(of).collect()
    }

    fn lane(times: &[u64], newest: bool) -> (Scan, FoundLane) {
        let bytes = file(times);
        let area = Extent { offset: 0, bytes: bytes_of(&bytes) };
        let scan = scan(&bytes.as_slice(), area, 4096).unwrap();
        let lane = scan.lane(area, PAGE, PAGE, newest, 2 * area.bytes);
        (scan, lane)
    }

    #[test]
    fn lane_ends_with_its_last_whole_page() {
        let (scan, lane) = lane(&[10, 11, 12, 1, 0, 0], false);
        assert_eq!((scan.torn, lane.pages, lane.missing), (1, 3, 0));
        assert_eq!(lane.newer, Extent { offset: 0, bytes: 3 * PAGE });
        assert!(lane.fillers.is_empty() && lane.marks.is_empty());
    }

    #[test]
    fn gap_is_filled_and_the_page_after_it_is_marked() {
        let (_, lane) = lane(&[10, 0, 1, 13, 14], false);
        assert_eq!((lane.pages, lane.missing), (3, 2));
        assert_eq!(lane.newer, Extent { offset: 0, bytes: 5 * PAGE });
        assert_eq!((lane.fillers, lane.marks), (vec![(PAGE, 10), (2 * PAGE, 10)], vec![3 * PAGE]));
    }

    #[test]
    fn lane_whose_first_pages_never_came_begins_later() {
        let (_, lane) = lane(&[0, 0, 13, 14], false);
        assert_eq!((lane.pages, lane.missing), (2, 2));
        assert_eq!((lane.newer, lane.marks), (Extent { offset: 2 * PAGE, bytes: 2 * PAGE }, vec![2 * PAGE]));
    }

    #[test]
    fn lane_that_began_again_is_put_in_order() {
        let (_, lane) = lane(&[20, 21, 0, 0, 17, 18, 19], true);
        assert_eq!((lane.pages, lane.missing), (5, 0));
        assert_eq!(lane.older, Extent { offset: 4 * PAGE, bytes: 3 * PAGE });
        assert_eq!(lane.newer, Extent { offset: 0, bytes: 2 * PAGE });
        let (_, full) = self::lane(&[20, 21, 15, 16, 17], true);
        assert_eq!((full.older.offset, full.newer.bytes), (2 * PAGE, 2 * PAGE), "without a hole between them");
    }

    #[test]
    fn new_pages_among_old_ones_where_the_lane_came_round_are_left_out() {
        let (_, lane) = lane(&[20, 21, 10, 23, 12, 13, 14], true);
        assert_eq!(lane.newer, Extent { offset: 0, bytes: 2 * PAGE });
        assert_eq!(lane.older, Extent { offset: 4 * PAGE, bytes: 3 * PAGE });
    }

    #[test]
    fn oldest_unpunched_pages_give_way_to_those_after_the_hole() {
        let mut times = vec![20, 21, 10, 11];
        times.extend(vec![0; usize::try_from(GAP_BYTES_MAX / PAGE).unwrap() + 1]);
        times.extend([12, 13]);
        let (_, lane) = lane(&times, true);
        assert_eq!(lane.newer, Extent { offset: 0, bytes: 2 * PAGE });
        let end = u64::try_from(times.len()).unwrap() * PAGE;
        assert_eq!(lane.older, Extent { offset: end - 2 * PAGE, bytes: 2 * PAGE });
    }

    #[test]
    fn gap_wider_than_writes_in_flight_leave_ends_the_lane() {
        let mut times = vec![10, 11];
        times.extend(vec![0; usize::try_from(GAP_BYTES_MAX / PAGE).unwrap() + 1]);
        times.extend([12, 13, 14]);
        let (_, lane) = lane(&times, false);
        assert_eq!((lane.pages, lane.missing, lane.left_out, lane.newer.bytes), (2, 0, 3, 2 * PAGE));
    }

    proptest! {
        #[test]
        fn every_whole_page_is_kept_in_order_of_place(times in prop::collection::vec(prop_oneof![Just(0u64), Just(1), 2..99u64], 0..40)) {
            let (scan, lane) = lane(&times, false);
            let whole = times.iter().filter(|time| **time > 1).count() as u64;
            let scanned: u64 = scan.runs.iter().map(|run| run.extent.bytes / PAGE).sum();
            prop_assert_eq!((scanned, lane.pages), (whole, whole));
            let end = times.iter().rposition(|time| *time > 1).map_or(0, |at| at as u64 + 1);
            prop_assert_eq!(lane.pages + lane.missing, end);
            prop_assert!(lane.newer.bytes == 0 || lane.newer.end() == end * PAGE);
        }

        #[test]
        fn any_bytes_give_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..20_000), offset in 0u64..9000) {
            let area = Extent { offset, bytes: 1 << 40 };
            let scan = scan(&bytes.as_slice(), area, 4096).unwrap();
            let _ = scan.lane(area, PAGE, 3 * PAGE, true, u64::MAX);
        }
    }
}
