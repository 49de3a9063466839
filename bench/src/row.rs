//! One measured figure beside what it is measured against.

use std::{fmt, process::Command, sync::OnceLock};

use serde::{Deserialize, Serialize};

use crate::target;

/// One metric of one round.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Row {
    /// Which stage.
    pub(crate) case: String,
    /// What of it.
    pub(crate) metric: String,
    /// Which round.
    pub(crate) round: u32,
    /// Ours.
    pub(crate) value: f64,
    /// Of both.
    pub(crate) unit: String,
    /// The plain way's.
    pub(crate) baseline: f64,
    /// What the plain way is.
    pub(crate) baseline_name: String,
    /// Ours ÷ plain; none where the plain way's figure is 0.
    pub(crate) ratio: Option<f64>,
    /// What this figure must reach, if anything is asked of it.
    pub(crate) target: Option<String>,
    /// Whether this round's figure does.
    pub(crate) met: Option<bool>,
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
    pub(crate) fn new(case: &str, metric: impl Into<String>, round: u32, unit: &str, pair: [f64; 2]) -> Self {
        let ([value, baseline], metric, origin) = (pair, metric.into(), Origin::here());
        let targets: Vec<_> = target::of(case, &metric).collect();
        let met = targets.iter().all(|target| target.met(value, baseline));
        let said: Vec<String> = targets.iter().map(ToString::to_string).collect();
        Self {
            case: case.into(),
            metric,
            round,
            value,
            unit: unit.into(),
            baseline,
            baseline_name: "plain".into(),
            ratio: (baseline != 0.0).then(|| value / baseline),
            met: (!targets.is_empty()).then_some(met),
            target: (!targets.is_empty()).then(|| said.join(", ")),
            command: format!("cargo run --release -p vtrace-bench -- run {case}"),
            uname: origin.uname.clone(),
            cpu: origin.cpu.clone(),
            commit: origin.commit.clone(),
        }
    }

    /// Says what the plain way is.
    pub(crate) fn beside(mut self, name: &str) -> Self {
        self.baseline_name = name.into();
        self
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { case, metric, round, value, unit, baseline, baseline_name, .. } = self;
        write!(f, "{case} {round}: {metric} {value:.3} {unit}, {baseline_name} {baseline:.3}")?;
        if let Some(ratio) = self.ratio {
            write!(f, ", ratio {ratio:.2}")?;
        }
        match (&self.target, self.met) {
            (Some(target), Some(true)) => write!(f, ", met: {target}"),
            (Some(target), _) => write!(f, ", NOT MET: {target}"),
            (None, _) => Ok(()),
        }
    }
}

/// Where rows of this process are made.
struct Origin {
    uname: String,
    cpu: String,
    commit: String,
}

impl Origin {
    fn here() -> &'static Self {
        static HERE: OnceLock<Origin> = OnceLock::new();
        HERE.get_or_init(|| {
            let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
            Self {
                uname: said("uname", &["-sr"]),
                cpu: cpu.trim_start_matches([' ', '\t', ':']).to_owned(),
                commit: said("git", &["describe", "--always", "--dirty", "--exclude=*"]),
            }
        })
    }
}

fn said(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}
