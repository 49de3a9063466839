//! Markers of applications: what programs write to `trace_marker` and `trace_marker_raw` at the top level.
//!
//! In:    an instance that is being armed; the top buffer's counters
//! Out:   the markers in the recording, in order with its events; remarks about them at the end
//! Runs:  on the caller's thread
//! Trust: the kernel
//!
//! | kernel | source |
//! |---|---|
//! | with `options/copy_trace_marker` (6.18 has it, 6.12 does not) | the kernel copies each marker to the instance |
//! | without it, where the request needs the top buffer | the top buffer itself is recorded ([`super::top`]) |
//! | without it | none: a remark says so |
//!
//! A copied marker is written even while `tracing_on` of the top buffer is 0.

use std::path::Path;

use super::{possible_cpus, read, stats::Stats, top, write};

/// The option of an instance that makes the kernel copy markers to it.
const OPTION: &str = "options/copy_trace_marker";

/// Where the markers of a recording come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum MarkerSource {
    /// The kernel copies them.
    Copied,
    /// The top buffer is recorded.
    TopBuffer,
    /// They are not recorded.
    Missing,
}

/// The markers of a recording, and the top buffer at its start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Markers {
    pub(super) source: MarkerSource,
    /// Events that were written to the top buffer before.
    count_before: u64,
    /// Its `tracing_on` was 1.
    was_on: bool,
}

impl Markers {
    /// Lets the kernel copy markers to `instance` where it can.
    pub(super) fn arm(root: &Path, instance: &Path) -> Self {
        let source = match root == instance {
            true => MarkerSource::TopBuffer,
            false if write(&instance.join(OPTION), "1").is_ok() => MarkerSource::Copied,
            false => MarkerSource::Missing,
        };
        Self { source, count_before: recorded(root), was_on: is_on(root) }
    }

    /// What the closing table says about them.
    pub(super) fn remarks(&self, root: &Path) -> Vec<String> {
        match self.source {
            MarkerSource::TopBuffer => Vec::new(),
            MarkerSource::Missing => vec![
                "markers of applications are not recorded: this kernel cannot copy them (options/copy_trace_marker)"
                    .into(),
            ],
            MarkerSource::Copied => {
                let mut remarks = Vec::new();
                let count = recorded(root).saturating_sub(self.count_before);
                // With events or a tracer on, the counters of the top buffer count those as well.
                if count > 0 && top::is_idle(root) {
                    remarks.push(format!("{count} markers of applications"));
                }
                if self.was_on && !is_on(root) {
                    remarks
                        .push("a program has switched tracing off at the top level (tracing_on): recorded on".into());
                }
                remarks
            }
        }
    }
}

/// Whether a buffer's `tracing_on` is 1, or cannot be read.
pub(super) fn is_on(buffer: &Path) -> bool {
    read(&buffer.join("tracing_on")).map_or(true, |text| text.trim() != "0")
}

/// Events that were written to a buffer since it was made or emptied.
fn recorded(buffer: &Path) -> u64 {
    let cpus = possible_cpus().unwrap_or_default();
    let texts = cpus.iter().filter_map(|cpu| read(&buffer.join(format!("per_cpu/{cpu}/stats"))).ok());
    texts.filter_map(|text| Stats::parse(&text).ok()).map(|stats| stats.recorded()).fold(0, u64::saturating_add)
}
