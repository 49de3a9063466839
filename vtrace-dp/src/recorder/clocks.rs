//! How each guest's times become host times: from KVM's offsets where they are known, else from measurements.
//!
//! In:    measurements at both ends, KVM's reports, the host's pages around each change
//! Out:   [`GuestClock`]: how to convert the file's times; after the conversion, [`ConvertedTimes`]
//! Runs:  on record's thread, when all machines have stopped and their pages are in their areas
//! Full:  rewriting needs free space for the largest lane once more; without it the times stay the guest's, with a remark
//! Trust: KVM. A guest's measurements are checked against it; a guest that lies misplaces its own events only

use vtrace_common::{
    ids::Cpu,
    kvm::source,
    time::{GuestTsc, HostTsc},
};

use super::{
    guests::session::GuestSession,
    host::instances,
    session::{ClockReadings, Recording, SharedFacts},
    summary::{ClockSummary, KVM, MEASURED, RAW},
};
use crate::{
    analysis::vcpu_runs::{HostPages, around},
    clock::{
        exact_shift::{Shape, shape},
        math::HostRange,
        measured::{ClockPlan, plan},
        ratio::Isa,
        segment::{Refusal, Seen, tsc_is_stable},
        table::Table,
        vcpus::{TimedChange, Unknown, Vcpu, guest_vcpus, segments},
        watch::KvmFault,
    },
    printable::chain,
    trace::{
        format::{
            option::TraceOption,
            segments::{Segments, Shown},
            uncertainty::Uncertainty,
        },
        write::{WriteFault, Writer, host_lanes::HostingFault, host_times::Rewritten},
    },
    tracefs::TRACE_CLOCK,
};

/// Runs of a vCPU are looked up this far after a step back of its TSC, cycles: as long as one page can last.
const PAGE_CYCLES: u64 = 1 << 30;

/// How one guest's times become host times.
pub(super) struct GuestClock {
    /// KVM's history of each vCPU; empty if it is not known.
    pub(super) kvm: Vec<Vcpu>,
    source: ClockSource,
    lanes: Vec<Cpu>,
    /// The file keeps the guest's own times (`--raw-clock`).
    is_raw: bool,
    /// The pages go to a named instance, to which stock readers apply no time shift.
    is_instance: bool,
    /// The guest's trace clock was changed while it recorded: nothing is known of its times.
    is_changed: bool,
    since: HostTsc,
    remarks: Vec<String>,
}

/// Where the conversion comes from.
enum ClockSource {
    Kvm(Table, Shape),
    Measured { plan: ClockPlan, why: String },
    None,
}

/// Why KVM's offsets are not used.
#[derive(Debug, thiserror::Error)]
enum NoKvmClock<'a> {
    #[error("{}", chain(*.0))]
    Watch(&'a KvmFault),
    #[error("it was not armed")]
    NotArmed,
    #[error(transparent)]
    Unknown(#[from] Unknown),
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// Why pages keep the guest's times.
#[derive(Debug, thiserror::Error)]
enum RewriteError {
    #[error("it has too many CPUs")]
    TooManyCpus,
    #[error(transparent)]
    Write(#[from] WriteFault),
    #[error(transparent)]
    Pages(#[from] HostingFault),
}

/// A file's pages and what is stored beside them.
pub(super) struct FilePages<'a> {
    pub(super) writer: &'a mut Writer,
    /// Bytes of each lane; rewritten lanes can become longer.
    pub(super) filled: &'a mut [(Cpu, u64)],
    /// Stored early, in case the rewriting is killed.
    pub(super) cmdlines: &'a [u8],
    /// As `cmdlines`.
    pub(super) options: &'a [TraceOption],
}

/// The result of a conversion.
#[derive(Default)]
pub(super) struct ConvertedTimes {
    /// For the file.
    pub(super) options: Vec<TraceOption>,
    /// For the closing table.
    pub(super) summary: Option<ClockSummary>,
    /// For the closing table.
    pub(super) remarks: Vec<String>,
    /// Pages added to each lane.
    pub(super) added: Vec<(Cpu, u64)>,
    /// The times could not be rewritten, or only those of some lanes.
    pub(super) failed: bool,
    /// Times that are not exact.
    uncertainties: Vec<Uncertainty>,
}

impl GuestClock {
    /// Chooses the source for guest `index`; `lanes` are those of its lanes that have pages.
    pub(super) fn of(
        recording: &Recording,
        index: usize,
        (session, lanes): (&GuestSession, Vec<Cpu>),
        shared: &SharedFacts,
        host: Option<&HostPages>,
    ) -> Self {
        let readings = &recording.clocks[index];
        let mut clock = Self {
            kvm: Vec::new(),
            source: ClockSource::None,
            lanes,
            is_raw: recording.plan.raw_clock,
            is_instance: instances::of_guest(recording.plan, session).is_some(),
            is_changed: false,
            since: recording.since,
            remarks: Vec::new(),
        };
        if session.changes.iter().any(|change| change.setting == TRACE_CLOCK) {
            clock.is_changed = true;
            return clock;
        }
        clock.source = match clock.kvm_table(recording, readings, session, host) {
            Ok(table) => {
                let shape =
                    if clock.is_instance { Shape::Rewrite } else { shape(&table, &clock.lanes, shared.host_id) };
                ClockSource::Kvm(table, shape)
            }
            Err(why) => match plan(&readings.start, &readings.end, &clock.lanes, shared.host_id) {
                Some(plan) => ClockSource::Measured { plan, why: chain(&why) },
                None => ClockSource::None,
            },
        };
        clock
    }

    /// KVM's history of all lanes' offsets.
    fn kvm_table<'a>(
        &mut self,
        recording: &'a Recording,
        readings: &ClockReadings,
        session: &GuestSession,
        host: Option<&HostPages>,
    ) -> Result<Table, NoKvmClock<'a>> {
        let isa = Isa::of_this_machine().unwrap_or(Isa::None);
        self.kvm = kvm_vcpus(recording, readings, session, &self.lanes, isa)?;
        // Where sysfs cannot be read, the TSC counts as stable.
        if tsc_is_stable().is_ok_and(|stable| !stable) {
            return Err(Refusal::UnstableTsc.into());
        }
        let seen = self.seen(recording.since, host);
        let mut table = Table::build(recording.since, isa, seen, &self.lanes)?;
        self.add_runs(&mut table, host);
        Ok(table)
    }

    /// Every TSC state that KVM reported, with its time as exact as the host's trace allows.
    fn seen(&mut self, since: HostTsc, host: Option<&HostPages>) -> Vec<Seen> {
        let mut stretches = Vec::new();
        let mut threads = Vec::new();
        for told in self.kvm.iter().flat_map(|vcpu| &vcpu.changes) {
            if told.change.source == source::ENTRY && told.seen >= since {
                stretches.push(around(range(told)));
                threads.push(told.change.vcpu_tid);
            }
        }
        let doings = match host.map(|host| host.look(&stretches, &threads)) {
            Some(Ok(doings)) => Some(doings),
            Some(Err(fault)) => {
                self.remarks.push(format!("the host's trace around TSC changes cannot be read: {}", chain(&fault)));
                None
            }
            None => None,
        };
        let mut all = Vec::new();
        for vcpu in &self.kvm {
            for told in &vcpu.changes {
                let mut seen = Seen::new(&told.change, vcpu.cpu, range(told));
                if let Some(doings) = &doings {
                    let thread = told.change.vcpu_tid;
                    let state = (told.change.offset, told.change.ratio);
                    let announced = doings.announced(thread, state, seen.at);
                    match announced.filter(|_| told.change.source == source::ENTRY) {
                        Some(at) => seen.at = HostRange::at(at),
                        None => seen.settle(&doings.runs(thread, &[around(seen.at)])),
                    }
                }
                all.push(seen);
            }
        }
        all
    }

    /// Adds the runs of vCPUs to the table, where they decide which offset held.
    fn add_runs(&mut self, table: &mut Table, host: Option<&HostPages>) {
        let Some(host) = host else { return };
        let mut wanted: Vec<(Cpu, u32, Vec<HostRange>)> = Vec::new();
        for vcpu in &self.kvm {
            let ranges = table.runs_wanted(vcpu.cpu).into_iter().map(|range| one_page_longer(around(range)));
            wanted.push((vcpu.cpu, vcpu.tid, ranges.collect()));
        }
        let all: Vec<HostRange> = wanted.iter().flat_map(|(_, _, ranges)| ranges).copied().collect();
        let threads: Vec<u32> = wanted.iter().map(|(_, thread, _)| *thread).collect();
        match host.look(&all, &threads) {
            Ok(doings) => {
                for (cpu, thread, ranges) in wanted.into_iter().filter(|(_, _, ranges)| !ranges.is_empty()) {
                    table.learn(cpu, doings.runs(thread, &ranges));
                }
            }
            Err(fault) => {
                self.remarks.push(format!("the host's trace around steps back cannot be read: {}", chain(&fault)));
            }
        }
    }

    /// The lane whose clock gives the guest's start time.
    pub(super) fn first_lane(&self) -> Option<Cpu> {
        self.lanes.first().copied()
    }

    /// The host's TSC when the guest's was `guest`, close to `near`.
    pub(super) fn to_host(&self, cpu: Cpu, guest: GuestTsc, near: HostTsc) -> Option<HostTsc> {
        match &self.source {
            ClockSource::Kvm(table, _) => table.to_host(cpu, guest, near).map(|conversion| conversion.at),
            ClockSource::Measured { plan, .. } => Some(plan.to_host(cpu, guest)),
            ClockSource::None => None,
        }
    }

    /// Converts the times of a file, by options or by rewriting its pages.
    pub(super) fn convert(self, pages: FilePages<'_>, shared: &SharedFacts) -> ConvertedTimes {
        let mut converted = ConvertedTimes { remarks: self.remarks, ..ConvertedTimes::default() };
        let segments = segments(&self.kvm);
        let mut summary = ClockSummary { segments, kvm: self.kvm, steady: true, ..ClockSummary::default() };
        match self.source {
            // A changed clock has a line of its own in the table.
            ClockSource::None if self.is_changed => return converted,
            ClockSource::None if self.is_raw => {}
            ClockSource::None => {
                converted.remarks.push("its clock could not be measured: its times stay its own".into());
                return converted;
            }
            ClockSource::Measured { plan, why } => {
                summary.source = MEASURED.into();
                summary.vcpus = plan.vcpus;
                summary.steady = plan.steady;
                summary.bound_ns = shared.scale.ns(plan.bound_cycles);
                summary.why_measured = Some(why);
                if self.is_instance && !self.is_raw {
                    converted.rewrite_by_plan(&plan, self.since, pages, &mut summary, shared);
                } else if !self.is_raw {
                    converted.options.push(TraceOption::TimeShift(plan.time_shift));
                }
            }
            ClockSource::Kvm(table, shape) => {
                summary.source = KVM.into();
                summary.vcpus = self.lanes.len();
                summary.steady = summary.segments <= 1;
                let shape = Some(shape).filter(|_| !self.is_raw);
                converted.apply_table(table, shape, pages, &mut summary, shared);
            }
        }
        if self.is_raw {
            summary.source = RAW.into();
            summary.bound_ns = 0;
        }
        converted.summary = Some(summary);
        converted
    }
}

impl ConvertedTimes {
    fn apply_table(
        &mut self,
        table: Table,
        shape: Option<Shape>,
        pages: FilePages<'_>,
        summary: &mut ClockSummary,
        shared: &SharedFacts,
    ) {
        summary.bound_ns = shared.scale.ns(table.bound());
        let shown = match shape {
            None => Shown::Raw,
            Some(Shape::Shift(shift)) => {
                self.options.push(TraceOption::TimeShift(shift));
                Shown::Shifted
            }
            Some(Shape::Rewrite) => match self.rewrite(&table, pages) {
                Ok(total) => {
                    summary.bound_ns = shared.scale.ns(total.error_max);
                    summary.uncertain_events = total.unsure + total.trapped;
                    self.note(&total);
                    Shown::Rewritten
                }
                Err(error) => self.not_rewritten(&error),
            },
        };
        self.options.push(TraceOption::Segments(Segments {
            shown,
            table,
            uncertainties: std::mem::take(&mut self.uncertainties),
        }));
    }

    /// Rewrites the pages with the times that the plan's time shift would give.
    fn rewrite_by_plan(
        &mut self,
        plan: &ClockPlan,
        since: HostTsc,
        pages: FilePages<'_>,
        summary: &mut ClockSummary,
        shared: &SharedFacts,
    ) {
        let rewritten = match plan.table(since) {
            Some((table, further_cycles)) => {
                summary.bound_ns = shared.scale.ns(plan.bound_cycles.saturating_add(further_cycles));
                self.rewrite(&table, pages)
            }
            None => Err(RewriteError::TooManyCpus),
        };
        match rewritten {
            Ok(total) => self.note(&total),
            Err(error) => drop(self.not_rewritten(&error)),
        }
        self.uncertainties.clear();
    }

    /// Some lanes, or all, keep the guest's own times.
    fn not_rewritten(&mut self, error: &RewriteError) -> Shown {
        self.failed = true;
        let is_touched = !self.added.is_empty();
        let whose = if is_touched { "of some CPUs the host's and of some its own" } else { "its own" };
        self.remarks.push(format!("its times are {whose}: {}", chain(error)));
        if is_touched { Shown::Mixed } else { Shown::Raw }
    }

    /// Rewrites the pages of all lanes with host times.
    fn rewrite(&mut self, table: &Table, pages: FilePages<'_>) -> Result<Rewritten, RewriteError> {
        let hosted = pages.writer.host_times(pages.filled, table, pages.cmdlines, pages.options)?;
        self.uncertainties = hosted.uncertainties;
        let mut total = Rewritten::default();
        for (cpu, done) in hosted.lanes {
            self.added.push((cpu, done.pages_added));
            total.join(&done);
        }
        match hosted.fault {
            Some(fault) => Err(fault.into()),
            None => Ok(total),
        }
    }

    fn note(&mut self, total: &Rewritten) {
        let Rewritten { foreign, pages_cut, .. } = *total;
        if foreign > 0 {
            self.remarks.push(format!("{foreign} of its events have times that no TSC offset from KVM explains"));
        }
        if pages_cut > 0 {
            self.remarks.push(format!("{pages_cut} of its pages are broken and were cut at the last valid event"));
        }
    }
}

/// KVM's history of the guest's vCPUs.
fn kvm_vcpus<'a>(
    recording: &'a Recording,
    readings: &ClockReadings,
    session: &GuestSession,
    lanes: &[Cpu],
    isa: Isa,
) -> Result<Vec<Vcpu>, NoKvmClock<'a>> {
    let told = recording.kvm.as_ref().map_err(NoKvmClock::Watch)?;
    let claimed = session.claimed.as_ref().ok_or(NoKvmClock::NotArmed)?;
    let measured = [&readings.start[..], &readings.end[..]].concat();
    Ok(guest_vcpus(told, claimed.vmm_pid, &apics(session), lanes, &measured, isa)?)
}

/// The APIC ids that the agent reported: in its hello, and at the end for CPUs that came online since.
fn apics(session: &GuestSession) -> Vec<(Cpu, u32)> {
    let reported = session.reports.iter().filter_map(|report| Some((report.cpu, report.apic?)));
    let claimed = session.claimed.iter().flat_map(|claimed| claimed.machine.apics.iter().copied());
    reported.chain(claimed).collect()
}

/// When a state was seen.
fn range(told: &TimedChange) -> HostRange {
    let TimedChange { seen, error_cycles, .. } = told;
    HostRange {
        low: HostTsc(seen.0.saturating_sub(*error_cycles)),
        high: HostTsc(seen.0.saturating_add(*error_cycles)),
    }
}

fn one_page_longer(range: HostRange) -> HostRange {
    HostRange { high: HostTsc(range.high.0.saturating_add(PAGE_CYCLES)), ..range }
}
