//! Ring ─► lane ─► sink beside the same bytes written plainly, and many lanes beside one.
//!
//! In:    guests made of memory files; lanes of 128 chains of 64 KiB, each of 4 KiB pages with sound headers
//! Out:   GB/s of all lanes together, CPU seconds per GiB of the drains' threads alone
//! Runs:  a driver and a drain a guest, on threads of their own; the baseline writes from this thread, 4 MiB a call, the
//!        same memory into the same kind of file

use std::{fs::File, sync::Arc, thread};

use anyhow::{Context, Result};
use vtrace_common::ids::{Cpu, GuestId};
use vtrace_dp::{
    drain::{
        ring::RingDrain,
        sink::{FileSink, Sink},
    },
    virtq::{ring::Ring, testing::memory_file},
};

use super::{alternately, pair};
use crate::{
    measure::{self, Cost},
    rig::{
        backend::finish,
        lanes::{CHAIN, Guest, PAGE},
        plain,
    },
    row::Row,
};

/// Of all lanes together.
const BYTES: u64 = 1 << 30;

/// How many guests with how many lanes each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Shape {
    pub(super) guests: u32,
    pub(super) lanes: u32,
}

const SHAPES: [Shape; 6] = [
    Shape { guests: 1, lanes: 1 },
    Shape { guests: 1, lanes: 8 },
    Shape { guests: 1, lanes: 64 },
    Shape { guests: 4, lanes: 16 },
    Shape { guests: 8, lanes: 8 },
    Shape { guests: 4, lanes: 64 },
];

impl Shape {
    fn said(self) -> String {
        let word = |count: u32, one: &str| if count == 1 { format!("1 {one}") } else { format!("{count} {one}s") };
        format!("{} of {}", word(self.guests * self.lanes, "lane"), word(self.guests, "guest"))
    }

    /// Bytes of each lane when all have `bytes` together, in whole chains.
    fn bytes_each(self, bytes: u64) -> u64 {
        (bytes / u64::from(self.guests * self.lanes)).next_multiple_of(u64::from(CHAIN))
    }
}

/// Measures `rounds` of each shape; the first is what the others are held against.
pub(crate) fn run(rounds: u32) -> Result<Vec<Row>> {
    measure(rounds, BYTES, &SHAPES)
}

pub(super) fn measure(rounds: u32, bytes: u64, shapes: &[Shape]) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for round in 0..rounds {
        let mut alone = None;
        for shape in shapes {
            let [ours, plain] = once(round, *shape, bytes)?;
            rows.extend(pair("drain", &shape.said(), round, [ours, plain], "pwritev of 4 MiB"));
            match alone {
                None => alone = Some(ours.gb_per_s),
                Some(alone) => {
                    let metric = format!("against 1 lane, {}", shape.said());
                    rows.push(Row::new("drain", metric, round, "GB/s", [ours.gb_per_s, alone]).beside("1 lane"));
                }
            }
        }
    }
    Ok(rows)
}

fn once(round: u32, shape: Shape, bytes: u64) -> Result<[Cost; 2]> {
    let bytes_each = shape.bytes_each(bytes);
    let all = bytes_each * u64::from(shape.guests * shape.lanes);
    let guests = || (0..shape.guests).map(|_| Guest::new(shape.lanes)).collect::<Result<Vec<_>>>();
    let files = || (0..shape.guests).map(|_| Ok(memory_file(0)?)).collect::<Result<Vec<File>>>();
    let ours = || through(guests()?, files()?, bytes_each, all);
    let plainly = || {
        let (guests, files) = (guests()?, files()?);
        Cost::of(all, measure::thread, || plain::vectored(&guests, &files, bytes_each))
    };
    alternately(round, ours, plainly)
}

fn through(mut guests: Vec<Guest>, files: Vec<File>, bytes_each: u64, all: u64) -> Result<Cost> {
    // With the last descriptor the file's memory would go, on the drain's thread, within the time that is measured.
    let _kept: Vec<File> = files.iter().map(File::try_clone).collect::<std::io::Result<_>>()?;
    let drains: Vec<RingDrain> = guests
        .iter()
        .zip(files)
        .map(|(guest, file)| start(guest, Box::new(FileSink::new(file)?), bytes_each))
        .collect::<Result<_>>()?;
    Cost::of(
        all,
        || Ok(measure::threads("vt-drain/")? + measure::io_workers()?),
        || {
            thread::scope(|scope| {
                let drivers: Vec<_> = guests
                    .iter_mut()
                    .map(|guest| {
                        thread::Builder::new().name("driver".into()).spawn_scoped(scope, || guest.send(bytes_each))
                    })
                    .collect::<std::io::Result<_>>()?;
                drivers.into_iter().try_for_each(|driver| driver.join().ok().context("a driver panicked")?)
            })?;
            guests.iter().zip(&drains).try_for_each(|(guest, drain)| finish(drain, guest.ends(bytes_each)))
        },
    )
}

/// A drain whose lanes go to `sink`, `bytes_each` at most.
fn start(guest: &Guest, sink: Box<dyn Sink>, bytes_each: u64) -> Result<RingDrain> {
    let drain = RingDrain::spawn(GuestId(0), "bench")?;
    for (lane, cpu) in guest.lanes.iter().zip(0..) {
        drain.ring_started(Cpu(cpu), Ring::start(lane.driver.setup(0), Arc::clone(&guest.memory))?);
    }
    drain.attach_sink(sink, PAGE, guest.areas(bytes_each))?;
    Ok(drain)
}

/// One lane of one guest through `sink`.
pub(super) fn one_lane(sink: Box<dyn Sink>, bytes: u64) -> Result<Cost> {
    let mut guest = Guest::new(1)?;
    let drain = start(&guest, sink, bytes)?;
    Cost::of(
        bytes,
        || Ok(measure::threads("vt-drain/")? + measure::io_workers()?),
        || {
            guest.send(bytes)?;
            finish(&drain, guest.ends(bytes))
        },
    )
}
