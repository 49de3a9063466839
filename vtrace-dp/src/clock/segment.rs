//! The history of one vCPU's TSC: from which host time on which offset and ratio hold.
//!
//! In:    [`Seen`]: states from [`super::feed`], each with the host time at which it was read
//! Out:   [`History`]: segments in order; or a [`Refusal`]
//! Runs:  anywhere; pure but for [`tsc_is_stable`]
//! Full:  more changes than a file can store are refused
//! Trust: the kernel
//!
//! The fields change only in the vCPU's own thread, or while it is out of the guest, never between `kvm_entry` and the
//! entry itself. So a state that is read at `kvm_entry` at host time *t* holds for the run that begins there, and the one
//! before it held for the run that ended at the `kvm_exit` before *t*: between the two no code of the guest runs, every
//! instant there is a true boundary, and *t* itself is the one that is used. Where *t* is known only within bounds, or a
//! state was found by a snapshot some time after it changed, the boundary is an interval, and times that could fall on
//! either side of it are said to be unsure.

use std::{fs, io};

use thiserror::Error;
use vtrace_common::{
    ids::Cpu,
    kvm::{TscChange, source},
    time::HostTsc,
};

use super::{
    math::{HostRange, Pair},
    ratio::{Isa, Ratio, RatioError},
};

/// Segments of one guest, all vCPUs together: what its file has room for.
pub const SEGMENTS_MAX: usize = 1 << 18;

/// Why a guest's times cannot be computed from KVM's offsets and have to be measured.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum Refusal {
    /// No state of this CPU's vCPU was reported.
    #[error("KVM reported no TSC state of the vCPU of {0}")]
    NeverSeen(Cpu),
    /// SNP Secure TSC: scale and offset are in memory that the host cannot read.
    #[error("KVM does not control the TSC of {0} (Secure TSC)")]
    SecureTsc(Cpu),
    /// KVM rewrites the offset whenever a vCPU changes its CPU then, and the host's own trace clock is unusable.
    #[error("the host's kernel finds its TSC unstable")]
    UnstableTsc,
    /// The host was suspended, and its TSC restarted.
    #[error("the host's TSC went back from {before} to {after}: it was suspended")]
    HostTscRestarted {
        /// What it was.
        before: u64,
        /// What it was later.
        after: u64,
    },
    /// The ratio is impossible on this machine.
    #[error("the TSC ratio of {cpu} is invalid")]
    Ratio {
        /// The vCPU.
        cpu: Cpu,
        /// What is wrong with the ratio.
        source: RatioError,
    },
    /// See [`SEGMENTS_MAX`].
    #[error("the guest's clock changed more than {SEGMENTS_MAX} times")]
    TooMany,
}

/// Whether the host's kernel counts its TSC among the clocks it would use.
///
/// # Errors
/// When sysfs cannot be read.
pub fn tsc_is_stable() -> io::Result<bool> {
    // A clock that its watchdog found unstable is left out (`available_clocksource_show` in kernel/time/clocksource.c).
    let clocks = fs::read_to_string("/sys/devices/system/clocksource/clocksource0/available_clocksource")?;
    Ok(clocks.split_whitespace().any(|clock| clock == "tsc"))
}

/// A state of one vCPU's TSC, and when it was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seen {
    /// Whose: the CPU's number in its guest, not the vCPU's id.
    pub cpu: Cpu,
    /// `l1_tsc_offset`: a nested guest of the guest changes only the active one.
    pub offset: u64,
    /// `l1_tsc_scaling_ratio`, as KVM holds it.
    pub ratio: u64,
    /// `guest_tsc_protected`.
    pub protected: bool,
    /// When it was read.
    pub at: HostRange,
    /// Where the run that uses it first begins, as far as that is known.
    pub since: Since,
}

/// How a state's reading and its first use relate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Since {
    /// It was read at the entry of the first run that uses it.
    Reading,
    /// It was read later: at an exit, or in a snapshot.
    Before,
}

impl Seen {
    /// A state as the eBPF programs tell it, read at `at`.
    pub fn new(change: &TscChange, cpu: Cpu, at: HostRange) -> Self {
        let since = match change.source {
            source::ENTRY | source::EMULATE => Since::Reading,
            _ => Since::Before,
        };
        let protected = change.tsc_protected != 0;
        Self { cpu, offset: change.offset, ratio: change.ratio, protected, at, since }
    }

    /// Where a state was read at an entry and just one run begins while it may have been read, that is the entry.
    pub fn settle(&mut self, runs: &Runs) {
        if self.since == Since::Before || self.at.low == self.at.high || !runs.knows(self.at) {
            return;
        }
        let mut begun = runs.within(self.at).filter(|run| run.low >= self.at.low);
        if let (Some(run), None) = (begun.next(), begun.next()) {
            self.at = HostRange::at(run.low);
        }
    }

    fn pair(&self, isa: Isa) -> Result<Pair, Refusal> {
        // TDX guests are protected too, but KVM copies their true offset and ratio into the fields.
        if self.protected && isa != Isa::Vmx {
            return Err(Refusal::SecureTsc(self.cpu));
        }
        let ratio = Ratio::read(self.ratio, isa).map_err(|source| Refusal::Ratio { cpu: self.cpu, source })?;
        Ok(Pair { offset: self.offset, ratio })
    }
}

/// From `from` on this pair holds: before `from.low` the one before it did, from `from.high` on this one does, and
/// between them one of the two.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// When it begins.
    pub from: HostRange,
    /// What holds.
    pub pair: Pair,
}

/// All segments of one vCPU, in order, none empty.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct History {
    cpu: Cpu,
    segments: Vec<Segment>,
    seen_last: HostTsc,
}

impl History {
    /// Begins with the first state that was seen: the only one that earlier times can have had. A vCPU that comes later
    /// has no events before it.
    ///
    /// # Errors
    /// [`Refusal::SecureTsc`], [`Refusal::Ratio`].
    pub fn new(first: &Seen, isa: Isa) -> Result<Self, Refusal> {
        let segments = vec![Segment { from: HostRange::at(HostTsc(0)), pair: first.pair(isa)? }];
        Ok(Self { cpu: first.cpu, segments, seen_last: first.at.low })
    }

    /// From segments that were made before.
    pub(crate) fn from_segments(cpu: Cpu, segments: Vec<Segment>) -> Option<Self> {
        let seen_last = segments.last()?.from.low;
        let ordered = |pair: &[Segment]| pair[0].from.high <= pair[1].from.high && pair[0].from.low <= pair[1].from.low;
        let sound = segments.iter().all(|segment| segment.from.low <= segment.from.high);
        (sound && segments.windows(2).all(ordered)).then_some(Self { cpu, segments, seen_last })
    }

    /// Adds the next state. One that says the same again only narrows what is not known.
    ///
    /// # Errors
    /// [`Refusal::HostTscRestarted`] for one that was read before the one before it, and those of [`History::new`].
    pub fn push(&mut self, seen: &Seen, isa: Isa) -> Result<(), Refusal> {
        if seen.at.high < self.seen_last {
            return Err(Refusal::HostTscRestarted { before: self.seen_last.0, after: seen.at.high.0 });
        }
        let pair = seen.pair(isa)?;
        let last = *self.segments.last().expect("there is a first segment");
        let low = match seen.since {
            Since::Reading => seen.at.low,
            // The previous state held when it was read; the change came at an unknown time after that.
            Since::Before => self.seen_last,
        };
        self.seen_last = self.seen_last.max(seen.at.low);
        if pair == last.pair {
            return Ok(());
        }
        let low = low.max(last.from.low);
        let from = HostRange { low, high: seen.at.high.max(last.from.high) };
        self.segments.push(Segment { from, pair });
        Ok(())
    }

    /// Whose it is.
    pub fn cpu(&self) -> Cpu {
        self.cpu
    }

    /// The segments.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The widest boundary, host ticks: 0 if all are exact.
    pub fn bound(&self) -> u64 {
        self.segments.iter().map(|segment| segment.from.width()).max().unwrap_or(0)
    }
}

/// When a vCPU ran: its `kvm_entry` and `kvm_exit` events, in order.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Runs {
    runs: Vec<HostRange>,
    known: Vec<HostRange>,
}

impl Runs {
    /// `runs`: from each entry to its exit, in order and apart. `known`: stretches of which all runs are in `runs`, in
    /// order; elsewhere the vCPU may have run at any time.
    pub fn new(mut runs: Vec<HostRange>, mut known: Vec<HostRange>) -> Self {
        for list in [&mut runs, &mut known] {
            list.retain(|range| range.low <= range.high);
            list.sort_unstable_by_key(|range| (range.low, range.high));
        }
        runs.dedup_by(|later, earlier| later.low <= earlier.high);
        Self { runs, known }
    }

    /// The runs, and where they are all.
    pub(crate) fn parts(&self) -> [&[HostRange]; 2] {
        [&self.runs, &self.known]
    }

    /// All runs in this stretch are known.
    pub fn knows(&self, range: HostRange) -> bool {
        let after = self.known.partition_point(|known| known.low <= range.low);
        after.checked_sub(1).is_some_and(|at| range.high <= self.known[at].high)
    }

    /// Runs that have a tick in this stretch.
    pub fn within(&self, range: HostRange) -> impl Iterator<Item = HostRange> + '_ {
        let first = self.runs.partition_point(|run| run.high < range.low);
        self.runs[first..].iter().copied().take_while(move |run| run.low <= range.high)
    }

    /// The vCPU may have run at one of these ticks.
    pub fn allows(&self, range: HostRange) -> bool {
        !self.knows(range) || self.within(range).next().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(offset: u64, low: u64, high: u64, since: Since) -> Seen {
        let at = HostRange { low: HostTsc(low), high: HostTsc(high) };
        Seen { cpu: Cpu(0), offset, ratio: 1 << 32, protected: false, at, since }
    }

    fn range(low: u64, high: u64) -> HostRange {
        HostRange { low: HostTsc(low), high: HostTsc(high) }
    }

    #[test]
    fn state_read_at_an_entry_begins_there_and_one_found_later_somewhere_before() {
        let mut history = History::new(&seen(1, 100, 100, Since::Before), Isa::Svm).unwrap();
        history.push(&seen(1, 150, 150, Since::Reading), Isa::Svm).unwrap();
        history.push(&seen(2, 200, 200, Since::Reading), Isa::Svm).unwrap();
        history.push(&seen(3, 300, 310, Since::Before), Isa::Svm).unwrap();
        let from: Vec<_> = history.segments().iter().map(|segment| segment.from).collect();
        assert_eq!(from, [range(0, 0), range(200, 200), range(200, 310)]);
        assert_eq!(history.bound(), 110);
    }

    #[test]
    fn host_tsc_that_begins_anew_is_refused() {
        let mut history = History::new(&seen(1, 5000, 5000, Since::Before), Isa::Svm).unwrap();
        let refused = history.push(&seen(2, 100, 110, Since::Reading), Isa::Svm);
        assert_eq!(refused, Err(Refusal::HostTscRestarted { before: 5000, after: 110 }));
    }

    #[test]
    fn secure_tsc_is_refused_and_tdx_is_not() {
        let first = Seen { protected: true, ..seen(1, 1, 1, Since::Before) };
        assert_eq!(History::new(&first, Isa::Svm).unwrap_err(), Refusal::SecureTsc(Cpu(0)));
        assert!(History::new(&first, Isa::Vmx).is_ok());
    }

    #[test]
    fn ratio_without_hardware_for_it_is_refused() {
        let first = Seen { ratio: 77, ..seen(1, 1, 1, Since::Before) };
        assert!(matches!(History::new(&first, Isa::None), Err(Refusal::Ratio { .. })));
    }

    #[test]
    fn nested_guest_of_the_guest_changes_nothing() {
        let change =
            TscChange { offset: 5, ratio: 1 << 32, active_offset: 99, source: source::ENTRY, ..Default::default() };
        let seen = Seen::new(&change, Cpu(2), range(7, 7));
        assert_eq!((seen.offset, seen.since), (5, Since::Reading));
    }

    #[test]
    fn reading_is_settled_by_the_only_run_that_begins_with_it() {
        let runs = Runs::new(vec![range(120, 198), range(202, 210), range(214, 400)], vec![range(100, 500)]);
        let settled = |low, high, since| {
            let mut seen = seen(2, low, high, since);
            seen.settle(&runs);
            seen.at
        };
        assert_eq!(settled(195, 212, Since::Reading), range(202, 202));
        assert_eq!(settled(195, 216, Since::Reading), range(195, 216), "two entries");
        assert_eq!(settled(195, 212, Since::Before), range(195, 212), "read at an exit");
        assert_eq!(settled(50, 130, Since::Reading), range(50, 130), "not all runs are known");
    }

    #[test]
    fn runs_are_known_only_where_that_was_said() {
        let runs = Runs::new(vec![range(120, 180), range(202, 400)], vec![range(100, 300)]);
        assert!(runs.allows(range(170, 190)) && !runs.allows(range(181, 201)));
        assert!(runs.allows(range(290, 310)) && runs.allows(range(500, 600)));
    }

    #[test]
    fn this_machine_says_whether_its_tsc_is_stable() {
        assert!(tsc_is_stable().is_ok());
    }
}
