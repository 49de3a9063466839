//! The host threads that run a guest's vCPUs.
//!
//! In:    the VMM's process, from SO_PEERCRED of its device's socket; /proc; what KVM's tracepoints reported
//! Out:   vCPU and thread, for the GUEST option of trace.dat; with the host CPU for lists and summaries
//!
//! Without a report of KVM's, threads are recognised by QEMU's names `CPU n/KVM` and `CPU n/TCG` (softmmu/cpus.c; older
//! versions need `-name debug-threads=on`). For a thread without such a name the process stands in: readers need a number
//! above zero, and the summary reports that the threads are unknown.

use std::{collections::BTreeMap, fmt, fs};

use serde::Serialize;
use vtrace_common::ids::Cpu;

use crate::clock::vcpus::Vcpu;

/// The host thread of each vCPU.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VcpuThreads {
    /// The VMM's process.
    pub vmm_pid: u32,
    /// vCPU and thread, for each requested CPU.
    pub threads: Vec<(Cpu, u32)>,
    /// Whether all threads are known; otherwise the process stands in for some.
    pub known: bool,
}

impl VcpuThreads {
    /// Each with its host CPU; nothing unless all threads are known.
    pub fn on_host_cpus(&self) -> Vec<VcpuThread> {
        let threads = self.threads.iter().filter(|_| self.known);
        threads.map(|(vcpu, thread)| VcpuThread::of(self.vmm_pid, *vcpu, *thread)).collect()
    }
}

/// A vCPU, its host thread, and the host CPUs of that thread.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct VcpuThread {
    /// The vCPU's number.
    pub vcpu: u32,
    /// The host thread that runs it.
    pub thread: u32,
    /// The host CPU that ran the thread last; `None` if it has ended.
    pub host_cpu: Option<u32>,
    /// The host CPUs on which it may run, as a list of ranges; `None` if it has ended.
    pub host_cpus_allowed: Option<String>,
}

impl VcpuThread {
    /// What /proc shows of a thread of process `vmm_pid` (proc(5): field 39 of `stat`, `Cpus_allowed_list`).
    pub fn of(vmm_pid: u32, vcpu: Cpu, thread: u32) -> Self {
        let read = |name: &str| fs::read_to_string(format!("/proc/{vmm_pid}/task/{thread}/{name}")).ok();
        let host_cpu = read("stat").as_deref().and_then(last_cpu);
        let allowed = read("status").as_deref().and_then(allowed_cpus);
        Self { vcpu: vcpu.0, thread, host_cpu, host_cpus_allowed: allowed }
    }
}

impl fmt::Display for VcpuThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vCPU {}: thread {}", self.vcpu, self.thread)?;
        match (self.host_cpu, &self.host_cpus_allowed) {
            (Some(cpu), Some(allowed)) => write!(f, ", CPU {cpu} of {allowed}"),
            (Some(cpu), None) => write!(f, ", CPU {cpu}"),
            _ => write!(f, ", has ended"),
        }
    }
}

/// The vCPU threads of a running VMM that its names show, in the order of vCPUs.
pub fn running_vcpus(vmm_pid: u32) -> Vec<VcpuThread> {
    named_threads(vmm_pid).into_iter().map(|(vcpu, thread)| VcpuThread::of(vmm_pid, vcpu, thread)).collect()
}

/// Field 39 of /proc/PID/stat. The name, field 2, may contain anything; the last parenthesis ends it.
fn last_cpu(stat: &str) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(36)?.parse().ok()
}

fn allowed_cpus(status: &str) -> Option<String> {
    Some(status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?.trim().to_owned())
}

/// The threads of process `vmm_pid` that run `cpus`; `by_kvm` takes precedence over names.
pub fn vcpu_threads(vmm_pid: u32, cpus: &[Cpu], by_kvm: &[Vcpu]) -> VcpuThreads {
    let mut found = named_threads(vmm_pid);
    found.extend(by_kvm.iter().filter(|vcpu| vcpu.tid != 0).map(|vcpu| (vcpu.cpu, vcpu.tid)));
    let threads = cpus.iter().map(|cpu| (*cpu, found.get(cpu).copied().unwrap_or(vmm_pid))).collect();
    VcpuThreads { vmm_pid, threads, known: cpus.iter().all(|cpu| found.contains_key(cpu)) }
}

/// The vCPU threads of a process by their names.
fn named_threads(pid: u32) -> BTreeMap<Cpu, u32> {
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
    fn host_cpu_of_a_thread_is_what_the_kernel_reports() {
        let stat = "7 (CPU 0/KVM) x) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 \
                    31 32 33 34 35 5 0 0";
        assert_eq!(last_cpu(stat), Some(5));
        assert_eq!((last_cpu("7 (x) S 1"), last_cpu("")), (None, None));
        let (pid, thread) = (std::process::id(), nix::unistd::gettid().as_raw().cast_unsigned());
        let found = VcpuThread::of(pid, Cpu(2), thread);
        let allowed = found.host_cpus_allowed.as_deref().unwrap();
        let cpu = found.host_cpu.unwrap();
        assert_eq!(found.to_string(), format!("vCPU 2: thread {thread}, CPU {cpu} of {allowed}"));
        assert_eq!(VcpuThread::of(pid, Cpu(2), 0).to_string(), "vCPU 2: thread 0, has ended");
    }

    #[test]
    fn process_stands_in_for_threads_without_a_name() {
        let pid = std::process::id();
        let found = vcpu_threads(pid, &[Cpu(0), Cpu(1)], &[]);
        assert_eq!(found, VcpuThreads { vmm_pid: pid, threads: vec![(Cpu(0), pid), (Cpu(1), pid)], known: false });
    }

    #[test]
    fn threads_that_kvm_reports_need_no_name() {
        let vcpu = |cpu, tid| Vcpu { cpu: Cpu(cpu), vcpu_id: 2 * cpu, tid, states: Vec::new(), changes: Vec::new() };
        let pid = std::process::id();
        let cpus = [Cpu(0), Cpu(1)];
        let found = vcpu_threads(pid, &cpus, &[vcpu(1, 41), vcpu(0, 40)]);
        assert_eq!(found, VcpuThreads { vmm_pid: pid, threads: vec![(Cpu(0), 40), (Cpu(1), 41)], known: true });
        assert!(!vcpu_threads(pid, &cpus, &[vcpu(1, 41), vcpu(0, 0)]).known);
    }
}
