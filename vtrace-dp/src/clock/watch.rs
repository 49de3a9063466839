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
/// The most that the kernel makes CLOCK_MONOTONIC differ from its true rate (MAXFREQ in include/linux/timex.h).
const SLEW_PPM: u128 = 500;
/// The event that carries announced changes.
pub(crate) const ANNOUNCED: &str = "bpf_trace:bpf_trace_printk";

/// Why KVM's word is not known.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KvmFault {
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

/// The host's TSC at `ns`, on the line through the stamps on both sides of it, or the nearest two; and how far that may
/// be off. The kernel may run CLOCK_MONOTONIC faster or slower by [`SLEW_PPM`], and change that at any time.
fn host_tsc(stamps: &[Stamp], ns: u64) -> (HostTsc, u64) {
    let after = stamps.partition_point(|stamp| stamp.ns <= ns).clamp(1, stamps.len().max(2) - 1);
    let [first, second] = [after - 1, after].map(|at| stamps.get(at).copied());
    let (Some(first), Some(second)) = (first, second) else {
        return (HostTsc(first.map_or(0, |only| only.tsc)), u64::MAX);
    };
    let span_ns = i128::from(second.ns.saturating_sub(first.ns)).max(1);
    let cycles = i128::from(second.tsc) - i128::from(first.tsc);
    let in_cycles = |ns: i128| ns.saturating_mul(cycles) / span_ns;
    let passed = in_cycles(i128::from(ns) - i128::from(first.ns));
    let tsc = u64::try_from(passed.saturating_add(first.tsc.into())).unwrap_or(0);
    let nearest_ns = ns.abs_diff(first.ns).min(ns.abs_diff(second.ns));
    let slew = in_cycles(nearest_ns.into()).unsigned_abs().saturating_mul(2 * SLEW_PPM) / 1_000_000;
    let window = u128::from(first.window.max(second.window));
    (HostTsc(tsc), u64::try_from(slew.saturating_add(window)).unwrap_or(u64::MAX))
}

/// The programs at work for one recording.
pub(crate) struct Watch {
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
pub(crate) fn can_announce() -> bool {
    let Ok(tracefs) = Tracefs::find_or_mount() else { return false };
    ["kvm/kvm_entry", "bpf_trace/bpf_trace_printk"]
        .iter()
        .all(|event| tracefs.root().join("events").join(event).exists())
}

impl Watch {
    /// Loads the programs, lets them listen, and takes the states of now.
    ///
    /// # Errors
    /// When the kernel has no KVM or no BTF, or refuses.
    pub(crate) fn begin(vmm_pids: impl Iterator<Item = u32>) -> Result<Self, KvmFault> {
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
    pub(crate) fn collect(&mut self) -> Result<(), KvmFault> {
        let before = self.told.len();
        while let Some(change) = self.feed.next_change()? {
            self.keep(change)?;
        }
        if self.told.len() > before {
            self.stamp();
        }
        Ok(())
    }

    /// Reads both clocks once more: times between two readings are the more exact the closer these are.
    pub(crate) fn stamp(&mut self) {
        self.stamps.push(Stamp::take());
    }

    /// Everything that was told.
    ///
    /// # Errors
    /// When it is not the whole truth.
    pub(crate) fn finish(mut self) -> Result<Vec<Told>, KvmFault> {
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
        let told = self.told.iter().map(|&change| {
            let (seen, error_cycles) = host_tsc(&self.stamps, change.seen_ns);
            Told { seen, error_cycles, change }
        });
        Ok(told.collect())
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
    use crate::clock::testing::micro_guest::Micro;
    use proptest::prelude::*;
    use std::process;
    use vtrace_common::kvm::source;

    fn stamp(tsc: u64, ns: u64) -> Stamp {
        Stamp { tsc, ns, window: 7 }
    }

    #[test]
    fn time_lies_on_the_line_between_the_stamps_around_it() {
        let stamps = [stamp(1000, 500), stamp(3000, 1500), stamp(9000, 2500)];
        let found = [500, 1000, 1500, 2000, 2500, 3000, 400].map(|ns| host_tsc(&stamps, ns).0.0);
        assert_eq!(found, [1000, 2000, 3000, 6000, 9000, 12_000, 800]);
        assert_eq!(host_tsc(&stamps[..1], 7), (HostTsc(1000), u64::MAX));
        assert_eq!(host_tsc(&[], 7), (HostTsc(0), u64::MAX));
    }

    #[test]
    fn error_grows_with_the_distance_from_the_nearest_stamp() {
        let stamps = [stamp(0, 0), stamp(3_000_000_000, 1_000_000_000)];
        let errors = [0, 100_000, 999_900_000, 500_000_000].map(|ns| host_tsc(&stamps, ns).1);
        assert_eq!(errors, [7, 307, 307, 1_500_007]);
    }

    #[test]
    fn stamps_of_this_machine_agree_with_its_clock() {
        let stamps = [Stamp::take(), Stamp::take(), Stamp::take()];
        let (tsc, error) = host_tsc(&stamps, stamps[1].ns);
        assert!(tsc.0.abs_diff(stamps[1].tsc) <= error + 10);
    }

    /// `cargo xtask lab svm` runs it where kvm_entry speaks.
    #[test]
    #[ignore = "needs root and /dev/kvm"]
    fn watched_guest_is_told_with_its_host_time_or_its_silence_is_said() {
        let mut micro = Micro::new();
        micro.turn();
        let mut watch = Watch::begin(std::iter::once(process::id())).unwrap();
        let before = tsc::read();
        (0..100).for_each(|_| micro.turn());
        let heard = watch.feed.hits().unwrap().entry > 0;
        micro.adjust(1_000_000);
        watch.collect().unwrap();
        let after = tsc::read();
        let told = match watch.finish() {
            Err(KvmFault::Silent) if !heard => return,
            told => told.unwrap(),
        };
        let steps: Vec<u64> = told.windows(2).map(|pair| pair[1].change.offset - pair[0].change.offset).collect();
        assert_eq!(steps, [1_000_000]);
        assert_eq!((told[0].change.source, told[1].change.source), (source::SNAPSHOT, source::ENTRY));
        let Told { seen, error_cycles, .. } = told[1];
        assert!(before <= seen.0 + error_cycles && seen.0 - error_cycles <= after, "{told:?} {before} {after}");
    }

    proptest! {
        #[test]
        fn any_stamps_give_an_answer(stamps: Vec<(u64, u64)>, ns: u64) {
            let stamps: Vec<Stamp> = stamps.into_iter().map(|(tsc, ns)| stamp(tsc, ns)).collect();
            host_tsc(&stamps, ns);
        }
    }
}
