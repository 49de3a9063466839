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
//! | without it, where the request needs the top buffer or has `-O copy_trace_marker` | the top buffer itself is recorded ([`super::top`]) |
//! | without it | none: a remark says so, with their number |
//!
//! A copied marker is written even while `tracing_on` of the top buffer is 0.

use std::path::Path;

use super::{possible_cpus, read, settings::copy_option, stats::Stats, top, write};

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
            false if write(&copy_option(instance), "1").is_ok() => MarkerSource::Copied,
            false => MarkerSource::Missing,
        };
        Self { source, count_before: recorded(root), was_on: is_on(root) }
    }

    /// What the closing table says about them.
    pub(super) fn remarks(&self, root: &Path) -> Vec<String> {
        if self.source == MarkerSource::TopBuffer {
            return Vec::new();
        }
        // With events or a tracer on, the counters of the top buffer count those as well.
        let count = top::is_idle(root).then(|| recorded(root).saturating_sub(self.count_before));
        let mut remarks = Vec::from_iter(self.source.remark(count));
        if self.was_on && !is_on(root) {
            remarks.push("a program has switched tracing off at the top level (tracing_on): recorded on".into());
        }
        remarks
    }
}

impl MarkerSource {
    /// `count`: how many markers applications wrote, if that is known.
    fn remark(self, count: Option<u64>) -> Option<String> {
        let advice = "this kernel cannot copy them; -O copy_trace_marker records the top buffer, which has them";
        match (self, count) {
            (Self::TopBuffer, _) | (_, Some(0)) | (Self::Copied, None) => None,
            (Self::Copied, Some(count)) => Some(format!("{count} markers of applications")),
            (Self::Missing, Some(count)) => Some(format!("{count} markers of applications are not recorded: {advice}")),
            (Self::Missing, None) => Some(
                "markers of applications are not recorded, their number is not known: the top buffer is in use, and \
                 this kernel cannot copy them"
                    .into(),
            ),
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

#[cfg(test)]
mod tests {
    use super::{
        super::settings::{COPY_MARKERS, need_top_for_markers},
        *,
    };
    use vtrace_common::wire::agent::Arm;

    #[test]
    fn missing_markers_are_counted_with_what_records_them_and_none_are_not_mentioned() {
        let missing = MarkerSource::Missing.remark(Some(3)).unwrap();
        assert!(
            missing.starts_with("3 markers of applications are not recorded")
                && missing.contains("-O copy_trace_marker")
        );
        assert!(MarkerSource::Missing.remark(None).unwrap().contains("not known"));
        assert_eq!(MarkerSource::Missing.remark(Some(0)), None);
        assert_eq!(MarkerSource::Copied.remark(Some(2)).unwrap(), "2 markers of applications");
    }

    #[test]
    fn top_buffer_is_needed_for_markers_where_an_instance_cannot_copy_them() {
        let instance = tempfile::tempdir().unwrap();
        let asked = Arm { options: vec![COPY_MARKERS.into()], ..Arm::default() };
        assert!(
            need_top_for_markers(instance.path(), &asked) && !need_top_for_markers(instance.path(), &Arm::default())
        );
        std::fs::create_dir(instance.path().join("options")).unwrap();
        std::fs::write(copy_option(instance.path()), "0").unwrap();
        assert!(!need_top_for_markers(instance.path(), &asked));
    }
}
