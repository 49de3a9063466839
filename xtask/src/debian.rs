//! Packages of any Debian suite, unpacked into the cache without being installed.
//!
//! In: a [`Set`] of package patterns; the machine's own apt sources say which mirror and which keys.
//! Out: one folder per set with the packages unpacked over each other. Runs: apt and dpkg-deb as child processes, one
//! caller at a time (file lock). Full: disk errors go up. Trust: apt checks every signature and hash; a set is renamed
//! into place only when all of it is unpacked.

pub mod bare;
mod mirror;

use crate::cache;
use anyhow::{Context, Result, bail, ensure};
use std::cmp::Ordering;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

/// Package lists older than this are fetched again before something new is resolved.
const LISTS_AGE_MAX: Duration = Duration::from_secs(12 * 60 * 60);
/// How long one process waits while another fills the cache.
const PATIENCE: Duration = Duration::from_secs(900);

/// Some packages of one Debian release, unpacked together.
#[derive(Debug, Clone, Copy)]
pub struct Set {
    /// The folder's name in the cache.
    pub name: &'static str,
    /// The release and, where wanted, its backports: the suites of the private apt root.
    pub suites: &'static [&'static str],
    /// Package names. A `*` stands for a version: the newest that exists for the first pattern, the same for the rest.
    pub packages: &'static [&'static str],
    /// Whether everything these packages depend on is unpacked too, as for a program that runs from the folder.
    pub with_dependencies: bool,
}

/// The folder with the set's packages; downloads what the cache does not have.
///
/// # Errors
/// When no Debian mirror is known, the network or a signature fails, or a pattern matches no package.
pub fn unpack(set: &Set) -> Result<PathBuf> {
    let dir = cache::dir("packages")?.join(set.name);
    if is_whole(set, &dir) {
        return Ok(dir.join("root"));
    }
    let _turn = cache::lock(&cache::dir("packages")?.join(".lock"), "another download", PATIENCE)?;
    if !is_whole(set, &dir) {
        eprintln!("fetching {} from Debian {}", set.name, set.suites.join(", "));
        download(set, &dir).with_context(|| format!("cannot fetch the packages of {}", set.name))?;
    }
    Ok(dir.join("root"))
}

/// The folder with the upstream source of a package; downloads it if the cache does not have it.
///
/// # Errors
/// When no Debian mirror is known, or the network, a hash or tar fails.
pub fn source(package: &str, suite: &'static str) -> Result<PathBuf> {
    let dir = cache::dir("sources")?.join(format!("{package}-{suite}"));
    let _turn = cache::lock(&cache::dir("packages")?.join(".lock"), "another download", PATIENCE)?;
    if dir.exists() {
        return Ok(dir);
    }
    eprintln!("fetching the source of {package} from Debian {suite}");
    let root = Root::open_sources(suite)?;
    root.update()?;
    let fresh = tempfile::tempdir_in(cache::dir("sources")?)?;
    // Of what a source package is made of, the archives: hashes stand in the signed lists.
    let mut fetch = root.apt("apt-get");
    fetch.args(["-q", "--download-only", "--tar-only", "source", package]).current_dir(fresh.path());
    run(&mut fetch).with_context(|| format!("cannot fetch the source of {package}"))?;
    let unpacked = fresh.path().join("source");
    fs::create_dir(&unpacked)?;
    for entry in fs::read_dir(fresh.path())? {
        let path = entry?.path();
        if path.is_file() {
            run(Command::new("tar").arg("-xf").arg(&path).args(["--strip-components=1", "-C"]).arg(&unpacked))?;
        }
    }
    fs::rename(&unpacked, &dir)?;
    Ok(dir)
}

/// A program of an unpacked set, run with the loader and the libraries of its own release beside this machine's.
///
/// # Errors
/// When the set was unpacked without its dependencies.
pub fn command(root: &Path, program: &str) -> Result<Command> {
    let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|dir| root.join(dir));
    // The loader's usual name in lib64 can be an absolute link, which would lead to this machine's loader.
    let mut loaders = libraries.iter().map(|dir| dir.join("ld-linux-x86-64.so.2"));
    let loader = loaders.find(|path| path.exists()).with_context(|| format!("no loader in {}", root.display()))?;
    let program = root.join(program);
    ensure!(program.exists(), "{} is not there", program.display());
    let path = libraries.map(|dir| dir.display().to_string()).join(":");
    let mut command = Command::new(loader);
    command.arg("--library-path").arg(path).arg(program);
    Ok(command)
}

/// The loader and every library that a program of an unpacked set needs, each under the name it is looked for by.
///
/// # Errors
/// When one is missing.
pub fn libraries(root: &Path, program: &str) -> Result<Vec<PathBuf>> {
    let list = command(root, program)?;
    let loader = PathBuf::from(list.get_program());
    let words: Vec<_> = list.get_args().map(ToOwned::to_owned).collect();
    let text = run(Command::new(&loader).arg("--list").args(words))?;
    // `NAME => PATH (ADDRESS)`; the loader and the kernel's own stand without an arrow or a path.
    let found = text.lines().filter_map(|line| line.split_once(" => ")?.1.split_whitespace().next());
    let mut libraries: Vec<PathBuf> = found.map(PathBuf::from).filter(|path| path.starts_with(root)).collect();
    libraries.push(loader);
    Ok(libraries)
}

/// The stamp: the set as it is defined today. Another definition means another download.
fn stamp(set: &Set) -> String {
    format!("{set:?}\n")
}

fn is_whole(set: &Set, dir: &Path) -> bool {
    fs::read_to_string(dir.join("stamp")).is_ok_and(|found| found == stamp(set))
}

fn download(set: &Set, dir: &Path) -> Result<()> {
    let root = Root::open(set.suites)?;
    let names = match root.resolve(set.packages)? {
        Some(names) => names,
        None => {
            root.update()?;
            root.resolve(set.packages)?.with_context(|| format!("no package matches {:?}", set.packages))?
        }
    };
    let fresh = dir.with_extension("new");
    remove(&fresh)?;
    fs::create_dir_all(fresh.join("debs/partial"))?;
    if let Err(error) = root.fetch(&names, set, &fresh) {
        // The lists may be older than the mirror: a point release removes what they name.
        eprintln!("trying once more with fresh package lists: {error:#}");
        root.update()?;
        let names = root.resolve(set.packages)?.with_context(|| format!("no package matches {:?}", set.packages))?;
        root.fetch(&names, set, &fresh)?;
    }
    unpack_debs(&fresh)?;
    fs::write(fresh.join("stamp"), stamp(set))?;
    remove(dir)?;
    fs::rename(&fresh, dir)?;
    Ok(())
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Unpacks `debs/*.deb` into `root`, notes their names in `packages.txt`, drops the archives.
fn unpack_debs(dir: &Path) -> Result<()> {
    let mut debs = Vec::new();
    for entry in fs::read_dir(dir.join("debs"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            debs.push(path);
        }
    }
    ensure!(!debs.is_empty(), "apt downloaded nothing");
    debs.sort();
    fs::create_dir(dir.join("root"))?;
    let mut list = String::new();
    for deb in &debs {
        let status = Command::new("dpkg-deb").arg("-x").arg(deb).arg(dir.join("root")).status()?;
        ensure!(status.success(), "dpkg-deb cannot unpack {}", deb.display());
        list.push_str(&format!("{}\n", deb.file_stem().expect("a .deb has a stem").to_string_lossy()));
    }
    fs::write(dir.join("packages.txt"), list)?;
    fs::remove_dir_all(dir.join("debs"))?;
    Ok(())
}

/// A private apt root: its own lists, cache and (empty) package database for some suites.
struct Root {
    dir: PathBuf,
    /// The last suite: the one whose versions win.
    target: &'static str,
}

impl Root {
    fn open(suites: &'static [&'static str]) -> Result<Self> {
        let target = suites.last().context("a set names at least one suite")?;
        Self::open_in(&suites.join("+"), target, &mirror::of_this_machine()?.sources("deb", suites))
    }

    /// For sources of programs instead of programs.
    fn open_sources(suite: &'static str) -> Result<Self> {
        Self::open_in(&format!("{suite}-sources"), suite, &mirror::of_this_machine()?.sources("deb-src", &[suite]))
    }

    fn open_in(name: &str, target: &'static str, sources: &str) -> Result<Self> {
        let dir = cache::dir(&format!("apt/{name}"))?;
        for part in ["lists/partial", "archives/partial"] {
            fs::create_dir_all(dir.join(part))?;
        }
        fs::write(dir.join("status"), "")?;
        fs::write(dir.join("debian.sources"), sources)?;
        fs::write(dir.join("apt.conf"), configuration(&dir))?;
        Ok(Self { dir, target })
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-c").arg(self.dir.join("apt.conf")).env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    fn update(&self) -> Result<()> {
        // error-mode=any: a list that could not be had must not pass as an old one.
        run(self.apt("apt-get").args(["-q", "-o", "APT::Update::Error-Mode=any", "update"]))?;
        fs::write(self.dir.join("updated"), "")?;
        Ok(())
    }

    fn lists_are_fresh(&self) -> bool {
        let age = |file: fs::Metadata| SystemTime::now().duration_since(file.modified().ok()?).ok();
        fs::metadata(self.dir.join("updated")).ok().and_then(age).is_some_and(|age| age < LISTS_AGE_MAX)
    }

    /// The names that match the patterns, or `None` when the lists are missing, old, or know no such package.
    fn resolve(&self, patterns: &[&str]) -> Result<Option<Vec<String>>> {
        if !self.lists_are_fresh() {
            return Ok(None);
        }
        let first = patterns.first().context("a set names at least one package")?;
        // After `=` stands the version of a complete name; apt itself resolves the star in it.
        let Some((prefix, suffix)) = first.split_once('*').filter(|(prefix, _)| !prefix.contains('=')) else {
            return Ok(Some(patterns.iter().map(ToString::to_string).collect()));
        };
        let names = run(self.apt("apt-cache").args(["pkgnames", prefix]))?;
        let mut versions: Vec<&str> = names.lines().filter_map(|name| version_in(name, prefix, suffix)).collect();
        versions.sort_by(|left, right| natural(right, left));
        for version in versions {
            let names: Vec<String> = patterns.iter().map(|pattern| pattern.replace('*', version)).collect();
            if self.exist(&names)? {
                return Ok(Some(names));
            }
        }
        Ok(None)
    }

    /// Whether every name is a package that can be downloaded (apt also knows names that are only mentioned).
    fn exist(&self, names: &[String]) -> Result<bool> {
        for name in names {
            if run(self.apt("apt-cache").args(["madison", name]))?.trim().is_empty() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn fetch(&self, names: &[String], set: &Set, into: &Path) -> Result<()> {
        let debs = into.join("debs");
        if set.with_dependencies {
            let mut install = self.apt("apt-get");
            install.arg("-o").arg(format!("Dir::Cache::archives={}", debs.display()));
            install.args(["-q", "-y", "--download-only", "--no-install-recommends", "-t", self.target, "install"]);
            run(install.args(names))?;
        } else {
            // `name/suite` would leave out a package that only the release has: -t prefers without excluding.
            run(self.apt("apt-get").args(["-q", "-t", self.target, "download"]).args(names).current_dir(&debs))?;
        }
        Ok(())
    }
}

/// The private root's apt.conf. Read after the machine's own, so that proxies and credentials set there still hold.
fn configuration(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        "#clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n#clear DPkg::Post-Invoke;\n\
         #clear APT::Architectures;\nAPT::Architecture \"amd64\";\nAPT::Architectures {{ \"amd64\"; }};\n\
         // Root's own folders are closed to the user _apt.\nAPT::Sandbox::User \"root\";\n\
         // A mirror may be a snapshot of last month; signatures are checked all the same.\n\
         Acquire::Check-Valid-Until \"false\";\n\
         Acquire::Languages \"none\";\nAcquire::Retries \"3\";\nAPT::Get::List-Cleanup \"true\";\n\
         Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n\
         Acquire::IndexTargets::deb::CNF::DefaultEnabled \"false\";\n\
         Dir::State \"{dir}\";\nDir::State::lists \"{dir}/lists\";\nDir::State::status \"{dir}/status\";\n\
         Dir::Cache \"{dir}\";\nDir::Cache::archives \"{dir}/archives\";\nDir::Cache::pkgcache \"pkgcache.bin\";\n\
         Dir::Etc::sourcelist \"{dir}/debian.sources\";\nDir::Etc::sourceparts \"/dev/null\";\n\
         Dir::Etc::preferences \"/dev/null\";\nDir::Etc::preferencesparts \"/dev/null\";\n"
    )
}

/// Runs a command and gives its stdout; its stderr is part of the error.
fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot run {}", command.get_program().to_string_lossy()))?;
    if !output.status.success() {
        let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy()).collect();
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{} {} failed: {}", command.get_program().to_string_lossy(), words.join(" "), said.trim());
    }
    String::from_utf8(output.stdout).context("apt's output is not UTF-8")
}

/// What `*` stands for in `name`; it starts with a digit, so that `linux-binary-*` is not `linux-binary-unsigned-…`.
fn version_in<'a>(name: &'a str, prefix: &str, suffix: &str) -> Option<&'a str> {
    let version = name.strip_prefix(prefix)?.strip_suffix(suffix)?;
    version.starts_with(|first: char| first.is_ascii_digit()).then_some(version)
}

/// Compares versions part by part, numbers as numbers: 6.12.107 is newer than 6.12.94.
fn natural(left: &str, right: &str) -> Ordering {
    let parts = |text: &str| -> Vec<(u64, String)> {
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            let words = rest[digits..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |at| digits + at);
            parts.push((rest[..digits].parse().unwrap_or(u64::MAX), rest[digits..words].to_owned()));
            rest = &rest[words..];
        }
        parts
    };
    parts(left).cmp(&parts(right))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_version_has_the_greater_number_not_the_greater_digit() {
        assert_eq!(natural("6.12.107", "6.12.94"), Ordering::Greater);
        assert_eq!(natural("6.1.0-50", "6.1.0-47"), Ordering::Greater);
        assert_eq!(natural("7.0.10", "6.19.14"), Ordering::Greater);
        assert_eq!(natural("7.3.4", "7.3.4"), Ordering::Equal);
    }

    #[test]
    fn star_stands_for_a_version_only() {
        let (prefix, suffix) = ("linux-binary-", "+deb13-cloud-amd64");
        assert_eq!(version_in("linux-binary-7.3.4+deb13-cloud-amd64", prefix, suffix), Some("7.3.4"));
        assert_eq!(version_in("linux-binary-unsigned-7.3.4+deb13-cloud-amd64", prefix, suffix), None);
        assert_eq!(version_in("linux-binary-7.3.4+deb13-rt-amd64", prefix, suffix), None);
    }

    #[test]
    fn changed_set_is_not_taken_for_the_cached_one() {
        let set = Set { name: "x", suites: &["trixie"], packages: &["a"], with_dependencies: false };
        assert_ne!(stamp(&set), stamp(&Set { packages: &["a", "b"], ..set }));
    }
}
