//! The files that git tracks, read and parsed once for all checks.

use std::{collections::HashSet, fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};

use super::{
    Finding,
    rust::{Module, Rust},
};

/// A file that says this near its top is a program's work and only its place is checked.
const GENERATED: &str = concat!("@", "generated");

/// All text files of the work tree.
#[derive(Debug)]
pub(super) struct Tree {
    pub(super) files: Vec<File>,
}

/// One text file.
#[derive(Debug)]
pub(super) struct File {
    /// From the root of the work tree.
    pub(super) path: String,
    pub(super) text: String,
    /// Parsed, if it is Rust of ours.
    pub(super) rust: Option<Rust>,
    fault: Option<Finding>,
}

impl Tree {
    /// What git tracks here. Files that are not text (UTF-8 without NUL) have only a path.
    pub(super) fn tracked() -> Result<Self> {
        let root = git(&["rev-parse", "--show-toplevel"])?;
        let names = git(&["ls-files", "-z", "--full-name", ":/"])?;
        let read = |name: &str| {
            let bytes = fs::read(Path::new(root.trim_end()).join(name)).ok()?; // a deleted file is not there
            let text = String::from_utf8(bytes).ok().filter(|text| !text.contains('\0')).unwrap_or_default();
            Some(File::new(name, text))
        };
        Ok(Self::with_tests(names.split_terminator('\0').filter_map(read).collect()))
    }

    /// A tree that exists only in a test.
    #[cfg(test)]
    pub(super) fn of(files: &[(&str, &str)]) -> Self {
        Self::with_tests(files.iter().map(|(path, text)| File::new(path, (*text).into())).collect())
    }

    /// Marks the files of `#[cfg(test)] mod NAME;`, and of the modules that they declare in turn.
    fn with_tests(mut files: Vec<File>) -> Self {
        loop {
            let paths: HashSet<String> = files.iter().flat_map(File::test_modules).collect();
            let unmarked = files.iter_mut().filter(|file| paths.contains(&file.path));
            let mut unmarked =
                unmarked.filter_map(|file| file.rust.as_mut()).filter(|rust| !rust.is_all_test()).peekable();
            if unmarked.peek().is_none() {
                drop(unmarked);
                return Self { files };
            }
            unmarked.for_each(Rust::make_test);
        }
    }

    /// The files that are Rust of ours.
    pub(super) fn rust(&self) -> impl Iterator<Item = (&File, &Rust)> {
        self.files.iter().filter_map(|file| Some((file, file.rust.as_ref()?)))
    }
}

impl File {
    fn new(path: &str, text: String) -> Self {
        let generated = text.lines().take(5).any(|line| line.contains(GENERATED));
        let parsed = (path.ends_with(".rs") && !generated).then(|| Rust::parse(path, &text));
        let (rust, fault) = match parsed {
            Some(Ok(rust)) => (Some(rust), None),
            Some(Err(fault)) => (None, Some(fault)),
            None => (None, None),
        };
        Self { path: path.into(), text, rust, fault }
    }

    /// Where its modules may lie that exist only in tests.
    fn test_modules(&self) -> Vec<String> {
        self.places_of(|module, is_all_test| module.test || is_all_test)
    }

    /// Where its modules may lie.
    pub(super) fn modules_at(&self) -> Vec<String> {
        self.places_of(|_, _| true)
    }

    fn places_of(&self, is_meant: impl Fn(&Module, bool) -> bool) -> Vec<String> {
        let Some(rust) = &self.rust else { return Vec::new() };
        let (folder, name) = self.path.rsplit_once('/').unwrap_or(("", &self.path));
        let own = match name.trim_end_matches(".rs") {
            "lib" | "main" | "mod" => folder.to_owned(),
            stem => format!("{folder}/{stem}"),
        };
        let meant = rust.modules.iter().filter(|module| is_meant(module, rust.is_all_test()));
        let paths = meant.flat_map(|Module { name, path, .. }| match path {
            Some(path) => vec![format!("{folder}/{path}")],
            None => vec![format!("{own}/{name}.rs"), format!("{own}/{name}/mod.rs")],
        });
        paths.collect()
    }

    /// Its lines, counted from 1.
    pub(super) fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        (1..).zip(self.text.lines())
    }
}

/// Rust files that do not parse.
pub(super) fn unreadable(tree: &Tree) -> Vec<Finding> {
    tree.files.iter().filter_map(|file| file.fault.clone()).collect()
}

/// What git prints. Works as another user than the tree's owner, as containers do.
pub(super) fn git(arguments: &[&str]) -> Result<String> {
    let output = Command::new("git").args(["-c", "safe.directory=*"]).args(arguments).output();
    let output = output.context("cannot start git")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "git {}: {}", arguments.join(" "), complaint.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::{super::found, *};

    #[test]
    fn file_that_does_not_parse_is_found_with_its_line() {
        let findings = found(unreadable, "xtask/src/x.rs", "//! x\nfn broken( {}\n");
        assert_eq!(findings.len(), 1);
        assert!(findings[0].starts_with("xtask/src/x.rs:2: does not parse"), "{findings:?}");
    }

    #[test]
    fn generated_file_is_not_read_as_ours() {
        let tree = Tree::of(&[("a.rs", &format!("// {GENERATED} by a tool\nfn broken( {{}}\n"))]);
        assert!(unreadable(&tree).is_empty());
        assert_eq!(tree.rust().count(), 0);
    }

    #[test]
    fn files_of_test_modules_are_tests_and_so_are_their_modules() {
        let tree = Tree::of(&[
            ("p/src/lib.rs", "mod feed;"),
            ("p/src/feed.rs", "#[cfg(test)] mod tests; #[cfg(test)] #[path = \"feed_live.rs\"] mod live; mod work;"),
            ("p/src/feed/tests.rs", "mod micro;"),
            ("p/src/feed/tests/micro.rs", ""),
            ("p/src/feed_live.rs", ""),
            ("p/src/feed/work.rs", ""),
        ]);
        let tests: Vec<bool> = tree.rust().map(|(_, rust)| rust.is_test(1)).collect();
        assert_eq!(tests, [false, false, true, true, true, false]);
    }
}
