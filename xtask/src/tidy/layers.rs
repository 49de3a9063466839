//! The layers of the product, and the checks on its imports.
//!
//! | check | finding |
//! |---|---|
//! | [`rooms`] | a path into a peer room, a higher room, a room that the table does not have, or out of a closed room |
//! | [`circles`] | files of one room that use each other in a circle |
//! | [`document`] | docs/architecture.md has another table than this one |
//!
//! Code that exists only in tests may use every room. The crate's root (`lib.rs`, `main.rs`) uses all rooms; no room uses
//! an item of the root.

mod paths;

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Finding,
    rust::Rust,
    tree::{File, Tree},
};
use paths::{Crate, Use};

/// A folder or file directly under `vtrace-dp/src`.
struct Room {
    name: &'static str,
    /// What it holds, for the document.
    holds: &'static str,
}

const fn room(name: &'static str, holds: &'static str) -> Room {
    Room { name, holds }
}

/// Lowest layer first. A room uses itself and rooms of lower layers, never a peer.
const LAYERS: [&[Room]; 9] = [
    &[room("printable", "foreign text and errors, made safe to print"), room("sys", "system calls; `unsafe`")],
    &[
        room("bpf", "the eBPF object: load, attach, maps"),
        room("ftrace", "pages, events, fields, formats: no I/O"),
        room("tracefs", "instances, events, options of a machine"),
        room("virtq", "guest memory, split virtqueues; `unsafe`"),
    ],
    &[
        room("agent", "guest side: control, pump, ports, policy"),
        room("clock", "guest TSC to host time: BTF, feed, segments, table, measured sync"),
        room("drain", "sources (ring, stream, tap) to the sink, session, ledger"),
    ],
    &[room("device", "the vhost-user device"), room("trace", "trace.dat: format, read, write, restore")],
    &[
        room("analysis", "vCPU runs and states; `check`"),
        room("net", "network transports, host side"),
        room("vmm", "QEMU and libvirt: setup, QMP, attach, vCPU threads"),
    ],
    &[
        room("export", "Perfetto, Parquet, JSON"),
        room("report", "text output of events"),
        room("server", "sockets, clients, guests, confinement"),
    ],
    &[room("recorder", "`record`: run, session, plan, clocks, files, summary")],
    &[room("doctor", "what a machine has of what a recording needs")],
    &[room("cli", "arguments to plans; one file per verb; prints")],
];

/// Rooms that may use these rooms only, because they are copied into guests.
const CLOSED: [(&str, &[&str]); 2] = [("agent", &["sys", "tracefs", "bpf", "ftrace"]), ("tracefs", &["sys"])];

const SHARED: &str = "vtrace-common/src/";
const DOCUMENT: &str = "docs/architecture.md";
const BEGIN: &str = "<!-- begin: cargo xtask tidy --layers -->";
const END: &str = "<!-- end: cargo xtask tidy --layers -->";

/// Imports against the layers, and std in vtrace-common.
pub(super) fn rooms(tree: &Tree) -> Vec<Finding> {
    let product = Crate::of(tree);
    let mut findings: Vec<Finding> = product.uses().filter_map(|(file, used)| against_layers(file, used)).collect();
    let homes: BTreeMap<&str, &str> = product.files().filter_map(|(file, path)| Some((room_of(path)?, file))).collect();
    let unknown = homes.into_iter().filter(|(room, _)| layer_of(room).is_none());
    findings.extend(unknown.map(|(room, file)| Finding::new(file, 1, format!("room {room} is in no layer (LAYERS)"))));
    findings.extend(tree.rust().flat_map(|(file, rust)| std_in_shared(file, rust)));
    findings
}

fn against_layers(file: &str, used: &Use) -> Option<Finding> {
    let own = room_of(&used.from)?;
    let finding = |what: String| Some(Finding::new(file, used.line, what));
    let Some(other) = room_of(&used.to) else {
        return finding(format!("{own} uses an item of the crate's root (a room uses rooms)"));
    };
    if own == other {
        return None;
    }
    let (layer, other_layer) = (layer_of(own)?, layer_of(other));
    let Some(other_layer) = other_layer else {
        return finding(format!("{own} uses crate::{other}, which is in no layer (LAYERS)"));
    };
    if other_layer >= layer {
        return finding(format!("{own} (L{layer}) uses crate::{other} (L{other_layer}; only lower layers)"));
    }
    let (_, allowed) = CLOSED.iter().find(|(closed, allowed)| *closed == own && !allowed.contains(&other))?;
    finding(format!("{own} uses crate::{other} (closed: only {})", allowed.join(", ")))
}

fn room_of(path: &[String]) -> Option<&str> {
    path.first().map(String::as_str)
}

fn layer_of(room: &str) -> Option<usize> {
    LAYERS.iter().position(|rooms| rooms.iter().any(|known| known.name == room))
}

/// Files that use each other in a circle.
///
/// A file may use what its folder's `mod.rs` declares, and that file its children: uses of an ancestor do not count.
/// An item that `mod.rs` passes on with `pub use` counts as used from the file it comes from.
pub(super) fn circles(tree: &Tree) -> Vec<Finding> {
    let product = Crate::of(tree);
    let mut edges: BTreeMap<&[String], BTreeSet<&[String]>> = BTreeMap::new();
    let mut paths: BTreeMap<&[String], &str> = BTreeMap::new();
    for (file, used) in product.uses() {
        paths.insert(&used.from, file);
        if !used.from.starts_with(&used.to) {
            edges.entry(&used.from).or_default().insert(&used.to);
        }
    }
    let mut findings = Vec::new();
    let mut seen: BTreeSet<&[String]> = BTreeSet::new();
    for start in edges.keys() {
        if seen.contains(start) {
            continue;
        }
        let Some(circle) = circle_through(start, &edges) else { continue };
        seen.extend(&circle);
        let names: Vec<String> = circle.iter().map(|path| path.join("/")).collect();
        let what = format!("circle of files: {} -> {}", names.join(" -> "), names[0]);
        findings.push(Finding::new(paths[start], 1, what));
    }
    findings
}

/// The shortest circle from a node to itself.
fn circle_through<'a>(
    start: &'a [String],
    edges: &BTreeMap<&'a [String], BTreeSet<&'a [String]>>,
) -> Option<Vec<&'a [String]>> {
    let mut came_from: BTreeMap<&[String], &[String]> = BTreeMap::new();
    let mut wave = vec![start];
    while !wave.is_empty() {
        let mut next = Vec::new();
        for node in wave {
            for &target in edges.get(node).into_iter().flatten() {
                if target == start {
                    let mut circle = vec![node];
                    while let Some(before) = came_from.get(circle[circle.len() - 1]) {
                        circle.push(before);
                    }
                    circle.reverse();
                    return Some(circle);
                }
                if !came_from.contains_key(target) {
                    came_from.insert(target, node);
                    next.push(target);
                }
            }
        }
        wave = next;
    }
    None
}

fn std_in_shared(file: &File, rust: &Rust) -> Vec<Finding> {
    if !file.path.starts_with(SHARED) {
        return Vec::new();
    }
    let uses = rust.places(1..=usize::MAX, &["std", "::"]).filter(|line| !rust.is_test(*line));
    let mut findings: Vec<_> =
        uses.map(|line| Finding::new(&file.path, line, "std in vtrace-common (no_std)")).collect();
    let has_attribute = rust.places(1..=usize::MAX, &["#", "!", "[", "no_std", "]"]).next().is_some();
    if file.path == format!("{SHARED}lib.rs") && !has_attribute {
        findings.push(Finding::new(&file.path, 1, "vtrace-common without #![no_std]"));
    }
    findings
}

/// The table as markdown, highest layer first.
pub(super) fn table() -> String {
    let mut text = String::from("| layer | room | holds |\n|---|---|---|\n");
    for (number, rooms) in LAYERS.iter().enumerate().rev() {
        for room in *rooms {
            text += &format!("| L{number} | `{}` | {}{} |\n", room.name, room.holds, closed_note(room.name));
        }
    }
    text
}

fn closed_note(room: &str) -> String {
    let closed = CLOSED.iter().find(|(closed, _)| *closed == room);
    closed.map_or_else(String::new, |(_, allowed)| format!(" (closed: uses only {})", allowed.join(", ")))
}

/// The document's table, between its two markers, against [`table`].
pub(super) fn document(tree: &Tree) -> Vec<Finding> {
    let Some(file) = tree.files.iter().find(|file| file.path == DOCUMENT) else { return Vec::new() };
    let Some((before, rest)) = file.text.split_once(BEGIN) else {
        return vec![Finding::new(DOCUMENT, 1, format!("no table of layers (`{BEGIN}` … `{END}`)"))];
    };
    let line = before.lines().count() + 1;
    match rest.split_once(END) {
        Some((text, _)) if text.trim() == table().trim() => Vec::new(),
        _ => vec![Finding::new(DOCUMENT, line, "not the table that `cargo xtask tidy --layers` prints")],
    }
}

#[cfg(test)]
mod tests;
