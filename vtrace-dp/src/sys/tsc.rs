//! Reads the time stamp counter.
//!
//! Out:   cycles of the CPU this runs on: the same counter as the x86-tsc trace clock
//! Trust: the CPU
#![expect(unsafe_code, reason = "the counter is read by an intrinsic")]

use std::arch::x86_64::{_mm_lfence, _rdtsc};

/// Cycles now, after everything before has happened (lfence; rdtsc, as the kernel's `rdtsc_ordered`). Hot.
pub fn read() -> u64 {
    // SAFETY: SSE2 is part of x86-64; a fence touches no memory.
    unsafe { _mm_lfence() };
    // SAFETY: every x86-64 CPU has the counter; reading it touches no memory.
    unsafe { _rdtsc() }
}

#[cfg(test)]
mod tests {
    #[test]
    fn counter_does_not_run_backwards_on_one_thread() {
        let readings: Vec<u64> = (0..1000).map(|_| super::read()).collect();
        assert!(readings.is_sorted());
    }
}
