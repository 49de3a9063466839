//! KVM's record of the guests' TSC offsets during a recording.
//!
//! In:    the processes of the guests' VMMs
//! Out:   every offset and ratio of their vCPUs from start to end, each with the host's TSC; or a [`KvmFault`]
//! Runs:  on record's thread; the eBPF programs run in the vCPUs' threads
//! Full:  the history is refused when the ring buffer overflowed or it has more than [`CHANGES_MAX`] changes
//! Trust: the kernel
//!
//! Each change is also written to the host's trace, as an event `bpf_trace_printk` right before its kvm_entry.

use std::{
    collections::HashMap,
    fmt,
    os::fd::{AsFd, BorrowedFd},
};

use nix::time::ClockId;
use vtrace_common::{
    kvm::{TscChange, VcpuState},
    time::HostTsc,
};

use crate::{
    clock::{
        btf::{BtfError, find_here},
        feed::{Feed, FeedError, Hook, Pulse, Watched},
        reading::ClockReading,
        vcpus::TimedChange,
    },
    tracefs::Tracefs,
};

/// Most changes of one recording. A host whose own TSC is unstable writes a new offset at every entry.
const CHANGES_MAX: usize = 1 << 16;
/// Attempts for one reading of both clocks: the tightest counts.
const READINGS: usize = 16;
/// The most that the kernel makes CLOCK_MONOTONIC differ from its true rate (MAXFREQ in include/linux/timex.h).
const SLEW_PPM: u128 = 500;
/// The event that carries announced changes.
pub(crate) const ANNOUNCED: &str = "bpf_trace:bpf_trace_printk";

/// Why KVM's offsets are not known.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KvmFault {
    /// The kernel's BTF lacks what the programs need.
    #[error(transparent)]
    Types(#[from] BtfError),
    /// The programs cannot be loaded or read.
    #[error(transparent)]
    Feed(#[from] FeedError),
    /// This KVM does not call the tracepoint kvm_entry.
    #[error("guests ran, but KVM never called kvm_entry")]
    Silent,
    /// The ring buffer was full, or a vCPU's memory could not be read.
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
    #[error("no guest was watched")]
    Unwatched,
}

/// CLOCK_MONOTONIC, the clock of `bpf_ktime_get_ns()`, and the TSC.
fn reading() -> ClockReading {
    ClockReading::tightest(ClockId::CLOCK_MONOTONIC, READINGS)
}

/// The host's TSC when CLOCK_MONOTONIC was `ns`, interpolated between the readings on both sides (or extrapolated from the
/// nearest two), and its largest error in cycles. The kernel may run CLOCK_MONOTONIC up to [`SLEW_PPM`] faster or slower, and
/// change its rate at any time.
fn host_tsc(readings: &[ClockReading], ns: u64) -> (HostTsc, u64) {
    let after = readings.partition_point(|reading| reading.ns <= ns).clamp(1, readings.len().max(2) - 1);
    let [first, second] = [after - 1, after].map(|at| readings.get(at).copied());
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

/// The attached programs of one recording, and what they have reported.
pub(crate) struct Watch {
    feed: Feed,
    pids: Vec<u32>,
    first: Pulse,
    changes: Vec<TscChange>,
    /// Offset and ratio of each vCPU at its last change. Those of a nested guest are no change.
    last: HashMap<u64, (u64, u64)>,
    readings: Vec<ClockReading>,
}

impl fmt::Debug for Watch {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Watch")
            .field("feed", &self.feed)
            .field("changes", &self.changes.len())
            .finish_non_exhaustive()
    }
}

/// Whether the host's trace can carry announced changes: KVM is loaded, and BPF's event exists.
pub(crate) fn can_announce() -> bool {
    let Ok(tracefs) = Tracefs::find_or_mount() else { return false };
    ["kvm/kvm_entry", "bpf_trace/bpf_trace_printk"]
        .iter()
        .all(|event| tracefs.root().join("events").join(event).exists())
}

impl Watch {
    /// Loads and attaches the programs, and takes the current states.
    ///
    /// # Errors
    /// The kernel has no KVM or no BTF, or refuses the programs.
    pub(crate) fn begin(vmm_pids: impl Iterator<Item = u32>) -> Result<Self, KvmFault> {
        let mut feed = Feed::load(&find_here()?, can_announce())?;
        feed.attach(Hook::Entry)?;
        let pids: Vec<u32> = vmm_pids.collect();
        for &pid in &pids {
            feed.watch(Watched::Process(pid))?;
        }
        let first = feed.pulse()?;
        let mut watch =
            Self { feed, pids, first, changes: Vec::new(), last: HashMap::new(), readings: vec![reading()] };
        watch.look()?;
        Ok(watch)
    }

    /// Takes the changes that wait in the ring buffer.
    ///
    /// # Errors
    /// [`KvmFault::Many`], or a record of another length.
    pub(crate) fn collect(&mut self) -> Result<(), KvmFault> {
        let before = self.changes.len();
        while let Some(change) = self.feed.next_change()? {
            self.keep(change)?;
        }
        if self.changes.len() > before {
            self.read_clocks();
        }
        Ok(())
    }

    /// Reads both clocks. The closer two readings are to each other, the more exact are the times between them.
    pub(crate) fn read_clocks(&mut self) {
        self.readings.push(reading());
    }

    /// Stops watching and returns all changes.
    ///
    /// # Errors
    /// When changes were missed.
    pub(crate) fn finish(mut self) -> Result<Vec<TimedChange>, KvmFault> {
        self.collect()?;
        self.look()?;
        self.read_clocks();
        if self.feed.pulse()?.is_silent_since(&self.first) {
            return Err(KvmFault::Silent);
        }
        let hits = self.feed.hits()?;
        if hits.full > 0 || hits.unread > 0 {
            return Err(KvmFault::Missed { changes: hits.full, reads: hits.unread });
        }
        let changes = self.changes.iter().map(|&change| {
            let (seen, error_cycles) = host_tsc(&self.readings, change.seen_ns);
            TimedChange { seen, error_cycles, change }
        });
        Ok(changes.collect())
    }

    /// Adds the current states of all vCPUs, in or out of their guest.
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
        // A vCPU that never ran has no thread before its first entry.
        let has_new_thread =
            change.vcpu_tid != 0 && !self.changes.iter().any(|earlier| earlier.vcpu_tid == change.vcpu_tid);
        if is_new || has_new_thread {
            if self.changes.len() >= CHANGES_MAX {
                return Err(KvmFault::Many);
            }
            self.changes.push(change);
        }
        Ok(())
    }
}

/// Readable while a change waits.
impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.feed.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::testing::micro_guest::Micro;
    use crate::sys::tsc;
    use proptest::prelude::*;
    use std::process;
    use vtrace_common::kvm::source;

    fn read_at(tsc: u64, ns: u64) -> ClockReading {
        ClockReading { tsc, ns, window: 7 }
    }

    #[test]
    fn time_lies_on_the_line_between_the_readings_around_it() {
        let readings = [read_at(1000, 500), read_at(3000, 1500), read_at(9000, 2500)];
        let found = [500, 1000, 1500, 2000, 2500, 3000, 400].map(|ns| host_tsc(&readings, ns).0.0);
        assert_eq!(found, [1000, 2000, 3000, 6000, 9000, 12_000, 800]);
        assert_eq!(host_tsc(&readings[..1], 7), (HostTsc(1000), u64::MAX));
        assert_eq!(host_tsc(&[], 7), (HostTsc(0), u64::MAX));
    }

    #[test]
    fn error_grows_with_the_distance_from_the_nearest_reading() {
        let readings = [read_at(0, 0), read_at(3_000_000_000, 1_000_000_000)];
        let errors = [0, 100_000, 999_900_000, 500_000_000].map(|ns| host_tsc(&readings, ns).1);
        assert_eq!(errors, [7, 307, 307, 1_500_007]);
    }

    #[test]
    fn readings_of_this_machine_agree_with_its_clock() {
        let readings = [reading(), reading(), reading()];
        let (tsc, error) = host_tsc(&readings, readings[1].ns);
        assert!(tsc.0.abs_diff(readings[1].tsc) <= error + 10);
    }

    /// `cargo xtask lab svm` runs it where KVM calls kvm_entry.
    #[test]
    #[ignore = "needs root and /dev/kvm"]
    fn watched_guest_has_host_times_or_the_silence_of_kvm_entry_is_reported() {
        let mut micro = Micro::new();
        micro.turn();
        let mut watch = Watch::begin(std::iter::once(process::id())).unwrap();
        let before = tsc::read();
        (0..100).for_each(|_| micro.turn());
        let is_called = watch.feed.hits().unwrap().entry > 0;
        micro.adjust(1_000_000);
        watch.collect().unwrap();
        let after = tsc::read();
        let changes = match watch.finish() {
            Err(KvmFault::Silent) if !is_called => return,
            changes => changes.unwrap(),
        };
        let steps: Vec<u64> = changes.windows(2).map(|pair| pair[1].change.offset - pair[0].change.offset).collect();
        assert_eq!(steps, [1_000_000]);
        assert_eq!((changes[0].change.source, changes[1].change.source), (source::SNAPSHOT, source::ENTRY));
        let TimedChange { seen, error_cycles, .. } = changes[1];
        assert!(before <= seen.0 + error_cycles && seen.0 - error_cycles <= after, "{changes:?} {before} {after}");
    }

    proptest! {
        #[test]
        fn any_readings_give_an_answer(readings: Vec<(u64, u64)>, ns: u64) {
            let readings: Vec<ClockReading> = readings.into_iter().map(|(tsc, ns)| read_at(tsc, ns)).collect();
            host_tsc(&readings, ns);
        }
    }
}
