//! Bounds of a guest's TSC offset, measured by round trips over the control port.
//!
//! In:    rounds: the host sends, the guest receives, the guest answers, the host receives, each with its own TSC
//! Out:   for one vCPU an interval that contains host − guest
//! Runs:  pure
//! Trust: a guest can report any times. A round that is impossible is refused; a guest that shifts its times by less than
//!        the round trip misplaces only its own events
//!
//! No message is received before it is sent, so every round shows
//! `host_sent − guest_received ≤ host − guest ≤ host_received − guest_sent`, whichever direction took longer. The bounds of
//! several rounds narrow each other. The guest's TSC has to run at the host's rate during one round: a scaled TSC moves
//! from round to round, which [`Measurement::moved`] reports.

use vtrace_common::{
    ids::Cpu,
    time::{GuestTsc, HostTsc},
};

use super::Offset;

/// One message to the guest and its answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Round {
    /// Before the message was sent.
    pub host_sent: HostTsc,
    /// When the guest received it.
    pub guest_received: GuestTsc,
    /// Before the guest sent the answer.
    pub guest_sent: GuestTsc,
    /// When the host received the answer.
    pub host_received: HostTsc,
}

/// A longer round (years, at any frequency) is refused.
const ROUND_TRIP_MAX: u64 = 1 << 61;

impl Round {
    /// The bounds of host − guest; `None` if the guest reports to have kept the message longer than the whole round took.
    pub fn interval(&self) -> Option<Interval> {
        let trip = self.host_received.0.checked_sub(self.host_sent.0).filter(|trip| *trip <= ROUND_TRIP_MAX)?;
        let width = trip.checked_sub(self.guest_sent.0.wrapping_sub(self.guest_received.0))?;
        Some(Interval { low: Offset::between(self.host_sent, self.guest_received), width })
    }
}

/// The offsets from `low` to `low + width`, both included, modulo 2⁶⁴.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Interval {
    /// The smallest offset.
    pub low: Offset,
    /// The largest offset minus the smallest, cycles.
    pub width: u64,
}

impl Interval {
    /// Whether the interval contains `offset`.
    pub fn contains(&self, offset: Offset) -> bool {
        offset.0.wrapping_sub(self.low.0) <= self.width
    }

    /// The middle, rounded down.
    pub fn middle(&self) -> Offset {
        self.low.plus(self.width / 2)
    }

    /// The offsets in both; `None` if there are none. Both have to be narrower than 2⁶².
    pub fn intersect(&self, other: &Self) -> Option<Self> {
        let (start, end, other_start, other_end) = self.on_a_line(other);
        let (low, high) = (start.max(other_start), end.min(other_end));
        (low <= high).then(|| self.stretch(low, high))
    }

    /// The narrowest interval that contains both.
    pub fn hull(&self, other: &Self) -> Self {
        let (start, end, other_start, other_end) = self.on_a_line(other);
        self.stretch(start.min(other_start), end.max(other_end))
    }

    /// The largest distance of any of these from `offset`, cycles.
    pub fn distance_max(&self, offset: Offset) -> u64 {
        let low = i128::from(self.low.minus(offset));
        let far = low.unsigned_abs().max((low + i128::from(self.width)).unsigned_abs());
        u64::try_from(far).unwrap_or(u64::MAX)
    }

    /// Start and end of `self`, then of `other`, all relative to `self.low`.
    fn on_a_line(&self, other: &Self) -> (i128, i128, i128, i128) {
        let start = i128::from(other.low.minus(self.low));
        (0, i128::from(self.width), start, start + i128::from(other.width))
    }

    /// From `low` to `high`, both relative to `self.low`.
    fn stretch(&self, low: i128, high: i128) -> Self {
        let from = i64::try_from(low).expect("ends begin within half of all offsets of each other");
        let low_offset = Offset(self.low.0.wrapping_add_signed(from));
        Self { low: low_offset, width: u64::try_from(high - low).unwrap_or(u64::MAX) }
    }
}

/// The offset of one vCPU, from all rounds of one measurement.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Measurement {
    /// The vCPU's CPU in its guest.
    pub cpu: Cpu,
    /// The guest's TSC in the round with the shortest round trip.
    pub at: GuestTsc,
    /// Bounds of host − guest. If the offset only rises or only falls, and not within a round: its bounds before the first
    /// and after the last round, as far as this measurement has them (see [`super::measured`]).
    pub interval: Interval,
    /// Rounds used.
    pub rounds: u32,
    /// Rounds refused: their times are impossible.
    pub refused: u32,
    /// Shortest round trip, without the time that the guest kept the message, cycles.
    pub best_round_trip: u64,
    /// No constant offset fits all rounds: it moved during the measurement.
    pub moved: bool,
}

impl Measurement {
    /// Combines the rounds with one vCPU; `None` if all are refused.
    pub fn new(cpu: Cpu, rounds: &[Round]) -> Option<Self> {
        let mut used = Vec::new();
        for round in rounds {
            if let Some(interval) = round.interval() {
                used.push((round, interval));
            }
        }
        let (best, best_interval) = *used.iter().min_by_key(|(_, interval)| interval.width)?;
        // Ends are counted from the start of the best interval.
        let mut low = 0;
        let mut high = i128::from(best_interval.width);
        for (_, interval) in &used {
            let (_, _, start, end) = best_interval.on_a_line(interval);
            low = low.max(start);
            high = high.min(end);
        }
        // Where the lower bounds exceed the upper ones, the offset moved from one to the other.
        let moved = low > high;
        let crossing = best_interval.stretch(low.min(high), low.max(high));
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        Some(Self {
            cpu,
            at: best.guest_received,
            interval: if moved { best_interval.hull(&crossing) } else { crossing },
            rounds: count(used.len()),
            refused: count(rounds.len() - used.len()),
            best_round_trip: best_interval.width,
            moved,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A round of an honest guest: `offset` is host − guest.
    pub(in super::super) fn round(offset: Offset, sent: u64, there: u64, kept: u64, back: u64) -> Round {
        let guest = |host: u64| GuestTsc(host.wrapping_sub(offset.0));
        Round {
            host_sent: HostTsc(sent),
            guest_received: guest(sent + there),
            guest_sent: guest(sent + there + kept),
            host_received: HostTsc(sent + there + kept + back),
        }
    }

    /// A guest whose offset falls in steps, each at a host time: QEMU's emulated TSC.
    #[derive(Clone, Debug)]
    pub(in super::super) struct DriftingGuest {
        offset: u64,
        /// Host time and cycles of each step, by time.
        steps: Vec<(u64, u64)>,
        /// The offset rises instead.
        rises: bool,
    }

    impl Arbitrary for DriftingGuest {
        type Parameters = ();
        type Strategy = BoxedStrategy<Self>;

        fn arbitrary_with((): ()) -> Self::Strategy {
            let early = (0..2_000_000u64, 0..20_000u64);
            let late = (0..3_000_000_000u64, 0..20_000u64);
            let steps = prop::collection::vec(prop_oneof![early, late], 0..30);
            let guest = (any::<u64>(), steps, any::<bool>()).prop_map(|(offset, mut steps, rises)| {
                steps.sort_unstable();
                Self { offset, steps, rises }
            });
            guest.boxed()
        }
    }

    impl DriftingGuest {
        /// host − guest at a host time after 2⁴⁰.
        pub(in super::super) fn offset(&self, host: u64) -> Offset {
            let passed = self.steps.iter().filter(|(at, _)| (1 << 40) + at <= host);
            let drift: u64 = passed.map(|(_, cycles)| cycles).sum();
            Offset(if self.rises { self.offset.wrapping_add(drift) } else { self.offset.wrapping_sub(drift) })
        }

        /// Rounds with these delays, from the host time `begin` on; and the host time after the last one.
        pub(in super::super) fn measure(&self, begin: u64, delays: &[(u64, u64, u64)]) -> (Measurement, u64) {
            let mut now = begin;
            let mut rounds = Vec::new();
            for (there, kept, back) in delays {
                let (received, sent) = (now + there, now + there + kept);
                let guest = |host: u64| GuestTsc(host.wrapping_sub(self.offset(host).0));
                rounds.push(Round {
                    host_sent: HostTsc(now),
                    guest_received: guest(received),
                    guest_sent: guest(sent),
                    host_received: HostTsc(sent + back),
                });
                now = sent + back + 1;
            }
            // A step while the guest keeps the message makes a round impossible: one more without a wait.
            let at = self.offset(now);
            rounds.push(round(at, now, 0, 0, 90_000));
            (Measurement::new(Cpu(0), &rounds).expect("the last round is possible"), now + 90_000)
        }
    }

    /// Honest rounds with random delays.
    pub(in super::super) fn any_rounds(offset: Offset) -> impl Strategy<Value = Vec<Round>> {
        let one = (0..1u64 << 60, 0..200_000u64, 0..1_000_000u64, 0..200_000u64);
        let one = one.prop_map(move |(sent, there, kept, back)| round(offset, sent, there, kept, back));
        prop::collection::vec(one, 1..20)
    }

    fn wide(low: u64, width: u64) -> Interval {
        Interval { low: Offset(low), width }
    }

    #[test]
    fn rounds_with_opposite_delays_leave_one_offset() {
        let rounds = [round(Offset(5000), 100, 0, 3, 90), round(Offset(5000), 900, 80, 3, 0)];
        let measurement = Measurement::new(Cpu(1), &rounds).unwrap();
        assert_eq!((measurement.interval, measurement.moved), (wide(5000, 0), false));
        assert_eq!((measurement.best_round_trip, measurement.rounds), (80, 2));
    }

    #[test]
    fn answer_that_took_longer_than_the_round_is_refused() {
        let mut lie = round(Offset(0), 100, 5, 10, 5);
        lie.guest_sent.0 += 11;
        assert_eq!(lie.interval(), None);
        let backwards = Round { guest_sent: GuestTsc(104), ..round(Offset(0), 100, 5, 10, 5) };
        assert_eq!(backwards.interval(), None);
        assert_eq!(Measurement::new(Cpu(0), &[lie, backwards]), None);
        let honest = round(Offset(0), 100, 5, 10, 5);
        assert_eq!(Measurement::new(Cpu(0), &[lie, honest]).map(|measurement| measurement.refused), Some(1));
    }

    #[test]
    fn offset_that_moved_is_reported_and_the_best_round_is_contained() {
        let rounds =
            [round(Offset(7), 100, 10, 1, 10), round(Offset(90), 500, 5, 1, 5), round(Offset(7), 900, 9, 1, 9)];
        let measurement = Measurement::new(Cpu(0), &rounds).unwrap();
        assert!(measurement.moved);
        assert!(measurement.interval.contains(Offset(90)));
        assert_eq!(measurement.best_round_trip, 10);
    }

    #[test]
    fn intervals_meet_across_the_end_of_numbers() {
        let (left, right) = (wide(u64::MAX - 4, 10), wide(3, 10));
        assert_eq!(left.intersect(&right), Some(wide(3, 2)));
        assert_eq!(right.intersect(&left), Some(wide(3, 2)));
        assert_eq!(left.hull(&right), wide(u64::MAX - 4, 18));
        assert_eq!(wide(u64::MAX - 4, 2).intersect(&right), None);
        assert_eq!(left.distance_max(Offset(1)), 6);
    }

    proptest! {
        #[test]
        fn true_offset_is_in_every_interval((offset, rounds) in any::<u64>().prop_flat_map(|offset| (Just(Offset(offset)), any_rounds(Offset(offset))))) {
            let measurement = Measurement::new(Cpu(0), &rounds).unwrap();
            prop_assert!(!measurement.moved);
            prop_assert!(measurement.interval.contains(offset));
            prop_assert!(measurement.interval.width <= measurement.best_round_trip);
            prop_assert!(measurement.interval.distance_max(offset) <= measurement.interval.width);
        }

        #[test]
        fn any_stamps_give_an_answer(stamps in prop::collection::vec(any::<[u64; 4]>(), 0..8)) {
            let round = |[a, b, c, d]: [u64; 4]| Round {
                host_sent: HostTsc(a), guest_received: GuestTsc(b), guest_sent: GuestTsc(c), host_received: HostTsc(d),
            };
            let rounds: Vec<_> = stamps.into_iter().map(round).collect();
            let _ = Measurement::new(Cpu(0), &rounds);
        }

        #[test]
        fn intersection_holds_what_both_hold(a: u64, width_a in 0..1u64 << 61, step in -(1i64 << 62)..1 << 62, width_b in 0..1u64 << 61, at in 0..1u64 << 61) {
            let (a, b) = (wide(a, width_a), wide(a.wrapping_add_signed(step), width_b));
            let probe = a.low.plus(at.min(width_a));
            let both = a.intersect(&b);
            prop_assert_eq!(both.is_some_and(|both| both.contains(probe)), b.contains(probe));
            prop_assert!(a.hull(&b).contains(probe) && a.hull(&b).contains(b.low.plus(width_b)));
        }
    }
}
