//! The closing table: each machine's pages and events, its losses, and the error bound of its times.
//!
//! In:    reports of agents and of the host's pump, ledgers of the server, sizes of files
//! Out:   the table, the same as JSON, the note in each file
//! Trust: an agent's counts can be wrong; a mismatch with the server's becomes a remark

use std::fmt;

use serde::Serialize;
use vtrace_common::{
    ledger::Ledger,
    wire::{
        agent::{LaneReport, SettingChange},
        client::LaneLedger,
    },
};

use super::{files::limit::Ended, guests::command_output::CommandSummary};
use crate::{
    clock::vcpus::Vcpu,
    printable::Nanoseconds,
    tracefs::stats::{Stats, events_read},
    vmm::vcpu_threads::VcpuThread,
};

/// [`ClockSummary::source`]: KVM's TSC offsets.
pub const KVM: &str = "kvm";
/// [`ClockSummary::source`]: round trips over the control port.
pub const MEASURED: &str = "measured";
/// [`ClockSummary::source`]: not converted (`--raw-clock`).
pub const RAW: &str = "raw";

/// The kernel's size of one CPU's buffer in a new instance (kernel/trace/trace.c, `TRACE_BUF_SIZE_DEFAULT`), KiB.
const BUFFER_KB_DEFAULT: u64 = 1408;
/// vCPUs of a guest that the table shows.
const VCPUS_SHOWN: usize = 8;
/// Bytes of one event with its header.
const EVENT_BYTES_MIN: u64 = 16;
const EVENT_BYTES_MAX: u64 = 4096;

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
    /// The host threads of its vCPUs at the end; empty where they are not known.
    pub vcpus: Vec<VcpuThread>,
    /// From the host's start to this guest's, nanoseconds of host time.
    pub start_skew_ns: Option<i64>,
    /// Its commands (`--exec`).
    pub commands: Vec<CommandSummary>,
    /// The longest time for which its agent owed an answer, ms. Agents are asked every second.
    pub silence_ms_max: u64,
    /// Settings of its buffer that another program, or a trigger, changed while it recorded.
    pub changes: Vec<SettingChange>,
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

/// One CPU. What is not known is `null` in JSON, never 0.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct LaneSummary {
    /// Its number.
    pub cpu: u32,
    /// From the machine's ring buffer to the file.
    #[serde(flatten)]
    pub ledger: Ledger,
    /// Events the kernel counted as read.
    pub events: Option<u64>,
    /// Of the pages out: older ones, overwritten by newer ones where only the newest are kept.
    pub pages_old: u64,
    /// Pages that the file has more: host times can need more room than the guest's.
    pub pages_added: u64,
    /// Of the pages lost: taken by the agent and not sent.
    pub pages_lost_agent: Option<u64>,
    /// Of the pages lost: sent by the agent and never received.
    pub pages_lost_transport: Option<u64>,
    /// Of the pages lost: received (a guest's) or taken (the host's) and not written.
    pub pages_lost_drain: u64,
    /// Bytes that the agent sent and the server never received.
    pub bytes_missing: Option<u64>,
    /// First error of a write, 0 if none failed.
    pub write_errno: i32,
}

impl LaneSummary {
    /// A lane of the host: no agent and no transport.
    pub fn host(report: &LaneReport) -> Self {
        assert!(report.ledger.is_balanced(), "{}: pages unaccounted for", report.cpu);
        Self {
            cpu: report.cpu.0,
            ledger: report.ledger,
            events: events_read(&report.stats_before, &report.stats_after),
            pages_lost_drain: report.ledger.pages_lost,
            ..Self::default()
        }
    }

    /// A CPU that came online later: its tap was never read.
    pub fn late(report: &LaneReport) -> Self {
        let stats = Stats::parse(&report.stats_after).unwrap_or_default();
        let ledger = Ledger { events_lost: Some(stats.recorded()), ..Ledger::default() };
        Self { cpu: report.cpu.0, ledger, events: Some(0), ..Self::default() }
    }

    /// A guest's lane: the agent's counts against the server's. The second value is false if the two cannot both be
    /// true.
    pub fn guest(report: Option<&LaneReport>, lane: &LaneLedger) -> (Self, bool) {
        let agent = report.map(|report| report.ledger);
        let server = lane.ledger;
        // An agent that counts fewer than came is wrong; the sum holds all the same.
        let pages_tapped = agent.map_or(server.pages_in, |agent| agent.pages_in);
        let pages_in = pages_tapped.max(server.pages_in);
        let mut ledger = Ledger { pages_in, events_lost: agent.and_then(|agent| agent.events_lost), ..server };
        ledger.settle();
        let pages_lost_agent = agent.map(|agent| agent.pages_lost);
        let pages_lost_transport = agent.map(|agent| agent.pages_out.saturating_sub(server.pages_in));
        let pages_accounted = [pages_lost_agent, pages_lost_transport, Some(server.pages_lost), Some(server.pages_out)];
        let pages_accounted: u128 = pages_accounted.into_iter().flatten().map(u128::from).sum();
        let summary = Self {
            cpu: lane.cpu.0,
            ledger,
            events: report.and_then(|report| events_read(&report.stats_before, &report.stats_after)),
            pages_lost_agent,
            pages_lost_transport,
            pages_lost_drain: server.pages_lost,
            bytes_missing: lane.bytes_missing,
            write_errno: lane.write_errno,
            ..Self::default()
        };
        (summary, u128::from(pages_tapped) == pages_accounted && server.is_balanced())
    }
}

impl MachineSummary {
    /// Sum of its lanes' ledgers.
    pub fn ledger(&self) -> Ledger {
        let mut sum = Ledger { events_lost: Some(0), ..Ledger::default() };
        self.lanes.iter().for_each(|lane| sum += lane.ledger);
        sum
    }

    /// Events the kernel counted as read, of all lanes.
    pub fn events(&self) -> Option<u64> {
        self.lanes.iter().try_fold(0_u64, |sum, lane| Some(sum.saturating_add(lane.events?)))
    }
}

/// A remark about events lost in ring buffers: where most were lost, and the buffer size that would have held them.
/// `buffer_kb`: the size of each CPU's buffer, 0 for the kernel's default.
pub(crate) fn loss_hint(lanes: &[LaneSummary], buffer_kb: u32) -> Option<String> {
    let lost = |lane: &LaneSummary| lane.ledger.events_lost.unwrap_or(0);
    let total = lanes.iter().map(lost).fold(0, u64::saturating_add);
    let worst = lanes.iter().max_by_key(|lane| lost(lane)).filter(|lane| lost(lane) > 0)?;
    let events_read = worst.events.unwrap_or(0).max(1);
    let event_bytes = (worst.ledger.bytes_out / events_read).clamp(EVENT_BYTES_MIN, EVENT_BYTES_MAX);
    let lost_kb = lost(worst).saturating_mul(event_bytes).div_ceil(1024);
    let buffer_kb = if buffer_kb == 0 { BUFFER_KB_DEFAULT } else { u64::from(buffer_kb) };
    let wanted_kb = buffer_kb.saturating_add(lost_kb).checked_next_power_of_two()?;
    let (cpu, on_cpu) = (worst.cpu, lost(worst));
    Some(format!("{total} events were lost in ring buffers, {on_cpu} on cpu{cpu}: -b {wanted_kb} would have held them"))
}

impl Summary {
    /// Commands whose output was cut, one line each: said even where there is no table.
    pub fn cut_outputs(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for machine in &self.machines {
            for CommandSummary { command, output_dropped_bytes, .. } in &machine.commands {
                if *output_dropped_bytes > 0 {
                    let name = &machine.name;
                    lines.push(format!("{name}: {command}: {output_dropped_bytes} bytes of its output left out"));
                }
            }
        }
        lines
    }

    /// Whether settings were changed while a machine recorded: events may be missing, or times be of another clock.
    pub fn was_changed(&self) -> bool {
        self.machines.iter().any(|machine| !machine.changes.is_empty())
    }

    /// Whether a page or an event was lost anywhere.
    pub fn lost_anything(&self) -> bool {
        self.machines
            .iter()
            .flat_map(|machine| &machine.lanes)
            .any(|lane| lane.ledger.pages_lost > 0 || lane.ledger.events_lost.is_some_and(|events| events > 0))
    }

    /// Whether a machine's part failed.
    pub fn failed(&self) -> bool {
        self.machines.iter().any(|machine| machine.failed)
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.machines.iter().map(|machine| machine.name.len()).max().unwrap_or(0).max(7);
        let head = ["pages in", "pages out", "pages lost", "events", "events lost", "bytes", "seconds"];
        let [pages_in, out, lost, events, events_lost, bytes, seconds] = head;
        writeln!(
            f,
            "{:width$} {pages_in:>10} {out:>10} {lost:>10} {events:>10} {events_lost:>11} {bytes:>12} {seconds:>8}  file",
            "machine"
        )?;
        match self.ended {
            Some(Ended::FileSize) => writeln!(f, "stopped: a file reached its largest size")?,
            Some(Ended::CannotWrite) => writeln!(f, "stopped: pages could not be written")?,
            None => {}
        }
        for machine in &self.machines {
            let Ledger { pages_in, pages_out, pages_lost, events_lost, .. } = machine.ledger();
            let (events, events_lost) = (known(machine.events()), known(events_lost));
            let (bytes, seconds) = (machine.bytes, self.seconds);
            let file = machine.file.as_deref().unwrap_or("-");
            writeln!(
                f,
                "{:width$} {pages_in:>10} {pages_out:>10} {pages_lost:>10} {events:>10} {events_lost:>11} {bytes:>12} {seconds:>8.2}  {file}",
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
            for vcpu in machine.vcpus.iter().take(VCPUS_SHOWN) {
                writeln!(f, "{} {vcpu}", machine.name)?;
            }
            if let more @ 1.. = machine.vcpus.len().saturating_sub(VCPUS_SHOWN) {
                writeln!(f, "{} has {more} more vCPU{}: --json has all", machine.name, plural(more))?;
            }
            for CommandSummary { command, status, output_dropped_bytes } in &machine.commands {
                let end = status.map_or("still running at the end".into(), |status| format!("exit status {status}"));
                let dropped = match output_dropped_bytes {
                    0 => String::new(),
                    bytes => format!(", {bytes} bytes of its output left out"),
                };
                writeln!(f, "command {}: {command}: {end}{dropped}", machine.name)?;
            }
            for change in &machine.changes {
                writeln!(f, "changed {}: {}", machine.name, ChangeText(change))?;
            }
            for remark in &machine.remarks {
                writeln!(f, "note {}: {remark}", machine.name)?;
            }
        }
        Ok(())
    }
}

/// A changed setting as a line of the table.
pub(crate) struct ChangeText<'a>(pub(crate) &'a SettingChange);

impl fmt::Display for ChangeText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SettingChange { setting, armed, found } = self.0;
        let is_pipe = setting.contains("trace_pipe");
        match (armed.as_str(), found.as_str()) {
            ("", "") if is_pipe => write!(f, "{setting} was opened by another program: events it read are missing"),
            ("", "") if setting == "trace" => write!(f, "trace was written: its ring buffers were cleared"),
            ("", "") => write!(f, "{setting} was written while it recorded, and has its value again"),
            (_, "0") if setting == "tracing_on" => {
                write!(f, "tracing was switched off while it recorded: later events are missing")
            }
            _ if setting == "trace_clock" => {
                write!(
                    f,
                    "trace_clock was changed from {armed} to {found} while it recorded: its times are not converted"
                )
            }
            _ => write!(f, "{setting} was changed from {armed} to {found} while it recorded"),
        }
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

/// A count, or a dash where it is not known.
fn known(count: Option<u64>) -> String {
    count.map_or_else(|| "-".into(), |count| count.to_string())
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(pages_in: u64, pages_out: u64) -> Ledger {
        Ledger { pages_in, pages_out, pages_lost: pages_in - pages_out, ..Ledger::default() }
    }

    fn report(pages_in: u64, pages_out: u64) -> LaneReport {
        LaneReport { ledger: ledger(pages_in, pages_out), ..LaneReport::default() }
    }

    fn lane(pages_in: u64, pages_out: u64) -> LaneLedger {
        LaneLedger { ledger: ledger(pages_in, pages_out), ..LaneLedger::default() }
    }

    #[test]
    fn every_lost_page_has_a_cause() {
        let (summary, balanced) = LaneSummary::guest(Some(&report(10, 9)), &lane(7, 6));
        assert!(balanced);
        assert_eq!(summary.ledger, ledger(10, 6));
        assert_eq!((summary.pages_lost_agent, summary.pages_lost_transport), (Some(1), Some(2)));
        assert_eq!(summary.pages_lost_drain, 1);
    }

    #[test]
    fn agent_that_reports_fewer_pages_than_arrived_is_detected() {
        assert!(!LaneSummary::guest(Some(&report(5, 5)), &lane(6, 6)).1);
        let ledger = Ledger { pages_in: u64::MAX, pages_out: 3, ..Ledger::default() };
        let impossible = LaneReport { ledger, ..LaneReport::default() };
        assert!(!LaneSummary::guest(Some(&impossible), &lane(3, 3)).1);
    }

    #[test]
    fn lane_without_a_report_shows_the_servers_ledger() {
        let (summary, balanced) = LaneSummary::guest(None, &lane(6, 5));
        assert!(balanced);
        assert_eq!(summary.ledger, ledger(6, 5));
    }

    #[test]
    fn what_only_the_agent_counts_is_null_without_its_report() {
        let (summary, _) = LaneSummary::guest(None, &lane(6, 5));
        let json = serde_json::to_value(&summary).unwrap();
        for name in ["events", "events_lost", "pages_lost_agent", "pages_lost_transport", "bytes_missing"] {
            assert_eq!(json.get(name), Some(&serde_json::Value::Null), "{name}");
        }
        for (name, count) in [("pages_in", 6), ("pages_out", 5), ("pages_lost", 1), ("pages_lost_drain", 1)] {
            assert_eq!(json[name], count, "{name}");
        }
        let machine = MachineSummary { name: "guest1".into(), lanes: vec![summary], ..MachineSummary::default() };
        let (session, machines) = ("7".into(), vec![machine]);
        let table = Summary { session, seconds: 1.0, machines, ended: None, command_status: None }.to_string();
        let row: Vec<&str> = table.lines().last().unwrap().split_whitespace().collect();
        assert_eq!(row[..6], ["guest1", "6", "5", "1", "-", "-"], "{table}");
    }

    #[test]
    fn table_names_machine_counts_clock_and_remarks() {
        let lanes = vec![LaneSummary { ledger: ledger(10, 9), ..LaneSummary::default() }];
        let clock =
            ClockSummary { source: MEASURED.into(), vcpus: 2, bound_ns: 1840, steady: true, ..Default::default() };
        let vcpu =
            |vcpu| VcpuThread { vcpu, thread: 70 + vcpu, host_cpu: Some(3), host_cpus_allowed: Some("0-3".into()) };
        let machine = MachineSummary {
            commands: Vec::new(),
            changes: Vec::new(),
            name: "guest1".into(),
            file: Some("trace-guest1.dat".into()),
            bytes: 36864,
            lanes,
            sink: Some("buffered"),
            clock: Some(clock),
            vcpus: (0..9).map(vcpu).collect(),
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
        assert!(
            text.contains("\nguest1 vCPU 7: thread 77, CPU 3 of 0-3\nguest1 has 1 more vCPU: --json has all\n"),
            "{text}"
        );
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

    #[test]
    fn changed_settings_are_lines_of_the_table_and_count_for_strict() {
        let change = |setting: &str, armed: &str, found: &str| SettingChange {
            setting: setting.into(),
            armed: armed.into(),
            found: found.into(),
        };
        let changes = vec![
            change("trace_clock", "x86-tsc", "global"),
            change("tracing_on", "1", "0"),
            change("per_cpu/cpu0/trace_pipe", "", ""),
        ];
        let machine = MachineSummary { name: "host".into(), changes, ..MachineSummary::default() };
        let summary =
            Summary { session: "7".into(), seconds: 3.0, machines: vec![machine], ended: None, command_status: None };
        let text = summary.to_string();
        for line in [
            "changed host: trace_clock was changed from x86-tsc to global while it recorded",
            "changed host: tracing was switched off while it recorded: later events are missing",
            "changed host: per_cpu/cpu0/trace_pipe was opened by another program",
        ] {
            assert!(text.contains(line), "{text}");
        }
        assert!(summary.was_changed() && !summary.lost_anything());
    }

    #[test]
    fn lost_events_name_their_cpu_and_the_buffer_size_that_would_have_held_them() {
        let lane = |cpu, events, events_lost, bytes_out| LaneSummary {
            cpu,
            events: Some(events),
            ledger: Ledger { events_lost: Some(events_lost), bytes_out, ..Ledger::default() },
            ..LaneSummary::default()
        };
        let lanes = [lane(0, 100, 7, 4096), lane(3, 1000, 50_000, 64_000)];
        let expected = "50007 events were lost in ring buffers, 50000 on cpu3: -b 4096 would have held them";
        assert_eq!(loss_hint(&lanes, 64).as_deref(), Some(expected));
        assert_eq!(loss_hint(&lanes[..1], 0).as_deref().map(|hint| hint.contains("-b 2048")), Some(true));
        assert_eq!(loss_hint(&[lane(0, 100, 0, 4096)], 64), None);
    }

    #[test]
    fn output_that_was_cut_is_named_without_a_table_too() {
        let commands = vec![
            CommandSummary { command: "yes".into(), status: Some(0), output_dropped_bytes: 9 },
            CommandSummary { command: "true".into(), status: Some(0), output_dropped_bytes: 0 },
        ];
        let machine = MachineSummary { name: "guest1".into(), commands, ..MachineSummary::default() };
        let summary =
            Summary { session: "7".into(), seconds: 3.0, machines: vec![machine], ended: None, command_status: None };
        assert_eq!(summary.cut_outputs(), ["guest1: yes: 9 bytes of its output left out"]);
    }
}
