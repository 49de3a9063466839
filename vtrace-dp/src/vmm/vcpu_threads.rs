//! Which threads of the host run a guest's vCPUs.
//!
//! In:    the VMM's process, from SO_PEERCRED of its device's socket; /proc
//! Out:   vCPU and thread, for the GUEST option that ties two files together
//!
//! KVM itself says which thread runs a vCPU; where it does not, QEMU names its vCPU threads `CPU n/KVM` or `CPU n/TCG` (softmmu/cpus.c; always with `-name debug-threads=on`).
//! Where a thread has no such name, the process itself stands for it: readers need a number above zero, and the
//! summary says that the threads are not known.

use std::{collections::BTreeMap, fs, path::PathBuf};

use vtrace_common::ids::Cpu;

use crate::clock::vcpus::Vcpu;

/// vCPU and host thread, and whether all of them are known.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VcpuThreads {
    /// One entry for each CPU asked for.
    pub threads: Vec<(Cpu, u32)>,
    /// False if the process stands in for a thread.
    pub known: bool,
}

/// The threads that run `cpus` of the VM of process `vmm_pid`, those that KVM named before all.
pub fn vcpu_threads(vmm_pid: u32, cpus: &[Cpu], by_kvm: &[Vcpu]) -> VcpuThreads {
    let named = thread_names(vmm_pid).into_iter().filter_map(|(tid, name)| Some((vcpu_of(&name)?, tid)));
    let by_kvm = by_kvm.iter().filter(|vcpu| vcpu.tid != 0).map(|vcpu| (vcpu.cpu, vcpu.tid));
    let named: BTreeMap<Cpu, u32> = named.chain(by_kvm).collect();
    let threads = cpus.iter().map(|cpu| (*cpu, named.get(cpu).copied().unwrap_or(vmm_pid))).collect();
    VcpuThreads { threads, known: cpus.iter().all(|cpu| named.contains_key(cpu)) }
}

fn thread_names(pid: u32) -> Vec<(u32, String)> {
    let tasks = PathBuf::from(format!("/proc/{pid}/task"));
    let entries = fs::read_dir(tasks).into_iter().flatten().flatten();
    let named = entries.filter_map(|entry| {
        let tid = entry.file_name().to_str()?.parse().ok()?;
        Some((tid, fs::read_to_string(entry.path().join("comm")).ok()?))
    });
    named.collect()
}

fn vcpu_of(name: &str) -> Option<Cpu> {
    let (number, accelerator) = name.trim_end().strip_prefix("CPU ")?.split_once('/')?;
    matches!(accelerator, "KVM" | "TCG").then(|| number.parse().ok().map(Cpu))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_vcpu_threads_are_read_and_others_are_not() {
        assert_eq!(vcpu_of("CPU 3/KVM\n"), Some(Cpu(3)));
        assert_eq!(vcpu_of("CPU 12/TCG"), Some(Cpu(12)));
        for other in ["CPU x/KVM", "CPU 3", "worker", "CPU -1/TCG", "CPU 3/HVF"] {
            assert_eq!(vcpu_of(other), None, "{other}");
        }
    }

    #[test]
    fn process_stands_in_for_threads_without_a_name() {
        let pid = std::process::id();
        let found = vcpu_threads(pid, &[Cpu(0), Cpu(1)], &[]);
        assert_eq!(found, VcpuThreads { threads: vec![(Cpu(0), pid), (Cpu(1), pid)], known: false });
    }

    #[test]
    fn threads_that_kvm_names_need_no_name_of_their_own() {
        let vcpu = |cpu, tid| Vcpu { cpu: Cpu(cpu), vcpu_id: 2 * cpu, tid, states: Vec::new(), told: Vec::new() };
        let pid = std::process::id();
        let cpus = [Cpu(0), Cpu(1)];
        let found = vcpu_threads(pid, &cpus, &[vcpu(1, 41), vcpu(0, 40)]);
        assert_eq!(found, VcpuThreads { threads: vec![(Cpu(0), 40), (Cpu(1), 41)], known: true });
        assert!(!vcpu_threads(pid, &cpus, &[vcpu(1, 41), vcpu(0, 0)]).known);
    }
}
