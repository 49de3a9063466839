//! The host's TSC and one of its kernel clocks, read at the same moment.
//!
//! In:    which kernel clock
//! Out:   [`ClockReading`]
//! Runs:  on the caller's thread, some microseconds; an interrupt between two reads widens the window of one attempt only

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::sys::tsc;

/// The TSC and a kernel clock at one moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct ClockReading {
    /// The TSC in the middle of the window.
    pub(super) tsc: u64,
    /// The kernel clock, read somewhere in the window.
    pub(super) ns: u64,
    /// Cycles between the two reads of the TSC around the read of the clock.
    pub(super) window: u64,
}

impl ClockReading {
    /// The reading with the smallest window of `attempts`, which is at least one.
    pub(super) fn tightest(clock: ClockId, attempts: usize) -> Self {
        let readings = (0..attempts).map(|_| Self::take(clock));
        readings.min_by_key(|reading| reading.window).expect("there is at least one attempt")
    }

    fn take(clock: ClockId) -> Self {
        let before = tsc::read();
        let now = clock_gettime(clock).expect("every kernel has this clock");
        let window = tsc::read().saturating_sub(before);
        let ns = u64::try_from(Duration::from(now).as_nanos()).expect("584 years have not passed");
        Self { tsc: before + window / 2, ns, window }
    }
}
