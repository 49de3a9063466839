//! Guest memory and split virtqueues, as a device sees them.
//!
//! | module | what |
//! |---|---|
//! | [`memory`] | guest memory: checked addresses, volatile access, batches for vectored writes |
//! | [`ring`] | one split virtqueue: the guest's descriptors in, used entries out |
//!
//! In:    memory tables and ring addresses from the VMM; descriptors from the guest
//! Out:   chains of spans that lie in guest memory; used entries
//! Runs:  on the thread that owns the ring; no locks
//! Trust: nothing: every value is loaded once and checked

pub mod memory;
pub mod ring;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
