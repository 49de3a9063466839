//! What KVM says of the guests' TSCs while they are recorded.
//!
//! In:    the processes of the guests' VMMs
//! Out:   every state of their vCPUs from the start to the end, each with the host's TSC; or a [`KvmFault`]
//! Runs:  on record's thread; the programs run in the vCPUs' threads
//! Full:  changes that found the ring buffer full, or are more than [`CHANGES_MAX`], make the history unknown: said
//! Trust: the kernel
//!
//! Each change also stands in the host's trace, as an event `bpf_trace_printk` right before its kvm_entry.

use std::{
    collections::HashMap,
    fmt,
    os::fd::{AsFd, BorrowedFd},
};

use nix::time::{ClockId, clock_gettime};
use vtrace_common::{
    kvm::{TscChange, VcpuState},
    time::HostTsc,
};

use crate::{
    clock::{
        btf::{BtfError, find_here},
        feed::{Feed, FeedError, Hook, Pulse, Watched},
        vcpus::Told,
    },
    sys::tsc,
    tracefs::Tracefs,
};

/// Changes of one recording. A host whose own TSC is not reliable writes a new offset at every entry.
const CHANGES_MAX: usize = 1 << 16;
/// Readings of both clocks; the tightest counts.
const READINGS: usize = 16;
/// The event that carries announced changes.
pub(super) const ANNOUNCED: &str = "bpf_trace:bpf_trace_printk";

/// Why KVM's word is not known.
#[derive(Debug, thiserror::Error)]
pub(super) enum KvmFault {
    /// The kernel's types are not readable or not as needed.
    #[error(transparent)]
    Types(#[from] BtfError),
    /// The programs do not work here.
    #[error(transparent)]
    Feed(#[from] FeedError),
    /// This KVM does not call the tracepoint.
    #[error("guests ran and kvm_entry kept silent")]
    Silent,
    /// The ring buffer was full, or memory could not be read.
    #[error("{changes} changes were missed and {reads} reads failed")]
    Missed {
        /// Changes that did not fit the ring buffer.
        changes: u64,
        /// Reads of a vCPU that failed.
        reads: u64,
    },
    /// More than [`CHANGES_MAX`].
    #[error("the TSC was moved more than {CHANGES_MAX} times")]
    Many,
    /// There is no guest, or the recording ended before it began.
    #[error("nothing was watched")]
    Unwatched,
}

/// The host's TSC and CLOCK_MONOTONIC at one moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stamp {
    tsc: u64,
    ns: u64,
    window: u64,
}

impl Stamp {
    fn take() -> Self {
        let readings = (0..READINGS).map(|_| {
            let before = tsc::read();
            let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every kernel has CLOCK_MONOTONIC");
            let window = tsc::read().saturating_sub(before);
            let ns = u64::try_from(std::time::Duration::from(now).as_nanos()).expect("584 years have not passed");
            Self { tsc: before + window / 2, ns, window }
        });
        readings.min_by_key(|reading| reading.window).expect("there is at least one reading")
    }
}

/// The host's TSC at `ns`, on the line through the stamps on both sides of it, or the nearest two.
fn host_tsc(stamps: &[Stamp], ns: u64) -> HostTsc {
    let after = stamps.partition_point(|stamp| stamp.ns <= ns).clamp(1, stamps.len().max(2) - 1);
    let [first, second] = [after - 1, after].map(|at| stamps.get(at).copied());
    let (Some(first), Some(second)) = (first, second) else {
        return HostTsc(first.map_or(0, |only| only.tsc));
    };
    let span_ns = i128::from(second.ns.saturating_sub(first.ns)).max(1);
    let cycles = i128::from(second.tsc) - i128::from(first.tsc);
    let passed = (i128::from(ns) - i128::from(first.ns)).saturating_mul(cycles) / span_ns;
    HostTsc(u64::try_from(passed.saturating_add(first.tsc.into())).unwrap_or(0))
}

/// The programs at work for one recording.
pub(super) struct Watch {
    feed: Feed,
    pids: Vec<u32>,
    first: Pulse,
    told: Vec<TscChange>,
    /// Offset and ratio of each vCPU as last told: a nested guest's own are not told again.
    last: HashMap<u64, (u64, u64)>,
    stamps: Vec<Stamp>,
}

impl fmt::Debug for Watch {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Watch").field("feed", &self.feed).field("told", &self.told.len()).finish_non_exhaustive()
    }
}

/// Whether the host's trace can carry announced changes: KVM is there, and BPF's event.
pub(super) fn can_announce() -> bool {
    let Ok(tracefs) = Tracefs::find_or_mount() else { return false };
    ["kvm/kvm_entry", "bpf_trace/bpf_trace_printk"].iter().all(|event| tracefs.root().join("events").join(event).exists())
}

impl Watch {
    /// Loads the programs, lets them listen, and takes the states of now.
    ///
    /// # Errors
    /// When the kernel has no KVM or no BTF, or refuses.
    pub(super) fn begin(vmm_pids: impl Iterator<Item = u32>) -> Result<Self, KvmFault> {
        let mut feed = Feed::load(&find_here()?, can_announce())?;
        feed.attach(Hook::Entry)?;
        let pids: Vec<u32> = vmm_pids.collect();
        for &pid in &pids {
            feed.watch(Watched::Process(pid))?;
        }
        let first = feed.pulse()?;
        let mut watch = Self { feed, pids, first, told: Vec::new(), last: HashMap::new(), stamps: vec![Stamp::take()] };
        watch.look()?;
        Ok(watch)
    }

    /// Takes the changes that wait.
    ///
    /// # Errors
    /// When there are too many, or one is not understood.
    pub(super) fn collect(&mut self) -> Result<(), KvmFault> {
        while let Some(change) = self.feed.next_change()? {
            self.keep(change)?;
        }
        Ok(())
    }

    /// Reads both clocks once more: times between two readings are the more exact the closer these are.
    pub(super) fn stamp(&mut self) {
        self.stamps.push(Stamp::take());
    }

    /// Everything that was told.
    ///
    /// # Errors
    /// When it is not the whole truth.
    pub(super) fn finish(mut self) -> Result<Vec<Told>, KvmFault> {
        self.collect()?;
        self.look()?;
        self.stamp();
        if self.feed.pulse()?.is_silent_since(&self.first) {
            return Err(KvmFault::Silent);
        }
        let hits = self.feed.hits()?;
        if hits.full > 0 || hits.unread > 0 {
            return Err(KvmFault::Missed { changes: hits.full, reads: hits.unread });
        }
        let stamps = &self.stamps;
        Ok(self.told.iter().map(|change| Told { seen: host_tsc(stamps, change.seen_ns), change: *change }).collect())
    }

    /// Takes the states of all vCPUs as they are now, in or out of their guest.
    fn look(&mut self) -> Result<(), KvmFault> {
        for VcpuState { tsc, .. } in self.feed.snapshot()? {
            if self.pids.contains(&tsc.vmm_pid) {
                self.keep(tsc)?;
            }
        }
        Ok(())
    }

    fn keep(&mut self, change: TscChange) -> Result<(), KvmFault> {
        let state = (change.offset, change.ratio);
        let is_new = self.last.insert(change.vcpu, state) != Some(state);
        // A vCPU that had never run gets its thread with the first entry.
        let has_thread = change.vcpu_tid != 0 && !self.told.iter().any(|told| told.vcpu_tid == change.vcpu_tid);
        if is_new || has_thread {
            if self.told.len() >= CHANGES_MAX {
                return Err(KvmFault::Many);
            }
            self.told.push(change);
        }
        Ok(())
    }
}

/// Readable when a change waits.
impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.feed.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stamp(tsc: u64, ns: u64) -> Stamp {
        Stamp { tsc, ns, window: 0 }
    }

    #[test]
    fn time_lies_on_the_line_between_the_stamps_around_it() {
        let stamps = [stamp(1000, 500), stamp(3000, 1500), stamp(9000, 2500)];
        let found = [500, 1000, 1500, 2000, 2500, 3000, 400].map(|ns| host_tsc(&stamps, ns).0);
        assert_eq!(found, [1000, 2000, 3000, 6000, 9000, 12_000, 800]);
        assert_eq!((host_tsc(&stamps[..1], 7).0, host_tsc(&[], 7).0), (1000, 0));
    }

    #[test]
    fn stamps_of_this_machine_agree_with_its_clock() {
        let stamps = [Stamp::take(), Stamp::take(), Stamp::take()];
        assert!(host_tsc(&stamps, stamps[1].ns).0.abs_diff(stamps[1].tsc) <= stamps[1].window + 10);
    }

    proptest! {
        #[test]
        fn any_stamps_give_an_answer(stamps: Vec<(u64, u64)>, ns: u64) {
            let stamps: Vec<Stamp> = stamps.into_iter().map(|(tsc, ns)| stamp(tsc, ns)).collect();
            host_tsc(&stamps, ns);
        }
    }
}
