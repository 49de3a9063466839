//! Against this machine's kernel. Without privilege or tracefs they say so and test nothing.

use std::{
    collections::BTreeSet,
    os::unix::fs::FileExt,
    sync::{Mutex, MutexGuard},
    thread::{sleep, spawn, yield_now},
    time::{Duration, Instant},
};

use nix::mount::{MsFlags, mount, umount};
use vtrace_common::{ids::Cpu, page, wire::agent::EventRequest};

use super::*;
use crate::tracefs::stats::Stats;

/// One recording at a time: descriptors of this process are counted.
static ALONE: Mutex<()> = Mutex::new(());

/// Rounds of load, of a tenth of a second each, after which there are some hundred KiB of events on any machine.
const ROUNDS_MAX: u32 = 600;

const SETTINGS: PumpSettings = PumpSettings { page_bytes: 4096, batch_pages: 0, priority: None };

fn alone() -> Option<MutexGuard<'static, ()>> {
    let can = nix::unistd::geteuid().is_root() && Tracefs::find_or_mount().is_ok();
    if !can {
        println!("skipped: tracefs is not writable here");
        return None;
    }
    Some(ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
}

fn arm(session: u64, events: &[&str], buffer_kb: u32) -> Arm {
    let events = events.iter().map(|pattern| EventRequest::from(*pattern)).collect();
    Arm { session, clock: "x86-tsc".into(), events, buffer_kb, kallsyms: false, ..Arm::default() }
}

fn areas(recorder: &HostRecorder, bytes_max: u64) -> Vec<Area> {
    let lanes = recorder.armed().lanes;
    let offset = |at: usize| 1 << 20 | (u64::try_from(at).unwrap() << 32);
    lanes
        .iter()
        .enumerate()
        .map(|(at, cpu)| Area { cpu: *cpu, offset: offset(at), bytes_max, begins_again: false })
        .collect()
}

/// Switches back and forth on every CPU for a while.
fn load(time: Duration) {
    let busy = move || {
        let begun = Instant::now();
        while begun.elapsed() < time {
            (0..100).for_each(|_| yield_now());
            sleep(Duration::from_micros(50));
        }
    };
    let threads: Vec<_> = (0..4).map(|_| spawn(busy)).collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// Walks the events of a page. Data events are counted, clock records and padding are not.
/// Source: kernel/trace/ring_buffer.c, `rb_event_length`.
fn count_events(page: &[u8]) -> u64 {
    let header = page::Header::parse(page, page.len()).unwrap();
    let end = page::HEADER_BYTES + usize::try_from(header.data_bytes).unwrap();
    let word = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().unwrap());
    let (mut at, mut events) = (page::HEADER_BYTES, 0);
    while at < end {
        let type_len = word(at) & 0x1f;
        let extra = |at: usize| usize::try_from(word(at + 4)).unwrap();
        at += match type_len {
            0 => 4 + extra(at),
            29 if word(at) >> 5 == 0 => end - at,
            29 => 4 + extra(at),
            30 | 31 => 8,
            words => 4 + 4 * usize::try_from(words).unwrap(),
        };
        events += u64::from(type_len < 29);
    }
    assert_eq!(at, end, "events end where the page says");
    events
}

/// Checks that every page of a lane parses, in the order of time, and counts its events and gaps.
fn walk(file: &File, area: Area, report: &LaneReport, page_bytes: usize) -> (u64, u64) {
    let mut page = vec![0; page_bytes];
    let (mut events, mut gaps, mut last) = (0, 0, 0);
    for number in 0..report.ledger.pages_out {
        file.read_exact_at(&mut page, area.offset + number * u64::try_from(page_bytes).unwrap()).unwrap();
        let header = page::Header::parse(&page, page_bytes).unwrap();
        assert!(header.time >= last, "{}: page {number} is younger than the one before", area.cpu);
        last = header.time;
        events += count_events(&page);
        gaps += u64::from(header.missed);
    }
    (events, gaps)
}

/// Numbers and targets of descriptors as a recording has them, those of other tests that run just now included.
fn open_descriptors() -> BTreeSet<(String, String)> {
    let number = |entry: &std::fs::DirEntry| entry.file_name().display().to_string();
    let target = |entry: std::fs::DirEntry| Some((number(&entry), std::fs::read_link(entry.path()).ok()?));
    let targets = std::fs::read_dir("/proc/self/fd").unwrap().flatten().filter_map(target);
    let targets = targets.map(|(number, path)| (number, path.display().to_string()));
    targets.filter(|(_, path)| ["trac", "pipe", "eventfd"].iter().any(|kind| path.contains(kind))).collect()
}

/// What was left open stays open; what others have opened meanwhile comes and goes.
fn assert_none_left_open(before: &BTreeSet<(String, String)>) {
    let mut left: BTreeSet<_> = open_descriptors().difference(before).cloned().collect();
    let begun = Instant::now();
    while !left.is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(60), "left open: {left:?}");
        sleep(Duration::from_millis(20));
        let now = open_descriptors();
        left.retain(|descriptor| now.contains(descriptor));
    }
}

#[test]
fn lanes_that_begin_again_keep_their_newest_pages_with_either_page_mover() {
    let Some(_alone) = alone() else { return };
    for folder in [env!("CARGO_MANIFEST_DIR"), "/dev/shm"] {
        let mut recorder = HostRecorder::arm(&arm(0xa6a1, &["sched", "irq", "syscalls"], 0), true).unwrap();
        let bytes_max = 256 << 10;
        let mut areas = areas(&recorder, bytes_max);
        areas.iter_mut().for_each(|area| area.begins_again = true);
        let file = tempfile::tempfile_in(folder).unwrap();
        recorder.attach(file.try_clone().unwrap(), &areas, None).unwrap();
        recorder.start("vtrace start").unwrap();
        let pages = bytes_max / 4096;
        // However little of the machine is left for us: until every lane has begun again twice.
        let has_room = |recorder: &HostRecorder| recorder.ledger().iter().any(|lane| lane.ledger.pages_in <= 2 * pages);
        let rounds = (0..ROUNDS_MAX).take_while(|_| has_room(&recorder));
        rounds.for_each(|_| load(Duration::from_millis(100)));
        let report = recorder.stop().unwrap();
        drop(recorder);
        for (area, lane) in areas.iter().zip(&report.lanes) {
            assert!(
                lane.ledger.pages_out > 2 * pages && lane.ledger.pages_lost == 0,
                "{}: {} pages",
                lane.cpu,
                lane.ledger.pages_out
            );
            let (mut page, mut last) = ([0; 4096], 0);
            for number in lane.ledger.pages_out - pages..lane.ledger.pages_out {
                file.read_exact_at(&mut page, area.place(number * 4096)).unwrap();
                let header = page::Header::parse(&page, 4096).unwrap();
                assert!(header.time > last, "{}: page {number} is younger than the one before", lane.cpu);
                last = header.time;
                count_events(&page);
            }
        }
    }
}

#[test]
fn every_event_the_kernel_counted_is_in_the_file() {
    let Some(_alone) = alone() else { return };
    let before = open_descriptors();
    let mut recorder = HostRecorder::arm(&arm(0x10ad, &["sched", "irq"], 0), true).unwrap();
    let path = recorder.instance.path().to_owned();
    let (file, areas) = (tempfile::tempfile().unwrap(), areas(&recorder, 1 << 30));
    recorder.attach(file.try_clone().unwrap(), &areas, None).unwrap();
    let (tsc_before, tsc_after) = recorder.start("vtrace start").unwrap();
    // However little of the machine is left for us.
    let is_little =
        |recorder: &HostRecorder| recorder.ledger().iter().map(|lane| lane.ledger.pages_in).sum::<u64>() < 400;
    load(Duration::from_secs(1));
    (0..ROUNDS_MAX).take_while(|_| is_little(&recorder)).for_each(|_| load(Duration::from_millis(100)));
    let report = recorder.stop().unwrap();
    assert!(tsc_before < tsc_after && tsc_after < report.stopped);
    let page_bytes = usize::try_from(recorder.armed().page_bytes).unwrap();
    let mut total = 0;
    for (area, lane) in areas.iter().zip(&report.lanes) {
        let stats = Stats::parse(&lane.stats_after).unwrap();
        let (events, gaps) = walk(&file, *area, lane, page_bytes);
        println!("{}: {events} events in {} pages, {gaps} gaps, {stats:?}", lane.cpu, lane.ledger.pages_out);
        assert_eq!((events, stats.entries), (stats.read_events, 0));
        assert_eq!((lane.ledger.pages_lost, gaps > 0), (0, stats.lost() > 0));
        assert_eq!(lane.ledger.bytes_out, lane.ledger.pages_out * 4096);
        total += events;
    }
    println!("{total} events, {:?}", report.pump);
    assert!(total > 10_000, "the load was recorded");
    let mut lines = String::new();
    recorder.describe_end(&mut |piece| lines.push_str(&String::from_utf8_lossy(&piece.bytes))).unwrap();
    assert!(lines.contains("vtrace"));
    drop(recorder);
    assert!(!path.exists());
    assert_none_left_open(&before);
}

/// The tap is left alone until the kernel has overwritten unread pages; then everything is moved.
#[test]
fn page_after_a_gap_is_read_and_says_how_much_is_missing() {
    let Some(_alone) = alone() else { return };
    let tracefs = Tracefs::find_or_mount().unwrap();
    let name = format!("{INSTANCE_PREFIX}{}-gap", std::process::id());
    let instance = tracefs.arm(&name, &arm(8, &["sched"], 64)).unwrap();
    let cpus = instance.cpus().to_vec();
    let overrun = |cpu: &Cpu| Stats::parse(&instance.stats(*cpu)).unwrap().overrun;
    instance.set_tracing(true).unwrap();
    // However slow the machine is: until every CPU has overwritten something.
    let rounds = (0..ROUNDS_MAX).take_while(|_| cpus.iter().any(|cpu| overrun(cpu) == 0));
    rounds.for_each(|_| load(Duration::from_millis(100)));
    instance.set_tracing(false).unwrap();
    for cpu in cpus {
        let (file, area) =
            (tempfile::tempfile().unwrap(), Area { cpu, offset: 0, bytes_max: 1 << 20, begins_again: false });
        let pump =
            Pump::spawn(vec![instance.tap(cpu).unwrap()], vec![area], file.try_clone().unwrap(), SETTINGS).unwrap();
        let lane = report(&pump.stop().lanes[0], (String::new(), instance.stats(cpu)));
        let stats = Stats::parse(&lane.stats_after).unwrap();
        let mut page = [0; 4096];
        file.read_exact_at(&mut page, 0).unwrap();
        let header = page::Header::parse(&page, 4096).unwrap();
        let end = page::HEADER_BYTES + usize::try_from(header.data_bytes).unwrap();
        assert!(stats.overrun > 0 && header.missed, "{cpu}: {header:?} {stats:?}");
        if header.missed_stored {
            assert_eq!(u64::from_le_bytes(page[end..end + 8].try_into().unwrap()), stats.overrun);
        }
        assert_eq!(walk(&file, area, &lane, 4096), (stats.read_events, 1));
    }
}

/// The numbers of the markers in a lane, in the order of its pages.
fn markers(file: &File, area: Area, pages: u64) -> Vec<u32> {
    let mut bytes = vec![0; usize::try_from(pages).unwrap() * 4096];
    file.read_exact_at(&mut bytes, area.offset).unwrap();
    let found = bytes.windows(14).filter(|words| words.starts_with(b"number"));
    found.map(|words| std::str::from_utf8(&words[6..]).unwrap().parse().unwrap()).collect()
}

#[test]
fn both_page_movers_bring_the_same_markers_in_the_same_order() {
    const COUNT: u32 = 40_000;
    let Some(_alone) = alone() else { return };
    let tracefs = Tracefs::find_or_mount().unwrap();
    let batch_of = |instance: &Instance, direct: bool| if direct { instance.pages_promised() } else { 0 };
    for direct in [true, false] {
        let name = format!("{INSTANCE_PREFIX}{}-movers", std::process::id());
        let instance = tracefs.arm(&name, &arm(9, &[], 4096)).unwrap();
        let cpus = instance.cpus().to_vec();
        let area = |(at, cpu): (usize, &Cpu)| Area {
            cpu: *cpu,
            offset: u64::try_from(at).unwrap() << 32,
            bytes_max: 1 << 30,
            begins_again: false,
        };
        let areas: Vec<Area> = cpus.iter().enumerate().map(area).collect();
        let taps = cpus.iter().map(|cpu| instance.tap(*cpu).unwrap()).collect();
        let (file, batch_pages) = (tempfile::tempfile().unwrap(), batch_of(&instance, direct));
        let settings = PumpSettings { batch_pages, ..SETTINGS };
        let pump = Pump::spawn(taps, areas.clone(), file.try_clone().unwrap(), settings).unwrap();
        instance.set_tracing(true).unwrap();
        (0..COUNT).for_each(|number| instance.mark(&format!("number{number:08}")).unwrap());
        instance.set_tracing(false).unwrap();
        let ends = pump.stop().lanes;
        let lanes: Vec<Vec<u32>> =
            areas.iter().zip(&ends).map(|(area, lane)| markers(&file, *area, lane.ledger.pages_out)).collect();
        assert!(ends.iter().all(|lane| (lane.ledger.pages_lost, lane.end) == (0, None)), "{ends:?}");
        assert!(lanes.iter().all(|lane| lane.is_sorted()), "in order on each CPU");
        let mut all = lanes.concat();
        all.sort_unstable();
        assert!(all.iter().copied().eq(0..COUNT), "each once: {} (batches of {batch_pages})", all.len());
    }
}

#[test]
fn large_pages_reach_the_file_whole() {
    let Some(_alone) = alone() else { return };
    let arm = Arm { subbuf_kb: 64, ..arm(10, &["sched"], 2048) };
    let mut recorder = match HostRecorder::arm(&arm, true) {
        Err(failure) if failure.kind == FailureKind::NoSuchPageSize => return println!("skipped: {}", failure.detail),
        recorder => recorder.unwrap(),
    };
    assert_eq!(recorder.armed().page_bytes, 64 << 10);
    let (file, areas) = (tempfile::tempfile().unwrap(), areas(&recorder, 1 << 30));
    recorder.attach(file.try_clone().unwrap(), &areas, None).unwrap();
    recorder.start("start").unwrap();
    load(Duration::from_millis(500));
    let report = recorder.stop().unwrap();
    for (area, lane) in areas.iter().zip(&report.lanes) {
        let stats = Stats::parse(&lane.stats_after).unwrap();
        let (events, gaps) = walk(&file, *area, lane, 64 << 10);
        assert_eq!((events, gaps > 0), (stats.read_events, stats.lost() > 0));
        assert!(lane.ledger.pages_out > 0 && lane.ledger.bytes_out == lane.ledger.pages_out << 16);
    }
}

#[test]
fn priority_that_the_kernel_refuses_is_named_and_nothing_runs() {
    let Some(_alone) = alone() else { return };
    let mut recorder = HostRecorder::arm(&arm(11, &[], 0), true).unwrap();
    let areas = areas(&recorder, 1 << 20);
    let failure = recorder.attach(tempfile::tempfile().unwrap(), &areas, Some(100)).unwrap_err();
    assert_eq!(failure.kind, FailureKind::Kernel);
    assert!(failure.detail.starts_with("real-time priority: sched_setscheduler: "), "{}", failure.detail);
    assert_eq!(recorder.start("start").unwrap_err().kind, FailureKind::State);
}

#[test]
fn disk_that_fills_up_keeps_every_page_before_the_first_that_did_not_fit() {
    let Some(_alone) = alone() else { return };
    let directory = tempfile::tempdir().unwrap();
    mount(Some("tmpfs"), directory.path(), Some("tmpfs"), MsFlags::empty(), Some("size=1M")).unwrap();
    let file = File::create_new(directory.path().join("trace")).unwrap();
    let tracefs = Tracefs::find_or_mount().unwrap();
    let instance = tracefs.arm(&format!("{INSTANCE_PREFIX}{}-full", std::process::id()), &arm(12, &[], 4096)).unwrap();
    let areas: Vec<Area> = instance
        .cpus()
        .iter()
        .map(|cpu| Area { cpu: *cpu, offset: u64::from(cpu.0) << 30, bytes_max: 1 << 30, begins_again: false })
        .collect();
    let taps = areas.iter().map(|area| instance.tap(area.cpu).unwrap()).collect();
    let settings = PumpSettings { batch_pages: instance.pages_promised(), ..SETTINGS };
    let pump = Pump::spawn(taps, areas.clone(), file.try_clone().unwrap(), settings).unwrap();
    instance.set_tracing(true).unwrap();
    (0..4000).for_each(|_| instance.mark(&"m".repeat(1000)).unwrap());
    instance.set_tracing(false).unwrap();
    let ends = pump.stop().lanes;
    let pages = |count: fn(&Ledger) -> u64| ends.iter().map(|lane| count(&lane.ledger)).sum::<u64>();
    println!("{ends:?}");
    assert!((1..=256).contains(&pages(|ledger| ledger.pages_out)), "what fits into 1 MiB");
    assert!(pages(|ledger| ledger.pages_lost) > 0 && ends.iter().any(|lane| matches!(lane.end, Some(TapEnd::File(_)))));
    assert!(ends.iter().all(|lane| lane.ledger.pages_in == lane.ledger.pages_out + lane.ledger.pages_lost));
    drop(file);
    umount(directory.path()).unwrap();
}

#[test]
fn marker_is_the_only_event_of_a_trace_without_events() {
    let Some(_alone) = alone() else { return };
    let mut recorder = HostRecorder::arm(&arm(2, &[], 0), true).unwrap();
    let (file, areas) = (tempfile::tempfile().unwrap(), areas(&recorder, 1 << 20));
    recorder.attach(file.try_clone().unwrap(), &areas, None).unwrap();
    let (before, after) = recorder.start("first words").unwrap();
    let report = recorder.stop().unwrap();
    assert_eq!(report.lanes.iter().map(|lane| lane.ledger.pages_out).sum::<u64>(), 1);
    let at = report.lanes.iter().position(|lane| lane.ledger.pages_out == 1).unwrap();
    let mut page = [0; 4096];
    file.read_exact_at(&mut page, areas[at].offset).unwrap();
    assert!(count_events(&page) >= 1, "markers of other programs may be there, too");
    assert!(page.windows(11).any(|words| words == b"first words"));
    let time = page::Header::parse(&page, 4096).unwrap().time;
    assert!((before.0..after.0).contains(&time), "x86-tsc is what we read");
}

#[test]
fn full_area_ends_its_lane_and_the_rest_is_counted_by_the_kernel() {
    let Some(_alone) = alone() else { return };
    let mut recorder = HostRecorder::arm(&arm(3, &["sched"], 64), true).unwrap();
    let (file, areas) = (tempfile::tempfile().unwrap(), areas(&recorder, 3 * 4096 + 100));
    recorder.attach(file.try_clone().unwrap(), &areas, None).unwrap();
    recorder.start("start").unwrap();
    load(Duration::from_millis(300));
    let report = recorder.stop().unwrap();
    for (area, lane) in areas.iter().zip(&report.lanes) {
        let stats = Stats::parse(&lane.stats_after).unwrap();
        let (events, _) = walk(&file, *area, lane, 4096);
        assert_eq!((lane.ledger.pages_in, lane.ledger.pages_out, lane.ledger.pages_lost), (3, 3, 0));
        assert_eq!(events, stats.read_events);
        assert!(stats.entries + stats.overrun > 0);
        assert!(lane.trouble.contains("is full"), "{}", lane.trouble);
    }
    assert_eq!(report.ends[0], Some(TapEnd::AreaFull { bytes_max: 3 * 4096 + 100 }));
}

#[test]
fn idle_pump_sleeps() {
    let Some(_alone) = alone() else { return };
    let mut recorder = HostRecorder::arm(&arm(4, &[], 0), true).unwrap();
    let areas = areas(&recorder, 1 << 20);
    recorder.attach(tempfile::tempfile().unwrap(), &areas, None).unwrap();
    recorder.start("start").unwrap();
    sleep(Duration::from_millis(300));
    let report = recorder.stop().unwrap();
    assert_eq!((report.pump.wakeups, report.pump.wakeups_idle), (0, 0));
}

/// With less than ten pages a CPU the kernel says "readable" all the time at 10 %.
#[test]
fn buffer_of_a_few_pages_does_not_make_the_pump_spin() {
    let Some(_alone) = alone() else { return };
    let mut recorder = HostRecorder::arm(&arm(7, &[], 16), true).unwrap();
    let areas = areas(&recorder, 1 << 20);
    recorder.attach(tempfile::tempfile().unwrap(), &areas, None).unwrap();
    recorder.start("start").unwrap();
    sleep(Duration::from_millis(300));
    let report = recorder.stop().unwrap();
    println!("{:?}", report.pump);
    assert!(report.pump.wakeups_idle <= 31, "one in 10 ms at most: {:?}", report.pump);
    assert_eq!(report.lanes.iter().map(|lane| lane.ledger.pages_out).sum::<u64>(), 1);
}

#[test]
fn dropped_recorder_leaves_nothing_even_while_tracing() {
    let Some(_alone) = alone() else { return };
    let before = open_descriptors();
    let mut recorder = HostRecorder::arm(&arm(5, &["sched"], 0), true).unwrap();
    let (path, areas) = (recorder.instance.path().to_owned(), areas(&recorder, 1 << 20));
    recorder.attach(tempfile::tempfile().unwrap(), &areas, None).unwrap();
    recorder.start("start").unwrap();
    drop(recorder);
    assert!(!path.exists());
    assert_none_left_open(&before);
}

#[test]
fn calls_out_of_order_are_refused() {
    let Some(_alone) = alone() else { return };
    let mut recorder = HostRecorder::arm(&arm(6, &[], 0), true).unwrap();
    assert_eq!(recorder.start("start").unwrap_err().kind, FailureKind::State);
    assert_eq!(recorder.stop().unwrap_err().kind, FailureKind::State);
    let areas = areas(&recorder, 1 << 20);
    recorder.attach(tempfile::tempfile().unwrap(), &areas, None).unwrap();
    assert_eq!(recorder.attach(tempfile::tempfile().unwrap(), &areas, None).unwrap_err().kind, FailureKind::State);
}

#[test]
fn settings_that_are_changed_while_recording_are_reported() {
    let Some(_alone) = alone() else { return };
    let mut recorder = HostRecorder::arm(&arm(0x5e77, &["sched:sched_switch"], 0), true).unwrap();
    let file = tempfile::tempfile().unwrap();
    let areas = areas(&recorder, 1 << 20);
    recorder.attach(file, &areas, None).unwrap();
    recorder.start("start").unwrap();
    let buffer = recorder.instance.path().to_owned();
    std::fs::write(buffer.join("events/sched/sched_wakeup/enable"), "1").unwrap();
    std::fs::write(buffer.join("trace_clock"), "global").unwrap();
    std::fs::write(buffer.join("tracing_on"), "0").unwrap();
    std::fs::write(buffer.join("buffer_size_kb"), "100").unwrap();
    drop(std::fs::File::open(buffer.join(format!("per_cpu/{}/trace_pipe_raw", areas[0].cpu))).unwrap());
    let report = recorder.stop().unwrap();
    let of = |setting: &str| report.changes.iter().find(|change| change.setting == setting).cloned();
    let clock = of("trace_clock").unwrap();
    assert_eq!((&*clock.armed, &*clock.found), ("x86-tsc", "global"));
    assert_eq!(of("tracing_on").map(|change| change.found), Some("0".into()));
    assert!(of("buffer_size_kb").is_some() && of("set_event").is_some(), "{:?}", report.changes);
    assert!(of(&format!("per_cpu/{}/trace_pipe_raw", areas[0].cpu)).is_some(), "{:?}", report.changes);
}

#[test]
fn recording_that_is_left_alone_reports_no_change() {
    let Some(_alone) = alone() else { return };
    let mut recorder = HostRecorder::arm(&arm(0x5e78, &["sched:sched_switch"], 0), true).unwrap();
    let areas = areas(&recorder, 1 << 20);
    recorder.attach(tempfile::tempfile().unwrap(), &areas, None).unwrap();
    recorder.start("start").unwrap();
    recorder.mark("here").unwrap();
    assert_eq!(recorder.stop().unwrap().changes, []);
}

#[test]
fn trigger_that_switches_the_clock_is_refused_with_its_reason() {
    let Some(_alone) = alone() else { return };
    let mut request = arm(0x5e79, &["sched:sched_waking"], 0);
    request.events[0].triggers.push("hist:keys=pid:ts0=common_timestamp.usecs".into());
    let Err(refusal) = HostRecorder::arm(&request, true) else { panic!("it was armed") };
    if refusal.detail.contains("Invalid argument") || refusal.detail.contains("no such") {
        println!("skipped: this kernel has no hist triggers");
        return;
    }
    assert!(refusal.detail.contains("clock from x86-tsc to global: add :clock=x86-tsc"), "{refusal:?}");
    let name = format!("{INSTANCE_PREFIX}{}-{:x}", std::process::id(), 0x5e79);
    assert!(!Tracefs::find_or_mount().unwrap().root().join("instances").join(name).exists(), "it is removed");
}
