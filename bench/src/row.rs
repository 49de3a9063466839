//! One measured figure beside what it is measured against.

use std::{fmt, process::Command};

use serde::Serialize;

/// One metric of one round.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    /// Which stage.
    pub(crate) case: &'static str,
    /// What of it.
    pub(crate) metric: &'static str,
    /// Which round.
    pub(crate) round: u32,
    /// Ours.
    pub(crate) value: f64,
    /// Of both.
    pub(crate) unit: &'static str,
    /// The plain way's.
    pub(crate) baseline: f64,
    /// Ours ÷ plain.
    pub(crate) ratio: f64,
    /// How it was made.
    pub(crate) command: String,
    /// Kernel.
    pub(crate) uname: String,
    /// Processor.
    pub(crate) cpu: String,
    /// Of this repository.
    pub(crate) commit: String,
}

impl Row {
    /// A figure and its baseline, with everything that says where it was measured.
    pub(crate) fn new(
        case: &'static str,
        metric: &'static str,
        round: u32,
        unit: &'static str,
        pair: [f64; 2],
    ) -> Self {
        let [value, baseline] = pair;
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
        Self {
            case,
            metric,
            round,
            value,
            unit,
            baseline,
            ratio: value / baseline,
            command: format!("cargo run --release -p vtrace-bench -- run {case}"),
            uname: said("uname", &["-sr"]),
            cpu: cpu.trim_start_matches([' ', '\t', ':']).to_owned(),
            commit: said("git", &["rev-parse", "--short", "HEAD"]),
        }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { case, metric, round, value, unit, baseline, ratio, .. } = self;
        write!(f, "{case} {round}: {metric} {value:.3} {unit}, plain {baseline:.3}, ratio {ratio:.2}")
    }
}

fn said(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}
