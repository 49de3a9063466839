//! Converts guest time to host time.
//!
//! A guest reads the host's TSC shifted by an offset, and perhaps scaled by a ratio. KVM knows both; where there is no KVM
//! (TCG), the offset is measured over the control port. Top down, each module uses only those below it:
//!
//! | module | what |
//! |---|---|
//! | `watch` | KVM's offsets and ratios during one recording, with host times |
//! | `feed` | the eBPF programs that report the offset and ratio of every vCPU |
//! | `btf` | finds the kernel's fields that these programs read |
//! | `exact_shift` | from known offsets to the time shift of a file that stock readers apply exactly |
//! | `measured` | from measured offsets to the time shift of a file, with its error bound |
//! | `page_times` | host times of the events of one lane, page by page |
//! | `stalled_times` | host times of events that were written while the guest's clock stepped back |
//! | `vcpus` | which vCPU is which CPU of a guest |
//! | `sync` | bounds of an offset from round trips between host and guest |
//! | `table` | the clock of a guest: the histories of all of its vCPUs |
//! | `segment` | the history of one vCPU's offset and ratio |
//! | `math` | the conversion within one segment, forward as the hardware does it and its exact inverse |
//! | `ratio` | the fixed-point scaling ratio |
//! | `shift` | the time shift of a file |
//! | `scale` | nanoseconds per cycle of the host's TSC |
//! | `reading` | the TSC and a kernel clock at one moment |
//!
//! In:    offsets and ratios from the kernel, round trips with a guest's agent, time stamps of a guest's pages
//! Out:   host times, and the time shift of a file with its error bound
//! Runs:  on the caller's thread. Only `watch`, `feed`, `scale` and `reading` read a clock or the kernel
//! Trust: the kernel; nothing that a guest reports: arithmetic is modulo 2⁶⁴, impossible readings are counted and ignored,
//!        and no guest's readings affect another guest
//!
//! Only this room turns a [`GuestTsc`] into a [`HostTsc`]. An [`Offset`] is always *host − guest*, in cycles, modulo 2⁶⁴.

pub mod btf;
pub mod exact_shift;
pub mod feed;
pub mod math;
pub mod measured;
pub mod page_times;
pub mod ratio;
mod reading;
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

    /// The host's TSC when the guest's was `guest`.
    pub fn to_host(self, guest: GuestTsc) -> HostTsc {
        HostTsc(guest.0.wrapping_add(self.0))
    }

    /// What a reader of a file has to add to a guest time, two's complement.
    pub fn to_file(self) -> i64 {
        self.0.cast_signed()
    }

    /// The offset that is larger by `cycles`.
    pub fn plus(self, cycles: u64) -> Self {
        Self(self.0.wrapping_add(cycles))
    }

    /// How much larger this is than `other`; negative if it is less than half of 2⁶⁴ below.
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
