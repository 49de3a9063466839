//! Counts of one lane: the worker's own, and what others may read of them.
//!
//! In:    what a lane did with its bytes
//! Out:   [`LaneLedger`]
//! Runs:  [`Ledger`] on the worker's thread; [`Counters`] are read anywhere
//! Full:  counters are u64
//! Trust: nothing foreign comes here

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use vtrace_common::{ids::Cpu, wire::client::LaneLedger};

/// What a lane's worker counts. Between two writes `pages_in` runs ahead by the pages that are held.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Ledger {
    /// Bytes that came over the ring.
    pub bytes_in: u64,
    /// Whole pages that came.
    pub pages_in: u64,
    /// Pages that are in the file.
    pub pages_out: u64,
    /// Pages that were not written.
    pub pages_refused: u64,
    /// Bytes of a page that is not whole.
    pub bytes_torn: u64,
    /// Bytes the agent sent that never came.
    pub bytes_missing: u64,
    /// `errno` of the first write that failed.
    pub write_errno: i32,
}

impl Ledger {
    /// Every page that came is accounted for. True whenever nothing is held.
    pub fn balanced(&self) -> bool {
        self.pages_in == self.pages_out + self.pages_refused
    }
}

/// A lane's ledger as other threads see it, stored once a batch.
#[derive(Debug)]
pub struct Counters {
    cpu: Cpu,
    pages_in: AtomicU64,
    pages_out: AtomicU64,
    pages_refused: AtomicU64,
    bytes_torn: AtomicU64,
    bytes_missing: AtomicU64,
    write_errno: AtomicI32,
}

impl Counters {
    /// Zeros for a lane.
    pub fn new(cpu: Cpu) -> Self {
        let zero = || AtomicU64::new(0);
        let (pages_in, pages_out, pages_refused) = (zero(), zero(), zero());
        let (bytes_torn, bytes_missing, write_errno) = (zero(), zero(), AtomicI32::new(0));
        Self { cpu, pages_in, pages_out, pages_refused, bytes_torn, bytes_missing, write_errno }
    }

    /// Shows a ledger. Relaxed: a reader may see pages come in before it sees them go out. Hot.
    pub fn publish(&self, ledger: &Ledger) {
        self.pages_in.store(ledger.pages_in, Ordering::Relaxed);
        self.pages_out.store(ledger.pages_out, Ordering::Relaxed);
        self.pages_refused.store(ledger.pages_refused, Ordering::Relaxed);
        self.bytes_torn.store(ledger.bytes_torn, Ordering::Relaxed);
        self.bytes_missing.store(ledger.bytes_missing, Ordering::Relaxed);
        self.write_errno.store(ledger.write_errno, Ordering::Relaxed);
    }

    /// Counts as refused what came and did not go out: the lane was abandoned.
    pub fn settle(&self) {
        let missing = self.pages_in.load(Ordering::Relaxed).saturating_sub(self.pages_out.load(Ordering::Relaxed));
        self.pages_refused.store(missing, Ordering::Relaxed);
    }

    /// Whose counts these are.
    pub fn cpu(&self) -> Cpu {
        self.cpu
    }

    /// What was shown last.
    pub fn read(&self) -> LaneLedger {
        LaneLedger {
            cpu: self.cpu,
            pages_in: self.pages_in.load(Ordering::Relaxed),
            pages_out: self.pages_out.load(Ordering::Relaxed),
            pages_refused: self.pages_refused.load(Ordering::Relaxed),
            bytes_torn: self.bytes_torn.load(Ordering::Relaxed),
            bytes_missing: self.bytes_missing.load(Ordering::Relaxed),
            write_errno: self.write_errno.load(Ordering::Relaxed),
        }
    }
}
