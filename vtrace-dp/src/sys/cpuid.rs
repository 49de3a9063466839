//! What the CPU or its hypervisor says about the TSC's frequency.
//!
//! Out:   hertz, where a leaf names them
//! Trust: the CPU; a hypervisor may say anything, so this only cross-checks

use std::arch::x86_64::__cpuid;

const CRYSTAL_LEAF: u32 = 0x15;
const HYPERVISOR_LEAF: u32 = 0x4000_0000;
const TIMING_LEAF: u32 = 0x4000_0010;
const HYPERVISOR_PRESENT: u32 = 1 << 31;

/// The TSC's frequency: leaf 0x40000010 (kHz, in VMs of hypervisors that have it), else leaf 0x15 (crystal × ratio).
pub fn tsc_hz() -> Option<u64> {
    hypervisors_hz().or_else(crystals_hz)
}

fn hypervisors_hz() -> Option<u64> {
    let is_guest = __cpuid(1).ecx & HYPERVISOR_PRESENT != 0;
    let leaf_max = if is_guest { __cpuid(HYPERVISOR_LEAF).eax } else { 0 };
    let khz = (leaf_max >= TIMING_LEAF).then(|| __cpuid(TIMING_LEAF).eax)?;
    (khz != 0).then(|| u64::from(khz) * 1000)
}

/// Intel SDM volume 2A, CPUID leaf 15H: TSC = crystal (ECX) × EBX ÷ EAX; a zero anywhere means unknown.
fn crystals_hz() -> Option<u64> {
    let leaf = (__cpuid(0).eax >= CRYSTAL_LEAF).then(|| __cpuid(CRYSTAL_LEAF))?;
    let hz = (u64::from(leaf.ecx) * u64::from(leaf.ebx)).checked_div(u64::from(leaf.eax))?;
    (hz != 0).then_some(hz)
}

#[cfg(test)]
mod tests {
    #[test]
    fn frequency_is_possible_or_unknown() {
        assert!(super::tsc_hz().is_none_or(|hz| (100_000_000..10_000_000_000).contains(&hz)));
    }
}
