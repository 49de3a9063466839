//! A guest of twenty instructions: reads its TSC, writes its TSC_ADJUST, leaves at every turn.
#![expect(unsafe_code, reason = "a descriptor is borrowed by its number; the host's TSC is read")]

use crate::sys::page_guest::{CODE, PageGuest};
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Cap, Kvm, VcpuExit};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

const WRITE_ADJUST: u64 = CODE + 0x80;
const ANSWER: u64 = 0x1800;
const IA32_TSC: u32 = 0x10;

/// At [`CODE`]: rdtsc; store it at [`ANSWER`]; out 0x10, al; again.
const READ_TSC: &[u8] = &[0x0f, 0x31, 0x66, 0xa3, 0x00, 0x18, 0x66, 0x89, 0x16, 0x04, 0x18, 0xe6, 0x10, 0xeb, 0xf1];

/// One VM with one vCPU.
pub(crate) struct Micro {
    guest: PageGuest,
}

impl Micro {
    pub(crate) fn new() -> Self {
        Self::with_vcpu(0)
    }

    pub(crate) fn with_vcpu(vcpu_id: u64) -> Self {
        Self { guest: PageGuest::new(vcpu_id, READ_TSC).unwrap() }
    }

    pub(crate) fn fd(&self) -> u32 {
        u32::try_from(self.guest.vcpu.as_raw_fd()).unwrap()
    }

    pub(crate) fn second_fd(&self) -> OwnedFd {
        // SAFETY: the vCPU holds its descriptor open for as long as this borrow.
        let first = unsafe { BorrowedFd::borrow_raw(self.guest.vcpu.as_raw_fd()) };
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
        [before, self.guest.read_u64(ANSWER).unwrap(), after]
    }

    /// Begins with reading the TSC, and reads it once.
    pub(crate) fn start_reading(&mut self) {
        self.guest.start_at(CODE).unwrap();
        self.turn();
    }

    /// Lets the guest's TSC run at `thousandths` of the host's rate; false where the hardware has no scaling.
    pub(crate) fn set_rate(&self, thousandths: u32) -> bool {
        let scales = Kvm::new().unwrap().check_extension(Cap::TscControl);
        if scales {
            let host_khz = u64::from(Self::new().guest.vcpu.get_tsc_khz().unwrap());
            self.guest.vcpu.set_tsc_khz(u32::try_from(host_khz * u64::from(thousandths) / 1000).unwrap()).unwrap();
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
        self.guest.write(WRITE_ADJUST, &code.concat()).unwrap();
        self.guest.start_at(WRITE_ADJUST).unwrap();
        self.turn();
    }

    /// The host sets the guest's TSC.
    pub(crate) fn set_tsc(&self, ticks: u64) {
        let entry = kvm_msr_entry { index: IA32_TSC, data: ticks, ..Default::default() };
        assert_eq!(self.guest.vcpu.set_msrs(&Msrs::from_entries(&[entry]).unwrap()).unwrap(), 1);
    }

    /// Runs until the guest's next `out`.
    pub(crate) fn turn(&mut self) {
        match self.guest.vcpu.run().unwrap() {
            VcpuExit::IoOut(0x10, _) => {}
            other => panic!("the guest left with {other:?}"),
        }
    }
}

fn host_tsc() -> u64 {
    // SAFETY: reads a counter; touches no memory. The guest's ioctl on either side keeps it in order.
    unsafe { std::arch::x86_64::_rdtsc() }
}
