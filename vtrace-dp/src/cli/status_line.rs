//! The status line of a recording in the foreground, on a terminal only.

use std::{
    io::{self, IsTerminal, Write},
    time::Duration,
};

use terminal_size::terminal_size_of;
use vtrace_common::ledger::Ledger;

use crate::recorder::{guests::silence::SilenceSuffix, progress::MachineProgress, run::Progress};

/// Shows progress in one line.
#[derive(Debug)]
pub(super) struct StatusLine {
    shown: bool,
    terminal: bool,
    rate: RateLine,
}

/// Formats progress, with the data rate since the previous line.
#[derive(Debug, Default)]
pub(super) struct RateLine {
    /// Time and bytes of the previous line.
    before: (Duration, u64),
}

impl StatusLine {
    /// Shows nothing if `quiet`, or if stderr is not a terminal.
    pub(super) fn new(quiet: bool) -> Self {
        Self { shown: false, terminal: !quiet && io::stderr().is_terminal(), rate: RateLine::default() }
    }

    /// Replaces the line.
    pub(super) fn show(&mut self, progress: &Progress) {
        if self.terminal {
            self.shown = true;
            put(&format!("\r\x1b[K{}", cut(&self.rate.next(progress), columns())));
        }
    }

    /// Erases the line.
    pub(super) fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            put("\r\x1b[K");
        }
    }
}

impl RateLine {
    /// The line for this progress.
    pub(super) fn next(&mut self, progress: &Progress) -> String {
        line(progress, self.speed(progress))
    }

    /// GB/s since the previous line.
    fn speed(&mut self, progress: &Progress) -> f64 {
        let bytes: u64 = progress.machines.iter().map(|machine| machine.ledger.bytes_out).sum();
        let (then, before) = std::mem::replace(&mut self.before, (progress.elapsed, bytes));
        let seconds = progress.elapsed.saturating_sub(then).as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a figure of four digits for people")]
        let grown = bytes.saturating_sub(before) as f64;
        if seconds > 0.0 { grown / seconds / 1e9 } else { 0.0 }
    }
}

/// What fits in one line: a second one could not be erased.
fn cut(line: &str, columns: usize) -> String {
    line.chars().take(columns.saturating_sub(1)).collect()
}

/// Width of the terminal.
fn columns() -> usize {
    terminal_size_of(io::stderr()).map_or(80, |(width, _)| usize::from(width.0))
}

/// A closed terminal does not stop the recording.
fn put(text: &str) {
    let mut stderr = io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

/// Time, lanes, data rate, pages and losses of each machine.
fn line(progress: &Progress, speed: f64) -> String {
    let lanes: usize = progress.machines.iter().map(|machine| machine.lanes).sum();
    let stalled: usize = progress.machines.iter().map(|machine| machine.stalled).sum();
    let pages_lost = progress.machines.iter().map(|machine| machine.ledger.pages_lost).fold(0, u64::saturating_add);
    let known_losses = progress.machines.iter().filter_map(|machine| machine.ledger.events_lost);
    let events_lost = known_losses.fold(0, u64::saturating_add);
    let seconds = progress.elapsed.as_secs_f64();
    let mut line = format!(
        "recording {seconds:.0} s, {lanes} lanes, {speed:.3} GB/s, {pages_lost} pages and {events_lost} events lost"
    );
    if stalled > 0 {
        line.push_str(&format!(", {stalled} stalled"));
    }
    for MachineProgress { name, ledger, events_lost_cpu, silent_s, .. } in &progress.machines {
        let pages_out = ledger.pages_out;
        let lost = losses(ledger, *events_lost_cpu);
        line.push_str(&format!("  {name} {pages_out} pages{lost}{}", SilenceSuffix(*silent_s)));
    }
    line
}

/// Pages and events lost, and the CPU with most of the latter: ` (2 pages lost, 40 events lost, most on cpu1)`.
fn losses(ledger: &Ledger, events_lost_cpu: Option<u32>) -> String {
    let mut parts = Vec::new();
    if ledger.pages_lost > 0 {
        parts.push(format!("{} pages lost", ledger.pages_lost));
    }
    if let (Some(events), Some(cpu)) = (ledger.events_lost.filter(|events| *events > 0), events_lost_cpu) {
        parts.push(format!("{events} events lost, most on cpu{cpu}"));
    }
    if parts.is_empty() { String::new() } else { format!(" ({})", parts.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(seconds: u64, bytes: u64) -> Progress {
        let machine = |name: &str, lanes, pages_out, pages_lost, bytes_out, stalled| MachineProgress {
            name: name.into(),
            lanes,
            ledger: Ledger { pages_in: pages_out, pages_out, pages_lost, bytes_out, events_lost: None },
            events_lost_cpu: None,
            stalled,
            silent_s: if name == "guest1" { seconds } else { 0 },
        };
        let machines = vec![machine("host", 2, 12, 0, bytes, 0), machine("guest1", 4, 7, 2, 0, 1)];
        Progress { elapsed: Duration::from_secs(seconds), machines }
    }

    #[test]
    fn line_has_time_lanes_speed_losses_and_stalls_and_names_every_machine() {
        let mut lines = RateLine::default();
        lines.speed(&progress(2, 1_000_000_000));
        let speed = lines.speed(&progress(4, 4_000_000_000));
        let expected = "recording 4 s, 6 lanes, 1.500 GB/s, 2 pages and 0 events lost, 1 stalled  host 12 pages  guest1 7 pages (2 pages lost)";
        assert_eq!(line(&progress(4, 4_000_000_000), speed), expected);
        let silent = line(&progress(35, 0), 0.0);
        assert!(silent.ends_with("  guest1 7 pages (2 pages lost), silent for 35 s"), "{silent}");
        assert!(!line(&Progress { machines: Vec::new(), ..progress(1, 0) }, 0.0).contains("stalled"));
    }

    #[test]
    fn line_names_events_lost_in_ring_buffers_and_their_cpu() {
        let mut progress = progress(4, 0);
        progress.machines[0].ledger.events_lost = Some(40);
        progress.machines[0].events_lost_cpu = Some(1);
        let line = line(&progress, 0.0);
        assert!(line.contains("2 pages and 40 events lost"), "{line}");
        assert!(line.contains("host 12 pages (40 events lost, most on cpu1)"), "{line}");
    }

    #[test]
    fn line_is_never_wider_than_the_terminal() {
        assert_eq!(cut("recording", 5), "reco");
        assert_eq!(cut("récording", 3), "ré");
        assert_eq!(cut("recording", 80), "recording");
    }
}
