//! Names of functions, modules and tests.

use super::{
    Finding,
    rust::Function,
    tree::{File, Tree},
};

/// Verbs that say nothing.
const VERBS: [&str; 3] = ["get_", "do_", "handle_"];
/// Rooms where everything could be.
const ROOMS: [&str; 6] = ["common", "helper", "helpers", "misc", "util", "utils"];
/// The fewest words that can claim something.
const CLAIM_WORDS_MIN: usize = 3;

/// Functions whose verb says nothing. A trait's methods are named by the trait.
pub(super) fn functions(tree: &Tree) -> Vec<Finding> {
    let empty = |function: &&Function| VERBS.iter().any(|verb| function.name.starts_with(verb));
    let own = |function: &&Function| !function.named_elsewhere;
    let what = |function: &Function| format!("fn {} (no {})", function.name, VERBS.join(", no "));
    each(tree, |function| own(&function) && empty(&function), what)
}

/// Tests whose name is no claim.
pub(super) fn tests(tree: &Tree) -> Vec<Finding> {
    let short = |function: &Function| function.claim && function.name.split('_').count() < CLAIM_WORDS_MIN;
    let what =
        |function: &Function| format!("test {}: a name is a claim (at least {CLAIM_WORDS_MIN} words)", function.name);
    each(tree, short, what)
}

/// Modules whose name says nothing.
pub(super) fn modules(tree: &Tree) -> Vec<Finding> {
    let is_empty = |name: &str| ROOMS.contains(&name);
    let by_file = |file: &&File| file.path.split('/').any(|part| is_empty(part.trim_end_matches(".rs")));
    let files = tree.files.iter().filter(by_file).map(|file| Finding::new(&file.path, 1, "a room for everything"));
    let inline = tree.rust().flat_map(|(file, rust)| {
        let named = rust.words.windows(3).filter(move |words| words[0].text == "mod" && is_empty(&words[1].text));
        let inline = named.filter(|words| words[2].text == "{");
        inline.map(|words| {
            Finding::new(&file.path, words[1].line, format!("mod {}: a room for everything", words[1].text))
        })
    });
    files.chain(inline).collect()
}

fn each(tree: &Tree, is_bad: impl Fn(&Function) -> bool, what: impl Fn(&Function) -> String) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (file, rust) in tree.rust() {
        let bad = rust.functions.iter().filter(|function| is_bad(function));
        findings.extend(bad.map(|function| Finding::new(&file.path, *function.lines.start(), what(function))));
    }
    findings
}

#[cfg(test)]
mod checks {
    use super::{super::found, *};

    #[test]
    fn verb_that_says_nothing_is_found() {
        let text = "fn get_page() {}\nfn handle_kick() {}\nfn forget_page() {}\nfn target() {}\n";
        assert_eq!(
            found(functions, "a.rs", text),
            [
                "a.rs:1: fn get_page (no get_, no do_, no handle_)",
                "a.rs:2: fn handle_kick (no get_, no do_, no handle_)"
            ]
        );
    }

    #[test]
    fn name_that_a_trait_chose_is_borne() {
        assert!(found(functions, "a.rs", "impl Backend for X { fn get_features(&self) {} }").is_empty());
        assert_eq!(found(functions, "a.rs", "trait Backend { fn get_features(&self) {} }").len(), 1);
    }

    #[test]
    fn test_of_two_words_is_no_claim() {
        let text = "#[test]\nfn page_works() {}\n#[test]\nfn page_is_refused() {}\nfn page() {}\n";
        assert_eq!(found(tests, "a.rs", text), ["a.rs:2: test page_works: a name is a claim (at least 3 words)"]);
    }

    #[test]
    fn room_for_everything_is_found_as_file_folder_and_module() {
        assert_eq!(found(modules, "vtrace-dp/src/util.rs", ""), ["vtrace-dp/src/util.rs:1: a room for everything"]);
        assert_eq!(found(modules, "tests/common/mod.rs", "").len(), 1);
        assert_eq!(found(modules, "a.rs", "mod helpers {\n}").len(), 1);
        assert!(found(modules, "vtrace-common/src/lib.rs", "").is_empty());
    }
}
