//! Ring ─► lane ─► sink beside the same bytes written plainly.
//!
//! In:    a guest made of a memory file: one lane of 128 chains of 64 KiB, each of 4 KiB pages with sound headers
//! Out:   GB/s and CPU seconds per GiB; the CPU of the drain's side holds that of the guest's driver too
//! Runs:  driver on this thread, drain on its own; the baseline writes from this thread, 4 MiB a call, the same memory

use std::{
    os::fd::AsFd,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::time::{ClockId, clock_gettime};
use vtrace_common::{
    ids::{Cpu, GuestId},
    wire::client::{Area, LaneEnd, LaneLedger},
};
use vtrace_dp::{
    device::{
        memory::{Batch, Memory, Span},
        ring::Ring,
        testing::{Driver, guest_memory, memory_file},
    },
    drain::{Drain, sink::FileSink},
};

use crate::row::Row;

const PAGE: u32 = 4096;
const BUFFER: u32 = 64 << 10;
const ENTRIES: u16 = 128;
const BYTES: u64 = 2 << 30;
const GIB: f64 = 1_073_741_824.0;

/// What moving [`BYTES`] took.
struct Cost {
    gb_per_s: f64,
    cpu_s_per_gib: f64,
}

impl Cost {
    fn of(move_all: impl FnOnce() -> Result<()>) -> Result<Self> {
        let (begun, cpu_begun) = (Instant::now(), cpu()?);
        move_all()?;
        let (elapsed, spent) = (begun.elapsed().as_secs_f64(), (cpu()? - cpu_begun).as_secs_f64());
        let gib = f64::from(u32::try_from(BYTES >> 30)?);
        Ok(Self { gb_per_s: gib * GIB / 1e9 / elapsed, cpu_s_per_gib: spent / gib })
    }
}

/// CPU time of all threads of this process.
fn cpu() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?.into())
}

/// Measures `rounds` pairs.
pub(crate) fn run(rounds: u32) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for round in 0..rounds {
        let (plain, ours) = (plain()?, through_drain()?);
        rows.push(Row::new("drain", "throughput", round, "GB/s", [ours.gb_per_s, plain.gb_per_s]));
        rows.push(Row::new("drain", "cpu", round, "s/GiB", [ours.cpu_s_per_gib, plain.cpu_s_per_gib]));
    }
    Ok(rows)
}

/// Where the guest's buffers begin.
fn buffers() -> u64 {
    Driver::footprint(ENTRIES, BUFFER) - u64::from(ENTRIES) * u64::from(BUFFER)
}

/// A guest with one lane whose buffers hold sound pages.
fn guest() -> Result<(Arc<Memory>, Driver)> {
    let bytes = Driver::footprint(ENTRIES, BUFFER);
    let memory = guest_memory(&[(0, bytes)]);
    for gpa in (buffers()..bytes).step_by(usize::try_from(PAGE)?) {
        memory.copy_in(Span { gpa: gpa + 8, bytes: 8 }, &4000u64.to_le_bytes())?;
    }
    let driver = Driver::new(Arc::clone(&memory), 0, ENTRIES, BUFFER, true);
    Ok((memory, driver))
}

fn through_drain() -> Result<Cost> {
    let (memory, mut driver) = guest()?;
    let drain = Drain::spawn(GuestId(0), "bench")?;
    drain.ring_started(Cpu(0), Ring::start(driver.setup(0), memory)?);
    let area = Area { cpu: Cpu(0), offset: 0, bytes_max: 1 << 40 };
    drain.attach_sink(Box::new(FileSink::new(memory_file(0)?)?), PAGE, vec![area])?;
    Cost::of(|| {
        for _ in 0..BYTES / u64::from(BUFFER) {
            driver.send_again_blocking(BUFFER, PAGE);
        }
        let ledger = finish(&drain)?;
        ensure!(ledger.pages_out == BYTES / u64::from(PAGE), "pages are missing: {ledger:?}");
        Ok(())
    })
}

fn finish(drain: &Drain) -> Result<LaneLedger> {
    let (done, ledgers) = mpsc::channel();
    let ends = vec![LaneEnd { cpu: Cpu(0), bytes_sent: BYTES }];
    drain.finish(ends, 60_000, Box::new(move |lanes| drop(done.send(lanes))));
    let lanes = ledgers.recv_timeout(Duration::from_secs(60))?;
    lanes.first().copied().context("a ledger of the lane")
}

/// The same writes without ring, drain or guest: 64 chains of 16 pages at a time.
fn plain() -> Result<Cost> {
    let (memory, _driver) = guest()?;
    let file = memory_file(0)?;
    let mut batch = Batch::new(memory);
    let step = 64 * u64::from(BUFFER);
    let pair = usize::try_from(2 * PAGE)?;
    Cost::of(|| {
        for offset in (0..BYTES).step_by(usize::try_from(step)?) {
            let base = buffers() + offset / step % 2 * step;
            // Every second page first, so that the kernel gets as many entries as from a real guest.
            for page in (0..step).step_by(pair).chain((u64::from(PAGE)..step).step_by(pair)) {
                ensure!(batch.push(Span { gpa: base + page, bytes: PAGE })?, "a batch holds 1024 pages");
            }
            ensure!(batch.write_at(file.as_fd(), offset).fault.is_none(), "a write failed");
            batch.clear();
        }
        Ok(())
    })
}
