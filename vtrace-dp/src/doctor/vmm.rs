//! The guest's QEMU as it runs: accelerator, CPUs, ports, memory, slots.
//!
//! In:    [`Running`], or why nothing is known of it
//! Out:   a [`Finding`] each
//! Runs:  pure
//! Full:  does not apply
//! Trust: texts of QEMU's were cleaned where they came in

use std::path::Path;

use super::Finding;
use crate::vmm::{
    capacity::{DRIVER, Obstacle},
    qmp::QmpError,
    running::{Ports, Running},
};

/// What all findings are of.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// The guest's name.
    pub guest: &'a str,
    /// Its QMP socket.
    pub qmp: &'a Path,
    /// CPUs that one device carries.
    pub lanes_per_device: usize,
}

/// What a running QEMU has, or why it is not known.
pub fn vmm(asked: Asked<'_>, running: &Result<Running, QmpError>) -> Vec<Finding> {
    let running = match running {
        Ok(running) => running,
        Err(error) => return vec![Finding::fail(asked.guest, error.to_string(), remedy_of(error))],
    };
    let mut findings = vec![accelerator(asked, running)];
    match (&running.devices[..], &running.ports) {
        ([], Ports { control: None, lanes, .. }) if lanes.is_empty() => findings.extend(without_ports(asked, running)),
        ([], ports) => findings.extend(own_ports(asked, running, ports)),
        (devices, _) => {
            let lanes = devices.iter().fold(0, |sum: usize, lanes| sum.saturating_add(*lanes));
            let found = format!("{} of {DRIVER}", counted(devices.len(), "device"));
            let remedy = format!(
                "vtrace detach {0} --qmp {1}, then attach {0} --qmp {1} --cpus {2}",
                asked.guest,
                asked.qmp.display(),
                running.cpus
            );
            findings.extend([enough(asked, running, lanes, &found, remedy), memory(asked, running)]);
        }
    }
    findings
}

/// What to try where QMP does not serve.
pub fn remedy_of(error: &QmpError) -> &'static str {
    match error {
        QmpError::NoSocket { .. } => "start QEMU with -qmp unix:SOCKET,server=on,wait=off",
        QmpError::Silent { .. } => "one client at a time: another -qmp socket for vtrace (libvirt keeps its own)",
        QmpError::Foreign(_) => "a socket in QMP's mode: -qmp, not -monitor",
        _ => "look at QEMU's log",
    }
}

/// Version, state, and what runs its CPUs.
fn accelerator(asked: Asked<'_>, running: &Running) -> Finding {
    let Running { version, state, kvm, .. } = running;
    let by = match kvm {
        Some(true) => ", KVM",
        Some(false) => ", emulated (TCG)",
        None => "",
    };
    let found = format!("QEMU {version}, {state}{by}");
    match (state.as_str(), kvm) {
        ("running", Some(false)) => {
            let remedy = "-accel kvm, where the host has it: an emulated CPU's times say little of a real one's";
            Finding::warn(asked.guest, found, remedy)
        }
        ("running", _) => Finding::ok(asked.guest, found),
        ("suspended", _) => Finding::warn(asked.guest, found, "it sleeps: system_wakeup (virsh dompmwakeup)"),
        _ => Finding::warn(asked.guest, found, "let it go on: cont (virsh resume)"),
    }
}

/// Neither a device of ours nor ports of our names.
fn without_ports(asked: Asked<'_>, running: &Running) -> Vec<Finding> {
    let name = asked.guest;
    let needed = running.cpus.div_ceil(asked.lanes_per_device.max(1)).max(1);
    if let Some(obstacle) = &running.device_obstacle {
        let remedy = format!("vtrace setup --dom {name} --transport socket, and start it with what that prints");
        return vec![Finding::fail(name, format!("no ports for the agent; {obstacle}"), remedy)];
    }
    let slots = if running.slots < needed {
        let found = Obstacle::NoSlot { needed, free: running.slots }.to_string();
        let remedy = "start it with -device pcie-root-port,id=rp0,chassis=1,slot=1 (one for each device)";
        Finding::fail(name, found, remedy)
    } else {
        let found = format!("no ports for the agent; {} free for hot-plug", counted(running.slots, "slot"));
        Finding::warn(name, found, format!("vtrace attach {name} --qmp {}", asked.qmp.display()))
    };
    vec![slots, memory(asked, running)]
}

/// QEMU's own device: its memory and slots do not matter.
fn own_ports(asked: Asked<'_>, running: &Running, ports: &Ports) -> Vec<Finding> {
    let name = asked.guest;
    let again = format!("vtrace setup --dom {name} --cpus {}, and start it with what that prints", running.cpus);
    let Some(leads) = &ports.control else {
        return vec![Finding::fail(name, "QEMU's own ports, and none for the agent", again)];
    };
    if ports.control_is_ours == Some(false) {
        let found = format!("the agent's port leads to {leads:?}, where the server does not listen");
        return vec![Finding::fail(name, found, again)];
    }
    // Ports go by the CPU's number: what counts is how many from the first on are there.
    let lanes = ports.lanes.iter().zip(0..).take_while(|(cpu, number)| cpu.0 == *number).count();
    vec![enough(asked, running, lanes, "QEMU's own ports", again)]
}

/// Whether every CPU has a port.
fn enough(asked: Asked<'_>, running: &Running, lanes: usize, what: &str, remedy: String) -> Finding {
    let found = format!("{what}: ports for {}, {}", counted(lanes, "CPU"), counted(running.cpus, "CPU"));
    if running.cpus <= lanes { Finding::ok(asked.guest, found) } else { Finding::warn(asked.guest, found, remedy) }
}

fn memory(asked: Asked<'_>, running: &Running) -> Finding {
    match &running.memory_obstacle {
        None => Finding::ok(asked.guest, "its memory is shared"),
        Some(obstacle) => {
            let remedy = "-object memory-backend-memfd,id=mem0,size=SIZE,share=on -machine …,memory-backend=mem0";
            Finding::fail(asked.guest, obstacle.to_string(), remedy)
        }
    }
}

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use vtrace_common::ids::Cpu;

    use super::{
        super::Verdict::{self, Fail, Ok as Fine, Warn},
        *,
    };
    use crate::vmm::qmp::Version;

    fn asked() -> Asked<'static> {
        Asked { guest: "guest1", qmp: Path::new("/run/q"), lanes_per_device: 126 }
    }

    fn running() -> Running {
        Running {
            version: Version { major: 11, minor: 1, micro: 3 },
            state: "running".into(),
            kvm: Some(true),
            cpus: 2,
            devices: vec![2],
            ports: Ports::default(),
            device_obstacle: None,
            memory_obstacle: None,
            slots: 1,
        }
    }

    /// Verdicts and texts of a QEMU that was changed a little.
    fn findings(change: impl FnOnce(&mut Running)) -> (Vec<Verdict>, String) {
        let mut running = running();
        change(&mut running);
        let findings = vmm(asked(), &Ok(running));
        let text = findings.iter().map(Finding::to_string).collect::<Vec<_>>().join("\n");
        (findings.iter().map(|finding| finding.verdict).collect(), text)
    }

    #[test]
    fn qemu_with_what_is_needed_is_three_good_lines() {
        let (verdicts, text) = findings(|_| {});
        assert_eq!(verdicts, [Fine; 3], "{text}");
        assert!(text.contains("QEMU 11.1.3, running, KVM") && text.contains("ports for 2 CPUs, 2 CPUs"), "{text}");
    }

    #[test]
    fn each_thing_that_a_running_qemu_can_lack_is_told_with_what_to_do() {
        type Case = (fn(&mut Running), Vec<Verdict>, &'static str);
        let private = || Some(Obstacle::MemoryNotShared("pc.ram".into()));
        let cases: [Case; 8] = [
            (|one| one.kvm = Some(false), vec![Warn, Fine, Fine], "-accel kvm"),
            (|one| one.state = "paused".into(), vec![Warn, Fine, Fine], "cont"),
            (|one| one.state = "suspended".into(), vec![Warn, Fine, Fine], "system_wakeup"),
            (|one| one.cpus = 3, vec![Fine, Warn, Fine], "attach guest1 --qmp /run/q --cpus 3"),
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
            (|one| one.cpus = 0, vec![Fine, Fine, Fine], "0 CPUs"),
        ];
        for (change, expected, said) in cases {
            let (verdicts, text) = findings(change);
            assert_eq!(verdicts, expected, "{text}");
            assert!(text.contains(said), "{said}: {text}");
        }
        let (verdicts, text) = findings(|one| one.memory_obstacle = private());
        assert!(verdicts == [Fine, Fine, Fail] && text.contains("share=on"), "{text}");
    }

    #[test]
    fn qemus_own_ports_count_from_cpu_0_on_and_must_lead_to_the_server() {
        let ports = |cpus: &[u32], is_ours| Ports {
            control: Some("unix:/x.sock".into()),
            control_is_ours: is_ours,
            lanes: cpus.iter().copied().map(Cpu).collect(),
        };
        let own = |ports: Ports| {
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
        assert_eq!(own(Ports { lanes: vec![Cpu(0)], ..Ports::default() }).0, [Fine, Fail]);
    }

    #[test]
    fn qemu_that_does_not_answer_is_one_line_with_what_to_do() {
        let path = || "/run/q".into();
        let missing = QmpError::NoSocket { path: path(), source: std::io::ErrorKind::NotFound.into() };
        for (error, remedy) in [(missing, "-qmp unix:"), (QmpError::Foreign("x".into()), "not -monitor")] {
            let findings = vmm(asked(), &Err(error));
            assert!(findings.len() == 1 && findings[0].verdict == Fail, "{findings:?}");
            assert!(findings[0].remedy.contains(remedy), "{findings:?}");
        }
    }
}
