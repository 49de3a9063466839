//! The DATE option: the offset that a stock reader adds to every time of a file to show times of day.
//!
//! In:    the trace clock, its scale
//! Out:   the option, the same for all files of a session
//! Runs:  on record's thread
//! Trust: the kernel's clocks
//!
//! The wall clock can be set while a recording runs: the offset at the end of the recording holds for the whole file.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::{
    clock::scale::Scale,
    recorder::plan::{CLOCK, wall_clock},
    sys::tsc,
    trace::format::option::TraceOption,
};

const READINGS: usize = 64;

/// The option for files with the trace clock `clock`; `None` for clocks that user space cannot read.
pub(crate) fn option(clock: &str, scale: &Scale) -> Option<TraceOption> {
    let other = wall_clock(clock)?;
    let mut tightest: Option<(u64, u64)> = None;
    for _ in 0..READINGS {
        let before = trace_clock_ns(clock, other, scale);
        let wall = ns(ClockId::CLOCK_REALTIME);
        let window = trace_clock_ns(clock, other, scale).wrapping_sub(before);
        // The reading with the shortest window is the most exact: the wall clock was read inside it.
        if tightest.is_none_or(|(shortest, _)| window < shortest) {
            tightest = Some((window, wall.wrapping_sub(before.wrapping_add(window / 2))));
        }
    }
    let (_, offset_ns) = tightest?;
    Some(TraceOption::Date(format!("{:#x}", offset_ns / 1000)))
}

/// The trace clock now: from the TSC, or from `other`, which counts like it.
fn trace_clock_ns(clock: &str, other: ClockId, scale: &Scale) -> u64 {
    if clock == CLOCK { scale.ns(tsc::read()) } else { ns(other) }
}

fn ns(clock: ClockId) -> u64 {
    let now = clock_gettime(clock).expect("every kernel has these clocks");
    u64::try_from(Duration::from(now).as_nanos()).expect("584 years have not passed")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::scale::Calibration;

    #[test]
    fn time_of_the_trace_clock_becomes_the_time_of_day() {
        let scale = Calibration::begin().scale();
        for (clock, id) in [(CLOCK, None), ("mono", Some(ClockId::CLOCK_MONOTONIC)), ("tai", Some(ClockId::CLOCK_TAI))]
        {
            let Some(TraceOption::Date(text)) = option(clock, &scale) else { panic!("{clock} has no date") };
            let offset_us = u64::from_str_radix(text.strip_prefix("0x").unwrap(), 16).unwrap();
            let now = id.map_or_else(|| scale.ns(tsc::read()), ns);
            let shown = now.wrapping_add(offset_us * 1000);
            assert!(shown.abs_diff(ns(ClockId::CLOCK_REALTIME)) < 50_000_000, "{clock}: {shown}");
        }
        assert_eq!(option("local", &scale), None);
    }
}
