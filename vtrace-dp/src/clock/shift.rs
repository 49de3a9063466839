//! Time shifts: the option TIME_SHIFT of stock trace-cmd, by which readers convert a guest's times.
//!
//! In:    offsets from a guest's times on
//! Out:   values that [`exact_shift`](super::exact_shift) and [`measured`](super::measured) make and `trace` writes
//! Trust: our own code; `trace` checks what it reads from a file

/// What a stock reader adds to a guest's time stamps.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TimeShift {
    /// The host's trace id.
    pub peer: u64,
    /// Linear between samples; else the first of two samples, or steps.
    pub interpolate: bool,
    /// Samples of each CPU, from CPU 0, at least two each.
    pub cpus: Vec<Vec<ShiftSample>>,
}

/// From this guest time on, host = guest + offset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShiftSample {
    /// Guest TSC.
    pub time: u64,
    /// Cycles to add.
    pub offset: i64,
}
