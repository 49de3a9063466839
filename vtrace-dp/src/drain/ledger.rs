//! A lane's counts as other threads see them.
//!
//! Runs: a worker publishes once a batch, or counts page by page; any thread reads

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::Relaxed};

use vtrace_common::{ids::Cpu, ledger::Ledger, wire::client::LaneLedger};

/// The last published [`LaneLedger`] of a lane.
#[derive(Debug, Default)]
pub struct Counters {
    cpu: Cpu,
    pages_in: AtomicU64,
    pages_out: AtomicU64,
    pages_lost: AtomicU64,
    bytes_out: AtomicU64,
    bytes_torn: AtomicU64,
    /// `u64::MAX`: not known.
    bytes_missing: AtomicU64,
    write_errno: AtomicI32,
}

impl Counters {
    /// Zeros for a lane.
    pub fn new(cpu: Cpu) -> Self {
        Self { cpu, bytes_missing: AtomicU64::new(u64::MAX), ..Self::default() }
    }

    /// Shows a lane's counts. Relaxed: a reader may see pages come in before it sees them go out. Hot.
    pub fn publish(&self, lane: &LaneLedger) {
        self.pages_in.store(lane.ledger.pages_in, Relaxed);
        self.pages_out.store(lane.ledger.pages_out, Relaxed);
        self.pages_lost.store(lane.ledger.pages_lost, Relaxed);
        self.bytes_out.store(lane.ledger.bytes_out, Relaxed);
        self.bytes_torn.store(lane.bytes_torn, Relaxed);
        self.bytes_missing.store(lane.bytes_missing.unwrap_or(u64::MAX), Relaxed);
        self.write_errno.store(lane.write_errno, Relaxed);
    }

    /// Counts pages taken from the source. Hot.
    pub(super) fn add_in(&self, pages: usize) {
        self.pages_in.fetch_add(count(pages), Relaxed);
    }

    /// Counts pages written, of `page_bytes` each. Hot.
    pub(super) fn add_out(&self, pages: usize, page_bytes: usize) {
        self.pages_out.fetch_add(count(pages), Relaxed);
        self.bytes_out.fetch_add(count(pages * page_bytes), Relaxed);
    }

    /// Counts pages taken and not written. Hot.
    pub(super) fn add_lost(&self, pages: usize) {
        self.pages_lost.fetch_add(count(pages), Relaxed);
    }

    /// Counts as lost what came in and did not go out: the lane was abandoned.
    pub fn settle(&self) {
        let mut lane = self.read();
        lane.ledger.settle();
        self.publish(&lane);
    }

    /// CPU of the lane.
    pub fn cpu(&self) -> Cpu {
        self.cpu
    }

    /// The page counts. Hot.
    pub(super) fn ledger(&self) -> Ledger {
        Ledger {
            pages_in: self.pages_in.load(Relaxed),
            pages_out: self.pages_out.load(Relaxed),
            pages_lost: self.pages_lost.load(Relaxed),
            bytes_out: self.bytes_out.load(Relaxed),
            events_lost: None,
        }
    }

    /// All counts.
    pub fn read(&self) -> LaneLedger {
        let bytes_missing = self.bytes_missing.load(Relaxed);
        LaneLedger {
            cpu: self.cpu,
            ledger: self.ledger(),
            bytes_torn: self.bytes_torn.load(Relaxed),
            bytes_missing: (bytes_missing != u64::MAX).then_some(bytes_missing),
            write_errno: self.write_errno.load(Relaxed),
        }
    }
}

/// A number or length of this process as a file counts it.
pub(super) fn count(number: usize) -> u64 {
    u64::try_from(number).expect("usize is 64 bits")
}
