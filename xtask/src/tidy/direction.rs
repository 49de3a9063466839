//! Which room may use which.
//!
//! The agent goes into guests as a small static program: it, and what it uses, know nothing of the host's side.
//! vtrace-common goes into eBPF programs and knows no operating system.

use super::{
    Finding,
    rust::{Rust, Word},
    tree::{File, Tree},
};

/// Rooms of the product that may use only these of its rooms.
const ALLOWED: [(&str, &[&str]); 3] =
    [("agent", &["agent", "sys", "tracefs"]), ("tracefs", &["sys", "tracefs"]), ("sys", &["sys"])];
const PRODUCT: &str = "vtrace-dp/src/";
const SHARED: &str = "vtrace-common/src/";

/// Paths that lead into a room which is closed from here.
pub(super) fn rooms(tree: &Tree) -> Vec<Finding> {
    let agent = tree.rust().flat_map(|(file, rust)| product(file, rust));
    agent.chain(tree.rust().flat_map(|(file, rust)| shared(file, rust))).collect()
}

fn product(file: &File, rust: &Rust) -> Vec<Finding> {
    let Some((own, allowed)) = ALLOWED.iter().find(|(room, _)| room_of(&file.path) == Some(room)) else {
        return Vec::new();
    };
    let closed = crate_paths(&rust.words).into_iter().filter(|word| !allowed.contains(&word.text.as_str()));
    let closed = closed.filter(|word| !rust.is_test(word.line));
    let what = |word: &Word| format!("{own} uses crate::{} (only {})", word.text, allowed.join(", "));
    closed.map(|word| Finding::new(&file.path, word.line, what(&word))).collect()
}

fn shared(file: &File, rust: &Rust) -> Vec<Finding> {
    if !file.path.starts_with(SHARED) {
        return Vec::new();
    }
    let uses = rust.places(1..=usize::MAX, &["std", "::"]).filter(|line| !rust.is_test(*line));
    let mut findings: Vec<_> =
        uses.map(|line| Finding::new(&file.path, line, "std in vtrace-common (no_std)")).collect();
    let says = |sequence: &[&str]| rust.places(1..=usize::MAX, sequence).next().is_some();
    if file.path == format!("{SHARED}lib.rs") && !says(&["#", "!", "[", "no_std", "]"]) {
        findings.push(Finding::new(&file.path, 1, "vtrace-common without #![no_std]"));
    }
    findings
}

/// `agent` of `vtrace-dp/src/agent/…` and `vtrace-dp/src/agent.rs`.
fn room_of(path: &str) -> Option<&str> {
    path.strip_prefix(PRODUCT)?.split('/').next().map(|part| part.trim_end_matches(".rs"))
}

/// The word behind each `crate::`, each of them in `crate::{a, b}`. A macro's `$crate` is another crate's.
fn crate_paths(words: &[Word]) -> Vec<Word> {
    let mut found = Vec::new();
    for at in 0..words.len().saturating_sub(2) {
        let is_path = words[at].text == "crate" && words[at + 1].text == "::";
        let is_macro = at.checked_sub(1).is_some_and(|before| words[before].text == "$");
        match (is_path && !is_macro, words[at + 2].text.as_str()) {
            (true, "{") => found.extend(group_heads(&words[at + 3..])),
            (true, _) => found.push(words[at + 2].clone()),
            _ => {}
        }
    }
    found
}

/// The first word of each path in a group of a `use`, whose brace is open already.
fn group_heads(words: &[Word]) -> Vec<Word> {
    let (mut depth, mut is_head, mut heads) = (1_usize, true, Vec::new());
    for word in words {
        match word.text.as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            "," => is_head = depth == 1,
            _ if is_head => {
                heads.push(word.clone());
                is_head = false;
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    heads
}

#[cfg(test)]
mod tests {
    use super::{super::found, *};

    const PUMP: &str = "vtrace-dp/src/agent/pump.rs";

    #[test]
    fn agent_that_uses_the_hosts_side_is_found() {
        let text = "use crate::{\n    agent::tap,\n    device::{ring, sys},\n};\nfn a() { crate::drain::b() }\n";
        assert_eq!(
            found(rooms, PUMP, text),
            [
                format!("{PUMP}:3: agent uses crate::device (only agent, sys, tracefs)"),
                format!("{PUMP}:5: agent uses crate::drain (only agent, sys, tracefs)")
            ]
        );
    }

    #[test]
    fn agent_may_use_its_own_side_and_other_rooms_anything() {
        assert!(
            found(rooms, PUMP, "use crate::{sys::uring, tracefs::Tap};\nuse vtrace_common::ids::Cpu;\n").is_empty()
        );
        assert!(found(rooms, "vtrace-dp/src/server/mod.rs", "use crate::drain::Drain;\n").is_empty());
    }

    #[test]
    fn what_the_agent_uses_is_closed_too() {
        assert_eq!(found(rooms, "vtrace-dp/src/tracefs/mod.rs", "use crate::agent::Agent;\n").len(), 1);
        assert_eq!(found(rooms, "vtrace-dp/src/sys.rs", "use crate::tracefs::Tap;\n").len(), 1);
    }

    #[test]
    fn common_crate_uses_std_only_in_tests() {
        let text = "use std::io;\n#[cfg(test)]\nmod tests {\n    use std::fs;\n}\n";
        assert_eq!(
            found(rooms, "vtrace-common/src/page.rs", text),
            ["vtrace-common/src/page.rs:1: std in vtrace-common (no_std)"]
        );
        assert_eq!(found(rooms, "vtrace-common/src/lib.rs", "//! x\n").len(), 1);
        assert!(found(rooms, "vtrace-common/src/lib.rs", "//! x\n#![no_std]\n").is_empty());
    }
}
