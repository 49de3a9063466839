//! `cargo run --release -p vtrace-bench -- run CASE [--json FILE]`: measured ratios, each against the plain way in the
//! same run; `compare A B`, `plot RUN.json… --out DIR`.
//!
//! In:    a case, or all; runs made before
//! Out:   a line for each figure on stdout; with `--json` a row for each, with command, machine and commit; pictures
//! Runs:  on a machine that does nothing else, or its ratios say little and its absolute figures nothing; it says so
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "its figures are its output")]

mod cases;
mod compare;
mod in_guest;
mod measure;
mod place;
mod plot;
mod rig;
mod row;
mod surroundings;
mod target;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use cases::{CASES, Case};
use clap::{
    Parser, Subcommand,
    builder::{PossibleValue, PossibleValuesParser},
};
use row::Row;

/// Rounds there can be: what `compare` tests.
const ROUNDS_MAX: i64 = 30;

#[derive(Parser)]
#[command(name = "vtrace-bench", about = "Measured ratios against the plain way, in one run")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Measure
    Run {
        /// Which stage, or all of them
        #[arg(value_parser = case_names())]
        case: String,
        /// Rounds; each is a pair, and five are the fewest that `compare` can say anything about
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=ROUNDS_MAX))]
        rounds: u32,
        /// Write the rows there
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Write rows and picture of each case into this folder: CASE.json, CASE.svg
        #[arg(long, value_name = "DIR")]
        json_dir: Option<PathBuf>,
    },
    /// Say what differs between two runs, and whether it is more than chance
    Compare {
        /// Rows of the first: a file, or a folder of them
        a: PathBuf,
        /// Rows of the second
        b: PathBuf,
    },
    /// Draw runs, a picture for each case
    Plot {
        /// Files of rows, or folders of them
        #[arg(required = true, value_name = "RUN")]
        runs: Vec<PathBuf>,
        /// Where CASE.svg go
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// What the case `guest` starts in its guest
    #[command(hide = true)]
    InGuest {
        #[command(subcommand)]
        word: in_guest::Word,
    },
}

fn case_names() -> PossibleValuesParser {
    let all = PossibleValue::new("all").help("every case, one after the other");
    CASES.iter().map(|case| PossibleValue::new(case.name).help(case.about)).chain([all]).collect::<Vec<_>>().into()
}

fn main() -> Result<()> {
    match Arguments::parse().verb {
        Verb::Run { case, rounds, json, json_dir } => run(&case, rounds, json.as_deref(), json_dir.as_deref()),
        Verb::Compare { a, b } => {
            compare::compare(&load(&a)?, &load(&b)?).iter().for_each(|line| println!("{line}"));
            Ok(())
        }
        Verb::Plot { runs, out } => {
            let rows = runs.iter().map(|run| load(run)).collect::<Result<Vec<_>>>()?.concat();
            draw(&rows, &out)
        }
        Verb::InGuest { word } => {
            if let Some(sent) = in_guest::obey(&word)? {
                println!("{}", serde_json::to_string(&sent)?);
            }
            Ok(())
        }
    }
}

fn run(name: &str, rounds: u32, json: Option<&Path>, folder: Option<&Path>) -> Result<()> {
    surroundings::doubts().iter().for_each(|doubt| eprintln!("doubtful: {doubt}"));
    let (mut all, mut failed) = (Vec::new(), Vec::new());
    for case in CASES.iter().filter(|case| name == "all" || case.name == name) {
        // What the others find is still worth having.
        match run_case(case, rounds, folder) {
            Ok(rows) => all.extend(rows),
            Err(error) => {
                eprintln!("{}: {error:#}", case.name);
                failed.push(case.name);
            }
        }
    }
    if let Some(path) = json {
        store(&all, path)?;
    }
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

fn run_case(case: &Case, rounds: u32, folder: Option<&Path>) -> Result<Vec<Row>> {
    let begun = Instant::now();
    let mut rows = (case.run)(rounds)?;
    for row in &mut rows {
        row.command = format!("cargo run --release -p vtrace-bench -- run {} --rounds {rounds}", case.name);
        println!("{row}");
    }
    if let Some(folder) = folder {
        fs::create_dir_all(folder)?;
        store(&rows, &folder.join(case.name).with_extension("json"))?;
        draw(&rows, folder)?;
    }
    eprintln!("{}: {:.0} s", case.name, begun.elapsed().as_secs_f64());
    Ok(rows)
}

fn store(rows: &[Row], path: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(rows)?;
    fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
}

/// Rows of a file, or of all files of a folder whose names end in `.json`.
fn load(path: &Path) -> Result<Vec<Row>> {
    if !path.is_dir() {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        return serde_json::from_str(&text).with_context(|| format!("{} holds no rows", path.display()));
    }
    let mut files: Vec<PathBuf> = fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "json"));
    files.sort();
    Ok(files.iter().map(|file| load(file)).collect::<Result<Vec<_>>>()?.concat())
}

fn draw(rows: &[Row], folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    let mut cases: Vec<&str> = rows.iter().map(|row| row.case.as_str()).collect();
    cases.dedup();
    for case in cases {
        let of: Vec<Row> = rows.iter().filter(|row| row.case == case).cloned().collect();
        if let Some(picture) = plot::picture(&of) {
            fs::write(folder.join(case).with_extension("svg"), picture)?;
        }
    }
    Ok(())
}
