//! What the program at kvm_entry costs, on machines whose KVM never calls it.
//!
//! In:    a real vCPU of a watched process. Out: time by the kernel's own statistics, beside a program that does nothing.
//! Runs:  the kernel runs the program itself, in this thread (BPF_PROG_TEST_RUN), with the arguments the tracepoint has.
//! Full:  does not apply. Trust: the kernel.

use std::os::fd::OwnedFd;

use aya::programs::{RawTracePoint, RawTracePointRunOptions, TestRun};
use aya::sys::{Stats, enable_stats};
use thiserror::Error;

use super::{Cost, Feed, FeedError, Hook, program, refused};

/// Why nothing was measured.
#[derive(Debug, Error)]
pub enum RehearsalError {
    /// The programs do not work here.
    #[error(transparent)]
    Feed(#[from] FeedError),
    /// The kernel counts no times.
    #[error("the kernel keeps no statistics of eBPF programs")]
    Statistics(#[source] aya::sys::SyscallError),
}

/// Has the kernel count runs and times of eBPF programs for as long as this is held. Counting costs some 45 ns a run.
///
/// # Errors
/// When the kernel keeps none (before 5.8), or not for us.
pub fn count_times() -> Result<OwnedFd, RehearsalError> {
    enable_stats(Stats::RunTime).map_err(RehearsalError::Statistics)
}

impl Feed {
    /// Runs the program at kvm_entry `times` times for the vCPU at this address, and as often the one that does nothing,
    /// in turn. Gives what each cost: both contain what the statistics themselves cost.
    ///
    /// # Errors
    /// When the kernel refuses a program, to run it, or to count.
    pub fn rehearse(&mut self, vcpu: u64, times: u32) -> Result<[Cost; 2], RehearsalError> {
        const NAMES: [&str; 2] = [Hook::Entry.program(), "empty"];
        for name in NAMES {
            let program: &mut RawTracePoint = program(&mut self.programs, name)?;
            if program.fd().is_err() {
                program.load().map_err(|source| refused(name, source))?;
            }
        }
        let before = [self.cost_of(NAMES[0])?, self.cost_of(NAMES[1])?];
        let statistics = count_times()?;
        for _ in 0..times {
            for name in NAMES {
                let program: &mut RawTracePoint = program(&mut self.programs, name)?;
                let arguments = RawTracePointRunOptions { args: [vcpu, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], cpu: None };
                program.test_run(arguments).map_err(|source| refused(name, source))?;
            }
        }
        drop(statistics);
        let cost = |at: usize| -> Result<Cost, FeedError> {
            let Cost { runs, busy_ns } = self.cost_of(NAMES[at])?;
            Ok(Cost { runs: runs - before[at].runs, busy_ns: busy_ns - before[at].busy_ns })
        };
        Ok([cost(0)?, cost(1)?])
    }
}
