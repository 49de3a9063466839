//! Lines of files and functions.

use super::{
    Finding,
    rust::Function,
    tree::{File, Tree},
};

const FILE_LINES_MAX: usize = 600;
const FUNCTION_LINES_MAX: usize = 70;
/// Of all functions but those of tests.
const FUNCTION_LINES_P95_MAX: usize = 30;

/// Files that are too long.
pub(super) fn files(tree: &Tree) -> Vec<Finding> {
    let lengths = tree.rust().map(|(file, _)| (file, file.text.lines().count()));
    let long = lengths.filter(|(_, lines)| *lines > FILE_LINES_MAX);
    long.map(|(file, lines)| Finding::new(&file.path, 1, format!("{lines} lines (at most {FILE_LINES_MAX})"))).collect()
}

/// Functions that are too long.
pub(super) fn functions(tree: &Tree) -> Vec<Finding> {
    let all = tree.rust().flat_map(|(file, rust)| rust.functions.iter().map(move |function| (file, function)));
    let long = all.filter(|(_, function)| function.length() > FUNCTION_LINES_MAX);
    let finding = |(file, function): (&File, &Function)| {
        let what = format!("fn {}: {} lines (at most {FUNCTION_LINES_MAX})", function.name, function.length());
        Finding::new(&file.path, *function.lines.start(), what)
    };
    long.map(finding).collect()
}

/// The function that nineteen of twenty do not exceed, if that is too long.
pub(super) fn spread(tree: &Tree) -> Vec<Finding> {
    let rank = ranked(tree).filter(|(_, function)| function.length() > FUNCTION_LINES_P95_MAX);
    let finding = |(file, function): (&File, &Function)| {
        let (name, lines) = (&function.name, function.length());
        let what = format!("fn {name}: {lines} lines at the 95th percentile (at most {FUNCTION_LINES_P95_MAX})");
        Finding::new(&file.path, *function.lines.start(), what)
    };
    rank.map(finding).into_iter().collect()
}

/// Functions outside tests.
pub(super) fn count(tree: &Tree) -> usize {
    product(tree).count()
}

/// Lines that nineteen of twenty functions do not exceed.
pub(super) fn p95(tree: &Tree) -> usize {
    ranked(tree).map_or(0, |(_, function)| function.length())
}

fn product(tree: &Tree) -> impl Iterator<Item = (&File, &Function)> {
    tree.rust().flat_map(|(file, rust)| {
        let product = rust.functions.iter().filter(|function| !rust.is_test(*function.lines.start()));
        product.map(move |function| (file, function))
    })
}

fn ranked(tree: &Tree) -> Option<(&File, &Function)> {
    let mut all: Vec<_> = product(tree).collect();
    all.sort_by_key(|(_, function)| function.length());
    let rank = (all.len() * 95).div_ceil(100);
    all.into_iter().nth(rank.checked_sub(1)?)
}

#[cfg(test)]
mod tests {
    use super::{super::found, *};

    fn function(name: &str, lines: usize) -> String {
        format!("fn {name}() {{\n{}}}\n", "    step();\n".repeat(lines - 2))
    }

    #[test]
    fn file_of_600_lines_passes_and_of_601_does_not() {
        assert!(found(files, "xtask/src/x.rs", &"//\n".repeat(600)).is_empty());
        assert_eq!(found(files, "xtask/src/x.rs", &"//\n".repeat(601)), ["xtask/src/x.rs:1: 601 lines (at most 600)"]);
    }

    #[test]
    fn function_of_70_lines_passes_and_of_71_does_not() {
        let text = [function("fits", 70), function("bursts", 71)].concat();
        assert_eq!(found(functions, "a.rs", &text), ["a.rs:71: fn bursts: 71 lines (at most 70)"]);
    }

    #[test]
    fn one_long_function_of_twenty_is_borne_and_two_are_not() {
        let short: String = (0..19).map(|_| function("short", 3)).collect();
        let long = function("long", 31);
        assert!(found(spread, "a.rs", &[short.clone(), long.clone()].concat()).is_empty());
        let two = [short, long.clone(), long].concat();
        assert_eq!(found(spread, "a.rs", &two), ["a.rs:58: fn long: 31 lines at the 95th percentile (at most 30)"]);
    }

    #[test]
    fn long_tests_do_not_count_in_the_spread() {
        let tree = Tree::of(&[("tests/src/a.rs", &function("long", 60)), ("b.rs", &function("short", 3))]);
        assert_eq!((count(&tree), p95(&tree)), (1, 3));
    }
}
