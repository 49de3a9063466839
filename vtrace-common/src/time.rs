//! Times that must not be mixed. Only `clock` converts one into another.

/// One vCPU's TSC as its guest reads it (guest x86-tsc trace clock). Not comparable between vCPUs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct GuestTsc(pub u64);

/// The host's TSC (host x86-tsc trace clock).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[cfg_attr(feature = "wire", derive(serde::Serialize, serde::Deserialize))]
pub struct HostTsc(pub u64);
