//! What the machine this agent runs on says of itself.
//!
//! Out:   a [`Machine`]
//! Trust: the kernel

use std::fs;

use vtrace_common::{ids::Cpu, limits::TEXT_BYTES_MAX, wire::agent::Machine};

use crate::tracefs::online_cpus;

/// Describes this machine, whose CPUs in `lanes` have a data port.
pub(super) fn describe(lanes: Vec<Cpu>) -> Machine {
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    Machine { uname: uname(), boot_id: boot_id.trim_end().into(), cpus: online_cpus().unwrap_or_default(), lanes }
}

fn uname() -> String {
    let Ok(name) = nix::sys::utsname::uname() else { return String::new() };
    let parts = [name.sysname(), name.nodename(), name.release(), name.machine()];
    let text = parts.map(|part| part.to_string_lossy()).join(" ");
    text[..text.floor_char_boundary(TEXT_BYTES_MAX)].into()
}

#[cfg(test)]
mod tests {
    use vtrace_common::wire::encode;

    #[test]
    fn machine_names_its_kernel_and_an_online_cpu() {
        let machine = super::describe(vec![]);
        assert!(machine.uname.starts_with("Linux "), "{}", machine.uname);
        assert!(!machine.boot_id.is_empty() && !machine.cpus.is_empty());
        encode(&vtrace_common::wire::agent::FromAgent::Machine(machine)).unwrap();
    }
}
