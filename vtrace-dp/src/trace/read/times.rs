//! From the time clock in a file's pages to the times that a stock reader shows.
//!
//! In:    a file's options
//! Out:   for each raw stamp the time in `trace-cmd report -t`: nanoseconds if the file says how, else as recorded
//! Runs:  pure
//! Trust: nothing: files come from anyone; where stock arithmetic overflows, so does this, modulo 2⁶⁴
//!
//! Source: `timestamp_calc()`, `timestamp_host_sync()`, `tsync_cpu_offsets_load()` and `mul_u64_u32_shr()` in
//! lib/trace-cmd/trace-input.c of trace-cmd. In their order: TIME_SHIFT of the CPU (top instance only), TSC2NSEC,
//! DATE and OFFSET.

use vtrace_common::{ids::Cpu, limits::CPUS_MAX};

use super::input::{Input, ReadFault};
use crate::trace::format::{
    layout::{INTERPOLATE, id},
    option::TraceOption,
    section::bytes_of,
};

/// How a file's clock become times.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct FileClock {
    shift: Shift,
    scale: Option<(u32, u32)>,
    offset: u64,
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Shift {
    interpolate: bool,
    cpus: Vec<Vec<Sample>>,
}

/// One sample, in the signed numbers of the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Sample {
    time: i64,
    offset: i64,
    scaling: i64,
    fraction: i64,
}

impl FileClock {
    /// From options and [`super::Reader::other_options`].
    ///
    /// # Errors
    /// A time shift that reaches beyond its end, or has too many CPUs.
    pub fn from_options(options: &[TraceOption], others: &[(u16, Vec<u8>)]) -> Result<Self, ReadFault> {
        let mut clock = Self::default();
        for option in options {
            match option {
                TraceOption::TimeShift(shift) => {
                    let sample = |sample: &crate::clock::shift::ShiftSample| Sample {
                        time: sample.time.cast_signed(),
                        offset: sample.offset,
                        scaling: 1,
                        fraction: 0,
                    };
                    let cpus = shift.cpus.iter().map(|samples| sorted(samples.iter().map(sample).collect()));
                    clock.shift = Shift { interpolate: shift.interpolate, cpus: cpus.collect() };
                }
                TraceOption::Date(text) => {
                    clock.offset = clock.offset.wrapping_add(number(text.as_bytes()).wrapping_mul(1000));
                }
                TraceOption::Tsc2Nsec { mult, shift } => clock.scale = (*mult > 0).then_some((*mult, *shift)),
                _ => {}
            }
        }
        for (id, payload) in others {
            match *id {
                id::TIME_SHIFT => clock.shift = Shift::parse(payload)?,
                id::DATE => clock.offset = clock.offset.wrapping_add(number(payload).wrapping_mul(1000)),
                id::OFFSET => clock.offset = clock.offset.wrapping_add(number(payload)),
                _ => {}
            }
        }
        Ok(clock)
    }

    /// The same without a time shift: for instances that are not the top one.
    pub fn unshifted(&self) -> Self {
        Self { shift: Shift::default(), ..self.clone() }
    }

    /// Cycles become nanoseconds.
    pub fn is_scaled(&self) -> bool {
        self.scale.is_some()
    }

    /// By which numbers cycles become nanoseconds: multiplier and shift.
    pub fn scale(&self) -> Option<(u32, u32)> {
        self.scale
    }

    /// The time that is shown for an event of `cpu` with this stamp. Hot.
    pub fn shown(&self, cpu: Cpu, raw: u64) -> u64 {
        let time = self.shift.apply(cpu, raw);
        let time = self.scale.map_or(time, |(mult, shift)| scale(time, mult, shift));
        time.wrapping_add(self.offset)
    }
}

/// The two halves one by one, as stock readers do.
fn scale(time: u64, mult: u32, shift: u32) -> u64 {
    let mult = u64::from(mult);
    let (high, low) = (time >> 32, time & u64::from(u32::MAX));
    let upper = match shift {
        0..=32 => (high * mult).wrapping_shl(32 - shift),
        _ => (high * mult) >> (shift - 32).min(63), // undefined in stock readers
    };
    ((low * mult) >> shift.min(63)).wrapping_add(upper)
}

impl Shift {
    /// A time shift that [`TraceOption`] has no words for, because it scales.
    fn parse(payload: &[u8]) -> Result<Self, ReadFault> {
        let mut input = Input::new(&payload, 0, bytes_of(payload));
        input.u64("peer of a time shift")?;
        let interpolate = input.u32("flags of a time shift")? & INTERPOLATE != 0;
        let count = input.u32("number of CPUs")?;
        let max = u64::try_from(CPUS_MAX).unwrap_or(u64::MAX);
        if u64::from(count) > max {
            let count = u64::from(count);
            return Err(ReadFault::TooLarge { what: "time shift", offset: 12, count, count_max: max });
        }
        let mut cpus = Vec::new();
        for _ in 0..count {
            let samples = input.u32("number of samples")?;
            let [times, offsets, scalings] =
                [longs(&mut input, samples)?, longs(&mut input, samples)?, longs(&mut input, samples)?];
            let zipped = times.into_iter().zip(offsets).zip(scalings);
            let sample = |((time, offset), scaling)| Sample { time, offset, scaling, fraction: 0 };
            cpus.push(zipped.map(sample).collect::<Vec<_>>());
        }
        if input.left() > 0 {
            for samples in &mut cpus {
                let fractions = longs(&mut input, u32::try_from(samples.len()).unwrap_or(u32::MAX))?;
                samples.iter_mut().zip(fractions).for_each(|(sample, fraction)| sample.fraction = fraction);
            }
        }
        Ok(Self { interpolate, cpus: cpus.into_iter().map(sorted).collect() })
    }

    fn apply(&self, cpu: Cpu, time: u64) -> u64 {
        let samples = usize::try_from(cpu.0).ok().and_then(|cpu| self.cpus.get(cpu));
        match samples.map(Vec::as_slice) {
            None | Some([]) => time,
            Some([only]) => time.wrapping_add_signed(only.offset),
            Some(samples) => {
                // The largest time that is not above; the last sample is only the end of the last line.
                let above = samples.partition_point(|sample| sample.time.cast_unsigned() <= time);
                let at = above.saturating_sub(1).min(samples.len() - 2);
                self.correct(time, &samples[at], &samples[at + 1])
            }
        }
    }

    fn correct(&self, time: u64, from: &Sample, to: &Sample) -> u64 {
        let mut offset = from.offset;
        if self.interpolate {
            let delta = to.time.wrapping_sub(from.time);
            let since = time.cast_signed().wrapping_sub(from.time);
            let product = since.wrapping_mul(to.offset.wrapping_sub(from.offset));
            let more = product.wrapping_add(delta / 2).checked_div(delta).unwrap_or(0);
            offset = offset.wrapping_add(more);
        }
        let scaled = time.wrapping_mul(from.scaling.cast_unsigned());
        let fraction = u32::try_from(from.fraction).unwrap_or(0);
        scaled.wrapping_shr(fraction).wrapping_add_signed(offset)
    }
}

/// By time; of samples of one time the first counts.
fn sorted(mut samples: Vec<Sample>) -> Vec<Sample> {
    samples.sort_by_key(|sample| sample.time);
    samples.dedup_by_key(|sample| sample.time);
    samples
}

fn longs(input: &mut Input<'_, &[u8]>, count: u32) -> Result<Vec<i64>, ReadFault> {
    let bytes = input.bytes(u64::from(count) * 8, usize::MAX, "samples of a time shift")?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|word| i64::from_le_bytes(*word)).collect())
}

/// A number as C's strtoll reads it with base 0: sign, 0x, leading 0 for octal; up to the first other letter.
fn number(text: &[u8]) -> u64 {
    let text = text.trim_ascii_start();
    let (negative, text) = match text {
        [b'-', rest @ ..] => (true, rest),
        [b'+', rest @ ..] => (false, rest),
        _ => (false, text),
    };
    let (base, digits) = match text {
        [b'0', b'x' | b'X', rest @ ..] => (16, rest),
        [b'0', rest @ ..] => (8, rest),
        _ => (10, text),
    };
    let digits = digits.iter().map_while(|digit| char::from(*digit).to_digit(base));
    let number = digits.fold(0u64, |sum, digit| sum.saturating_mul(u64::from(base)).saturating_add(digit.into()));
    let number = number.min(i64::MAX.unsigned_abs());
    if negative { number.wrapping_neg() } else { number }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::clock::shift::{ShiftSample, TimeShift};

    fn shift(interpolate: bool, samples: &[(u64, i64)]) -> FileClock {
        let sample = |&(time, offset): &(u64, i64)| ShiftSample { time, offset };
        let cpus = vec![samples.iter().map(sample).collect()];
        FileClock::from_options(&[TraceOption::TimeShift(TimeShift { peer: 1, interpolate, cpus })], &[]).unwrap()
    }

    fn shown(clock: &FileClock, times: &[u64]) -> Vec<u64> {
        times.iter().map(|time| clock.shown(Cpu(0), *time)).collect()
    }

    #[test]
    fn one_sample_and_the_first_of_two_shift_everything() {
        assert_eq!(shown(&shift(false, &[(50, -10)]), &[10, 100]), [0, 90]);
        assert_eq!(shown(&shift(false, &[(50, 5), (60, 1000)]), &[10, 100]), [15, 105]);
        assert_eq!(shift(false, &[(50, 5)]).shown(Cpu(1), 7), 7, "a CPU without an entry keeps its time");
    }

    #[test]
    fn three_samples_are_steps_and_the_last_is_never_used() {
        let clock = shift(false, &[(10, 1), (20, 2), (30, 3)]);
        assert_eq!(shown(&clock, &[5, 10, 19, 20, 29, 30, 99]), [6, 11, 20, 22, 31, 32, 101]);
    }

    #[test]
    fn interpolation_is_a_line_and_goes_on_beyond_both_ends() {
        let clock = shift(true, &[(100, 0), (200, 10), (300, 110)]);
        assert_eq!(shown(&clock, &[90, 100, 150, 200, 250, 300, 350]), [90, 100, 155, 210, 310, 410, 510]);
    }

    #[test]
    fn scaled_shift_multiplies_as_stock_does() {
        let mut payload = [1u64.to_le_bytes().as_slice(), &0u32.to_le_bytes(), &1u32.to_le_bytes()].concat();
        payload.extend(2u32.to_le_bytes());
        [0u64, 1, 7, 7, 3, 3, 1, 1].iter().for_each(|word| payload.extend(word.to_le_bytes()));
        let clock = FileClock::from_options(&[], &[(id::TIME_SHIFT, payload.clone())]).unwrap();
        assert_eq!(clock.shown(Cpu(0), 100), ((100 * 3) >> 1) + 7);
        assert!(FileClock::from_options(&[], &[(id::TIME_SHIFT, payload[..40].to_vec())]).is_err());
    }

    #[test]
    fn date_counts_in_microseconds_and_offset_as_it_is() {
        let others = [(id::DATE, b"0x10\0".to_vec()), (id::OFFSET, b"-7\n".to_vec())];
        let clock = FileClock::from_options(&[TraceOption::Tsc2Nsec { mult: 1, shift: 1 }], &others).unwrap();
        assert!(clock.is_scaled());
        assert_eq!(clock.shown(Cpu(0), 10), 5 + 16_000 - 7);
        assert_eq!([number(b" +017"), number(b"12ab"), number(b"")], [15, 12, 0]);
    }

    proptest! {
        #[test]
        fn scaling_differs_from_the_product_by_at_most_one(time in 0..1u64 << 48, mult: u32, shift in 16..33u32) {
            let product = (u128::from(time) * u128::from(mult)) >> shift;
            let shown = scale(time, mult, shift);
            prop_assert!(u64::try_from(product).unwrap() - shown <= 1);
        }

        #[test]
        fn any_options_give_an_answer(
            samples in prop::collection::vec(any::<(u64, i64)>(), 0..6), interpolate: bool, payload: Vec<u8>,
            mult: u32, bits: u32, time: u64,
        ) {
            let _ = shift(interpolate, &samples).shown(Cpu(0), time);
            let options = [TraceOption::Tsc2Nsec { mult, shift: bits }];
            for id in [id::TIME_SHIFT, id::DATE, id::OFFSET] {
                if let Ok(clock) = FileClock::from_options(&options, &[(id, payload.clone())]) {
                    let _ = clock.shown(Cpu(0), time);
                }
            }
        }
    }
}
