//! From stop to a usable file, beside stock trace-cmd's own copy of as many bytes.
//!
//! In:    4 GiB of sound pages in 8 lanes, written as fast as this machine takes them, on a disk (the temporary folder)
//!        and on a tmpfs (/dev/shm)
//! Out:   seconds: of ours, from the last page to the file with its name, pages written back during the recording; of
//!        trace-cmd, `restore` of files of the same bytes, which is the copy that `record` does at its end
//! Runs:  both in the same folder, one after the other; the baseline's files are in the page cache as after a recording

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use vtrace_common::ids::Cpu;
use vtrace_dp::{drain::sink::writeback::Writeback, ftrace::metadata::Metadata, trace::write::Writer};

use super::alternately;
use crate::row::Row;

const LANES: u32 = 8;
const LANE_BYTES: u64 = 512 << 20;
const CHUNK_BYTES: u64 = 1 << 20;

/// Measures `rounds` pairs on each file system.
pub(super) fn run(rounds: u32) -> Result<Vec<Row>> {
    measure(rounds, LANE_BYTES)
}

/// The same with lanes of so many bytes, a multiple of [`CHUNK_BYTES`].
pub(super) fn measure(rounds: u32, lane_bytes: u64) -> Result<Vec<Row>> {
    let places = [("disk", std::env::temp_dir()), ("tmpfs", PathBuf::from("/dev/shm"))];
    let mut rows = Vec::new();
    for round in 0..rounds {
        for (metric, place) in &places {
            let folder = place.join(format!("vtrace-bench-{}", std::process::id()));
            fs::create_dir_all(&folder)?;
            let pair = alternately(round, || ours(&folder, lane_bytes), || stock(&folder, lane_bytes));
            fs::remove_dir_all(&folder)?;
            let metric = format!("seconds, 4 GiB, {metric}");
            rows.push(Row::new("finish", metric, round, "s", pair?).beside("trace-cmd"));
        }
    }
    Ok(rows)
}

/// Pages with one event each.
fn chunk() -> Result<Vec<u8>> {
    let mut chunk = Vec::new();
    while u64::try_from(chunk.len())? < CHUNK_BYTES {
        let begin = chunk.len();
        chunk.extend([1_000_000u64.to_le_bytes(), 8u64.to_le_bytes()].concat());
        chunk.extend([1u32.to_le_bytes(), 7u32.to_le_bytes()].concat());
        chunk.resize(begin + 4096, 0x5a);
    }
    Ok(chunk)
}

fn ours(folder: &Path, lane_bytes: u64) -> Result<f64> {
    nix::unistd::sync(); // what came before is no part of this
    let (path, named) = (folder.join("trace.dat.new"), folder.join("trace.dat"));
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    let cpus: Vec<Cpu> = (0..LANES).map(Cpu).collect();
    let again = file.try_clone()?;
    let writer = Writer::create(again, &Metadata::default(), "x86-tsc", 4096, &cpus)?;
    let writeback = Writeback::start(vec![file.try_clone()?]);
    let chunk = chunk()?;
    for at in (0..lane_bytes).step_by(usize::try_from(CHUNK_BYTES)?) {
        for area in writer.areas() {
            file.write_all_at(&chunk, area.offset + at)?;
        }
    }
    let filled: Vec<(Cpu, u64)> = cpus.into_iter().map(|cpu| (cpu, lane_bytes)).collect();
    let stopped = Instant::now();
    drop(writeback);
    let finished = writer.finish(&filled, b"", &[], "{}")?;
    fs::rename(&path, &named)?;
    let seconds = stopped.elapsed().as_secs_f64();
    ensure!(finished.bytes >= u64::from(LANES) * lane_bytes, "pages are missing: {finished:?}");
    fs::remove_file(&named)?;
    Ok(seconds)
}

fn stock(folder: &Path, lane_bytes: u64) -> Result<f64> {
    nix::unistd::sync();
    let head = folder.join("head.dat");
    trace_cmd(Command::new("trace-cmd").args(["restore", "-c", "-o"]).arg(&head))?;
    let chunk = chunk()?;
    let files: Vec<PathBuf> = (0..LANES).map(|cpu| folder.join(format!("out.dat.cpu{cpu}"))).collect();
    let open: Vec<File> = files.iter().map(File::create).collect::<Result<_, _>>()?;
    for at in (0..lane_bytes).step_by(usize::try_from(CHUNK_BYTES)?) {
        for file in &open {
            file.write_all_at(&chunk, at)?;
        }
    }
    let out = folder.join("out.dat");
    let stopped = Instant::now();
    trace_cmd(Command::new("trace-cmd").args(["restore", "-i"]).arg(&head).arg("-o").arg(&out).args(&files))?;
    let seconds = stopped.elapsed().as_secs_f64();
    let bytes = fs::metadata(&out).context("trace-cmd made no file")?.len();
    ensure!(bytes >= u64::from(LANES) * lane_bytes, "trace-cmd wrote {bytes} bytes only");
    for path in files.iter().chain([&head, &out]) {
        fs::remove_file(path)?;
    }
    Ok(seconds)
}

fn trace_cmd(command: &mut Command) -> Result<()> {
    let output = command.output().context("cannot run trace-cmd: apt-get install trace-cmd")?;
    ensure!(output.status.success(), "trace-cmd: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
