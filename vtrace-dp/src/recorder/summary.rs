//! The closing table: each machine's pages and events, its losses, and the error bound of its times.
//!
//! In:    reports of agents and of the host's pump, ledgers of the server, sizes of files
//! Out:   the table, the same as JSON, the note in each file
//! Trust: an agent's counts can be wrong; a mismatch with the server's becomes a remark

use std::fmt;

use serde::Serialize;
use vtrace_common::wire::{agent::LaneReport, client::LaneLedger};

use super::{files::limit::Ended, guests::command_output::CommandSummary};
use crate::{clock::vcpus::Vcpu, printable::Nanoseconds, tracefs::stats::Stats};

/// [`ClockSummary::source`]: KVM's TSC offsets.
pub const KVM: &str = "kvm";
/// [`ClockSummary::source`]: round trips over the control port.
pub const MEASURED: &str = "measured";
/// [`ClockSummary::source`]: not converted (`--raw-clock`).
pub const RAW: &str = "raw";

/// One recording.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Summary {
    /// Its id, also in each file's start marker.
    pub session: String,
    /// From start to stop, seconds.
    pub seconds: f64,
    /// The host first, then the guests in the order typed.
    pub machines: Vec<MachineSummary>,
    /// Set if the files ended the recording.
    pub ended: Option<Ended>,
    /// The command's exit code, or 128 + signal.
    pub command_status: Option<u8>,
}

/// One machine.
#[derive(Clone, PartialEq, Debug, Default, Serialize)]
pub struct MachineSummary {
    /// `host`, `host:INSTANCE`, or the guest's name.
    pub name: String,
    /// The path of its file, if there is one; bytes that are not UTF-8 are replaced.
    pub file: Option<String>,
    /// Bytes of the file.
    pub bytes: u64,
    /// One entry per CPU.
    pub lanes: Vec<LaneSummary>,
    /// How a guest's pages were written: `direct` (O_DIRECT) or `buffered`.
    pub sink: Option<&'static str>,
    /// How its times become host times; `None` for the host.
    pub clock: Option<ClockSummary>,
    /// From the host's start to this guest's, nanoseconds of host time.
    pub start_skew_ns: Option<i64>,
    /// Its commands (`--exec`).
    pub commands: Vec<CommandSummary>,
    /// The longest time for which its agent owed an answer, ms. Agents are asked every second.
    pub silence_ms_max: u64,
    /// Its part ended early, or its file is not as it should be.
    pub failed: bool,
    /// Failures, and facts that a reader of the file needs.
    pub remarks: Vec<String>,
}

/// How guest time becomes host time.
#[derive(Clone, PartialEq, Debug, Default, Serialize)]
pub struct ClockSummary {
    /// [`KVM`], [`MEASURED`] or [`RAW`].
    pub source: String,
    /// Number of vCPUs whose offsets are known.
    pub vcpus: usize,
    /// Largest error of a converted time, nanoseconds.
    pub bound_ns: u64,
    /// Events whose time can have that error, because the guest's TSC was moved; of rewritten files.
    pub uncertain_events: u64,
    /// The offset was the same at start and end.
    pub steady: bool,
    /// Segments of the vCPU with the most; 0 if KVM's offsets are not known.
    pub segments: usize,
    /// KVM's offsets, even if the file's times do not use them.
    pub kvm: Vec<Vcpu>,
    /// Why KVM's offsets are not used.
    pub why_measured: Option<String>,
}

/// The ledger of one CPU. `pages_in == pages_out + pages_lost`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct LaneSummary {
    /// The CPU.
    pub cpu: u32,
    /// Pages taken from its ring buffer.
    pub pages_in: u64,
    /// Of those: written to the file.
    pub pages_out: u64,
    /// Of those: replaced by newer ones (`-m`).
    pub pages_old: u64,
    /// Pages added when host times needed more space than the guest's.
    pub pages_added: u64,
    /// Pages lost between ring buffer and file.
    pub pages_lost: u64,
    /// Of those: lost in the agent (the host's: in the pump).
    pub pages_lost_agent: u64,
    /// Of those: sent and not received.
    pub pages_lost_transport: u64,
    /// Bytes sent and not received.
    pub bytes_missing: u64,
    /// Of the lost pages: received and not written.
    pub pages_lost_refused: u64,
    /// Events read, by the kernel's count.
    pub events: u64,
    /// Events overwritten or dropped, by the kernel's count.
    pub events_lost: u64,
    /// `errno` of the first failed write; 0 if none.
    pub write_errno: i32,
}

/// Sums over lanes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// See [`LaneSummary`].
    pub pages_in: u64,
    /// See [`LaneSummary`].
    pub pages_out: u64,
    /// See [`LaneSummary`].
    pub pages_lost: u64,
    /// See [`LaneSummary`].
    pub events: u64,
    /// See [`LaneSummary`].
    pub events_lost: u64,
}

impl LaneSummary {
    /// A lane of the host.
    pub fn host(report: &LaneReport) -> Self {
        assert_eq!(report.pages_tapped, report.pages_sent + report.pages_lost, "{}: pages unaccounted for", report.cpu);
        let (events, events_lost) = events(report);
        Self {
            cpu: report.cpu.0,
            pages_in: report.pages_tapped,
            pages_out: report.pages_sent,
            pages_lost: report.pages_lost,
            pages_lost_agent: report.pages_lost,
            events,
            events_lost,
            ..Self::default()
        }
    }

    /// A CPU without a lane: all its events count as lost.
    pub fn late(report: &LaneReport) -> Self {
        let stats = Stats::parse(&report.stats_after).unwrap_or_default();
        Self { cpu: report.cpu.0, events_lost: stats.recorded(), ..Self::default() }
    }

    /// A guest's lane, from the agent's report and the server's ledger. The second value is false if they contradict.
    pub fn guest(report: Option<&LaneReport>, ledger: &LaneLedger) -> (Self, bool) {
        let (events, events_lost) = report.map(events).unwrap_or_default();
        // An agent that reports fewer pages than arrived is wrong; the sum still holds.
        let tapped = report.map_or(ledger.pages_in, |report| report.pages_tapped);
        let pages_in = tapped.max(ledger.pages_in);
        let pages_lost_agent = report.map_or(0, |report| report.pages_lost);
        let pages_lost_transport = report.map_or(0, |report| report.pages_sent.saturating_sub(ledger.pages_in));
        let lane = Self {
            cpu: ledger.cpu.0,
            pages_in,
            pages_out: ledger.pages_out,
            pages_old: 0,
            pages_added: 0,
            pages_lost: pages_in.saturating_sub(ledger.pages_out),
            pages_lost_agent,
            pages_lost_transport,
            bytes_missing: ledger.bytes_missing,
            pages_lost_refused: ledger.pages_refused,
            events,
            events_lost,
            write_errno: ledger.write_errno,
        };
        let causes = u128::from(pages_lost_agent) + u128::from(pages_lost_transport) + u128::from(ledger.pages_refused);
        let balanced = u128::from(tapped) == u128::from(ledger.pages_out) + causes;
        (lane, balanced && ledger.pages_in == ledger.pages_out + ledger.pages_refused)
    }
}

/// Events read and lost between the two statistics of a report. Invalid text counts as zeros.
fn events(report: &LaneReport) -> (u64, u64) {
    let [before, after] =
        [&report.stats_before, &report.stats_after].map(|text| Stats::parse(text).unwrap_or_default());
    (after.read_events.saturating_sub(before.read_events), after.lost().saturating_sub(before.lost()))
}

impl MachineSummary {
    /// Sums over its lanes.
    pub fn totals(&self) -> Totals {
        self.lanes.iter().fold(Totals::default(), |sum, lane| Totals {
            pages_in: sum.pages_in.saturating_add(lane.pages_in),
            pages_out: sum.pages_out.saturating_add(lane.pages_out),
            pages_lost: sum.pages_lost.saturating_add(lane.pages_lost),
            events: sum.events.saturating_add(lane.events),
            events_lost: sum.events_lost.saturating_add(lane.events_lost),
        })
    }
}

impl Summary {
    /// Whether a page or an event was lost anywhere.
    pub fn lost_anything(&self) -> bool {
        self.machines.iter().map(MachineSummary::totals).any(|sum| sum.pages_lost > 0 || sum.events_lost > 0)
    }

    /// Whether a machine's part failed.
    pub fn failed(&self) -> bool {
        self.machines.iter().any(|machine| machine.failed)
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.machines.iter().map(|machine| machine.name.len()).max().unwrap_or(0).max(7);
        let head = ["pages in", "out", "lost", "events", "lost", "bytes", "seconds"];
        let [pages_in, out, lost, events, events_lost, bytes, seconds] = head;
        writeln!(
            f,
            "{:width$} {pages_in:>10} {out:>10} {lost:>6} {events:>10} {events_lost:>6} {bytes:>12} {seconds:>8}  file",
            "machine"
        )?;
        match self.ended {
            Some(Ended::FileSize) => writeln!(f, "stopped: a file reached its largest size")?,
            Some(Ended::CannotWrite) => writeln!(f, "stopped: pages could not be written")?,
            None => {}
        }
        for machine in &self.machines {
            let Totals { pages_in, pages_out, pages_lost, events, events_lost } = machine.totals();
            let (bytes, seconds) = (machine.bytes, self.seconds);
            let file = machine.file.as_deref().unwrap_or("-");
            writeln!(
                f,
                "{:width$} {pages_in:>10} {pages_out:>10} {pages_lost:>6} {events:>10} {events_lost:>6} {bytes:>12} {seconds:>8.2}  {file}",
                machine.name
            )?;
        }
        for machine in &self.machines {
            if let Some(skew) = machine.start_skew_ns {
                let when = if skew < 0 { "before" } else { "after" };
                writeln!(f, "start {}: {} {when} the host", machine.name, Nanoseconds(skew.unsigned_abs()))?;
            }
            if let Some(clock) = &machine.clock {
                writeln!(f, "clock {}: {clock}", machine.name)?;
            }
            for CommandSummary { command, status, output_dropped_bytes } in &machine.commands {
                let end = status.map_or("still running at the end".into(), |status| format!("exit status {status}"));
                let dropped = match output_dropped_bytes {
                    0 => String::new(),
                    bytes => format!(", {bytes} bytes of its output left out"),
                };
                writeln!(f, "command {}: {command}: {end}{dropped}", machine.name)?;
            }
            for remark in &machine.remarks {
                writeln!(f, "note {}: {remark}", machine.name)?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for ClockSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { source, vcpus, bound_ns, uncertain_events, steady, segments, why_measured, .. } = self;
        if source == RAW {
            return write!(f, "{source}");
        }
        write!(f, "{source}, {vcpus} vCPU{}", plural(*vcpus))?;
        if source == KVM {
            write!(f, ", {segments} segment{}, exact", plural(*segments))?;
            let bound = Nanoseconds(*bound_ns);
            return match (uncertain_events, bound_ns) {
                (0, 0) => Ok(()),
                (0, _) => write!(f, " to ±{bound}"),
                (1, _) => write!(f, " but 1 event marked uncertain by up to {bound}"),
                (count, _) => write!(f, " but {count} events marked uncertain by up to {bound}"),
            };
        }
        write!(f, ", ±{}", Nanoseconds(*bound_ns))?;
        if !steady {
            write!(f, ", offset moved during the trace")?;
        }
        why_measured.as_ref().map_or(Ok(()), |why| write!(f, "; not by KVM: {why}"))
    }
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(tapped: u64, sent: u64) -> LaneReport {
        LaneReport { pages_tapped: tapped, pages_sent: sent, pages_lost: tapped - sent, ..LaneReport::default() }
    }

    fn ledger(pages_in: u64, pages_out: u64) -> LaneLedger {
        LaneLedger { pages_in, pages_out, pages_refused: pages_in - pages_out, ..LaneLedger::default() }
    }

    #[test]
    fn every_lost_page_has_a_cause() {
        let (lane, balanced) = LaneSummary::guest(Some(&report(10, 9)), &ledger(7, 6));
        assert!(balanced);
        assert_eq!((lane.pages_in, lane.pages_out, lane.pages_lost), (10, 6, 4));
        assert_eq!((lane.pages_lost_agent, lane.pages_lost_transport, lane.pages_lost_refused), (1, 2, 1));
    }

    #[test]
    fn agent_that_reports_fewer_pages_than_arrived_is_detected() {
        assert!(!LaneSummary::guest(Some(&report(5, 5)), &ledger(6, 6)).1);
        let impossible = LaneReport { pages_tapped: u64::MAX, pages_sent: 3, ..LaneReport::default() };
        assert!(!LaneSummary::guest(Some(&impossible), &ledger(3, 3)).1);
    }

    #[test]
    fn lane_without_a_report_shows_the_servers_ledger() {
        let (lane, balanced) = LaneSummary::guest(None, &ledger(6, 5));
        assert!(balanced);
        assert_eq!((lane.pages_in, lane.pages_lost), (6, 1));
    }

    #[test]
    fn table_names_machine_counts_clock_and_remarks() {
        let lanes = vec![LaneSummary { pages_in: 10, pages_out: 9, pages_lost: 1, ..LaneSummary::default() }];
        let clock =
            ClockSummary { source: MEASURED.into(), vcpus: 2, bound_ns: 1840, steady: true, ..Default::default() };
        let machine = MachineSummary {
            commands: Vec::new(),
            name: "guest1".into(),
            file: Some("trace-guest1.dat".into()),
            bytes: 36864,
            lanes,
            sink: Some("buffered"),
            clock: Some(clock),
            start_skew_ns: Some(-1_840_000),
            silence_ms_max: 35_100,
            failed: true,
            remarks: vec!["its agent went away".into()],
        };
        let summary =
            Summary { session: "7".into(), seconds: 3.0, machines: vec![machine], ended: None, command_status: None };
        let text = summary.to_string();
        assert!(text.contains("trace-guest1.dat"), "{text}");
        assert!(text.contains("clock guest1: measured, 2 vCPUs, ±1.8 µs"), "{text}");
        assert!(text.contains("start guest1: 1.8 ms before the host"), "{text}");
        assert!(text.contains("note guest1: its agent went away"), "{text}");
        assert!(summary.lost_anything());
    }

    #[test]
    fn clock_names_its_source_and_the_reason() {
        let kvm = ClockSummary { source: KVM.into(), vcpus: 1, segments: 4, steady: true, ..Default::default() };
        assert_eq!(kvm.to_string(), "kvm, 1 vCPU, 4 segments, exact");
        let some = ClockSummary { uncertain_events: 12, bound_ns: 3140, ..kvm.clone() };
        assert_eq!(some.to_string(), "kvm, 1 vCPU, 4 segments, exact but 12 events marked uncertain by up to 3.1 µs");
        let steps = ClockSummary { bound_ns: 38, ..kvm.clone() };
        assert_eq!(steps.to_string(), "kvm, 1 vCPU, 4 segments, exact to ±38 ns");
        assert_eq!(ClockSummary { source: RAW.into(), ..kvm.clone() }.to_string(), "raw");
        let why_measured = Some("guests ran and kvm_entry kept silent".into());
        let measured = ClockSummary { source: MEASURED.into(), vcpus: 2, bound_ns: 900, why_measured, ..kvm };
        let text = "measured, 2 vCPUs, ±900 ns; not by KVM: guests ran and kvm_entry kept silent";
        assert_eq!(measured.to_string(), text);
    }

    #[test]
    fn path_that_is_not_utf8_is_plain_text_in_the_summary() {
        use std::{ffi::OsStr, os::unix::ffi::OsStrExt, path::Path};
        let path = Path::new(OsStr::from_bytes(b"d\xe4/trace.dat"));
        let machine = MachineSummary { file: Some(path.display().to_string()), ..MachineSummary::default() };
        let json = serde_json::to_string(&machine).unwrap();
        assert!(json.contains("d\u{fffd}/trace.dat"), "{json}");
    }
}
