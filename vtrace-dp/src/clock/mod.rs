//! Guest time becomes host time.
//!
//! From the top down; each module uses only what stands below it:
//!
//! | module | what |
//! |---|---|
//! | `feed` | the eBPF programs at work: every vCPU's offset and ratio, now and at each change |
//! | `btf` | the fields that they read, found in the running kernel's BTF |
//! | `exact` | what a file says so that readers that know nothing of segments show host times |
//! | `lane` | the times of one lane, page by page, in order |
//! | `trap` | events whose times stood still while the clock went back |
//! | `plan` | from measurements at both ends to one time shift |
//! | `vcpus` | which vCPU is which CPU of a guest, and what KVM said of it |
//! | `sync` | questions and answers: between which two host times a guest time lies |
//! | `table` | all of a guest's clock: the histories of its vCPUs |
//! | `segment` | the history of one vCPU's TSC |
//! | `math` | one stretch of it, forward as the hardware does it and exactly back |
//! | `ratio` | how a scaling ratio is to be read |
//!
//! In:    what was measured or observed of a guest's clock; the kernel's own word through eBPF ([`btf`], [`feed`])
//! Out:   the time shift of a file, with its bound
//! Runs:  pure, no clock is read here; but for [`feed`], which is a thread's own
//! Trust: guests say anything about their clocks: arithmetic is modulo 2⁶⁴, impossible statements are counted and
//!        passed over, and no statement of one guest reaches another's plan
//!
//! This is the only room that turns a [`GuestTsc`] into a [`HostTsc`]. An offset is always *host − guest*, in cycles,
//! modulo 2⁶⁴.

pub mod btf;
pub mod exact_shift;
pub mod feed;
pub mod math;
pub mod measured;
pub mod page_times;
pub mod ratio;
pub mod scale;
pub mod segment;
pub mod shift;
pub mod stalled_times;
pub mod sync;
pub mod table;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod vcpus;
pub mod watch;

use vtrace_common::time::{GuestTsc, HostTsc};

/// host − guest, in cycles, modulo 2⁶⁴.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Offset(pub u64);

impl Offset {
    /// The offset between two readings taken at the same moment.
    pub fn between(host: HostTsc, guest: GuestTsc) -> Self {
        Self(host.0.wrapping_sub(guest.0))
    }

    /// What the host's TSC was when the guest's was `guest`.
    pub fn to_host(self, guest: GuestTsc) -> HostTsc {
        HostTsc(guest.0.wrapping_add(self.0))
    }

    /// As a file says it: what to add, two's complement.
    pub fn to_file(self) -> i64 {
        self.0.cast_signed()
    }

    /// The offset so many cycles larger.
    pub fn plus(self, cycles: u64) -> Self {
        Self(self.0.wrapping_add(cycles))
    }

    /// How much larger this is than `other`, the short way round.
    pub fn minus(self, other: Self) -> i64 {
        self.0.wrapping_sub(other.0).cast_signed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn offset_brings_each_guest_time_to_its_host_time(host: u64, guest: u64) {
            let offset = Offset::between(HostTsc(host), GuestTsc(guest));
            prop_assert_eq!(offset.to_host(GuestTsc(guest)), HostTsc(host));
            prop_assert_eq!(guest.wrapping_add_signed(offset.to_file()), host);
        }
    }
}
