//! Each sink with one lane, against the plain write of as many bytes into the same kind of file.
//!
//! In:    a lane of a guest made of a memory file
//! Out:   GB/s, and CPU seconds per GiB of the drain's thread, for each sink and file system
//! Runs:  driver on this thread, drain on its own; the baseline writes from this thread
//! Full:  buffered writes to a disk leave pages to be written back later: those of both ways alike

use std::fs::File;

use anyhow::Result;
use vtrace_dp::{
    drain::sink::{FileSink, Sink, direct::DirectSink},
    sys::direct::reopen,
};

use super::{alternately, drain::one_lane, pair};
use crate::{
    measure::{self, Cost},
    place::Place,
    rig::{lanes::Guest, plain},
    row::Row,
};

const BYTES: u64 = 1 << 30;
/// Bytes of one raw direct write.
const RAW_STEP: usize = 4 << 20;

/// A sink and the plain way it is held against.
pub(super) struct Way {
    name: &'static str,
    place: Place,
    sink: fn(&File) -> Result<Box<dyn Sink>>,
    plain: fn(Place, u64) -> Result<Cost>,
    plain_name: &'static str,
}

/// Every sink on every file system that it is for: a line each.
pub(super) const WAYS: &[Way] = &[
    Way { name: "buffered", place: Place::Memory, sink: buffered, plain: vectored, plain_name: "pwritev of 4 MiB" },
    Way { name: "buffered", place: Place::Disk, sink: buffered, plain: vectored, plain_name: "pwritev of 4 MiB" },
    Way { name: "direct", place: Place::Disk, sink: direct, plain: raw, plain_name: "O_DIRECT pwrite of 4 MiB" },
];

/// Measures `rounds` of each.
pub(crate) fn run(rounds: u32) -> Result<Vec<Row>> {
    measure(rounds, BYTES)
}

pub(super) fn measure(rounds: u32, bytes: u64) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for round in 0..rounds {
        for way in WAYS {
            let ours = || {
                // Kept: with the last descriptor the file's memory would go, within the time that is measured.
                let file = sparse(way.place.file()?, bytes)?;
                one_lane((way.sink)(&file)?, bytes)
            };
            let costs = alternately(round, ours, || (way.plain)(way.place, bytes))?;
            let what = format!("{}, {}", way.name, way.place.kind()?);
            rows.extend(pair("sink", &what, round, costs, way.plain_name));
        }
    }
    Ok(rows)
}

/// Reserves the file as a recording does: longer than everything that will be written.
fn sparse(file: File, bytes: u64) -> Result<File> {
    file.set_len(bytes)?;
    Ok(file)
}

fn buffered(file: &File) -> Result<Box<dyn Sink>> {
    Ok(Box::new(FileSink::new(file.try_clone()?)?))
}

fn direct(file: &File) -> Result<Box<dyn Sink>> {
    Ok(Box::new(DirectSink::new(file.try_clone()?, reopen(file)?)?))
}

fn vectored(place: Place, bytes: u64) -> Result<Cost> {
    let (guests, files): (_, [File; 1]) = ([Guest::new(1)?], [sparse(place.file()?, bytes)?]);
    Cost::of(bytes, measure::thread, || plain::vectored(&guests, &files, bytes))
}

fn raw(place: Place, bytes: u64) -> Result<Cost> {
    let (memory, file) = (plain::memory(2 * RAW_STEP)?, sparse(place.direct_file()?, bytes)?);
    Cost::of(bytes, measure::thread, || plain::steps(&memory, &file, bytes, RAW_STEP))
}
