//! The measured sync: how far a guest's TSC is from the host's, from questions and answers over the control port.
//!
//! In:    rounds: host sends, guest receives, guest sends, host receives, each with its own TSC
//! Out:   for one vCPU the interval that holds host − guest for certain
//! Runs:  pure
//! Trust: the guest's stamps are its own word. A round that no honest guest could have answered is passed over; a guest
//!        that lies within the round trip only misplaces its own events
//!
//! A message is not received before it is sent. So in every round
//! `host_sent − guest_received ≤ host − guest ≤ host_received − guest_sent`, however the delays were shared between the
//! two ways, and rounds narrow each other. This needs a guest TSC that runs as fast as the host's while one round lasts;
//! a scaled one moves from round to round, and that is seen ([`Measurement::moved`]).

use vtrace_common::{
    ids::Cpu,
    time::{GuestTsc, HostTsc},
};

use super::Offset;

/// One question and its answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Round {
    /// Right before the question was sent.
    pub host_sent: HostTsc,
    /// When the guest had it.
    pub guest_received: GuestTsc,
    /// Right before the guest answered.
    pub guest_sent: GuestTsc,
    /// When the host had the answer.
    pub host_received: HostTsc,
}

/// A round longer than this (years, at any clock) is nonsense.
const ROUND_TRIP_MAX: u64 = 1 << 61;

impl Round {
    /// What this round says of host − guest; nothing if the guest claims to have taken longer than the whole round.
    pub fn interval(&self) -> Option<Interval> {
        let trip = self.host_received.0.checked_sub(self.host_sent.0).filter(|trip| *trip <= ROUND_TRIP_MAX)?;
        let width = trip.checked_sub(self.guest_sent.0.wrapping_sub(self.guest_received.0))?;
        Some(Interval { low: Offset::between(self.host_sent, self.guest_received), width })
    }
}

/// Offsets from `low` to `low + width`, both included, modulo 2⁶⁴.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Interval {
    /// The smallest.
    pub low: Offset,
    /// From the smallest to the largest, cycles.
    pub width: u64,
}

impl Interval {
    /// The offset is one of these.
    pub fn contains(&self, offset: Offset) -> bool {
        offset.0.wrapping_sub(self.low.0) <= self.width
    }

    /// The middle, rounded down.
    pub fn middle(&self) -> Offset {
        self.low.plus(self.width / 2)
    }

    /// Offsets in both; nothing if there are none. Both are narrower than a quarter of all offsets.
    pub fn intersect(&self, other: &Self) -> Option<Self> {
        let (start, end, other_start, other_end) = self.on_a_line(other);
        let (low, high) = (start.max(other_start), end.min(other_end));
        (low <= high).then(|| self.stretch(low, high))
    }

    /// The narrowest interval that holds both, the short way round.
    pub fn hull(&self, other: &Self) -> Self {
        let (start, end, other_start, other_end) = self.on_a_line(other);
        self.stretch(start.min(other_start), end.max(other_end))
    }

    /// How far the farthest of these is from `offset`, cycles.
    pub fn distance_max(&self, offset: Offset) -> u64 {
        let low = i128::from(self.low.minus(offset));
        let far = low.unsigned_abs().max((low + i128::from(self.width)).unsigned_abs());
        u64::try_from(far).unwrap_or(u64::MAX)
    }

    /// Ends of both, counted from `self.low`.
    fn on_a_line(&self, other: &Self) -> (i128, i128, i128, i128) {
        let start = i128::from(other.low.minus(self.low));
        (0, i128::from(self.width), start, start + i128::from(other.width))
    }

    fn stretch(&self, low: i128, high: i128) -> Self {
        let from = i64::try_from(low).expect("ends begin within half of all offsets of each other");
        let low_offset = Offset(self.low.0.wrapping_add_signed(from));
        Self { low: low_offset, width: u64::try_from(high - low).unwrap_or(u64::MAX) }
    }
}

/// What the rounds with one vCPU say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Measurement {
    /// Whose TSC.
    pub cpu: Cpu,
    /// When it was measured: the guest's TSC in the best round.
    pub at: GuestTsc,
    /// Where host − guest is.
    pub interval: Interval,
    /// Rounds that were used.
    pub rounds: u32,
    /// Rounds no honest guest could have answered.
    pub refused: u32,
    /// Cycles on the way in the best round: its round trip less what the guest kept it.
    pub best_round_trip: u64,
    /// No offset fits all rounds: it moved meanwhile, and `interval` is the best round's alone.
    pub moved: bool,
}

impl Measurement {
    /// Puts the rounds with one vCPU together; nothing if no round is of use.
    pub fn new(cpu: Cpu, rounds: &[Round]) -> Option<Self> {
        let used: Vec<(&Round, Interval)> =
            rounds.iter().filter_map(|round| Some((round, round.interval()?))).collect();
        let (best, best_interval) = used.iter().min_by_key(|(_, interval)| interval.width)?;
        let common = used.iter().try_fold(*best_interval, |common, (_, interval)| common.intersect(interval));
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        Some(Self {
            cpu,
            at: best.guest_received,
            interval: common.unwrap_or(*best_interval),
            rounds: count(used.len()),
            refused: count(rounds.len() - used.len()),
            best_round_trip: best_interval.width,
            moved: common.is_none(),
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
    fn offset_that_moved_is_reported_and_the_best_round_stays() {
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
