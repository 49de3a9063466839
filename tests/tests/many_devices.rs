//! A guest whose CPUs have their ports on two devices is one guest: to `record`, to its file, and to stock tools.

use std::fs::File;

use anyhow::{Context, Result, ensure};
use vtrace_common::ids::Cpu;
use vtrace_dp::trace::read::{Reader, input::FileSource};
use vtrace_tests::{
    judge::{lines, trace_cmd},
    recording::{Recorder, Recording},
    server::Server,
};
use xtask::{
    kernel::Kernel,
    machine::{Machine, turn},
};

const GUEST: &str = "guest1";
/// A task on each CPU that sleeps and wakes.
const LOAD: &str = "for mask in 1 2 4 8; do \
     taskset $mask sh -c 'while :; do sleep 0.01; done' </dev/null >/dev/null 2>&1 & done";

#[test]
fn guest_with_two_devices_is_recorded_whole() -> Result<()> {
    let turn = turn()?;
    let folder = tempfile::tempdir()?;
    let server = Server::start_with(&["--dom", GUEST, "--devices", "2", "--lanes-per-device", "2"])?;
    let builder = Machine::builder(&turn, Kernel::V6_12).cpus(4).without_agent();
    let machine = builder.vhost_user_devices(&server.socket(GUEST), 2).boot()?;
    ports_are_on_two_devices(&machine)?;
    machine.shell("mkdir /tmp/tee; start-agent --tee /tmp/tee")?.ok()?;
    server.await_agent(GUEST)?;
    let pid = machine.pid()?;
    server.await_state("has both devices", |state| {
        state["vmm_pid"] == pid && state["further"][0]["vmm_pid"] == pid && state["further"][0]["driver"] == "Running"
    })?;
    machine.shell(LOAD)?.ok()?;
    let recorder = Recorder { server: server.dir(), folder: folder.path() };
    let recording = recorder.run(&format!("-e sched --dom {GUEST} -e sched -- sleep 2"))?.ok()?;
    nothing_is_lost_on_any_lane(&recording)?;
    lanes_are_what_the_guest_read(&machine, &recording)?;
    stock_tools_read_every_event(&recording)
}

fn ports_are_on_two_devices(machine: &Machine) -> Result<()> {
    let said = machine.shell("cd /sys/class/virtio-ports && for p in *; do echo $(cat $p/name) ${p%p*}; done")?.ok()?;
    let device = |name: &str| {
        let line = said.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map(str::to_owned).with_context(|| format!("{name} is a port: {said}"))
    };
    let first = device("agent-ctl-path")?;
    let devices = (0..4).map(|cpu| device(&format!("trace-path-cpu{cpu}"))).collect::<Result<Vec<_>>>()?;
    ensure!(devices[..2] == [first.clone(), first.clone()], "{said}");
    ensure!(devices[2] == devices[3] && devices[2] != first, "{said}");
    ensure!(said.lines().count() == 5, "no other ports: {said}");
    Ok(())
}

fn nothing_is_lost_on_any_lane(recording: &Recording) -> Result<()> {
    let lanes = recording.machine(GUEST)?["lanes"].as_array().context("a machine has lanes")?;
    assert_eq!(lanes.len(), 4);
    for lane in lanes {
        assert!(lane["pages_in"].as_u64() > Some(0), "each lane carried pages: {lane}");
        assert_eq!((&lane["pages_in"], lane["pages_lost"].as_u64()), (&lane["pages_out"], Some(0)), "{lane}");
        assert_eq!(lane["events_lost"].as_u64(), Some(0), "{lane}");
    }
    Ok(())
}

/// The agent's copy of each lane is as long as the lane in the file, and its bytes are the same.
fn lanes_are_what_the_guest_read(machine: &Machine, recording: &Recording) -> Result<()> {
    let path = recording.file(GUEST);
    let reader = Reader::open(FileSource::new(File::open(&path)?)?)?;
    let buffer = reader.top().context("a file has a top buffer")?;
    assert_eq!(buffer.lanes.iter().map(|lane| lane.cpu).collect::<Vec<_>>(), [0, 1, 2, 3].map(Cpu));
    for lane in &buffer.lanes {
        let said = machine.shell(&format!("sha256sum < /tmp/tee/{}.raw", lane.cpu))?.ok()?;
        let ours = std::process::Command::new("sh")
            .args(["-c", "tail -c +$(($1 + 1)) \"$0\" | head -c $2 | sha256sum"])
            .arg(&path)
            .args([lane.offset.to_string(), lane.bytes.to_string()])
            .output()?;
        assert_eq!(said.trim(), String::from_utf8_lossy(&ours.stdout).trim(), "{}", lane.cpu);
    }
    Ok(())
}

fn stock_tools_read_every_event(recording: &Recording) -> Result<()> {
    let (host, guest) = (recording.file("host"), recording.file(GUEST));
    let said = trace_cmd(&["dump", "--validate"], &[&guest])?;
    assert!(said.contains("is a valid trace-cmd file"), "{said}");
    let events = lines(&trace_cmd(&["report"], &[&guest])?);
    assert_eq!(u64::try_from(events.len())?, recording.sum(GUEST, "events")?);
    for cpu in (0..4).map(Cpu) {
        assert!(events.iter().any(|line| line.cpu == cpu), "{cpu}");
    }
    let said = trace_cmd(&["report", "--ts-check"], &[&host, &guest])?;
    assert!(!said.contains("WARNING") && !said.contains("backwards"), "{said}");
    Ok(())
}
