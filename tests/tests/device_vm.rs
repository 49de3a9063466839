//! The device under real guests: what Linux's own driver makes of it, and what QEMU does with it in its life.

use std::{
    fs::{File, OpenOptions},
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use serde_json::json;
use vtrace_common::{
    ids::Cpu,
    wire::{
        agent::{Arm, FromAgent, ToAgent},
        client::{Area, DriverState, FromServer, Gone, GuestState, Lanes, Refusal, ToServer},
    },
};
use vtrace_dp::server::{GuestConfig, GuestSocket, Server, ServerConfig, link::Link};
use xtask::{
    kernel::Kernel,
    machine::{Builder, Machine, Turn, turn},
};

const PATIENCE: Duration = Duration::from_secs(60);
const NAMES: &str = "cat /sys/class/virtio-ports/*/name | sort";
/// Opens a lane's port, writes a line, closes it. A device that does not serve its rings hangs it.
const ECHO: &str = "for port in /sys/class/virtio-ports/*; do \
                    grep -q cpu0 $port/name && timeout 20 sh -c \"echo page >/dev/${port##*/}\" && echo wrote; done; true";

/// A server of `guest1` in this process.
struct House {
    server: Option<Server>,
    folder: tempfile::TempDir,
    turn: Turn,
}

impl House {
    fn new() -> Result<Self> {
        let turn = turn()?;
        let folder = tempfile::tempdir()?;
        let guests = vec![GuestConfig::new("guest1", GuestSocket::InDirectory)];
        let config = ServerConfig { directory: folder.path().into(), guests, ..ServerConfig::default() };
        let server = Some(Server::start(&config)?);
        Ok(Self { server, folder, turn })
    }

    fn builder(&self, kernel: Kernel) -> Builder {
        Machine::builder(&self.turn, kernel).vhost_user(&self.folder.path().join("guest1.sock"))
    }

    fn state(&self) -> GuestState {
        self.server.as_ref().expect("until it is dropped").guests()[0].state()
    }

    fn await_state(&self, what: &str, is_so: impl Fn(&GuestState) -> bool) -> Result<GuestState> {
        let until = Instant::now() + PATIENCE;
        while !is_so(&self.state()) {
            ensure!(Instant::now() < until, "not {what}: {:?}", self.state());
            sleep(Duration::from_millis(20));
        }
        Ok(self.state())
    }

    fn await_agent(&self) -> Result<GuestState> {
        self.await_state("an agent", |state| state.agent.as_ref().is_some_and(|agent| agent.machine.is_some()))
    }

    fn link(&self) -> Result<Link> {
        Ok(Link::connect(self.folder.path())?)
    }
}

impl Drop for House {
    fn drop(&mut self) {
        self.server.take().expect("dropped once").stop();
    }
}

fn ports_work(machine: &Machine) -> Result<()> {
    assert_eq!(machine.shell(NAMES)?.text(), "agent-ctl-path\ntrace-path-cpu0\ntrace-path-cpu1");
    assert_eq!(machine.shell(ECHO)?.text(), "wrote");
    let complaints = machine.shell("dmesg | grep -E 'soft lockup|rcu.*stall|BUG:'; true")?;
    assert_eq!(complaints.text(), "");
    Ok(())
}

fn driver_runs(kernel: Kernel) -> Result<()> {
    let house = House::new()?;
    let machine = house.builder(kernel).without_agent().boot()?;
    let state = house.await_state("running", |state| state.driver == DriverState::Running)?;
    assert_eq!(state.vmm_pid, Some(machine.pid()?));
    ports_work(&machine)
}

#[test]
fn driver_of_6_1_finds_ports_that_can_be_written() -> Result<()> {
    driver_runs(Kernel::V6_1)
}

#[test]
fn driver_of_6_12_finds_ports_that_can_be_written() -> Result<()> {
    driver_runs(Kernel::V6_12)
}

#[test]
fn newest_driver_finds_ports_that_can_be_written() -> Result<()> {
    driver_runs(Kernel::Newest)
}

#[test]
fn stopped_reset_and_rebound_driver_finds_its_ports_again() -> Result<()> {
    let house = House::new()?;
    let machine = house.builder(Kernel::V6_12).without_agent().reboots().boot()?;
    for _ in 0..3 {
        machine.qmp("stop", &json!(null))?;
        house.await_state("stopped", |state| state.driver == DriverState::Absent)?;
        machine.qmp("cont", &json!(null))?;
        house.await_state("running", |state| state.driver == DriverState::Running)?;
        ports_work(&machine)?;
    }
    for _ in 0..2 {
        machine.reset()?;
        ports_work(&machine)?;
    }
    let rebind = "cd /sys/bus/virtio/drivers/virtio_console && device=$(ls -d virtio*) && \
                  echo $device >unbind && ls /sys/class/virtio-ports && echo $device >bind && sleep 1";
    for _ in 0..3 {
        assert_eq!(machine.shell(rebind)?.ok()?, "", "no port is left without a driver");
        ports_work(&machine)?;
    }
    Ok(())
}

#[test]
fn killed_guest_is_gone_and_the_next_one_is_served() -> Result<()> {
    let house = House::new()?;
    for _ in 0..2 {
        let machine = house.builder(Kernel::V6_12).without_agent().boot()?;
        ports_work(&machine)?;
        machine.kill()?;
        house.await_state("gone", |state| state.vmm_pid.is_none() && state.driver == DriverState::Absent)?;
    }
    Ok(())
}

#[test]
fn memory_that_is_not_shared_is_named() -> Result<()> {
    let house = House::new()?;
    let machine = house.builder(Kernel::V6_12).without_agent().private_memory().start()?;
    house.await_state("told", |state| state.driver == DriverState::MemoryNotShared)?;
    machine.kill()
}

#[test]
fn device_comes_to_a_running_guest_and_goes() -> Result<()> {
    let house = House::new()?;
    let machine = Machine::builder(&house.turn, Kernel::V6_12).without_agent().hot_plug().boot()?;
    let socket = house.folder.path().join("guest1.sock");
    for _ in 0..2 {
        let address = json!({ "type": "unix", "data": { "path": socket } });
        let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
        machine.qmp("chardev-add", &json!({ "id": "vuc", "backend": backend }))?;
        machine.qmp(
            "device_add",
            &json!({ "driver": "vhost-user-test-device-pci", "id": "vu", "bus": "rp0", "chardev": "vuc",
                     "virtio-id": 3, "num_vqs": 8, "vq_size": 128, "config_size": 12 }),
        )?;
        house.await_state("running", |state| state.driver == DriverState::Running)?;
        machine.shell("until [ $(ls /sys/class/virtio-ports | wc -l) = 3 ]; do sleep 0.1; done; sleep 0.5")?.ok()?;
        ports_work(&machine)?;
        machine.qmp("device_del", &json!({ "id": "vu" }))?;
        machine.qmp_event("DEVICE_DELETED", PATIENCE)?;
        remove_chardev(&machine)?;
        house.await_state("gone", |state| state.vmm_pid.is_none())?;
    }
    Ok(())
}

/// QEMU still finishes the device when it says that it is gone, and keeps its chardev until then.
fn remove_chardev(machine: &Machine) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    while let Err(error) = machine.qmp("chardev-remove", &json!({ "id": "vuc" })) {
        ensure!(Instant::now() < until && format!("{error:#}").contains("busy"), "{error:#}");
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn next(link: &mut Link) -> Result<FromServer> {
    Ok(link.receive(Some(PATIENCE))?.expect("the server answers in time"))
}

/// Claims the guest; the server may not yet have noticed that its last holder is gone.
fn claim(link: &mut Link) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        link.send(&ToServer::Claim { guest: "guest1".into() })?;
        match next(link)? {
            FromServer::Claimed(_) => return Ok(()),
            FromServer::Refused(Refusal::Held { .. }) if Instant::now() < until => {}
            other => anyhow::bail!("not claimed: {other:?}"),
        }
    }
}

/// Arms the agent of a claimed guest; bytes of one page.
fn arm(link: &mut Link) -> Result<u32> {
    let arm = Arm { clock: "x86-tsc".into(), ..Arm::default() };
    link.send(&ToServer::Agent { guest: "guest1".into(), request: ToAgent::Arm(Box::new(arm)) })?;
    loop {
        match next(link)? {
            FromServer::Agent { answer: FromAgent::Armed(armed), .. } => return Ok(armed.page_bytes),
            FromServer::Agent { answer: FromAgent::Describe(_) | FromAgent::Arming { .. }, .. } => {}
            other => anyhow::bail!("not armed: {other:?}"),
        }
    }
}

fn attach(link: &mut Link, page_bytes: u32, path: &Path) -> Result<()> {
    let areas = (0..2)
        .map(|cpu| Area { cpu: Cpu(cpu), offset: u64::from(cpu) << 30, bytes_max: 1 << 30, begins_again: false })
        .collect();
    let lanes = ToServer::Lanes(Lanes { guest: "guest1".into(), page_bytes, areas });
    let file: File = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
    link.send_with_files(&lanes, &[&file])?;
    assert_eq!(next(link)?, FromServer::LanesReady { guest: "guest1".into() });
    Ok(())
}

#[test]
fn guest_with_an_agent_is_claimed_probed_and_freed_by_its_holders_death() -> Result<()> {
    let house = House::new()?;
    let machine = house.builder(Kernel::V6_12).boot()?;
    house.await_agent()?;
    for _ in 0..3 {
        let mut link = house.link()?;
        claim(&mut link)?;
        let page_bytes = arm(&mut link)?;
        attach(&mut link, page_bytes, &machine.dir().join("trace.dat"))?;
        let probe = ToAgent::Probe { id: 9, cpu: Cpu(1) };
        link.send(&ToServer::Agent { guest: "guest1".into(), request: probe })?;
        let FromServer::Echo { host_sent, echo, host_received, .. } = next(&mut link)? else {
            anyhow::bail!("no echo")
        };
        assert!(host_sent < host_received && echo.received <= echo.sent && echo.cpu == Cpu(1));
        // Dropped with a session open: the next round's claim waits until the agent has closed it.
    }
    let mut link = house.link()?;
    claim(&mut link)?;
    assert_eq!(machine.shell("ls /sys/kernel/tracing/instances")?.text(), "", "every session was closed");
    machine.kill()?;
    assert_eq!(next(&mut link)?, FromServer::Gone { guest: "guest1".into(), what: Gone::Device });
    Ok(())
}

/// How often each thread of the server has gone to sleep.
fn switches() -> Result<Vec<(String, u64)>> {
    let mut found = Vec::new();
    for task in std::fs::read_dir("/proc/self/task")? {
        let Ok(status) = std::fs::read_to_string(task?.path().join("status")) else { continue };
        let field =
            |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned());
        let name = field("Name:").unwrap_or_default();
        if ["vt-dev/guest1", "vt-drain/guest1", "vt-accept", "vt-client"].contains(&name.as_str()) {
            found.push((name, field("voluntary_ctxt_switches:").unwrap_or_default().parse()?));
        }
    }
    found.sort();
    Ok(found)
}

#[test]
fn idle_guest_wakes_no_thread() -> Result<()> {
    let house = House::new()?;
    let _machine = house.builder(Kernel::V6_12).boot()?;
    house.await_agent()?;
    let mut link = house.link()?;
    claim(&mut link)?;
    sleep(Duration::from_secs(1));
    let before = switches()?;
    assert_eq!(before.len(), 4, "{before:?}");
    sleep(Duration::from_secs(5));
    assert_eq!(switches()?, before);
    Ok(())
}
