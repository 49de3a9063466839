//! What stock `trace-cmd report` says, line by line.
//!
//! In:    two files. Out: events with their times, as numbers. Runs: trace-cmd as a child process; else pure.
//! Full:  does not apply. Trust: stock trace-cmd; lines that are no events are passed over.

use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::process::Command;

/// One event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Event<'a> {
    pub(super) cpu: u32,
    pub(super) pid: u32,
    /// Nanoseconds, or TSC in raw reports.
    pub(super) time: u64,
    pub(super) name: &'a str,
    pub(super) text: &'a str,
}

/// TSC to nanoseconds, as option TSC2NSEC says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Scale {
    mult: u32,
    shift: u32,
}

/// The reports of two files.
#[derive(Debug)]
pub(super) struct Reports {
    /// Both files read together, as a person would: the host's lines.
    pub(super) shown_host: String,
    /// And the guest's.
    pub(super) shown_guest: String,
    /// Without any correction.
    pub(super) raw_host: String,
    pub(super) raw_guest: String,
    pub(super) scale: Scale,
    /// The guest's file has a TIME_SHIFT: its pages hold the guest's own times.
    pub(super) is_shifted: bool,
}

impl Reports {
    pub(super) fn read(host: &Path, guest: &Path) -> Result<Self> {
        let merged = trace_cmd(&["report", "-t"], &[host, guest])?;
        let own = |file: &Path| {
            let name = format!("{}:", file.file_name().unwrap_or_default().to_string_lossy());
            let lines = merged.lines().filter_map(|line| line.trim_start().strip_prefix(&name));
            lines.flat_map(|line| [line, "\n"]).collect::<String>()
        };
        let options = trace_cmd(&["dump", "--options"], &[guest])?;
        Ok(Self {
            shown_host: own(host),
            shown_guest: own(guest),
            raw_host: trace_cmd(&["report", "-t", "--raw-ts"], &[host])?,
            raw_guest: trace_cmd(&["report", "-t", "--raw-ts"], &[guest])?,
            scale: scale(&options).context("the guest's file has no TSC2NSEC")?,
            is_shifted: options.contains("[Option TimeShift"),
        })
    }
}

/// Whether stock trace-cmd finds each CPU's times in order.
pub(super) fn is_in_order(file: &Path) -> Result<bool> {
    Ok(!trace_cmd(&["report", "--ts-check"], &[file])?.contains("BACKWARD"))
}

fn trace_cmd(words: &[&str], files: &[&Path]) -> Result<String> {
    let mut command = Command::new("trace-cmd");
    command.args(words);
    files.iter().for_each(|file| {
        command.arg("-i").arg(file);
    });
    let output = command.output().context("cannot run trace-cmd")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "trace-cmd {}: {}", words.join(" "), said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// `MULT SHIFT OFFSET [multiplier, shift, offset]`
fn scale(options: &str) -> Option<Scale> {
    let line = options.lines().find(|line| line.contains("[multiplier, shift, offset]"))?;
    let mut words = line.split_whitespace();
    Some(Scale { mult: words.next()?.parse().ok()?, shift: words.next()?.parse().ok()? })
}

impl Scale {
    pub(super) fn ns(self, cycles: u64) -> u64 {
        let wide = (u128::from(cycles) * u128::from(self.mult)) >> self.shift;
        u64::try_from(wide).unwrap_or(u64::MAX)
    }
}

/// The events of a report, in its order.
pub(super) fn events(report: &str) -> impl Iterator<Item = Event<'_>> {
    report.lines().filter_map(event)
}

/// `TASK-PID [CPU] FLAGS? TIME: NAME: TEXT`; a task's name may hold anything.
fn event(line: &str) -> Option<Event<'_>> {
    let (task, rest) = line.match_indices(" [").find_map(|(at, _)| {
        let (cpu, rest) = line[at + 2..].split_once(']')?;
        Some(((&line[..at], cpu.parse::<u32>().ok()?), rest))
    })?;
    let (task, cpu) = task;
    let pid = task.trim_end().rsplit_once('-')?.1.parse().ok()?;
    let (time, rest) = rest.split_once(": ")?;
    let time = time_of(time.split_whitespace().next_back()?)?;
    let (name, text) = rest.trim_start().split_once(':')?;
    Some(Event { cpu, pid, time, name, text: text.trim() })
}

/// `SECONDS.NANOSECONDS`, or a plain number.
fn time_of(text: &str) -> Option<u64> {
    let Some((seconds, fraction)) = text.split_once('.') else { return text.parse().ok() };
    (fraction.len() == 9).then_some(())?;
    seconds.parse::<u64>().ok()?.checked_mul(1_000_000_000)?.checked_add(fraction.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_both_kinds_of_report_are_read() {
        let shown = "       CPU 0/KVM-181   [001]    42.549252510: kvm_entry:             vcpu 0 rip 0xff";
        let raw = "          vtrace-138   [000]110619648176: print:                tracing_mark_write: a [1] b: c";
        let flags = "          <idle>-0     [011] d..1. 5.000000001: sched_switch:         swapper/0:0 [120] R";
        let all: Vec<Event> = [shown, raw, flags].into_iter().filter_map(event).collect();
        let found: Vec<_> = all.iter().map(|event| (event.cpu, event.pid, event.time, event.name)).collect();
        assert_eq!(
            found,
            [
                (1, 181, 42_549_252_510, "kvm_entry"),
                (0, 138, 110_619_648_176, "print"),
                (11, 0, 5_000_000_001, "sched_switch")
            ]
        );
        assert_eq!(all[0].text, "vcpu 0 rip 0xff");
    }

    #[test]
    fn lines_that_are_no_events_are_passed_over() {
        for line in ["cpus=2", "", "a [x] 1: b: c", "a-1 [0] 1.5: b: c", "a [0] 1.000000000: b: c", "a-1 [0] 1: b"] {
            assert_eq!(event(line), None, "{line}");
        }
    }

    #[test]
    fn scale_is_read_from_the_options() {
        let scale = scale("\t[Option TSC2NSEC, 16 bytes]\n825955884 31 0 [multiplier, shift, offset]\n").unwrap();
        assert_eq!(scale, Scale { mult: 825_955_884, shift: 31 });
        assert_eq!(scale.ns(110_619_648_176), 42_546_051_227);
    }
}
