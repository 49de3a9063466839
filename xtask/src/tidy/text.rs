//! What a file says: its contract, unfinished work, prints.

use super::{
    Finding,
    rust::Rust,
    tree::{File, Tree},
};

/// Words of comments that promise work for another day.
const MARKS: [&str; 3] = ["TODO", "FIXME", "XXX"];
/// Macros that stand in for code, or are left over from looking for a mistake.
const STAND_INS: [&str; 3] = ["todo", "unimplemented", "dbg"];
const PRINTS: [&str; 4] = ["print", "println", "eprint", "eprintln"];
/// The one room of the product that talks to the terminal.
const SPEAKER: &str = "vtrace-dp/src/cli/";

/// Files that do not start with their contract.
pub(super) fn contracts(tree: &Tree) -> Vec<Finding> {
    let first = |file: &File| {
        file.text.lines().find(|line| !line.trim().is_empty() && !line.starts_with("#!/")).map(str::to_owned)
    };
    let silent = tree.rust().filter(|(file, _)| !first(file).is_some_and(|line| line.starts_with("//!")));
    silent.map(|(file, _)| Finding::new(&file.path, 1, "no contract (a file starts with `//!`)")).collect()
}

/// Work that was left for another day. Strings of Rust code are not looked at.
pub(super) fn unfinished(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in &tree.files {
        let bare: Vec<&str> = match &file.rust {
            Some(rust) => rust.bare.iter().map(String::as_str).collect(),
            None => file.text.lines().collect(),
        };
        for (line, text) in (1..).zip(bare) {
            let marks = MARKS.iter().filter(|mark| has_word(text, mark));
            findings.extend(
                marks.map(|mark| Finding::new(&file.path, line, format!("{mark} (do it, or make it an issue)"))),
            );
        }
        if let Some(rust) = &file.rust {
            findings.extend(macros(file, rust, &STAND_INS, "(real, or not there)"));
        }
    }
    findings
}

/// Prints outside the rooms that talk to a person.
pub(super) fn prints(tree: &Tree) -> Vec<Finding> {
    let silent = |path: &str| path.starts_with("vtrace-") && path.contains("/src/") && !path.starts_with(SPEAKER);
    let files = tree.rust().filter(|(file, _)| silent(&file.path));
    let found = |(file, rust): (_, _)| macros(file, rust, &PRINTS, "(only cli/ talks to the terminal)");
    files.flat_map(found).filter(|finding| !is_test(tree, finding)).collect()
}

fn is_test(tree: &Tree, finding: &Finding) -> bool {
    tree.rust().any(|(file, rust)| file.path == finding.path && rust.is_test(finding.line))
}

fn macros(file: &File, rust: &Rust, names: &[&str], why: &str) -> Vec<Finding> {
    let calls = names.iter().flat_map(|name| {
        let lines: Vec<usize> = rust.places(1..=usize::MAX, &[name, "!"]).collect();
        lines.into_iter().map(move |line| Finding::new(&file.path, line, format!("{name}! {why}")))
    });
    calls.collect()
}

fn has_word(text: &str, word: &str) -> bool {
    text.split(|letter: char| !letter.is_alphanumeric() && letter != '_').any(|part| part == word)
}

#[cfg(test)]
mod tests {
    use super::{super::found, *};

    #[test]
    fn file_without_a_contract_is_found() {
        assert_eq!(found(contracts, "a.rs", "\nuse b;\n"), ["a.rs:1: no contract (a file starts with `//!`)"]);
        assert!(found(contracts, "a.rs", "//! Says what it is.\n").is_empty());
        assert!(found(contracts, "README.md", "vtrace\n").is_empty());
    }

    #[test]
    fn work_for_another_day_is_found_in_comments_and_documents() {
        assert_eq!(found(unfinished, "a.rs", "fn a() {} // TODO: b\n"), ["a.rs:1: TODO (do it, or make it an issue)"]);
        assert_eq!(found(unfinished, "docs/a.md", "FIXME\n").len(), 1);
        assert!(found(unfinished, "a.rs", "const A: &str = \"TODO\"; // mkstemp of XXXXXX\n").is_empty());
    }

    #[test]
    fn stand_ins_for_code_are_found() {
        let text = "fn a() {\n    unimplemented!()\n}\nfn b() {\n    c(dbg!(1));\n}\n";
        assert_eq!(
            found(unfinished, "a.rs", text),
            ["a.rs:2: unimplemented! (real, or not there)", "a.rs:5: dbg! (real, or not there)"]
        );
    }

    #[test]
    fn product_prints_only_in_cli() {
        let text = "fn a() { println!(\"b\"); }\n#[cfg(test)]\nmod tests {\n    fn c() { eprintln!(); }\n}\n";
        let path = "vtrace-dp/src/drain/mod.rs";
        assert_eq!(found(prints, path, text), [format!("{path}:1: println! (only cli/ talks to the terminal)")]);
        assert!(found(prints, "vtrace-dp/src/cli/status.rs", text).is_empty());
        assert!(found(prints, "xtask/src/main.rs", text).is_empty());
        assert!(found(prints, "vtrace-dp/build.rs", text).is_empty());
    }
}
