//! The top level, and the names of one machine's folders and mirrors.

use super::{
    Finding,
    tree::{File, Tree},
};

/// What the top level may hold.
const TOP: [&str; 22] = [
    ".cargo",
    ".ci",
    ".gitattributes",
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "SECURITY.md",
    "bench",
    "clippy.toml",
    "docs",
    "rust-toolchain.toml",
    "rustfmt.toml",
    "shared",
    "tests",
    "vtrace-common",
    "vtrace-dp",
    "vtrace-ebpf",
    "xtask",
];
/// Folders at the root of one machine: `/NAME/…`.
const MACHINE_FOLDERS: [&str; 6] = ["work", "farm", "root", "home", "Users", "tmp/bash_jobs"];
/// Names of hosts that serve packages, in two parts so that they do not stand here.
const HOSTS: [(&str, &str); 11] = [
    ("deb.debian", "org"),
    ("security.debian", "org"),
    ("snapshot.debian", "org"),
    ("ftp.debian", "org"),
    ("archive.ubuntu", "com"),
    ("static.rust-lang", "org"),
    ("//crates", "io"),
    ("index.crates", "io"),
    ("static.crates", "io"),
    ("proxy.golang", "org"),
    ("registry.npmjs", "org"),
];
/// Cargo writes where its packages are from: the public index, not a mirror of one machine.
const LOCK_FILE: &str = "Cargo.lock";

/// Everything of this module.
pub(super) fn all(tree: &Tree) -> Vec<Finding> {
    [top(tree), tree.files.iter().flat_map(names).collect()].concat()
}

fn top(tree: &Tree) -> Vec<Finding> {
    let is_stray = |file: &&File| file.path.split('/').next().is_some_and(|top| !TOP.contains(&top));
    let what = "not a place of the house (design: the top level is fixed)";
    tree.files.iter().filter(is_stray).map(|file| Finding::new(&file.path, 1, what)).collect()
}

fn names(file: &File) -> Vec<Finding> {
    let complaints = if file.path.rsplit('/').next() == Some(LOCK_FILE) { mirrored } else { named };
    let found = file.lines().flat_map(|(line, text)| complaints(text).into_iter().map(move |what| (line, what)));
    found.map(|(line, what)| Finding::new(&file.path, line, what)).collect()
}

/// What is wrong with a line of a lock file.
fn mirrored(text: &str) -> Vec<String> {
    let standard = format!("source = \"registry+https://github.com/rust-lang/{}.{}-index\"", "crates", "io");
    let is_other = text.starts_with("source = ") && text != standard;
    is_other.then(|| format!("{text} (only the public index)")).into_iter().collect()
}

/// What is wrong with a line that names a machine's folder or a mirror.
pub(super) fn named(text: &str) -> Vec<String> {
    let folders = MACHINE_FOLDERS.iter().map(|folder| format!("/{folder}/")).filter(|folder| has_root(text, folder));
    let folders = folders.map(|folder| format!("names a machine's folder, {folder} (no machine paths)"));
    let hosts = HOSTS.iter().map(|(name, domain)| format!("{name}.{domain}")).filter(|host| text.contains(host));
    folders.chain(hosts.map(|host| format!("names a mirror, {host} (taken from the machine's own sources)"))).collect()
}

/// Whether the text names something in this folder at the root, not inside another one.
fn has_root(text: &str, folder: &str) -> bool {
    let names_more = |after: &str| after.starts_with(|letter: char| letter.is_alphanumeric() || "._".contains(letter));
    let inside = |before: &str| before.ends_with(|letter: char| letter.is_alphanumeric() || ".-_}~".contains(letter));
    text.match_indices(folder).any(|(at, _)| !inside(&text[..at]) && names_more(&text[at + folder.len()..]))
}

#[cfg(test)]
mod tests {
    use super::{super::found, *};

    #[test]
    fn folder_of_one_machine_is_found_and_a_relative_one_is_not() {
        let text = format!("cd /{0}/main\nls target/{0}/main $OUT/{0}/main {{out}}/{0}/main not /{0}/\n", "work");
        assert_eq!(
            found(all, "docs/a.md", &text),
            [format!("docs/a.md:1: names a machine's folder, /{}/ (no machine paths)", "work")]
        );
    }

    #[test]
    fn mirror_is_found_by_its_name() {
        let text = format!("url = \"https://{}.{}/index\"\n", "index.crates", "io");
        assert_eq!(found(all, ".cargo/config.toml", &text).len(), 1);
    }

    #[test]
    fn lock_file_may_name_the_public_index_only() {
        let index = format!("source = \"registry+https://github.com/rust-lang/{}.{}-index\"\n", "crates", "io");
        assert!(found(all, "vtrace-ebpf/Cargo.lock", &index).is_empty());
        let mirror = "source = \"registry+https://mirror.example/index\"\n";
        assert_eq!(found(all, "Cargo.lock", mirror).len(), 1);
    }

    #[test]
    fn stray_of_the_top_level_is_found() {
        assert_eq!(
            found(all, "notes.md", ""),
            ["notes.md:1: not a place of the house (design: the top level is fixed)"]
        );
        assert!(found(all, "docs/notes.md", "").is_empty());
    }
}
