//! Two runs beside each other: what changed, and whether that is more than chance.
//!
//! In:    rows of two runs
//! Out:   one line a metric
//! Runs:  at once
//! Full:  more than [`FIGURES_MAX`] figures on both sides together are cut: the exact test takes their square
//!
//! What is tested is the ratio to the plain way of the same round, where there is one: it is steadier than the figure,
//! because a machine that is slow for a while is slow for both.

use std::fmt;

use crate::{measure::median, row::Row};

/// Figures of both sides that are tested.
const FIGURES_MAX: usize = 60;
/// A difference that chance makes less often than this is called one.
const CHANCE_MAX: f64 = 0.05;

/// One metric of two runs.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Comparison {
    case: String,
    metric: String,
    unit: String,
    is_ratio: bool,
    sides: [Spread; 2],
    chance: f64,
    verdict: Verdict,
}

/// Figures of one metric.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) count: usize,
}

impl Spread {
    pub(crate) fn of(figures: &[f64]) -> Self {
        let min = figures.iter().copied().fold(f64::INFINITY, f64::min);
        let max = figures.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Self { median: median(figures), min, max, count: figures.len() }
    }
}

/// What can be said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    Better,
    Worse,
    NotShown,
    /// With so few rounds no difference, however large, would be beyond chance.
    TooFew,
}

/// Compares every metric that both runs have, in the order of the first.
pub(crate) fn compare(first: &[Row], second: &[Row]) -> Vec<Comparison> {
    let mut done: Vec<(&str, &str)> = Vec::new();
    let mut comparisons = Vec::new();
    for row in first {
        let name = (row.case.as_str(), row.metric.as_str());
        if done.contains(&name) {
            continue;
        }
        done.push(name);
        let of = |rows: &[Row]| -> Vec<Row> {
            rows.iter().filter(|other| other.case == row.case && other.metric == row.metric).cloned().collect()
        };
        let (a, b) = (of(first), of(second));
        if !b.is_empty() {
            comparisons.push(Comparison::of(row, [&a, &b]));
        }
    }
    comparisons
}

impl Comparison {
    fn of(row: &Row, sides: [&[Row]; 2]) -> Self {
        let is_ratio = sides.iter().all(|rows| rows.iter().all(|row| row.ratio.is_some()));
        let figure = |row: &Row| if is_ratio { row.ratio.unwrap_or(f64::NAN) } else { row.value };
        let [a, b] = sides.map(|rows| rows.iter().map(figure).take(FIGURES_MAX / 2).collect::<Vec<f64>>());
        let chance = mann_whitney(&a, &b);
        let least = 2.0 / choose(a.len() + b.len(), a.len());
        let is_more = median(&b) > median(&a);
        let verdict = match chance {
            _ if least > CHANCE_MAX => Verdict::TooFew,
            chance if chance > CHANCE_MAX => Verdict::NotShown,
            _ if is_more == more_is_better(&row.unit) => Verdict::Better,
            _ => Verdict::Worse,
        };
        let (case, metric, unit) = (row.case.clone(), row.metric.clone(), row.unit.clone());
        Self { case, metric, unit, is_ratio, sides: [Spread::of(&a), Spread::of(&b)], chance, verdict }
    }
}

/// Throughput is good, everything else is a cost.
pub(crate) fn more_is_better(unit: &str) -> bool {
    unit.ends_with("B/s")
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b] = self.sides;
        let what = if self.is_ratio { "× plain" } else { &self.unit };
        let verdict = match self.verdict {
            Verdict::Better => "B is better",
            Verdict::Worse => "B is worse",
            Verdict::NotShown => "no difference shown",
            Verdict::TooFew => "too few rounds to tell",
        };
        write!(f, "{} {}: A {a} {what}, B {b} {what}: {verdict} (p {:.3})", self.case, self.metric, self.chance)
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { median, min, max, count } = self;
        write!(f, "{median:.3} [{min:.3} to {max:.3}, n {count}]")
    }
}

/// Mann and Whitney's U test: how often two samples of one population differ by their ranks as much as these or more,
/// either way. Exact, by counting all ways to share the ranks out; equal figures share the mean of their ranks.
fn mann_whitney(a: &[f64], b: &[f64]) -> f64 {
    let ranks = doubled_ranks(&[a, b].concat());
    let sum: usize = ranks[..a.len()].iter().sum();
    let total: usize = ranks.iter().sum();
    // ways[k][s]: in how many ways k of the ranks add up to s.
    let mut ways = vec![vec![0.0; total + 1]; a.len() + 1];
    ways[0][0] = 1.0;
    for (index, rank) in ranks.iter().enumerate() {
        for taken in (1..=a.len().min(index + 1)).rev() {
            for reached in (*rank..=total).rev() {
                ways[taken][reached] += ways[taken - 1][reached - rank];
            }
        }
    }
    // The mean of all sums is total * a / (a + b): compared without dividing.
    let count = a.len() + b.len();
    let distance = |sum: usize| (sum * count).abs_diff(total * a.len());
    let (mut far, mut all) = (0.0, 0.0);
    for (reached, ways) in ways[a.len()].iter().enumerate() {
        all += ways;
        if distance(reached) >= distance(sum) {
            far += ways;
        }
    }
    far / all
}

/// Twice the rank of each figure, so that shared ranks are whole.
fn doubled_ranks(figures: &[f64]) -> Vec<usize> {
    let rank = |figure: &f64| {
        let below = figures.iter().filter(|other| other.total_cmp(figure).is_lt()).count();
        let same = figures.iter().filter(|other| other.total_cmp(figure).is_eq()).count();
        2 * below + same + 1
    };
    figures.iter().map(rank).collect()
}

/// In how many ways some can be taken out of so many.
fn choose(out_of: usize, taken: usize) -> f64 {
    let number = |count: usize| f64::from(u32::try_from(count).expect("few figures"));
    (1..=taken).map(|step| number(out_of - taken + step) / number(step)).product()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rows(metric: &str, unit: &str, pairs: &[[f64; 2]]) -> Vec<Row> {
        (0..).zip(pairs).map(|(round, pair)| Row::new("test", metric, round, unit, *pair)).collect()
    }

    fn close(figure: f64, known: f64) {
        assert!((figure - known).abs() < 1e-9, "{figure} is not {known}");
    }

    // Without ties a chance is a count of ways out of choose(n, k).
    #[test]
    fn chances_without_ties_are_those_of_the_tables() {
        close(mann_whitney(&[1.0, 2.0, 3.0], &[4.0, 5.0, 6.0]), 2.0 / 20.0);
        close(mann_whitney(&[1.0, 2.0, 3.0, 4.0, 5.0], &[6.0, 7.0, 8.0, 9.0, 10.0]), 2.0 / 252.0);
        close(mann_whitney(&[1.0, 3.0, 5.0], &[2.0, 4.0, 6.0]), 14.0 / 20.0);
        // Critical value of U for two samples of five at 0.05: 2.
        assert!(mann_whitney(&[1.0, 2.0, 3.0, 4.0, 7.0], &[5.0, 6.0, 8.0, 9.0, 10.0]) < 0.05);
        assert!(mann_whitney(&[1.0, 2.0, 3.0, 4.0, 8.0], &[5.0, 6.0, 7.0, 9.0, 10.0]) > 0.05);
    }

    #[test]
    fn equal_samples_differ_by_chance_alone() {
        close(mann_whitney(&[1.0; 4], &[1.0; 4]), 1.0);
        close(mann_whitney(&[1.0, 1.0, 2.0], &[1.0, 2.0, 2.0]), 1.0);
    }

    #[test]
    fn clear_difference_in_ratio_is_called_by_its_direction() {
        let pairs = |ratio: f64| [1.0, 2.0, 3.0, 4.0, 5.0].map(|plain| [ratio * plain + plain / 1000.0, plain]);
        let (slow, fast) = (rows("speed", "GB/s", &pairs(0.9)), rows("speed", "GB/s", &pairs(1.0)));
        let said = compare(&slow, &fast)[0].to_string();
        assert!(said.contains("B is better (p 0.008)"), "{said}");
        assert!(compare(&fast, &slow)[0].to_string().contains("B is worse"));
        let (dear, cheap) = (rows("cpu", "s/GiB", &pairs(1.0)), rows("cpu", "s/GiB", &pairs(0.9)));
        assert!(compare(&dear, &cheap)[0].to_string().contains("B is better"));
    }

    #[test]
    fn three_rounds_are_too_few_and_missing_metrics_are_left_out() {
        let (a, b) = (rows("x", "s", &[[1.0, 0.0]; 3]), rows("x", "s", &[[9.0, 0.0]; 3]));
        assert!(compare(&a, &b)[0].to_string().contains("too few rounds"));
        assert_eq!(compare(&a, &rows("y", "s", &[[1.0, 1.0]])), []);
    }

    proptest! {
        #[test]
        fn chance_is_one_at_most_and_the_same_both_ways(
            a in proptest::collection::vec(0u8..9, 1..8), b in proptest::collection::vec(0u8..9, 1..8),
        ) {
            let [a, b] = [a, b].map(|side| side.into_iter().map(f64::from).collect::<Vec<_>>());
            let (there, back) = (mann_whitney(&a, &b), mann_whitney(&b, &a));
            prop_assert!(there > 0.0 && there <= 1.0 + 1e-12);
            prop_assert!((there - back).abs() < 1e-9);
        }
    }
}
