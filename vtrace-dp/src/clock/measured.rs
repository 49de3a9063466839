//! From measurements at the start and at the end of a trace to the time shift of its file.
//!
//! In:    [`Measurement`]s of a guest's vCPUs
//! Out:   [`ClockPlan`]: samples that stock readers apply right, and how wrong they can be
//! Runs:  pure
//! Trust: guests say anything: what cannot be said to a stock reader without an overflow is said more coarsely
//!
//! What stock readers do (`timestamp_host_sync()` in trace-cmd's trace-input.c): two samples without INTERPOLATE: the
//! first one's offset. With it, in signed 64 bits, `o0 + ((t − t0)(o1 − o0) + (t1 − t0)/2) / (t1 − t0)`. So every CPU
//! gets two samples of different times, the scaling is 1 and the fraction 0. A CPU without an entry would keep guest
//! times: all up to the last one get one.

use vtrace_common::{
    ids::Cpu,
    limits::CPUS_MAX,
    time::{GuestTsc, HostTsc},
};

use super::{
    Offset,
    math::{HostRange, Pair},
    segment::{History, Segment},
    sync::{Interval, Measurement},
    table::Table,
};
use crate::clock::shift::{ShiftSample, TimeShift};

/// How a guest's time becomes host time, for the events between the first and the last measurement.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClockPlan {
    /// For the file.
    pub time_shift: TimeShift,
    /// Lanes whose CPU was measured.
    pub vcpus: usize,
    /// No event is farther than this from its true host time, whatever the CPUs have in common, if every offset stayed
    /// within what the two measurements of its CPU say.
    pub bound_cycles: u64,
    /// The same if all CPUs of the guest have one TSC (its kernel uses the clocksource `tsc`); of shared plans.
    pub shared_bound_cycles: Option<u64>,
    /// One offset for all CPUs: the order of events of different CPUs is as the guest saw it.
    pub shared: bool,
    /// No measurement contradicts constant offsets.
    pub steady: bool,
    /// CPUs whose offset moved.
    pub moved: Vec<Cpu>,
    /// CPUs that did not answer and got the shared offset.
    pub unmeasured: Vec<Cpu>,
}

/// What is known of one CPU.
#[derive(Clone, Copy, Debug)]
enum VcpuOffset {
    /// Both measurements (or the only one) allow one offset.
    Constant { times: [u64; 2], interval: Interval },
    /// They do not.
    Moved { times: Option<[u64; 2]>, intervals: [Interval; 2] },
}

/// Plans the time shift for a guest whose lanes are `lanes`. `peer` is the trace id of the host's file. Nothing if there
/// are no lanes, or if one was not measured and the others do not share one offset.
pub fn plan(start: &[Measurement], end: &[Measurement], lanes: &[Cpu], peer: u64) -> Option<ClockPlan> {
    let last = lanes.iter().copied().max().filter(|cpu| usize::try_from(cpu.0).is_ok_and(|cpu| cpu < CPUS_MAX))?;
    let of = |list: &[Measurement], cpu| list.iter().find(|measurement| measurement.cpu == cpu).copied();
    let known: Vec<Option<VcpuOffset>> = (0..=last.0).map(|cpu| know(of(start, Cpu(cpu)), of(end, Cpu(cpu)))).collect();
    let mut lanes = lanes.to_vec();
    lanes.sort_unstable();
    let unmeasured: Vec<Cpu> = lanes.iter().copied().filter(|cpu| at(&known, *cpu).is_none()).collect();
    let mut moved: Vec<Cpu> =
        start.iter().chain(end).filter(|measurement| measurement.moved).map(|measurement| measurement.cpu).collect();
    moved.extend(
        (0..)
            .map(Cpu)
            .zip(&known)
            .filter(|(_, known)| matches!(known, Some(VcpuOffset::Moved { .. })))
            .map(|(cpu, _)| cpu),
    );
    moved.sort_unstable();
    moved.dedup();
    let samples = match common(&known) {
        Some(common) => share(common, &known),
        None if unmeasured.is_empty() => separate(&known),
        None => return None,
    };
    let Samples { interpolate, cpus, bound_cycles, shared_bound_cycles } = samples;
    Some(ClockPlan {
        vcpus: lanes.len() - unmeasured.len(),
        time_shift: TimeShift { peer, interpolate, cpus },
        bound_cycles,
        shared_bound_cycles,
        shared: shared_bound_cycles.is_some(),
        steady: moved.is_empty(),
        moved,
        unmeasured,
    })
}

impl ClockPlan {
    /// What the host's TSC was when the guest's was `guest`, if that is the same on every CPU.
    pub fn host_tsc(&self, guest: GuestTsc) -> Option<HostTsc> {
        let mut all = (0..).map(Cpu).zip(&self.time_shift.cpus).map(|(cpu, _)| self.to_host(cpu, guest));
        let first = all.next()?;
        all.all(|other| other == first).then_some(first)
    }

    /// What the host's TSC was when the guest's was `guest` on `cpu`, as readers of the file compute it. CPUs without an
    /// entry keep their time, as there.
    pub fn to_host(&self, cpu: Cpu, guest: GuestTsc) -> HostTsc {
        let samples = usize::try_from(cpu.0).ok().and_then(|cpu| self.time_shift.cpus.get(cpu));
        let offset = match samples.map(Vec::as_slice) {
            Some([first, second, ..]) if self.time_shift.interpolate => line(first, second, guest),
            Some([first, ..]) => Offset(first.offset.cast_unsigned()),
            _ => Offset(0),
        };
        offset.to_host(guest)
    }
}

impl ClockPlan {
    /// For pages that are given the host's times: one offset for each CPU, the middle where it moved; and how far that can
    /// be from what [`ClockPlan::to_host`] says, beside its own bound. None if there are too many CPUs.
    pub fn table(&self, since: HostTsc) -> Option<(Table, u64)> {
        let mut further = 0;
        let history = |(cpu, samples): (u32, &Vec<ShiftSample>)| {
            let offset =
                |sample: Option<&ShiftSample>| Offset(sample.map_or(0, |sample| sample.offset).cast_unsigned());
            let (first, last) = (offset(samples.first()), offset(samples.last()));
            let apart = if self.time_shift.interpolate { last.minus(first) } else { 0 };
            further = further.max(apart.unsigned_abs().div_ceil(2));
            let middle = Offset(first.0.wrapping_add_signed(apart / 2));
            let pair = Pair { offset: middle.0.wrapping_neg(), ratio: None };
            History::from_segments(Cpu(cpu), vec![Segment { from: HostRange::at(HostTsc(0)), pair }])
        };
        let histories = (0..).zip(&self.time_shift.cpus).map(history).collect::<Option<Vec<_>>>()?;
        Some((Table::from_histories(since, histories)?, further))
    }
}

struct Samples {
    interpolate: bool,
    cpus: Vec<Vec<ShiftSample>>,
    bound_cycles: u64,
    shared_bound_cycles: Option<u64>,
}

fn at(known: &[Option<VcpuOffset>], cpu: Cpu) -> Option<VcpuOffset> {
    usize::try_from(cpu.0).ok().and_then(|cpu| known.get(cpu).copied().flatten())
}

fn know(start: Option<Measurement>, end: Option<Measurement>) -> Option<VcpuOffset> {
    let (first, second) = match (start, end) {
        (Some(start), Some(end)) => (start, end),
        (Some(only), None) | (None, Some(only)) => (only, only),
        (None, None) => return None,
    };
    let times = in_order(first.at, second.at);
    Some(match first.interval.intersect(&second.interval) {
        Some(interval) => VcpuOffset::Constant { times: times.unwrap_or([0, 1]), interval },
        None => VcpuOffset::Moved { times, intervals: [first.interval, second.interval] },
    })
}

/// Two different times, in order, that a stock reader can sort: it takes them for signed numbers. A constant offset
/// needs no true times; between two offsets there is nothing to draw a line by if these are not in order.
fn in_order(first: GuestTsc, second: GuestTsc) -> Option<[u64; 2]> {
    (first < second && second.0 <= i64::MAX.unsigned_abs()).then_some([first.0, second.0])
}

/// The offsets that fit all measurements of all CPUs.
fn common(known: &[Option<VcpuOffset>]) -> Option<Interval> {
    let mut all = known.iter().flatten().map(|known| match known {
        VcpuOffset::Constant { interval, .. } => Some(*interval),
        VcpuOffset::Moved { .. } => None,
    });
    let first = all.next()??;
    all.try_fold(first, |common, interval| common.intersect(&interval?))
}

fn share(common: Interval, known: &[Option<VcpuOffset>]) -> Samples {
    let offset = common.middle();
    let mut bound_cycles = 0;
    let mut cpus = Vec::new();
    for known in known {
        let times = match known {
            Some(VcpuOffset::Constant { times, interval }) => {
                bound_cycles = bound_cycles.max(interval.distance_max(offset));
                *times
            }
            _ => [0, 1],
        };
        cpus.push(constant(times, offset));
    }
    Samples { interpolate: false, cpus, bound_cycles, shared_bound_cycles: Some(common.distance_max(offset)) }
}

fn separate(known: &[Option<VcpuOffset>]) -> Samples {
    let mut samples = Samples { interpolate: false, cpus: Vec::new(), bound_cycles: 0, shared_bound_cycles: None };
    for known in known {
        let (cpu, bound) = match known {
            Some(VcpuOffset::Constant { times, interval }) => {
                let offset = interval.middle();
                (constant(*times, offset), interval.distance_max(offset))
            }
            Some(VcpuOffset::Moved { times, intervals }) => between(*times, intervals),
            None => (constant([0, 1], Offset(0)), 0), // no lane, no events
        };
        samples.interpolate |= cpu[0].offset != cpu[1].offset;
        samples.bound_cycles = samples.bound_cycles.max(bound);
        samples.cpus.push(cpu);
    }
    samples
}

fn constant(times: [u64; 2], offset: Offset) -> Vec<ShiftSample> {
    times.map(|time| ShiftSample { time, offset: offset.to_file() }).to_vec()
}

/// From one offset to the other: nobody knows when and how, so the bound reaches from each to the far end of both.
fn between(times: Option<[u64; 2]>, intervals: &[Interval; 2]) -> (Vec<ShiftSample>, u64) {
    let hull = intervals[0].hull(&intervals[1]);
    let [first, second] = intervals.map(|interval| interval.middle());
    let sample = |time, offset: Offset| ShiftSample { time, offset: offset.to_file() };
    match times.map(|[start, end]| [sample(start, first), sample(end, second)]) {
        Some(samples) if can_interpolate(&samples) => {
            // One more for the reader's rounding.
            let bound = hull.distance_max(first).max(hull.distance_max(second)).saturating_add(1);
            (samples.to_vec(), bound)
        }
        _ => {
            let middle = hull.middle();
            (constant(times.unwrap_or([0, 1]), middle), hull.distance_max(middle))
        }
    }
}

/// A stock reader's arithmetic holds for events up to as far outside the samples as they are apart.
fn can_interpolate(samples: &[ShiftSample; 2]) -> bool {
    let apart = i128::from(samples[1].time) - i128::from(samples[0].time);
    let step = i128::from(samples[1].offset) - i128::from(samples[0].offset);
    let product = apart.checked_mul(2).and_then(|reach| reach.checked_mul(step));
    let product_fits = product.is_some_and(|product| product.unsigned_abs() < 1 << 62);
    product_fits && i64::try_from(step).is_ok()
}

/// The reader's line through two samples, without its overflows.
fn line(first: &ShiftSample, second: &ShiftSample, guest: GuestTsc) -> Offset {
    let apart = i128::from(second.time) - i128::from(first.time);
    let step = i128::from(second.offset) - i128::from(first.offset);
    let since = i128::from(guest.0) - i128::from(first.time);
    let more = since.checked_mul(step).map_or(0, |product| (product + apart / 2) / apart.max(1));
    let offset = i128::from(first.offset).wrapping_add(more).cast_unsigned() & u128::from(u64::MAX);
    Offset(u64::try_from(offset).expect("masked"))
}

#[cfg(test)]
mod tests {
    use super::{
        super::sync::{
            Round,
            tests::{any_rounds, round},
        },
        *,
    };
    use proptest::prelude::*;

    /// What trace-cmd does with a time stamp, in its arithmetic; nothing where that overflows.
    fn stock(shift: &TimeShift, cpu: usize, time: u64) -> Option<u64> {
        let samples = &shift.cpus[cpu];
        let signed = |sample: &ShiftSample| i64::try_from(sample.time).ok();
        assert!(samples.len() == 2 && signed(&samples[0])? < signed(&samples[1])?);
        let mut more = samples[0].offset;
        if shift.interpolate {
            let delta = signed(&samples[1])?.checked_sub(signed(&samples[0])?)?;
            let step = samples[1].offset.checked_sub(samples[0].offset)?;
            let offset = time.cast_signed().checked_sub(signed(&samples[0])?)?.checked_mul(step)?;
            more = more.checked_add(offset.checked_add(delta / 2)? / delta)?;
        }
        Some(if more < 0 { time.wrapping_sub(more.unsigned_abs()) } else { time.wrapping_add(more.unsigned_abs()) })
    }

    fn one(cpu: u32, offset: u64, host: u64) -> Measurement {
        Measurement::new(Cpu(cpu), &[round(Offset(offset), host, 100, 5, 100)]).unwrap()
    }

    fn error(plan: &ClockPlan, cpu: u32, offset: Offset, guest: u64) -> u64 {
        let host = plan.to_host(Cpu(cpu), GuestTsc(guest));
        Offset(host.0).minus(Offset(offset.to_host(GuestTsc(guest)).0)).unsigned_abs()
    }

    fn cpus(count: u32) -> Vec<Cpu> {
        (0..count).map(Cpu).collect()
    }

    #[test]
    fn one_offset_for_all_is_shared() {
        let start = [one(0, 5000, 1_000_000), one(1, 5000, 1_001_000)];
        let end = [one(0, 5000, 9_000_000), one(1, 5000, 9_001_000)];
        let plan = plan(&start, &end, &cpus(2), 7).unwrap();
        assert!(plan.shared && plan.steady && !plan.time_shift.interpolate);
        assert_eq!(plan.shared_bound_cycles, Some(100));
        let offsets: Vec<_> = plan.time_shift.cpus.iter().flatten().map(|sample| sample.offset).collect();
        assert_eq!(offsets, [5000; 4]);
        assert_eq!(plan.time_shift.peer, 7);
    }

    #[test]
    fn table_says_what_the_shift_says_and_the_middle_where_an_offset_moved() {
        let start = [one(0, 5000, 1_000_000), one(1, 90_000, 1_000_000)];
        let steady = plan(&start, &[], &cpus(2), 7).unwrap();
        let (table, further) = steady.table(HostTsc(1)).unwrap();
        assert_eq!(further, 0);
        for (cpu, guest) in [(0, 7), (1, 7), (0, 1 << 40), (1, 1 << 62)] {
            let said = table.to_host(Cpu(cpu), GuestTsc(guest), HostTsc(guest)).unwrap();
            assert_eq!(said.at, steady.to_host(Cpu(cpu), GuestTsc(guest)), "{cpu} {guest}");
        }
        let moved = plan(&[one(0, 5000, 1_000_000)], &[one(0, 6000, 9_000_000)], &cpus(1), 7).unwrap();
        assert!(moved.time_shift.interpolate);
        let (table, further) = moved.table(HostTsc(1)).unwrap();
        assert_eq!(further, 500);
        for guest in [1_000_000, 5_000_000, 8_990_000] {
            let said = table.to_host(Cpu(0), GuestTsc(guest), HostTsc(guest)).unwrap().at;
            assert_eq!(said, HostTsc(guest + 5500));
            assert!(said.0.abs_diff(moved.to_host(Cpu(0), GuestTsc(guest)).0) <= further + 1);
        }
    }

    #[test]
    fn cpus_with_offsets_of_their_own_keep_them() {
        let start = [one(0, 5000, 1_000_000), one(1, 90_000, 1_000_000)];
        let plan = plan(&start, &[], &cpus(2), 7).unwrap();
        assert!(!plan.shared && plan.steady && plan.shared_bound_cycles.is_none());
        assert_eq!(plan.time_shift.cpus[1][0].offset, 90_000);
        assert_eq!(plan.bound_cycles, 100);
    }

    #[test]
    fn cpu_that_did_not_answer_gets_the_shared_offset_or_none() {
        let start = [one(0, 5000, 1_000_000), one(2, 5000, 1_000_000)];
        let shared = plan(&start, &[], &cpus(4), 7).unwrap();
        assert_eq!(shared.unmeasured, [Cpu(1), Cpu(3)]);
        assert!(shared.time_shift.cpus.iter().flatten().all(|sample| sample.offset == 5000));
        let start = [one(0, 5000, 1_000_000), one(2, 90_000, 1_000_000)];
        assert_eq!(plan(&start, &[], &cpus(3), 7), None);
        assert!(plan(&start, &[], &[Cpu(0), Cpu(2)], 7).is_some(), "CPU 1 has no lane");
        assert_eq!(plan(&[], &[], &cpus(1), 7), None);
    }

    #[test]
    fn offset_that_moved_is_said_and_interpolated() {
        let (start, end) = ([one(0, 0, 1_000_000)], [one(0, 400_000, 3_000_000_000)]);
        let plan = plan(&start, &end, &cpus(1), 7).unwrap();
        assert!(!plan.steady && plan.time_shift.interpolate);
        assert_eq!(plan.moved, [Cpu(0)]);
        assert_eq!(plan.bound_cycles, 400_101);
    }

    #[test]
    fn guest_clock_that_went_back_gets_no_line() {
        let (start, end) = ([one(0, 0, 1_000_000)], [one(0, 2_000_000, 2_500_000)]);
        let plan = plan(&start, &end, &cpus(1), 7).unwrap();
        assert!(!plan.steady && !plan.time_shift.interpolate);
        assert_eq!(plan.time_shift.cpus[0][0].offset, 1_000_000);
        assert_eq!(plan.bound_cycles, 1_000_100);
    }

    #[test]
    fn line_that_a_stock_reader_cannot_compute_is_not_drawn() {
        let (start, end) = ([one(0, 0, 1_000)], [one(0, 1 << 40, 1 << 50)]);
        let plan = plan(&start, &end, &cpus(1), 7).unwrap();
        assert!(!plan.time_shift.interpolate && !plan.steady);
        assert_eq!(plan.bound_cycles, (1 << 39) + 100);
    }

    /// True offset, rounds at the start, rounds at the end.
    type Vcpu = (Offset, Vec<Round>, Vec<Round>);

    /// Rounds with several vCPUs, each with an offset of its own near `base`.
    fn any_guest() -> impl Strategy<Value = Vec<Vcpu>> {
        (any::<u64>(), 0..400_000u64).prop_flat_map(|(base, spread)| {
            let cpu = (0..=spread).prop_map(move |more| Offset(base).plus(more));
            let cpu = cpu.prop_flat_map(|offset| (Just(offset), any_rounds(offset), any_rounds(offset)));
            prop::collection::vec(cpu, 1..5)
        })
    }

    proptest! {
        #[test]
        fn constant_offsets_are_within_the_bound(guest in any_guest(), at: u64) {
            let all = |pick: fn(&Vcpu) -> &Vec<Round>| -> Vec<Measurement> {
                (0..).zip(&guest).map(|(cpu, entry)| Measurement::new(Cpu(cpu), pick(entry)).unwrap()).collect()
            };
            let count = u32::try_from(guest.len()).unwrap();
            let plan = plan(&all(|entry| &entry.1), &all(|entry| &entry.2), &cpus(count), 1).unwrap();
            prop_assert!(plan.steady);
            prop_assert_eq!(plan.host_tsc(GuestTsc(at)).is_some(), plan.shared || guest.len() == 1);
            let alike = guest.iter().all(|(offset, ..)| *offset == guest[0].0);
            prop_assert!(plan.shared || !alike);
            for (cpu, (offset, ..)) in (0..).zip(&guest) {
                prop_assert!(error(&plan, cpu, *offset, at) <= plan.bound_cycles);
                if alike {
                    prop_assert!(error(&plan, cpu, *offset, at) <= plan.shared_bound_cycles.unwrap());
                }
                let host = plan.to_host(Cpu(cpu), GuestTsc(at)).0;
                prop_assert_eq!(stock(&plan.time_shift, usize::try_from(cpu).unwrap(), at), Some(host));
            }
        }

        #[test]
        fn offset_that_drifts_or_steps_is_within_the_bound(
            offset in -(1i64 << 40)..1 << 40, step in -(1i64 << 30)..1 << 30, seconds in 1..20u64, thousandth in 0..=1000u32,
        ) {
            let later = Offset(offset.cast_unsigned()).plus(step.cast_unsigned());
            let (from, to) = (1u64 << 45, (1u64 << 45) + seconds * 3_000_000_000);
            let start = Measurement::new(Cpu(0), &[round(Offset(offset.cast_unsigned()), from, 100, 5, 70)]).unwrap();
            let end = Measurement::new(Cpu(0), &[round(later, to, 30, 5, 100)]).unwrap();
            let plan = plan(&[start], &[end], &cpus(1), 1).unwrap();
            let guest = start.at.0 + end.at.0.saturating_sub(start.at.0) / 1000 * u64::from(thousandth);
            let truth = Offset(offset.cast_unsigned()).plus((step / 1000 * i64::from(thousandth)).cast_unsigned());
            for truth in [truth, Offset(offset.cast_unsigned()), later] {
                prop_assert!(error(&plan, 0, truth, guest) <= plan.bound_cycles);
            }
            let host = plan.to_host(Cpu(0), GuestTsc(guest)).0;
            prop_assert_eq!(stock(&plan.time_shift, 0, guest), Some(host));
        }

        #[test]
        fn any_measurements_give_an_answer(stamps in prop::collection::vec(any::<[u64; 4]>(), 1..6), at: u64) {
            let measurement = |(cpu, [at, low, width, trip]): (u32, [u64; 4])| Measurement {
                cpu: Cpu(cpu / 2), at: GuestTsc(at), interval: Interval { low: Offset(low), width: width >> 3 },
                rounds: 1, refused: 0, best_round_trip: trip, moved: trip & 1 == 0,
            };
            let all: Vec<_> = (0..).zip(stamps).map(measurement).collect();
            let (start, end): (Vec<_>, Vec<_>) = all.into_iter().partition(|measurement| measurement.rounds == 1 && measurement.at.0 & 1 == 0);
            if let Some(plan) = plan(&start, &end, &cpus(2), 1) {
                let _ = plan.to_host(Cpu(0), GuestTsc(at));
            }
        }
    }
}
