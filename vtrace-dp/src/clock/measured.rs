//! From measured offsets of a guest's CPUs to the time shift of its file, with an error bound.
//!
//! In:    [`Measurement`]s of a guest's CPUs, from before and after its trace
//! Out:   [`ClockPlan`]: samples that stock readers apply correctly, and the largest error of a converted time
//! Runs:  pure
//! Trust: guests report any clock readings. A line that would overflow in a stock reader is replaced by a constant
//!
//! The bound holds for an offset that is constant or drifts in one direction. QEMU's emulated TSC (TCG) drifts: where a
//! host CPU's TSC is lower than the value that was read last, `cpu_get_ticks()` (system/cpu-timers.c) returns that value
//! again and adds the difference to its offset for good, so that the guest's TSC gains on the host's. A measurement before
//! the trace bounds a falling offset from above, one after the trace bounds it from below, and the other way round for a
//! rising offset. So all offsets of the trace lie in the hull of both intervals. Their intersection would hold for a
//! constant offset only.
//!
//! Stock readers (`timestamp_host_sync()` in trace-cmd's trace-input.c) use the first of two samples, without INTERPOLATE.
//! With it they compute, in signed 64 bits, `o0 + ((t − t0)(o1 − o0) + (t1 − t0)/2) / (t1 − t0)`. So each CPU gets two
//! samples of different times, with scaling 1 and fraction 0. A CPU without samples would keep guest times, so all CPUs up
//! to the last one get some.

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

/// How a guest's times become host times, for events between the first and the last measurement.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClockPlan {
    /// The time shift for the file.
    pub time_shift: TimeShift,
    /// How many lanes have a CPU that was measured.
    pub vcpus: usize,
    /// Largest error of any event's time, cycles, if the offset of each CPU drifts in one direction at most.
    pub bound_cycles: u64,
    /// The same for guests whose CPUs share one TSC (their kernel uses the clocksource `tsc`). `None` if the plan has an
    /// offset of its own for each CPU.
    pub shared_bound_cycles: Option<u64>,
    /// All CPUs have the same offset: events of different CPUs keep the order that they had in the guest.
    pub shared: bool,
    /// A constant offset fits all measurements of each CPU.
    pub steady: bool,
    /// CPUs whose measurements no constant offset fits.
    pub moved: Vec<Cpu>,
    /// CPUs that were not measured and have the shared offset.
    pub unmeasured: Vec<Cpu>,
}

/// What the measurements of one CPU say of its offset.
#[derive(Clone, Copy, Debug)]
enum VcpuOffset {
    /// A constant offset fits all measurements. `hull` holds every offset that the CPU may have drifted through.
    Steady { times: [u64; 2], hull: Interval },
    /// No constant offset fits.
    Moved { times: Option<[u64; 2]>, intervals: [Interval; 2] },
}

/// Plans the time shift of a guest with these `lanes`, measured at the `start` and the `end` of its trace. `peer` is the
/// trace id of the host's file. `None` without lanes, or if a lane was not measured and the others share no offset.
pub fn plan(start: &[Measurement], end: &[Measurement], lanes: &[Cpu], peer: u64) -> Option<ClockPlan> {
    let last = lanes.iter().copied().max().filter(|cpu| usize::try_from(cpu.0).is_ok_and(|cpu| cpu < CPUS_MAX))?;
    let cpus = (0..=last.0).map(Cpu);
    let offsets: Vec<Option<VcpuOffset>> =
        cpus.map(|cpu| vcpu_offset(measurement_of(start, cpu), measurement_of(end, cpu))).collect();
    let unmeasured = unmeasured(lanes, &offsets);
    let samples = match common(&offsets) {
        Some(common) => share(common, &offsets),
        None if unmeasured.is_empty() => separate(&offsets),
        None => return None,
    };
    let moved = moved(start.iter().chain(end), &offsets);
    Some(ClockPlan {
        vcpus: lanes.len() - unmeasured.len(),
        time_shift: TimeShift { peer, interpolate: samples.interpolate, cpus: samples.cpus },
        bound_cycles: samples.bound_cycles,
        shared_bound_cycles: samples.shared_bound_cycles,
        shared: samples.shared_bound_cycles.is_some(),
        steady: moved.is_empty(),
        moved,
        unmeasured,
    })
}

impl ClockPlan {
    /// The host's TSC when the guest's was `guest` on `cpu`, as readers of the file compute it. A CPU without samples keeps
    /// its time.
    pub fn to_host(&self, cpu: Cpu, guest: GuestTsc) -> HostTsc {
        let samples = usize::try_from(cpu.0).ok().and_then(|cpu| self.time_shift.cpus.get(cpu));
        let offset = match samples.map(Vec::as_slice) {
            Some([first, second, ..]) if self.time_shift.interpolate => interpolate(first, second, guest),
            Some([first, ..]) => Offset(first.offset.cast_unsigned()),
            _ => Offset(0),
        };
        offset.to_host(guest)
    }

    /// The same clock for pages that are rewritten with host times: one constant offset for each CPU, the middle where it
    /// moved. Also returns by how much this can differ from [`ClockPlan::to_host`], cycles, in addition to the bound.
    /// `None` if there are too many CPUs.
    pub fn table(&self, since: HostTsc) -> Option<(Table, u64)> {
        let mut difference_max = 0;
        let mut histories = Vec::new();
        for (cpu, samples) in (0..).map(Cpu).zip(&self.time_shift.cpus) {
            let first = Offset(samples.first().map_or(0, |sample| sample.offset).cast_unsigned());
            let last = Offset(samples.last().map_or(0, |sample| sample.offset).cast_unsigned());
            let drift = if self.time_shift.interpolate { last.minus(first) } else { 0 };
            difference_max = difference_max.max(drift.unsigned_abs().div_ceil(2));
            let middle = Offset(first.0.wrapping_add_signed(drift / 2));
            let pair = Pair { offset: middle.0.wrapping_neg(), ratio: None };
            let segment = Segment { from: HostRange::at(HostTsc(0)), pair };
            histories.push(History::from_segments(cpu, vec![segment])?);
        }
        Some((Table::from_histories(since, histories)?, difference_max))
    }
}

/// The samples of a time shift and their bounds.
struct Samples {
    interpolate: bool,
    cpus: Vec<Vec<ShiftSample>>,
    bound_cycles: u64,
    shared_bound_cycles: Option<u64>,
}

fn measurement_of(measurements: &[Measurement], cpu: Cpu) -> Option<&Measurement> {
    measurements.iter().find(|measurement| measurement.cpu == cpu)
}

fn vcpu_offset(start: Option<&Measurement>, end: Option<&Measurement>) -> Option<VcpuOffset> {
    let first = start.or(end)?;
    let last = end.or(start)?;
    let times = in_order(first.at, last.at);
    Some(match first.interval.intersect(&last.interval) {
        Some(_) => VcpuOffset::Steady { times: times.unwrap_or([0, 1]), hull: first.interval.hull(&last.interval) },
        None => VcpuOffset::Moved { times, intervals: [first.interval, last.interval] },
    })
}

/// The lanes whose CPU was not measured, sorted.
fn unmeasured(lanes: &[Cpu], offsets: &[Option<VcpuOffset>]) -> Vec<Cpu> {
    let is_measured = |cpu: &Cpu| usize::try_from(cpu.0).is_ok_and(|cpu| offsets.get(cpu).is_some_and(Option::is_some));
    let mut unmeasured: Vec<Cpu> = lanes.iter().copied().filter(|cpu| !is_measured(cpu)).collect();
    unmeasured.sort_unstable();
    unmeasured
}

/// The CPUs whose offset moved, during a measurement or between both, sorted.
fn moved<'a>(measurements: impl Iterator<Item = &'a Measurement>, offsets: &[Option<VcpuOffset>]) -> Vec<Cpu> {
    let during = measurements.filter(|measurement| measurement.moved).map(|measurement| measurement.cpu);
    let mut moved: Vec<Cpu> = during.collect();
    for (cpu, offset) in (0..).map(Cpu).zip(offsets) {
        if matches!(offset, Some(VcpuOffset::Moved { .. })) {
            moved.push(cpu);
        }
    }
    moved.sort_unstable();
    moved.dedup();
    moved
}

/// Both times if they differ, are in order and can be sorted by a stock reader, which takes them for signed numbers. A
/// constant offset does not need them; a line between two offsets does.
fn in_order(first: GuestTsc, second: GuestTsc) -> Option<[u64; 2]> {
    (first < second && second.0 <= i64::MAX.unsigned_abs()).then_some([first.0, second.0])
}

/// The offsets that fit the measurements of all CPUs; `None` if there are none, or if a CPU's offset moved.
fn common(offsets: &[Option<VcpuOffset>]) -> Option<Interval> {
    let mut common: Option<Interval> = None;
    for offset in offsets.iter().flatten() {
        let VcpuOffset::Steady { hull, .. } = offset else { return None };
        common = Some(match common {
            Some(common) => common.intersect(hull)?,
            None => *hull,
        });
    }
    common
}

/// One offset for all CPUs: the middle of what they have in common.
fn share(common: Interval, offsets: &[Option<VcpuOffset>]) -> Samples {
    let offset = common.middle();
    let mut bound_cycles = 0;
    let mut cpus = Vec::new();
    for vcpu in offsets {
        let mut sample_times = [0, 1];
        if let Some(VcpuOffset::Steady { times, hull }) = vcpu {
            bound_cycles = bound_cycles.max(hull.distance_max(offset));
            sample_times = *times;
        }
        cpus.push(constant(sample_times, offset));
    }
    Samples { interpolate: false, cpus, bound_cycles, shared_bound_cycles: Some(common.distance_max(offset)) }
}

/// An offset for each CPU.
fn separate(offsets: &[Option<VcpuOffset>]) -> Samples {
    let mut samples = Samples { interpolate: false, cpus: Vec::new(), bound_cycles: 0, shared_bound_cycles: None };
    for vcpu in offsets {
        let (cpu, bound) = match vcpu {
            Some(VcpuOffset::Steady { times, hull }) => {
                let offset = hull.middle();
                (constant(*times, offset), hull.distance_max(offset))
            }
            Some(VcpuOffset::Moved { times, intervals }) => line(*times, intervals),
            None => (constant([0, 1], Offset(0)), 0), // no lane, so no events
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

/// Samples of a line from the first offset to the last, and their bound. The true offset may have moved at any time between
/// the measurements, so the bound reaches from either end of the line to the far end of the hull.
fn line(times: Option<[u64; 2]>, intervals: &[Interval; 2]) -> (Vec<ShiftSample>, u64) {
    let hull = intervals[0].hull(&intervals[1]);
    let [first, last] = intervals.map(|interval| interval.middle());
    if let Some([start, end]) = times {
        let samples =
            [ShiftSample { time: start, offset: first.to_file() }, ShiftSample { time: end, offset: last.to_file() }];
        if can_interpolate(&samples) {
            let rounding = 1; // the reader divides
            let bound = hull.distance_max(first).max(hull.distance_max(last)).saturating_add(rounding);
            return (samples.to_vec(), bound);
        }
    }
    let middle = hull.middle();
    (constant(times.unwrap_or([0, 1]), middle), hull.distance_max(middle))
}

/// Whether a stock reader interpolates without overflow, for times up to as far outside the samples as these are apart.
fn can_interpolate(samples: &[ShiftSample; 2]) -> bool {
    let apart = i128::from(samples[1].time) - i128::from(samples[0].time);
    let step = i128::from(samples[1].offset) - i128::from(samples[0].offset);
    let product = apart.checked_mul(2).and_then(|reach| reach.checked_mul(step));
    let product_fits = product.is_some_and(|product| product.unsigned_abs() < 1 << 62);
    product_fits && i64::try_from(step).is_ok()
}

/// The offset that a reader interpolates for `guest`, computed without overflow.
fn interpolate(first: &ShiftSample, second: &ShiftSample, guest: GuestTsc) -> Offset {
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
            tests::{DriftingGuest, any_rounds, round},
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
    fn table_converts_as_the_shift_does_and_by_the_middle_where_an_offset_moved() {
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
    fn offset_that_moved_is_reported_and_interpolated() {
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

    /// The recording that `vtrace check` refuted: both intervals overlap in a few microseconds, and most of the drift came
    /// right after the start. The middle of the intersection was farther from the first events than its bound.
    #[test]
    fn drift_within_the_width_of_both_measurements_is_within_the_bound() {
        let start = [Measurement::new(Cpu(0), &[round(Offset(60_000), 1 << 40, 30_000, 5, 30_000)]).unwrap()];
        let end =
            [Measurement::new(Cpu(0), &[round(Offset(20_000), (1 << 40) + 300_000_000_000, 30_000, 5, 30_000)])
                .unwrap()];
        let plan = plan(&start, &end, &cpus(1), 7).unwrap();
        assert!(plan.steady && plan.shared);
        for offset in [20_000, 40_000, 60_000] {
            assert!(error(&plan, 0, Offset(offset), 1 << 40) <= plan.bound_cycles, "{offset}: {plan:?}");
        }
        assert_eq!(plan.bound_cycles, 50_000, "half of the hull, which is 60 000 cycles of width and 40 000 of drift");
        assert_eq!(plan.shared_bound_cycles, Some(50_000));
    }

    proptest! {
        /// QEMU's emulated TSC: it gains on the host's in steps, at any moment, during measurements too.
        #[test]
        fn offset_that_drifts_in_one_direction_is_within_the_bound(
            guest in any::<DriftingGuest>(), delays in prop::collection::vec((0..90_000u64, 0..9000u64, 0..90_000u64), 1..12),
            trace in 1_000_000..3_000_000_000u64, picks in prop::collection::vec(0.0..1.0f64, 1..20),
        ) {
            let begin = 1 << 40;
            let (start, since) = guest.measure(begin, &delays);
            let (end, _) = guest.measure(since + trace, &delays);
            let plan = plan(&[start], &[end], &cpus(1), 1).unwrap();
            for pick in picks {
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss, reason = "a random moment of the trace")]
                let at = since + (trace as f64 * pick) as u64;
                let offset = guest.offset(at);
                let event = at.wrapping_sub(offset.0);
                prop_assert!(error(&plan, 0, offset, event) <= plan.bound_cycles, "{at} {offset:?} {plan:?}");
            }
        }

        #[test]
        fn constant_offsets_are_within_the_bound(guest in any_guest(), at: u64) {
            let all = |pick: fn(&Vcpu) -> &Vec<Round>| -> Vec<Measurement> {
                (0..).zip(&guest).map(|(cpu, entry)| Measurement::new(Cpu(cpu), pick(entry)).unwrap()).collect()
            };
            let count = u32::try_from(guest.len()).unwrap();
            let plan = plan(&all(|entry| &entry.1), &all(|entry| &entry.2), &cpus(count), 1).unwrap();
            prop_assert!(plan.steady);
            let hosts: Vec<HostTsc> = (0..count).map(|cpu| plan.to_host(Cpu(cpu), GuestTsc(at))).collect();
            prop_assert_eq!(hosts.windows(2).all(|pair| pair[0] == pair[1]), plan.shared || guest.len() == 1);
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
