//! Which file of the product uses which other: every path that starts at `crate`, `self`, `super` or a module declared in
//! the file, resolved to the file that it leads to.

use std::collections::{BTreeMap, BTreeSet};

use super::super::{
    rust::{Rust, Word},
    tree::Tree,
};

const PRODUCT: &str = "vtrace-dp/src/";

/// One path in one file, resolved. Files stand as module paths: `["drain", "ring", "worker"]`; the root is `[]`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Use {
    pub(super) from: Vec<String>,
    pub(super) to: Vec<String>,
    pub(super) line: usize,
}

/// The product's files and what they use outside tests.
#[derive(Debug)]
pub(super) struct Crate {
    /// Path of a file, and its uses.
    uses: Vec<(String, Vec<Use>)>,
    files: Vec<(String, Vec<String>)>,
}

/// A path as it is written, its groups expanded.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Written {
    segments: Vec<String>,
    line: usize,
    is_passed_on: bool,
}

impl Crate {
    pub(super) fn of(tree: &Tree) -> Self {
        let parsed: Vec<(&str, Vec<String>, &Rust)> = tree
            .rust()
            .filter(|(_, rust)| !rust.is_all_test())
            .filter_map(|(file, rust)| Some((file.path.as_str(), module_of(&file.path)?, rust)))
            .collect();
        let modules: BTreeSet<Vec<String>> = parsed.iter().map(|(_, module, _)| module.clone()).collect();
        let mut passed_on: BTreeMap<Vec<String>, Vec<String>> = BTreeMap::new();
        let mut all = Vec::new();
        for (file, module, rust) in &parsed {
            let paths: Vec<(Vec<String>, usize)> = written(rust)
                .into_iter()
                .filter_map(|path| {
                    let absolute = absolute(module, &path.segments)?;
                    if let (true, Some(name)) = (path.is_passed_on, absolute.last()) {
                        passed_on.insert([&module[..], std::slice::from_ref(name)].concat(), absolute.clone());
                    }
                    Some((absolute, path.line))
                })
                .collect();
            all.push(((*file).to_owned(), module.clone(), paths));
        }
        let resolve = |path: &[String]| target(path, &modules, &passed_on);
        let uses = all.into_iter().map(|(file, from, paths)| {
            let uses = paths.into_iter().map(|(path, line)| Use { from: from.clone(), to: resolve(&path), line });
            (file, uses.filter(|used| used.to != used.from).collect())
        });
        let uses = uses.collect();
        Self { uses, files: parsed.into_iter().map(|(file, module, _)| (file.to_owned(), module)).collect() }
    }

    /// Path of the file, and what it uses.
    pub(super) fn uses(&self) -> impl Iterator<Item = (&str, &Use)> {
        self.uses.iter().flat_map(|(file, uses)| uses.iter().map(move |used| (file.as_str(), used)))
    }

    /// Paths of all files, and the modules they are.
    pub(super) fn files(&self) -> impl Iterator<Item = (&str, &[String])> {
        self.files.iter().map(|(file, module)| (file.as_str(), module.as_slice()))
    }
}

/// `["drain", "ring"]` of `vtrace-dp/src/drain/ring.rs` and of `…/drain/ring/mod.rs`.
fn module_of(path: &str) -> Option<Vec<String>> {
    let inside = path.strip_prefix(PRODUCT)?.strip_suffix(".rs")?;
    let mut module: Vec<String> = inside.split('/').map(str::to_owned).collect();
    if matches!(module.last().map(String::as_str), Some("mod" | "lib" | "main")) {
        module.pop();
    }
    Some(module)
}

/// The path from the crate's root; `None` for one that leaves it.
fn absolute(module: &[String], segments: &[String]) -> Option<Vec<String>> {
    let mut base = module.to_vec();
    let mut rest = segments;
    while let Some((first, after)) = rest.split_first() {
        match first.as_str() {
            "crate" => base.clear(),
            "self" => {}
            "super" => drop(base.pop()?),
            _ => break,
        }
        rest = after;
    }
    base.extend(rest.iter().cloned());
    Some(base)
}

/// The file that a path leads to: its longest part that is a file, through what files on the way pass on.
fn target(
    path: &[String],
    modules: &BTreeSet<Vec<String>>,
    passed_on: &BTreeMap<Vec<String>, Vec<String>>,
) -> Vec<String> {
    let mut path = path.to_vec();
    // A chain of `pub use` is as long as the tree is deep at most.
    for _ in 0..8 {
        let known = (0..=path.len()).rev().find(|&length| modules.contains(&path[..length])).unwrap_or(0);
        let item = &path[..path.len().min(known + 1)];
        match passed_on.get(item) {
            Some(origin) if origin != item => path = [&origin[..], &path[item.len()..]].concat(),
            _ => return path[..known].to_vec(),
        }
    }
    path.truncate(1);
    path
}

/// The paths of a file outside its tests.
fn written(rust: &Rust) -> Vec<Written> {
    let words = &rust.words;
    let word = |at: usize| words.get(at).map_or("", |word| word.text.as_str());
    let is_module = |name: &str| rust.modules.iter().any(|module| module.name == name && !module.test);
    let mut paths = Vec::new();
    for at in 0..words.len() {
        let before = at.checked_sub(1).map_or("", word);
        let starts = matches!(word(at), "crate" | "self" | "super") || is_module(word(at));
        let is_inside = matches!(before, "::" | "$" | "." | "mod") || (before == "{" && in_group(words, at));
        if !starts || is_inside || word(at + 1) != "::" || rust.is_test(words[at].line) {
            continue;
        }
        let is_passed_on = before == "use" && is_public(words, at - 1);
        expand(words, at, &mut Vec::new(), &mut |segments, line| {
            paths.push(Written { segments: segments.to_vec(), line, is_passed_on });
        });
    }
    paths
}

/// Whether the brace before this word opens a group of a `use`.
fn in_group(words: &[Word], at: usize) -> bool {
    at >= 2 && words[at - 2].text == "::"
}

/// Whether `pub`, or `pub(…)`, stands before the `use` at this place.
fn is_public(words: &[Word], at: usize) -> bool {
    at.checked_sub(1).is_some_and(|before| matches!(words[before].text.as_str(), "pub" | ")"))
}

/// Calls `found` with each path that starts here; gives the place after it.
fn expand(words: &[Word], mut at: usize, prefix: &mut Vec<String>, found: &mut impl FnMut(&[String], usize)) -> usize {
    let depth = prefix.len();
    let line = words.get(at).map_or(0, |word| word.line);
    loop {
        match words.get(at).map(|word| word.text.as_str()) {
            Some("{") => {
                at += 1;
                while let Some(word) = words.get(at) {
                    match word.text.as_str() {
                        "}" => break,
                        "," => at += 1,
                        _ => at = expand(words, at, prefix, found).max(at + 1),
                    }
                }
                prefix.truncate(depth);
                return at + 1;
            }
            Some(name) if name.starts_with(|letter: char| letter.is_alphanumeric() || "_*".contains(letter)) => {
                // `self` in a group is the group's own module.
                if depth == 0 || name != "self" || prefix.len() > depth {
                    prefix.push(name.to_owned());
                }
                at += 1;
            }
            _ => break,
        }
        if words.get(at).is_none_or(|word| word.text != "::") {
            break;
        }
        at += 1;
    }
    found(prefix, line);
    prefix.truncate(depth);
    // `as NAME` belongs to the path.
    if words.get(at).is_some_and(|word| word.text == "as") { at + 2 } else { at }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(files: &[(&str, &str)]) -> Vec<String> {
        let files: Vec<(String, &str)> = files.iter().map(|(path, text)| (format!("{PRODUCT}{path}"), *text)).collect();
        let files: Vec<(&str, &str)> = files.iter().map(|(path, text)| (path.as_str(), *text)).collect();
        let product = Crate::of(&Tree::of(&files));
        product.uses().map(|(_, used)| format!("{} {}", used.line, used.to.join("/"))).collect()
    }

    #[test]
    fn relative_paths_lead_to_their_files() {
        let text = "use super::super::sys;\nuse super::lane::Lane;\nfn a() { super::super::super::clock::b() }\n";
        let files =
            [("drain/ring/worker.rs", text), ("drain/ring/lane.rs", ""), ("drain/sys.rs", ""), ("clock.rs", "")];
        assert_eq!(used(&files), ["1 drain/sys", "2 drain/ring/lane", "3 clock"]);
    }

    #[test]
    fn groups_are_expanded_with_the_line_of_each_part() {
        let text = "use crate::{\n    clock::{self, table::Table},\n    sys as s,\n};\n";
        let files = [("drain.rs", text), ("clock.rs", ""), ("clock/table.rs", ""), ("sys.rs", "")];
        assert_eq!(used(&files), ["2 clock", "2 clock/table", "3 sys"]);
    }

    #[test]
    fn item_that_is_passed_on_is_used_from_its_own_file() {
        let files = [
            ("drain/mod.rs", "mod lane;\npub use lane::Lane;\n"),
            ("drain/lane.rs", ""),
            ("server.rs", "use crate::drain::Lane;\n"),
        ];
        assert_eq!(used(&files), ["2 drain/lane", "1 drain/lane"]);
    }

    #[test]
    fn tests_and_macros_of_other_crates_use_nothing() {
        let text = "#[cfg(test)]\nmod tests {\n    use crate::clock;\n}\nfn a() { b!($crate::clock) }\n";
        assert!(used(&[("drain.rs", text), ("clock.rs", "")]).is_empty());
    }
}
