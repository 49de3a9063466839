//! Host and a real guest, recorded together on three kernels and read by stock tools: every page from tap to file.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::Path,
    process::Command,
};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};
use vtrace_dp::trace::read::{Reader, input::FileSource};
use vtrace_tests::{
    guest::is_clear,
    judge::{self, Line, lines, trace_cmd},
    recording::{Recorder, Recording},
    server::Server,
};
use xtask::{
    kernel::Kernel,
    machine::{Machine, turn},
};

const GUEST: &str = "guest1";
/// Tasks that start and end, sleep and wake, on every CPU of the guest.
const LOAD: &str = "for i in 1 2; do (while :; do sleep 0.01; done) </dev/null >/dev/null 2>&1 & done";

#[test]
fn record_guest_on_kernel_6_1() -> Result<()> {
    record_guest(Kernel::V6_1, "buffered")
}

#[test]
fn record_guest_on_kernel_6_12() -> Result<()> {
    record_guest(Kernel::V6_12, "direct")
}

#[test]
fn record_guest_on_newest_kernel() -> Result<()> {
    record_guest(Kernel::Newest, "auto")
}

fn record_guest(kernel: Kernel, sink: &str) -> Result<()> {
    let turn = turn()?;
    let folder = tempfile::tempdir()?;
    let server = Server::start(&[GUEST])?;
    let machine = Machine::builder(&turn, kernel).without_agent().vhost_user(&server.socket(GUEST)).boot()?;
    machine.shell("mkdir /tmp/tee; start-agent --tee /tmp/tee")?.ok()?;
    server.await_agent(GUEST)?;
    machine.shell(LOAD)?.ok()?;
    let recorder = Recorder { server: server.dir(), folder: folder.path() };
    let words = format!("--sink {sink} -e sched -e irq --dom {GUEST} -e sched -e irq:* -- sleep 2");
    let recording = recorder.run(&words)?.ok()?;
    let used = recording.machine(GUEST)?["sink"].clone();
    ensure!(sink == "auto" || used == sink, "{sink} was asked for, {used} was used");

    pages_are_those_the_guest_read(&machine, &recording)?;
    every_event_the_kernels_counted_is_in_the_files(&recording)?;
    stock_checks_have_nothing_to_say(&recording)?;
    kernelshark_ties_guest_to_host(&recording, &machine)?;
    markers_are_in_order(&recording)?;
    left_nothing(&machine)
}

/// The copy that the agent kept of each lane, and the lane in the file, are the same bytes.
fn pages_are_those_the_guest_read(machine: &Machine, recording: &Recording) -> Result<()> {
    let said = machine.shell("cd /tmp/tee && sha256sum *.raw")?.ok()?;
    let copies: BTreeMap<&str, &str> =
        said.lines().filter_map(|line| line.split_once("  ")).map(|(a, b)| (b, a)).collect();
    ensure!(copies.len() == 2, "two CPUs have two copies: {said}");
    let path = recording.file(GUEST);
    let reader = Reader::open(FileSource::new(File::open(&path)?)?)?;
    let buffer = reader.top().context("a file has a top buffer")?;
    ensure!(buffer.lanes.len() == 2, "both lanes carried pages: {:?}", buffer.lanes);
    for lane in &buffer.lanes {
        let copy = copies.get(format!("{}.raw", lane.cpu).as_str()).context("a copy of each lane")?;
        assert_eq!(sha256(&path, lane.offset, lane.bytes)?, *copy, "{}", lane.cpu);
    }
    Ok(())
}

fn sha256(path: &Path, offset: u64, bytes: u64) -> Result<String> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    let mut data = Vec::new();
    file.take(bytes).read_to_end(&mut data)?;
    Ok(Sha256::digest(&data).iter().map(|byte| format!("{byte:02x}")).collect())
}

fn every_event_the_kernels_counted_is_in_the_files(recording: &Recording) -> Result<()> {
    for machine in ["host", GUEST] {
        let [pages_in, pages_out, lost] =
            ["pages_in", "pages_out", "pages_lost"].map(|counter| recording.sum(machine, counter));
        assert_eq!((pages_in?, lost?), (pages_out?, 0), "{machine}");
        assert_eq!(recording.sum(machine, "events_lost")?, 0, "{machine}");
        let report = lines(&trace_cmd(&["report"], &[&recording.file(machine)])?);
        let counted = recording.sum(machine, "events")?;
        assert!(counted > 100, "{machine}: {counted}");
        assert_eq!(u64::try_from(report.len())?, counted, "{machine}");
    }
    Ok(())
}

/// `--ts-check` names every step back in a CPU's events. No step back means none beyond the bound.
fn stock_checks_have_nothing_to_say(recording: &Recording) -> Result<()> {
    let (host, guest) = (recording.file("host"), recording.file(GUEST));
    for file in [&host, &guest] {
        let said = trace_cmd(&["dump", "--validate"], &[file])?;
        assert!(said.contains("is a valid trace-cmd file"), "{said}");
        let stat = trace_cmd(&["report", "--stat"], &[file])?;
        assert!(stat.contains("vtrace pages: "), "{stat}");
    }
    let said = trace_cmd(&["report", "--ts-check"], &[&host, &guest])?;
    assert!(!said.contains("WARNING") && !said.contains("backwards"), "{said}");
    let bound = recording.machine(GUEST)?["clock"]["bound_ns"].as_u64().context("a bound is stored")?;
    assert!(bound > 0 && bound < 5_000_000, "a bound of {bound} ns is of no use");
    let stat = trace_cmd(&["report", "--stat"], &[&guest])?;
    assert!(stat.contains("vtrace clock: measured, 2 vCPUs, ±"), "{stat}");
    Ok(())
}

fn kernelshark_ties_guest_to_host(recording: &Recording, machine: &Machine) -> Result<()> {
    let found = judge::shark(&[&recording.file("host"), &recording.file(GUEST)])?;
    for (entries, name) in found.entries.iter().zip(["host", GUEST]) {
        assert_eq!(u64::try_from(*entries)?, recording.sum(name, "events")?, "{name}");
    }
    let [(0, 1, threads)] = &found.maps[..] else { anyhow::bail!("one guest is tied to the host: {found:?}") };
    assert_eq!(threads.len(), 2);
    for (cpu, tid) in threads.iter().enumerate() {
        let name = std::fs::read_to_string(format!("/proc/{}/task/{tid}/comm", machine.pid()?))?;
        assert!(name.starts_with(&format!("CPU {cpu}/")), "{name}");
    }
    Ok(())
}

/// A marker written in the guest, and those written on the host right before and after it.
fn markers_are_in_order(recording: &Recording) -> Result<()> {
    let report = lines(&trace_cmd(&["report", "-t"], &[&recording.file("host"), &recording.file(GUEST)])?);
    let markers: Vec<&Line> = report.iter().filter(|line| line.event == "print").collect();
    let order: Vec<(bool, &str)> = markers.iter().map(|line| (is_guest(line), words(line))).collect();
    for word in ["common", "stop"] {
        let expected = [(false, "before guests"), (true, ""), (false, "after guests")]
            .map(|(guest, rest)| (guest, format!("vtrace: {word} {rest}").trim_end().to_owned()));
        let found = order.windows(3).any(|three| {
            three.iter().zip(&expected).all(|((guest, text), (in_guest, words))| guest == in_guest && text == words)
        });
        assert!(found, "{word}: {order:?}");
    }
    Ok(())
}

fn is_guest(line: &Line) -> bool {
    line.file.as_deref().is_some_and(|file| file.contains(GUEST))
}

/// A marker's text without the number of the session.
fn words(line: &Line) -> &str {
    let text = line.fields.trim_start_matches("tracing_mark_write: ");
    text.rsplit_once(' ').map_or(text, |(words, _session)| words)
}

fn left_nothing(machine: &Machine) -> Result<()> {
    is_clear(machine)?;
    assert_eq!(machine.shell("cat /sys/kernel/tracing/set_event")?.text(), "", "the top buffer is not touched");
    let ours = Command::new("ls").arg("/sys/kernel/tracing/instances").output()?;
    let ours = String::from_utf8_lossy(&ours.stdout).into_owned();
    assert!(!ours.contains(&format!("vtrace-{}-", std::process::id())), "{ours}");
    Ok(())
}
