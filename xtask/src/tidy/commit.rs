//! Messages of the commits up to HEAD: `component: what`, then a body with the reason.

use anyhow::Result;

use super::{Finding, place, tree::git};

const SUBJECT_LETTERS_MAX: usize = 72;
const BODY_LETTERS_MAX: usize = 100;
/// What a commit can be about: a room, or what belongs to all of them.
const COMPONENTS: [&str; 41] = [
    "LICENSE",
    "README",
    "agent",
    "bench",
    "check",
    "ci",
    "cli",
    "clock",
    "common",
    "demo",
    "deps",
    "device",
    "docs",
    "doctor",
    "drain",
    "ebpf",
    "export",
    "fuzz",
    "hotplug",
    "ids",
    "image",
    "kvm",
    "lab",
    "limits",
    "page",
    "recorder",
    "restore",
    "server",
    "setup",
    "sys",
    "tests",
    "tidy",
    "time",
    "trace",
    "tracefs",
    "vtrace-common",
    "vtrace-dp",
    "vtrace-ebpf",
    "wire",
    "workspace",
    "xtask",
];

/// One commit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Commit {
    id: String,
    message: String,
}

/// The commits up to HEAD but merges; in a shallow clone those that it has, with a note.
pub(super) fn log() -> Result<Vec<Commit>> {
    if git(&["rev-parse", "--verify", "--quiet", "HEAD"]).is_err() {
        println!("tidy: no commits here, their messages are not checked");
        return Ok(Vec::new());
    }
    if git(&["rev-parse", "--is-shallow-repository"])?.trim() == "true" {
        println!("tidy: a shallow clone, only the messages it has are checked");
    }
    Ok(parse(&git(&["log", "--no-merges", "--format=%h%n%B%x00"])?))
}

fn parse(log: &str) -> Vec<Commit> {
    let commits = log.split('\0').filter_map(|entry| entry.trim_start().split_once('\n'));
    commits.map(|(id, message)| Commit { id: id.into(), message: message.trim_end().into() }).collect()
}

/// What is wrong with a message.
pub(super) fn check(commit: &Commit) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (number, line) in (1..).zip(commit.message.lines()) {
        let complaint = if number == 1 { subject(line) } else { body(number, line) };
        let complaints = complaint.into_iter().chain(place::named(line));
        findings.extend(complaints.map(|what| Finding::new(&format!("commit {}", commit.id), number, what)));
    }
    findings
}

fn subject(line: &str) -> Option<String> {
    let letters = line.chars().count();
    match line.split_once(": ") {
        _ if letters > SUBJECT_LETTERS_MAX => {
            Some(format!("subject of {letters} letters (at most {SUBJECT_LETTERS_MAX})"))
        }
        None => Some(format!("`{line}` (a subject is `component: what it does`)")),
        Some((components, _)) if !components.split(", ").all(|component| COMPONENTS.contains(&component)) => {
            Some(format!("`{components}` is no component (a room, or one of workspace, docs, ci, tests, bench, xtask)"))
        }
        Some(_) => None,
    }
}

/// A line that has no space cannot be broken.
fn body(number: usize, line: &str) -> Option<String> {
    let letters = line.chars().count();
    let too_long = letters > BODY_LETTERS_MAX && line.trim().contains(' ');
    match number {
        2 if !line.is_empty() => Some("second line (empty between subject and body)".into()),
        _ => too_long.then(|| format!("line of {letters} letters (at most {BODY_LETTERS_MAX})")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaints(message: &str) -> Vec<String> {
        let commit = Commit { id: "1a4dc2d".into(), message: message.into() };
        check(&commit).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn message_with_a_room_and_a_reason_passes() {
        assert!(complaints("drain: write straight from guest memory\n\nOne copy less.").is_empty());
    }

    #[test]
    fn subject_names_a_component() {
        assert_eq!(
            complaints("fix things"),
            ["commit 1a4dc2d:1: `fix things` (a subject is `component: what it does`)"]
        );
        assert_eq!(complaints("stuff: fix things").len(), 1);
        assert_eq!(complaints("cli, stuff: fix things").len(), 1);
        assert!(complaints("recorder, cli: record the host").is_empty());
    }

    #[test]
    fn long_lines_are_found() {
        assert_eq!(
            complaints(&format!("wire: {}", "a".repeat(67))),
            ["commit 1a4dc2d:1: subject of 73 letters (at most 72)"]
        );
        let body = format!("wire: a\n\n{} b\n{}", "a".repeat(99), "c".repeat(120));
        assert_eq!(complaints(&body), ["commit 1a4dc2d:3: line of 101 letters (at most 100)"]);
    }

    #[test]
    fn body_keeps_its_distance_and_names_no_machine() {
        assert_eq!(complaints("wire: a\nb").len(), 1);
        assert_eq!(complaints(&format!("wire: a\n\nran in /{}/main", "work")).len(), 1);
    }

    #[test]
    fn log_is_cut_into_commits() {
        let commits = parse("1a4dc2d\nwire: a\n\nb\n\0\n2b4dc2d\nwire: c\n\0\n");
        assert_eq!(commits[0], Commit { id: "1a4dc2d".into(), message: "wire: a\n\nb".into() });
        assert_eq!((commits.len(), commits[1].message.as_str()), (2, "wire: c"));
    }
}
