//! The one status line, on a terminal only.

use std::io::{self, IsTerminal, Write};

use crate::recorder::run::Progress;

/// Shows progress in place.
#[derive(Debug)]
pub(super) struct Status {
    shown: bool,
    terminal: bool,
}

impl Status {
    /// Silent if asked, or if stderr is no terminal.
    pub(super) fn new(quiet: bool) -> Self {
        Self { shown: false, terminal: !quiet && io::stderr().is_terminal() }
    }

    /// Replaces the line.
    pub(super) fn show(&mut self, progress: &Progress) {
        if self.terminal {
            self.shown = true;
            put(&format!("\r\x1b[K{}", line(progress)));
        }
    }

    /// Takes the line away.
    pub(super) fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            put("\r\x1b[K");
        }
    }
}

/// A terminal that has gone is no reason to stop recording.
fn put(text: &str) {
    let mut stderr = io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

fn line(progress: &Progress) -> String {
    let machines = progress.machines.iter().map(|(name, pages, lost)| {
        let lost = if *lost > 0 { format!(" ({lost} lost)") } else { String::new() };
        format!("  {name} {pages} pages{lost}")
    });
    format!("recording {:.0} s{}", progress.elapsed.as_secs_f64(), machines.collect::<String>())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn line_names_every_machine_and_only_real_losses() {
        let machines = vec![("host".into(), 12, 0), ("guest1".into(), 7, 2)];
        let progress = Progress { elapsed: Duration::from_secs(3), machines };
        assert_eq!(line(&progress), "recording 3 s  host 12 pages  guest1 7 pages (2 lost)");
    }
}
