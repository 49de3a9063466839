//! A picture of a run: one for each case, a pair of bars for each metric.
//!
//! In:    rows of one case
//! Out:   SVG without scripts or fonts of its own; its colours follow the reader's light or dark surroundings
//! Runs:  at once

use svg::{
    Document,
    node::element::{Line, Rectangle, Style, Text},
};

use crate::{
    compare::{Spread, more_is_better},
    row::Row,
};

const WIDTH: f64 = 760.0;
const BARS_AT: f64 = 20.0;
const BARS_WIDTH: f64 = 520.0;
const TOP: f64 = 64.0;
const BLOCK: f64 = 92.0;
const BAR: f64 = 14.0;
/// Of the width of the bars, so that the longest has room for its figures.
const LONGEST: f64 = 0.92;

const STYLE: &str = "text{font:12px sans-serif;fill:#333}.title{font-size:16px;font-weight:bold}.note{fill:#777}\
                     .missed{fill:#b3402a}.ours{fill:#3b7dd8}.plain{fill:#9a9a9a}.spread{stroke:#333;stroke-width:1.5}\
                     @media(prefers-color-scheme:dark){text{fill:#ddd}.note{fill:#999}.missed{fill:#ee8866}\
                     .spread{stroke:#eee}}";

/// The picture of one case, as text of an SVG file; none without rows.
pub(crate) fn picture(rows: &[Row]) -> Option<String> {
    let first = rows.first()?;
    let mut metrics: Vec<&str> = Vec::new();
    for row in rows {
        if !metrics.contains(&row.metric.as_str()) {
            metrics.push(&row.metric);
        }
    }
    let blocks = f64::from(u32::try_from(metrics.len()).ok()?);
    let height = TOP + BLOCK * blocks + 10.0;
    let mut document = Document::new().set("viewBox", (0, 0, WIDTH, height)).set("width", WIDTH).set("height", height);
    document = document.add(Style::new(STYLE));
    document = document.add(text(BARS_AT, 24.0, "title", format!("{}: ours beside the plain way", first.case)));
    let machine =
        format!("{}, {}, commit {}; bars: medians, lines: lowest to highest", first.cpu, first.uname, first.commit);
    document = document.add(text(BARS_AT, 44.0, "note", machine));
    let mut top = TOP;
    for metric in metrics {
        let of: Vec<&Row> = rows.iter().filter(|row| row.metric == metric).collect();
        document = block(document, top, &of);
        top += BLOCK;
    }
    Some(document.to_string() + "\n")
}

/// A metric: a heading, two bars on a scale of their own, what follows from them.
fn block(mut document: Document, top: f64, rows: &[&Row]) -> Document {
    let Some(row) = rows.first() else { return document };
    let figures = |of: fn(&Row) -> f64| Spread::of(&rows.iter().map(|row| of(row)).collect::<Vec<_>>());
    let (ours, plain) = (figures(|row| row.value), figures(|row| row.baseline));
    let longest = ours.max.max(plain.max);
    let scale = if longest > 0.0 { BARS_WIDTH * LONGEST / longest } else { 0.0 };
    let sense = if more_is_better(&row.unit) { "more is better" } else { "less is better" };
    document = document.add(text(BARS_AT, top + 12.0, "", format!("{}, {} ({sense})", row.metric, row.unit)));
    for (index, (class, name, spread)) in
        (0u32..).zip([("ours", "ours", ours), ("plain", row.baseline_name.as_str(), plain)])
    {
        let at = top + 20.0 + f64::from(index) * (BAR + 6.0);
        document = bar(document, at, class, scale, spread);
        document =
            document.add(text(BARS_AT + BARS_WIDTH + 8.0, at + 11.0, "", format!("{:.3} {name}", spread.median)));
    }
    let ratios: Vec<f64> = rows.iter().filter_map(|row| row.ratio).collect();
    let (class, said) = conclusion(rows, &ratios);
    document.add(text(BARS_AT, top + 72.0, class, said))
}

fn conclusion(rows: &[&Row], ratios: &[f64]) -> (&'static str, String) {
    let ratio = if ratios.is_empty() { String::new() } else { format!("ratio {:.2}", Spread::of(ratios).median) };
    let Some(target) = rows.iter().find_map(|row| row.target.as_ref()) else { return ("note", ratio) };
    let met = rows.iter().filter(|row| row.met == Some(true)).count();
    let class = if 2 * met > rows.len() { "note" } else { "missed" };
    (class, format!("{ratio}; asked: {target}, met in {met} of {} rounds", rows.len()))
}

fn bar(document: Document, at: f64, class: &str, scale: f64, spread: Spread) -> Document {
    let place = |figure: f64| BARS_AT + figure * scale;
    let bar = Rectangle::new().set("x", BARS_AT).set("y", at).set("width", (spread.median * scale).max(0.5));
    let middle = at + BAR / 2.0;
    let line =
        Line::new().set("x1", place(spread.min)).set("x2", place(spread.max)).set("y1", middle).set("y2", middle);
    document.add(bar.set("height", BAR).set("class", class)).add(line.set("class", "spread"))
}

fn text(x: f64, y: f64, class: &str, words: String) -> Text {
    Text::new(words).set("x", x).set("y", y).set("class", class)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn picture_names_every_metric_its_unit_and_its_plain_way() {
        let row =
            |metric: &str, round| Row::new("sink", metric, round, "GB/s", [2.0, 4.0]).beside("pwritev <raw> & co");
        let rows: Vec<Row> = (0..3).flat_map(|round| [row("speed", round), row("throughput, direct", round)]).collect();
        let picture = picture(&rows).unwrap();
        for words in ["sink: ours", "speed, GB/s", "more is better", "4.000 pwritev &lt;raw&gt; &amp; co", "ratio 0.50"]
        {
            assert!(picture.contains(words), "{words} is not in {picture}");
        }
        assert!(picture.contains("asked: ratio ≥ 0.95, met in 0 of 3 rounds"));
        assert!(!picture.contains("<script") && !picture.contains("NaN"));
    }

    #[test]
    fn figures_of_zero_have_a_picture_and_no_rows_have_none() {
        let rows = [Row::new("idle", "wake-ups", 0, "1/s", [0.0, 0.0])];
        assert!(!picture(&rows).unwrap().contains("NaN"));
        assert_eq!(picture(&[]), None);
    }
}
