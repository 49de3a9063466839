//! When vCPUs ran and when their TSC offsets changed, from the pages of a host file that is not finished yet.
//!
//! In:    the host's pages in their areas; periods and threads
//! Out:   [`VcpuActivity`]: runs, gaps, announced changes
//! Runs:  on the caller's thread after the host has stopped; reads only the pages of the requested periods
//! Full:  at most [`BOUNDARIES_MAX`] boundaries are held; nothing is known of later times
//! Trust: the host's kernel

use std::collections::HashMap;

use vtrace_common::time::HostTsc;

use crate::{
    analysis::{
        host_events::{Decoders, HostAction},
        host_windows::BOUNDARIES_MAX,
        windows::{Gaps, Windows},
    },
    clock::{math::HostRange, segment::Runs},
    trace::read::{
        LaneData, LanePages, WalkFault,
        input::FileSource,
        merge::{Merge, Merged},
        times::FileClock,
    },
};

/// Periods that are closer to each other than this are read as one, cycles.
const APART_MIN: u64 = 1 << 20;
/// Longest time between the change of a TSC and its announcement, cycles: an interrupt may delay the announcement.
const ANNOUNCED_WITHIN: u64 = 1 << 24;

/// The pages of a host file that is not finished yet.
pub(crate) struct HostPages {
    /// The host's file.
    pub(crate) source: FileSource,
    /// The pages of each CPU in it.
    pub(crate) lanes: Vec<LaneData>,
    /// Bytes of one page.
    pub(crate) page_bytes: u32,
    /// Decoders of the host's events.
    pub(crate) decoders: Decoders,
    /// The period in which the host was traced.
    pub(crate) traced: HostRange,
}

impl HostPages {
    /// What these threads did in these periods.
    ///
    /// # Errors
    /// A page cannot be read or is broken.
    pub(crate) fn look(&self, wanted: &[HostRange], threads: &[u32]) -> Result<VcpuActivity, WalkFault> {
        let mut activity = VcpuActivity { knows_runs: self.decoders.know_runs(), ..VcpuActivity::default() };
        threads.iter().for_each(|thread| drop(activity.windows.insert(*thread, Windows::default())));
        for stretch in joined(wanted, self.traced) {
            let (from, to) = (stretch.low.0, stretch.high.0);
            let pages = |lane: &LaneData| {
                Ok((lane.cpu, FileClock::default(), LanePages::between(&self.source, lane, self.page_bytes, from, to)?))
            };
            let pages = self.lanes.iter().map(pages).collect::<Result<Vec<_>, WalkFault>>()?;
            let mut merge = Merge::from_pages(pages)?;
            while let Some(event) = merge.next_event()? {
                activity.take(&event, &self.decoders, stretch);
            }
        }
        activity.gaps.settle();
        Ok(activity)
    }
}

/// The periods within `bounds`, sorted; those closer than [`APART_MIN`] are joined.
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

/// A TSC change that the eBPF program wrote to the host's trace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Announced {
    at: HostTsc,
    thread: u32,
    offset: u64,
    ratio: u64,
}

/// What threads did in the requested periods.
#[derive(Debug, Default)]
pub(crate) struct VcpuActivity {
    windows: HashMap<u32, Windows>,
    gaps: Gaps,
    announced: Vec<Announced>,
    knows_runs: bool,
    boundaries: usize,
}

impl VcpuActivity {
    fn take(&mut self, event: &Merged<'_>, decoders: &Decoders, stretch: HostRange) {
        let is_inside = (stretch.low.0..=stretch.high.0).contains(&event.time);
        if let Some(since) = event.lost_since {
            let low = since.max(stretch.low.0);
            self.gaps.push(low, event.time.max(low));
        }
        let Some((thread, action)) = decoders.read(event.data).filter(|_| is_inside) else { return };
        match action {
            HostAction::Enter(_) => self.bound(thread, event.time, true),
            HostAction::Leave => self.bound(thread, event.time, false),
            HostAction::Announce { offset, ratio } => {
                self.announced.push(Announced { at: HostTsc(event.time), thread, offset, ratio });
            }
            HostAction::Switch(..) | HostAction::Cause(..) => {}
        }
    }

    fn bound(&mut self, thread: u32, time: u64, opens: bool) {
        let Some(windows) = self.windows.get_mut(&thread).filter(|_| self.boundaries < BOUNDARIES_MAX) else { return };
        windows.push(time, opens);
        self.boundaries += 1;
    }

    /// The known runs of a thread in these periods.
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

    /// When a thread announced this state, at about `seen`. No code of the guest ran between the reading of the state
    /// and its announcement.
    pub(crate) fn announced(&self, thread: u32, (offset, ratio): (u64, u64), seen: HostRange) -> Option<HostTsc> {
        let until = seen.high.0.saturating_add(ANNOUNCED_WITHIN);
        let from = self.announced.partition_point(|announced| announced.at < seen.low);
        let near = self.announced[from..].iter().take_while(|announced| announced.at.0 <= until);
        let same =
            |announced: &&Announced| (announced.thread, announced.offset, announced.ratio) == (thread, offset, ratio);
        near.into_iter().find(same).map(|announced| announced.at)
    }
}

/// The period in which a state that was read at `seen` can be announced.
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
        let activity = VcpuActivity { announced, ..VcpuActivity::default() };
        assert_eq!(activity.announced(7, (5, 1), range(150, 205)), Some(HostTsc(220)));
        assert_eq!(activity.announced(7, (6, 1), range(150, 205)), Some(HostTsc(230)));
        assert_eq!(activity.announced(7, (5, 2), range(150, 205)), None);
        assert_eq!(activity.announced(9, (5, 1), range(0, 1 << 30)), None);
    }

    #[test]
    fn host_without_exit_events_has_no_runs() {
        let mut activity = VcpuActivity::default();
        let mut windows = Windows::default();
        [(10, true), (20, false), (30, true), (40, false)].iter().for_each(|(time, opens)| windows.push(*time, *opens));
        activity.windows.insert(7, windows);
        assert_eq!(activity.runs(7, &[range(0, 50)]), Runs::default());
        activity.knows_runs = true;
        let expected = Runs::new(vec![range(10, 20), range(30, 40)], vec![range(10, 40)]);
        assert_eq!(activity.runs(7, &[range(0, 50)]), expected);
        assert_eq!(activity.runs(8, &[range(0, 50)]), Runs::default());
    }
}
