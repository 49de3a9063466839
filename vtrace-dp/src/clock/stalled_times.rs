//! Events whose time stamps stood still while the guest's clock went back.
//!
//! In:    how long after the first of them each happened; the host times that the first can have; the vCPU's runs
//! Out:   when the first happened, and between which times for certain
//! Runs:  anywhere; pure
//! Full:  beyond [`CANDIDATES_MAX`] stretches that fit, all of what was possible stays possible
//! Trust: times come from guests: any numbers have an answer
//!
//! When a CPU's clock goes back, the ring buffer notes that nothing passed since the event before and goes on counting
//! from the clock's new value (kernel/trace/ring_buffer.c, `rb_add_timestamp()`: "Ring buffer clock went backwards", and
//! `__rb_reserve_next()`, which moves `write_stamp` back; the same before and after 6.8, which changed pages and stamps around it). So what is written of the events that
//! follow is right among themselves, and all are late by the same unknown number of cycles, more than none and at most as
//! many as the clock went back, until an absolute stamp or the next page. Page headers carry the clock itself.
//!
//! The events happened while the vCPU ran. A shift for which one of them would fall outside all runs is not the true one.

use vtrace_common::time::HostTsc;

use super::{math::HostRange, segment::Runs};

/// Stretches of possible times that are followed.
pub const CANDIDATES_MAX: usize = 1 << 16;

/// When the first of some events happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fit {
    /// The best guess: the middle of the widest stretch that fits.
    pub at: HostTsc,
    /// It did not happen before or after these.
    pub possible: HostRange,
    /// Some time makes all events fall into runs.
    pub in_runs: bool,
}

/// Finds when the first of some events happened, which is within `possible`. `after`: how many host ticks after it each
/// happened, in order; `slack`: how many more each may have been, by rounding.
pub fn fit(after: &[u64], slack: u64, possible: HostRange, runs: Option<&Runs>) -> Fit {
    let candidates = runs.and_then(|runs| candidates(after, slack, possible, runs));
    match candidates.as_deref() {
        Some([first, .., last]) => {
            let possible = HostRange { low: first.low, high: last.high };
            Fit { at: widest(candidates.as_deref().unwrap_or_default()), possible, in_runs: true }
        }
        Some([only]) => Fit { at: only.middle(), possible: *only, in_runs: true },
        _ => Fit { at: possible.middle(), possible, in_runs: false },
    }
}

fn widest(candidates: &[HostRange]) -> HostTsc {
    let widest = candidates.iter().copied().max_by_key(|candidate| candidate.width());
    widest.map_or(HostTsc(0), HostRange::middle)
}

/// The times for which every event falls into a run, as stretches in order; `None` if there are none, or too many.
fn candidates(after: &[u64], slack: u64, possible: HostRange, runs: &Runs) -> Option<Vec<HostRange>> {
    let mut left = vec![possible];
    for after in after {
        let mut next = Vec::new();
        for stretch in &left {
            // Where this event can be if the first is in the stretch.
            let low = stretch.low.0.saturating_add(*after);
            let high = stretch.high.0.saturating_add(*after).saturating_add(slack);
            let place = HostRange { low: HostTsc(low), high: HostTsc(high) };
            if !runs.knows(place) {
                next.push(*stretch);
                continue;
            }
            for run in runs.within(place) {
                let low = run.low.0.saturating_sub(*after).saturating_sub(slack).max(stretch.low.0);
                let high = run.high.0.saturating_sub(*after).min(stretch.high.0);
                if low <= high {
                    push(&mut next, HostRange { low: HostTsc(low), high: HostTsc(high) });
                }
            }
            if next.len() > CANDIDATES_MAX {
                return None;
            }
        }
        left = next;
    }
    (!left.is_empty()).then_some(left)
}

/// Appends a stretch; one that touches the last becomes part of it.
fn push(list: &mut Vec<HostRange>, stretch: HostRange) {
    match list.last_mut() {
        Some(last) if stretch.low.0 <= last.high.0.saturating_add(1) => last.high = last.high.max(stretch.high),
        _ => list.push(stretch),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(low: u64, high: u64) -> HostRange {
        HostRange { low: HostTsc(low), high: HostTsc(high) }
    }

    fn runs(list: &[(u64, u64)]) -> Runs {
        let list = list.iter().map(|(low, high)| range(*low, *high)).collect();
        Runs::new(list, vec![range(0, u64::MAX)])
    }

    #[test]
    fn runs_leave_one_place_for_the_events() {
        let runs = runs(&[(100, 110), (150, 155), (400, 410)]);
        let found = fit(&[0, 47, 300], 0, range(50, 1000), Some(&runs));
        assert_eq!(found, Fit { at: HostTsc(105), possible: range(103, 108), in_runs: true });
    }

    #[test]
    fn several_places_widen_the_bound_and_the_widest_is_taken() {
        let runs = runs(&[(100, 103), (200, 220), (300, 303)]);
        let found = fit(&[0], 0, range(50, 1000), Some(&runs));
        assert_eq!(found, Fit { at: HostTsc(210), possible: range(100, 303), in_runs: true });
    }

    #[test]
    fn without_runs_the_whole_stretch_is_possible() {
        let found = fit(&[0, 5], 0, range(50, 150), None);
        assert_eq!(found, Fit { at: HostTsc(100), possible: range(50, 150), in_runs: false });
        let never = fit(&[0, 5], 0, range(50, 150), Some(&runs(&[(1, 2)])));
        assert!(!never.in_runs && never.possible == range(50, 150));
    }

    proptest! {
        #[test]
        fn true_time_is_always_possible(
            gaps in prop::collection::vec((1u64..1000, 0u64..1000), 1..40), picks in prop::collection::vec(any::<prop::sample::Index>(), 1..8),
            before in 0u64..5000, past in 0u64..5000, slack in 0u64..3,
        ) {
            let (mut at, mut list) = (10_000u64, Vec::new());
            for (gap, length) in gaps {
                list.push((at + gap, at + gap + length));
                at += gap + length;
            }
            let mut times: Vec<u64> = picks.iter().map(|pick| {
                let (low, high) = list[pick.index(list.len())];
                low + (pick.index(1 << 20) as u64) % (high - low + 1)
            }).collect();
            times.sort_unstable();
            let after: Vec<u64> = times.iter().map(|time| (time - times[0]).saturating_sub(slack.min(time - times[0]))).collect();
            let found = fit(&after, slack, range(times[0] - before, times[0] + past), Some(&runs(&list)));
            prop_assert!(found.in_runs);
            prop_assert!(found.possible.low.0 <= times[0] && times[0] <= found.possible.high.0, "{found:?} {times:?}");
            prop_assert!(found.possible.low <= found.at && found.at <= found.possible.high);
        }

        #[test]
        fn any_numbers_have_an_answer(after: Vec<u64>, slack: u64, low: u64, width in 0u64..1 << 40, list: Vec<(u64, u64)>) {
            let _ = fit(&after, slack, range(low, low.saturating_add(width)), Some(&runs(&list)));
        }
    }
}
