//! What the program at kvm_entry costs, measured on machines whose KVM never calls it.
//!
//! In:    a real vCPU of a watched process
//! Out:   the time of the program by the kernel's statistics, and that of a program that does nothing
//! Runs:  on the calling thread, with the arguments that the tracepoint has

use super::{EMPTY, Feed, FeedError, Hook};
use crate::bpf::cost::{Cost, count_times};

impl Feed {
    /// Runs the program at kvm_entry `times` times for the vCPU at this address, in turn with the program that does
    /// nothing. Returns the cost of both; each contains what the statistics themselves cost.
    ///
    /// # Errors
    /// The kernel refuses a program, or to run it, or to count.
    pub fn measure_entry(&mut self, vcpu: u64, times: u32) -> Result<[Cost; 2], FeedError> {
        const NAMES: [&str; 2] = [Hook::Entry.program(), EMPTY];
        for name in NAMES {
            self.object.test_run(name, vcpu)?;
        }
        let [entry_before, empty_before] = [self.object.cost(NAMES[0])?, self.object.cost(NAMES[1])?];
        let statistics = count_times()?;
        for _ in 0..times {
            for name in NAMES {
                self.object.test_run(name, vcpu)?;
            }
        }
        drop(statistics);
        let since =
            |now: Cost, before: Cost| Cost { runs: now.runs - before.runs, busy_ns: now.busy_ns - before.busy_ns };
        let [entry, empty] = [self.object.cost(NAMES[0])?, self.object.cost(NAMES[1])?];
        Ok([since(entry, entry_before), since(empty, empty_before)])
    }
}
