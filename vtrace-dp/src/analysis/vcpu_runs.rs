//! When vCPUs ran, and where their TSCs were found changed: from the host's pages, before these are a file.
//!
//! In:    the host's pages in their areas; stretches of time, threads
//! Out:   [`Doings`]: runs, gaps, announced changes
//! Runs:  on the caller's thread, when the host has stopped; reads only the pages of the stretches that are asked for
//! Full:  [`BOUNDARIES_MAX`] boundaries are held; of what is behind them nothing is known
//! Trust: the host's kernel

use std::collections::HashMap;

use vtrace_common::time::HostTsc;

use crate::{
    analysis::{
        host_lanes::{BOUNDARIES_MAX, Decoders, Did},
        windows::{Gaps, Windows},
    },
    clock::{math::HostRange, segment::Runs},
    trace::read::{
        LaneData, Pages, WalkFault,
        input::FileSource,
        merge::{Merge, Merged},
        times::Stamps,
    },
};

/// Stretches that are closer than this are read as one, cycles.
const APART_MIN: u64 = 1 << 20;
/// An announced change is written so long after it was seen at most, cycles: an interrupt may come between.
const ANNOUNCED_WITHIN: u64 = 1 << 24;

/// The host's pages.
pub(crate) struct HostLanes {
    /// The host's file.
    pub(crate) source: FileSource,
    /// Where the pages of each CPU lie in it.
    pub(crate) lanes: Vec<LaneData>,
    /// Of each page.
    pub(crate) page_bytes: u32,
    /// Reads the events of the host's kernel.
    pub(crate) decoders: Decoders,
    /// While the host was traced.
    pub(crate) traced: HostRange,
}

impl HostLanes {
    /// What these threads did in these stretches.
    ///
    /// # Errors
    /// A page cannot be read or is broken.
    pub(crate) fn look(&self, wanted: &[HostRange], threads: &[u32]) -> Result<Doings, WalkFault> {
        let mut doings = Doings { knows_runs: self.decoders.know_runs(), ..Doings::default() };
        threads.iter().for_each(|thread| drop(doings.windows.insert(*thread, Windows::default())));
        for stretch in joined(wanted, self.traced) {
            let (from, to) = (stretch.low.0, stretch.high.0);
            let pages = |lane: &LaneData| {
                Ok((lane.cpu, Stamps::default(), Pages::between(&self.source, lane, self.page_bytes, from, to)?))
            };
            let pages = self.lanes.iter().map(pages).collect::<Result<Vec<_>, WalkFault>>()?;
            let mut merge = Merge::of(pages)?;
            while let Some(event) = merge.next_event()? {
                doings.take(&event, &self.decoders, stretch);
            }
        }
        doings.gaps.settle();
        Ok(doings)
    }
}

/// Stretches in order and apart, within `bounds`.
fn joined(wanted: &[HostRange], bounds: HostRange) -> Vec<HostRange> {
    let mut all: Vec<HostRange> = wanted.iter().copied().filter(|range| range.meets(bounds)).collect();
    all.sort_unstable_by_key(|range| range.low);
    let mut joined: Vec<HostRange> = Vec::new();
    for range in all {
        let range = HostRange { low: range.low.max(bounds.low), high: range.high.min(bounds.high) };
        match joined.last_mut() {
            Some(last) if range.low.0 <= last.high.0.saturating_add(APART_MIN) => last.high = last.high.max(range.high),
            _ => joined.push(range),
        }
    }
    joined
}

/// A change that our eBPF program wrote into the host's trace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Announced {
    at: HostTsc,
    thread: u32,
    offset: u64,
    ratio: u64,
}

/// What threads did in the stretches that were asked for.
#[derive(Debug, Default)]
pub(crate) struct Doings {
    windows: HashMap<u32, Windows>,
    gaps: Gaps,
    announced: Vec<Announced>,
    knows_runs: bool,
    boundaries: usize,
}

impl Doings {
    fn take(&mut self, event: &Merged<'_>, decoders: &Decoders, stretch: HostRange) {
        let is_inside = (stretch.low.0..=stretch.high.0).contains(&event.time);
        if let Some(since) = event.lost_since {
            let low = since.max(stretch.low.0);
            self.gaps.push(low, event.time.max(low));
        }
        let Some((thread, did)) = decoders.read(event.data).filter(|_| is_inside) else { return };
        match did {
            Did::Enter(_) => self.bound(thread, event.time, true),
            Did::Leave => self.bound(thread, event.time, false),
            Did::Announce { offset, ratio } => {
                self.announced.push(Announced { at: HostTsc(event.time), thread, offset, ratio });
            }
            Did::Switch(..) | Did::Cause(..) => {}
        }
    }

    fn bound(&mut self, thread: u32, time: u64, opens: bool) {
        let Some(windows) = self.windows.get_mut(&thread).filter(|_| self.boundaries < BOUNDARIES_MAX) else { return };
        windows.push(time, opens);
        self.boundaries += 1;
    }

    /// The runs of a thread in these stretches, as far as they are known.
    pub(crate) fn runs(&self, thread: u32, wanted: &[HostRange]) -> Runs {
        let (mut runs, mut known) = (Vec::new(), Vec::new());
        let range = |(low, high): (u64, u64)| HostRange { low: HostTsc(low), high: HostTsc(high) };
        let windows = self.windows.get(&thread).filter(|_| self.knows_runs);
        for wanted in windows.iter().flat_map(|_| wanted) {
            let found =
                windows.map(|windows| windows.known(&self.gaps, wanted.low.0, wanted.high.0)).unwrap_or_default();
            runs.extend(found.inside.into_iter().map(range));
            known.extend(found.stretches.into_iter().map(range));
        }
        Runs::new(runs, known)
    }

    /// When a thread announced that it had found this state, around `seen`: no code of the guest ran between the reading
    /// and that.
    pub(crate) fn announced(&self, thread: u32, (offset, ratio): (u64, u64), seen: HostRange) -> Option<HostTsc> {
        let until = seen.high.0.saturating_add(ANNOUNCED_WITHIN);
        let from = self.announced.partition_point(|announced| announced.at < seen.low);
        let near = self.announced[from..].iter().take_while(|announced| announced.at.0 <= until);
        let same =
            |announced: &&Announced| (announced.thread, announced.offset, announced.ratio) == (thread, offset, ratio);
        near.into_iter().find(same).map(|announced| announced.at)
    }
}

/// The stretch in which a state that was seen at `seen` is announced.
pub(crate) fn around(seen: HostRange) -> HostRange {
    let (low, high) = (seen.low.0.saturating_sub(ANNOUNCED_WITHIN), seen.high.0.saturating_add(ANNOUNCED_WITHIN));
    HostRange { low: HostTsc(low), high: HostTsc(high) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(low: u64, high: u64) -> HostRange {
        HostRange { low: HostTsc(low), high: HostTsc(high) }
    }

    #[test]
    fn stretches_are_in_order_apart_and_within_the_trace() {
        let far = 10 * APART_MIN;
        let wanted = [range(far, far + 5), range(3, 9), range(8, 20), range(5 * far, 5 * far)];
        assert_eq!(joined(&wanted, range(5, 3 * far)), [range(5, 20), range(far, far + 5)]);
        assert_eq!(joined(&[range(1, 4)], range(5, 9)), []);
    }

    #[test]
    fn announced_change_is_found_by_thread_state_and_time() {
        let at = |at, thread, offset| Announced { at: HostTsc(at), thread, offset, ratio: 1 };
        let announced = vec![at(100, 7, 5), at(210, 8, 5), at(220, 7, 5), at(230, 7, 6)];
        let doings = Doings { announced, ..Doings::default() };
        assert_eq!(doings.announced(7, (5, 1), range(150, 205)), Some(HostTsc(220)));
        assert_eq!(doings.announced(7, (6, 1), range(150, 205)), Some(HostTsc(230)));
        assert_eq!(doings.announced(7, (5, 2), range(150, 205)), None);
        assert_eq!(doings.announced(9, (5, 1), range(0, 1 << 30)), None);
    }

    #[test]
    fn host_that_tells_no_exits_knows_no_runs() {
        let mut doings = Doings::default();
        let mut windows = Windows::default();
        [(10, true), (20, false), (30, true), (40, false)].iter().for_each(|(time, opens)| windows.push(*time, *opens));
        doings.windows.insert(7, windows);
        assert_eq!(doings.runs(7, &[range(0, 50)]), Runs::default());
        doings.knows_runs = true;
        let expected = Runs::new(vec![range(10, 20), range(30, 40)], vec![range(10, 40)]);
        assert_eq!(doings.runs(7, &[range(0, 50)]), expected);
        assert_eq!(doings.runs(8, &[range(0, 50)]), Runs::default());
    }
}
