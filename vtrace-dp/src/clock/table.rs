//! The clock of a guest: the histories of all of its vCPUs, and the conversion of guest times by them.
//!
//! In:    [`Seen`] states in the order in which they were seen; the runs of vCPUs, where they are known; guest times
//! Out:   [`Conversion`]s: the host ticks at which a guest time can have been, and the one to show
//! Runs:  anywhere; pure. A [`LaneTimes`](super::page_times::LaneTimes) holds what is needed to go through one lane page by page
//! Trust: states come from the kernel, times from guests: any number is converted, and one that fits nowhere is marked
//!
//! How the segment of a time is chosen: the events of a lane are in the order in which they happened, so neither their host
//! times nor their segments decrease. An event can lie in each segment whose period contains the host time that the segment
//! gives it. Where these are several (a clock that stepped back shows values twice), a segment is dropped if
//! - no ordered path leads to it, from the previous page through all events of the page to the first of the next one, or
//! - it puts the event outside the vCPU's runs, while another path has all events inside.
//!
//! The earliest of the remaining segments is shown. If there are several, the conversion is [`Certainty::Unsure`] and its
//! range covers all of them.

use vtrace_common::{
    ids::Cpu,
    time::{GuestTsc, HostTsc},
};

use super::{
    math::HostRange,
    ratio::Isa,
    segment::{History, Refusal, Runs, SEGMENTS_MAX, Seen, Segment},
};

/// How sure a conversion is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Certainty {
    /// The range holds the only ticks that show as this guest time.
    Exact,
    /// It may be on either side of a change.
    Unsure,
    /// It was written while the guest's clock stepped back, so its time stamp stood still ([`super::stalled_times`]).
    Trapped,
    /// No segment contains this time at its position: a state was missed, or it is not a TSC value.
    Foreign,
}

/// A guest time as host time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Conversion {
    /// The time that readers show.
    pub at: HostTsc,
    /// The event happened within these ticks; not known of a foreign time.
    pub possible: HostRange,
    /// How sure the conversion is.
    pub certainty: Certainty,
}

impl Conversion {
    /// Largest error of `at`, host ticks.
    pub fn error(&self) -> u64 {
        let HostRange { low, high } = self.possible;
        self.at.0.saturating_sub(low.0).max(high.0.saturating_sub(self.at.0))
    }
}

/// The clock of one guest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Table {
    since: HostTsc,
    vcpus: Vec<Vcpu>,
}

/// One vCPU's clock.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Vcpu {
    pub(super) history: History,
    pub(super) runs: Option<Runs>,
    /// What the guest read when the trace began: guest times are compared as distances from here.
    reference: GuestTsc,
    /// For each segment: the lowest guest time with which a later one begins.
    floors: Vec<i64>,
}

impl Vcpu {
    fn new(history: History, since: HostTsc) -> Self {
        let segments = history.segments();
        let reference = segments[0].pair.to_guest(since);
        let mut floors = vec![i64::MAX; segments.len()];
        for at in (1..segments.len()).rev() {
            let begin = distance(segments[at].pair.to_guest(segments[at].from.low), reference);
            floors[at - 1] = floors[at].min(begin);
        }
        Self { history, runs: None, reference, floors }
    }

    pub(super) fn segments(&self) -> &[Segment] {
        self.history.segments()
    }

    /// Whether no later segment has begun when the guest's clock shows `guest`. Hot.
    pub(super) fn is_below_later(&self, segment: usize, guest: GuestTsc) -> bool {
        distance(guest, self.reference) < self.floors[segment]
    }

    /// When the segment ends. Hot.
    pub(super) fn until(&self, segment: usize) -> HostRange {
        self.segments().get(segment + 1).map_or(HostRange::at(HostTsc(u64::MAX)), |next| next.from)
    }

    /// The host times of a guest time in a segment; `None` if it does not lie there. Hot.
    pub(super) fn place(&self, segment: usize, guest: GuestTsc, near: HostTsc) -> Option<HostRange> {
        let Segment { from, pair } = self.segments()[segment];
        let range = pair.to_host(guest, near.max(from.low))?;
        (range.high >= from.low && range.low < self.until(segment).high).then_some(range)
    }
}

/// How far `guest` is ahead of `other`. Hot.
pub(super) fn distance(guest: GuestTsc, other: GuestTsc) -> i64 {
    guest.0.wrapping_sub(other.0).cast_signed()
}

impl Table {
    /// A table of what was seen since `since`, when nothing was traced yet; `seen` in the order of seeing. Every lane needs
    /// a vCPU of its own number; vCPUs without a lane do no harm.
    ///
    /// # Errors
    /// See [`Refusal`]: the guest's clock has to be measured.
    pub fn build(
        since: HostTsc,
        isa: Isa,
        seen: impl IntoIterator<Item = Seen>,
        lanes: &[Cpu],
    ) -> Result<Self, Refusal> {
        let mut histories: Vec<History> = Vec::new();
        for seen in seen {
            match histories.iter_mut().find(|history| history.cpu() == seen.cpu) {
                Some(history) => history.push(&seen, isa)?,
                None => histories.push(History::new(&seen, isa)?),
            }
        }
        let table = Self::from_histories(since, histories).ok_or(Refusal::TooMany)?;
        match lanes.iter().find(|cpu| table.history(**cpu).is_none()) {
            Some(cpu) => Err(Refusal::NeverSeen(*cpu)),
            None => Ok(table),
        }
    }

    /// A table of these histories; none if they are too long together.
    pub(crate) fn from_histories(since: HostTsc, mut histories: Vec<History>) -> Option<Self> {
        let count: usize = histories.iter().map(|history| history.segments().len()).sum();
        histories.sort_by_key(History::cpu);
        let vcpus = histories.into_iter().map(|history| Vcpu::new(history, since)).collect();
        (count <= SEGMENTS_MAX).then_some(Self { since, vcpus })
    }

    /// Adds the runs of a vCPU.
    pub fn learn(&mut self, cpu: Cpu, runs: Runs) {
        if let Some(vcpu) = self.vcpus.iter_mut().find(|vcpu| vcpu.history.cpu() == cpu) {
            vcpu.runs = Some(runs);
        }
    }

    /// A host time before the trace.
    pub fn since(&self) -> HostTsc {
        self.since
    }

    /// The histories, in the order of their CPUs.
    pub fn histories(&self) -> impl Iterator<Item = &History> {
        self.vcpus.iter().map(|vcpu| &vcpu.history)
    }

    /// A vCPU's history.
    pub fn history(&self, cpu: Cpu) -> Option<&History> {
        self.vcpu(cpu).map(|vcpu| &vcpu.history)
    }

    /// The known runs of a vCPU.
    pub(crate) fn runs(&self, cpu: Cpu) -> Option<&Runs> {
        self.vcpu(cpu)?.runs.as_ref()
    }

    pub(super) fn vcpu(&self, cpu: Cpu) -> Option<&Vcpu> {
        self.vcpus.iter().find(|vcpu| vcpu.history.cpu() == cpu)
    }

    /// The widest boundary of any vCPU, host ticks; 0: every conversion is exact, but for what a guest's ring buffer hid.
    pub fn bound(&self) -> u64 {
        self.histories().map(History::bound).max().unwrap_or(0)
    }

    /// Where runs decide between segments: the neighbourhood of each step back of a vCPU's clock, as far as values come
    /// twice. Trapped events may follow for as long as a page lasts.
    pub fn runs_wanted(&self, cpu: Cpu) -> Vec<HostRange> {
        let segments = self.vcpu(cpu).map(Vcpu::segments).unwrap_or_default();
        let wanted = segments.windows(2).filter_map(|pair| {
            let step = step_back(&pair[0], &pair[1])?;
            let [before, after] = [pair[0], pair[1]].map(|segment| segment.pair.host_ticks(step));
            let HostRange { low, high } = pair[1].from;
            Some(HostRange { low: HostTsc(low.0.saturating_sub(before)), high: HostTsc(high.0.saturating_add(after)) })
        });
        wanted.collect()
    }

    /// A single time, without the events around it: of the segments that have it, the one in which it is nearest to `near`
    /// is shown. `None`: nothing is known of the vCPU, or it never had this time.
    pub fn to_host(&self, cpu: Cpu, guest: GuestTsc, near: HostTsc) -> Option<Conversion> {
        let vcpu = self.vcpu(cpu)?;
        let mut places: Vec<HostRange> =
            (0..vcpu.segments().len()).filter_map(|segment| vcpu.place(segment, guest, near)).collect();
        let in_runs: Vec<HostRange> = places.iter().copied().filter(|place| vcpu.allows(*place)).collect();
        if !in_runs.is_empty() {
            places = in_runs;
        }
        let best = places.iter().min_by_key(|place| place.middle().0.abs_diff(near.0))?;
        let low = places.iter().map(|place| place.low).min()?;
        let high = places.iter().map(|place| place.high).max()?;
        let certainty = if places.iter().all(|place| place == best) { Certainty::Exact } else { Certainty::Unsure };
        Some(Conversion { at: best.middle(), possible: HostRange { low, high }, certainty })
    }
}

impl Vcpu {
    /// The vCPU may have run at one of these ticks.
    pub(super) fn allows(&self, place: HostRange) -> bool {
        self.runs.as_ref().is_none_or(|runs| runs.allows(place))
    }
}

/// How many cycles the guest's clock goes back from one segment to the next, at most; `None` if it does not.
pub fn step_back(before: &Segment, after: &Segment) -> Option<u64> {
    let step = distance(before.pair.to_guest(after.from.high), after.pair.to_guest(after.from.low));
    u64::try_from(step).ok().filter(|step| *step > 0)
}

#[cfg(test)]
mod tests;
