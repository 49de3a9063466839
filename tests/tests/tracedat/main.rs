//! trace.dat: what stock tools say of files made of real pages of this machine, and what we read of stock files.

mod decode;
mod files;
mod gap;
mod host;
mod pack;

use std::{collections::BTreeMap, fs::File, path::Path};

use anyhow::Result;
use host::{Recording, record};
use vtrace_common::ids::Cpu;
use vtrace_dp::{
    clock::shift::{ShiftSample, TimeShift},
    trace::{
        format::{layout::id, option::TraceOption},
        read::{Reader, input::FileSource},
        write::collapse::Compaction,
    },
};
use vtrace_tests::judge::{Line, convert, kshark, lines, run, trace_cmd};

fn open(path: &Path) -> Result<Reader<FileSource>> {
    Ok(Reader::open(FileSource::new(File::open(path)?)?)?)
}

/// CPU and raw time of every event, as we read them.
fn events(path: &Path) -> Result<Vec<(Cpu, u64)>> {
    let reader = open(path)?;
    let top = reader.top().expect("a file has a top instance");
    let mut events = Vec::new();
    for lane in &top.lanes {
        reader.events(top, lane, |time, _| events.push((lane.cpu, time)))?;
    }
    events.sort_unstable();
    Ok(events)
}

fn shown(lines: &[Line]) -> Vec<(Cpu, u64)> {
    let mut shown: Vec<_> = lines.iter().map(|line| (line.cpu, line.time)).collect();
    shown.sort_unstable();
    shown
}

/// The first difference, not all of them.
fn assert_same(found: &[(Cpu, u64)], expected: &[(Cpu, u64)], what: &str) {
    let differs = found.iter().zip(expected).find(|(found, expected)| found != expected);
    assert!(
        differs.is_none() && found.len() == expected.len(),
        "{what}: {} of {} events, {differs:?}",
        found.len(),
        expected.len()
    );
}

fn shift(recording: &Recording, cycles: i64) -> TraceOption {
    let last = recording.lanes.iter().map(|(cpu, _)| cpu.0).max().expect("a machine has CPUs");
    let samples = vec![ShiftSample { time: 1, offset: cycles }, ShiftSample { time: 2, offset: cycles }];
    TraceOption::TimeShift(TimeShift { peer: 0x1111, interpolate: false, cpus: vec![samples; last as usize + 1] })
}

#[test]
fn stock_report_shows_exactly_the_events_that_are_there() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for page_kb in [4, 8, 64, 512] {
        let recording = record("report", page_kb)?;
        let file = folder.path().join(format!("report{page_kb}.dat"));
        recording.write(&file, &recording.options(), "{\"pages\":1}")?;
        let ours = events(&file)?;
        assert!(ours.len() > 500, "there is something to see: {}", ours.len());
        let report = lines(&trace_cmd(&["report"], &[&file])?);
        assert_same(&shown(&report), &ours, &format!("pages of {page_kb} KiB"));
        assert!(report.iter().all(|line| line.event.starts_with("sched_")));
    }
    Ok(())
}

#[test]
fn stock_checks_have_nothing_to_say() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let recording = record("check", 4)?;
    let file = folder.path().join("check.dat");
    recording.write(&file, &recording.options(), "{\"ledger\":[]}")?;
    let validated = trace_cmd(&["dump", "--validate"], &[&file])?;
    assert!(validated.contains("is a valid trace-cmd file"), "{validated}");
    for words in [["dump", "--all"], ["dump", "--summary"], ["dump", "--sections"], ["dump", "--options"]] {
        assert!(!trace_cmd(&words, &[&file])?.is_empty(), "{words:?}");
    }
    let checked = trace_cmd(&["report", "--ts-check"], &[&file])?;
    assert_eq!(lines(&checked).len(), events(&file)?.len());
    assert!(!checked.contains("BACKWARD"), "{checked}");
    let stat = trace_cmd(&["report", "--stat"], &[&file])?;
    recording.stats.iter().for_each(|text| assert!(stat.contains(text.trim_end()), "{stat}"));
    assert!(trace_cmd(&["report", "--uname"], &[&file])?.contains("Linux here 6 x86_64"));
    assert!(trace_cmd(&["report", "--version"], &[&file])?.contains("vtrace test"));
    Ok(())
}

#[test]
fn time_shift_moves_every_event_by_exactly_that() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let recording = record("shift", 4)?;
    for cycles in [5_000_000_017i64, -5_000_000_017] {
        let file = folder.path().join(format!("shift{cycles}.dat"));
        let options = [recording.options(), vec![shift(&recording, cycles)]].concat();
        recording.write(&file, &options, "")?;
        let mut moved = events(&file)?;
        moved.iter_mut().for_each(|(_, time)| *time = time.wrapping_add_signed(cycles));
        assert_same(&shown(&lines(&trace_cmd(&["report"], &[&file])?)), &moved, &format!("{cycles} cycles"));
    }
    Ok(())
}

#[test]
fn cycles_become_nanoseconds_after_the_shift() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let recording = record("nanoseconds", 4)?;
    let file = folder.path().join("nanoseconds.dat");
    let (mult, shift_bits, cycles) = (5_592_405u32, 24u32, 123_456_789i64);
    let scale = TraceOption::Tsc2Nsec { mult, shift: shift_bits };
    recording.write(&file, &[recording.options(), vec![scale, shift(&recording, cycles)]].concat(), "")?;
    let ns = |time: u64| u64::try_from((u128::from(time) * u128::from(mult)) >> shift_bits).unwrap();
    let mut expected = events(&file)?;
    expected.iter_mut().for_each(|(_, time)| *time = ns(time.wrapping_add_signed(cycles)));
    let report = shown(&lines(&trace_cmd(&["report", "-t"], &[&file])?));
    // Stock readers multiply the halves of a number one by one: the last digit can be one less.
    assert_eq!(report.len(), expected.len());
    for ((cpu, time), (expected_cpu, expected)) in report.iter().zip(&expected) {
        assert!(cpu == expected_cpu && expected.abs_diff(*time) <= 1, "{cpu} {time} {expected}");
    }
    Ok(())
}

/// A host and a guest, made of two recordings of this machine; the guest's clock is ahead of the host's.
fn pair(folder: &Path) -> Result<(Recording, Recording)> {
    let (host, guest) = (record("pair-host", 4)?, record("pair-guest", 4)?);
    let scale = TraceOption::Tsc2Nsec { mult: 5_592_405, shift: 24 };
    let link = TraceOption::Guest {
        name: "guest1".to_owned(),
        trace_id: 0x2222,
        vcpus: guest.lanes.iter().map(|(cpu, _)| (*cpu, 4242 + cpu.0)).collect(),
    };
    let options = [host.options(), vec![scale.clone(), TraceOption::TraceId(0x1111), link]].concat();
    host.write(&folder.join("trace.dat"), &options, "{}")?;
    let options = [guest.options(), vec![scale, TraceOption::TraceId(0x2222), shift(&guest, -1000)]].concat();
    guest.write(&folder.join("trace-guest1.dat"), &options, "{}")?;
    Ok((host, guest))
}

#[test]
fn merged_report_tells_host_and_guest_apart_and_runs_forward() -> Result<()> {
    let folder = tempfile::tempdir()?;
    pair(folder.path())?;
    let files = [&*folder.path().join("trace.dat"), &*folder.path().join("trace-guest1.dat")];
    let report = lines(&trace_cmd(&["report", "-t", "--ts-check"], &files)?);
    let mut counts = BTreeMap::new();
    report.iter().for_each(|line| *counts.entry(line.file.clone()).or_insert(0) += 1);
    let expected = [
        (Some("trace.dat".to_owned()), events(files[0])?.len()),
        (Some("trace-guest1.dat".to_owned()), events(files[1])?.len()),
    ];
    assert_eq!(counts, BTreeMap::from(expected));
    assert!(report.is_sorted_by_key(|line| line.time));
    Ok(())
}

#[test]
fn kernelshark_loads_both_and_finds_whose_vcpus_they_are() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (_, guest) = pair(folder.path())?;
    let files = [&*folder.path().join("trace.dat"), &*folder.path().join("trace-guest1.dat")];
    let said = run(kshark(folder.path())?, &[], &files)?;
    let ns = |cycles: u64| u64::try_from((u128::from(cycles) * 5_592_405) >> 24).unwrap();
    for ((stream, file), shift) in files.iter().enumerate().zip([0, -1000]) {
        let line = said.lines().find(|line| line.starts_with(&format!("stream {stream} "))).expect("a line a stream");
        let events = events(file)?;
        let times = || events.iter().map(|(_, time)| ns(time.wrapping_add_signed(shift)));
        let words: Vec<u64> = line.split(' ').skip(2).map(|word| word.parse().unwrap()).collect();
        let [count, first, last] = words[..] else { panic!("{said}") };
        assert_eq!(count, events.len() as u64);
        assert!(first.abs_diff(times().min().unwrap()) <= 1 && last.abs_diff(times().max().unwrap()) <= 1, "{said}");
    }
    let threads: Vec<String> = guest.lanes.iter().map(|(cpu, _)| (4242 + cpu.0).to_string()).collect();
    assert!(said.contains(&format!("map 0 1 guest1 {}\n", threads.join(" "))), "{said}");
    Ok(())
}

#[test]
fn file_says_what_was_put_in() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let recording = record("back", 4)?;
    let file = folder.path().join("back.dat");
    let notes = "{\"clock\":\"measured\",\"bound_ns\":412}";
    let options = [recording.options(), vec![TraceOption::TraceId(7), shift(&recording, 5)]].concat();
    let finished = recording.write(&file, &options, notes)?;
    assert_eq!(finished.bytes, std::fs::metadata(&file)?.len());
    let reader = open(&file)?;
    assert!(*reader.metadata() == recording.metadata);
    assert_eq!(reader.notes()?.as_deref(), Some(notes));
    for option in &options {
        assert!(reader.options().contains(option), "{option:?}");
    }
    let top = reader.top().expect("a top instance");
    assert_eq!((top.clock.as_str(), top.page_bytes), ("x86-tsc", 4096));
    for (cpu, pages) in recording.lanes.iter().filter(|(_, pages)| !pages.is_empty()) {
        let lane = top.lanes.iter().find(|lane| lane.cpu == *cpu).expect("a lane that was filled");
        let read = reader.pages(top, lane).map(|page| Ok(page?.1)).collect::<Result<Vec<_>>>()?.concat();
        assert!(read == *pages && lane.offset % 4096 == 0, "{cpu}");
    }
    Ok(())
}

#[test]
fn stock_files_of_both_versions_are_read() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let recording = record("stock", 4)?;
    let ours = folder.path().join("ours.dat");
    let options =
        [recording.options(), vec![TraceOption::TraceId(7), TraceOption::Tsc2Nsec { mult: 3, shift: 2 }]].concat();
    recording.write(&ours, &options, "{}")?;
    for version in ["6", "7"] {
        let theirs = folder.path().join(format!("theirs{version}.dat"));
        convert(&ours, version, &theirs)?;
        let reader = open(&theirs)?;
        assert_eq!(reader.version().to_string(), version);
        assert_same(&events(&theirs)?, &events(&ours)?, version);
        assert!(*reader.metadata() == recording.metadata);
        assert!(reader.options().contains(&TraceOption::TraceId(7)));
        assert_eq!(reader.notes()?, None);
    }
    Ok(())
}

#[test]
fn guest_of_which_nothing_came_is_still_a_file() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut recording = record("empty", 4)?;
    recording.lanes.iter_mut().for_each(|(_, pages)| pages.clear());
    let file = folder.path().join("empty.dat");
    let finished = recording.write(&file, &recording.options(), "{}")?;
    assert_eq!(finished.compaction, Compaction::Collapsed);
    assert!(events(&file)?.is_empty());
    assert!(trace_cmd(&["dump", "--validate"], &[&file])?.contains("is a valid trace-cmd file"));
    assert!(lines(&trace_cmd(&["report"], &[&file])?).is_empty());
    Ok(())
}

#[test]
fn lane_without_pages_is_left_out_and_the_others_keep_their_number() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut recording = record("hole", 4)?;
    let (Cpu(count), (_, pages)) = (Cpu(u32::try_from(recording.lanes.len())?), recording.lanes[0].clone());
    recording.lanes[0].1.clear();
    recording.lanes.push((Cpu(count + 3), pages));
    let file = folder.path().join("hole.dat");
    recording.write(&file, &recording.options(), "{}")?;
    let expected = events(&file)?;
    assert!(expected.iter().all(|(cpu, _)| *cpu != Cpu(0)) && expected.iter().any(|(cpu, _)| *cpu == Cpu(count + 3)));
    assert_same(&shown(&lines(&trace_cmd(&["report"], &[&file])?)), &expected, "with a hole");
    let said = run(kshark(folder.path())?, &[], &[&file])?;
    assert!(said.starts_with(&format!("stream 0 {} ", expected.len())), "{said}");
    let reader = open(&file)?;
    assert!(reader.sections().iter().any(|(_, header)| header.id == id::NOTES));
    Ok(())
}
