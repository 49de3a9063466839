//! Maps the CPUs of a guest to KVM's vCPUs, and lists the TSC states of each in time order.
//!
//! In:    the changes that the eBPF programs reported; the APIC ids that the guest's agent reported
//! Out:   a [`Vcpu`] for each lane's CPU, or the reason why it is [`Unknown`]
//! Runs:  pure
//! Trust: the kernel. A guest that reports wrong APIC ids or clock readings misplaces only its own events

use serde::Serialize;
use vtrace_common::{ids::Cpu, kvm::TscChange, time::HostTsc};

use super::{
    Offset,
    ratio::{Isa, Ratio},
    sync::Measurement,
};

/// A TSC state as the eBPF programs reported it, with the host's TSC at that moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TimedChange {
    /// The host's TSC at [`TscChange::seen_ns`].
    pub seen: HostTsc,
    /// Largest error of `seen`, cycles.
    pub error_cycles: u64,
    /// The reported state.
    pub change: TscChange,
}

/// A period in which a vCPU had one offset and one ratio.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct TscState {
    /// When it was first seen. It took effect after the guest's previous run; the first state was in effect earlier.
    pub seen: HostTsc,
    /// Largest error of `seen`, cycles.
    pub error_cycles: u64,
    /// `l1_tsc_offset`: guest − scaled host, cycles, modulo 2⁶⁴.
    pub offset: u64,
    /// `l1_tsc_scaling_ratio`, fixed point.
    pub ratio: u64,
    /// The guest's TSC at its last exit under the previous state: a hint; 0 if unknown.
    pub last_guest_tsc: u64,
    /// The hook that reported it: [`vtrace_common::kvm::source`].
    pub source: u8,
}

/// One CPU of a guest, as KVM knows it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Vcpu {
    /// The guest's number of the CPU.
    pub cpu: Cpu,
    /// KVM's number of the vCPU: the APIC id.
    pub vcpu_id: u32,
    /// The thread that last ran it; 0 if it never ran.
    pub tid: u32,
    /// At least one, in time order; each differs from the previous one in offset or ratio.
    pub states: Vec<TscState>,
    /// All reported changes in time order, including those that repeat a state.
    #[serde(skip)]
    pub changes: Vec<TimedChange>,
}

/// Why a guest's vCPUs are not known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unknown {
    /// The guest runs under TCG or another hypervisor.
    #[error("its VMM runs no vCPU under KVM")]
    NoVcpus,
    /// The guest is not x86, or its /proc/cpuinfo has no APIC ids.
    #[error("its agent reported no APIC id of {0}")]
    NoApic(Cpu),
    /// The VMM has vCPUs, but none with this id.
    #[error("its VMM has no vCPU with the APIC id {apic} of {cpu}")]
    NoVcpu {
        /// The guest's CPU.
        cpu: Cpu,
        /// Its APIC id.
        apic: u32,
    },
    /// The measurement matches none of the VMM's VMs, or several.
    #[error("the measured offset matches {fit} of the {vms} VMs of its VMM")]
    Ambiguous {
        /// VMs with the guest's vCPUs and a matching offset.
        fit: usize,
        /// VMs of the process.
        vms: usize,
    },
    /// Secure TSC: the true offset is in encrypted memory.
    #[error("KVM does not control the TSC of {0} (Secure TSC)")]
    Protected(Cpu),
}

/// The vCPUs of the process `vmm_pid` that are the guest's CPUs `lanes`. If the process has several VMs, the `measured`
/// offsets identify the guest's.
///
/// # Errors
/// A lane has no vCPU, or KVM does not know its TSC.
pub fn guest_vcpus(
    changes: &[TimedChange],
    vmm_pid: u32,
    apics: &[(Cpu, u32)],
    lanes: &[Cpu],
    measured: &[Measurement],
    isa: Isa,
) -> Result<Vec<Vcpu>, Unknown> {
    let mut changes: Vec<TimedChange> = changes.iter().filter(|seen| seen.change.vmm_pid == vmm_pid).copied().collect();
    changes.sort_by_key(|seen| seen.change.seen_ns);
    let mut vms: Vec<u64> = changes.iter().map(|seen| seen.change.kvm).collect();
    vms.sort_unstable();
    vms.dedup();
    let candidates = vms.iter().map(|kvm| {
        let of_vm: Vec<TimedChange> = changes.iter().filter(|seen| seen.change.kvm == *kvm).copied().collect();
        lanes.iter().map(|cpu| of_cpu(&of_vm, *cpu, apics, isa)).collect::<Result<Vec<Vcpu>, Unknown>>()
    });
    let mut candidates: Vec<_> = candidates.collect();
    if candidates.len() <= 1 {
        let only = candidates.pop().unwrap_or(Err(Unknown::NoVcpus))?;
        let fits = fit(&only, measured, isa);
        return fits.then_some(only).ok_or(Unknown::Ambiguous { fit: 0, vms: 1 });
    }
    let fitting: Vec<_> = candidates.into_iter().flatten().filter(|vcpus| fit(vcpus, measured, isa)).collect();
    let count = fitting.len();
    let mut fitting = fitting.into_iter();
    fitting.next().filter(|_| count == 1).ok_or(Unknown::Ambiguous { fit: count, vms: vms.len() })
}

/// The vCPU of one CPU, among the changes of one VM.
fn of_cpu(changes: &[TimedChange], cpu: Cpu, apics: &[(Cpu, u32)], isa: Isa) -> Result<Vcpu, Unknown> {
    let (_, apic) = *apics.iter().find(|(named, _)| *named == cpu).ok_or(Unknown::NoApic(cpu))?;
    let changes: Vec<TimedChange> = changes.iter().filter(|seen| seen.change.vcpu_id == apic).copied().collect();
    let mut vcpu = Vcpu { cpu, vcpu_id: apic, tid: 0, states: Vec::new(), changes };
    for &TimedChange { seen, error_cycles, change } in &vcpu.changes {
        // TDX protects the TSC too, but KVM has a copy of its constant offset.
        if change.tsc_protected != 0 && isa != Isa::Vmx {
            return Err(Unknown::Protected(cpu));
        }
        if change.vcpu_tid != 0 {
            vcpu.tid = change.vcpu_tid;
        }
        let TscChange { offset, ratio, last_guest_tsc, source, .. } = change;
        if vcpu.states.last().is_none_or(|last| (last.offset, last.ratio) != (offset, ratio)) {
            vcpu.states.push(TscState { seen, error_cycles, offset, ratio, last_guest_tsc, source });
        }
    }
    if vcpu.states.is_empty() { Err(Unknown::NoVcpu { cpu, apic }) } else { Ok(vcpu) }
}

/// host − guest in this state; `None` if the guest's TSC is scaled.
fn offset_of(state: &TscState, isa: Isa) -> Option<Offset> {
    matches!(Ratio::read(state.ratio, isa), Ok(None)).then(|| Offset(state.offset.wrapping_neg()))
}

/// Whether every measurement contains an offset that its vCPU had. Measurements during which the offset moved, and those
/// of a scaled TSC, match any vCPU.
fn fit(vcpus: &[Vcpu], measured: &[Measurement], isa: Isa) -> bool {
    measured.iter().filter(|measurement| !measurement.moved).all(|measurement| {
        let states = vcpus.iter().filter(|vcpu| vcpu.cpu == measurement.cpu).flat_map(|vcpu| &vcpu.states);
        let mut offsets = states.map(|state| offset_of(state, isa));
        offsets.any(|offset| offset.is_none_or(|offset| measurement.interval.contains(offset)))
    })
}

/// The largest number of states of any vCPU.
pub fn segments(vcpus: &[Vcpu]) -> usize {
    vcpus.iter().map(|vcpu| vcpu.states.len()).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::{super::sync::Interval, *};
    use vtrace_common::{kvm::source, time::GuestTsc};

    const VMM: u32 = 77;

    fn told(kvm: u64, vcpu_id: u32, seen_ns: u64, offset: i64) -> TimedChange {
        let change = TscChange {
            vcpu: kvm + u64::from(vcpu_id),
            kvm,
            offset: offset.cast_unsigned(),
            ratio: 1 << 32,
            seen_ns,
            vmm_pid: VMM,
            vcpu_tid: 100 + vcpu_id,
            vcpu_id,
            source: source::ENTRY,
            ..TscChange::default()
        };
        TimedChange { seen: HostTsc(seen_ns * 3), error_cycles: 1, change }
    }

    fn measured(cpu: u32, low: u64) -> Measurement {
        let interval = Interval { low: Offset(low), width: 100 };
        let (cpu, at) = (Cpu(cpu), GuestTsc(1));
        Measurement { cpu, at, interval, rounds: 1, refused: 0, best_round_trip: 100, moved: false }
    }

    fn guest(changes: &[TimedChange], apics: &[(Cpu, u32)], measured: &[Measurement]) -> Result<Vec<Vcpu>, Unknown> {
        let lanes: Vec<Cpu> = apics.iter().map(|(cpu, _)| *cpu).collect();
        guest_vcpus(changes, VMM, apics, &lanes, measured, Isa::Svm)
    }

    #[test]
    fn vcpu_belongs_to_the_cpu_with_its_apic_id_not_to_its_place() {
        let told = [told(1, 0, 5, -500), told(1, 2, 6, -700)];
        let vcpus = guest(&told, &[(Cpu(0), 2), (Cpu(1), 0)], &[]).unwrap();
        let found: Vec<_> =
            vcpus.iter().map(|vcpu| (vcpu.cpu, vcpu.tid, vcpu.states[0].offset.cast_signed())).collect();
        assert_eq!(found, [(Cpu(0), 102, -700), (Cpu(1), 100, -500)]);
        let missing = Unknown::NoVcpu { cpu: Cpu(0), apic: 1 };
        assert_eq!(guest(&told, &[(Cpu(0), 1)], &[]), Err(missing));
    }

    #[test]
    fn states_are_in_the_order_of_time_and_differ() {
        let told = [told(1, 0, 9, -400), told(1, 0, 5, -500), told(1, 0, 7, -500)];
        let vcpus = guest(&told, &[(Cpu(0), 0)], &[]).unwrap();
        let states: Vec<_> = vcpus[0].states.iter().map(|state| (state.seen.0, state.offset.cast_signed())).collect();
        assert_eq!((states, segments(&vcpus)), (vec![(15, -500), (27, -400)], 2));
        assert_eq!(vcpus[0].changes.iter().map(|change| change.seen.0).collect::<Vec<_>>(), [15, 21, 27]);
    }

    #[test]
    fn scaled_clock_is_not_contradicted_by_a_measurement() {
        let mut scaled = told(1, 0, 5, -500);
        scaled.change.ratio = 3 << 31;
        let vcpus = guest(&[scaled], &[(Cpu(0), 0)], &[measured(0, 1 << 40)]).unwrap();
        assert_eq!(vcpus[0].states[0].ratio, 3 << 31);
    }

    #[test]
    fn measurement_decides_between_vms_of_one_process() {
        let told = [told(1, 0, 5, -500), told(2, 0, 6, -9000)];
        let apics = [(Cpu(0), 0)];
        let vcpus = guest(&told, &apics, &[measured(0, 8950)]).unwrap();
        assert_eq!(vcpus[0].states[0].offset.cast_signed(), -9000);
        assert_eq!(guest(&told, &apics, &[]), Err(Unknown::Ambiguous { fit: 2, vms: 2 }));
        assert_eq!(guest(&told, &apics, &[measured(0, 70)]), Err(Unknown::Ambiguous { fit: 0, vms: 2 }));
    }

    #[test]
    fn offset_that_contradicts_the_measurement_is_refused() {
        let told = [told(1, 0, 5, -500)];
        assert_eq!(guest(&told, &[(Cpu(0), 0)], &[measured(0, 501)]), Err(Unknown::Ambiguous { fit: 0, vms: 1 }));
        let moved = Measurement { moved: true, ..measured(0, 501) };
        assert!(guest(&told, &[(Cpu(0), 0)], &[moved]).is_ok());
    }

    #[test]
    fn guest_without_kvm_or_with_a_secret_tsc_is_refused_with_the_reason() {
        let mut other = told(1, 0, 5, -500);
        other.change.vmm_pid = 1;
        assert_eq!(guest(&[other], &[(Cpu(0), 0)], &[]), Err(Unknown::NoVcpus));
        let mut secret = told(1, 0, 5, -500);
        secret.change.tsc_protected = 1;
        assert_eq!(guest(&[secret], &[(Cpu(0), 0)], &[]), Err(Unknown::Protected(Cpu(0))));
        let lanes = [Cpu(0)];
        let nameless = guest_vcpus(&[told(1, 0, 5, -500)], VMM, &[], &lanes, &[], Isa::Svm);
        assert_eq!(nameless, Err(Unknown::NoApic(Cpu(0))));
    }
}
