//! Samples of each violation, and of what is allowed.

use super::{super::found, *};

const PUMP: &str = "vtrace-dp/src/agent/pump.rs";

fn of(check: fn(&Tree) -> Vec<Finding>, files: &[(&str, &str)]) -> Vec<String> {
    check(&Tree::of(files)).iter().map(ToString::to_string).collect()
}

#[test]
fn room_that_uses_a_higher_layer_or_a_peer_is_found() {
    let files = [
        (
            "vtrace-dp/src/drain/ring.rs",
            "use crate::device::Device;\nuse crate::clock::Table;\nuse crate::virtq::Ring;\n",
        ),
        ("vtrace-dp/src/device/mod.rs", ""),
        ("vtrace-dp/src/clock/mod.rs", ""),
        ("vtrace-dp/src/virtq/mod.rs", ""),
    ];
    assert_eq!(
        of(rooms, &files),
        [
            "vtrace-dp/src/drain/ring.rs:1: drain (L2) uses crate::device (L3; only lower layers)",
            "vtrace-dp/src/drain/ring.rs:2: drain (L2) uses crate::clock (L2; only lower layers)",
        ]
    );
}

#[test]
fn relative_path_out_of_a_room_is_found() {
    let files = [("vtrace-dp/src/sys/fd.rs", "use super::super::tracefs::Tap;\n"), ("vtrace-dp/src/tracefs.rs", "")];
    assert_eq!(of(rooms, &files).len(), 1);
}

#[test]
fn unknown_room_and_items_of_the_root_are_found() {
    let files = [("vtrace-dp/src/attic/mod.rs", ""), ("vtrace-dp/src/lib.rs", ""), (PUMP, "use crate::SOFTWARE;\n")];
    assert_eq!(
        of(rooms, &files),
        [
            "vtrace-dp/src/agent/pump.rs:1: agent uses an item of the crate's root (a room uses rooms)",
            "vtrace-dp/src/attic/mod.rs:1: room attic is in no layer (LAYERS)",
        ]
    );
}

#[test]
fn closed_room_uses_only_its_few() {
    let files = [
        (PUMP, "use crate::virtq::Ring;\nuse crate::tracefs::Tap;\nuse crate::agent::lane;\n"),
        ("vtrace-dp/src/virtq.rs", ""),
        ("vtrace-dp/src/tracefs.rs", "use crate::printable::Text;\n"),
        ("vtrace-dp/src/printable.rs", ""),
        ("vtrace-dp/src/agent/lane.rs", ""),
    ];
    assert_eq!(
        of(rooms, &files),
        [
            "vtrace-dp/src/agent/pump.rs:1: agent uses crate::virtq (closed: only sys, tracefs, bpf, ftrace)",
            "vtrace-dp/src/tracefs.rs:1: tracefs uses crate::printable (closed: only sys)",
        ]
    );
}

#[test]
fn tests_and_the_root_may_use_every_room() {
    let files = [
        ("vtrace-dp/src/lib.rs", "pub mod sys;\npub mod cli;\npub use cli::run;\n"),
        ("vtrace-dp/src/sys/mod.rs", "#[cfg(test)]\nmod tests {\n    use crate::cli;\n}\n"),
        ("vtrace-dp/src/cli/mod.rs", ""),
    ];
    assert!(of(rooms, &files).is_empty());
}

#[test]
fn circle_of_files_is_found_and_parent_and_child_are_none() {
    let circle = [
        ("vtrace-dp/src/cli/mod.rs", "mod background;\nmod record;\npub(crate) fn a() { record::b() }\n"),
        ("vtrace-dp/src/cli/record.rs", "use super::{a, background};\n"),
        ("vtrace-dp/src/cli/background.rs", "use super::record;\nuse super::a;\n"),
    ];
    assert_eq!(
        of(circles, &circle),
        ["vtrace-dp/src/cli/background.rs:1: circle of files: cli/background -> cli/record -> cli/background"]
    );
    let family =
        [circle[0], ("vtrace-dp/src/cli/record.rs", "use super::a;\n"), ("vtrace-dp/src/cli/background.rs", "")];
    assert!(of(circles, &family).is_empty());
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

#[test]
fn document_has_the_table_between_its_markers() {
    let right = format!("# Architecture\n\n{BEGIN}\n{}{END}\n", table());
    assert!(found(document, DOCUMENT, &right).is_empty());
    let wrong = right.replace("| L0 |", "| L1 |");
    assert_eq!(
        found(document, DOCUMENT, &wrong),
        [format!("{DOCUMENT}:3: not the table that `cargo xtask tidy --layers` prints")]
    );
    assert_eq!(found(document, DOCUMENT, "# Architecture\n").len(), 1);
}
