//! What the programs cost, by the kernel's own statistics.
//!
//! In:    an [`Object`]
//! Out:   [`Cost`]: runs and nanoseconds since the program was loaded, zero while the statistics are off
//! Runs:  test runs (BPF_PROG_TEST_RUN) execute the program on the calling thread

use std::os::fd::OwnedFd;

use aya::{
    programs::{RawTracePointRunOptions, TestRun},
    sys::{Stats, enable_stats},
};

use super::{BpfError, object::Object, refused};

/// What a program has cost while statistics were on ([`count_times`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cost {
    /// How often it ran.
    pub runs: u64,
    /// Time of all runs together.
    pub busy_ns: u128,
}

/// Has the kernel count runs and times of eBPF programs as long as the descriptor is open. Counting adds some 45 ns to
/// each run.
///
/// # Errors
/// The kernel keeps no statistics (before 5.8), or not for this user.
pub fn count_times() -> Result<OwnedFd, BpfError> {
    enable_stats(Stats::RunTime).map_err(BpfError::Statistics)
}

impl Object {
    /// What `program` has cost so far.
    ///
    /// # Errors
    /// The program is not loaded.
    pub fn cost(&self, program: &'static str) -> Result<Cost, BpfError> {
        let info = self.program(program)?.info().map_err(|source| refused(program, source))?;
        Ok(Cost { runs: info.run_count(), busy_ns: info.run_time().as_nanos() })
    }

    /// Runs a tracepoint program once on this thread, `argument` being the tracepoint's first argument.
    ///
    /// # Errors
    /// The kernel refuses the program, or to run it.
    pub fn test_run(&mut self, program: &'static str, argument: u64) -> Result<(), BpfError> {
        let mut args = [0; 12];
        args[0] = argument;
        let arguments = RawTracePointRunOptions { args, cpu: None };
        self.loaded(program)?.test_run(arguments).map(drop).map_err(|source| refused(program, source))
    }
}
