//! Decoded events: order, times and fields are those of `trace-cmd report`, whoever wrote the file.

use std::path::Path;

use anyhow::{Context, Result};
use vtrace_common::ids::Cpu;
use vtrace_dp::{
    clock::shift::{ShiftSample, TimeShift},
    ftrace::fields::Formats,
    trace::{
        format::{compressed::Compression, option::TraceOption},
        read::{merge::Merge, times::FileClock},
    },
};
use vtrace_tests::judge::{Line, convert_packed, lines, trace_cmd};

use super::{assert_same, events, host::record, open};

/// CPU, time, event, and for a switch the threads.
type Seen = (Cpu, u64, String, Option<[u32; 2]>);

fn decoded(path: &Path) -> Result<Vec<Seen>> {
    let reader = open(path)?;
    let stamps = FileClock::from_options(reader.options(), reader.other_options())?;
    let formats = Formats::parse(reader.metadata());
    let mut merge = Merge::new(&reader, &[(reader.top().context("a top instance")?, stamps)])?;
    let mut seen = Vec::new();
    while let Some(event) = merge.next_event()? {
        let format = formats.of_event(event.data).context("every event has a format")?;
        let field = |name: &str| format.field(name).and_then(|field| field.small(event.data));
        let threads = field("prev_pid").zip(field("next_pid")).map(|(from, to)| [from, to]);
        seen.push((event.cpu, event.time, format.name.clone(), threads));
    }
    Ok(seen)
}

/// `comm:12 [120] S ==> comm:34 [120]`
fn threads(line: &Line) -> Option<[u32; 2]> {
    let pid = |side: &str| side.rsplit_once(" [")?.0.rsplit_once(':')?.1.parse().ok();
    let (from, to) = line.fields.split_once(" ==> ")?;
    Some([pid(from)?, pid(to)?])
}

fn reported(path: &Path) -> Result<Vec<Seen>> {
    let report = lines(&trace_cmd(&["report", "-t"], &[path])?);
    Ok(report.iter().map(|line| (line.cpu, line.time, line.event.clone(), threads(line))).collect())
}

#[test]
fn order_times_and_fields_are_those_of_the_stock_report() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let recording = record("decode", 4)?;
    let first =
        recording.lanes.iter().filter_map(|(_, pages)| pages.first_chunk()).map(|time| u64::from_le_bytes(*time));
    let first = first.min().context("an event")?;
    let last = recording.lanes.iter().map(|(cpu, _)| cpu.0).max().context("a CPU")?;
    let scale = TraceOption::Tsc2Nsec { mult: 6_463_501, shift: 24 };
    let sample = |after: u64, offset: i64| ShiftSample { time: first + after, offset };
    let samples = [
        vec![sample(0, -7_000_003), sample(1000, 5)],
        vec![sample(0, 100), sample(3_000_000, -3_000), sample(9_000_000, 40_000), sample(20_000_000, 1)],
    ];
    for (samples, interpolate) in samples.iter().zip([false, true]).chain(samples.iter().zip([true, false])) {
        let cpus = vec![samples.clone(); last as usize + 1];
        let shift = TraceOption::TimeShift(TimeShift { peer: 1, interpolate, cpus });
        let file = folder.path().join(format!("shift-{}-{interpolate}.dat", samples.len()));
        recording.write(&file, &[recording.options(), vec![scale.clone(), shift]].concat(), "")?;
        let (ours, mut theirs) = (decoded(&file)?, reported(&file)?);
        assert!(ours.len() > 500 && ours.iter().any(|seen| seen.3.is_some()));
        assert_eq!(ours.len(), theirs.len());
        let mut ours = ours;
        // A CPU whose time steps back is put elsewhere by each reader.
        ours.sort();
        theirs.sort();
        let differs = ours.iter().zip(&theirs).find(|(ours, theirs)| ours != theirs);
        assert!(differs.is_none(), "{} samples, {interpolate}: {differs:?}", samples.len());
    }
    let file = folder.path().join("plain.dat");
    recording.write(&file, &[recording.options(), vec![scale]].concat(), "")?;
    assert!(decoded(&file)?.iter().map(|seen| seen.1).eq(reported(&file)?.iter().map(|seen| seen.1)), "the order too");
    Ok(())
}

#[test]
fn stock_files_packed_with_zstd_are_read() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let recording = record("packed", 4)?;
    let (ours, theirs) = (folder.path().join("ours.dat"), folder.path().join("theirs.dat"));
    recording.write(&ours, &[recording.options(), vec![TraceOption::TraceId(7)]].concat(), "{}")?;
    convert_packed(&ours, "7", "zstd", &theirs)?;
    let reader = open(&theirs)?;
    assert_eq!(reader.compression(), Compression::Zstd);
    assert!(*reader.metadata() == recording.metadata);
    assert_same(&events(&theirs)?, &events(&ours)?, "zstd");
    assert_eq!(decoded(&theirs)?, decoded(&ours)?);
    Ok(())
}
