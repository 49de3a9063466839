//! Recordings that are killed, copied at a random instant as a power failure would leave them, or meet a full disk or
//! a limit: what stock tools make of the files afterwards.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Child, Command},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};
use serde_json::Value;
use vtrace_dp::trace::read::{Reader, input::FileSource};
use vtrace_tests::{
    crash::{copy_now, some_time},
    disk::Disk,
    judge::{lines, trace_cmd},
    recording::{Recorder, Recording},
};

/// Busy enough for some hundred pages a second; more is only more for the judge to read.
const BUSY: &str = "-q -e sched -e syscalls:sys_enter_read -e syscalls:sys_exit_read -- \
                    dd if=/dev/zero of=/dev/null bs=64k count=200000000";
/// What a recording has before something happens to it.
const SOME_BYTES: u64 = 1 << 20;
/// Descriptions and symbols, about.
const HEAD_BYTES: u64 = 10 << 20;

fn recorder(folder: &Path) -> Recorder<'_> {
    Recorder { server: folder, folder }
}

/// Waits until the file has its name and this many bytes.
fn await_bytes(file: &Path, bytes: u64) -> Result<()> {
    let begun = Instant::now();
    while fs::metadata(file).map_or(0, |about| about.blocks() * 512) < bytes {
        ensure!(begun.elapsed() < Duration::from_secs(20), "{} does not grow", file.display());
        sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn kill(mut child: Child) -> Result<()> {
    // Whose parent it is can be asked only while it lives.
    let commands = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id()))?;
    child.kill()?;
    child.wait()?;
    for command in commands.split_whitespace() {
        // One that has ended meanwhile is what is wanted.
        let _ = signal::kill(Pid::from_raw(command.parse()?), Signal::SIGKILL);
    }
    Ok(())
}

fn restore(paths: &[&Path]) -> Result<Value> {
    let output = Command::new(xtask::build::vtrace()?).args(["restore", "--json"]).args(paths).output()?;
    ensure!(output.status.success(), "vtrace restore: {}", String::from_utf8_lossy(&output.stdout));
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn pages(outcome: &Value) -> Result<u64> {
    let lanes = outcome["lanes"].as_array().context("an outcome has lanes")?;
    lanes.iter().map(|lane| lane["pages"].as_u64().context("a lane has pages")).sum()
}

/// Stock tools read the file, and find the events that the whole pages in it have.
fn is_valid(file: &Path) -> Result<usize> {
    let said = trace_cmd(&["dump", "--validate"], &[file])?;
    ensure!(said.contains("is a valid trace-cmd file"), "{said}");
    let reader = Reader::open(FileSource::new(File::open(file)?)?)?;
    let Some(top) = reader.top() else { return Ok(0) };
    let mut events = 0;
    for lane in &top.lanes {
        reader.events(top, lane, |_, _| events += 1)?;
    }
    let report = lines(&trace_cmd(&["report", "--ts-check"], &[file])?);
    assert_eq!(report.len(), events, "stock report shows every event");
    Ok(events)
}

#[test]
fn killed_recording_has_every_page_that_was_written() -> Result<()> {
    for _ in 0..3 {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("trace.dat");
        let child = recorder(folder.path()).start(BUSY)?;
        await_bytes(&file, HEAD_BYTES + SOME_BYTES)?;
        sleep(some_time(300));
        kill(child)?;
        let outcome = restore(&[folder.path()])?;
        ensure!(outcome[0]["was"] == "open" && outcome[0]["linked"] == true, "{outcome:#}");
        ensure!(pages(&outcome[0])? > 100 && outcome[0]["lanes"][0]["pages_missing"] == 0, "{outcome:#}");
        ensure!(is_valid(&file)? > 1000, "{outcome:#}");
        let shown = trace_cmd(&["dump", "--options"], &[&file])?;
        for option in ["TSC2NSEC", "TRACEID", "TRACECLOCK", "UNAME", "CPUCOUNT"] {
            ensure!(shown.contains(option), "{option} is missing: {shown}");
        }
        let before = fs::read(&file)?;
        ensure!(restore(&[&file])?[0]["was"] == "finished");
        ensure!(fs::read(&file)? == before, "a finished file is left as it is");
    }
    Ok(())
}

#[test]
fn copy_of_a_running_recording_has_every_page_that_was_complete() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("trace.dat");
    let child = recorder(folder.path()).start(BUSY)?;
    await_bytes(&file, HEAD_BYTES + SOME_BYTES)?;
    ensure!(
        !Command::new(xtask::build::vtrace()?).arg("restore").arg(&file).output()?.status.success(),
        "it is locked"
    );
    let copies: Vec<_> = (0..4).map(|index| folder.path().join(format!("copy{index}.dat"))).collect();
    for copy in &copies {
        sleep(some_time(200));
        copy_now(&file, copy)?;
    }
    kill(child)?;
    for copy in &copies {
        let outcome = restore(&[copy])?;
        let found = pages(&outcome[0])?;
        ensure!(found > 100, "{outcome:#}");
        is_valid(copy)?;
        let reader = Reader::open(FileSource::new(File::open(copy)?)?)?;
        let top = reader.top().context("it has pages")?;
        let there: u64 = top.lanes.iter().map(|lane| lane.bytes / u64::from(top.page_bytes)).sum();
        let missing: u64 = outcome[0]["lanes"]
            .as_array()
            .context("lanes")?
            .iter()
            .map(|lane| lane["pages_missing"].as_u64().unwrap_or(0))
            .sum();
        assert_eq!(there, found + missing, "what is said is there");
    }
    Ok(())
}

#[test]
fn recording_killed_anywhere_in_its_end_can_be_restored() -> Result<()> {
    let mut states = Vec::new();
    for ms in [0u64, 5, 10, 20, 40, 60, 90, 130, 200] {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("trace.dat");
        fs::write(&file, "what was there before")?;
        let child = recorder(folder.path()).start("-q -e sched -e irq -- sleep 0.5")?;
        await_bytes(&file, 1 << 20)?;
        sleep(Duration::from_millis(450 + ms));
        kill(child)?;
        let outcome = restore(&[&file])?;
        states.push(outcome[0]["was"].as_str().context("a state")?.to_owned());
        is_valid(&file)?;
    }
    println!("killed {states:?}");
    Ok(())
}

#[test]
fn file_that_was_there_stays_until_the_recording_begins() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("trace.dat");
    fs::write(&file, "precious")?;
    let recording = recorder(folder.path()).run("-e no_such_event -- true")?;
    assert_eq!((recording.status, fs::read(&file)?), (1, b"precious".to_vec()));
    let recording = recorder(folder.path()).run("-e sched -- ./no-such-command")?;
    assert_eq!((recording.status, fs::read(&file)?), (1, b"precious".to_vec()));
    recorder(folder.path()).run("-e sched -- sleep 0.2")?.ok()?;
    is_valid(&file)?;
    assert_eq!(fs::read_dir(folder.path())?.count(), 1, "nothing else is left");
    Ok(())
}

#[test]
fn full_disk_stops_the_recording_and_leaves_a_valid_file() -> Result<()> {
    for (kind, disk) in [("tmpfs", Disk::tmpfs(32 << 20)?), ("ext4", Disk::ext4(32 << 20)?)] {
        let folder = disk.path();
        let recording = recorder(folder).run("-e sched -e syscalls -- dd if=/dev/zero of=/dev/null bs=1")?;
        assert_eq!((recording.status, &recording.summary["ended"]), (1, &Value::from("cannot-write")), "{kind}");
        ensure!(recording.sum("host", "pages_lost")? > 0, "{kind}: the ledger says what was refused");
        let remarks = recording.machine("host")?["remarks"].to_string();
        ensure!(remarks.contains("No space left on device"), "{kind}: {remarks}");
        is_whole(&recording)?;
    }
    Ok(())
}

/// The file has all pages that the summary says, as stock tools see it.
fn is_whole(recording: &Recording) -> Result<()> {
    let file = recording.file("host");
    is_valid(&file)?;
    let reader = Reader::open(FileSource::new(File::open(&file)?)?)?;
    let top = reader.top().context("it has pages")?;
    let there: u64 = top.lanes.iter().map(|lane| lane.bytes / u64::from(top.page_bytes)).sum();
    assert_eq!(there, recording.sum("host", "pages_out")? - recording.sum("host", "pages_old")?);
    Ok(())
}

#[test]
fn recording_stops_before_its_file_is_larger_than_asked() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let words = "--max-file 16M -e sched -e syscalls:sys_enter_read -- dd if=/dev/zero of=/dev/null bs=16k";
    let recording = recorder(folder.path()).run(words)?;
    assert_eq!((recording.status, &recording.summary["ended"]), (0, &Value::from("file-size")), "{}", recording.said);
    let bytes = fs::metadata(recording.file("host"))?.len();
    ensure!((12 << 20..40 << 20).contains(&bytes), "{bytes} bytes");
    is_whole(&recording)
}

#[test]
fn only_the_newest_pages_are_kept_where_that_is_asked() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let words = "-m 2048 -e sched -e syscalls -- dd if=/dev/zero of=/dev/null bs=1 count=600000";
    let recording = recorder(folder.path()).run(words)?.ok()?;
    ensure!(recording.sum("host", "pages_old")? > 0, "{:#}", recording.summary);
    let reader = Reader::open(FileSource::new(File::open(recording.file("host"))?)?)?;
    let top = reader.top().context("it has pages")?;
    let most = top.lanes.iter().map(|lane| lane.bytes).max().context("it has lanes")?;
    ensure!((2 << 20..=4 << 20).contains(&most), "{most} bytes of a lane");
    is_whole(&recording)
}

#[test]
fn folder_without_recordings_is_left_alone() -> Result<()> {
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("other.dat"), "x")?;
    assert_eq!(restore(&[folder.path()])?, Value::Array(Vec::new()));
    let missing = Command::new(xtask::build::vtrace()?).arg("restore").arg(folder.path().join("none")).output()?;
    assert_eq!(missing.status.code(), Some(1));
    ensure!(String::from_utf8_lossy(&missing.stdout).contains("No such file"), "{missing:?}");
    Ok(())
}
