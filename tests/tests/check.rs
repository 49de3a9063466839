//! `vtrace check` on a real recording: right as it was recorded, wrong once its clock is moved, and the same whoever
//! wrote the files.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vtrace_dp::trace::{
    format::option::TraceOption,
    read::{Reader, input::FileSource},
};
use vtrace_tests::{
    judge::{convert, convert_packed},
    recording::Recorder,
    server::Server,
};
use xtask::{
    kernel::Kernel,
    machine::{Machine, turn},
};

const GUEST: &str = "guest1";
/// Short work between sleeps: the vCPUs' threads are off their CPUs most of the time.
const LOAD: &str = "for i in 1 2; do (while :; do sleep 0.02; done) </dev/null >/dev/null 2>&1 & done";

/// What `vtrace check` said: exit status, stdout, stderr.
struct Said {
    status: i32,
    stdout: String,
    stderr: String,
}

fn vtrace_check(words: &[&str], files: &[&Path]) -> Result<Said> {
    let output = Command::new(xtask::build::vtrace()?).arg("check").args(words).args(files).output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let status = output.status.code().context("it ends by itself")?;
    Ok(Said { status, stdout: text(&output.stdout), stderr: text(&output.stderr) })
}

fn guest(host: &Path, guest: &Path) -> Result<(i32, Value)> {
    let said = vtrace_check(&["--json"], &[host, guest])?;
    let report: Value = serde_json::from_str(&said.stdout).with_context(|| said.stderr.clone())?;
    Ok((said.status, report["guests"][0].clone()))
}

fn count(report: &Value, counter: &str) -> Result<u64> {
    report[counter].as_u64().with_context(|| format!("{counter}: {report:#}"))
}

#[test]
fn recording_of_a_guest_without_kvm_is_held_against_its_threads_time_on_cpus() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (host, file) = record(folder.path())?;

    let (status, right) = guest(&host, &file)?;
    assert_eq!(right["against"], "on_cpu", "TCG has no kvm_entry");
    assert_eq!(status, 0, "{right:#}");
    let (events, uncovered) = (count(&right, "events")?, count(&right, "uncovered")?);
    assert!(events > 500 && uncovered * 2 < events, "{right:#}");
    assert!(count(&right, "bound_ns")? > 0, "a measured clock has a bound");
    let text = vtrace_check(&[], &[&host, &file])?.stdout;
    assert!(text.starts_with("guest1: ") && text.contains("a weaker check"), "{text}");

    for milliseconds in [-7, 7] {
        let moved = folder.path().join(format!("moved{milliseconds}.dat"));
        move_clock(&file, &moved, milliseconds)?;
        let (status, wrong) = guest(&host, &moved)?;
        assert_eq!((status, &wrong["verdict"]), (1, &Value::from("wrong")), "{wrong:#}");
        assert!(count(&wrong, "outside")? * 10 > events, "{milliseconds} ms: {wrong:#}");
    }
    as_stock_tools_write_them(&host, &file, &right)?;
    files_that_cannot_be_checked_are_named(&host, &file)
}

fn record(folder: &Path) -> Result<(PathBuf, PathBuf)> {
    let turn = turn()?;
    let server = Server::start(&[GUEST])?;
    let machine = Machine::builder(&turn, Kernel::V6_12).without_agent().vhost_user(&server.socket(GUEST)).boot()?;
    machine.shell("start-agent")?.ok()?;
    server.await_agent(GUEST)?;
    machine.shell(LOAD)?.ok()?;
    let recorder = Recorder { server: server.dir(), folder };
    let recording = recorder.run(&format!("-e sched --dom {GUEST} -e sched -- sleep 2"))?.ok()?;
    Ok((recording.file("host"), recording.file(GUEST)))
}

/// A copy whose time shift is so much larger.
fn move_clock(from: &Path, to: &Path, milliseconds: i64) -> Result<()> {
    std::fs::copy(from, to)?;
    let reader = Reader::open(FileSource::new(File::open(from)?)?)?;
    let options = reader.options();
    let scale = options.iter().find_map(|option| match option {
        TraceOption::Tsc2Nsec { mult, shift } => Some((i64::from(*mult), *shift)),
        _ => None,
    });
    let (mult, bits) = scale.context("cycles become nanoseconds")?;
    let cycles = milliseconds * ((1_000_000 << bits) / mult);
    let found = options.iter().find(|option| matches!(option, TraceOption::TimeShift(_)));
    let Some(TraceOption::TimeShift(mut shift)) = found.cloned() else { anyhow::bail!("a guest's file has a shift") };
    let old = TraceOption::TimeShift(shift.clone()).encode()?;
    shift.cpus.iter_mut().flatten().for_each(|sample| sample.offset += cycles);
    let bytes = std::fs::read(to)?;
    let at = bytes.windows(old.len()).position(|window| window == old).context("the option is in the file")?;
    let file = OpenOptions::new().write(true).open(to)?;
    file.write_all_at(&TraceOption::TimeShift(shift).encode()?, u64::try_from(at)?)?;
    Ok(())
}

/// Stock trace-cmd writes the pair again: version 6, and version 7 packed with zstd.
fn as_stock_tools_write_them(host: &Path, file: &Path, expected: &Value) -> Result<()> {
    for version in ["6", "7"] {
        let theirs = |name: &str| host.with_file_name(format!("stock{version}-{name}.dat"));
        let (their_host, their_guest) = (theirs("host"), theirs(GUEST));
        for (from, to) in [(host, &their_host), (file, &their_guest)] {
            match version {
                "6" => convert(from, version, to)?,
                _ => convert_packed(from, version, "zstd", to)?,
            }
        }
        let (status, found) = guest(&their_host, &their_guest)?;
        ensure!(status == 0, "version {version}: {found:#}");
        for counter in ["events", "inside", "uncovered", "worst"] {
            assert_eq!(found[counter], expected[counter], "version {version}: {counter}");
        }
        assert!(count(&found, "bound_ns")? >= count(expected, "bound_ns")?, "from the text of CPUSTAT");
    }
    Ok(())
}

fn files_that_cannot_be_checked_are_named(host: &Path, file: &Path) -> Result<()> {
    let swapped = vtrace_check(&[], &[file, host])?;
    assert_eq!(swapped.status, 2, "{}", swapped.stderr);
    let right = format!("try: vtrace check {} {}\n", host.display(), file.display());
    assert!(swapped.stderr.ends_with(&right), "{}", swapped.stderr);
    let said = vtrace_check(&[], &[host, Path::new("/dev/null")])?;
    assert!(said.status == 1 && said.stderr.contains("it is a device, not a file"), "{}", said.stderr);
    let text = host.with_file_name("text");
    std::fs::write(&text, "no trace")?;
    let said = vtrace_check(&[], &[host, &text])?;
    assert!(said.status == 1 && said.stderr.contains("not a trace.dat"), "{}", said.stderr);
    assert_eq!(vtrace_check(&[], &[host])?.status, 2, "{}", said.stderr);
    Ok(())
}
