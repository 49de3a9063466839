//! Who is meant: guests, CPUs and lanes.

use core::fmt;

/// A CPU's number as its own kernel counts it. On a host and in a guest alike; never an index into something else.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct Cpu(pub u32);

impl fmt::Display for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cpu{}", self.0)
    }
}

/// A guest's number in its server: its place in the order of `--dom`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct GuestId(pub u16);

/// One CPU's path from its ring buffer to its part of a file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LaneId {
    /// Whose CPU it is.
    pub guest: GuestId,
    /// Which CPU.
    pub cpu: Cpu,
}

impl fmt::Display for LaneId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guest{}/{}", self.guest.0, self.cpu)
    }
}
