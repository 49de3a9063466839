//! How much guest memory this process maps.
//!
//! In:    sizes of regions, which their virtual machine monitors choose
//! Out:   a [`Reservation`] for each region, given back when dropped
//! Runs:  on device threads; a lock is held for some instructions
//! Full:  a region beyond the guest's share is refused
//! Trust: nothing: a sparse file may be larger than all memory, and costs nothing. Without a bound one of 128 TiB takes
//!        every address this process has, and the next allocation ends it with all guests
//!
//! A guest may have half of what the others leave: a single one may be very large, and several that take all they can
//! still leave room for the next.

use std::sync::{Arc, Mutex, PoisonError};

use crate::sys::limit::address_space_bytes;

/// Bytes of guest memory in one process: three quarters of the 2^47 bytes that x86-64 gives it.
pub const MAPPED_BYTES_MAX: u64 = 96 << 40;

/// Bytes of guest memory that this process maps at most: the limit of its address space (RLIMIT_AS) may be lower.
pub fn mapped_bytes_max() -> u64 {
    MAPPED_BYTES_MAX.min(address_space_bytes() / 4 * 3)
}

/// The guest memory of one process.
#[derive(Debug)]
pub struct MemoryBudget {
    bytes: u64,
    used: Mutex<u64>,
}

/// One guest's part of it. Clones are the same.
#[derive(Clone, Debug)]
pub struct MemoryShare {
    budget: Arc<MemoryBudget>,
    used: Arc<Mutex<u64>>,
}

/// Bytes that are mapped, until it is dropped.
#[derive(Debug)]
pub struct Reservation {
    share: MemoryShare,
    bytes: u64,
}

/// The guest may map so many bytes more, and no more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OverBudget(pub u64);

impl MemoryBudget {
    /// A budget of which nothing is used.
    pub fn new(bytes: u64) -> Arc<Self> {
        Arc::new(Self { bytes, used: Mutex::new(0) })
    }

    /// The part of one more guest.
    pub fn share(self: &Arc<Self>) -> MemoryShare {
        MemoryShare { budget: Arc::clone(self), used: Arc::default() }
    }
}

impl Default for MemoryShare {
    /// The only guest of a process.
    fn default() -> Self {
        MemoryBudget::new(MAPPED_BYTES_MAX).share()
    }
}

impl MemoryShare {
    /// Sets bytes aside for a region.
    pub fn reserve(&self, bytes: u64) -> Result<Reservation, OverBudget> {
        let mut total = self.budget.used.lock().unwrap_or_else(PoisonError::into_inner);
        let mut own = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let others = *total - *own;
        let left = ((self.budget.bytes - others) / 2).saturating_sub(*own);
        if bytes > left {
            return Err(OverBudget(left));
        }
        *total += bytes;
        *own += bytes;
        Ok(Reservation { share: self.clone(), bytes })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        *self.share.budget.used.lock().unwrap_or_else(PoisonError::into_inner) -= self.bytes;
        *self.share.used.lock().unwrap_or_else(PoisonError::into_inner) -= self.bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIB: u64 = 1 << 40;

    /// Takes all that a share may have.
    fn take_all(share: &MemoryShare) -> (Reservation, u64) {
        let OverBudget(left) = share.reserve(u64::MAX).unwrap_err();
        (share.reserve(left).unwrap(), left)
    }

    #[test]
    fn greedy_guests_leave_room_for_the_next() {
        let budget = MemoryBudget::new(MAPPED_BYTES_MAX);
        let greedy: Vec<_> = (0..8).map(|_| take_all(&budget.share())).collect();
        assert_eq!(greedy[0].1, 48 * TIB, "the largest guest on its own");
        budget.share().reserve(128 << 30).expect("an ordinary guest beside eight of them");
    }

    #[test]
    fn what_a_guest_gives_back_can_be_had_again() {
        let budget = MemoryBudget::new(MAPPED_BYTES_MAX);
        let share = budget.share();
        let (all, bytes) = take_all(&share);
        assert_eq!(share.reserve(1).unwrap_err(), OverBudget(0));
        drop(all);
        assert_eq!(take_all(&share).1, bytes);
    }

    #[test]
    fn regions_of_one_guest_count_together_whichever_device_maps_them() {
        let budget = MemoryBudget::new(8 * TIB);
        let share = budget.share();
        let _first = share.reserve(3 * TIB).unwrap();
        assert_eq!(share.clone().reserve(2 * TIB).unwrap_err(), OverBudget(TIB));
    }
}
