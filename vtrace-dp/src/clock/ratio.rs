//! How a scaling ratio is to be read: `guest = offset + (host × ratio >> fraction bits)`.
//!
//! In:    a ratio as KVM holds it; which virtualization the CPU has.
//! Out:   [`Ratio`], or that the guest's TSC runs at the host's rate.
//! Runs:  anywhere; pure but for [`Isa::of_this_machine`].
//! Full:  does not apply.
//! Trust: the kernel.
//!
//! Source: arch/x86/kvm/x86.c `kvm_scale_tsc`; 48 bits in vmx.c `hardware_setup`, 32 in svm.c `svm_hardware_setup`.

use std::fs;
use std::io;
use std::num::NonZeroU64;

use thiserror::Error;

/// Hardware virtualization of this CPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Isa {
    /// Intel and compatible.
    Vmx,
    /// AMD and compatible.
    Svm,
    /// Neither: KVM that runs without it does not scale.
    None,
}

impl Isa {
    /// From the CPU flags of this machine; no CPU has both.
    ///
    /// # Errors
    /// When /proc/cpuinfo cannot be read.
    pub fn of_this_machine() -> io::Result<Self> {
        fs::read_to_string("/proc/cpuinfo").map(|text| Self::from_cpuinfo(&text))
    }

    fn from_cpuinfo(text: &str) -> Self {
        let flags = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        let has = |flag| flags.split_whitespace().any(|word| word == flag);
        match (has("vmx"), has("svm")) {
            (true, _) => Self::Vmx,
            (_, true) => Self::Svm,
            _ => Self::None,
        }
    }

    const fn fraction_bits(self) -> Option<u32> {
        match self {
            Self::Vmx => Some(48),
            Self::Svm => Some(32),
            Self::None => None,
        }
    }
}

/// A fixed-point number that is not one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Ratio {
    /// As the hardware takes it.
    pub raw: NonZeroU64,
    /// Bits after the binary point.
    pub fraction_bits: u32,
}

/// A ratio that this CPU cannot have.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("TSC ratio {raw:#x} on a CPU without VMX and SVM")]
pub struct RatioError {
    /// As KVM holds it.
    pub raw: u64,
}

impl Ratio {
    /// `Ok(None)`: the guest's TSC runs at the host's rate. So it does for KVM without TSC scaling, whatever stands in
    /// the field: 0 (5.10; also after KVM_SET_TSC_KHZ on the VM), 1 (KVM without hardware virtualization, older VMX).
    ///
    /// # Errors
    /// [`RatioError`] for any other number where there is no scaling hardware.
    pub const fn read(raw: u64, isa: Isa) -> Result<Option<Self>, RatioError> {
        const VMX_ONE: u64 = 1 << 48;
        const SVM_ONE: u64 = 1 << 32;
        match (NonZeroU64::new(raw), isa.fraction_bits()) {
            (None, _) => Ok(None),
            (Some(one), _) if matches!(one.get(), 1 | VMX_ONE | SVM_ONE) => Ok(None),
            (Some(raw), Some(fraction_bits)) => Ok(Some(Self { raw, fraction_bits })),
            (Some(_), None) => Err(RatioError { raw }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_ratios_are_the_hosts_own_rate() {
        for isa in [Isa::Vmx, Isa::Svm, Isa::None] {
            for raw in [0, 1, 1 << 32, 1 << 48] {
                assert_eq!(Ratio::read(raw, isa), Ok(None));
            }
        }
    }

    #[test]
    fn half_the_rate_has_the_fraction_bits_of_its_hardware() {
        let read = |raw, isa| Ratio::read(raw, isa).unwrap().map(|ratio| (ratio.raw.get(), ratio.fraction_bits));
        assert_eq!(read(1 << 47, Isa::Vmx), Some((1 << 47, 48)));
        assert_eq!(read(1 << 31, Isa::Svm), Some((1 << 31, 32)));
    }

    #[test]
    fn scaling_without_hardware_for_it_is_refused() {
        assert_eq!(Ratio::read(0x2492_8567_c7d6, Isa::None), Err(RatioError { raw: 0x2492_8567_c7d6 }));
    }

    #[test]
    fn virtualization_is_read_from_the_cpu_flags() {
        assert_eq!(Isa::from_cpuinfo("vendor_id\t: x\nflags\t\t: fpu vmx tsc\n"), Isa::Vmx);
        assert_eq!(Isa::from_cpuinfo("flags\t\t: fpu svm\nvmx flags\t: vnmi\n"), Isa::Svm);
        assert_eq!(Isa::from_cpuinfo("flags\t\t: fpu svm_lock\n"), Isa::None);
    }
}
