//! The TSC offset and ratio of every vCPU, now and at each change, as the eBPF programs report them.
//!
//! In:    the [`Fields`] of the running kernel; the processes whose vCPUs are watched
//! Out:   [`VcpuState`] of every vCPU of the system at any moment ([`Feed::snapshot`]), a [`TscChange`] whenever a watched
//!        vCPU has a new state ([`Feed::next_change`]; the descriptor polls readable), and counters
//! Runs:  on the thread that owns it. The programs run in the vCPUs' own threads
//! Full:  a change that finds the ring buffer full is counted and reported at the vCPU's next entry, together with later
//!        ones; a state between the two is lost. The buffer holds 3000 changes
//! Trust: the kernel
//!
//! The order that misses no change: attach, watch, then take a snapshot; later changes arrive as changes.

use std::{
    collections::HashSet,
    fmt,
    os::fd::{AsFd, BorrowedFd},
};

use thiserror::Error;
use vtrace_common::kvm::{Hits, PER_CPU_WORDS, TscChange, VcpuState};

use super::btf::Fields;
use crate::bpf::{
    BpfError,
    cost::Cost,
    maps::{KeySet, PerCpuValue, RecordRing},
    object::Object,
};

/// The key of `WANTED` that stands for every process.
const EVERY_PROCESS: u32 = 0;
/// The program that does nothing: the cost of the others is measured against it.
const EMPTY: &str = "empty";

/// The eBPF programs do not report vCPU states.
#[derive(Debug, Error)]
pub enum FeedError {
    /// The kernel refused them, or they cannot be read.
    #[error(transparent)]
    Bpf(#[from] BpfError),
    /// The arguments of `kvm_exit` are not in the kernel's BTF (5.10).
    #[error("this kernel's BTF does not describe the arguments of kvm_exit")]
    ExitUnknown,
}

/// The tracepoint that a program is attached to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Hook {
    /// `kvm_entry`: the source of the clock.
    Entry,
    /// `kvm_exit`: reports nothing more than `kvm_entry`, at twice the cost.
    Exit,
    /// `kvm_emulate_insn`: replaces `kvm_entry` in load tests on machines whose KVM does not call that.
    Emulate,
}

impl Hook {
    const fn program(self) -> &'static str {
        match self {
            Self::Entry => "kvm_entry",
            Self::Exit => "kvm_exit",
            Self::Emulate => "kvm_emulate_insn",
        }
    }
}

/// The processes whose vCPUs are reported.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Watched {
    /// The process of this id (tgid).
    Process(u32),
    /// Every process.
    Everyone,
}

/// The loaded programs and their maps.
pub struct Feed {
    object: Object,
    changes: RecordRing,
    wanted: KeySet,
    per_cpu: PerCpuValue<[u64; PER_CPU_WORDS]>,
    exit_is_known: bool,
}

impl fmt::Debug for Feed {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Feed").field("hits", &self.hits()).finish_non_exhaustive()
    }
}

impl Feed {
    /// Loads the programs for this kernel; none is attached yet. With `announce` each change is also written to the event
    /// `bpf_trace:bpf_trace_printk`, so that an instance that records this event has the change among its own events.
    ///
    /// # Errors
    /// The kernel has no BTF or refuses the object (not root, or lockdown=confidentiality).
    pub fn load(fields: &Fields, announce: bool) -> Result<Self, FeedError> {
        let mut layout = fields.layout;
        layout.announce = u32::from(announce);
        let mut object = Object::load(&layout)?;
        Ok(Self {
            changes: RecordRing::open(&mut object, "CHANGES")?,
            wanted: KeySet::open(&mut object, "WANTED")?,
            per_cpu: PerCpuValue::open(&mut object, "PER_CPU")?,
            object,
            exit_is_known: fields.exit_argument.is_some(),
        })
    }

    /// Attaches the program of a hook until this feed is dropped.
    ///
    /// # Errors
    /// [`BpfError::NoTracepoint`] where KVM is not loaded; [`FeedError::ExitUnknown`] for `kvm_exit` on 5.10;
    /// [`BpfError::Program`] when the verifier refuses the program.
    pub fn attach(&mut self, hook: Hook) -> Result<(), FeedError> {
        if hook == Hook::Exit && !self.exit_is_known {
            return Err(FeedError::ExitUnknown);
        }
        Ok(self.object.attach(hook.program(), hook.program())?)
    }

    /// Attaches the program that does nothing to `tracepoint`.
    ///
    /// # Errors
    /// As [`Feed::attach`].
    pub fn attach_empty(&mut self, tracepoint: &str) -> Result<(), FeedError> {
        Ok(self.object.attach(EMPTY, tracepoint)?)
    }

    /// Starts reporting changes of these vCPUs.
    ///
    /// # Errors
    /// [`BpfError::Map`] when 1024 processes are watched already.
    pub fn watch(&mut self, watched: Watched) -> Result<(), FeedError> {
        Ok(self.wanted.insert(key(watched))?)
    }

    /// The next change; `Ok(None)` if none waits.
    ///
    /// # Errors
    /// [`BpfError::Mismatch`] for a record of another length.
    pub fn next_change(&mut self) -> Result<Option<TscChange>, FeedError> {
        Ok(self.changes.next(TscChange::from_bytes)?)
    }

    /// Every vCPU of the system, watched or not, in or out of its guest, each once.
    ///
    /// # Errors
    /// The kernel refuses the iterator, or it cannot be read.
    pub fn snapshot(&mut self) -> Result<Vec<VcpuState>, FeedError> {
        let bytes = self.object.over_open_files("every_vcpu")?;
        let records = bytes.chunks(size_of::<VcpuState>()).map(VcpuState::from_bytes);
        let mut states = records
            .collect::<Option<Vec<VcpuState>>>()
            .ok_or(BpfError::Mismatch { what: "vCPU record of this length" })?;
        let mut listed = HashSet::new();
        states.retain(|state| listed.insert(state.tsc.vcpu)); // two descriptors can hold one vCPU
        Ok(states)
    }

    /// The programs' counters, summed over all CPUs.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn hits(&self) -> Result<Hits, FeedError> {
        Ok(self.per_cpu.of_each_cpu()?.iter().fold(Hits::default(), Hits::plus))
    }

    /// How far all vCPUs and `kvm_entry` have come: two of these, some time apart, answer [`Pulse::is_silent_since`].
    ///
    /// # Errors
    /// As [`Feed::snapshot`] and [`Feed::hits`].
    pub fn pulse(&mut self) -> Result<Pulse, FeedError> {
        let entries_before = self.hits()?.entry;
        let vcpus = self.snapshot()?;
        let exits = vcpus.iter().map(|vcpu| (vcpu.tsc.vcpu, vcpu.exits)).collect();
        Ok(Pulse { entries_before, exits, entries_after: self.hits()?.entry })
    }

    /// What the program of a hook has cost so far; zero unless statistics were on.
    ///
    /// # Errors
    /// [`BpfError::Program`] when it is not attached.
    pub fn cost(&self, hook: Hook) -> Result<Cost, FeedError> {
        Ok(self.object.cost(hook.program())?)
    }

    /// What the program that does nothing has cost so far.
    ///
    /// # Errors
    /// [`BpfError::Program`] when it is not attached.
    pub fn cost_of_empty(&self) -> Result<Cost, FeedError> {
        Ok(self.object.cost(EMPTY)?)
    }
}

/// Readable while a change waits.
impl AsFd for Feed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.changes.as_fd()
    }
}

/// The exits of all vCPUs and the calls of `kvm_entry` at one moment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pulse {
    /// Calls of `kvm_entry` before `exits` was read.
    entries_before: u64,
    /// Address and exits so far of each vCPU.
    exits: Vec<(u64, u64)>,
    /// Calls of `kvm_entry` after `exits` was read.
    entries_after: u64,
}

impl Pulse {
    /// True when a vCPU left its guest twice since `earlier` and `kvm_entry` was not called in between: this KVM does not
    /// call it (since 6.1 the vendor's code has to). False when it was called, or when no vCPU ran.
    pub fn is_silent_since(&self, earlier: &Self) -> bool {
        let has_run = |&(vcpu, exits): &(u64, u64)| {
            let before = earlier.exits.iter().find(|(address, _)| *address == vcpu);
            exits != u64::MAX && before.is_some_and(|(_, before)| exits.saturating_sub(*before) >= 2)
        };
        self.entries_after == earlier.entries_before && self.exits.iter().any(has_run)
    }
}

fn key(watched: Watched) -> u32 {
    match watched {
        Watched::Process(process) => process,
        Watched::Everyone => EVERY_PROCESS,
    }
}

#[cfg(any(test, feature = "testing"))]
pub mod test_run;
#[cfg(test)]
mod tests;
