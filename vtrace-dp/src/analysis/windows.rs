//! When a vCPU could run: boundaries, gaps, and where a time lies between them.
//!
//! In:    boundaries of one thread by time: it opens (kvm_entry, switched in) or closes (kvm_exit, switched out)
//! Out:   for a time: inside, outside and how far, or not covered
//! Runs:  pure
//! Full:  16 bytes a boundary; the caller bounds their number
//! Trust: nothing; boundaries that step back are moved to the one before
//!
//! What two neighbours say of the time between them:
//!
//! | from | to | without a gap between | with one |
//! |---|---|---|---|
//! | open | close | inside | inside, but for the gap |
//! | close | open | outside | outside, but for the gap |
//! | open | open | not covered: a close is missing | inside before the gap, outside after it |
//! | close | close | not covered: an open is missing | outside before the gap, inside after it |

/// One end of a window.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Boundary {
    /// The time of this end.
    pub time: u64,
    /// The window begins.
    pub opens: bool,
}

/// The windows of one thread.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Windows {
    boundaries: Vec<Boundary>,
}

/// What is known of a thread in a period.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct KnownWindows {
    /// Windows, ends included, in order.
    pub inside: Vec<(u64, u64)>,
    /// Stretches of which all windows are known, in order.
    pub stretches: Vec<(u64, u64)>,
}

/// Stretches of time in which the host lost events.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Gaps {
    /// First and last time, by time, apart from each other.
    stretches: Vec<(u64, u64)>,
}

/// Where a time lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Coverage {
    /// In a window, ends included.
    Inside,
    /// Between two windows, at this distance from the nearer one.
    Outside(u64),
    /// Before the first or after the last boundary, in a gap, or where boundaries are missing.
    Uncovered,
}

impl Windows {
    /// Adds a boundary, not before the last one.
    pub fn push(&mut self, time: u64, opens: bool) {
        let last = self.boundaries.last().map_or(0, |boundary| boundary.time);
        self.boundaries.push(Boundary { time: time.max(last), opens });
    }

    /// How many windows there are.
    pub fn count(&self) -> usize {
        self.boundaries.windows(2).filter(|pair| pair[0].opens && !pair[1].opens).count()
    }

    /// The windows of the thread in `from..=to`, and the parts of that period in which they are all known.
    pub fn known(&self, gaps: &Gaps, from: u64, to: u64) -> KnownWindows {
        let mut known = KnownWindows::default();
        let first = self.boundaries.partition_point(|boundary| boundary.time < from);
        let last = self.boundaries.partition_point(|boundary| boundary.time <= to);
        for pair in self.boundaries[first..last].windows(2) {
            let (begin, end) = (pair[0].time, pair[1].time);
            let is_whole = pair[0].opens != pair[1].opens && gaps.side(begin, end, begin) == Some(Side::Without);
            if !is_whole {
                continue;
            }
            match known.stretches.last_mut() {
                Some(stretch) if stretch.1 == begin => stretch.1 = end,
                _ => known.stretches.push((begin, end)),
            }
            if pair[0].opens {
                known.inside.push((begin, end));
            }
        }
        known
    }

    /// Where `time` lies.
    pub fn coverage(&self, gaps: &Gaps, time: u64) -> Coverage {
        let above = self.boundaries.partition_point(|boundary| boundary.time <= time);
        let Some(from) = above.checked_sub(1).map(|at| self.boundaries[at]) else { return Coverage::Uncovered };
        if from.time == time {
            return Coverage::Inside; // one end of a window, whichever it is
        }
        let Some(&to) = self.boundaries.get(above) else { return Coverage::Uncovered };
        let Some(side) = gaps.side(from.time, to.time, time) else { return Coverage::Uncovered };
        let inside = match (from.opens, to.opens, side) {
            (true, false, _) | (true, true, Side::Before) | (false, false, Side::After) => true,
            (false, true, _) | (true, true, Side::After) | (false, false, Side::Before) => false,
            (true, true, Side::Without) | (false, false, Side::Without) => return Coverage::Uncovered,
        };
        match (inside, from.opens, to.opens) {
            (true, ..) => Coverage::Inside,
            (false, true, _) => Coverage::Outside(to.time - time), // its own window ended at an unknown time in the gap
            (false, _, false) => Coverage::Outside(time - from.time),
            (false, false, true) => Coverage::Outside((time - from.time).min(to.time - time)),
        }
    }
}

/// On which side of the gaps between two boundaries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Side {
    Without,
    Before,
    After,
}

impl Gaps {
    /// Adds a stretch, in any order.
    pub fn push(&mut self, from: u64, to: u64) {
        self.stretches.push((from.min(to), to));
    }

    /// Sorts the stretches and joins those that touch. To be called before the first question.
    pub fn settle(&mut self) {
        self.stretches.sort_unstable();
        let mut joined: Vec<(u64, u64)> = Vec::new();
        for (from, to) in self.stretches.drain(..) {
            match joined.last_mut() {
                Some(last) if from <= last.1 => last.1 = last.1.max(to),
                _ => joined.push((from, to)),
            }
        }
        self.stretches = joined;
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.stretches.len()
    }

    /// `None`: `time` is in a gap, or has some on both sides.
    fn side(&self, from: u64, to: u64, time: u64) -> Option<Side> {
        let following = self.stretches.partition_point(|stretch| stretch.0 <= time);
        let before = following.checked_sub(1).map(|at| self.stretches[at]).filter(|stretch| stretch.1 > from);
        let after = self.stretches.get(following).is_some_and(|stretch| stretch.0 < to);
        match (before, after) {
            (Some(stretch), _) if stretch.1 >= time => None,
            (Some(_), true) => None,
            (Some(_), false) => Some(Side::After),
            (None, true) => Some(Side::Before),
            (None, false) => Some(Side::Without),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn windows(boundaries: &[(u64, bool)]) -> Windows {
        let mut windows = Windows::default();
        boundaries.iter().for_each(|(time, opens)| windows.push(*time, *opens));
        windows
    }

    fn gaps(stretches: &[(u64, u64)]) -> Gaps {
        let mut gaps = Gaps::default();
        stretches.iter().for_each(|(from, to)| gaps.push(*from, *to));
        gaps.settle();
        gaps
    }

    const RUNS: [(u64, bool); 4] = [(10, true), (20, false), (30, true), (40, false)];

    #[test]
    fn time_is_inside_outside_or_not_covered() {
        let windows = windows(&RUNS);
        let coverage = |time| windows.coverage(&Gaps::default(), time);
        assert_eq!([9, 41].map(coverage), [Coverage::Uncovered; 2]);
        assert_eq!([10, 15, 20, 30, 35, 40].map(coverage), [Coverage::Inside; 6]);
        assert_eq!([21, 25, 28].map(coverage), [1, 5, 2].map(Coverage::Outside));
        assert_eq!(windows.count(), 2);
    }

    #[test]
    fn missing_boundary_without_a_gap_covers_nothing() {
        let windows = windows(&[(10, true), (20, true), (30, false), (40, false)]);
        let coverage = |time| windows.coverage(&Gaps::default(), time);
        assert_eq!([15, 25, 35].map(coverage), [Coverage::Uncovered, Coverage::Inside, Coverage::Uncovered]);
    }

    #[test]
    fn gap_hides_only_itself() {
        let whole = windows(&RUNS);
        let coverage = |time| whole.coverage(&gaps(&[(13, 15), (24, 25)]), time);
        assert_eq!(
            [12, 13, 15, 16].map(coverage),
            [Coverage::Inside, Coverage::Uncovered, Coverage::Uncovered, Coverage::Inside]
        );
        assert_eq!([23, 24, 27].map(coverage), [Coverage::Outside(3), Coverage::Uncovered, Coverage::Outside(3)]);
    }

    #[test]
    fn boundary_lost_in_a_gap_leaves_both_sides_known() {
        let gaps = gaps(&[(14, 16)]);
        let open = windows(&[(10, true), (20, true), (30, false)]);
        let coverage = |time| open.coverage(&gaps, time);
        assert_eq!([12, 15, 18].map(coverage), [Coverage::Inside, Coverage::Uncovered, Coverage::Outside(2)]);
        let close = windows(&[(10, false), (20, false)]);
        let coverage = |time| close.coverage(&gaps, time);
        assert_eq!([12, 15, 18].map(coverage), [Coverage::Outside(2), Coverage::Uncovered, Coverage::Inside]);
    }

    #[test]
    fn only_windows_with_both_ends_and_no_gap_are_the_whole_truth() {
        let missing =
            windows(&[(10, true), (20, false), (30, true), (40, false), (50, false), (60, true), (70, false)]);
        let known = missing.known(&Gaps::default(), 0, 100);
        assert_eq!(known.inside, [(10, 20), (30, 40), (60, 70)]);
        assert_eq!(known.stretches, [(10, 40), (50, 70)]);
        let known = missing.known(&gaps(&[(15, 16)]), 0, 39);
        assert_eq!((known.inside, known.stretches), (vec![], vec![(20, 30)]));
    }

    #[test]
    fn gaps_that_touch_are_one() {
        assert_eq!(gaps(&[(5, 9), (1, 3), (3, 4), (8, 8)]).stretches, [(1, 4), (5, 9)]);
    }

    proptest! {
        /// The same asked of every window one by one.
        #[test]
        fn coverage_is_what_each_window_says(mut ends in prop::collection::btree_set(0..200u64, 4..40), time in 0..220u64) {
            if ends.len() % 2 == 1 {
                ends.pop_last();
            }
            let ends: Vec<u64> = ends.into_iter().collect();
            let windows = windows(&ends.iter().enumerate().map(|(at, time)| (*time, at % 2 == 0)).collect::<Vec<_>>());
            let distance = |pair: &[u64]| if time < pair[0] { pair[0] - time } else { time.saturating_sub(pair[1]) };
            let nearest = ends.chunks(2).map(distance).min().unwrap();
            let expected = match nearest {
                _ if time < ends[0] || time > *ends.last().unwrap() => Coverage::Uncovered,
                0 => Coverage::Inside,
                distance => Coverage::Outside(distance),
            };
            prop_assert_eq!(windows.coverage(&Gaps::default(), time), expected);
        }

        #[test]
        fn any_boundaries_and_gaps_give_an_answer(
            boundaries in prop::collection::vec(any::<(u64, bool)>(), 0..20),
            stretches in prop::collection::vec(any::<(u64, u64)>(), 0..8), time: u64,
        ) {
            let (windows, gaps) = (windows(&boundaries), gaps(&stretches));
            let _ = windows.coverage(&gaps, time);
            for (time, _) in boundaries {
                let _ = windows.coverage(&gaps, time);
            }
        }
    }
}
