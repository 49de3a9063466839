//! A tracefs instance whose ring buffer is filled on purpose: the load of `pump` and `guest`.
//!
//! In:    CPUs, how much
//! Out:   full pages of marker events, waiting; tracing is off
//! Runs:  on the caller's thread, which moves to the CPU it fills
//! Trust: the kernel: what its stats call bytes is what there is to be moved

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use nix::{
    libc::O_NONBLOCK,
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use vtrace_common::ids::Cpu;
use vtrace_dp::tracefs::{INSTANCE_PREFIX, Tap, Tracefs, stats::Stats};

/// An event that fills most of a page on kernels that allow it, else a quarter.
const EVENT_BYTES: usize = 3900;
/// Events between two looks at the stats.
const EVENTS_A_LOOK: usize = 256;
/// What they take: a page each.
const LOOK_KB: u64 = 1024;

/// An instance.
#[derive(Debug)]
pub(crate) struct Source {
    path: PathBuf,
    cpus: Vec<Cpu>,
    stays: bool,
}

impl Source {
    /// An instance of this process with room for `bytes` on each of `cpus`. Gone when it is dropped; taps are to be
    /// closed before.
    pub(crate) fn new(name: &str, cpus: Vec<Cpu>, bytes: u64) -> Result<Self> {
        Self::open_or_make(&format!("{}-bench-{name}", std::process::id()), cpus, bytes, false)
    }

    /// The instance `name`, made if it is not there; it stays.
    pub(crate) fn lasting(name: &str, cpus: Vec<Cpu>, bytes: u64) -> Result<Self> {
        Self::open_or_make(name, cpus, bytes, true)
    }

    fn open_or_make(name: &str, cpus: Vec<Cpu>, bytes: u64, stays: bool) -> Result<Self> {
        let tracefs = Tracefs::find_or_mount().map_err(|failure| anyhow::anyhow!("{failure:?}"))?;
        let path = tracefs.root().join("instances").join(format!("{INSTANCE_PREFIX}{name}"));
        let source = Self { path, cpus, stays };
        if !source.path.exists() {
            fs::create_dir(&source.path).context("an instance cannot be made")?;
            source.write("tracing_on", "0")?;
            source.write("buffer_percent", &vtrace_dp::tracefs::BUFFER_PERCENT.to_string())?;
            // An eighth more, because pages are never quite full, and what may come between two looks.
            let kilobytes = (bytes + bytes / 8) / 1024 + 2 * LOOK_KB;
            for cpu in &source.cpus {
                source.write(&format!("per_cpu/{cpu}/buffer_size_kb"), &kilobytes.to_string())?;
            }
        }
        Ok(source)
    }

    /// Fills the buffer of each CPU with at least `bytes` of events.
    pub(crate) fn fill(&self, bytes: u64) -> Result<()> {
        let before = sched_getaffinity(Pid::from_raw(0))?;
        self.write("tracing_on", "1")?;
        let filled = self.cpus.iter().try_for_each(|cpu| self.fill_cpu(*cpu, bytes));
        self.write("tracing_on", "0")?;
        sched_setaffinity(Pid::from_raw(0), &before)?;
        filled
    }

    fn fill_cpu(&self, cpu: Cpu, bytes: u64) -> Result<()> {
        let mut set = CpuSet::new();
        set.set(usize::try_from(cpu.0)?)?;
        sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("cannot move to {cpu}"))?;
        let mut marker = self.open("trace_marker")?;
        let event = vec![b'.'; EVENT_BYTES];
        loop {
            for _ in 0..EVENTS_A_LOOK {
                // What does not fit an event is cut off; not written again.
                let _ = marker.write(&event)?;
            }
            let stats = self.stats(cpu)?;
            ensure!(stats.overrun == 0, "{cpu}: the ring buffer is too small for {bytes} bytes");
            if stats.bytes >= bytes {
                return Ok(());
            }
        }
    }

    /// The kernel's counts of one CPU.
    pub(crate) fn stats(&self, cpu: Cpu) -> Result<Stats> {
        Ok(Stats::parse(&fs::read_to_string(self.path.join(format!("per_cpu/{cpu}/stats")))?)?)
    }

    /// A tap on each CPU.
    pub(crate) fn taps(&self) -> Result<Vec<Tap>> {
        let tap = |cpu: &Cpu| {
            let path = self.path.join(format!("per_cpu/{cpu}/trace_pipe_raw"));
            let file = File::options().read(true).custom_flags(O_NONBLOCK).open(path)?;
            Ok(Tap { cpu: *cpu, fd: file.into() })
        };
        self.cpus.iter().map(tap).collect()
    }

    /// Writes one of its files.
    pub(crate) fn write(&self, name: &str, words: &str) -> Result<()> {
        self.open(name)?.write_all(words.as_bytes()).with_context(|| format!("{words} into {name}"))
    }

    fn open(&self, name: &str) -> Result<File> {
        let path: &Path = &self.path.join(name);
        OpenOptions::new().write(true).open(path).with_context(|| format!("cannot open {}", path.display()))
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        if self.stays {
            return;
        }
        if let Err(error) = fs::remove_dir(&self.path) {
            eprintln!("{} stays: {error}", self.path.display());
        }
    }
}
