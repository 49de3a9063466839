//! A guest's running QEMU: accelerator, CPUs, ports, memory, slots.
//!
//! In:    [`RunningVm`], or the error of its inspection
//! Out:   a [`Finding`] for each check
//! Trust: texts of QEMU's were cleaned when they were received

use std::path::Path;

use super::{Finding, remedy};
use crate::vmm::{
    capacity::Obstacle,
    qemu::DRIVER,
    qmp::QmpError,
    running::{RunningDevice, RunningVm, SerialPorts},
};

/// The inspected guest.
#[derive(Clone, Copy, Debug)]
pub struct GuestVm<'a> {
    /// The guest's name.
    pub guest: &'a str,
    /// QMP socket of its QEMU.
    pub qmp: &'a Path,
    /// Lanes of one device.
    pub lanes_per_device: usize,
}

/// Findings about a running QEMU.
pub fn vmm(asked: GuestVm<'_>, running: &Result<RunningVm, QmpError>) -> Vec<Finding> {
    let running = match running {
        Ok(running) => running,
        Err(error) => return vec![Finding::fail(asked.guest, error.to_string(), remedy::of_qmp(error))],
    };
    let mut findings = vec![accelerator(asked, running)];
    match (&running.devices[..], &running.ports) {
        ([], SerialPorts { control: None, lanes, .. }) if lanes.is_empty() => {
            findings.extend(without_ports(asked, running))
        }
        ([], ports) => findings.extend(own_ports(asked, running, ports)),
        (devices, _) => {
            let lanes = devices.iter().fold(0, |sum: usize, device| sum.saturating_add(device.lanes));
            let found = format!("{} of {DRIVER}", counted(devices.len(), "device"));
            let remedy = format!(
                "vtrace detach {0} --qmp {1}, then attach {0} --qmp {1} --cpus {2}",
                asked.guest,
                asked.qmp.display(),
                running.cpus
            );
            findings.extend([enough(asked, running, lanes, &found, remedy), memory(asked, running)]);
            findings.push(connection(asked, devices));
        }
    }
    findings
}

/// Whether our devices have a server, and can be unplugged: for another server, a migration or a snapshot.
fn connection(asked: GuestVm<'_>, devices: &[RunningDevice]) -> Finding {
    let name = asked.guest;
    let qmp = asked.qmp.display();
    let is_fixed = devices.iter().any(|device| !device.is_hotpluggable);
    let restart =
        format!("shut the guest down, and restart QEMU with the options that vtrace setup --dom {name} prints");
    match (devices.iter().all(|device| device.is_connected), is_fixed) {
        (false, true) => Finding::fail(
            name,
            "its device has lost its server, and is on pcie.0, where it cannot be unplugged",
            restart,
        ),
        (false, false) => Finding::fail(
            name,
            "its device has lost its server",
            format!("vtrace attach {name} --qmp {qmp} replaces it"),
        ),
        (true, true) => {
            let found = "its device is on pcie.0 and cannot be unplugged: no new server, migration or snapshot";
            Finding::warn(name, found, restart)
        }
        (true, false) => Finding::ok(
            name,
            format!("its device is connected; before migration or snapshot: vtrace detach {name} --qmp {qmp}"),
        ),
    }
}

/// QEMU's version, the guest's state, KVM or emulation.
fn accelerator(asked: GuestVm<'_>, running: &RunningVm) -> Finding {
    let RunningVm { version, state, kvm, .. } = running;
    let by = match kvm {
        Some(true) => ", KVM",
        Some(false) => ", emulated (TCG)",
        None => "",
    };
    let found = format!("QEMU {version}, {state}{by}");
    match (state.as_str(), kvm) {
        ("running", Some(false)) => {
            let remedy = "use -accel kvm if the host has it: times on an emulated CPU do not represent a real one";
            Finding::warn(asked.guest, found, remedy)
        }
        ("running", _) => Finding::ok(asked.guest, found),
        ("suspended", _) => Finding::warn(asked.guest, found, "wake the guest: system_wakeup (virsh dompmwakeup)"),
        _ => Finding::warn(asked.guest, found, "resume the guest: cont (virsh resume)"),
    }
}

/// Neither our device nor our ports on QEMU's own.
fn without_ports(asked: GuestVm<'_>, running: &RunningVm) -> Vec<Finding> {
    let name = asked.guest;
    let needed = running.cpus.div_ceil(asked.lanes_per_device.max(1)).max(1);
    if let Some(obstacle) = &running.device_obstacle {
        let remedy =
            format!("vtrace setup --dom {name} --transport socket, and restart QEMU with the options it prints");
        return vec![Finding::fail(name, format!("no ports for the agent; {obstacle}"), remedy)];
    }
    let slots = if running.slots < needed {
        let found = Obstacle::NoSlot { needed, free: running.slots }.to_string();
        Finding::fail(name, found, remedy::ROOT_PORT)
    } else {
        let found = format!("no ports for the agent; {} free for hot-plug", counted(running.slots, "slot"));
        Finding::warn(name, found, format!("vtrace attach {name} --qmp {}", asked.qmp.display()))
    };
    vec![slots, memory(asked, running)]
}

/// QEMU's own device: memory and slots do not matter.
fn own_ports(asked: GuestVm<'_>, running: &RunningVm, ports: &SerialPorts) -> Vec<Finding> {
    let name = asked.guest;
    let again =
        format!("vtrace setup --dom {name} --cpus {}, and restart QEMU with the options it prints", running.cpus);
    let Some(filename) = &ports.control else {
        return vec![Finding::fail(name, "QEMU's own ports, but no control port for the agent", again)];
    };
    if ports.control_is_ours == Some(false) {
        let found = format!("the agent's control port connects to {filename:?}, where the server does not listen");
        return vec![Finding::fail(name, found, again)];
    }
    // SerialPorts are numbered by CPU: count those without a gap.
    let lanes = ports.lanes.iter().zip(0..).take_while(|(cpu, number)| cpu.0 == *number).count();
    vec![enough(asked, running, lanes, "QEMU's own ports", again)]
}

/// Whether each CPU has a port.
fn enough(asked: GuestVm<'_>, running: &RunningVm, lanes: usize, what: &str, remedy: String) -> Finding {
    let found = format!("{what}: ports for {}, {}", counted(lanes, "CPU"), counted(running.cpus, "CPU"));
    if running.cpus <= lanes { Finding::ok(asked.guest, found) } else { Finding::warn(asked.guest, found, remedy) }
}

fn memory(asked: GuestVm<'_>, running: &RunningVm) -> Finding {
    match &running.memory_obstacle {
        None => Finding::ok(asked.guest, "its memory is shared"),
        Some(obstacle) => Finding::fail(asked.guest, obstacle.to_string(), remedy::SHARED_MEMORY),
    }
}

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use vtrace_common::ids::Cpu;

    use super::{
        super::Severity::{self, Fail, Ok as Fine, Warn},
        *,
    };
    use crate::vmm::qemu::QemuVersion;

    fn asked() -> GuestVm<'static> {
        GuestVm { guest: "guest1", qmp: Path::new("/run/q"), lanes_per_device: 126 }
    }

    fn running() -> RunningVm {
        RunningVm {
            version: QemuVersion { major: 11, minor: 1, micro: 3 },
            state: "running".into(),
            kvm: Some(true),
            cpus: 2,
            devices: vec![RunningDevice { lanes: 2, is_connected: true, is_hotpluggable: true }],
            ports: SerialPorts::default(),
            device_obstacle: None,
            memory_obstacle: None,
            slots: 1,
        }
    }

    /// Verdicts and texts of a QEMU that was changed a little.
    fn findings(change: impl FnOnce(&mut RunningVm)) -> (Vec<Severity>, String) {
        let mut running = running();
        change(&mut running);
        let findings = vmm(asked(), &Ok(running));
        let text = findings.iter().map(Finding::to_string).collect::<Vec<_>>().join("\n");
        (findings.iter().map(|finding| finding.verdict).collect(), text)
    }

    #[test]
    fn qemu_that_meets_all_requirements_is_ok() {
        let (verdicts, text) = findings(|_| {});
        assert_eq!(verdicts, [Fine; 4], "{text}");
        assert!(text.contains("QEMU 11.1.3, running, KVM") && text.contains("ports for 2 CPUs, 2 CPUs"), "{text}");
    }

    #[test]
    fn each_missing_requirement_is_reported_with_advice() {
        type Case = (fn(&mut RunningVm), Vec<Severity>, &'static str);
        let private = || Some(Obstacle::MemoryNotShared("pc.ram".into()));
        let cases: [Case; 8] = [
            (|one| one.kvm = Some(false), vec![Warn, Fine, Fine, Fine], "-accel kvm"),
            (|one| one.state = "paused".into(), vec![Warn, Fine, Fine, Fine], "cont"),
            (|one| one.state = "suspended".into(), vec![Warn, Fine, Fine, Fine], "system_wakeup"),
            (|one| one.cpus = 3, vec![Fine, Warn, Fine, Fine], "attach guest1 --qmp /run/q --cpus 3"),
            (|one| one.devices.clear(), vec![Fine, Warn, Fine], "vtrace attach guest1 --qmp /run/q"),
            (
                |one| {
                    one.devices.clear();
                    one.slots = 0;
                },
                vec![Fine, Fail, Fine],
                "pcie-root-port",
            ),
            (
                |one| {
                    one.devices.clear();
                    one.device_obstacle = Some(Obstacle::NoDevice);
                },
                vec![Fine, Fail],
                "--transport socket",
            ),
            (|one| one.cpus = 0, vec![Fine, Fine, Fine, Fine], "0 CPUs"),
        ];
        for (change, expected, said) in cases {
            let (verdicts, text) = findings(change);
            assert_eq!(verdicts, expected, "{text}");
            assert!(text.contains(said), "{said}: {text}");
        }
        let (verdicts, text) = findings(|one| one.memory_obstacle = private());
        assert!(verdicts == [Fine, Fine, Fail, Fine] && text.contains("share=on"), "{text}");
    }

    #[test]
    fn device_that_lost_its_server_and_one_on_pcie_0_are_reported() {
        for (is_connected, is_hotpluggable, verdict, advice) in [
            (true, true, Fine, "before migration or snapshot: vtrace detach guest1"),
            (true, false, Warn, "migration or snapshot\n                    → shut the guest down"),
            (false, true, Fail, "lost its server\n                    → vtrace attach guest1 --qmp /run/q replaces it"),
            (false, false, Fail, "cannot be unplugged\n                    → shut the guest down"),
        ] {
            let (verdicts, text) =
                findings(|one| one.devices = vec![RunningDevice { lanes: 2, is_connected, is_hotpluggable }]);
            assert_eq!(verdicts, [Fine, Fine, Fine, verdict], "{text}");
            assert!(text.contains(advice), "{advice}: {text}");
        }
    }

    #[test]
    fn qemus_own_ports_count_from_cpu_0_and_must_connect_to_the_server() {
        let ports = |cpus: &[u32], is_ours| SerialPorts {
            control: Some("unix:/x.sock".into()),
            control_is_ours: is_ours,
            lanes: cpus.iter().copied().map(Cpu).collect(),
        };
        let own = |ports: SerialPorts| {
            findings(|one| {
                one.devices.clear();
                one.memory_obstacle = Some(Obstacle::MemoryNotShared("pc.ram".into()));
                one.ports = ports;
            })
        };
        assert_eq!(own(ports(&[0, 1], Some(true))).0, [Fine, Fine], "private memory will do");
        assert_eq!(own(ports(&[0, 1], None)).0, [Fine, Fine]);
        let (verdicts, text) = own(ports(&[0, 2], Some(true)));
        assert!(verdicts == [Fine, Warn] && text.contains("ports for 1 CPU, 2 CPUs"), "{text}");
        let (verdicts, text) = own(ports(&[0, 1], Some(false)));
        assert!(verdicts == [Fine, Fail] && text.contains("/x.sock"), "{text}");
        assert_eq!(own(SerialPorts { lanes: vec![Cpu(0)], ..SerialPorts::default() }).0, [Fine, Fail]);
    }

    #[test]
    fn qemu_that_does_not_answer_is_one_line_with_advice() {
        let path = || "/run/q".into();
        let missing = QmpError::NoSocket { path: path(), source: std::io::ErrorKind::NotFound.into() };
        for (error, remedy) in [(missing, "-qmp unix:"), (QmpError::Foreign("x".into()), "not of -monitor")] {
            let findings = vmm(asked(), &Err(error));
            assert!(findings.len() == 1 && findings[0].verdict == Fail, "{findings:?}");
            assert!(findings[0].remedy.contains(remedy), "{findings:?}");
        }
    }
}
