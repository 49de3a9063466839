//! What figures must reach: one line a metric, as the project's goals say.
//!
//! In:    case and metric of a row
//! Out:   its targets, and whether a figure meets them
//! Runs:  when a row is made

use std::fmt;

/// What is asked of a figure.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Target {
    /// At least so many times the plain way's.
    RatioMin(f64),
    /// At most so many times the plain way's.
    RatioMax(f64),
    /// At most this, in the row's unit.
    ValueMax(f64),
    /// At most so much more than the plain way's, in the row's unit.
    ExcessMax(f64),
}

use Target::{ExcessMax, RatioMax, RatioMin, ValueMax};

/// Case, how the metric's name begins, target.
const TARGETS: &[(&str, &str, Target)] = &[
    ("ring", "throughput, tmpfs", RatioMin(0.95)),
    ("ring", "cpu, tmpfs", ExcessMax(0.05)),
    ("drain", "throughput, 1 lane", RatioMin(0.95)),
    ("drain", "cpu, 1 lane", ExcessMax(0.05)),
    ("drain", "against 1 lane, 64 lanes of 1 guest", RatioMin(0.9)),
    ("drain", "against 1 lane, 256 lanes", RatioMin(0.9)),
    ("sink", "throughput, buffered, tmpfs", RatioMin(0.95)),
    ("sink", "throughput, direct", RatioMin(0.95)),
    ("sink", "cpu, ", ExcessMax(0.05)),
    ("guest", "host cpu against FIFO", RatioMax(0.2)),
    ("guest", "host cpu against socket", RatioMax(0.25)),
    ("guest", "throughput against FIFO", RatioMin(1.2)),
    ("guest", "guest cpu against splice", RatioMax(0.8)),
    ("hostlanes", "cpu, 4 KiB pages", RatioMax(0.25)),
    ("hostlanes", "cpu, 64 KiB pages", RatioMax(0.18)),
    ("hostlanes", "events lost", RatioMax(1.0)),
    ("finish", "seconds, 4 GiB", ValueMax(0.3)),
    ("finish", "seconds, 4 GiB", RatioMax(0.05)),
    ("clock", "kvm_entry, by test run", ExcessMax(30.0)),
    ("clock", "share of a CPU at 100 000 exits/s", ValueMax(0.5)),
    ("clock", "load, CPU an exit beside no program", ExcessMax(50.0)), // ns: 0.5 % of a CPU at 100 000 exits/s
    ("clock", "load, CPU an exit beside an empty program", ExcessMax(30.0)),
    ("clock", "load, statistics", ExcessMax(30.0)),
    ("clock", "load, share of a CPU at 100 000 exits/s", ExcessMax(0.5)),
    ("idle", "wake-ups", ValueMax(0.0)),
];

/// The targets of a metric.
pub(crate) fn of(case: &str, metric: &str) -> impl Iterator<Item = Target> {
    let wanted = move |(name, begins, _): &&(&str, &str, Target)| *name == case && metric.starts_with(begins);
    TARGETS.iter().filter(wanted).map(|(_, _, target)| *target)
}

impl Target {
    /// Whether a figure beside the plain way's is good enough.
    pub(crate) fn met(self, value: f64, baseline: f64) -> bool {
        match self {
            RatioMin(least) => value >= least * baseline,
            RatioMax(most) => value <= most * baseline,
            ValueMax(most) => value <= most,
            ExcessMax(most) => value - baseline <= most,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RatioMin(least) => write!(f, "ratio ≥ {least}"),
            RatioMax(most) => write!(f, "ratio ≤ {most}"),
            ValueMax(most) => write!(f, "≤ {most}"),
            ExcessMax(most) => write!(f, "≤ {most} above"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metric_finds_every_target_that_its_name_begins_with() {
        assert_eq!(of("finish", "seconds, 4 GiB").count(), 2);
        assert_eq!(of("sink", "cpu, buffered, tmpfs").collect::<Vec<_>>(), [ExcessMax(0.05)]);
        assert_eq!(of("drain", "throughput, 8 lanes of 1 guest").count(), 0);
    }

    #[test]
    fn excess_is_counted_from_the_plain_way() {
        assert!(ExcessMax(0.05).met(0.44, 0.4) && !ExcessMax(0.05).met(0.46, 0.4));
        assert!(RatioMin(0.95).met(0.95, 1.0) && !RatioMax(0.2).met(0.3, 1.0));
        assert!(!ValueMax(0.0).met(0.1, 0.0));
    }
}
