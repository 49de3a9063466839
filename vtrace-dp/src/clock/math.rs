//! The arithmetic of one stretch of a guest's TSC, forward as the hardware does it and exactly back.
//!
//! In:    an offset and a ratio as KVM holds them; a time of one side
//! Out:   the guest's time; all host times that show as one guest time
//! Runs:  anywhere; pure
//! Full:  does not apply
//! Trust: the pair comes from the kernel, guest times from anyone: every number has an answer
//!
//! Source: arch/x86/kvm/x86.c `kvm_scale_tsc`, `kvm_read_l1_tsc`: guest = (host × ratio >> fraction bits) + offset,
//! modulo 2⁶⁴. With g − offset = x that is x ≤ host × ratio / 2ᶠ < x + 1, so the host was in
//! `⌈x·2ᶠ/ratio⌉ ..= ⌈(x+1)·2ᶠ/ratio⌉ − 1`: one tick if the guest is not slower than the host, else at most ⌈2ᶠ/ratio⌉.

use std::num::NonZeroU64;

use vtrace_common::time::{GuestTsc, HostTsc};

use super::ratio::Ratio;

/// What KVM tells the hardware: guest = host × ratio + offset.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Pair {
    /// guest − scaled host, cycles, modulo 2⁶⁴. (The opposite sign of [`super::Offset`], as KVM has it.)
    pub offset: u64,
    /// `None`: the guest's TSC runs as fast as the host's.
    pub ratio: Option<Ratio>,
}

/// Host times from `low` to `high`, both included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostRange {
    /// The first.
    pub low: HostTsc,
    /// The last.
    pub high: HostTsc,
}

impl HostRange {
    /// One tick.
    pub const fn at(host: HostTsc) -> Self {
        Self { low: host, high: host }
    }

    /// The middle, rounded down: half the range's width is the farthest that any of it is away.
    pub const fn middle(self) -> HostTsc {
        HostTsc(self.low.0 + (self.high.0 - self.low.0) / 2)
    }

    /// Ticks from the first to the last.
    pub const fn width(self) -> u64 {
        self.high.0 - self.low.0
    }

    /// Some tick is in both.
    pub fn meets(self, other: Self) -> bool {
        self.low <= other.high && other.low <= self.high
    }
}

impl Pair {
    /// What the guest reads when the host's TSC is `host`. Hot.
    pub fn to_guest(self, host: HostTsc) -> GuestTsc {
        GuestTsc(low_half(self.scale(host)).wrapping_add(self.offset))
    }

    /// All host times that show as `guest`: of the sets 2⁶⁴ guest cycles apart the one nearest to `near`. Nothing if
    /// no host time does: a faster guest's clock skips values. Hot.
    pub fn to_host(self, guest: GuestTsc, near: HostTsc) -> Option<HostRange> {
        let scaled = guest.0.wrapping_sub(self.offset);
        let Some(ratio) = self.ratio else {
            return Some(HostRange::at(HostTsc(scaled)));
        };
        let scaled = self.unwrapped(scaled, near);
        let (low, high) = ratio.hosts_of(scaled)?;
        (low <= high).then_some(HostRange { low: HostTsc(low), high: HostTsc(high) })
    }

    /// As [`Pair::to_host`]; for a value that the guest's clock skips, the first host time that shows a larger one. Hot.
    pub fn to_host_or_next(self, guest: GuestTsc, near: HostTsc) -> HostRange {
        self.to_host(guest, near).unwrap_or_else(|| {
            let scaled = self.unwrapped(guest.0.wrapping_sub(self.offset), near);
            let first = self.ratio.and_then(|ratio| ratio.hosts_of(scaled)).map_or(u64::MAX, |(low, _)| low);
            HostRange::at(HostTsc(first))
        })
    }

    /// The ticks of the host within which the guest's clock keeps its value, at most.
    pub fn resolution(self) -> u64 {
        self.ratio.map_or(1, |ratio| (1u64 << ratio.fraction_bits).div_ceil(ratio.raw.get()))
    }

    /// The host's ticks in so many of the guest's, rounded down.
    pub fn host_ticks(self, guest_ticks: u64) -> u64 {
        let Some(ratio) = self.ratio else { return guest_ticks };
        let ticks = (u128::from(guest_ticks) << ratio.fraction_bits) / u128::from(ratio.raw.get());
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }

    /// host × ratio, not yet cut to 64 bits.
    fn scale(self, host: HostTsc) -> u128 {
        let host = u128::from(host.0);
        self.ratio.map_or(host, |ratio| (host * u128::from(ratio.raw.get())) >> ratio.fraction_bits)
    }

    /// The value that ends in these 64 bits and is nearest to what `near` shows.
    fn unwrapped(self, scaled: u64, near: HostTsc) -> u128 {
        let expected = self.scale(near);
        let ahead = scaled.wrapping_sub(low_half(expected)).cast_signed();
        expected.checked_add_signed(i128::from(ahead)).unwrap_or(u128::from(scaled))
    }
}

impl Ratio {
    /// First and last host time that this scales to `scaled`; the last is before the first if none does.
    fn hosts_of(self, scaled: u128) -> Option<(u64, u64)> {
        let divisor = u128::from(self.raw.get());
        let one = 1u128 << self.fraction_bits;
        let numerator = scaled.checked_mul(one)?;
        let (quotient, rest) = divide(numerator, self.raw);
        let low = quotient + u128::from(rest > 0);
        // (x+1)·2ᶠ = quotient·r + rest + 2ᶠ: a short division more.
        let next = quotient + (u128::from(rest) + one).div_ceil(divisor);
        let low = u64::try_from(low).ok()?;
        Some((low, u64::try_from(next - 1).unwrap_or(u64::MAX)))
    }
}

/// By 64 bits, where the quotient has 64 bits in nearly every case.
fn divide(numerator: u128, divisor: NonZeroU64) -> (u128, u64) {
    let divisor = u128::from(divisor.get());
    let (quotient, rest) = (numerator / divisor, numerator % divisor);
    (quotient, u64::try_from(rest).expect("less than a divisor of 64 bits"))
}

fn low_half(wide: u128) -> u64 {
    u64::try_from(wide & u128::from(u64::MAX)).expect("masked to 64 bits")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pair(offset: u64, raw: u64, fraction_bits: u32) -> Pair {
        Pair { offset, ratio: Some(Ratio { raw: NonZeroU64::new(raw).unwrap(), fraction_bits }) }
    }

    /// What is wrong with the inverse of one conversion; `None` if nothing is.
    fn wrong(pair: Pair, host: u64) -> Option<&'static str> {
        let guest = pair.to_guest(HostTsc(host));
        let Some(range) = pair.to_host(guest, HostTsc(host)) else { return Some("nothing found") };
        let shows = |host: u64| pair.to_guest(HostTsc(host)) == guest;
        match range {
            HostRange { low, high } if host < low.0 || host > high.0 => Some("the host time is not among them"),
            HostRange { low, high } if !shows(low.0) || !shows(high.0) => Some("an end shows another guest time"),
            HostRange { low, .. } if low.0 > 0 && shows(low.0 - 1) => Some("one before shows the same"),
            HostRange { high, .. } if high.0 < u64::MAX && shows(high.0 + 1) => Some("one after shows the same"),
            range if range.width() >= pair.resolution() => Some("wider than the clock's resolution"),
            _ => None,
        }
    }

    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }
    }

    #[test]
    fn ten_million_random_conversions_do_not_violate_their_intervals() {
        let count = 10_000_000;
        let (mut random, mut violations) = (Random(0x9e37_79b9_7f4a_7c15), 0);
        for round in 0..count {
            let fraction_bits = if round % 2 == 0 { 32 } else { 48 };
            let one = 1u64 << fraction_bits;
            // From 1/64 to 64 times, evenly in the exponent.
            let mantissa = one | (random.next() & (one - 1));
            let exponent = random.next() % 12;
            let raw = if exponent < 6 { mantissa >> (6 - exponent) } else { mantissa << (exponent - 6) };
            let host = random.next() >> (random.next() % 24);
            let offset = if round % 3 == 0 { None } else { Some(random.next()) };
            let pair = pair(offset.unwrap_or(0), raw, fraction_bits);
            violations += u32::from(wrong(pair, host).is_some());
        }
        assert_eq!(violations, 0);
    }

    #[test]
    fn host_rate_is_its_own_inverse() {
        let pair = Pair { offset: 5000u64.wrapping_neg(), ratio: None };
        assert_eq!(pair.to_guest(HostTsc(4000)), GuestTsc(1000u64.wrapping_neg()));
        let range = pair.to_host(GuestTsc(1000u64.wrapping_neg()), HostTsc(0));
        assert_eq!(range, Some(HostRange::at(HostTsc(4000))));
    }

    #[test]
    fn value_that_a_fast_clock_skips_has_no_host_time_but_a_next_one() {
        let double = pair(0, 1 << 33, 32);
        assert_eq!(double.to_host(GuestTsc(7), HostTsc(0)), None);
        assert_eq!(double.to_host_or_next(GuestTsc(7), HostTsc(0)), HostRange::at(HostTsc(4)));
        assert_eq!(double.to_host_or_next(GuestTsc(8), HostTsc(0)), HostRange::at(HostTsc(4)));
    }

    /// A guest of 1 234 567 kHz on a host of 3 499 912 kHz, seen in a machine with 48 bits of fraction.
    #[test]
    fn slow_guest_shows_one_value_for_some_host_ticks() {
        let ratio = u64::try_from((1u128 << 48) * 1_234_567 / 3_499_912).unwrap();
        let slow = pair(77, ratio, 48);
        let range = slow.to_host(slow.to_guest(HostTsc(15_143_087_303)), HostTsc(0)).unwrap();
        assert!(range.low.0 <= 15_143_087_303 && 15_143_087_303 <= range.high.0 && range.width() < 3);
        assert_eq!(slow.resolution(), 3);
    }

    proptest! {
        #[test]
        fn any_pair_and_time_is_exactly_inverted(offset: u64, raw in 1u64.., vmx: bool, host: u64) {
            prop_assert_eq!(wrong(pair(offset, raw, if vmx { 48 } else { 32 }), host), None);
        }

        #[test]
        fn any_guest_time_gives_an_answer(offset: u64, raw in 1u64.., vmx: bool, guest: u64, near: u64) {
            let pair = pair(offset, raw, if vmx { 48 } else { 32 });
            let found = pair.to_host(GuestTsc(guest), HostTsc(near));
            prop_assert!(found.is_none_or(|range| pair.to_guest(range.low).0 == guest));
            let _ = pair.to_host_or_next(GuestTsc(guest), HostTsc(near));
        }
    }
}
