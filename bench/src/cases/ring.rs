//! The whole backend without a guest in the way: what it can do if the VMM and the guest cost nothing.
//!
//! In:    the `vhost` crate's frontend on a real socket, memory shared by descriptor, lanes driven by this process
//! Out:   GB/s, and CPU seconds per GiB of device and drain, into nothing and into a file
//! Runs:  device and drain as in `vtrace server`, the driver on this thread; the baseline writes from this thread

use std::{fs::File, os::unix::net::UnixStream};

use anyhow::Result;
use vtrace_dp::drain::sink::{FileSink, NullSink, Sink};

use super::{alternately, pair};
use crate::{
    measure::{self, Cost},
    place::Place,
    rig::{
        backend::{Backend, attach, finish},
        lanes::{Guest, PAGE},
        plain,
    },
    row::Row,
};

const BYTES: u64 = 1 << 30;
const LANES: u32 = 2;

/// A sink by its name, made for a file.
pub(super) type Way = (&'static str, fn(&File) -> Result<Box<dyn Sink>>);

pub(super) const WAYS: &[Way] =
    &[("null sink", |_| Ok(Box::new(NullSink))), ("tmpfs", |file| Ok(Box::new(FileSink::new(file.try_clone()?)?)))];

/// Measures `rounds` of each.
pub(crate) fn run(rounds: u32) -> Result<Vec<Row>> {
    measure(rounds, BYTES)
}

pub(super) fn measure(rounds: u32, bytes: u64) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for round in 0..rounds {
        for (name, sink) in WAYS {
            // Kept: with the last descriptor the file's memory would go, within the time that is measured.
            let file = Place::Memory.file()?;
            let costs = alternately(round, || through(sink(&file)?, bytes), || plainly(bytes))?;
            rows.extend(pair("ring", name, round, costs, "pwritev of 4 MiB to tmpfs"));
        }
    }
    Ok(rows)
}

fn through(sink: Box<dyn Sink>, bytes: u64) -> Result<Cost> {
    let bytes_each = bytes / u64::from(LANES);
    let mut guest = Guest::new(LANES)?;
    let (theirs, ours) = UnixStream::pair()?;
    let backend = Backend::connected("bench", ours)?;
    let _frontend = attach(theirs, &guest)?;
    backend.drain.attach_sink(sink, PAGE, guest.areas(bytes_each))?;
    Cost::of(bytes, cpu, || {
        guest.send(bytes_each)?;
        finish(&backend.drain, guest.ends(bytes_each))
    })
}

fn cpu() -> Result<std::time::Duration> {
    Ok(measure::threads("vt-drain/bench")? + measure::threads("vt-dev/bench")?)
}

fn plainly(bytes: u64) -> Result<Cost> {
    let (guests, files) = ([Guest::new(LANES)?], [Place::Memory.file()?]);
    Cost::of(bytes, measure::thread, || plain::vectored(&guests, &files, bytes / u64::from(LANES)))
}
