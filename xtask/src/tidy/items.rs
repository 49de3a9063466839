//! Items of the product: repeated type names, items and files that nothing uses, errors that are text.

use std::collections::BTreeMap;

use super::{
    Finding,
    rust::{Item, Rust},
    tree::{File, Tree},
};

const PRODUCT: [&str; 3] = ["vtrace-dp/src/", "vtrace-common/src/", "vtrace-ebpf/src/"];
/// eBPF programs are called by the kernel, by the names of their sections.
const CALLED_BY_KERNEL: &str = "vtrace-ebpf/";
/// Types that may share a name.
const TYPES_OF_A_NAME_MAX: usize = 2;
/// Folders whose files are of use only if another file names them.
const NAMED_FOLDERS: [&str; 5] = ["docs/", "vtrace-dp/dist/", "xtask/", "tests/src/", "tests/tests/"];
/// Files that tools find by their name.
const KNOWN_FILES: [&str; 2] = ["Cargo.toml", "README.md"];

/// Types of the product that have their name in common with two others.
pub(super) fn repeated_types(tree: &Tree) -> Vec<Finding> {
    let mut types: BTreeMap<&str, Vec<(&File, &Item)>> = BTreeMap::new();
    for (file, item) in product(tree).filter(|(_, item)| item.is_type) {
        types.entry(&item.name).or_default().push((file, item));
    }
    types.retain(|_, places| places.len() > TYPES_OF_A_NAME_MAX);
    let finding = |(file, item): (&File, &Item), count: usize| {
        let what = format!("{count} types are called {} (at most {TYPES_OF_A_NAME_MAX})", item.name);
        Finding::new(&file.path, item.line, what)
    };
    types
        .into_values()
        .flat_map(|places| places.clone().into_iter().map(move |place| finding(place, places.len())))
        .collect()
}

/// Public items of the product that no code names but they themselves.
pub(super) fn unused(tree: &Tree) -> Vec<Finding> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, rust) in tree.rust() {
        for word in &rust.words {
            *counts.entry(&word.text).or_default() += 1;
        }
    }
    let public = product(tree).filter(|(file, item)| item.is_public && !file.path.starts_with(CALLED_BY_KERNEL));
    let unused = public.filter(|(_, item)| counts.get(item.name.as_str()) == Some(&1));
    unused.map(|(file, item)| Finding::new(&file.path, item.line, format!("{} is used nowhere", item.name))).collect()
}

/// Files that no other file declares as a module, or names.
pub(super) fn unnamed_files(tree: &Tree) -> Vec<Finding> {
    let strays = tree.files.iter().filter(|file| match &file.rust {
        Some(_) => PRODUCT.iter().any(|product| file.path.starts_with(product)) && !is_declared(file, tree),
        None => {
            let name = file.path.rsplit('/').next().unwrap_or_default();
            let is_meant = NAMED_FOLDERS.iter().any(|folder| file.path.starts_with(folder));
            let names = |other: &File| other.path != file.path && other.text.contains(name);
            is_meant && !file.path.ends_with(".rs") && !KNOWN_FILES.contains(&name) && !tree.files.iter().any(names)
        }
    });
    strays.map(|file| Finding::new(&file.path, 1, "no other file names this file")).collect()
}

fn is_declared(file: &File, tree: &Tree) -> bool {
    let is_root = ["lib.rs", "main.rs"].iter().any(|root| file.path.ends_with(&format!("/src/{root}")));
    is_root || file.path.contains("/src/bin/") || tree.files.iter().any(|other| other.modules_at().contains(&file.path))
}

/// `Result<_, String>` in the product.
pub(super) fn text_errors(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (file, rust) in tree.rust().filter(|(file, _)| is_product(file)) {
        let lines = text_results(rust).filter(|line| !rust.is_test(*line));
        findings.extend(lines.map(|line| Finding::new(&file.path, line, "Result<_, String> (an error is a type)")));
    }
    findings
}

/// Lines with a `Result` whose second argument is `String`.
fn text_results(rust: &Rust) -> impl Iterator<Item = usize> {
    let starts = rust.words.windows(2).enumerate();
    starts.filter_map(|(at, pair)| {
        let is_result = pair[0].text == "Result" && pair[1].text == "<";
        (is_result && second_argument_is_string(rust, at + 2)).then(|| pair[0].line)
    })
}

fn second_argument_is_string(rust: &Rust, start: usize) -> bool {
    let mut depth = 0_usize;
    for at in start..rust.words.len() {
        let word = |offset: usize| rust.words.get(at + offset).map_or("", |word| word.text.as_str());
        match word(0) {
            "<" | "(" | "[" => depth += 1,
            ">" if rust.words[at - 1].text == "-" => {}
            ">" | ")" | "]" => match depth.checked_sub(1) {
                Some(outer) => depth = outer,
                None => return false,
            },
            "," if depth == 0 => return word(1) == "String" && word(2) == ">",
            ";" | "{" => return false,
            _ => {}
        }
    }
    false
}

fn product(tree: &Tree) -> impl Iterator<Item = (&File, &Item)> {
    tree.rust().filter(|(file, _)| is_product(file)).flat_map(|(file, rust)| {
        rust.items.iter().filter(|item| !rust.is_test(item.line)).map(move |item| (file, item))
    })
}

fn is_product(file: &File) -> bool {
    PRODUCT.iter().any(|product| file.path.starts_with(product))
}

#[cfg(test)]
mod tests {
    use super::{super::found, *};

    fn of(check: fn(&Tree) -> Vec<Finding>, files: &[(&str, &str)]) -> Vec<String> {
        check(&Tree::of(files)).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn third_type_of_a_name_is_found_and_the_second_is_not() {
        let two = [("vtrace-dp/src/a.rs", "struct Lane;\n"), ("vtrace-dp/src/b.rs", "type Lane = u8;\n")];
        assert!(of(repeated_types, &two).is_empty());
        let three = [two[0], two[1], ("vtrace-common/src/c.rs", "\nenum Lane {}\n")];
        let findings = of(repeated_types, &three);
        assert_eq!(findings.len(), 3);
        assert!(findings.contains(&"vtrace-common/src/c.rs:2: 3 types are called Lane (at most 2)".to_owned()));
        let with_test = [two[0], two[1], ("vtrace-dp/src/c.rs", "#[cfg(test)]\nmod tests {\n    struct Lane;\n}\n")];
        assert!(of(repeated_types, &with_test).is_empty());
    }

    #[test]
    fn public_item_that_nothing_names_is_found() {
        let files = [
            (
                "vtrace-dp/src/a.rs",
                "pub struct Used;\npub struct Unused;\nimpl Used {\n    pub(crate) fn idle(&self) {}\n}\n",
            ),
            ("bench/src/b.rs", "fn a(_: Used) {}\n"),
        ];
        assert_eq!(
            of(unused, &files),
            ["vtrace-dp/src/a.rs:2: Unused is used nowhere", "vtrace-dp/src/a.rs:4: idle is used nowhere"]
        );
    }

    #[test]
    fn method_of_a_trait_is_called_by_others() {
        assert!(found(unused, "vtrace-dp/src/a.rs", "impl Display for B {\n    fn fmt(&self) {}\n}\n").is_empty());
    }

    #[test]
    fn file_that_nothing_declares_or_names_is_found() {
        let files = [
            ("vtrace-dp/src/lib.rs", "mod a;\n"),
            ("vtrace-dp/src/a.rs", ""),
            ("vtrace-dp/src/attic.rs", ""),
            ("docs/read.md", ""),
            ("docs/lost.md", ""),
            ("README.md", "see docs/read.md\n"),
        ];
        assert_eq!(
            of(unnamed_files, &files),
            [
                "vtrace-dp/src/attic.rs:1: no other file names this file",
                "docs/lost.md:1: no other file names this file"
            ]
        );
    }

    #[test]
    fn error_that_is_text_is_found_outside_tests() {
        let text = "fn a() -> Result<u8, String> {}\nfn b(_: fn() -> Result<Vec<(u8, String)>, E>) {}\n\
                    fn c(_: &dyn Fn(u8) -> Result<(), String>) {}\nfn d() -> Result<String> {}\n";
        let path = "vtrace-dp/src/a.rs";
        let what = "Result<_, String> (an error is a type)";
        assert_eq!(found(text_errors, path, text), [format!("{path}:1: {what}"), format!("{path}:3: {what}")]);
        assert!(found(text_errors, "xtask/src/a.rs", text).is_empty());
    }
}
