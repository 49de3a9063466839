//! CPU hotplug in a guest while it is recorded: CPUs go offline, come back and are added.

use std::{process::Child, thread::sleep, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vtrace_common::ids::Cpu;
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

/// A recording of the guest that is under way.
fn start(server: &Server, recorder: &Recorder) -> Result<Child> {
    let child = recorder.start(&format!("--dom {GUEST} -e sched -e timer"))?;
    server.await_state("is held", |state| !state["holder_pid"].is_null())?;
    sleep(Duration::from_secs(3));
    Ok(child)
}

fn online(machine: &Machine, cpu: u32, state: u8) -> Result<()> {
    machine.shell(&format!("echo {state} >/sys/devices/system/cpu/cpu{cpu}/online"))?.ok()?;
    Ok(())
}

/// A CPU that came while the recording went on: nothing of it is lost, and it begins after the others.
fn is_recorded_late(recording: &Recording, cpu: u32) -> Result<()> {
    let lanes = recording.machine(GUEST)?["lanes"].as_array().context("a machine has lanes")?;
    let lane = lanes.iter().find(|lane| lane["cpu"] == cpu).context("it has a lane")?;
    let [pages_in, pages_out, events] =
        ["pages_in", "pages_out", "events"].map(|counter| lane[counter].as_u64().unwrap_or(0));
    ensure!(pages_out > 0 && pages_in == pages_out && lane["events_lost"] == 0, "{lane:#}");
    let first = *events_of(recording, 0)?.first().context("events of CPU 0")?;
    let times = events_of(recording, cpu)?;
    ensure!(times.is_sorted() && u64::try_from(times.len())? == events, "{} events in the file: {lane:#}", times.len());
    ensure!(times[0] > first + 1_000_000_000, "cpu{cpu} came at {}, cpu0 at {first}", times[0]);
    Ok(())
}

/// The CPUs that the closing table has a line for.
fn lanes(recording: &Recording) -> Result<Vec<u64>> {
    let lanes = recording.machine(GUEST)?["lanes"].as_array().context("a machine has lanes")?;
    Ok(lanes.iter().filter_map(|lane| lane["cpu"].as_u64()).collect())
}

/// Events of a CPU as stock trace-cmd reads them.
fn events_of(recording: &Recording, cpu: u32) -> Result<Vec<u64>> {
    let report = lines(&trace_cmd(&["report", "-t"], &[&recording.file(GUEST)])?);
    Ok(report.iter().filter(|line| line.cpu == Cpu(cpu)).map(|line| line.time).collect())
}

#[test]
fn cpus_that_go_and_come_while_recording_are_recorded_or_counted() -> Result<()> {
    let (turn, folder) = (turn()?, tempfile::tempdir()?);
    // Over sockets: the other test has our device.
    let root = tempfile::tempdir()?;
    let (major, minor) = Qemu::unpack(Release::Newest)?.version()?;
    let words = format!("--cpus 2 --qemu-version {major}.{minor} --transport socket");
    let words = transport::set_up(root.path(), GUEST, &words)?;
    let words: Vec<&str> = words.iter().map(String::as_str).chain(["-smp", "3"]).collect();
    let server = Server::start_with(&["--root", root.path().to_str().context("a path of text")?, "--dom", GUEST])?;
    let recorder = Recorder { server: server.dir(), folder: folder.path() };
    let builder = Machine::builder(&turn, Kernel::V6_12).cpus(2).append("maxcpus=2");
    let machine = builder.arguments(&words).boot()?;
    server.await_agent(GUEST)?;

    // One goes and comes back: it is on both sides of the gap in one file.
    let child = start(&server, &recorder)?;
    online(&machine, 1, 0)?;
    sleep(Duration::from_secs(1));
    online(&machine, 1, 1)?;
    sleep(Duration::from_secs(1));
    let recording = recorder.interrupt(child)?.ok()?;
    assert_eq!(recording.sum(GUEST, "pages_lost")?, 0);
    let times = events_of(&recording, 1)?;
    let gap = times.windows(2).map(|pair| pair[1].saturating_sub(pair[0])).max().context("events")?;
    ensure!(times.len() > 20 && gap > 500_000_000, "{} events, the longest gap {gap} ns", times.len());

    // One goes and stays away: what it had recorded is there, and the guest's part is a success.
    let child = start(&server, &recorder)?;
    online(&machine, 1, 0)?;
    let recording = recorder.interrupt(child)?.ok()?;
    ensure!(events_of(&recording, 1)?.len() > 5, "what came before");
    assert_eq!(recording.sum(GUEST, "pages_lost")?, 0);

    // Two come that were not there at the start. One has a port, and is recorded from then on. The other has none: no source
    // can have its pages, so they are counted and said.
    let child = start(&server, &recorder)?;
    online(&machine, 1, 1)?;
    online(&machine, 2, 1)?;
    load_on(&machine, 1)?;
    load_on(&machine, 2)?;
    let recording = recorder.interrupt(child)?.ok()?;
    let remarks = recording.machine(GUEST)?["remarks"].to_string();
    ensure!(remarks.contains("cpu2 came online after the start: its "), "{remarks}\n{:#}", recording.summary);
    ensure!(!remarks.contains("cpu1"), "{remarks}");
    ensure!(recording.sum(GUEST, "events_lost")? > 0, "{:#}", recording.summary);
    is_recorded_late(&recording, 1)?;

    // Its device has no port for it: that is what the next recording says.
    let refused = recorder.run(&format!("--dom {GUEST} -e sched -- true"))?;
    ensure!(refused.status == 1 && refused.said.contains("trace-path-cpu2 has no data port"), "{}", refused.said);
    online(&machine, 2, 0)?;
    recorder.run(&format!("--dom {GUEST} -e sched -- true"))?.ok()?;
    Ok(())
}

/// Plugs in a CPU as a person does over QMP, and waits until the guest has it.
fn plug_in(machine: &Machine) -> Result<()> {
    let slots = machine.qmp("query-hotpluggable-cpus", &json!({}))?;
    let mut slots = slots.as_array().context("a list of slots")?.iter();
    let free = slots.find(|slot| slot["qom-path"].is_null()).context("no slot is free")?;
    let mut about = free["props"].clone();
    (about["driver"], about["id"]) = (free["type"].clone(), json!("late"));
    machine.qmp("device_add", &about)?;
    machine.shell("until [ -e /sys/devices/system/cpu/cpu2/online ]; do sleep 0.1; done")?.ok()?;
    online(machine, 2, 1)
}

fn load_on(machine: &Machine, cpu: u32) -> Result<()> {
    let mask = 1 << cpu;
    machine.shell(&format!("for i in 1 2 3 4 5 6 7 8; do taskset {mask} sleep 0.05; done; sleep 1"))?.ok()?;
    Ok(())
}

#[test]
fn cpu_that_is_plugged_in_is_recorded_from_then_on_and_may_be_pulled_out_meanwhile() -> Result<()> {
    let (turn, folder) = (turn()?, tempfile::tempdir()?);
    let server = Server::start(&[GUEST])?;
    let recorder = Recorder { server: server.dir(), folder: folder.path() };
    // Newer kernels take CPUs late from a hypervisor only, and an emulated machine has none.
    let builder = Machine::builder(&turn, Kernel::V6_1).cpus(3).arguments(&["-smp", "2,maxcpus=3"]);
    let machine = builder.vhost_user(&server.socket(GUEST)).boot()?;
    server.await_agent(GUEST)?;

    // Its port is there, the CPU is not: the host cannot see that.
    let recording = recorder.run(&format!("--dom {GUEST} -e sched -- true"))?.ok()?;
    assert_eq!((lanes(&recording)?, recording.machine(GUEST)?["clock"]["vcpus"].as_u64()), (vec![0, 1], Some(2)));
    ensure!(events_of(&recording, 0)?.len() > 1, "stock trace-cmd reads it");

    let child = start(&server, &recorder)?;
    plug_in(&machine)?;
    load_on(&machine, 2)?;
    let recording = recorder.interrupt(child)?.ok()?;
    is_recorded_late(&recording, 2)?;
    assert_eq!((lanes(&recording)?, recording.machine(GUEST)?["clock"]["vcpus"].as_u64()), (vec![0, 1, 2], Some(3)));
    assert_eq!(recording.sum(GUEST, "pages_lost")? + recording.sum(GUEST, "events_lost")?, 0);

    let child = start(&server, &recorder)?;
    load_on(&machine, 2)?;
    let recording = recorder.interrupt(child)?.ok()?;
    ensure!(events_of(&recording, 2)?.len() > 16, "{:#}", recording.summary);
    assert_eq!(recording.sum(GUEST, "pages_lost")? + recording.sum(GUEST, "events_lost")?, 0);

    let child = start(&server, &recorder)?;
    load_on(&machine, 2)?;
    machine.qmp("device_del", &json!({ "id": "late" }))?;
    machine.shell("while [ -e /sys/devices/system/cpu/cpu2/online ]; do sleep 0.1; done")?.ok()?;
    let recording = recorder.interrupt(child)?.ok()?;
    ensure!(events_of(&recording, 2)?.len() > 16, "what came before: {:#}", recording.summary);
    assert_eq!(recording.sum(GUEST, "pages_lost")?, 0);
    recorder.run(&format!("--dom {GUEST} -e sched -- true"))?.ok()?;
    Ok(())
}
