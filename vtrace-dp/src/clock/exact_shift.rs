//! The time shift of a file whose offsets are known exactly, for stock readers, which know no segments.
//!
//! In:    a [`Table`]; the file's lanes
//! Out:   [`Shape`]: a time shift that stock readers apply exactly, or the need to rewrite pages
//! Runs:  pure
//! Trust: the kernel
//!
//! Without INTERPOLATE, stock readers (`timestamp_host_sync()` in trace-cmd's trace-input.c, 3.1.6 to 3.4) use the first of
//! two samples for all events. Of more samples they use the last one that is not later than the event, except for the very
//! last sample; they sort times as signed and compare them as unsigned. So steps are exact if
//! - every time is below 2⁶³ and later than the previous one,
//! - the guest's clock only jumped forward, so that one guest time separates the events before a change from those after,
//! - one more sample follows the last change.
//!
//! Two kinds of clock need rewritten pages: scaled ones, because stock readers multiply, in 64 bits, where they have to
//! divide; and those that stepped back, because one guest time has two offsets there.

use vtrace_common::{
    ids::Cpu,
    time::{GuestTsc, HostTsc},
};

use super::{
    segment::Segment,
    table::{Table, distance},
};
use crate::clock::shift::{ShiftSample, TimeShift};

/// How a file gets host times.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Shape {
    /// By an option; its pages keep guest times.
    Shift(TimeShift),
    /// By [`crate::trace::write::host_times`]; no option.
    Rewrite,
}

/// Chooses the shape for a file with these lanes. `peer` is the trace id of the host's file.
pub fn shape(table: &Table, lanes: &[Cpu], peer: u64) -> Shape {
    let count = lanes.iter().map(|cpu| cpu.0 + 1).max().unwrap_or(0);
    // Every CPU up to the last needs samples; one without a lane has no events.
    let none = || Some(constant(0));
    let cpu = |cpu| table.history(Cpu(cpu)).map_or_else(none, |history| steps(history.segments(), table.since()));
    match (0..count).map(cpu).collect() {
        Some(cpus) => Shape::Shift(TimeShift { peer, interpolate: false, cpus }),
        None => Shape::Rewrite,
    }
}

/// Samples of a constant offset; their times do not matter.
fn constant(offset: u64) -> Vec<ShiftSample> {
    [0, 1].map(|time| sample(GuestTsc(time), offset)).to_vec()
}

/// `offset` as KVM has it.
fn sample(time: GuestTsc, offset: u64) -> ShiftSample {
    ShiftSample { time: time.0, offset: offset.wrapping_neg().cast_signed() }
}

fn steps(segments: &[Segment], since: HostTsc) -> Option<Vec<ShiftSample>> {
    let first = segments.iter().rposition(|segment| segment.from.high <= since).unwrap_or(0);
    let segments = &segments[first..];
    if segments.iter().any(|segment| segment.pair.ratio.is_some()) {
        return None;
    }
    let [begin, changes @ ..] = segments else { return None };
    if changes.is_empty() {
        return Some(constant(begin.pair.offset));
    }
    let mut samples = vec![sample(begin.pair.to_guest(since), begin.pair.offset)];
    for pair in segments.windows(2) {
        let (before, after) = (pair[0].pair.to_guest(pair[1].from.high), pair[1].pair.to_guest(pair[1].from.low));
        if distance(after, before) < 0 {
            return None;
        }
        samples.push(sample(after, pair[1].pair.offset));
    }
    let last = *samples.last()?;
    samples.push(ShiftSample { time: last.time.checked_add(1)?, ..last });
    let is_sorted = samples.windows(2).all(|pair| pair[0].time < pair[1].time);
    (is_sorted && samples.iter().all(|sample| i64::try_from(sample.time).is_ok())).then_some(samples)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            math::{HostRange, Pair},
            ratio::Ratio,
            segment::History,
        },
        *,
    };
    use proptest::prelude::*;

    fn segment(from: u64, offset: u64) -> Segment {
        Segment { from: HostRange::at(HostTsc(from)), pair: Pair { offset, ratio: None } }
    }

    fn table(segments: Vec<Segment>) -> Table {
        Table::from_histories(HostTsc(1000), vec![History::from_segments(Cpu(1), segments).unwrap()]).unwrap()
    }

    /// What trace-cmd does with a time stamp.
    fn stock(samples: &[ShiftSample], time: u64) -> u64 {
        let at = match samples {
            [_, _] => 0,
            [first, ..] if time <= first.time => 0,
            [.., last] if time >= last.time => samples.len() - 2,
            _ => samples.partition_point(|sample| sample.time <= time) - 1,
        };
        time.wrapping_add_signed(samples[at].offset)
    }

    #[test]
    fn constant_offset_needs_no_times() {
        for offset in [0, 5, 5u64.wrapping_neg(), 1 << 63] {
            let Shape::Shift(shift) = shape(&table(vec![segment(0, offset)]), &[Cpu(1)], 7) else { panic!("{offset}") };
            assert_eq!(shift.cpus.len(), 2, "CPU 0 has no lane, but an entry");
            assert_eq!(stock(&shift.cpus[1], 900), 900u64.wrapping_sub(offset));
        }
    }

    #[test]
    fn clock_that_went_back_or_is_scaled_needs_other_pages() {
        let back = table(vec![segment(0, 500), segment(2000, 400)]);
        assert_eq!(shape(&back, &[Cpu(1)], 7), Shape::Rewrite);
        let ratio = Some(Ratio { raw: 3.try_into().unwrap(), fraction_bits: 32 });
        let scaled = Segment { from: HostRange::at(HostTsc(0)), pair: Pair { offset: 0, ratio } };
        assert_eq!(shape(&table(vec![scaled]), &[Cpu(1)], 7), Shape::Rewrite);
        let negative = table(vec![segment(0, 5000u64.wrapping_neg()), segment(2000, 1)]);
        assert_eq!(shape(&negative, &[Cpu(1)], 7), Shape::Rewrite, "a guest time below zero sorts after all others");
    }

    #[test]
    fn changes_before_the_trace_are_none() {
        let back = table(vec![segment(0, 500), segment(900, 400)]);
        assert!(matches!(shape(&back, &[Cpu(1)], 7), Shape::Shift(shift) if shift.cpus[1] == constant(400)));
    }

    proptest! {
        #[test]
        fn steps_forward_are_exact_for_every_event(
            begin in 0u64..1 << 60, changes in prop::collection::vec((1u64..1 << 40, 1u64..1 << 40), 1..20), at: prop::sample::Index, past: u64,
        ) {
            let (mut host, mut offset) = (1000, begin);
            let mut segments = vec![segment(0, begin)];
            for (gap, step) in changes {
                (host, offset) = (host + gap, offset + step);
                segments.push(segment(host, offset));
            }
            let Shape::Shift(shift) = shape(&table(segments.clone()), &[Cpu(1)], 7) else { panic!("a step forward") };
            let number = at.index(segments.len());
            let from = segments[number].from.low.0.max(1000);
            let until = segments.get(number + 1).map_or(host + (1 << 40), |next| next.from.low.0);
            let host = from + past % (until - from);
            for host in [from, until - 1, host] {
                let guest = segments[number].pair.to_guest(HostTsc(host));
                prop_assert_eq!(stock(&shift.cpus[1], guest.0), host);
            }
        }
    }
}
