//! `cargo xtask tidy`: the rules of the house that a command can check and neither rustc nor clippy does.
//!
//! In:    every file git tracks, as it is in the work tree, and the messages of the commits up to HEAD
//! Out:   one line a finding, `path:line: what (limit)`; an error if there is one
//! Trust: our own code
//!
//! | check | looks at |
//! |---|---|
//! | [`length`] | lines of files and functions |
//! | [`unsafety`] | where `unsafe` may be, and whether it says why |
//! | [`naming`] | functions, modules, tests |
//! | [`text`] | contracts, unfinished work, prints |
//! | [`hot`] | what functions that call themselves hot must not do |
//! | [`layers`] | which room may use which; circles of files |
//! | [`items`] | repeated type names, what nothing uses, errors that are text |
//! | [`words`] | retired words, empty doc comments |
//! | [`place`] | the top level, and the names of machines and mirrors |
//! | [`commit`] | messages |

mod commit;
mod hot;
mod items;
mod layers;
mod length;
mod naming;
mod place;
mod rust;
mod text;
mod tree;
mod unsafety;
mod words;

use std::fmt;

use anyhow::{Result, bail};

use tree::Tree;

/// One rule broken at one place.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Finding {
    path: String,
    line: usize,
    what: String,
}

impl Finding {
    fn new(path: &str, line: usize, what: impl Into<String>) -> Self {
        Self { path: path.into(), line, what: what.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path, self.line, self.what)
    }
}

type Check = fn(&Tree) -> Vec<Finding>;

/// Every check of files.
const CHECKS: [Check; 23] = [
    tree::unreadable,
    length::files,
    length::functions,
    length::spread,
    unsafety::places,
    unsafety::comments,
    naming::functions,
    naming::modules,
    naming::tests,
    text::contracts,
    text::unfinished,
    text::prints,
    hot::functions,
    layers::rooms,
    layers::circles,
    layers::document,
    place::all,
    items::unused,
    items::unnamed_files,
    items::repeated_types,
    items::text_errors,
    words::retired,
    words::empty_docs,
];

/// What to do.
#[derive(clap::Args, Clone, Copy, Debug, Default)]
pub struct Arguments {
    /// Only print the table of layers, as docs/architecture.md has it
    #[arg(long)]
    layers: bool,
}

/// Checks this work tree.
///
/// # Errors
/// When a rule is broken, or git cannot be asked.
pub fn run(arguments: Arguments) -> Result<()> {
    if arguments.layers {
        print!("{}", layers::table());
        return Ok(());
    }
    let tree = Tree::tracked()?;
    let commits = commit::log()?;
    let mut findings: Vec<Finding> = CHECKS.iter().flat_map(|check| check(&tree)).collect();
    findings.extend(commits.iter().flat_map(commit::check));
    findings.sort();
    findings.dedup();
    findings.iter().for_each(|finding| println!("{finding}"));
    let (files, functions, p95) = (tree.files.len(), length::count(&tree), length::p95(&tree));
    println!("tidy: {files} files, {functions} functions (p95 {p95} lines), {} commits", commits.len());
    match findings.len() {
        0 => Ok(()),
        1 => bail!("tidy: one finding"),
        count => bail!("tidy: {count} findings"),
    }
}

/// A tree of one file, for the tests of checks: what a check finds in it.
#[cfg(test)]
fn found(check: Check, path: &str, text: &str) -> Vec<String> {
    check(&Tree::of(&[(path, text)])).iter().map(ToString::to_string).collect()
}
