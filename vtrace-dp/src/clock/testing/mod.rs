//! A guest CPU that was never there: what its host and its ring buffer would have seen, and what is true.
//!
//! In:    how its clock changes and how busy it is
//! Out:   its runs, its states as KVM would tell them, the pages of its ring buffer, and the host time of every event
//! Runs:  anywhere; the same every time for the same seed
//! Full:  does not apply: pages are kept
//! Trust: its caller

#[cfg(test)]
pub(crate) mod micro_guest;

use vtrace_common::{ids::Cpu, time::HostTsc};

use super::{
    math::{HostRange, Pair},
    segment::{Runs, Seen, Since},
};
use crate::ftrace::testing::RingBuffer;

/// A change of the clock, at an entry.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    /// How long after the change before, host ticks.
    pub after: u64,
    /// What holds from then on.
    pub pair: Pair,
}

/// How one vCPU lives.
#[derive(Clone, Debug)]
pub struct Life {
    /// Decides everything that is left open.
    pub seed: u64,
    /// Which CPU of its guest.
    pub cpu: Cpu,
    /// When the trace begins.
    pub since: u64,
    /// Its clock, from before the trace on; the first one's `after` does not matter.
    pub changes: Vec<Change>,
    /// How long it lives after the last change.
    pub rest: u64,
    /// Host ticks of a run and of a pause, at most.
    pub run_max: u64,
    /// See above.
    pub pause_max: u64,
    /// Host ticks between events, at most; the longest is taken about every tenth time.
    pub gap_max: u64,
    /// Bytes of a page.
    pub page_bytes: usize,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Story {
    /// As KVM would tell it.
    pub seen: Vec<Seen>,
    /// When it ran.
    pub runs: Runs,
    /// What its ring buffer holds.
    pub pages: Vec<u8>,
    /// When its events happened.
    pub truth: Vec<HostTsc>,
    /// How often its ring buffer lost the time.
    pub traps: usize,
}

impl Life {
    /// A life with short runs and some long silences.
    pub fn new(seed: u64, changes: Vec<Change>) -> Self {
        Self {
            seed: seed | 1,
            cpu: Cpu(0),
            since: 1 << 42,
            changes,
            rest: 40_000_000,
            run_max: 60_000,
            pause_max: 90_000,
            gap_max: 3_000_000,
            page_bytes: 4096,
        }
    }

    /// Lives it. `payload`: the event that happens at this host time.
    pub fn live(&self, payload: impl Fn(HostTsc) -> Vec<u8>) -> Story {
        let mut random = Random(self.seed);
        let (seen, pairs) = self.seen();
        let runs = self.runs(&mut random, &seen);
        let mut ring = RingBuffer::new(self.page_bytes);
        let (mut truth, mut traps, mut next) = (Vec::new(), 0, self.since);
        for run in &runs {
            next = next.max(run.low.0);
            while next <= run.high.0 {
                let at = HostTsc(next);
                let segment = seen.partition_point(|seen| seen.at.low <= at).max(1) - 1;
                let guest = pairs[segment].to_guest(at).0;
                if random.below(50) == 0 {
                    ring.push_absolute(guest, &payload(at));
                } else {
                    traps += usize::from(ring.push(guest, &payload(at)));
                }
                truth.push(at);
                next += 1 + random.gap(self.gap_max);
            }
        }
        let known = HostRange { low: HostTsc(0), high: HostTsc(u64::MAX) };
        Story { seen, runs: Runs::new(runs, vec![known]), pages: ring.pages(), truth, traps }
    }

    fn seen(&self) -> (Vec<Seen>, Vec<Pair>) {
        let mut at = self.since - 1000;
        let mut seen = Vec::new();
        for (number, change) in self.changes.iter().enumerate() {
            at += if number == 0 { 0 } else { change.after };
            let ratio = change.pair.ratio.map_or(1, |ratio| ratio.raw.get());
            seen.push(Seen {
                cpu: self.cpu,
                offset: change.pair.offset,
                ratio,
                protected: false,
                at: HostRange::at(HostTsc(at)),
                since: if number == 0 { Since::Before } else { Since::Reading },
            });
        }
        (seen, self.changes.iter().map(|change| change.pair).collect())
    }

    /// Runs and pauses in turn; each change is at an entry.
    fn runs(&self, random: &mut Random, seen: &[Seen]) -> Vec<HostRange> {
        let mut changes = seen.iter().map(|seen| seen.at.low.0).skip(1).peekable();
        let end = seen.last().map_or(0, |seen| seen.at.low.0) + self.rest;
        let (mut at, mut runs) = (self.since, Vec::new());
        while at < end {
            let exit = at + 1 + random.below(self.run_max);
            let mut entry = exit + 2 + random.below(self.pause_max);
            let mut until = exit;
            if let Some(change) = changes.next_if(|change| *change <= entry) {
                until = exit.min(change - 1).max(at);
                entry = change.max(until + 1);
            }
            runs.push(HostRange { low: HostTsc(at), high: HostTsc(until) });
            at = entry;
        }
        runs
    }
}

/// Numbers that are the same every time.
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end.max(1)
    }

    fn gap(&mut self, gap_max: u64) -> u64 {
        let max = if self.below(10) == 0 { gap_max } else { gap_max / 100 };
        self.below(max)
    }
}
