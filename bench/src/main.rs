//! `cargo run --release -p vtrace-bench -- run CASE [--json FILE]`: measured ratios, each against the plain way in the
//! same run.
//!
//! In:    a case
//! Out:   a line for each round on stdout; with `--json` a row for each metric, with command, machine and commit
//! Runs:  on a machine that does nothing else, or its ratios say little and its absolute figures nothing
#![expect(clippy::print_stdout, reason = "its figures are its output")]

mod cases;
mod row;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};

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
        /// Which stage
        case: Case,
        /// Rounds; each is a pair
        #[arg(long, default_value_t = 5)]
        rounds: u32,
        /// Write the rows there
        #[arg(long)]
        json: Option<PathBuf>,
    },
}

/// A stage of a page's way.
#[derive(Clone, Copy, ValueEnum)]
enum Case {
    /// ring ─► lane ─► sink, a guest's driver in the same process, against vectored writes of the same bytes
    Drain,
}

fn main() -> Result<()> {
    let Verb::Run { case, rounds, json } = Arguments::parse().verb;
    let rows = match case {
        Case::Drain => cases::drain::run(rounds)?,
    };
    for row in &rows {
        println!("{row}");
    }
    if let Some(path) = json {
        let text = serde_json::to_string_pretty(&rows)?;
        std::fs::write(&path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
