//! How far all machines are: what the status line shows.
//!
//! In:    once a tick, the ledgers of every machine
//! Out:   [`MachineProgress`] for each
//! Runs:  pure
//! Trust: sums are of counts that anyone may have made up; they saturate

use vtrace_common::{ids::Cpu, wire::client::LaneLedger};

/// One machine.
#[derive(Clone, PartialEq, Eq, Debug, Default, serde::Serialize)]
pub struct MachineProgress {
    /// `host`, `host:INSTANCE`, or the guest's name.
    pub name: String,
    /// Its lanes.
    pub lanes: usize,
    /// Pages in its file.
    pub pages: u64,
    /// The same in bytes.
    pub bytes: u64,
    /// Pages lost on the way.
    pub lost: u64,
    /// Lanes whose pages have come and were not written for a whole tick: the disk is too slow for them.
    pub stalled: usize,
    /// For how long a guest's agent has owed an answer, in seconds.
    pub silent_s: u64,
}

/// One machine as it is at a tick.
#[derive(Clone, Debug, Default)]
pub struct Counted {
    /// `host`, `host:INSTANCE`, or the guest's name.
    pub name: String,
    /// What its lanes brought.
    pub ledgers: Vec<LaneLedger>,
    /// Bytes of a page.
    pub page_bytes: u32,
    /// For how long a guest's agent has owed an answer, in seconds.
    pub silent_s: u64,
}

/// Remembers the last tick.
#[derive(Debug, Default)]
pub struct Meter {
    before: Vec<(String, Vec<(Cpu, u64)>)>,
}

impl Meter {
    /// A tick has passed.
    pub fn tick(&mut self, machines: &[Counted]) -> Vec<MachineProgress> {
        let progress = machines.iter().map(|Counted { name, ledgers, page_bytes, silent_s }| {
            let sum = |field: fn(&LaneLedger) -> u64| ledgers.iter().map(field).fold(0, u64::saturating_add);
            let pages = sum(|lane| lane.pages_out);
            MachineProgress {
                name: name.clone(),
                lanes: ledgers.len(),
                pages,
                bytes: pages.saturating_mul(u64::from(*page_bytes)),
                lost: sum(|lane| lane.pages_refused),
                stalled: ledgers.iter().filter(|lane| self.is_stalled(name, lane)).count(),
                silent_s: *silent_s,
            }
        });
        let progress = progress.collect();
        let written = |lanes: &[LaneLedger]| lanes.iter().map(|lane| (lane.cpu, lane.pages_out)).collect();
        self.before = machines.iter().map(|machine| (machine.name.clone(), written(&machine.ledgers))).collect();
        progress
    }

    fn is_stalled(&self, name: &str, lane: &LaneLedger) -> bool {
        let holds = lane.pages_in > lane.pages_out.saturating_add(lane.pages_refused);
        let before = self.before.iter().find(|(other, _)| other == name);
        holds && before.is_some_and(|(_, lanes)| lanes.contains(&(lane.cpu, lane.pages_out)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(cpu: u32, pages_in: u64, pages_out: u64) -> LaneLedger {
        LaneLedger { cpu: Cpu(cpu), pages_in, pages_out, ..LaneLedger::default() }
    }

    #[test]
    fn lane_that_holds_pages_for_a_whole_tick_is_stalled_and_one_that_writes_is_not() {
        let mut meter = Meter::default();
        let tick = |ledgers| vec![Counted { name: "host".into(), ledgers, page_bytes: 4096, silent_s: 0 }];
        let first = meter.tick(&tick(vec![ledger(0, 9, 5), ledger(1, 9, 5), ledger(2, 5, 5)]));
        assert_eq!((first[0].stalled, first[0].lanes, first[0].bytes), (0, 3, 15 * 4096));
        let second = meter.tick(&tick(vec![ledger(0, 10, 5), ledger(1, 9, 6), ledger(2, 5, 5)]));
        assert_eq!(second[0].stalled, 1);
    }
}
