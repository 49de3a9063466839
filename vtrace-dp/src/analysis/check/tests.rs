//! A host and a guest of two vCPUs, made by our own writer: right, and wrong in one way each.

use std::{fs, os::unix::fs::FileExt};

use proptest::prelude::*;
use vtrace_common::time::HostTsc;

use super::{report::ClockVerdict, *};
use crate::{
    analysis::{Against, pairs::Rule},
    clock::{
        math::HostRange,
        ratio::Isa,
        segment::{Seen, Since},
        shift::{ShiftSample, TimeShift},
        table::Table,
    },
    ftrace::metadata::Metadata,
    trace::{
        format::{
            option::TraceOption,
            segments::{Segments, Shown},
            uncertainty::Uncertainty,
        },
        write::Writer,
    },
};

const ENTRY: u16 = 1;
const EXIT: u16 = 2;
const SWITCH: u16 = 3;
const MSR: u16 = 4;
const WRITE_MSR: u16 = 5;
const WAKE: u16 = 6;
/// Host threads of the vCPUs.
const THREADS: [u32; 2] = [100, 101];
/// How far the guest's clock lags the host's.
const OFFSET: i64 = 5_000;
const ROUNDS: u64 = 40;

/// Event by number with the fields its format says.
#[derive(Clone, Debug)]
struct GuestEvent {
    time: u64,
    data: Vec<u8>,
}

fn event(time: u64, id: u16, pid: u32, fields: &[u64]) -> GuestEvent {
    let mut data = [&id.to_le_bytes()[..], &[0, 0], &pid.to_le_bytes()].concat();
    fields.iter().for_each(|field| data.extend(field.to_le_bytes()));
    GuestEvent { time, data }
}

fn formats() -> Metadata {
    let format = |(id, name, fields): &(u16, &str, &[&str])| {
        let mut text = format!(
            "name: {name}\nID: {id}\nformat:\n\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\n"
        );
        for (at, field) in fields.iter().enumerate() {
            text += &format!("\tfield:u64 {field};\toffset:{};\tsize:8;\tsigned:0;\n", 8 + 8 * at);
        }
        text.into_bytes()
    };
    let kvm: [(u16, &str, &[&str]); 3] = [
        (ENTRY, "kvm_entry", &["vcpu_id"]),
        (EXIT, "kvm_exit", &["exit_reason"]),
        (MSR, "kvm_msr", &["write", "ecx", "data"]),
    ];
    let sched: [(u16, &str, &[&str]); 2] =
        [(SWITCH, "sched_switch", &["prev_pid", "next_pid"]), (WAKE, "sched_waking", &["pid"])];
    let msr: [(u16, &str, &[&str]); 1] = [(WRITE_MSR, "write_msr", &["msr", "val"])];
    Metadata {
        event_formats: [
            ("kvm".to_owned(), kvm.iter().map(format).collect()),
            ("sched".to_owned(), sched.iter().map(format).collect()),
            ("msr".to_owned(), msr.iter().map(format).collect()),
        ]
        .into(),
        ..Metadata::default()
    }
}

/// Pages of a lane, ten events each, and which of them say that events were lost in front.
fn pages(events: &[GuestEvent], lost: &[usize]) -> Vec<u8> {
    let mut out = Vec::new();
    for (at, chunk) in events.chunks(10).enumerate() {
        let mut data = Vec::new();
        let mut last = chunk[0].time;
        for event in chunk {
            let delta = u32::try_from(event.time - last).unwrap();
            let words = u32::try_from(event.data.len() / 4).unwrap();
            data.extend((words | delta << 5).to_le_bytes());
            data.extend(&event.data);
            last = event.time;
        }
        let missed = if lost.contains(&at) { 1 << 31 } else { 0 };
        let mut page = [chunk[0].time.to_le_bytes(), (data.len() as u64 | missed).to_le_bytes()].concat();
        page.extend(data);
        page.resize(4096, 0);
        out.extend(page);
    }
    out
}

fn file(lanes: &[Vec<u8>], options: &[TraceOption], notes: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file.dat");
    let file = fs::OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    let cpus: Vec<Cpu> = (0..u32::try_from(lanes.len()).unwrap()).map(Cpu).collect();
    let writer = Writer::create(file, &formats(), "local [x86-tsc]", 4096, &cpus).unwrap();
    for (area, pages) in writer.areas().iter().zip(lanes) {
        writer.file().write_all_at(pages, area.offset).unwrap();
    }
    let filled: Vec<_> = cpus.iter().zip(lanes).map(|(cpu, pages)| (*cpu, pages.len() as u64)).collect();
    writer.finish(&filled, b"", options, notes).unwrap();
    fs::read(path).unwrap()
}

/// Cycles are nanoseconds here.
const SCALE: TraceOption = TraceOption::Tsc2Nsec { mult: 1, shift: 0 };

/// A recording that can be spoiled.
struct Pair {
    host: [Vec<GuestEvent>; 2],
    guest: [Vec<GuestEvent>; 2],
    threads: Option<[u32; 2]>,
    offset: i64,
    notes: String,
    /// Pages of the host's first lane that say that events were lost before them.
    lost: Vec<usize>,
    /// The guest's pages have the host's times, but for these.
    uncertainties: Option<Vec<Uncertainty>>,
}

/// vCPU 0 runs from 100 to 600 and vCPU 1 from 500 to 900 of every 1000, each time on another CPU of the host.
fn pair() -> Pair {
    let mut host = [Vec::new(), Vec::new()];
    let mut guest = [Vec::new(), Vec::new()];
    for round in 0..ROUNDS {
        let base = 10_000 + round * 1000;
        let turn = usize::from(round % 2 == 1);
        for (vcpu, [from, to]) in [[100, 600], [500, 900]].into_iter().enumerate() {
            let lane = &mut host[vcpu ^ turn];
            lane.push(event(base + from - 50, SWITCH, 1, &[1, THREADS[vcpu].into()]));
            lane.push(event(base + from, ENTRY, THREADS[vcpu], &[vcpu as u64]));
            lane.push(event(base + to, EXIT, THREADS[vcpu], &[7]));
            lane.push(event(base + to + 50, SWITCH, THREADS[vcpu], &[THREADS[vcpu].into(), 1]));
            let own = |time: u64| time.checked_add_signed(-OFFSET).unwrap();
            guest[vcpu].extend([from + 1, from + 200, to - 1].map(|time| event(own(base + time), WAKE, 9, &[1])));
        }
    }
    host.iter_mut().for_each(|lane| lane.sort_by_key(|event| event.time));
    Pair {
        host,
        guest,
        threads: Some(THREADS),
        offset: OFFSET,
        notes: String::new(),
        lost: Vec::new(),
        uncertainties: None,
    }
}

/// What a file with the host's times says of its clock.
fn rewritten(uncertainties: Vec<Uncertainty>) -> TraceOption {
    let at = HostRange::at(HostTsc(0));
    let seen =
        [0, 1].map(|cpu| Seen { cpu: Cpu(cpu), offset: 0, ratio: 0, protected: false, at, since: Since::Before });
    let table = Table::build(HostTsc(0), Isa::Svm, seen, &[Cpu(0), Cpu(1)]).unwrap();
    TraceOption::Segments(Segments { shown: Shown::Rewritten, table, uncertainties })
}

impl Pair {
    fn files(&self) -> (Vec<u8>, Vec<u8>) {
        let vcpus = |threads: [u32; 2]| vec![(Cpu(0), threads[0]), (Cpu(1), threads[1])];
        let link = self.threads.map(|threads| TraceOption::Guest {
            name: "guest1".into(),
            trace_id: 2,
            vcpus: vcpus(threads),
        });
        let options: Vec<_> = [TraceOption::TraceId(1), SCALE].into_iter().chain(link).collect();
        let host = file(&[pages(&self.host[0], &self.lost), pages(&self.host[1], &[])], &options, "");
        let samples = || [0, 1].map(|time| ShiftSample { time, offset: self.offset }).to_vec();
        let shift = TimeShift { peer: 1, interpolate: false, cpus: vec![samples(), samples()] };
        let times = |lane: &Vec<GuestEvent>| {
            let moved =
                |event: &GuestEvent| GuestEvent { time: event.time.wrapping_add_signed(self.offset), ..event.clone() };
            if self.uncertainties.is_some() { lane.iter().map(moved).collect() } else { lane.clone() }
        };
        let clock = self.uncertainties.clone().map_or(TraceOption::TimeShift(shift), rewritten);
        let options = [TraceOption::TraceId(2), SCALE, clock];
        let guest = file(&self.guest.each_ref().map(|lane| pages(&times(lane), &[])), &options, &self.notes);
        (host, guest)
    }

    fn check(&self) -> GuestReport {
        let (host, guest) = self.files();
        let (host, guest) = (Reader::open(host.as_slice()).unwrap(), Reader::open(guest.as_slice()).unwrap());
        let guests = [GuestFile { file: "trace-guest1.dat".into(), reader: &guest }];
        let report = check(&host, &guests).unwrap().guests.remove(0);
        let counts = report.counts;
        assert_eq!(counts.events, counts.inside + counts.within_bound + counts.outside + counts.uncovered);
        report
    }

    fn without(mut self, ids: &[u16]) -> Self {
        let is_kept = |event: &GuestEvent| !ids.contains(&u16::from_le_bytes([event.data[0], event.data[1]]));
        self.host.iter_mut().for_each(|lane| lane.retain(is_kept));
        self
    }
}

fn line(report: &GuestReport) -> String {
    let text = Report { guests: vec![report.clone()] }.text(false);
    text.lines().next().unwrap().to_owned()
}

#[test]
fn guest_with_the_right_clock_is_inside_with_every_event() {
    let report = pair().check();
    assert_eq!((report.verdict, report.against), (ClockVerdict::Exact, Against::Runs));
    assert_eq!((report.counts.events, report.counts.inside, report.counts.worst), (240, 240, 0));
    assert_eq!(report.vcpus.iter().map(|vcpu| vcpu.windows).collect::<Vec<_>>(), [ROUNDS, ROUNDS]);
    let expected = "guest1: 240 of 240 events inside their vCPU's run windows (covered 100 %), worst 0 ns: clock exact";
    assert_eq!(line(&report), expected);
}

#[test]
fn clock_that_is_off_by_half_a_round_is_wrong() {
    let report = Pair { offset: OFFSET + 450, ..pair() }.check();
    assert_eq!(report.verdict, ClockVerdict::Wrong);
    // vCPU 0: 551 inside, 750 and 1049 outside; vCPU 1: 951 and 1150 and 1349.
    assert!(report.counts.outside > 190 && report.counts.worst == 250, "{:?}", report.counts);
    assert_eq!(report.farthest.len(), 10);
    assert_eq!((report.farthest[0].distance, report.farthest[0].event.as_str()), (250, "sched:sched_waking"));
    assert!(line(&report).ends_with("worst 250 ns: clock wrong"), "{}", line(&report));
}

#[test]
fn swapped_vcpus_are_found() {
    let report = Pair { threads: Some([THREADS[1], THREADS[0]]), ..pair() }.check();
    assert_eq!(report.verdict, ClockVerdict::Wrong);
    assert_eq!(report.counts.worst, 201);
}

#[test]
fn event_outside_by_less_than_the_stated_bound_is_said_to_be_so() {
    let notes = "{\"clock\":{\"bound_ns\":80}}".to_owned();
    let report = Pair { offset: OFFSET + 60, notes, ..pair() }.check();
    assert_eq!((report.verdict, report.bound), (ClockVerdict::WithinBound, Some(80)));
    assert_eq!((report.counts.outside, report.counts.worst), (0, 59));
    assert!(report.counts.within_bound > 70);
    let report = Pair { offset: OFFSET + 60, ..pair() }.check();
    assert_eq!(report.verdict, ClockVerdict::Wrong);
}

#[test]
fn only_events_that_the_file_marks_may_be_outside_and_by_no_more_than_it_says() {
    let notes = "{\"clock\":{\"bound_ns\":80}}".to_owned();
    let uncertainty =
        |cpu, error| Uncertainty { cpu: Cpu(cpu), events: 120, first: HostTsc(0), last: HostTsc(1 << 40), error };
    let check = |uncertainties| {
        Pair { offset: OFFSET + 60, notes: notes.clone(), uncertainties: Some(uncertainties), ..pair() }.check()
    };
    let all = check(vec![uncertainty(0, 58), uncertainty(1, 80)]);
    assert_eq!((all.verdict, all.counts.outside), (ClockVerdict::WithinBound, 0));
    assert!(all.counts.within_bound > 70 && line(&all).contains("by no more than the file says"), "{}", line(&all));
    let one = check(vec![uncertainty(0, 80)]);
    assert_eq!(one.verdict, ClockVerdict::Wrong, "the others are said to be exact, whatever the bound of all");
    assert!(one.vcpus[0].counts.outside == 0 && one.vcpus[1].counts.outside > 35);
    let tight = check(vec![uncertainty(0, 57), uncertainty(1, 57)]);
    assert_eq!(tight.verdict, ClockVerdict::Wrong);
}

#[test]
fn lost_host_events_are_not_covered_and_nothing_is_called_outside() {
    let mut pair = pair();
    let pages = pair.host[0].len() / 10;
    pair.host[0].drain(50..70);
    let report = pair.check();
    assert!(
        report.counts.uncovered > 0 && report.counts.inside < 240,
        "missing boundaries are seen: {:?}",
        report.counts
    );
    pair.lost = vec![5];
    let report = pair.check();
    assert_eq!(report.verdict, ClockVerdict::Exact, "{:?}", report.counts);
    assert!(report.counts.uncovered > 0 && pages > 10);
    assert!(report.notes.iter().any(|note| note.contains("lost events in 1 places")), "{:?}", report.notes);
    // One boundary of each kind is gone: the other lane still says when the vCPUs ran.
    assert!(report.counts.inside > 180);
}

#[test]
fn without_kvm_entry_the_threads_time_on_a_cpu_is_a_weaker_check() {
    let weak = || pair().without(&[ENTRY, EXIT]);
    let report = weak().check();
    assert_eq!((report.verdict, report.against), (ClockVerdict::Exact, Against::OnCpu));
    assert!(line(&report).contains("weaker check"), "{}", line(&report));
    let report = Pair { offset: OFFSET + 45, ..weak() }.check();
    assert_eq!(report.verdict, ClockVerdict::Exact, "windows are wider");
    let report = Pair { offset: OFFSET + 450, ..weak() }.check();
    assert_eq!(report.verdict, ClockVerdict::Wrong);
}

#[test]
fn host_that_saw_neither_leaves_nothing_to_check_against() {
    let report = pair().without(&[ENTRY, EXIT, SWITCH]).check();
    assert_eq!(
        (report.verdict, report.against, report.counts.uncovered),
        (ClockVerdict::Unchecked, Against::Nothing, 240)
    );
    assert!(line(&report).contains("nothing to check against"), "{}", line(&report));
}

#[test]
fn only_guest_of_a_host_that_names_none_is_found_by_its_vcpu_ids() {
    let report = Pair { threads: None, ..pair() }.check();
    assert_eq!((report.verdict, report.counts.inside), (ClockVerdict::Exact, 240));
    assert!(report.notes.iter().any(|note| note.contains("assumed")), "{:?}", report.notes);
    assert_eq!(report.name, "trace-guest1.dat");
}

/// The timer is set in every round: the vCPU leaves at 600, the host writes it down at 610.
fn with_timers() -> Pair {
    let mut pair = pair();
    for round in 0..ROUNDS {
        let base = 10_000 + round * 1000;
        let lane = usize::from(round % 2 == 1);
        let deadline = 1_000_000 + round;
        pair.host[lane].push(event(base + 610, MSR, THREADS[0], &[1, 0x6e0, deadline]));
        let back = (base + 1000 + 101).checked_add_signed(-OFFSET).unwrap();
        pair.guest[0].push(event(back, WRITE_MSR, 9, &[0x6e0, deadline]));
    }
    pair.host.iter_mut().chain(&mut pair.guest).for_each(|lane| lane.sort_by_key(|event| event.time));
    pair
}

#[test]
fn timer_settings_are_paired_by_their_deadline() {
    let report = with_timers().check();
    let pairs = report.pairs[0];
    assert_eq!((pairs.rule, pairs.in_order, pairs.out_of_order, pairs.distance_median), (Rule::Timer, ROUNDS, 0, 491));
    assert_eq!(report.verdict, ClockVerdict::Exact);
    // One whole round early, all events are inside windows again. The timers tell.
    let early = Pair { offset: OFFSET - 1000, ..with_timers() }.check();
    assert_eq!((early.counts.outside, early.pairs[0].out_of_order, early.pairs[0].worst), (0, ROUNDS, 509));
    assert_eq!(early.verdict, ClockVerdict::Wrong);
}

#[test]
fn several_guests_are_worth_their_worst_verdict() {
    let good = pair().check();
    let none = pair().without(&[ENTRY, EXIT, SWITCH]).check();
    let wrong = Pair { offset: OFFSET + 450, ..pair() }.check();
    let verdict =
        |guests: &[&GuestReport]| Report { guests: guests.iter().map(|guest| (*guest).clone()).collect() }.verdict();
    assert_eq!(verdict(&[&good, &good]), ClockVerdict::Exact);
    assert_eq!(verdict(&[&good, &none]), ClockVerdict::Unchecked);
    assert_eq!(verdict(&[&none, &wrong, &good]), ClockVerdict::Wrong);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The offset moved by any amount: each event lies where the plan of the rounds says.
    #[test]
    fn every_shift_is_counted_as_the_rounds_say(shift in -3000i64..3000) {
        let report = Pair { offset: OFFSET + shift, ..pair() }.check();
        let mut expected = report::EventCounts::default();
        for (from, to) in [(100i64, 600i64), (500, 900)] {
            for round in 0..i64::try_from(ROUNDS).unwrap() {
                for time in [from + 1, from + 200, to - 1].map(|time| round * 1000 + time + shift) {
                    let last = i64::try_from(ROUNDS - 1).unwrap() * 1000;
                    let inside = time.rem_euclid(1000);
                    let place = match inside {
                        _ if time < from || time > last + to => crate::analysis::windows::Coverage::Uncovered,
                        _ if (from..=to).contains(&inside) => crate::analysis::windows::Coverage::Inside,
                        _ => {
                            let after = (inside - to).rem_euclid(1000);
                            let before = (from - inside).rem_euclid(1000);
                            crate::analysis::windows::Coverage::Outside(after.min(before).unsigned_abs())
                        }
                    };
                    expected.add(place, 0);
                }
            }
        }
        prop_assert_eq!(report.counts, expected);
    }

    #[test]
    fn files_with_changed_bytes_give_an_answer(
        in_host: bool, changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
    ) {
        use std::sync::OnceLock;
        static FILES: OnceLock<(Vec<u8>, Vec<u8>)> = OnceLock::new();
        let (mut host, mut guest) = FILES.get_or_init(|| with_timers().files()).clone();
        let spoiled = if in_host { &mut host } else { &mut guest };
        let telling: Vec<usize> = (0..spoiled.len()).filter(|at| spoiled[*at] != 0).collect();
        for (at, byte) in changes {
            spoiled[telling[at.index(telling.len())]] = byte;
        }
        if let (Ok(host), Ok(guest)) = (Reader::open(host.as_slice()), Reader::open(guest.as_slice())) {
            let guests = [GuestFile { file: "any".into(), reader: &guest }];
            if let Ok(report) = check(&host, &guests) {
                prop_assert!(!report.text(true).is_empty());
            }
        }
    }
}
