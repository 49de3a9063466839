//! What stock tools make of a file: Debian's trace-cmd and the library that KernelShark uses, run as a user would.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use anyhow::{Context, Result, bail, ensure};
use vtrace_common::ids::Cpu;

/// Runs a stock tool; it must succeed and have nothing to complain about.
pub fn run(program: impl AsRef<OsStr>, words: &[&str], files: &[&Path]) -> Result<String> {
    said(Command::new(program.as_ref()).args(words).args(files))
}

fn said(command: &mut Command) -> Result<String> {
    let output = command.output().context("cannot run a stock tool")?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && stderr.trim().is_empty(), "{command:?}: {}: {stderr}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// `trace-cmd WORDS -i FILE -i FILE …`.
pub fn trace_cmd(words: &[&str], files: &[&Path]) -> Result<String> {
    let files: Vec<&Path> = files.iter().flat_map(|file| [Path::new("-i"), file]).collect();
    said(stock_trace_cmd().args(words).args(files))
}

/// This Debian's trace-cmd, installed if it is not.
fn stock_trace_cmd() -> Command {
    static INSTALLED: OnceLock<Result<()>> = OnceLock::new();
    INSTALLED.get_or_init(xtask::packages::ensure_listed).as_ref().expect("stock tools are there");
    Command::new("trace-cmd")
}

/// The same by trace-cmd of Debian forky, 3.4 or later, unpacked beside this machine's.
pub fn trace_cmd_newest(words: &[&str], files: &[&Path]) -> Result<String> {
    let mut command = xtask::packages::trace_cmd_newest()?;
    command.args(words);
    for file in files {
        command.arg("-i").arg(file);
    }
    said(&mut command)
}

/// Lets stock trace-cmd write a file of this version out of `from`.
pub fn convert(from: &Path, version: &str, to: &Path) -> Result<()> {
    convert_packed(from, version, "none", to)
}

/// The same, packed with this compression.
pub fn convert_packed(from: &Path, version: &str, compression: &str, to: &Path) -> Result<()> {
    let mut command = stock_trace_cmd();
    command
        .args(["convert", "--file-version", version, "--compression", compression, "-i"])
        .arg(from)
        .arg("-o")
        .arg(to);
    // Version 6 of any top instance is written with a complaint of its own: "Cannot find description for buffer".
    let status = command.output().context("cannot run trace-cmd")?.status;
    ensure!(status.success() && to.exists(), "trace-cmd convert: {status}");
    Ok(())
}

/// One line of a report: file (if there are several), CPU, time as printed without its point, event.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Line {
    /// Where it happened.
    pub cpu: Cpu,
    /// Its time.
    pub time: u64,
    /// Its name.
    pub event: String,
    /// Everything after the name.
    pub fields: String,
    /// The file, if there are several.
    pub file: Option<String>,
}

/// The event lines of a report.
pub fn lines(report: &str) -> Vec<Line> {
    report.lines().filter_map(line).collect()
}

fn line(text: &str) -> Option<Line> {
    // Raw cycles follow the CPU without a blank.
    let text = text.replace(']', "] ");
    let bracketed = |word: &str| word.strip_prefix('[')?.strip_suffix(']')?.parse().ok().map(Cpu);
    let words: Vec<&str> = text.split_whitespace().collect();
    let at = words.iter().position(|word| bracketed(word).is_some())?;
    // Newer versions put flags between CPU and time.
    let time = words[at + 1..].iter().position(|word| word.ends_with(':'))? + at + 1;
    Some(Line {
        cpu: bracketed(words[at])?,
        time: words[time].trim_end_matches(':').replace('.', "").parse().ok()?,
        event: words.get(time + 1)?.trim_end_matches(':').to_owned(),
        fields: words.get(time + 2..).unwrap_or_default().join(" "),
        file: words[0].strip_suffix(':').map(str::to_owned),
    })
}

/// A program that loads files as KernelShark does.
pub fn kshark(folder: &Path) -> Result<PathBuf> {
    xtask::packages::ensure_listed()?;
    let (source, program) = (folder.join("kshark.c"), folder.join("kshark"));
    std::fs::write(&source, include_str!("judge/kshark.c"))?;
    let words = ["-I/usr/include/kernelshark", "-o"];
    run("gcc", &words, &[&program, &source, Path::new("-lkshark")])?;
    Ok(program)
}

/// CPU and time of every entry of a file, as KernelShark loads them.
pub fn shark_entries(file: &Path) -> Result<Vec<(Cpu, u64)>> {
    let folder = tempfile::tempdir()?;
    let said = said(Command::new(kshark(folder.path())?).env("KSHARK_ENTRIES", "1").arg(file))?;
    let entries = said.lines().filter_map(|line| line.strip_prefix("entry 0 "));
    let entries = entries.map(|line| {
        let (cpu, time) = line.split_once(' ').context("CPU and time")?;
        Ok((Cpu(cpu.parse()?), time.parse()?))
    });
    entries.collect()
}

/// What KernelShark finds in files: entries of each stream, and the host threads of each guest's vCPUs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Shark {
    /// Entries of each file.
    pub entries: Vec<usize>,
    /// Host stream, guest stream, threads.
    pub maps: Vec<(usize, usize, Vec<u32>)>,
}

/// Loads files as KernelShark does.
pub fn shark(files: &[&Path]) -> Result<Shark> {
    let folder = tempfile::tempdir()?;
    let said = run(kshark(folder.path())?, &[], files)?;
    let mut found = Shark::default();
    for line in said.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["stream", _, entries, ..] => found.entries.push(entries.parse()?),
            ["map", host, guest, _name, ref threads @ ..] => {
                let threads = threads.iter().map(|tid| tid.parse()).collect::<Result<_, _>>()?;
                found.maps.push((host.parse()?, guest.parse()?, threads));
            }
            _ => bail!("unexpected: {line}"),
        }
    }
    Ok(found)
}
