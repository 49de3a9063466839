//! What happens to a recording when a part of it dies, sleeps or is told to stop: what came is kept, what did not is
//! said, and the next session works.

use std::{
    fs,
    path::Path,
    process::Command,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;
use vtrace_tests::{
    disk::Disk,
    fixture::{Fixture, GUEST},
    guest::is_clear,
    judge::{Line, lines, trace_cmd, trace_cmd_newest},
    recording::Recorder,
};

fn signal(process: u32, signal: Signal) -> Result<()> {
    Ok(kill(Pid::from_raw(i32::try_from(process)?), signal)?)
}

/// A whole session, nothing lost: the guest is as good as new.
fn next_session_works(recorder: &Recorder) -> Result<()> {
    let recording = recorder.run(&format!("-e irq --dom {GUEST} -e sched -- sleep 0.5"))?.ok()?;
    assert_eq!(recording.sum(GUEST, "pages_lost")?, 0);
    recording.whole(GUEST)?;
    Ok(())
}

#[test]
fn guest_that_dies_mid_trace_leaves_what_came_and_comes_back() -> Result<()> {
    let fixture = Fixture::of(&[GUEST])?;
    let machine = fixture.boot(GUEST, 2)?;
    fixture.broken("-e sched", || machine.kill(), "went away")?;
    let _machine = fixture.boot(GUEST, 2)?;
    next_session_works(&fixture.recorder())
}

#[test]
fn agent_and_recorder_that_are_killed_are_cleaned_up_after() -> Result<()> {
    let fixture = Fixture::of(&[GUEST])?;
    let (server, recorder) = (&fixture.server, fixture.recorder());
    let machine = fixture.boot(GUEST, 2)?;
    fixture.broken("-e sched", || machine.shell("kill -9 $(pidof vtrace)")?.ok().map(drop), "agent went away")?;
    machine.shell("start-agent")?.ok()?;
    server.await_agent(GUEST)?;
    next_session_works(&recorder)?;

    let mut child = recorder.start(&format!("-e sched --dom {GUEST} -e sched -- sleep 1000"))?;
    server.await_pages(GUEST, 1)?;
    signal(child.id(), Signal::SIGKILL)?;
    child.wait()?;
    server.await_state("is free", |state| state["holder_pid"].is_null())?;
    next_session_works(&recorder)?;
    is_clear(&machine)?;
    ensure!(!fs::exists(format!("/sys/kernel/tracing/instances/vtrace-{}", child.id()))?, "the next run removes it");
    Ok(())
}

#[test]
fn server_that_is_killed_mid_trace_leaves_what_it_wrote() -> Result<()> {
    let fixture = Fixture::of(&[GUEST])?;
    let _machine = fixture.boot(GUEST, 1)?;
    fixture.broken("-e sched", || signal(fixture.server.pid(), Signal::SIGKILL), "the server went away")?;
    Ok(())
}

#[test]
fn server_that_is_stopped_mid_trace_is_given_up_and_changes_no_file_when_it_goes_on() -> Result<()> {
    let fixture = Fixture::of(&[GUEST])?;
    let server = &fixture.server;
    let machine = fixture.boot(GUEST, 2)?;
    let mut stopped = Instant::now();
    let stop = || {
        stopped = Instant::now();
        signal(server.pid(), Signal::SIGSTOP)
    };
    // 30 s, and what a busy machine adds.
    let why = format!("the server (pid {}) has not answered for 3", server.pid());
    let recording = fixture.broken("-b 64 -e sched", stop, why)?;
    ensure!(stopped.elapsed() < Duration::from_secs(42), "{:?}", stopped.elapsed());
    let before = fs::read(recording.file(GUEST))?;

    // Pages have waited for it in the guest's rings, and it has the file that was recorded to.
    signal(server.pid(), Signal::SIGCONT)?;
    server.await_state("is free", |state| state["holder_pid"].is_null())?;
    assert_eq!(machine.shell("echo alive")?.text().trim(), "alive");
    ensure!(fs::read(recording.file(GUEST))? == before, "the file is as it was");
    server.await_agent(GUEST)?;
    next_session_works(&fixture.recorder())?;
    is_clear(&machine)
}

#[test]
fn interrupt_and_timeout_end_a_recording_in_order_and_a_pause_loses_nothing() -> Result<()> {
    let fixture = Fixture::of(&[GUEST])?;
    let recorder = fixture.recorder();
    let machine = fixture.boot(GUEST, 2)?;

    let child = recorder.start(&format!("-e irq --dom {GUEST} -e sched"))?;
    fixture.server.await_pages(GUEST, 1)?;
    let second = recorder.run(&format!("--dom {GUEST} -e irq -- true"))?;
    ensure!(second.status == 1 && second.said.contains("another recording writes to it"), "{}", second.said);
    let elsewhere = tempfile::tempdir()?;
    let second = fixture.recorder_in(elsewhere.path()).run(&format!("--dom {GUEST} -e irq -- true"))?;
    ensure!(second.status == 1 && second.said.contains("is recording it"), "{}", second.said);
    ensure!(second.said.contains(&child.id().to_string()), "it says who holds it: {}", second.said);
    machine.qmp("stop", &json!(null))?;
    sleep(Duration::from_secs(2));
    machine.qmp("cont", &json!(null))?;
    sleep(Duration::from_secs(1));
    let recording = recorder.interrupt(child)?.ok()?;
    assert_eq!(recording.sum(GUEST, "pages_lost")? + recording.sum(GUEST, "events_lost")?, 0);
    recording.whole(GUEST)?;

    recorder.run(&format!("--timeout 1 --dom {GUEST} -e sched"))?.ok()?.whole(GUEST)?;
    let status = recorder.run(&format!("--dom {GUEST} -e sched -- false"))?.status;
    assert_eq!(status, 1, "the command's own");
    Ok(())
}

#[test]
fn disk_that_fills_mid_trace_ends_in_whole_files_and_a_true_ledger() -> Result<()> {
    let (disk, fixture) = (Disk::tmpfs(4 << 20)?, Fixture::of(&[GUEST])?);
    let machine = fixture.boot(GUEST, 1)?;
    machine.shell("(while :; do :; done) </dev/null >/dev/null 2>&1 &")?.ok()?;
    let words = format!("--no-kallsyms -e irq --dom {GUEST} -e all -- sleep 4");
    let recording = fixture.recorder_in(disk.path()).run(&words)?;
    assert_eq!(recording.status, 1, "{}\n{:#}", recording.said, recording.summary);
    assert!(
        recording.remarks(GUEST)?.contains("could not be written: No space left on device"),
        "{:#}",
        recording.summary
    );
    let [pages_in, pages_out, lost] = ["pages_in", "pages_out", "pages_lost"].map(|name| recording.sum(GUEST, name));
    let (pages_in, pages_out, lost) = (pages_in?, pages_out?, lost?);
    assert_eq!(pages_in, pages_out + lost);
    assert!(lost > 0);
    recording.whole(GUEST)?;
    assert_eq!(machine.shell("true")?.status, 0, "the guest is not held up");
    Ok(())
}

#[test]
fn two_guests_and_the_host_are_one_timeline() -> Result<()> {
    let fixture = Fixture::of(&[GUEST, "guest2"])?;
    let recorder = fixture.recorder();
    let _machines = [fixture.boot(GUEST, 1)?, fixture.boot("guest2", 1)?];
    let words = format!("-e sched --dom {GUEST} -e sched --dom guest2 -e irq -e sched -- sleep 1");
    let recording = recorder.run(&words)?.ok()?;
    let files = ["host", GUEST, "guest2"].map(|name| recording.file(name));
    let files: Vec<&Path> = files.iter().map(AsRef::as_ref).collect();
    let report = lines(&trace_cmd(&["report", "--ts-check"], &files)?);
    for (name, file) in ["host", GUEST, "guest2"].iter().zip(&files) {
        let file = file.file_name().context("a file has a name")?.to_string_lossy().into_owned();
        let shown = report.iter().filter(|line| line.file.as_deref() == Some(&file)).count();
        assert_eq!(u64::try_from(shown)?, recording.sum(name, "events")?, "{name}");
    }
    two_sessions_at_once(&fixture)?;
    instance_of_a_guest_has_its_name_and_the_hosts_times(&recorder)
}

/// No stock reader shifts the times of a guest's instance, so its pages have the host's.
fn instance_of_a_guest_has_its_name_and_the_hosts_times(recorder: &Recorder) -> Result<()> {
    for form in ["", "--compression zstd", "--file-version 6"] {
        let words = format!("{form} -e sched --dom {GUEST} -B irqs -e irq -e sched --dom guest2 -e irq -- sleep 1");
        let recording = recorder.run(&words)?.ok()?;
        let [host, guest] = ["host", GUEST].map(|name| recording.file(name));
        for report in
            [trace_cmd(&["report", "-t"], &[&host, &guest])?, trace_cmd_newest(&["report", "-t"], &[&host, &guest])?]
        {
            let report = lines(&report);
            let of_guest: Vec<&Line> = report.iter().filter(|line| line.file.as_deref() == Some("irqs")).collect();
            assert_eq!(u64::try_from(of_guest.len())?, recording.sum(GUEST, "events")?, "{form}");
            let marker = |words: &str| {
                let wanted = format!("vtrace: {words} {}", recording.summary["session"].as_str().unwrap_or("none"));
                let found = report.iter().find(|line| line.fields.ends_with(&wanted));
                found.with_context(|| format!("{form}: no {wanted:?}"))
            };
            let [before, common, after] = ["common before guests", "common", "common after guests"].map(marker);
            let (before, common, after) = (before?, common?, after?);
            assert_eq!(common.file.as_deref(), Some("irqs"));
            assert!((before.time..=after.time).contains(&common.time), "{form}: {before:?} {common:?} {after:?}");
        }
        let mut check = Command::new(xtask::build::vtrace()?);
        let said = check.args(["check", "--json"]).args([&host, &guest]).output()?;
        ensure!(said.status.success(), "{form}: {}", String::from_utf8_lossy(&said.stdout));
    }
    Ok(())
}

/// Each guest has one of its own; a third on one of them is told who has it, and changes nothing.
fn two_sessions_at_once(fixture: &Fixture) -> Result<()> {
    let folders = [tempfile::tempdir()?, tempfile::tempdir()?, tempfile::tempdir()?];
    let [first, second, third] = [0, 1, 2].map(|at: usize| fixture.recorder_in(folders[at].path()));
    let words = |guest| format!("-e sched --dom {guest} -e sched -- sleep 4");
    let held = |guest: &str, pid: u32| {
        fixture.server.await_state("is held", |state| state["name"] == guest && state["holder_pid"] == pid)
    };
    let of_first = first.start(&words(GUEST))?;
    held(GUEST, of_first.id())?;
    let of_second = second.start(&words("guest2"))?;
    held("guest2", of_second.id())?;
    for (guest, holder) in [(GUEST, &of_first), ("guest2", &of_second)] {
        let refused = third.run(&words(guest))?;
        let who = format!("process {} of user 0 is recording it", holder.id());
        ensure!(refused.status == 1 && refused.said.contains(&who), "{}", refused.said);
    }
    ensure!(fs::read_dir(third.folder)?.next().is_none(), "one that is refused leaves nothing");
    for (recorder, child, guest) in [(first, of_first, GUEST), (second, of_second, "guest2")] {
        let recording = recorder.finish(child)?.ok()?;
        for machine in ["host", guest] {
            let shown = lines(&trace_cmd(&["report"], &[&recording.file(machine)])?).len();
            assert_eq!(u64::try_from(shown)?, recording.sum(machine, "events")?, "{machine}");
            assert_eq!(recording.sum(machine, "pages_lost")?, 0);
        }
    }
    Ok(())
}
