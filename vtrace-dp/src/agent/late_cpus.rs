//! Lanes of CPUs that are offline when a session is armed and come online while it runs.
//!
//! In:    an instance, ports; which CPUs are online
//! Out:   taps and ports of CPUs that have come online, each once
//! Runs:  on the control thread: after each message of the host, about once a second, and once more when tracing is off.
//!        If no CPU with a port can come online, nothing is opened or read
//! Full:  before its lane starts, a CPU's ring buffer overwrites the oldest events and counts them
//! Trust: the kernel
//!
//! A CPU gets its ring buffer, as large as the others', right before it comes online (`trace_rb_cpu_prepare()`,
//! kernel/trace/ring_buffer.c), and keeps it when it goes offline. Before that its tap can be opened, but poll(2) reports an
//! error at once: so a tap is opened when its CPU comes online, and its port with it. Ports are opened right after a message
//! of the host: opening sends a control message, and the kernel spins until the host has taken it (`__send_control_msg()`,
//! drivers/char/virtio_console.c).

use std::os::fd::OwnedFd;

use vtrace_common::{ids::Cpu, limits::LANES_MAX, wire::agent::Failure};

use super::{
    machine,
    port::{DataPorts, SerialPorts},
};
use crate::tracefs::{Instance, Tap, online_cpus};

/// A CPU that has come online: its tap and its port, or why it cannot be recorded.
pub(super) type LateLane = (Cpu, Result<(Tap, OwnedFd), Failure>);

/// The CPUs that may come online.
#[derive(Debug)]
pub(super) struct LateCpus {
    ports: SerialPorts,
    without_indirect: bool,
    cpus: Vec<Cpu>,
    /// Those that have not come online yet.
    absent: Vec<Cpu>,
    /// Tracing is off.
    is_over: bool,
    /// The APIC ids of CPUs that are or were online.
    apics: Vec<(Cpu, u32)>,
}

impl LateCpus {
    /// The CPUs that were offline when `instance` was made, may come online, and have a port in `found`.
    pub(super) fn find(
        instance: &Instance,
        ports: &SerialPorts,
        found: &DataPorts<'_>,
        without_indirect: bool,
    ) -> Self {
        let is_usable = |cpu: &Cpu| found.is_usable(*cpu, without_indirect);
        let mut cpus: Vec<Cpu> = instance.absent_cpus().into_iter().filter(is_usable).collect();
        cpus.truncate(LANES_MAX.saturating_sub(instance.cpus().len()));
        let (ports, absent, apics) = (ports.clone(), cpus.clone(), machine::apics_now());
        Self { ports, without_indirect, cpus, absent, is_over: false, apics }
    }

    /// All of them, in order.
    pub(super) fn cpus(&self) -> &[Cpu] {
        &self.cpus
    }

    /// Those that have come online since the last call; none once tracing is off.
    pub(super) fn come(&mut self, instance: &Instance) -> Vec<LateLane> {
        if self.absent.is_empty() || self.is_over {
            return Vec::new();
        }
        let online = online_cpus().unwrap_or_default();
        self.open(instance, |cpu| online.contains(&cpu))
    }

    /// Those that have come online and were not returned before. Call it once, when tracing is off.
    pub(super) fn arrived_before_end(&mut self, instance: &Instance) -> Vec<LateLane> {
        self.is_over = true;
        self.open(instance, |cpu| instance.has_recorded(cpu))
    }

    fn open(&mut self, instance: &Instance, has_come: impl Fn(Cpu) -> bool) -> Vec<LateLane> {
        let come: Vec<Cpu> = self.absent.extract_if(.., |cpu| has_come(*cpu)).collect();
        if come.is_empty() {
            return Vec::new();
        }
        let apics = machine::apics_now();
        self.apics.retain(|(cpu, _)| !apics.iter().any(|(other, _)| other == cpu));
        self.apics.extend(apics);
        let found = self.ports.lanes();
        let open = |cpu: Cpu| Ok((instance.tap(cpu)?, found.open(cpu, self.without_indirect)?));
        come.into_iter().map(|cpu| (cpu, open(cpu))).collect()
    }

    /// Whether a CPU has not come online.
    pub(super) fn is_absent(&self, cpu: Cpu) -> bool {
        self.absent.contains(&cpu)
    }

    /// The APIC id of a CPU that is or was online.
    pub(super) fn apic(&self, cpu: Cpu) -> Option<u32> {
        self.apics.iter().find(|(named, _)| *named == cpu).map(|(_, apic)| *apic)
    }
}

#[cfg(test)]
mod tests {
    use vtrace_common::wire::agent::{Arm, FailureKind};

    use super::{
        super::port::tests::{features, fifo_ports},
        *,
    };
    use crate::tracefs::{INSTANCE_PREFIX, Tracefs};

    fn instance(name: &str) -> Option<Instance> {
        let tracefs = Tracefs::find_or_mount().ok().filter(|_| nix::unistd::geteuid().is_root());
        let Some(tracefs) = tracefs else {
            println!("skipped: tracefs is not writable here");
            return None;
        };
        let name = format!("{INSTANCE_PREFIX}{}-spare-{name}", std::process::id());
        Some(tracefs.arm(&name, &Arm::default()).unwrap())
    }

    /// CPUs that count as offline, whatever they are.
    fn late_cpus(ports: &SerialPorts, cpus: &[Cpu]) -> LateCpus {
        let (ports, cpus, absent) = (ports.clone(), cpus.to_vec(), cpus.to_vec());
        LateCpus { ports, without_indirect: false, cpus, absent, is_over: false, apics: Vec::new() }
    }

    #[test]
    fn only_absent_cpus_with_a_usable_port_are_spares() {
        let Some(instance) = instance("find") else { return };
        let root = tempfile::tempdir().unwrap();
        let absent = instance.absent_cpus();
        let all: Vec<Cpu> = instance.cpus().iter().chain(&absent).copied().collect();
        let names: Vec<String> = all.iter().map(|cpu| format!("trace-path-{cpu}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        for (place, indirect, wanted) in [("a", true, &absent[..]), ("b", false, &[])] {
            let ports = fifo_ports(&root.path().join(place), &names, &features(indirect));
            let found = LateCpus::find(&instance, &ports, &ports.lanes(), false);
            assert_eq!(found.cpus(), wanted);
        }
        instance.remove().unwrap();
    }

    #[test]
    fn cpu_that_is_online_comes_once_with_its_tap_its_port_and_its_apic_id() {
        let Some(instance) = instance("come") else { return };
        let root = tempfile::tempdir().unwrap();
        let ports = fifo_ports(root.path(), &["trace-path-cpu0"], &features(true));
        let (online, never) = (instance.cpus()[0], Cpu(4095));
        let mut late_cpus = late_cpus(&ports, &[online, never]);
        let come = late_cpus.come(&instance);
        assert!(matches!(&come[..], [(cpu, Ok((tap, _)))] if (*cpu, tap.cpu) == (online, online)), "{come:?}");
        assert_eq!((late_cpus.is_absent(online), late_cpus.is_absent(never)), (false, true));
        assert_eq!(late_cpus.apic(online).is_some(), !machine::apics_now().is_empty());
        assert!(late_cpus.come(&instance).is_empty() && late_cpus.arrived_before_end(&instance).is_empty());
        drop(come);
        instance.remove().unwrap();
    }

    #[test]
    fn unannounced_cpu_is_found_at_the_end_and_one_without_its_port_is_refused() {
        let Some(instance) = instance("last") else { return };
        let root = tempfile::tempdir().unwrap();
        let ports = fifo_ports(root.path(), &[], &features(true));
        let mut late_cpus = late_cpus(&ports, instance.cpus());
        instance.set_tracing(true).unwrap();
        instance.mark("somewhere").unwrap();
        instance.set_tracing(false).unwrap();
        let come = late_cpus.arrived_before_end(&instance);
        assert!(matches!(&come[..], [(_, Err(refused))] if refused.kind == FailureKind::NoPort), "{come:?}");
        instance.remove().unwrap();
    }
}
