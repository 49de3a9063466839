//! Host lanes beside stock `trace-cmd record`: the same events, from the same load.
//!
//! In:    a load of this process's own: a thread for each CPU makes a fixed number of system calls that nothing else
//!        makes, in bursts with a pause between them, or writes a fixed number of markers as fast as it can
//! Out:   CPU seconds of the recording program and its children (start, description and end included) for each GiB of
//!        events in its file, what an idle recording costs, and the share of events that each side lost
//! Runs:  both programs as a person runs them, stopped with Ctrl-C, in turns. Each pair runs once: no pair is repeated
//!        because a side lost events; the losses of both sides are rows of their own
//! Trust: each side's own count of lost events
//!
//! Where this machine forbids files that trace-cmd requires (`ftrace_enabled`, `set_ftrace_*`), a mount namespace
//! shows it empty files in their place.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::{
        resource::{UsageWho, getrusage},
        signal::{Signal, kill},
        time::TimeValLike,
        uio::process_vm_readv,
    },
    unistd::Pid,
};
use vtrace_dp::tracefs::{Tracefs, online_cpus};

use crate::row::Row;

/// The events of [`Load::Calls`]: a system call that no other program makes.
const EVENTS: [&str; 2] = ["syscalls:sys_enter_process_vm_readv", "syscalls:sys_exit_process_vm_readv"];
/// Bytes of one call in the ring buffer: records of 64 and 24 bytes, each with a header of 4.
const CALL_BYTES: f64 = 96.0;
/// Events of one call.
const CALL_EVENTS: f64 = 2.0;
const GIB: f64 = 1_073_741_824.0;
const MARKER: [u8; 1000] = [b'm'; 1000];
/// Calls between two pauses: 94 KiB of events, a rate that both recorders can sustain on two CPUs.
const BURST: u32 = 1000;
const PAUSE: Duration = Duration::from_millis(1);
/// Ring buffer of each CPU, for both sides, KiB.
const BUFFER: [&str; 2] = ["-b", "4096"];
const READY_MAX: Duration = Duration::from_secs(30);
/// Mounts the empty file `$1` over each ftrace file that cannot be written, then runs trace-cmd.
const STOCK: &str = "for file in /proc/sys/kernel/ftrace_enabled \
     $(ls -d /sys/kernel/tracing/set_ftrace_* /sys/kernel/tracing/set_graph_*); \
     do cat $file >$file || mount --bind $1 $file; done 2>/dev/null; shift; exec trace-cmd record \"$@\"";

/// The recording program.
#[derive(Clone, Copy)]
enum Side {
    Stock,
    Ours,
}

/// What is recorded, on every CPU.
#[derive(Clone, Copy)]
enum Load {
    Nothing,
    /// A number of system calls on each CPU, two events each.
    Calls(u32),
    /// A number of markers on each CPU, written to the recorder's own buffers.
    Markers(u32),
}

/// What a recording cost.
struct Cost {
    cpu_s: f64,
    stop_s: f64,
    events_lost: u64,
}

/// Measures `rounds` of each comparison.
pub(crate) fn run(rounds: u32) -> Result<Vec<Row>> {
    let vtrace = built()?;
    let (calls, markers) = (amount("CALLS", 8_000_000)?, amount("MARKERS", 1_000_000)?);
    let mut rows = Vec::new();
    for round in 0..rounds {
        let ours = record(&vtrace, (Side::Ours, &[]), Load::Nothing)?;
        let stock = record(&vtrace, (Side::Stock, &[]), Load::Nothing)?;
        let idle_s = [ours.cpu_s, stock.cpu_s];
        rows.push(row(round, "start and end cpu", "s", idle_s));
        for (options, pages) in [(&[][..], "4 KiB pages"), (&["--subbuf-size", "64"], "64 KiB pages")] {
            let ours = record(&vtrace, (Side::Ours, options), Load::Calls(calls))?;
            let stock = record(&vtrace, (Side::Stock, &[]), Load::Calls(calls))?;
            rows.extend(call_rows(round, pages, calls, [&ours, &stock], idle_s)?);
        }
        for (options, name) in [([&[][..], &[]], "markers"), ([&["--rt=1"], &["-r", "1"]], "markers, real time")] {
            let ours = record(&vtrace, (Side::Ours, options[0]), Load::Markers(markers))?;
            let stock = record(&vtrace, (Side::Stock, options[1]), Load::Markers(markers))?;
            let events = f64::from(markers) * lanes()?;
            rows.push(row(round, &format!("events lost, {name}"), "of 1", shares([&ours, &stock], events)?));
        }
    }
    Ok(rows)
}

/// The figures of a pair of recordings of [`Load::Calls`], ours first.
fn call_rows(round: u32, pages: &str, calls: u32, pair: [&Cost; 2], idle_s: [f64; 2]) -> Result<Vec<Row>> {
    let events = f64::from(calls) * lanes()? * CALL_EVENTS;
    let lost = shares(pair, events)?;
    let gib = lost.map(|share| (1.0 - share) * events / CALL_EVENTS * CALL_BYTES / GIB);
    let [ours, stock] = pair;
    let net_s = [ours.cpu_s - idle_s[0], stock.cpu_s - idle_s[1]];
    Ok(vec![
        row(round, &format!("events lost, {pages}"), "of 1", lost),
        row(round, &format!("cpu, {pages}"), "s/GiB", [ours.cpu_s / gib[0], stock.cpu_s / gib[1]]),
        row(round, &format!("net cpu, {pages}"), "s/GiB", [net_s[0] / gib[0], net_s[1] / gib[1]]),
        row(round, &format!("stop to a file, {pages}"), "s", [ours.stop_s, stock.stop_s]),
    ])
}

/// The share of `events` that each side lost.
fn shares([ours, stock]: [&Cost; 2], events: f64) -> Result<[f64; 2]> {
    Ok([real(ours.events_lost)? / events, real(stock.events_lost)? / events])
}

fn row(round: u32, metric: &str, unit: &str, figures: [f64; 2]) -> Row {
    Row::new("hostlanes", metric, round, unit, figures).beside("trace-cmd")
}

/// `VTRACE_BENCH_NAME`, for machines on which the usual amount says too little or takes too long.
fn amount(name: &str, usual: u32) -> Result<u32> {
    let Ok(text) = std::env::var(format!("VTRACE_BENCH_{name}")) else { return Ok(usual) };
    text.parse().with_context(|| format!("VTRACE_BENCH_{name}={text}"))
}

fn real(count: u64) -> Result<f64> {
    Ok(f64::from(u32::try_from(count)?))
}

fn lanes() -> Result<f64> {
    real(u64::try_from(cpus()?.len())?)
}

fn cpus() -> Result<Vec<usize>> {
    let online = online_cpus().context("which CPUs are online is not known")?;
    online.iter().map(|cpu| Ok(usize::try_from(cpu.0)?)).collect()
}

/// Builds the program that is measured, beside this one.
fn built() -> Result<PathBuf> {
    let cargo =
        Command::new("cargo").args(["build", "--release", "-q", "-p", "vtrace-dp", "--bin", "vtrace"]).status()?;
    ensure!(cargo.success(), "cargo build: {cargo}");
    let program = std::env::current_exe()?.with_file_name("vtrace");
    ensure!(program.exists(), "{} is not there: build with --release", program.display());
    Ok(program)
}

/// Records `load` in a folder of its own, on the file system of the work tree.
fn record(vtrace: &Path, (side, options): (Side, &[&str]), load: Load) -> Result<Cost> {
    let folder = std::env::current_dir()?.join("target").join(format!("hostlanes-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let cost = record_in(&folder, vtrace, (side, options), load);
    fs::remove_dir_all(&folder)?;
    nix::unistd::sync(); // what is left of one is not written while the next one runs
    cost
}

fn record_in(folder: &Path, vtrace: &Path, (side, options): (Side, &[&str]), load: Load) -> Result<Cost> {
    let used = cpu_of_children()?;
    let mut command = side.command(vtrace, folder)?;
    command.args(options).args(BUFFER).args(EVENTS.iter().flat_map(|event| ["-e", event])).current_dir(folder);
    let (out, said) = (File::create(folder.join("out"))?, File::create(folder.join("said"))?);
    let mut child = command.stdout(out).stderr(said).stdin(Stdio::null()).spawn()?;
    let begun = side.wait_until_tracing(&mut child);
    let loaded = begun.and_then(|traced| load.run(&traced));
    let stopped = Instant::now();
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGINT)?;
    let status = child.wait()?;
    loaded?;
    let (out, said) = (fs::read_to_string(folder.join("out"))?, fs::read_to_string(folder.join("said"))?);
    ensure!(status.success(), "{status}: {said}");
    let events_lost = side.events_lost(&out, &said)?;
    Ok(Cost { cpu_s: cpu_of_children()? - used, stop_s: stopped.elapsed().as_secs_f64(), events_lost })
}

/// CPU time of all processes that have ended and were waited for, theirs included.
fn cpu_of_children() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let us = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Duration::from_micros(u64::try_from(us)?).as_secs_f64())
}

impl Side {
    fn command(self, vtrace: &Path, folder: &Path) -> Result<Command> {
        let mut command = match self {
            Self::Ours => {
                let mut command = Command::new(vtrace);
                command.args(["record", "--json"]);
                command
            }
            Self::Stock => {
                let stand_in = folder.join("stand-in");
                fs::write(&stand_in, "1\n")?;
                let mut command = Command::new("unshare");
                command.args(["-m", "sh", "-c", STOCK, "sh"]).arg(stand_in);
                command
            }
        };
        command.args(["-o", "trace.dat"]);
        Ok(command)
    }

    /// The folder of the buffers in use, once tracing is on.
    fn wait_until_tracing(self, child: &mut Child) -> Result<PathBuf> {
        let root = Tracefs::find_or_mount().map_err(|failure| anyhow::anyhow!("{failure:?}"))?.root().to_owned();
        let begun = Instant::now();
        while begun.elapsed() < READY_MAX {
            ensure!(child.try_wait()?.is_none(), "the recorder has ended");
            let folder = match self {
                Self::Stock => Some(root.clone()),
                Self::Ours => instance(&root, child.id())?,
            };
            if let Some(folder) = folder
                && is_on(&folder.join("tracing_on"))
                && is_on(&folder.join("events/syscalls/sys_exit_process_vm_readv/enable"))
            {
                sleep(Duration::from_millis(200)); // its readers are being started
                return Ok(folder);
            }
            sleep(Duration::from_millis(10));
        }
        bail!("no tracing after {READY_MAX:?}")
    }

    fn events_lost(self, out: &str, said: &str) -> Result<u64> {
        match self {
            Self::Ours => {
                let summary: serde_json::Value = serde_json::from_str(out)?;
                let lanes = summary["machines"][0]["lanes"].as_array().context("no lanes in the summary")?;
                let lost = |lane: &serde_json::Value| lane["events_lost"].as_u64().context("no count of lost events");
                lanes.iter().map(lost).sum()
            }
            Self::Stock => {
                // CPU 0: 123 events lost
                let lines = said.lines().chain(out.lines()).filter_map(|line| line.strip_suffix(" events lost"));
                let number = |line: &str| Ok(line.rsplit(' ').next().unwrap_or_default().parse::<u64>()?);
                lines.map(number).sum()
            }
        }
    }
}

fn is_on(file: &Path) -> bool {
    fs::read_to_string(file).is_ok_and(|text| text.trim() == "1")
}

/// The instance of the recorder with this process id.
fn instance(root: &Path, pid: u32) -> Result<Option<PathBuf>> {
    let name = format!("vtrace-{pid}-");
    let mut entries = fs::read_dir(root.join("instances"))?.flatten();
    let ours = entries.find(|entry| entry.file_name().to_string_lossy().starts_with(&name));
    Ok(ours.map(|entry| entry.path()))
}

impl Load {
    /// Runs it to its end, on every CPU at the same time.
    fn run(self, traced: &Path) -> Result<()> {
        let marker = traced.join("trace_marker");
        let threads: Vec<_> = cpus()?
            .into_iter()
            .map(|cpu| {
                let marker = marker.clone();
                std::thread::spawn(move || self.run_on(cpu, &marker))
            })
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("a load does not panic"))
    }

    fn run_on(self, cpu: usize, marker: &Path) -> Result<()> {
        let mut cpus = CpuSet::new();
        cpus.set(cpu)?;
        sched_setaffinity(Pid::from_raw(0), &cpus)?;
        match self {
            Self::Nothing => {}
            Self::Calls(count) => {
                for number in 1..=count {
                    // An empty transfer: the cheapest call with six arguments.
                    let _ = process_vm_readv(Pid::this(), &mut [], &[]);
                    if number.is_multiple_of(BURST) {
                        sleep(PAUSE);
                    }
                }
            }
            Self::Markers(count) => {
                let mut marker = OpenOptions::new().write(true).open(marker)?;
                (0..count).try_for_each(|_| marker.write_all(&MARKER))?;
            }
        }
        Ok(())
    }
}
