//! Where a guest's events lie in its host's trace, by foreign eyes: stock trace-cmd's, and the kernel's own tracepoints.
//!
//! In:    the host's file, recorded with `-e kvm`, and the file of its one guest. Out: a [`Verdict`].
//! Runs:  stock trace-cmd as a child process; else pure.
//! Full:  a report is kept in memory. Trust: the host's kernel. Nothing of vtrace's own clock is used here.
//!
//! A guest's event happened while its vCPU was in the guest: between a kvm_entry and the next kvm_exit of the thread
//! that runs it. Three times are asked for each event: the one that stock trace-cmd shows for the file as vtrace wrote
//! it; the one under the offset that held at the start (what trace-cmd's own recordings get); and the reference, the
//! guest's TSC less the offset that KVM said it writes (kvm_write_tsc_offset). vCPU id and guest CPU are taken for the
//! same number: so they are for the machines of our labs.

mod history;
mod report;

use self::history::{Offsets, Runs};
use self::report::{Event, Reports};
use anyhow::{Result, ensure};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// How many events lie outside the runs of their vCPU, and how far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Outside.
    pub outside: usize,
    /// The farthest of them from the nearest run.
    pub worst_ns: u64,
    /// At another time than the reference, by more than [`SAME_NS`].
    pub elsewhere: usize,
}

/// Times closer than this are the same: TSC to nanoseconds is rounded by each reader.
pub const SAME_NS: u64 = 2;

/// What the judge found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Events of the guest.
    pub events: usize,
    /// Runs of its vCPUs.
    pub runs: usize,
    /// kvm_entry without its kvm_exit, or the other way round, within the trace: times there cannot be judged.
    pub unpaired: usize,
    /// By how many cycles each kvm_write_tsc_offset moved a guest's TSC.
    pub steps: Vec<i64>,
    /// As vtrace wrote the file and stock trace-cmd reads it.
    pub written: Tally,
    /// Of those outside: the reference has them inside.
    pub written_wrong: usize,
    /// With one offset for all.
    pub one_offset: Tally,
    /// With the offset that KVM said.
    pub reference: Tally,
    /// The largest step back, in nanoseconds: the guest's ring buffer may write later times up to the end of that page.
    pub step_back_ns: u64,
}

/// Judges two files of one recording.
///
/// # Errors
/// When stock trace-cmd cannot read them, or they do not hold what is needed.
pub fn judge(host: &Path, guest: &Path) -> Result<Verdict> {
    let reports = Reports::read(host, guest)?;
    let shown_host: Vec<Event> = report::events(&reports.shown_host).collect();
    let raw_host: Vec<Event> = report::events(&reports.raw_host).collect();
    let (runs, raw_runs) = (history::runs(&shown_host), history::runs(&raw_host));
    let offsets = history::offsets(&raw_host);
    ensure!(!runs.is_empty(), "no kvm_entry in {}", host.display());
    let mut verdict = Verdict {
        runs: runs.values().map(Runs::len).sum(),
        unpaired: runs.values().map(|runs| runs.unpaired).sum(),
        steps: offsets.values().flat_map(Offsets::steps).collect(),
        ..Verdict::default()
    };
    let back = verdict.steps.iter().filter(|step| **step < 0).map(|step| step.unsigned_abs()).max();
    verdict.step_back_ns = reports.scale.ns(back.unwrap_or(0));
    let mut walks: BTreeMap<u32, history::Walk> = BTreeMap::new();
    let pairs = report::events(&reports.shown_guest).zip(report::events(&reports.raw_guest));
    for (shown, raw) in pairs {
        ensure!((shown.cpu, shown.name) == (raw.cpu, raw.name), "trace-cmd reports the guest in two orders");
        let (Some(runs), Some(raw_runs)) = (runs.get(&raw.cpu), raw_runs.get(&raw.cpu)) else { continue };
        let Some(offsets) = offsets.get(&raw.cpu) else { continue };
        // A file whose pages hold host times already: the guest's own are what KVM made of them.
        let guest = if reports.is_shifted { raw.time } else { raw.time.wrapping_add(offsets.at(raw.time)) };
        let walk = walks.entry(raw.cpu).or_default();
        let reference = walk.host_tsc(guest, offsets, raw_runs);
        let one = guest.wrapping_sub(offsets.first());
        let reference_ns = reports.scale.ns(reference);
        verdict.events += 1;
        let is_wrong = verdict.written.count(shown.time, runs.distance(shown.time), reference_ns);
        verdict.one_offset.count(reports.scale.ns(one), reports.scale.ns(raw_runs.distance(one)), reference_ns);
        let is_lost = verdict.reference.count(reference_ns, reports.scale.ns(raw_runs.distance(reference)), reference_ns);
        verdict.written_wrong += usize::from(is_wrong && !is_lost);
    }
    Ok(verdict)
}

impl Tally {
    /// Counts an event; true if it lies outside.
    fn count(&mut self, time_ns: u64, distance_ns: u64, reference_ns: u64) -> bool {
        self.outside += usize::from(distance_ns > 0);
        self.worst_ns = self.worst_ns.max(distance_ns);
        self.elsewhere += usize::from(time_ns.abs_diff(reference_ns) > SAME_NS);
        distance_ns > 0
    }
}

impl Verdict {
    /// # Errors
    /// When the TSC was moved less than `steps_min` times, the judge's own reference does not hold, one offset would have
    /// done as well, or the file has an event outside that need not be there.
    pub fn ensure_right(&self, steps_min: usize) -> Result<()> {
        ensure!(self.events > 0 && self.runs > 0, "nothing to judge");
        ensure!(self.steps.len() >= steps_min, "the TSC was moved {} times only", self.steps.len());
        let Tally { outside, worst_ns, .. } = self.reference;
        ensure!(
            worst_ns <= self.step_back_ns,
            "the reference has {outside} events outside, up to {worst_ns} ns: more than a step back explains"
        );
        ensure!(self.one_offset.elsewhere > 0, "one offset gives the same times: this run proves nothing");
        ensure!(self.written_wrong == 0, "{} events of the guest are at wrong times in its file", self.written_wrong);
        Ok(())
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "{} events of the guest, {} runs of its vCPUs ({} unpaired)", self.events, self.runs, self.unpaired)?;
        writeln!(out, "its TSC was moved {} times: {:?} cycles", self.steps.len(), self.steps)?;
        writeln!(out, "{:30} {:>10} {:>16} {:>12}", "events", "outside", "farthest (ns)", "elsewhere")?;
        for (what, tally) in [
            ("as written, by stock trace-cmd", self.written),
            ("with one offset for all", self.one_offset),
            ("with KVM's offsets", self.reference),
        ] {
            writeln!(out, "{what:30} {:>10} {:>16} {:>12}", tally.outside, tally.worst_ns, tally.elsewhere)?;
        }
        write!(out, "{} of those outside as written are inside with KVM's offsets", self.written_wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_that_is_right_passes_and_one_that_is_not_does_not() {
        let tally = |outside, worst_ns, elsewhere| Tally { outside, worst_ns, elsewhere };
        let right = Verdict {
            events: 10,
            runs: 2,
            steps: vec![5, -5, 5],
            one_offset: tally(3, 40, 4),
            reference: tally(1, 2, 0),
            step_back_ns: 2,
            ..Verdict::default()
        };
        right.ensure_right(3).unwrap();
        assert!(right.ensure_right(4).is_err());
        for wrong in [
            Verdict { events: 0, ..right.clone() },
            Verdict { written_wrong: 1, ..right.clone() },
            Verdict { one_offset: tally(3, 40, 0), ..right.clone() },
            Verdict { reference: tally(1, 3, 0), ..right.clone() },
        ] {
            assert!(wrong.ensure_right(3).is_err(), "{wrong}");
        }
    }
}
