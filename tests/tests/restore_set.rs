//! Host and guest recorded together when a part of it dies: what is in the files afterwards is what the guest read out of
//! its ring buffers, page by page, as far as it had come.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    process::{Child, Command},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use sha2::{Digest, Sha256};
use vtrace_dp::trace::read::{Reader, input::FileSource};
use vtrace_tests::{
    crash::{copy_now, pages_on_disk, some_time},
    judge::{lines, trace_cmd},
    recording::{Recorder, Recording},
    server::Server,
};
use xtask::{
    kernel::Kernel,
    machine::{Machine, Turn, turn},
};

const GUEST: &str = "guest1";
const FILES: [&str; 2] = ["trace.dat", "trace-guest1.dat"];
const PAGE: u64 = 4096;
/// Some hundred pages a second of each CPU.
const LOAD: &str = "for mask in 1 2; do \
     taskset $mask sh -c 'while :; do ls / >/dev/null; done' </dev/null >/dev/null 2>&1 & done";
/// Waits until the guest has read so many bytes out of each CPU's ring buffer.
fn await_bytes_read(machine: &Machine, bytes: u64) -> Result<()> {
    let begun = Instant::now();
    loop {
        let said = machine.shell("stat -c %s /tmp/tee/cpu0.raw /tmp/tee/cpu1.raw")?.text();
        if said.lines().count() == 2 && said.lines().all(|size| size.parse().is_ok_and(|size: u64| size >= bytes)) {
            return Ok(());
        }
        ensure!(begun.elapsed() < Duration::from_secs(50), "the guest traces too little: {said}");
        sleep(Duration::from_millis(100));
    }
}

/// Pages of the guest's lanes in a finished file, all of which are as the agent's copy begins.
fn is_what_the_guest_read(machine: &Machine, file: &Path) -> Result<u64> {
    let reader = Reader::open(FileSource::new(File::open(file)?)?)?;
    let top = reader.top().context("it has pages")?;
    assert_eq!(top.lanes.len(), 2, "both lanes carried pages");
    let mut pages = 0;
    for lane in &top.lanes {
        let said = machine.shell(&format!("head -c {} /tmp/tee/{}.raw | sha256sum", lane.bytes, lane.cpu))?.ok()?;
        let mut bytes = vec![0; usize::try_from(lane.bytes)?];
        File::open(file)?.read_exact_at(&mut bytes, lane.offset)?;
        let ours: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(said.split_whitespace().next(), Some(&*ours), "{}: {} bytes", lane.cpu, lane.bytes);
        pages += lane.bytes / PAGE;
    }
    Ok(pages)
}

/// `vtrace restore` of a folder: what it says of the host's and of the guest's file.
fn restore(folder: &Path) -> Result<[Value; 2]> {
    let output = Command::new(xtask::build::vtrace()?).args(["restore", "--json"]).arg(folder).output()?;
    ensure!(output.status.success(), "vtrace restore: {}", String::from_utf8_lossy(&output.stdout));
    let outcomes: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    let of = |name: &str| {
        let outcome = outcomes.iter().find(|outcome| outcome["file"].as_str().is_some_and(|file| file.ends_with(name)));
        outcome.cloned().with_context(|| format!("{name} was restored: {outcomes:#?}"))
    };
    ensure!(outcomes.len() == 2, "{outcomes:#?}");
    Ok([of(FILES[0])?, of(FILES[1])?])
}

fn sum(outcome: &Value, counter: &str) -> Result<u64> {
    let lanes = outcome["lanes"].as_array().context("an outcome has lanes")?;
    lanes.iter().map(|lane| lane[counter].as_u64().with_context(|| format!("a lane has {counter}"))).sum()
}

/// Stock trace-cmd opens both as one timeline.
fn is_one_timeline(folder: &Path) -> Result<()> {
    let files = FILES.map(|name| folder.join(name));
    for file in &files {
        let said = trace_cmd(&["dump", "--validate"], &[file])?;
        ensure!(said.contains("is a valid trace-cmd file"), "{said}");
    }
    let said = trace_cmd(&["report", "--ts-check"], &[&files[0], &files[1]])?;
    assert!(!said.contains("WARNING") && !said.contains("backwards"), "{said}");
    let report = lines(&said);
    let times = |name: &str| {
        let times = report.iter().filter(|line| line.file.as_deref() == Some(name)).map(|line| line.time);
        let (first, last) = (times.clone().min(), times.max());
        first.zip(last).with_context(|| format!("{name} has events"))
    };
    let ((host_first, host_last), (first, last)) = (times(FILES[0])?, times(FILES[1])?);
    ensure!(first < host_last && host_first < last, "they are of one time: {first}–{last}, {host_first}–{host_last}");
    Ok(())
}

/// Restores the set and compares with what was on the disk, and with what the guest had read.
fn whole_set_is_restored(machine: &Machine, folder: &Path) -> Result<()> {
    let files = FILES.map(|name| folder.join(name));
    let there = [pages_on_disk(&files[0])?, pages_on_disk(&files[1])?];
    let outcomes = restore(folder)?;
    for (outcome, there) in outcomes.iter().zip(there) {
        ensure!(outcome["was"] == "open" && outcome["linked"] == true, "{outcome:#}");
        let found = sum(outcome, "pages")? + sum(outcome, "pages_torn")? + sum(outcome, "pages_left_out")?;
        assert_eq!(found, there, "every page on the disk was found: {outcome:#}");
        ensure!(sum(outcome, "pages_torn")? + sum(outcome, "pages_left_out")? < 10, "{outcome:#}");
    }
    // Where writes in flight left gaps the lane differs from what was read, and says so.
    if sum(&outcomes[1], "pages_missing")? == 0 {
        assert_eq!(is_what_the_guest_read(machine, &files[1])?, sum(&outcomes[1], "pages")?);
    }
    ensure!(sum(&outcomes[1], "pages")? > 100, "{:#}", outcomes[1]);
    is_one_timeline(folder)
}

/// SIGKILL of record, and before it a power failure at two instants.
fn record_is_killed(machine: &Machine, server: &Server) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let recorder = Recorder { server: server.dir(), folder: folder.path() };
    let mut child = recorder.start(&format!("-e sched --dom {GUEST} -e sched -e syscalls -- sleep 1000"))?;
    await_bytes_read(machine, 1 << 20)?;
    server.await_pages("host", 1)?;
    let copies = [tempfile::tempdir()?, tempfile::tempdir()?];
    for copy in &copies {
        sleep(some_time(500));
        for name in FILES {
            copy_now(&folder.path().join(name), &copy.path().join(name))?;
        }
    }
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGKILL)?;
    child.wait()?;
    server.await_state("is free", |state| state["holder_pid"].is_null())?;
    whole_set_is_restored(machine, folder.path())?;
    for copy in copies {
        whole_set_is_restored(machine, copy.path())?;
    }
    Ok(())
}

/// The host is recorded for a while yet.
fn go_on_and_end(recorder: &Recorder, child: Child) -> Result<Recording> {
    sleep(Duration::from_secs(1));
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGINT)?;
    recorder.finish(child)
}

/// SIGKILL of the agent: what it had sent is in the file, and nothing else.
fn agent_is_killed(machine: &Machine, server: &Server) -> Result<()> {
    machine.shell("rm /tmp/tee/*.raw")?.ok()?;
    let folder = tempfile::tempdir()?;
    let recorder = Recorder { server: server.dir(), folder: folder.path() };
    let child = recorder.start(&format!("-e sched --dom {GUEST} -e sched -e syscalls -- sleep 1000"))?;
    await_bytes_read(machine, 1 << 20)?;
    machine.shell("kill -9 $(pidof vtrace)")?.ok()?;
    let recording = go_on_and_end(&recorder, child)?;
    assert_eq!(recording.status, 1, "{}", recording.said);
    let pages = is_what_the_guest_read(machine, &recording.file(GUEST))?;
    assert_eq!(pages, recording.sum(GUEST, "pages_out")?);
    is_one_timeline(folder.path())
}

fn boot(turn: &Turn, server: &Server) -> Result<Machine> {
    let builder = Machine::builder(turn, Kernel::V6_12).memory_mb(1024).without_agent();
    let machine = builder.vhost_user(&server.socket(GUEST)).boot()?;
    machine.shell("mkdir /tmp/tee; start-agent --tee /tmp/tee")?.ok()?;
    server.await_agent(GUEST)?;
    Ok(machine)
}

#[test]
fn set_whose_recorder_or_agent_was_killed_has_every_page_that_was_written() -> Result<()> {
    let server = Server::start(&[GUEST])?;
    let machine = boot(&turn()?, &server)?;
    machine.shell(LOAD)?.ok()?;
    record_is_killed(&machine, &server)?;
    agent_is_killed(&machine, &server)
}
