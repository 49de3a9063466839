//! Crashes: a random instant, and what a disk has at it.

use std::{
    fs::{File, OpenOptions},
    os::{fd::AsFd, unix::fs::FileExt},
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::Result;
use nix::unistd::{Whence, lseek64};

/// Some milliseconds, another number each time.
pub fn some_time(ms_max: u32) -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("it is after 1970");
    Duration::from_millis(u64::from(now.subsec_micros() % ms_max))
}

/// What is in a file, hole by hole, in pieces of whole blocks: where it is, and the bytes. It may be written meanwhile.
pub fn each_piece(file: &Path, mut take: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
    let source = File::open(file)?;
    let (mut at, mut buffer) = (0, vec![0; 1 << 20]);
    while let Ok(data) = lseek64(source.as_fd(), at, Whence::SeekData) {
        let hole = lseek64(source.as_fd(), data, Whence::SeekHole)?;
        at = data;
        while at < hole {
            let bytes = usize::try_from(hole - at)?.min(buffer.len());
            source.read_exact_at(&mut buffer[..bytes], u64::try_from(at)?)?;
            take(u64::try_from(at)?, &buffer[..bytes])?;
            at += i64::try_from(bytes)?;
        }
    }
    Ok(())
}

/// Copies what is in a file while it is written: what a power failure leaves.
pub fn copy_now(from: &Path, to: &Path) -> Result<()> {
    let copy = OpenOptions::new().write(true).create_new(true).open(to)?;
    copy.set_len(from.metadata()?.len())?;
    each_piece(from, |at, bytes| Ok(copy.write_all_at(bytes, at)?))
}

/// Pages that a file has on its disk, whatever it says of itself: blocks that begin as a page does.
pub fn pages_on_disk(file: &Path) -> Result<u64> {
    let mut pages = 0;
    each_piece(file, |_, bytes| {
        for block in bytes.chunks_exact(4096) {
            let word = |at: usize| u64::from_le_bytes(block[at..at + 8].try_into().expect("eight bytes"));
            let is_page = (1 << 30..1 << 62).contains(&word(0)) && (1..=4080).contains(&(word(8) & 0x3fff_ffff));
            pages += u64::from(is_page);
        }
        Ok(())
    })?;
    Ok(pages)
}
