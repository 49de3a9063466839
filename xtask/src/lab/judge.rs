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

use self::history::{Offsets, Pairs, Runs};
use self::report::{Event, Reports, Scale};
use anyhow::{Context, Result, bail, ensure};
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
    /// Events of the guest, but for those after the host's last.
    pub events: usize,
    /// Events of the guest after the host's trace had ended: runs there are unknown.
    pub beyond: usize,
    /// Runs of its vCPUs.
    pub runs: usize,
    /// kvm_entry without its kvm_exit, or the other way round, within the trace: times there cannot be judged.
    pub unpaired: usize,
    /// By how many cycles each kvm_write_tsc_offset moved a guest's TSC.
    pub steps: Vec<i64>,
    /// The offsets are a reference.
    pub by_offsets: bool,
    /// How many ratios the guest's TSC was scaled by, where that was asked for.
    pub ratios: usize,
    /// As vtrace wrote the file and stock trace-cmd reads it.
    pub written: Tally,
    /// With one offset for all: the one at the start.
    pub one_offset: Tally,
    /// With the offset that KVM said.
    pub reference: Tally,
    /// Events that follow a step back in their page, and are late in the guest's own trace: not in the tallies above.
    pub late: usize,
    /// Those as they are written.
    pub late_written: Tally,
    /// The largest step back, in nanoseconds: late by this at most.
    pub step_back_ns: u64,
}

/// Judges two files of one recording. Where KVM moved no TSC there is no reference: then all that is written must lie in
/// runs.
///
/// # Errors
/// When stock trace-cmd cannot read them, or they do not hold what is needed.
pub fn judge(host: &Path, guest: &Path) -> Result<Verdict> {
    judge_by(host, guest, Reference::Offsets)
}

/// The same for a file that keeps the guest's own times: what is written lies nowhere, but under KVM's offsets it must.
///
/// # Errors
/// As [`judge`].
pub fn judge_raw(host: &Path, guest: &Path) -> Result<Verdict> {
    judge_by(host, guest, Reference::Raw)
}

/// What a guest's events are held against, beside the runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reference {
    /// KVM's offsets.
    Offsets,
    /// The same; the file keeps the guest's own times.
    Raw,
    /// Nothing.
    None,
}

/// The same by runs alone, for guests whose TSC is scaled: offsets alone are no reference there. What one offset would
/// have given is computed from offset and ratio as they stand in the host's trace.
///
/// # Errors
/// As [`judge`].
pub fn judge_runs(host: &Path, guest: &Path) -> Result<Verdict> {
    judge_by(host, guest, Reference::None)
}

/// Stock trace-cmd finds no event before the one that stands in front of it.
///
/// # Errors
/// When it does, or cannot read the file.
pub fn ensure_in_order(guest: &Path) -> Result<()> {
    ensure!(report::is_in_order(guest)?, "times of {} go back", guest.display());
    Ok(())
}

fn judge_by(host: &Path, guest: &Path, reference: Reference) -> Result<Verdict> {
    let by_offsets = reference != Reference::None;
    let reports = Reports::read(host, guest)?;
    let shown: Vec<Event> = report::events(&reports.shown_host).collect();
    let raw: Vec<Event> = report::events(&reports.raw_host).collect();
    let offsets = history::offsets(&raw);
    let steps: Vec<i64> = offsets.values().flat_map(Offsets::steps).collect();
    let court = Court {
        scale: reports.scale,
        is_own: reports.is_shifted || reference == Reference::Raw,
        shown_end: shown.last().map_or(0, |event| event.time),
        shown: history::runs(&shown),
        raw: history::runs(&raw),
        offsets: if by_offsets { offsets } else { BTreeMap::new() },
        pairs: if by_offsets { BTreeMap::new() } else { history::pairs(&raw) },
        by_offsets,
    };
    ensure!(!court.shown.is_empty(), "no kvm_entry in {}", host.display());
    let back = steps.iter().filter(|step| **step < 0).map(|step| step.unsigned_abs()).max();
    let mut verdict = Verdict {
        runs: court.shown.values().map(Runs::len).sum(),
        unpaired: court.shown.values().map(|runs| runs.unpaired).sum(),
        step_back_ns: court.scale.ns(back.unwrap_or(0)),
        steps,
        by_offsets: court.by_offsets,
        ratios: court.pairs.values().map(Pairs::ratios).max().unwrap_or(0),
        ..Verdict::default()
    };
    let shown = by_cpu(&reports.shown_guest);
    for (cpu, raw) in by_cpu(&reports.raw_guest) {
        let shown = shown.get(&cpu).filter(|shown| shown.len() == raw.len());
        let shown = shown.context("trace-cmd tells of more events in one report than in the other")?;
        court.judge(cpu, shown, &raw, &mut verdict)?;
    }
    Ok(verdict)
}

/// The times of each CPU's events, in the order in which it wrote them.
fn by_cpu(report: &str) -> BTreeMap<u32, Vec<u64>> {
    let mut times: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
    report::events(report).for_each(|event| times.entry(event.cpu).or_default().push(event.time));
    times
}

/// What every event is judged by.
struct Court {
    scale: Scale,
    /// The pages hold the guest's own times.
    is_own: bool,
    shown_end: u64,
    /// In nanoseconds.
    shown: BTreeMap<u32, Runs>,
    /// In cycles.
    raw: BTreeMap<u32, Runs>,
    offsets: BTreeMap<u32, Offsets>,
    pairs: BTreeMap<u32, Pairs>,
    by_offsets: bool,
}

impl Court {
    fn judge(&self, cpu: u32, shown_ns: &[u64], raw: &[u64], verdict: &mut Verdict) -> Result<()> {
        let (Some(runs), Some(raw_runs)) = (self.shown.get(&cpu), self.raw.get(&cpu)) else {
            bail!("cpu{cpu} of the guest wrote events and has no runs");
        };
        let Some(offsets) = self.offsets.get(&cpu) else {
            self.judge_by_runs(cpu, shown_ns, raw, verdict);
            return Ok(());
        };
        // A file whose pages hold host times already: the guest's own are what KVM made of them.
        let own = |time: &u64| if self.is_own { *time } else { time.wrapping_add(offsets.at(*time)) };
        let guest: Vec<u64> = raw.iter().map(own).collect();
        let raw_distance_ns = |host| self.scale.ns(raw_runs.distance(host));
        let places = history::places(&guest, offsets, raw_runs);
        for ((&shown_ns, &guest), place) in shown_ns.iter().zip(&guest).zip(places) {
            let reference_ns = self.scale.ns(place.host);
            let distance_ns = runs.distance(shown_ns);
            if reference_ns > self.shown_end {
                verdict.beyond += 1;
            } else if place.is_late {
                verdict.late += 1;
                verdict.late_written.count(shown_ns, distance_ns, reference_ns);
            } else {
                let one = guest.wrapping_sub(offsets.first());
                verdict.events += 1;
                verdict.written.count(shown_ns, distance_ns, reference_ns);
                verdict.one_offset.count(self.scale.ns(one), raw_distance_ns(one), reference_ns);
                verdict.reference.count(reference_ns, raw_distance_ns(place.host), reference_ns);
            }
        }
        Ok(())
    }

    /// What is written must lie in runs; the pages hold the host's TSC.
    fn judge_by_runs(&self, cpu: u32, shown_ns: &[u64], raw: &[u64], verdict: &mut Verdict) {
        for (&shown_ns, &host) in shown_ns.iter().zip(raw) {
            if shown_ns > self.shown_end {
                verdict.beyond += 1;
                continue;
            }
            verdict.events += 1;
            verdict.written.count(shown_ns, self.shown[&cpu].distance(shown_ns), shown_ns);
            if let Some(pairs) = self.pairs.get(&cpu) {
                let one = pairs.one_offset(host);
                verdict.one_offset.count(self.scale.ns(one), self.scale.ns(self.raw[&cpu].distance(one)), shown_ns);
            }
        }
    }
}

impl Tally {
    /// Counts an event at `time_ns`, so far from the nearest run.
    fn count(&mut self, time_ns: u64, distance_ns: u64, reference_ns: u64) {
        self.outside += usize::from(distance_ns > 0);
        self.worst_ns = self.worst_ns.max(distance_ns);
        self.elsewhere += usize::from(time_ns.abs_diff(reference_ns) > SAME_NS);
    }
}

impl Verdict {
    /// `stated_ns`: how far off the file says that its uncertain times are; nothing: as far as the largest step back.
    ///
    /// # Errors
    /// When the TSC was moved less than `steps_min` times, the judge's own reference does not hold, one offset would have
    /// done as well, or the file has an event outside that need not be there.
    pub fn ensure_right(&self, steps_min: usize, stated_ns: Option<u64>) -> Result<()> {
        ensure!(self.events > 0 && self.runs > 0, "nothing to judge");
        ensure!(self.steps.len() >= steps_min, "the TSC was moved {} times only", self.steps.len());
        ensure!(self.reference.outside == 0, "KVM's own offsets leave {} events outside", self.reference.outside);
        ensure!(
            steps_min == 0 || self.one_offset.elsewhere > 0,
            "one offset gives the same times: this run proves nothing"
        );
        ensure!(self.written.outside == 0, "{} events of the guest are at wrong times", self.written.outside);
        let Tally { worst_ns, .. } = self.late_written;
        let most = stated_ns.unwrap_or(self.step_back_ns);
        ensure!(worst_ns <= most, "an event after a step back is {worst_ns} ns off, not {most} ns at most");
        Ok(())
    }
}

impl Verdict {
    /// A file that keeps the guest's own times: with KVM's offsets its events lie in runs, but for one in a hundred. After a
    /// step back the same times come twice and a page is late; which those are cannot be told for sure from times alone.
    ///
    /// # Errors
    /// When more do not, or the TSC was moved less than `steps_min` times.
    pub fn ensure_raw(&self, steps_min: usize) -> Result<()> {
        ensure!(self.events > 0 && self.runs > 0, "nothing to judge");
        ensure!(self.steps.len() >= steps_min, "the TSC was moved {} times only", self.steps.len());
        let Tally { outside, worst_ns, .. } = self.reference;
        ensure!(outside * 100 <= self.events, "these are not the guest's own times: {outside} outside");
        ensure!(worst_ns <= self.step_back_ns, "an event is {worst_ns} ns off, more than the clock went back");
        ensure!(self.written.outside > self.events / 100, "these are the host's times");
        Ok(())
    }

    /// No event is farther from its run than the file says that its times can be off.
    ///
    /// # Errors
    /// When one is, or there was nothing to judge.
    pub fn ensure_within(&self, stated_ns: u64) -> Result<()> {
        let Tally { outside, worst_ns, .. } = self.written;
        ensure!(self.events > 0 && self.runs > 0, "nothing to judge");
        ensure!(worst_ns <= stated_ns, "{outside} events outside, {worst_ns} ns off, not {stated_ns} ns at most");
        Ok(())
    }

    /// Judged by runs alone: no event is outside, but those of which the file says so, and they by no more than it says.
    ///
    /// # Errors
    /// When another is, the guest was not moved and scaled, or one offset would have done as well.
    pub fn ensure_inside(&self, stated_ns: u64, marked: u64) -> Result<()> {
        ensure!(!self.steps.is_empty(), "the TSC was not moved");
        ensure!(self.ratios > 1, "the ratio did not change");
        ensure!(self.one_offset.outside > 0, "one offset would have done as well: this run proves nothing");
        let Tally { outside, .. } = self.written;
        ensure!(u64::try_from(outside)? <= marked, "{outside} events are outside, and {marked} of them may be");
        self.ensure_within(stated_ns)
    }

    /// Ours against trace-cmd's rule, in one line.
    pub fn summary(&self, marked: u64) -> String {
        let Self { events, written, one_offset, .. } = self;
        format!(
            "ours outside: {} of {events} ({marked} marked as uncertain); stock trace-cmd's one-offset rule outside: \
             {} of {events}",
            written.outside, one_offset.outside
        )
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { events, runs, unpaired, beyond, late, step_back_ns, .. } = self;
        writeln!(out, "{events} events of the guest, {runs} runs of its vCPUs ({unpaired} unpaired)")?;
        writeln!(out, "{beyond} more after the host's trace had ended")?;
        writeln!(out, "its TSC was moved {} times: {:?} cycles", self.steps.len(), self.steps)?;
        writeln!(out, "{:30} {:>10} {:>16} {:>12}", "events", "outside", "farthest (ns)", "elsewhere")?;
        let mut tallies = vec![("as written, by stock trace-cmd", self.written)];
        if self.ratios > 0 {
            tallies.push(("with one offset, as trace-cmd's", self.one_offset));
        }
        if self.by_offsets && !self.steps.is_empty() {
            tallies.push(("with one offset for all", self.one_offset));
            tallies.push(("with KVM's offsets", self.reference));
        }
        for (what, tally) in tallies {
            writeln!(out, "{what:30} {:>10} {:>16} {:>12}", tally.outside, tally.worst_ns, tally.elsewhere)?;
        }
        let Tally { outside, worst_ns, .. } = self.late_written;
        write!(
            out,
            "{late} more follow a step back in their page (of {step_back_ns} ns at most): {outside} of them outside, \
             {worst_ns} ns at most"
        )
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
            late_written: tally(2, 2, 0),
            step_back_ns: 2,
            ..Verdict::default()
        };
        right.ensure_right(3, None).unwrap();
        assert!(right.ensure_right(3, Some(1)).is_err());
        assert!(right.ensure_right(4, None).is_err());
        let scaled = Verdict { ratios: 2, written: tally(2, 9, 0), ..right.clone() };
        scaled.ensure_inside(9, 2).unwrap();
        assert!(scaled.ensure_inside(9, 1).is_err() && scaled.ensure_inside(8, 2).is_err());
        assert!(Verdict { ratios: 1, ..scaled.clone() }.ensure_inside(9, 2).is_err());
        assert!(Verdict { one_offset: tally(0, 0, 0), ..scaled }.ensure_inside(9, 2).is_err());
        for wrong in [
            Verdict { events: 0, ..right.clone() },
            Verdict { written: tally(1, 1, 1), ..right.clone() },
            Verdict { one_offset: tally(3, 40, 0), ..right.clone() },
            Verdict { reference: tally(1, 3, 0), ..right.clone() },
            Verdict { late_written: tally(1, 3, 0), ..right.clone() },
        ] {
            assert!(wrong.ensure_right(3, None).is_err(), "{wrong}");
        }
    }
}
