//! How far every machine has come, for the status line.
//!
//! In:    once a tick, the ledgers of every machine
//! Out:   [`MachineProgress`] for each
//! Runs:  pure
//! Trust: counts of guests can have any value; sums saturate

use vtrace_common::{ids::Cpu, ledger::Ledger, wire::client::LaneLedger};

/// One machine's progress.
#[derive(Clone, PartialEq, Eq, Debug, Default, serde::Serialize)]
pub struct MachineProgress {
    /// `host`, `host:INSTANCE`, or the guest's name.
    pub name: String,
    /// Number of its lanes.
    pub lanes: usize,
    /// Sum of its lanes' ledgers. Between two writes it holds pages.
    #[serde(flatten)]
    pub ledger: Ledger,
    /// The CPU whose ring buffer lost the most events, if any did.
    pub events_lost_cpu: Option<u32>,
    /// Lanes that held pages and wrote none for a whole tick: the disk is too slow.
    pub stalled: usize,
    /// Time for which a guest's agent has owed an answer, s.
    pub silent_s: u64,
}

/// One machine's counts at a tick.
#[derive(Clone, Debug, Default)]
pub struct MachineCounts {
    /// `host`, `host:INSTANCE`, or the guest's name.
    pub name: String,
    /// The ledgers of its lanes.
    pub ledgers: Vec<LaneLedger>,
    /// Time for which a guest's agent has owed an answer, s.
    pub silent_s: u64,
}

/// Turns counts into progress; keeps the counts of the last tick.
#[derive(Debug, Default)]
pub struct Meter {
    before: Vec<(String, Vec<(Cpu, u64)>)>,
}

impl Meter {
    /// Takes the counts at a tick.
    pub fn tick(&mut self, machines: &[MachineCounts]) -> Vec<MachineProgress> {
        let mut progress = Vec::with_capacity(machines.len());
        for MachineCounts { name, ledgers, silent_s } in machines {
            let mut ledger = Ledger { events_lost: Some(0), ..Ledger::default() };
            ledgers.iter().for_each(|lane| ledger += lane.ledger);
            progress.push(MachineProgress {
                name: name.clone(),
                lanes: ledgers.len(),
                ledger,
                events_lost_cpu: worst_cpu(ledgers),
                stalled: ledgers.iter().filter(|lane| self.is_stalled(name, lane)).count(),
                silent_s: *silent_s,
            });
        }
        self.before.clear();
        for machine in machines {
            let written = machine.ledgers.iter().map(|lane| (lane.cpu, lane.ledger.pages_out)).collect();
            self.before.push((machine.name.clone(), written));
        }
        progress
    }

    fn is_stalled(&self, name: &str, lane: &LaneLedger) -> bool {
        let before = self.before.iter().find(|(other, _)| other == name);
        lane.ledger.pages_held() > 0
            && before.is_some_and(|(_, lanes)| lanes.contains(&(lane.cpu, lane.ledger.pages_out)))
    }
}

/// The CPU that lost the most events.
fn worst_cpu(ledgers: &[LaneLedger]) -> Option<u32> {
    let losers = ledgers.iter().filter(|lane| lane.ledger.events_lost.is_some_and(|lost| lost > 0));
    losers.max_by_key(|lane| lane.ledger.events_lost).map(|lane| lane.cpu.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(cpu: u32, pages_in: u64, pages_out: u64) -> LaneLedger {
        let mut ledger = Ledger { pages_in, ..Ledger::default() };
        ledger.set_out(pages_out, 4096);
        LaneLedger { cpu: Cpu(cpu), ledger, ..LaneLedger::default() }
    }

    #[test]
    fn lane_that_holds_pages_for_a_whole_tick_is_stalled_and_one_that_writes_is_not() {
        let mut meter = Meter::default();
        let tick = |ledgers| vec![MachineCounts { name: "host".into(), ledgers, silent_s: 0 }];
        let first = meter.tick(&tick(vec![ledger(0, 9, 5), ledger(1, 9, 5), ledger(2, 5, 5)]));
        assert_eq!((first[0].stalled, first[0].lanes, first[0].ledger.bytes_out), (0, 3, 15 * 4096));
        let second = meter.tick(&tick(vec![ledger(0, 10, 5), ledger(1, 9, 6), ledger(2, 5, 5)]));
        assert_eq!(second[0].stalled, 1);
    }

    #[test]
    fn events_lost_in_ring_buffers_are_summed_and_the_worst_cpu_is_named() {
        let lost = |cpu, events_lost| LaneLedger {
            ledger: Ledger { events_lost: Some(events_lost), ..Ledger::default() },
            ..ledger(cpu, 1, 1)
        };
        let machine = |ledgers| vec![MachineCounts { name: "host".into(), ledgers, silent_s: 0 }];
        let progress = Meter::default().tick(&machine(vec![lost(0, 3), lost(1, 40), lost(2, 0)]));
        assert_eq!((progress[0].ledger.events_lost, progress[0].events_lost_cpu), (Some(43), Some(1)));
        let progress = Meter::default().tick(&machine(vec![lost(0, 0)]));
        assert_eq!((progress[0].ledger.events_lost, progress[0].events_lost_cpu), (Some(0), None));
    }
}
