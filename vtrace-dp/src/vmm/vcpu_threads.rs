//! The host threads that run a guest's vCPUs.
//!
//! In:    the VMM's process, from SO_PEERCRED of its device's socket; /proc; what KVM's tracepoints reported
//! Out:   vCPU and thread, for the GUEST option of trace.dat
//!
//! Without a report of KVM's, threads are recognised by QEMU's names `CPU n/KVM` and `CPU n/TCG` (softmmu/cpus.c; older
//! versions need `-name debug-threads=on`). For a thread without such a name the process stands in: readers need a number
//! above zero, and the summary reports that the threads are unknown.

use std::{collections::BTreeMap, fs};

use vtrace_common::ids::Cpu;

use crate::clock::vcpus::Vcpu;

/// The host thread of each vCPU.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VcpuThreads {
    /// vCPU and thread, for each requested CPU.
    pub threads: Vec<(Cpu, u32)>,
    /// Whether all threads are known; otherwise the process stands in for some.
    pub known: bool,
}

/// The threads of process `vmm_pid` that run `cpus`; `by_kvm` takes precedence over names.
pub fn vcpu_threads(vmm_pid: u32, cpus: &[Cpu], by_kvm: &[Vcpu]) -> VcpuThreads {
    let mut found = named_threads(vmm_pid);
    found.extend(by_kvm.iter().filter(|vcpu| vcpu.tid != 0).map(|vcpu| (vcpu.cpu, vcpu.tid)));
    let threads = cpus.iter().map(|cpu| (*cpu, found.get(cpu).copied().unwrap_or(vmm_pid))).collect();
    VcpuThreads { threads, known: cpus.iter().all(|cpu| found.contains_key(cpu)) }
}

/// The vCPU threads of a process by their names.
pub fn named_threads(pid: u32) -> BTreeMap<Cpu, u32> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let tid = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if let (Some(tid), Some(cpu)) = (tid, vcpu_of(&name)) {
            found.insert(cpu, tid);
        }
    }
    found
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
    fn threads_that_kvm_reports_need_no_name() {
        let vcpu = |cpu, tid| Vcpu { cpu: Cpu(cpu), vcpu_id: 2 * cpu, tid, states: Vec::new(), changes: Vec::new() };
        let pid = std::process::id();
        let cpus = [Cpu(0), Cpu(1)];
        let found = vcpu_threads(pid, &cpus, &[vcpu(1, 41), vcpu(0, 40)]);
        assert_eq!(found, VcpuThreads { threads: vec![(Cpu(0), 40), (Cpu(1), 41)], known: true });
        assert!(!vcpu_threads(pid, &cpus, &[vcpu(1, 41), vcpu(0, 0)]).known);
    }
}
