//! The host's TSC in nanoseconds: the mult and shift of option TSC2NSEC.
//!
//! In:    perf's page; else the TSC against CLOCK_MONOTONIC_RAW, read at both ends of a session
//! Out:   [`Scale`], with where it comes from and how far off it may be
//! Runs:  on the caller's thread; sleeps only if asked before [`SPAN_MIN`] has passed
//! Trust: the kernel's clock
//!
//! Stock readers compute `tsc × mult >> shift` with a shift of at most 32 (`mul_u64_u32_shr`) and a mult of 31 bits: they keep
//! it in an `int`, and times of a larger one are nonsense. perf gives a larger one below 1 GHz.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use nix::time::ClockId;

use super::reading::ClockReading;
use crate::sys;

/// Shortest time between the two readings of a measurement. At 0.1 s and 50 ns a reading the error is below 1 ppm.
pub const SPAN_MIN: Duration = Duration::from_millis(100);

/// Attempts for one reading of both clocks: the tightest counts.
const READINGS: usize = 64;
const SHIFT_MAX: u32 = 32;
const MULT_MAX: u32 = i32::MAX.cast_unsigned();

/// nanoseconds = cycles × mult >> shift
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Scale {
    /// See above: 31 bits.
    pub mult: u32,
    /// At most 32.
    pub shift: u32,
    /// Where it comes from.
    pub source: ScaleSource,
    /// How far its rate may be from CLOCK_MONOTONIC_RAW's, in parts per million.
    pub error_ppm: f64,
    /// How far the frequency named by CPUID is from it, where CPUID names one, in parts per million.
    pub cpuid_ppm: Option<f64>,
}

/// Where a scale comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ScaleSource {
    /// The kernel's own factor, from perf.
    Perf,
    /// Measured against CLOCK_MONOTONIC_RAW.
    Measured,
}

/// A measurement that has begun. The longer until [`Calibration::scale`], the smaller the error.
#[derive(Clone, Copy, Debug)]
pub struct Calibration {
    first: ClockReading,
    begun: Instant,
}

impl Calibration {
    /// Takes the first reading: some microseconds.
    pub fn begin() -> Self {
        Self { first: reading(), begun: Instant::now() }
    }

    /// The scale of perf, else of what was measured since `begin`.
    pub fn scale(&self) -> Scale {
        sleep(SPAN_MIN.saturating_sub(self.begun.elapsed()));
        let last = reading();
        let span = Elapsed::between(self.first, last);
        let perf = sys::perf::time_factor().unwrap_or_else(|error| {
            log::debug!("no factor from perf: {error}");
            None
        });
        span.scale(perf, sys::cpuid::tsc_hz())
    }
}

fn reading() -> ClockReading {
    ClockReading::tightest(ClockId::CLOCK_MONOTONIC_RAW, READINGS)
}

/// Cycles and nanoseconds that passed in the same time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Elapsed {
    cycles: u64,
    ns: u64,
    /// How many cycles it may be wrong by.
    cycles_error: u64,
}

impl Elapsed {
    fn between(first: ClockReading, last: ClockReading) -> Self {
        Self {
            cycles: last.tsc.saturating_sub(first.tsc).max(1),
            ns: last.ns.saturating_sub(first.ns).max(1),
            cycles_error: (first.window + last.window).div_ceil(2),
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "a ratio for people: 53 bits are plenty")]
    fn scale(self, perf: Option<(u32, u16)>, cpuid_hz: Option<u64>) -> Scale {
        let (mult, shift, source) = match perf {
            Some((mult, shift)) => {
                let (mult, shift) = as_stock_readers_take_it(mult, u32::from(shift));
                (mult, shift, ScaleSource::Perf)
            }
            None => {
                let (mult, shift) = mult_shift(self.cycles, self.ns);
                (mult, shift, ScaleSource::Measured)
            }
        };
        let ns_per_cycle = f64::from(mult) / (1u64 << shift) as f64;
        let measured = self.ns as f64 / self.cycles as f64;
        let window_ppm = self.cycles_error as f64 / self.cycles as f64 * 1e6;
        let error_ppm = window_ppm + (ns_per_cycle / measured - 1.0).abs() * 1e6;
        let cpuid_ppm = cpuid_hz.map(|hz| (hz as f64 * ns_per_cycle / 1e9 - 1.0) * 1e6);
        Scale { mult, shift, source, error_ppm, cpuid_ppm }
    }
}

/// The same factor with a mult of 31 bits.
fn as_stock_readers_take_it(mult: u32, shift: u32) -> (u32, u32) {
    let excess = u32::from(mult > MULT_MAX && shift > 0);
    (mult >> excess, shift - excess)
}

/// The largest shift whose mult fits 31 bits, and that mult, rounded: the best a stock reader can be told.
fn mult_shift(cycles: u64, ns: u64) -> (u32, u32) {
    let mult = |shift: u32| {
        let scaled = ((u128::from(ns) << shift) + u128::from(cycles) / 2) / u128::from(cycles.max(1));
        u32::try_from(scaled).ok().filter(|mult| *mult <= MULT_MAX).map(|mult| (mult, shift))
    };
    (0..=SHIFT_MAX).rev().find_map(mult).unwrap_or((MULT_MAX, 0)) // no TSC is that slow, a broken one may seem so
}

impl Scale {
    /// Nanoseconds of a TSC value, as stock readers compute them.
    pub fn ns(&self, tsc: u64) -> u64 {
        let wide = (u128::from(tsc) * u128::from(self.mult)) >> self.shift;
        u64::try_from(wide & u128::from(u64::MAX)).expect("masked to 64 bits")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn measured_scale_agrees_with_the_kernels_clock_over_another_span() {
        let scale = Calibration::begin().scale();
        assert!(scale.error_ppm < 50.0, "{scale:?}");
        let first = reading();
        sleep(SPAN_MIN);
        let last = reading();
        let (ours, kernels) = (scale.ns(last.tsc) - scale.ns(first.tsc), last.ns - first.ns);
        assert!(ours.abs_diff(kernels) < kernels / 10_000, "{ours} ns, the kernel says {kernels}");
    }

    #[test]
    fn longer_span_has_the_smaller_error() {
        let of = |cycles: u64, ns: u64| Elapsed { cycles, ns, cycles_error: 200 }.scale(None, None).error_ppm;
        assert!(of(2_000_000_000, 1_000_000_000) < of(200_000_000, 100_000_000) / 9.0);
    }

    #[test]
    fn perfs_factor_is_kept_and_its_distance_is_shown() {
        let span = Elapsed { cycles: 2_100_000_000, ns: 1_000_000_000, cycles_error: 0 };
        let scale = span.scale(Some((1_000_000_000, 31)), Some(2_100_000_000));
        assert_eq!((scale.mult, scale.shift, scale.source), (1_000_000_000, 31, ScaleSource::Perf));
        assert!((scale.error_ppm - 22_090.0).abs() < 100.0 && scale.cpuid_ppm.is_some_and(|ppm| ppm < -20_000.0));
    }

    #[test]
    fn factor_that_stock_readers_take_for_negative_is_halved() {
        let span = Elapsed { cycles: 500_000_000, ns: 1_000_000_000, cycles_error: 0 };
        let scale = span.scale(Some((1 << 31, 30)), None);
        assert_eq!((scale.mult, scale.shift), (1 << 30, 29));
    }

    proptest! {
        #[test]
        fn rate_is_within_a_billionth_of_what_was_measured(hz in 600_000_000u64..8_000_000_000, ms in 100u64..100_000) {
            let (cycles, ns) = (hz / 1000 * ms, ms * 1_000_000);
            let (mult, shift) = mult_shift(cycles, ns);
            let (ours, exact) = (u128::from(mult) * u128::from(cycles), u128::from(ns) << shift);
            prop_assert!(ours.abs_diff(exact) * 1_000_000_000 <= exact);
            prop_assert!(shift <= SHIFT_MAX && mult <= MULT_MAX);
        }

        #[test]
        fn any_span_has_a_scale(cycles in 1u64.., ns in 1u64..u64::from(u32::MAX)) {
            let (mult, shift) = mult_shift(cycles, ns);
            prop_assert!(shift <= SHIFT_MAX);
            prop_assert!(mult > 0 || u128::from(ns) << shift < u128::from(cycles));
        }

        #[test]
        fn nanoseconds_are_those_of_the_kernels_arithmetic(tsc: u64, mult in 1u32.., shift in 0u32..=32) {
            let (high, low) = (tsc >> 32, tsc & u64::from(u32::MAX));
            let mult_wide = u64::from(mult);
            let stock = ((low * mult_wide) >> shift).wrapping_add((high * mult_wide) << (32 - shift));
            let scale = Scale { mult, shift, source: ScaleSource::Perf, error_ppm: 0.0, cpuid_ppm: None };
            prop_assert_eq!(scale.ns(tsc), stock);
        }
    }
}
