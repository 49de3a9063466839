//! When every vCPU thread of the host could run its guest, and what it caused, from the host's file.
//!
//! In:    the host's trace.dat
//! Out:   [`HostWindows`]: windows by thread, gaps, the host's half of pairs
//! Runs:  on the caller's thread, once through the file in time order
//! Full:  at most [`BOUNDARIES_MAX`] boundaries are held; later times are not covered, and the report says so
//! Trust: nothing

use std::collections::{BTreeMap, HashMap};

use super::{
    Against, CheckError,
    host_events::{Decoders, HostAction},
    pairs::Causes,
    windows::{Gaps, Windows},
};
use crate::{
    ftrace::fields::Formats,
    trace::read::{
        Reader,
        input::Source,
        merge::{Merge, Merged},
        times::FileClock,
    },
};

/// Most boundaries held, of all windows together: 1 GiB.
pub const BOUNDARIES_MAX: usize = 1 << 26;

/// What one pass over a host's file found.
#[derive(Debug, Default)]
pub struct HostWindows {
    /// Windows from kvm_entry to kvm_exit of each thread.
    pub runs: HashMap<u32, Windows>,
    /// Windows in which each requested thread was on a CPU, by sched_switch.
    pub on_cpu: HashMap<u32, Windows>,
    /// The vCPU id of each thread that entered a guest.
    pub vcpu_ids: BTreeMap<u32, u32>,
    /// Periods in which the host lost events.
    pub gaps: Gaps,
    /// The host's half of pairs.
    pub causes: Causes,
    /// The file has more boundaries than [`BOUNDARIES_MAX`].
    pub is_cut: bool,
    boundaries: usize,
}

impl HostWindows {
    /// Reads a host's file. `threads` are the known vCPU threads: [`HostWindows::on_cpu`] covers only these.
    ///
    /// # Errors
    /// A page cannot be read or is broken, or the options are invalid.
    pub fn read<S: Source>(reader: &Reader<S>, threads: &[u32]) -> Result<Self, CheckError> {
        let file_clock = FileClock::from_options(reader.options(), reader.other_options())?;
        let decoders = Decoders::new(&Formats::parse(reader.metadata()));
        let mut host = Self::default();
        threads.iter().for_each(|thread| drop(host.on_cpu.insert(*thread, Windows::default())));
        let clock = reader.top().map(|top| top.clock.clone()).unwrap_or_default();
        // KVM's events may be in an instance of their own.
        let mut buffers = Vec::new();
        for buffer in reader.buffers().iter().filter(|buffer| buffer.clock == clock) {
            let is_top = buffer.name.is_empty();
            buffers.push((buffer, if is_top { file_clock.clone() } else { file_clock.unshifted() }));
        }
        let mut merge = Merge::new(reader, &buffers)?;
        while let Some(event) = merge.next_event()? {
            host.take(&event, &decoders);
        }
        host.gaps.settle();
        Ok(host)
    }

    fn take(&mut self, event: &Merged<'_>, decoders: &Decoders) {
        if let Some(since) = event.lost_since {
            self.gaps.push(since, event.time);
        }
        let Some((thread, action)) = decoders.read(event.data) else { return };
        match action {
            HostAction::Enter(vcpu) => {
                if let Some(vcpu) = vcpu {
                    self.vcpu_ids.insert(thread, vcpu);
                }
                if self.has_room() {
                    self.runs.entry(thread).or_default().push(event.time, true);
                }
            }
            HostAction::Leave if self.has_room() => self.runs.entry(thread).or_default().push(event.time, false),
            HostAction::Leave | HostAction::Announce { .. } => {}
            HostAction::Switch(from, to) => {
                self.switch(from, event.time, false);
                self.switch(to, event.time, true);
            }
            HostAction::Cause(rule, key) => self.causes.push(thread, (rule, key), event.time),
        }
    }

    fn switch(&mut self, thread: Option<u32>, time: u64, opens: bool) {
        if thread.is_some_and(|thread| self.on_cpu.contains_key(&thread)) && self.has_room() {
            let windows = thread.and_then(|thread| self.on_cpu.get_mut(&thread));
            windows.expect("contains_key returned true").push(time, opens);
        }
    }

    fn has_room(&mut self) -> bool {
        self.boundaries += 1;
        self.is_cut |= self.boundaries > BOUNDARIES_MAX;
        !self.is_cut
    }

    /// The best windows that these threads have.
    pub fn against(&self, threads: &[u32]) -> Against {
        let known = |all: &HashMap<u32, Windows>| {
            threads.iter().any(|thread| all.get(thread).is_some_and(|windows| windows.count() > 0))
        };
        if known(&self.runs) {
            Against::Runs
        } else if known(&self.on_cpu) {
            Against::OnCpu
        } else {
            Against::Nothing
        }
    }

    /// The windows of a thread, of the given kind.
    pub fn windows(&self, against: Against, thread: u32) -> Option<&Windows> {
        match against {
            Against::Runs => self.runs.get(&thread),
            Against::OnCpu => self.on_cpu.get(&thread),
            Against::Nothing => None,
        }
    }
}
