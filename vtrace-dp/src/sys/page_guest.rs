//! A virtual machine of one page and one vCPU, in real mode: what KVM does with a guest of some instructions.
//!
//! In:    its instructions
//! Out:   the vCPU, to be run; its page, to be read and written while it does not run
//! Runs:  on the caller's thread
//! Trust: the kernel; the instructions are ours

#![expect(unsafe_code, reason = "memory is handed to KVM by address")]

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap};

/// Where the page lies, and where its guest begins.
pub const CODE: u64 = 0x1000;
const PAGE_BYTES: u64 = 0x1000;
/// Only the flag that is always set.
const FLAGS: u64 = 2;

/// Why there is no such guest.
#[derive(Debug, thiserror::Error)]
pub enum PageGuestError {
    /// KVM is not there, or refuses.
    #[error("KVM refuses {what}")]
    Kvm {
        /// What it was asked for.
        what: &'static str,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
    /// The vCPU stopped for another reason than its last instruction.
    #[error("the vCPU ended with {0} instead of halting")]
    Exit(String),
    /// There is no memory for it, or an address is beyond its page.
    #[error("the guest's page")]
    Memory(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A virtual machine of one page and one vCPU.
#[derive(Debug)]
pub struct PageGuest {
    /// Its vCPU.
    pub vcpu: VcpuFd,
    _vm: VmFd,
    memory: GuestMemoryMmap,
}

impl PageGuest {
    /// A machine whose only vCPU has this id and stands before `code`, at [`CODE`].
    ///
    /// # Errors
    /// When KVM or the kernel refuses, or `code` is longer than a page.
    pub fn new(vcpu_id: u64, code: &[u8]) -> Result<Self, PageGuestError> {
        let kvm = Kvm::new().map_err(refused("/dev/kvm"))?;
        let vm = kvm.create_vm().map_err(refused("a VM"))?;
        let memory =
            GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(CODE), usize::try_from(PAGE_BYTES).expect("fits"))])
                .map_err(|error| PageGuestError::Memory(error.into()))?;
        let address = memory.get_host_address(GuestAddress(CODE)).map_err(absent)?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: CODE,
            memory_size: PAGE_BYTES,
            userspace_addr: address as u64,
        };
        // SAFETY: the mapping lives as long as the VM, in the same struct; both sides touch it as bytes only.
        unsafe { vm.set_user_memory_region(region) }.map_err(refused("its memory"))?;
        let vcpu = vm.create_vcpu(vcpu_id).map_err(refused("a vCPU"))?;
        let supported: CpuId = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("its CPUID"))?;
        vcpu.set_cpuid2(&supported).map_err(refused("a CPUID"))?; // from 7.3 on before the segment registers
        let mut segments = vcpu.get_sregs().map_err(refused("its registers"))?;
        (segments.cs.base, segments.cs.selector) = (0, 0);
        vcpu.set_sregs(&segments).map_err(refused("segments"))?;
        let guest = Self { vcpu, _vm: vm, memory };
        guest.write(CODE, code)?;
        guest.start_at(CODE)?;
        Ok(guest)
    }

    /// Runs a guest of a few instructions that halts: whether KVM can run guests at all.
    ///
    /// # Errors
    /// When KVM refuses a part of it, or the vCPU ends in another state.
    pub fn try_halt() -> Result<(), PageGuestError> {
        // mov $1, %al; hlt
        let mut guest = Self::new(0, &[0xb0, 0x01, 0xf4])?;
        match guest.vcpu.run().map_err(refused("to run a vCPU"))? {
            VcpuExit::Hlt => Ok(()),
            other => Err(PageGuestError::Exit(format!("{other:?}"))),
        }
    }

    /// Lets the vCPU go on at `address` when it runs next.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn start_at(&self, address: u64) -> Result<(), PageGuestError> {
        let mut registers = self.vcpu.get_regs().map_err(refused("its registers"))?;
        (registers.rip, registers.rflags) = (address, FLAGS);
        self.vcpu.set_regs(&registers).map_err(refused("registers"))
    }

    /// Writes into its page.
    ///
    /// # Errors
    /// When it does not fit there.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), PageGuestError> {
        self.memory.write_slice(bytes, GuestAddress(address)).map_err(absent)
    }

    /// Eight bytes of its page.
    ///
    /// # Errors
    /// When they are not all there.
    pub fn read_u64(&self, address: u64) -> Result<u64, PageGuestError> {
        self.memory.read_obj(GuestAddress(address)).map_err(absent)
    }
}

fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> PageGuestError {
    move |source| PageGuestError::Kvm { what, source }
}

fn absent(error: GuestMemoryError) -> PageGuestError {
    PageGuestError::Memory(error.into())
}
