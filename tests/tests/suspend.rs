//! Guests that sleep (suspend to RAM) or are paused while they are recorded, over our device and over QEMU's own.

use std::{
    path::Path,
    process::{Child, Command},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use vtrace_tests::{
    judge::{lines, trace_cmd},
    recording::{Recorder, Recording},
    server::Server,
    transport,
};
use xtask::{
    kernel::Kernel,
    machine::{Machine, turn},
    qemu::{Qemu, Release},
};

const GUEST: &str = "guest1";
/// Tasks that start and end, sleep and wake, on every CPU of the guest.
const LOAD: &str = "for i in 1 2; do (while :; do sleep 0.01; done) </dev/null >/dev/null 2>&1 & done";
/// How long a guest sleeps or is paused.
const ASLEEP: Duration = Duration::from_millis(1500);
/// How long a guest is paused whose silence shows: longer than a server waits for an agent that has no session.
const PAUSED: Duration = Duration::from_secs(23);
/// How long it is recorded before and after that.
const AWAKE: Duration = Duration::from_millis(700);

/// A recording of the busy guest that is under way.
fn start(machine: &Machine, recorder: &Recorder) -> Result<Child> {
    let child = recorder.start(&format!("--dom {GUEST} -b 64 -e sched -e timer"))?;
    let traces = "grep -qs 1 /sys/kernel/tracing/instances/*/tracing_on";
    machine.shell(&format!("for i in $(seq 300); do {traces} && exit 0; sleep 0.1; done; exit 1"))?.ok()?;
    sleep(AWAKE);
    Ok(child)
}

fn stop(recorder: &Recorder, child: Child) -> Result<Recording> {
    sleep(AWAKE);
    recorder.interrupt(child)?.ok()
}

/// The guest suspends itself to RAM, its devices lose all they knew, and the host wakes it. It says so itself: what its
/// serial port is sent before it is awake is lost.
fn sleeps(machine: &Machine) -> Result<()> {
    let suspend = "(sleep 0.1; echo mem >/sys/power/state && echo awake again >/dev/console)";
    machine.shell(&format!("{suspend} </dev/null >/dev/null 2>&1 &"))?.ok()?;
    machine.qmp_event("SUSPEND", Duration::from_secs(20)).context("it does not fall asleep")?;
    sleep(ASLEEP);
    machine.qmp("system_wakeup", &Value::Null)?;
    for _ in 0..200 {
        if machine.console().contains("awake again") {
            return Ok(());
        }
        sleep(Duration::from_millis(100));
    }
    bail!("it does not wake up: {}", machine.console());
}

/// Every event that the guest's kernel gave out is in the file, and nothing was lost. Gives their times.
fn whole(recording: &Recording) -> Result<Vec<u64>> {
    for counter in ["pages_lost", "events_lost", "bytes_missing"] {
        assert_eq!(recording.sum(GUEST, counter)?, 0, "{counter}: {:#}", recording.summary);
    }
    let report = lines(&trace_cmd(&["report", "-t", "--ts-check"], &[&recording.file(GUEST)])?);
    assert_eq!(u64::try_from(report.len())?, recording.sum(GUEST, "events")?, "{:#}", recording.summary);
    Ok(report.iter().map(|line| line.time).collect())
}

/// The longest time without an event is the sleep, and there are events on both sides of it.
fn there_is_a_gap(times: &[u64]) -> Result<()> {
    let gaps = times.windows(2).map(|pair| pair[1].saturating_sub(pair[0]));
    let (before, gap) = gaps.enumerate().max_by_key(|(_, gap)| *gap).context("events")?;
    let gap = Duration::from_nanos(gap);
    ensure!(gap >= ASLEEP && gap < 10 * ASLEEP, "asleep for {gap:?}");
    ensure!(before > 50 && times.len() - before > 50, "{before} of {} events before that", times.len());
    Ok(())
}

/// A recording over a sleep: whole, with the sleep as a gap in it.
fn sleeps_while_recorded(machine: &Machine, recorder: &Recorder) -> Result<Recording> {
    let child = start(machine, recorder)?;
    sleeps(machine)?;
    let recording = stop(recorder, child)?;
    there_is_a_gap(&whole(&recording)?)?;
    Ok(recording)
}

/// What `vtrace status --json` shows of the guest in the recording under way.
fn shown(server: &Server) -> Result<Value> {
    let mut command = Command::new(xtask::build::vtrace()?);
    let output = command.args(["status", "--json", "--dir"]).arg(server.dir()).output()?;
    let status: Value = serde_json::from_slice(&output.stdout)?;
    Ok(status[0]["state"]["progress"]["machines"][1].clone())
}

/// A recording over a pause after which a stream without a session would be taken for dead: it goes on, nothing is lost,
/// and meanwhile and in the end everyone is told.
fn is_paused_for_long_while_recorded(machine: &Machine, server: &Server, recorder: &Recorder) -> Result<()> {
    let child = start(machine, recorder)?;
    machine.qmp("stop", &Value::Null)?;
    sleep(PAUSED);
    let silent = shown(server)?["silent_s"].as_u64().context("how long it is silent")?;
    let listed = server.list()?[0]["silent_s"].as_u64().context("how long it is silent")?;
    machine.qmp("cont", &Value::Null)?;
    let pages = shown(server)?["pages_out"].as_u64();
    for _ in 0..100 {
        sleep(Duration::from_millis(100));
        let now = shown(server)?;
        if now["silent_s"] == 0 && now["pages_out"].as_u64() > pages {
            break;
        }
    }
    let recording = stop(recorder, child)?;
    let events = whole(&recording)?.len();
    ensure!(events > 100, "{events} events: {:#}", recording.summary);
    let least = PAUSED.as_secs() - 3;
    ensure!(silent >= least && listed >= least, "silent for {silent} s and {listed} s: {}", server.log());
    let guest = recording.machine(GUEST)?;
    ensure!(guest["silence_ms_max"].as_u64() >= Some(1000 * least), "{guest:#}");
    ensure!(guest["remarks"].to_string().contains("its agent did not answer for 2"), "{guest:#}");
    ensure!(server.log().contains("its session waits"), "{}", server.log());
    Ok(())
}

/// `vtrace doctor` asks this QEMU, finds a port for every CPU, and that they lead to the server.
fn doctor_sees_its_ports(server: &Server, qmp: &Path) -> Result<()> {
    let mut command = Command::new(xtask::build::vtrace()?);
    command.args(["doctor", "-o", "/tmp", "--dom", GUEST, "--qmp"]).arg(qmp).arg("--dir").arg(server.dir());
    let said = String::from_utf8(command.output()?.stdout)?;
    ensure!(said.contains("running, emulated (TCG)"), "{said}");
    ensure!(said.contains("ok   guest1         QEMU's own ports: ports for 2 CPUs, 2 CPUs"), "{said}");
    Ok(())
}

fn next_recording_works(server: &Server, recorder: &Recorder) -> Result<()> {
    server.await_agent(GUEST)?;
    let recording = recorder.run(&format!("--dom {GUEST} -e sched -- true"))?.ok()?;
    assert_eq!(recording.sum(GUEST, "pages_lost")?, 0);
    Ok(())
}

#[test]
fn guest_that_sleeps_or_is_paused_while_it_is_recorded_goes_on_and_loses_nothing() -> Result<()> {
    let (turn, folder) = (turn()?, tempfile::tempdir()?);
    let server = Server::start(&[GUEST])?;
    let recorder = Recorder { server: server.dir(), folder: folder.path() };
    let machine = Machine::builder(&turn, Kernel::V6_12).vhost_user(&server.socket(GUEST)).boot()?;
    server.await_agent(GUEST)?;
    machine.shell(LOAD)?.ok()?;

    // The emulated TSC goes on while it sleeps: the times on both sides are right.
    let recording = sleeps_while_recorded(&machine, &recorder)?;
    assert_eq!(recording.machine(GUEST)?["clock"]["steady"], true, "{:#}", recording.summary);
    ensure!(server.log().contains("the guest was asleep; its agent goes on"), "{}", server.log());

    // It stands still while it is paused: no times are right on both sides, and how wrong they can be is said.
    let child = start(&machine, &recorder)?;
    machine.qmp("stop", &Value::Null)?;
    sleep(ASLEEP);
    machine.qmp("cont", &Value::Null)?;
    let recording = stop(&recorder, child)?;
    ensure!(whole(&recording)?.len() > 100, "{:#}", recording.summary);
    let clock = &recording.machine(GUEST)?["clock"];
    assert_eq!(clock["steady"], false, "{clock}");
    let bound = Duration::from_nanos(clock["bound_ns"].as_u64().context("a bound")?);
    ensure!(2 * bound >= ASLEEP && bound < 10 * ASLEEP, "{clock}");

    next_recording_works(&server, &recorder)
}

#[test]
fn guest_that_sleeps_or_is_paused_for_long_goes_on_over_qemus_own_ports_too() -> Result<()> {
    let (turn, folder, root) = (turn()?, tempfile::tempdir()?, tempfile::tempdir()?);
    let (major, minor) = Qemu::unpack(Release::Middle)?.version()?;
    let words =
        transport::set_up(root.path(), GUEST, &format!("--cpus 2 --qemu-version {major}.{minor} --transport socket"))?;
    let server = Server::start_with(&["--root", root.path().to_str().context("a path of text")?, "--dom", GUEST])?;
    let recorder = Recorder { server: server.dir(), folder: folder.path() };
    let qmp = root.path().join("qmp.sock");
    let option = format!("unix:{},server=on,wait=off", qmp.display());
    let words: Vec<&str> = words.iter().map(String::as_str).chain(["-qmp", &option]).collect();
    let machine = Machine::builder(&turn, Kernel::V6_12).qemu(Release::Middle).arguments(&words).boot()?;
    server.await_agent(GUEST)?;
    machine.shell(LOAD)?.ok()?;

    doctor_sees_its_ports(&server, &qmp)?;

    sleeps_while_recorded(&machine, &recorder)?;
    is_paused_for_long_while_recorded(&machine, &server, &recorder)?;
    next_recording_works(&server, &recorder)
}
