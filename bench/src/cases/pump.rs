//! The agent's pump alone on this machine's tracefs, against splice(2) of 64 KiB as trace-cmd's recorder does it.
//!
//! In:    ring buffers filled beforehand, tracing off; a pipe for each CPU as its port, emptied into /dev/null
//! Out:   GB/s; CPU seconds per GiB of the process, io_uring's kernel workers included and those that empty the pipes
//!        not; system calls per MiB, counted by the kernel's own tracepoint in a pass of its own
//! Runs:  pump or recorders on threads of their own, one more for each port

use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result, ensure};
use crossbeam::channel::Sender;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vtrace_common::ids::Cpu;
use vtrace_dp::{
    agent::testing::Pumping,
    sys::splice::{Pipe, SpliceFlags, splice},
    tracefs::online_cpus,
};

use super::alternately;
use crate::{
    measure::{self, Cost, real},
    rig::{lanes::PAGE, source::Source, stock},
    row::Row,
};

/// On each CPU.
const BYTES: u64 = 128 << 20;
/// What the threads are called whose CPU does not count.
const READERS: &str = "port-reader";
const PLAIN: &str = "splice(2) of 64 KiB";

/// A way to move what waits in the taps: bytes moved.
type Way = fn(&Source, Vec<OwnedFd>) -> Result<u64>;

/// Measures `rounds` pairs.
pub(crate) fn run(rounds: u32) -> Result<Vec<Row>> {
    measure(rounds, BYTES)
}

pub(super) fn measure(rounds: u32, bytes: u64) -> Result<Vec<Row>> {
    let cpus = online_cpus().context("sysfs names no CPUs")?;
    let source = Source::new("pump", cpus, bytes)?;
    let mut rows = Vec::new();
    for round in 0..rounds {
        let [ours, plain] = alternately(round, || cost(&source, bytes, pumped), || cost(&source, bytes, spliced))?;
        let throughput = [ours.gb_per_s, plain.gb_per_s];
        let cpu = [ours.cpu_s_per_gib, plain.cpu_s_per_gib];
        let calls = alternately(round, || calls(&source, bytes, pumped), || calls(&source, bytes, spliced))?;
        rows.push(Row::new("pump", "throughput", round, "GB/s", throughput).beside(PLAIN));
        rows.push(Row::new("pump", "cpu", round, "s/GiB", cpu).beside(PLAIN));
        rows.push(Row::new("pump", "system calls", round, "1/MiB", calls).beside(PLAIN));
    }
    Ok(rows)
}

fn cost(source: &Source, bytes: u64, way: Way) -> Result<Cost> {
    source.fill(bytes)?;
    let cpus = source.taps()?.len();
    let (ports, readers) = ports(cpus)?;
    let cpu = || Ok(measure::process()?.saturating_sub(measure::threads(READERS)?));
    let cost = Cost::of_moving(cpu, || {
        let moved = way(source, ports)?;
        ensure!(moved >= bytes, "{moved} of {bytes} bytes were moved");
        Ok(moved)
    })?;
    readers.end()?;
    Ok(cost)
}

/// System calls per MiB of everything but the readers.
fn calls(source: &Source, bytes: u64, way: Way) -> Result<f64> {
    let counter = Source::new("calls", Vec::new(), 0)?;
    source.fill(bytes)?;
    let cpus = online_cpus().context("sysfs names no CPUs")?;
    let (ports, readers) = ports(cpus.len())?;
    counter.write("events/raw_syscalls/sys_enter/filter", "comm ~ \"vt-pump*\" || comm == \"stock-splice\"")?;
    counter.write("events/raw_syscalls/sys_enter/enable", "1")?;
    counter.write("tracing_on", "1")?;
    let moved = way(source, ports)?;
    counter.write("tracing_on", "0")?;
    readers.end()?;
    let count = |cpu: &Cpu| counter.stats(*cpu).map(|stats| stats.entries + stats.overrun);
    let calls: u64 = cpus.iter().map(count).sum::<Result<_>>()?;
    Ok(real(calls) / (real(moved) / real(1 << 20)))
}

/// Ours.
fn pumped(source: &Source, ports: Vec<OwnedFd>) -> Result<u64> {
    Ok(Pumping::start(source.taps()?.into_iter().zip(ports).collect(), PAGE)?.finish()?)
}

/// A recorder for each CPU, as trace-cmd has.
fn spliced(source: &Source, ports: Vec<OwnedFd>) -> Result<u64> {
    let recorder = |(tap, port): (vtrace_dp::tracefs::Tap, OwnedFd)| {
        let work = move || stock::empty(tap.fd.as_fd(), port.as_fd());
        thread::Builder::new().name("stock-splice".into()).spawn(work)
    };
    let recorders = source.taps()?.into_iter().zip(ports).map(recorder).collect::<std::io::Result<Vec<_>>>()?;
    recorders.into_iter().map(|recorder| recorder.join().ok().context("a recorder panicked")?).sum()
}

/// Threads that throw away what comes out of ports. They outlive the measurement, so that their CPU can be told.
struct Readers {
    threads: Vec<JoinHandle<Result<()>>>,
    held: Sender<()>,
}

impl Readers {
    /// Ends them; their ports are closed.
    fn end(self) -> Result<()> {
        drop(self.held);
        self.threads.into_iter().try_for_each(|thread| thread.join().ok().context("a reader panicked")?)
    }
}

/// A blocking pipe for each CPU, as large as what is on its way at most: a port takes a whole pipe at a time.
fn ports(count: usize) -> Result<(Vec<OwnedFd>, Readers)> {
    let (mut ports, mut threads) = (Vec::new(), Vec::new());
    let (held, release) = crossbeam::channel::bounded(0);
    for _ in 0..count {
        let Pipe { reader, writer, .. } = Pipe::new(1 << 20)?;
        for end in [&reader, &writer] {
            fcntl(end, FcntlArg::F_SETFL(OFlag::empty()))?;
        }
        let null = File::options().write(true).open("/dev/null")?;
        let release = release.clone();
        let read = move || {
            while splice(reader.as_fd(), null.as_fd(), None, 1 << 20, SpliceFlags::SPLICE_F_MOVE)? > 0 {}
            // Ends when its last holder closes it.
            let _ = release.recv();
            Ok(())
        };
        threads.push(thread::Builder::new().name(READERS.into()).spawn(read)?);
        ports.push(writer);
    }
    Ok((ports, Readers { threads, held }))
}
