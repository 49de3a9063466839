//! What this machine can do at all: other cases are read against these.
//!
//! In:    memory of our own; files that begin empty
//! Out:   GB/s of each way beside a plain copy in memory
//! Runs:  on this thread

use std::os::fd::AsFd;

use anyhow::{Result, ensure};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vtrace_dp::sys::splice::{Pipe, SpliceFlags, splice, tee};

use crate::{
    measure::{Cost, thread},
    place::Place,
    rig::plain,
    row::Row,
};

const BYTES: u64 = 512 << 20;
const MIB: usize = 1 << 20;
/// Memory that is written from: more than a processor caches.
const MEMORY: usize = 64 * MIB;

/// Measures `rounds` of each.
pub(crate) fn run(rounds: u32) -> Result<Vec<Row>> {
    measure(rounds, BYTES)
}

pub(super) fn measure(rounds: u32, bytes: u64) -> Result<Vec<Row>> {
    let memory = plain::memory(MEMORY)?;
    let mut copy = plain::memory(MEMORY)?;
    let (tmpfs, disk) = (Place::Memory.kind()?, Place::Disk.kind()?);
    let mut rows = Vec::new();
    for round in 0..rounds {
        let timed =
            |work: &mut dyn FnMut() -> Result<()>| Ok::<_, anyhow::Error>(Cost::of(bytes, thread, work)?.gb_per_s);
        let write = |place: Place| timed(&mut || plain::steps(&memory, &place.file()?, bytes, MIB));
        let direct = |step: usize| timed(&mut || plain::steps(&memory, &Place::Disk.direct_file()?, bytes, step));
        let memcpy = timed(&mut || copied(&memory, &mut copy, bytes))?;
        let figures = [
            ("memcpy".to_owned(), memcpy),
            (format!("pwrite of 1 MiB, {tmpfs}"), write(Place::Memory)?),
            (format!("pwrite of 1 MiB, {disk}"), write(Place::Disk)?),
            (format!("O_DIRECT of 1 MiB, {disk}"), direct(MIB)?),
            (format!("O_DIRECT of 4 MiB, {disk}"), direct(4 * MIB)?),
            (format!("splice of 1 MiB from a pipe, {tmpfs}"), timed(&mut || spliced(bytes))?),
        ];
        for (metric, gb_per_s) in figures {
            rows.push(Row::new("ceilings", metric, round, "GB/s", [gb_per_s, memcpy]).beside("memcpy"));
        }
    }
    Ok(rows)
}

fn copied(from: &[u8], to: &mut [u8], bytes: u64) -> Result<()> {
    for index in 0..usize::try_from(bytes)? / MIB {
        let place = index % (MEMORY / MIB) * MIB;
        to[place..place + MIB].copy_from_slice(&from[place..place + MIB]);
    }
    Ok(())
}

/// One full pipe is doubled into another, which is spliced into a file: no copy but the last.
fn spliced(bytes: u64) -> Result<()> {
    let (source, pipe, file) = (Pipe::new(MIB)?, Pipe::new(MIB)?, Place::Memory.file()?);
    fcntl(&pipe.reader, FcntlArg::F_SETFL(OFlag::empty()))?;
    let full = nix::unistd::write(&source.writer, &vec![0xa5; source.bytes_max])?;
    let (mut offset, none) = (0, SpliceFlags::empty());
    while offset < bytes {
        let mut left = tee(source.reader_fd(), pipe.writer_fd(), full, none)?;
        ensure!(left > 0, "an empty pipe");
        while left > 0 {
            left -= splice(pipe.reader_fd(), file.as_fd(), Some(&mut offset), left, SpliceFlags::SPLICE_F_MOVE)?;
        }
    }
    Ok(())
}
