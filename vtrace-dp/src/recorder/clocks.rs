//! Whose word is taken for a guest's times: KVM's, where it is known; else what was measured.
//!
//! In:    measurements at both ends, what KVM said meanwhile, the host's pages around each change
//! Out:   [`GuestClock`]: how the file's times are to become the host's; and that done, what the file and the summary say
//! Runs:  on record's thread, when all machines have stopped and their pages are in their areas
//! Full:  a disk without room for the largest lane once more is an error; the file says whose its times are
//! Trust: KVM; a guest's measurements are checked against it, its own word places only its own events

use vtrace_common::{
    ids::Cpu,
    kvm::source,
    time::{GuestTsc, HostTsc},
};

use super::{
    instances,
    session::GuestSession,
    state::{Clocks, Common, Recording},
    summary::{ClockSummary, KVM, MEASURED, RAW},
};
use crate::{
    analysis::vcpu_runs::{HostLanes, around},
    clock::{
        exact_shift::{Shape, shape},
        math::HostRange,
        measured::{ClockPlan, plan},
        ratio::Isa,
        segment::{Refusal, Seen, tsc_is_stable},
        table::Table,
        vcpus::{Told, Vcpu, of_guest, segments},
    },
    printable::chain,
    trace::{
        format::{
            option::TraceOption,
            segments::{Segments, Shown},
            uncertainty::Doubt,
        },
        write::{Writer, host_times::Rewritten},
    },
};

/// Behind a step back runs are of use for as long as a page lasts; so far they are looked at, cycles.
const PAGE_CYCLES: u64 = 1 << 30;

/// How one guest's times become host times.
pub(super) struct GuestClock {
    /// What KVM said of it; nothing if that is not known.
    pub(super) kvm: Vec<Vcpu>,
    word: Word,
    lanes: Vec<Cpu>,
    /// The file keeps the guest's own times.
    is_raw: bool,
    /// Pages are going to be a named instance's, which stock readers apply no time shift to.
    is_instance: bool,
    since: HostTsc,
    remarks: Vec<String>,
}

/// Whose word is taken.
enum Word {
    Kvm(Table, Shape),
    Measured { plan: ClockPlan, why: String },
    Nobodys,
}

/// What became of a guest's times.
#[derive(Default)]
pub(super) struct Converted {
    /// For the file.
    pub(super) options: Vec<TraceOption>,
    /// For the closing table.
    pub(super) summary: Option<ClockSummary>,
    /// What a reader has to know.
    pub(super) remarks: Vec<String>,
    /// Pages each lane has more than came.
    pub(super) added: Vec<(Cpu, u64)>,
    /// Some times are the host's and some the guest's.
    pub(super) failed: bool,
    /// Which of the times are not exact.
    doubts: Vec<Doubt>,
}

impl GuestClock {
    /// Decides for the guest `index`, which was armed and has pages of `lanes`.
    pub(super) fn of(
        recording: &Recording,
        index: usize,
        (session, lanes): (&GuestSession, Vec<Cpu>),
        common: &Common,
        host: Option<&HostLanes>,
    ) -> Self {
        let clocks = &recording.clocks[index];
        let isa = Isa::of_this_machine().unwrap_or(Isa::None);
        let mut clock = Self {
            kvm: Vec::new(),
            word: Word::Nobodys,
            lanes,
            is_raw: recording.plan.raw_clock,
            is_instance: instances::of_guest(recording.plan, session).is_some(),
            since: recording.since,
            remarks: Vec::new(),
        };
        let why = match by_kvm(recording, clocks, session, &clock.lanes, isa) {
            Ok(kvm) => {
                clock.kvm = kvm;
                match clock.table(recording.since, isa, host) {
                    Ok(table) => {
                        let by_option = || shape(&table, &clock.lanes, common.host_id);
                        let shape = if clock.is_instance { Shape::Rewrite } else { by_option() };
                        clock.word = Word::Kvm(table, shape);
                        return clock;
                    }
                    Err(refusal) => refusal.to_string(),
                }
            }
            Err(why) => why,
        };
        if let Some(plan) = plan(&clocks.start, &clocks.end, &clock.lanes, common.host_id) {
            clock.word = Word::Measured { plan, why };
        }
        clock
    }

    /// The history that KVM told, with all that the host's trace says of it.
    fn table(&mut self, since: HostTsc, isa: Isa, host: Option<&HostLanes>) -> Result<Table, Refusal> {
        // Where sysfs is silent, so is the objection.
        if tsc_is_stable().is_ok_and(|stable| !stable) {
            return Err(Refusal::UnstableTsc);
        }
        let seen = self.seen(since, host);
        let mut table = Table::build(since, isa, seen, &self.lanes)?;
        self.learn(&mut table, host);
        Ok(table)
    }

    /// Every state that was told, as exactly as the host's trace says when.
    fn seen(&mut self, since: HostTsc, host: Option<&HostLanes>) -> Vec<Seen> {
        let all = || self.kvm.iter().flat_map(|vcpu| vcpu.told.iter().map(move |told| (vcpu, told)));
        let changes = all().filter(|(_, told)| told.change.source == source::ENTRY && told.seen >= since);
        let (wanted, threads): (Vec<_>, Vec<_>) =
            changes.map(|(_, told)| (around(range(told)), told.change.vcpu_tid)).unzip();
        let doings = host.map(|host| host.look(&wanted, &threads)).transpose();
        let doings =
            doings.map_err(|fault| format!("the host's trace around changes cannot be read: {}", chain(&fault)));
        let seen = all().map(|(vcpu, told)| {
            let mut seen = Seen::new(&told.change, vcpu.cpu, range(told));
            if let Ok(Some(doings)) = &doings {
                let (thread, state) = (told.change.vcpu_tid, (told.change.offset, told.change.ratio));
                match doings.announced(thread, state, seen.at).filter(|_| told.change.source == source::ENTRY) {
                    Some(at) => seen.at = HostRange::at(at),
                    None => seen.settle(&doings.runs(thread, &[around(seen.at)])),
                }
            }
            seen
        });
        let seen = seen.collect();
        self.remarks.extend(doings.err());
        seen
    }

    /// Tells the table when vCPUs ran, where that decides.
    fn learn(&mut self, table: &mut Table, host: Option<&HostLanes>) {
        let Some(host) = host else { return };
        let longer = |range: HostRange| HostRange { high: HostTsc(range.high.0.saturating_add(PAGE_CYCLES)), ..range };
        let of_vcpu = |vcpu: &Vcpu| -> Vec<HostRange> {
            table.runs_wanted(vcpu.cpu).into_iter().map(|range| longer(around(range))).collect()
        };
        let wanted: Vec<(Cpu, u32, Vec<HostRange>)> =
            self.kvm.iter().map(|vcpu| (vcpu.cpu, vcpu.tid, of_vcpu(vcpu))).collect();
        let all: Vec<HostRange> = wanted.iter().flat_map(|(_, _, wanted)| wanted).copied().collect();
        let threads: Vec<u32> = wanted.iter().map(|(_, thread, _)| *thread).collect();
        match host.look(&all, &threads) {
            Ok(doings) => {
                let known = wanted.into_iter().filter(|(_, _, wanted)| !wanted.is_empty());
                known.for_each(|(cpu, thread, wanted)| table.learn(cpu, doings.runs(thread, &wanted)));
            }
            Err(fault) => {
                self.remarks.push(format!("the host's trace around steps back cannot be read: {}", chain(&fault)));
            }
        }
    }

    /// A CPU whose clock counts for the whole guest's start.
    pub(super) fn first_lane(&self) -> Option<Cpu> {
        self.lanes.first().copied()
    }

    /// What the host's TSC was when the guest's was `guest`, `near` a time of the host.
    pub(super) fn to_host(&self, cpu: Cpu, guest: GuestTsc, near: HostTsc) -> Option<HostTsc> {
        match &self.word {
            Word::Kvm(table, _) => table.to_host(cpu, guest, near).map(|conversion| conversion.at),
            Word::Measured { plan, .. } => Some(plan.to_host(cpu, guest)),
            Word::Nobodys => None,
        }
    }

    /// Gives the file its times. `filled`: the bytes of each lane, which can become more; `known`: what else the file is
    /// to have, should this be killed.
    pub(super) fn convert(
        self,
        file: &mut Writer,
        filled: &mut [(Cpu, u64)],
        known: &Known<'_>,
        common: &Common,
    ) -> Converted {
        let Self { kvm, word, lanes, is_raw, is_instance, since, remarks } = self;
        let mut done = Converted { remarks, ..Converted::default() };
        let mut said = ClockSummary { segments: segments(&kvm), kvm, steady: true, ..ClockSummary::default() };
        match word {
            Word::Nobodys if is_raw => {}
            Word::Nobodys => {
                done.remarks.push("its clock could not be measured: its times stay its own".into());
                return done;
            }
            Word::Measured { plan, why } => {
                (said.source, said.vcpus, said.steady) = (MEASURED.into(), plan.vcpus, plan.steady);
                (said.bound_ns, said.why_measured) = (common.scale.ns(plan.bound_cycles), Some(why));
                match (is_raw, is_instance) {
                    (true, _) => {}
                    (false, true) => done.by_plan(&plan, since, (file, filled, known), &mut said, common),
                    (false, false) => done.options.push(TraceOption::TimeShift(plan.time_shift)),
                }
            }
            Word::Kvm(table, shape) => {
                (said.source, said.vcpus, said.steady) = (KVM.into(), lanes.len(), said.segments <= 1);
                done.by_table(table, Some(shape).filter(|_| !is_raw), (file, filled, known), &mut said, common);
            }
        }
        if is_raw {
            (said.source, said.bound_ns) = (RAW.into(), 0);
        }
        done.summary = Some(said);
        done
    }
}

/// What a file has besides its pages: command lines and options.
pub(super) type Known<'a> = (&'a [u8], &'a [TraceOption]);

/// A file's pages: who writes it, the bytes of each lane, and what else is known.
type Place<'a> = (&'a mut Writer, &'a mut [(Cpu, u64)], &'a Known<'a>);

impl Converted {
    fn by_table(
        &mut self,
        table: Table,
        shape: Option<Shape>,
        place: Place<'_>,
        said: &mut ClockSummary,
        common: &Common,
    ) {
        said.bound_ns = common.scale.ns(table.bound());
        let shown = match shape {
            None => Shown::Raw,
            Some(Shape::Shift(shift)) => {
                self.options.push(TraceOption::TimeShift(shift));
                Shown::Shifted
            }
            Some(Shape::Rewrite) => match self.rewrite(&table, place) {
                Ok(total) => {
                    said.bound_ns = common.scale.ns(total.error_max);
                    said.uncertain_events = total.unsure + total.trapped;
                    self.note(&total);
                    Shown::Rewritten
                }
                Err(why) => self.not_rewritten(&why),
            },
        };
        self.options.push(TraceOption::Segments(Segments { shown, table, doubts: std::mem::take(&mut self.doubts) }));
    }

    /// Gives the pages the times that a time shift would give them.
    fn by_plan(
        &mut self,
        plan: &ClockPlan,
        since: HostTsc,
        place: Place<'_>,
        said: &mut ClockSummary,
        common: &Common,
    ) {
        let rewritten =
            plan.table(since).ok_or_else(|| "it has too many CPUs".to_owned()).and_then(|(table, further)| {
                said.bound_ns = common.scale.ns(plan.bound_cycles.saturating_add(further));
                self.rewrite(&table, place)
            });
        match rewritten {
            Ok(total) => self.note(&total),
            Err(why) => drop(self.not_rewritten(&why)),
        }
        self.doubts.clear();
    }

    /// Some pages or all have the guest's own times.
    fn not_rewritten(&mut self, why: &str) -> Shown {
        self.failed = true;
        let is_touched = !self.added.is_empty();
        let whose = if is_touched { "of some CPUs the host's and of some its own" } else { "its own" };
        self.remarks.push(format!("its times are {whose}: {why}"));
        if is_touched { Shown::Mixed } else { Shown::Raw }
    }

    /// Gives the pages of all lanes host times.
    fn rewrite(&mut self, table: &Table, (file, filled, known): Place<'_>) -> Result<Rewritten, String> {
        let hosted = file.host_times(filled, table, known.0, known.1).map_err(|fault| chain(&fault))?;
        self.doubts = hosted.doubts;
        let mut total = Rewritten::default();
        for (cpu, done) in hosted.lanes {
            self.added.push((cpu, done.pages_added));
            total.join(&done);
        }
        hosted.fault.map_or(Ok(total), |fault| Err(chain(&fault)))
    }

    fn note(&mut self, total: &Rewritten) {
        let Rewritten { foreign, pages_cut, .. } = *total;
        if foreign > 0 {
            self.remarks.push(format!("{foreign} of its events have times that KVM's word does not explain"));
        }
        if pages_cut > 0 {
            self.remarks.push(format!("{pages_cut} of its pages end where they are broken"));
        }
    }
}

/// The guest's vCPUs as KVM told them, or why they are not known.
fn by_kvm(
    recording: &Recording,
    clocks: &Clocks,
    session: &GuestSession,
    lanes: &[Cpu],
    isa: Isa,
) -> Result<Vec<Vcpu>, String> {
    let told = recording.kvm.as_ref().map_err(|fault| chain(fault))?;
    let claimed = session.claimed.as_ref().ok_or("it was not armed")?;
    let measured = [&clocks.start[..], &clocks.end[..]].concat();
    of_guest(told, claimed.vmm_pid, &apics(session), lanes, &measured, isa).map_err(|unknown| unknown.to_string())
}

/// The APIC ids that the agent named: when it said hello, and of CPUs that have come since.
fn apics(session: &GuestSession) -> Vec<(Cpu, u32)> {
    let reported = session.reports.iter().filter_map(|report| Some((report.cpu, report.apic?)));
    let claimed = session.claimed.iter().flat_map(|claimed| claimed.machine.apics.iter().copied());
    reported.chain(claimed).collect()
}

/// When a state was seen.
fn range(told: &Told) -> HostRange {
    let Told { seen, error_cycles, .. } = told;
    HostRange {
        low: HostTsc(seen.0.saturating_sub(*error_cycles)),
        high: HostTsc(seen.0.saturating_add(*error_cycles)),
    }
}
