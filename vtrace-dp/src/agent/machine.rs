//! Describes the machine that the agent runs on.
//!
//! Out:   a [`Machine`]
//! Trust: the kernel

use std::fs;

use vtrace_common::{
    ids::Cpu,
    limits::{CPUS_MAX, TEXT_BYTES_MAX},
    wire::agent::Machine,
};

use crate::tracefs::online_cpus;

/// Describes this machine, whose CPUs in `lanes` have a data port.
pub(super) fn describe(lanes: Vec<Cpu>) -> Machine {
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let cpus = online_cpus().unwrap_or_default();
    let apics = apics_now();
    Machine { uname: uname(), boot_id: boot_id.trim_end().into(), cpus, lanes, apics }
}

/// The APIC id of each CPU that is online; see [`apics`].
pub(super) fn apics_now() -> Vec<(Cpu, u32)> {
    apics(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
}

/// The APIC id of each CPU in /proc/cpuinfo: the initial one, from CPUID, as the VMM chose it. The kernel may have changed
/// the other.
fn apics(cpuinfo: &str) -> Vec<(Cpu, u32)> {
    let mut cpu = None;
    let mut apics = Vec::new();
    for line in cpuinfo.lines() {
        let Some((name, value)) = line.split_once(':') else { continue };
        match name.trim_end() {
            "processor" => cpu = value.trim().parse().ok().map(Cpu),
            "initial apicid" => apics.extend(cpu.take().zip(value.trim().parse().ok())),
            _ => {}
        }
    }
    apics.truncate(CPUS_MAX);
    apics
}

fn uname() -> String {
    let Ok(name) = nix::sys::utsname::uname() else { return String::new() };
    let parts = [name.sysname(), name.nodename(), name.release(), name.machine()];
    let text = parts.map(|part| part.to_string_lossy()).join(" ");
    text[..text.floor_char_boundary(TEXT_BYTES_MAX)].into()
}

#[cfg(test)]
mod tests {
    use vtrace_common::{ids::Cpu, wire::encode};

    #[test]
    fn apic_id_is_the_initial_one_of_its_own_processor() {
        let text = "processor\t: 0\napicid\t\t: 8\ninitial apicid\t: 4\n\nprocessor\t: 3\napicid\t: 1\n\n\
                    processor\t: 5\ninitial apicid\t: 2\n";
        assert_eq!(super::apics(text), [(Cpu(0), 4), (Cpu(5), 2)]);
        assert_eq!(super::apics("initial apicid : 1\nprocessor : x\ninitial apicid : 1"), []);
    }

    #[test]
    fn machine_names_its_kernel_and_an_online_cpu() {
        let machine = super::describe(vec![]);
        assert!(machine.uname.starts_with("Linux "), "{}", machine.uname);
        assert!(!machine.boot_id.is_empty() && !machine.cpus.is_empty());
        encode(&vtrace_common::wire::agent::FromAgent::Machine(machine)).unwrap();
    }
}
