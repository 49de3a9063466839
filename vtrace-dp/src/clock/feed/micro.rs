//! A guest of twenty instructions: reads its TSC, writes its TSC_ADJUST, leaves at every turn.
#![expect(unsafe_code, reason = "memory is handed to KVM by address; the host's TSC is read")]

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const MEMORY: u64 = 0x1000;
const WRITE_ADJUST: u64 = 0x1080;
const ANSWER: u64 = 0x1800;
const IA32_TSC: u32 = 0x10;

/// Real mode, at [`MEMORY`]: rdtsc; store it at [`ANSWER`]; out 0x10, al; again.
const READ_TSC: &[u8] = &[0x0f, 0x31, 0x66, 0xa3, 0x00, 0x18, 0x66, 0x89, 0x16, 0x04, 0x18, 0xe6, 0x10, 0xeb, 0xf1];

/// One VM with one vCPU.
pub(crate) struct Micro {
    pub(crate) vcpu: VcpuFd,
    _vm: VmFd,
    memory: GuestMemoryMmap,
}

impl Micro {
    pub(crate) fn new() -> Self {
        Self::with_vcpu(0)
    }

    pub(crate) fn with_vcpu(vcpu_id: u64) -> Self {
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(MEMORY), 0x1000)]).unwrap();
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: MEMORY,
            memory_size: 0x1000,
            userspace_addr: memory.get_host_address(GuestAddress(MEMORY)).unwrap() as u64,
        };
        // SAFETY: the mapping lives as long as the VM, in the same struct; both sides touch it as bytes only.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        let vcpu = vm.create_vcpu(vcpu_id).unwrap();
        let supported: CpuId = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        vcpu.set_cpuid2(&supported).unwrap(); // from 7.3 on before the segment registers
        let mut segments = vcpu.get_sregs().unwrap();
        (segments.cs.base, segments.cs.selector) = (0, 0);
        vcpu.set_sregs(&segments).unwrap();
        memory.write_slice(READ_TSC, GuestAddress(MEMORY)).unwrap();
        let micro = Self { vcpu, _vm: vm, memory };
        micro.start_at(MEMORY);
        micro
    }

    pub(crate) fn fd(&self) -> u32 {
        u32::try_from(self.vcpu.as_raw_fd()).unwrap()
    }

    pub(crate) fn second_fd(&self) -> OwnedFd {
        // SAFETY: the vCPU holds its descriptor open for as long as this borrow.
        let first = unsafe { BorrowedFd::borrow_raw(self.vcpu.as_raw_fd()) };
        first.try_clone_to_owned().unwrap()
    }

    /// Lets the guest read its TSC `times` times; each must lie where `expected` puts the host's TSC before and after.
    pub(crate) fn read_tsc(&mut self, times: usize, expected: impl Fn(u64) -> u64) {
        self.start_reading();
        for _ in 0..times {
            let [before, guest, after] = self.reading();
            let since = guest.wrapping_sub(expected(before));
            assert!(since <= expected(after).wrapping_sub(expected(before)), "{guest} in {before}..{after}");
        }
    }

    /// Lets the guest read its TSC once: what it read, between the host's before and after.
    pub(crate) fn reading(&mut self) -> [u64; 3] {
        let before = host_tsc();
        self.turn();
        let after = host_tsc();
        [before, self.memory.read_obj(GuestAddress(ANSWER)).unwrap(), after]
    }

    /// Begins with reading the TSC, and reads it once.
    pub(crate) fn start_reading(&mut self) {
        self.start_at(MEMORY);
        self.turn();
    }

    /// Lets the guest's TSC run at `thousandths` of the host's rate; false where the hardware has no scaling.
    pub(crate) fn set_rate(&self, thousandths: u32) -> bool {
        let scales = Kvm::new().unwrap().check_extension(Cap::TscControl);
        if scales {
            let host_khz = u64::from(Self::new().vcpu.get_tsc_khz().unwrap());
            self.vcpu.set_tsc_khz(u32::try_from(host_khz * u64::from(thousandths) / 1000).unwrap()).unwrap();
        }
        scales
    }

    /// The guest adds `ticks` to its TSC_ADJUST.
    pub(crate) fn adjust(&mut self, ticks: u32) {
        let [one, two, three, four] = ticks.to_le_bytes();
        let code = [
            &[0x66, 0xb9, 0x3b, 0, 0, 0, 0x0f, 0x32][..], // mov ecx, 0x3b; rdmsr
            &[0x66, 0x05, one, two, three, four],         // add eax, ticks
            &[0x66, 0x83, 0xd2, 0, 0x0f, 0x30],           // adc edx, 0; wrmsr
            &[0xe6, 0x10, 0xeb, 0xfe],                    // out 0x10, al; stop here
        ];
        self.memory.write_slice(&code.concat(), GuestAddress(WRITE_ADJUST)).unwrap();
        self.start_at(WRITE_ADJUST);
        self.turn();
    }

    /// The host sets the guest's TSC.
    pub(crate) fn set_tsc(&self, ticks: u64) {
        let entry = kvm_msr_entry { index: IA32_TSC, data: ticks, ..Default::default() };
        assert_eq!(self.vcpu.set_msrs(&Msrs::from_entries(&[entry]).unwrap()).unwrap(), 1);
    }

    fn start_at(&self, address: u64) {
        let mut registers = self.vcpu.get_regs().unwrap();
        (registers.rip, registers.rflags) = (address, 2);
        self.vcpu.set_regs(&registers).unwrap();
    }

    /// Runs until the guest's next `out`.
    pub(crate) fn turn(&mut self) {
        match self.vcpu.run().unwrap() {
            VcpuExit::IoOut(0x10, _) => {}
            other => panic!("the guest left with {other:?}"),
        }
    }
}

fn host_tsc() -> u64 {
    // SAFETY: reads a counter; touches no memory. The guest's ioctl on either side keeps it in order.
    unsafe { std::arch::x86_64::_rdtsc() }
}
