//! Holds every event of a guest against the windows of its vCPU.
//!
//! In:    a guest's file, and what the host saw
//! Out:   [`GuestReport`]
//! Runs:  on the caller's thread, once through the file
//! Trust: nothing

use std::collections::{BTreeMap, HashMap};

use vtrace_common::ids::Cpu;

use super::report::{ClockVerdict, EventCounts, GuestReport, Stray, Unit, VcpuReport};
use crate::{
    analysis::{Against, CheckError, host_windows::HostWindows, pairs::Reading, windows::Coverage},
    ftrace::fields::{Field, Formats},
    trace::{
        format::{option::TraceOption, segments::Shown},
        read::{
            Buffer, Reader,
            input::Source,
            merge::{Merge, Merged},
            times::FileClock,
        },
    },
};

/// Events outside that are listed.
const STRAYS_MAX: usize = 10;

/// The host's threads that are a guest's vCPUs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Vcpus {
    /// The guest's name in the host's file.
    pub(super) name: Option<String>,
    /// The thread of each CPU.
    pub(super) threads: BTreeMap<Cpu, u32>,
    /// How the threads were found, where the host's file does not name this guest.
    pub(super) note: Option<String>,
}

/// A guest's file to check.
#[derive(Debug)]
pub struct GuestFile<'a, S> {
    /// Its file name.
    pub file: String,
    /// Its contents.
    pub reader: &'a Reader<S>,
}

/// The work on one guest.
struct Check<'a> {
    host: &'a mut HostWindows,
    against: Against,
    vcpus: &'a Vcpus,
    /// How far off a time may be, nanoseconds, where the file does not say it for each.
    bound: u64,
    /// Of a file that does: what it says.
    stated: Option<Stated>,
    formats: Formats,
    readings: HashMap<u16, Reading>,
    counts: BTreeMap<Cpu, EventCounts>,
    strays: Vec<Stray>,
}

pub(super) fn check_guest<S: Source>(
    host: &Reader<S>,
    seen: &mut HostWindows,
    guest: &GuestFile<'_, S>,
    vcpus: &Vcpus,
) -> Result<GuestReport, CheckError> {
    let reader = guest.reader;
    let stamps = FileClock::from_options(reader.options(), reader.other_options())?;
    let threads: Vec<u32> = vcpus.threads.values().copied().collect();
    let unit = unit(reader, &stamps);
    let bound = bound_ns(reader).filter(|_| unit == Unit::Ns);
    let stated = Stated::of(reader, &stamps).filter(|_| unit == Unit::Ns);
    let formats = Formats::parse(reader.metadata());
    let reading = |format: &crate::ftrace::fields::EventFormat| Some((format.id, Reading::of_guest(format)?));
    let readings = formats.each().filter_map(reading).collect();
    let mut notes = notes(host, reader, &stamps, seen);
    notes.extend(vcpus.note.clone());
    let mut check = Check {
        against: seen.against(&threads),
        host: seen,
        vcpus,
        bound: bound.unwrap_or(0),
        stated,
        formats,
        readings,
        counts: BTreeMap::new(),
        strays: Vec::new(),
    };
    let buffers: Vec<_> = recorded(reader).map(|buffer| (buffer, stamps)).into_iter().collect();
    let mut merge = Merge::new(reader, &buffers)?;
    while let Some(event) = merge.next_event()? {
        check.take(&event);
    }
    Ok(check.report(guest, unit, bound, notes))
}

impl Check<'_> {
    fn take(&mut self, event: &Merged<'_>) {
        let thread = self.vcpus.threads.get(&event.cpu).copied();
        let windows = thread.and_then(|thread| self.host.windows(self.against, thread));
        let place = windows.map_or(Coverage::Uncovered, |windows| windows.coverage(&self.host.gaps, event.time));
        let counts = self.counts.entry(event.cpu).or_default();
        let bound = self.stated.as_ref().map_or(self.bound, |stated| stated.bound(event.cpu, event.time));
        counts.add(place, bound);
        if let Coverage::Outside(distance) = place {
            self.stray(event, distance);
        }
        let Some(thread) = thread else { return };
        let reading = crate::ftrace::fields::id(event.data).and_then(|id| self.readings.get(&id));
        if let Some(effect) = reading.and_then(|reading| reading.read(event.data)) {
            self.host.causes.pair(thread, effect, event.time);
        }
    }

    /// Keeps the farthest ones.
    fn stray(&mut self, event: &Merged<'_>, distance: u64) {
        if self.strays.len() == STRAYS_MAX && self.strays.last().is_some_and(|last| last.distance >= distance) {
            return;
        }
        let format = self.formats.of_event(event.data);
        let name = format.map_or_else(|| "unknown".into(), |format| format!("{}:{}", format.system, format.name));
        let pid =
            format.and_then(|format| format.field("common_pid")).and_then(|field: &Field| field.small(event.data));
        let stray = Stray { cpu: event.cpu.0, time: event.time, distance, event: name, pid };
        let at = self.strays.partition_point(|other| other.distance >= distance);
        self.strays.insert(at, stray);
        self.strays.truncate(STRAYS_MAX);
    }

    fn report<S>(self, guest: &GuestFile<'_, S>, unit: Unit, bound: Option<u64>, notes: Vec<String>) -> GuestReport {
        let threads: Vec<u32> = self.vcpus.threads.values().copied().collect();
        let all = self.counts.keys().chain(self.vcpus.threads.keys()).copied();
        let cpus: std::collections::BTreeSet<Cpu> = all.collect();
        let vcpu = |cpu: Cpu| {
            let thread = self.vcpus.threads.get(&cpu).copied();
            let windows = thread.and_then(|thread| self.host.windows(self.against, thread));
            let windows = windows.map_or(0, |windows| u64::try_from(windows.count()).unwrap_or(u64::MAX));
            VcpuReport { cpu: cpu.0, thread, windows, counts: self.counts.get(&cpu).copied().unwrap_or_default() }
        };
        let vcpus: Vec<VcpuReport> = cpus.into_iter().map(vcpu).collect();
        let mut counts = EventCounts::default();
        vcpus.iter().for_each(|vcpu| counts.join(&vcpu.counts));
        let pairs = self.host.causes.pairs(&threads, self.bound);
        let verdict = ClockVerdict::new(&counts, &pairs);
        GuestReport {
            name: self.vcpus.name.clone().unwrap_or_else(|| guest.file.clone()),
            file: guest.file.clone(),
            verdict,
            against: self.against,
            unit,
            bound,
            counts,
            vcpus,
            pairs,
            farthest: self.strays,
            notes,
        }
    }
}

/// What a file with rewritten times says of how exact each is, in nanoseconds.
struct Stated {
    /// Half the ticks within which the guest's clock keeps its value.
    resolution: u64,
    uncertainties: BTreeMap<Cpu, Vec<StatedBound>>,
}

/// Events from `first` to `last` may be off by `bound`.
struct StatedBound {
    first: u64,
    last: u64,
    bound: u64,
}

impl Stated {
    fn of<S: Source>(reader: &Reader<S>, stamps: &FileClock) -> Option<Self> {
        let segments = reader.segments().ok().flatten().filter(|segments| segments.shown == Shown::Rewritten)?;
        let pairs = segments.table.histories().flat_map(|history| history.segments().iter().map(|one| one.pair));
        let ticks = pairs.map(|pair| pair.resolution()).max().unwrap_or(1) / 2;
        // Both ends of a distance are rounded down.
        let ns = |at: u64, ticks: u64| {
            let plain = stamps.unshifted();
            let shown = |time| plain.shown(Cpu(0), time);
            shown(at.saturating_add(ticks)).saturating_sub(shown(at)).saturating_add(u64::from(ticks > 0))
        };
        let mut uncertainties: BTreeMap<Cpu, Vec<StatedBound>> = BTreeMap::new();
        for uncertainty in segments.uncertainties {
            let [first, last] = [uncertainty.first, uncertainty.last].map(|at| stamps.shown(uncertainty.cpu, at.0));
            let span = StatedBound { first, last, bound: ns(uncertainty.first.0, uncertainty.error) };
            uncertainties.entry(uncertainty.cpu).or_default().push(span);
        }
        Some(Self { resolution: ns(segments.table.since().0, ticks), uncertainties })
    }

    fn bound(&self, cpu: Cpu, time: u64) -> u64 {
        let spans = self.uncertainties.get(&cpu).into_iter().flatten();
        let of = spans.filter(|span| (span.first..=span.last).contains(&time));
        of.map(|span| span.bound).max().unwrap_or(0).max(self.resolution)
    }
}

/// The top instance, or the first instance that has pages if the top one is empty, as with `-B` after a `--dom`.
fn recorded<S: Source>(reader: &Reader<S>) -> Option<&Buffer> {
    let has_pages = |buffer: &&Buffer| buffer.lanes.iter().any(|lane| lane.bytes > 0);
    reader.top().filter(has_pages).or_else(|| reader.buffers().iter().find(has_pages)).or_else(|| reader.top())
}

/// What the times of this file are.
fn unit<S: Source>(reader: &Reader<S>, stamps: &FileClock) -> Unit {
    let counts_cycles = clock(reader).is_some_and(|clock| clock == "x86-tsc");
    if counts_cycles && !stamps.is_scaled() { Unit::Cycles } else { Unit::Ns }
}

/// The trace clock, from the table of pages or the option.
fn clock<S: Source>(reader: &Reader<S>) -> Option<String> {
    let of_top = reader.top().map(|top| top.clock.clone()).filter(|clock| !clock.is_empty());
    let chosen =
        |text: &str| text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map(|(clock, _)| clock.to_owned());
    of_top.or_else(|| {
        reader.options().iter().find_map(|option| match option {
            TraceOption::TraceClock(text) => chosen(text),
            _ => None,
        })
    })
}

/// What a person has to know of how these files fit together.
fn notes<S: Source>(host: &Reader<S>, guest: &Reader<S>, stamps: &FileClock, seen: &HostWindows) -> Vec<String> {
    let mut notes = Vec::new();
    let scale = FileClock::from_options(host.options(), host.other_options()).ok().and_then(|stamps| stamps.scale());
    if scale != stamps.scale() {
        notes.push("host and guest do not turn cycles into nanoseconds alike".into());
    }
    match guest.segments().ok().flatten().map(|segments| segments.shown) {
        Some(Shown::Raw | Shown::Pending) => notes.push("its times are the guest's own, as was asked for".into()),
        Some(Shown::Mixed) => notes.push("its times are partly the guest's: there was no room to convert them".into()),
        Some(Shown::Shifted | Shown::Rewritten) | None => {}
    }
    if guest.buffers().iter().any(|buffer| !buffer.name.is_empty()) {
        notes.push("only its top instance is checked: stock readers shift no other".into());
    }
    if seen.gaps.count() > 0 {
        notes.push(format!("the host lost events in {} places: what lies there is not covered", seen.gaps.count()));
    }
    if seen.is_cut {
        notes.push("the host's file has more windows than are held: what follows them is not covered".into());
    }
    notes
}

/// How wrong the file says its times can be: from our notes, or from the text for `trace-cmd report --stat`.
fn bound_ns<S: Source>(reader: &Reader<S>) -> Option<u64> {
    let notes = reader.notes().ok().flatten().and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok());
    let noted = notes.and_then(|notes| notes["clock"]["bound_ns"].as_u64());
    noted.or_else(|| {
        let texts = reader.options().iter().filter_map(|option| match option {
            TraceOption::CpuStat(text) => said_bound_ns(text),
            _ => None,
        });
        texts.max()
    })
}

/// `vtrace clock: measured, 2 vCPUs, ±9.1 µs`: rounded up by one of its last digit, since it was cut there.
fn said_bound_ns(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("vtrace clock: "))?;
    if line.ends_with("exact") {
        return Some(0);
    }
    let bound = line.split_once('±').or_else(|| line.split_once("by up to "));
    let mut words = bound?.1.split([' ', ',', ';']);
    let (number, unit) = (words.next()?, words.next()?);
    let unit_ns: u64 = match unit {
        "ns" => 1,
        "µs" => 1_000,
        "ms" => 1_000_000,
        _ => return None,
    };
    match number.split_once('.') {
        None => number.parse::<u64>().ok()?.checked_mul(unit_ns),
        Some((whole, tenths)) => {
            let tenths = whole.parse::<u64>().ok()?.checked_mul(10)?.checked_add(tenths.parse::<u8>().ok()?.into())?;
            tenths.checked_add(1)?.checked_mul(unit_ns / 10)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::said_bound_ns;

    #[test]
    fn bound_is_read_as_the_recorder_says_it() {
        let said = |clock: &str| said_bound_ns(&format!("CPU: 0\nentries: 1\nvtrace clock: {clock}\n"));
        assert_eq!(said("measured, 2 vCPUs, ±9.1 µs"), Some(9_200));
        assert_eq!(said("measured, 1 vCPU, ±912 ns, offset moved during the trace"), Some(912));
        assert_eq!(said("measured, 1 vCPU, ±1.0 ms"), Some(1_100_000));
        assert_eq!(said("measured, 2 vCPUs, ±16.9 µs; not by KVM: its VMM runs no vCPU under KVM"), Some(17_000));
        assert_eq!(said("kvm, 4 vCPUs, 3 segments, exact"), Some(0));
        assert_eq!(said("kvm, 1 vCPU, 4 segments, exact to ±38 ns"), Some(38));
        let some = said("kvm, 1 vCPU, 4 segments, exact but 12 events marked uncertain by up to 3.1 µs");
        assert_eq!(some, Some(3_200));
        assert_eq!(said("raw"), None);
        assert_eq!(said("kvm"), None);
        assert_eq!(said_bound_ns("CPU: 0\nentries: 1\n"), None);
    }
}
