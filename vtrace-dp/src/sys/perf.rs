//! What perf says about the TSC: the factor from cycles to nanoseconds that the kernel itself uses.
//!
//! Out:   mult and shift, or nothing where the kernel does not tell (perf is forbidden, or TSC is not its clock)
//! Trust: the kernel
#![expect(unsafe_code, reason = "perf_event_open has no wrapper; its page is shared with the kernel")]

use std::{
    num::NonZeroUsize,
    os::fd::{AsFd, FromRawFd, OwnedFd},
    ptr::NonNull,
};

use nix::{
    errno::Errno,
    libc,
    sys::mman::{MapFlags, ProtFlags, mmap, munmap},
};

use super::SysError;

// struct perf_event_attr, first version (include/uapi/linux/perf_event.h): 64 bytes, as eight words.
const ATTR_WORDS: usize = 8;
const TYPE_SOFTWARE: u64 = 1;
const COUNT_SW_DUMMY: u64 = 9;
const DISABLED_EXCLUDE_KERNEL_HV: u64 = 1 | 1 << 5 | 1 << 6;
const FLAG_FD_CLOEXEC: u64 = 1 << 3;

// struct perf_event_mmap_page, same header.
const PAGE_BYTES: NonZeroUsize = NonZeroUsize::new(4096).expect("4096 is not 0");
const CAPABILITIES_AT: usize = 40;
const CAP_USER_TIME: u64 = 1 << 3;
const TIME_SHIFT_AT: usize = 50;
const TIME_MULT_AT: usize = 52;

/// nanoseconds = cycles × `.0` >> `.1`, from a dummy event's page. `None`: the kernel does not offer it.
///
/// # Errors
/// When the event or its page is refused.
pub fn time_factor() -> Result<Option<(u32, u16)>, SysError> {
    let event = open_dummy()?;
    // SAFETY: a new mapping at an address the kernel chooses; no other code knows of it.
    let mapped = unsafe { mmap(None, PAGE_BYTES, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, event.as_fd(), 0) };
    let page = mapped.map_err(SysError::of("mmap(perf)"))?;
    // SAFETY: `page` is mapped until below.
    let factor = unsafe { read_factor(page.cast()) };
    // SAFETY: mapped above with this length, and no pointer into it is left.
    unsafe { munmap(page, PAGE_BYTES.get()) }.map_err(SysError::of("munmap(perf)"))?;
    Ok(factor)
}

/// # Safety
/// `page` is the readable first page of a perf event.
unsafe fn read_factor(page: NonNull<u8>) -> Option<(u32, u16)> {
    let at = |offset: usize| page.as_ptr().wrapping_byte_add(offset);
    // SAFETY: inside the caller's page; the kernel may write it meanwhile, so it is read as volatile.
    let capabilities = unsafe { at(CAPABILITIES_AT).cast::<u64>().read_volatile() };
    // SAFETY: as above. The factor is set once, when the page is mapped, and changes only with the TSC's frequency.
    let mult = unsafe { at(TIME_MULT_AT).cast::<u32>().read_volatile() };
    // SAFETY: as above.
    let shift = unsafe { at(TIME_SHIFT_AT).cast::<u16>().read_volatile() };
    (capabilities & CAP_USER_TIME != 0 && mult != 0 && shift <= 32).then_some((mult, shift))
}

fn open_dummy() -> Result<OwnedFd, SysError> {
    let mut attributes = [0u64; ATTR_WORDS];
    attributes[0] = TYPE_SOFTWARE | 64 << 32; // type, size
    attributes[1] = COUNT_SW_DUMMY; // config
    attributes[5] = DISABLED_EXCLUDE_KERNEL_HV;
    let (this_process, any_cpu, no_group) = (0, -1, -1);
    // SAFETY: the kernel reads 64 bytes at `attributes`, which outlives the call, and writes nothing.
    let opened = unsafe {
        libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), this_process, any_cpu, no_group, FLAG_FD_CLOEXEC)
    };
    let raw = Errno::result(opened).map_err(SysError::of("perf_event_open"))?;
    let raw = i32::try_from(raw).expect("a descriptor is an int");
    // SAFETY: the kernel has just given it to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

#[cfg(test)]
mod tests {
    #[test]
    fn factor_is_possible_where_the_kernel_offers_one() {
        match super::time_factor() {
            Ok(Some((mult, shift))) => {
                let ns_per_cycle = f64::from(mult) / 2f64.powi(i32::from(shift));
                assert!((0.05..20.0).contains(&ns_per_cycle), "{ns_per_cycle}");
            }
            other => println!("skipped: no factor here: {other:?}"),
        }
    }
}
