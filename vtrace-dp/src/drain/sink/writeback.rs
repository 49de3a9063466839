//! Writes pages to the disk while the recording runs, so that little is left to be written at its end.
//!
//! In:    the files of a recording
//! Out:   their heads on the disk at once; then every [`STEP_BYTES`] the pages that are only in memory
//! Runs:  on a thread of its own that looks ten times a second, more often while much comes; asleep in between
//! Full:  a slow disk blocks this thread alone
//! Trust: nothing comes in
//!
//! Taking the holes out of a file makes ext4 and xfs write back the dirty pages after them and drop what they had
//! cached (`ext4_collapse_range()`, `xfs_flush_unmap_range()`). Done during the recording it costs the same work and no
//! time at the end. It also bounds what a power failure takes. POSIX_FADV_DONTNEED does both: it starts writing what is
//! dirty and drops what is written; a file system in memory ignores it.

use std::{
    fs::File,
    os::unix::fs::MetadataExt,
    sync::mpsc::{RecvTimeoutError, Sender, channel},
    thread::{Builder, JoinHandle},
    time::Duration,
};

use nix::{
    fcntl::{PosixFadviseAdvice, posix_fadvise},
    sys::signal::SigSet,
};

/// A file that has grown by this much is written back.
pub const STEP_BYTES: u64 = 16 << 20;
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// After a look that found a step.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Unit of `st_blocks`, whatever the file system's is.
const BLOCK_BYTES: u64 = 512;

/// Writes back until it is dropped.
#[derive(Debug)]
pub struct Writeback {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Writeback {
    /// Starts the thread. Without it a recording is as right, and ends later.
    pub fn start(files: Vec<File>) -> Self {
        let (stop, stopped) = channel();
        let run = move || {
            // They are for the thread that waits for them.
            let _ = SigSet::all().thread_block();
            for file in &files {
                let _ = file.sync_all();
            }
            let mut files: Vec<(File, u64)> = files.into_iter().map(|file| (file, 0)).collect();
            let mut wait = LOOK_EVERY;
            while stopped.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                let grown = files.iter_mut().filter_map(|(file, written)| write(file, written)).count();
                wait = if grown > 0 { LOOK_AGAIN } else { LOOK_EVERY };
            }
        };
        let thread = Builder::new().name("vt-writeback".into()).spawn(run);
        let thread = thread.inspect_err(|error| log::warn!("pages are not written back early: {error}")).ok();
        Self { stop: Some(stop), thread }
    }
}

impl Drop for Writeback {
    fn drop(&mut self) {
        drop(self.stop.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the write-back thread panicked");
        }
    }
}

/// Something if the file had grown by a step.
fn write(file: &File, written: &mut u64) -> Option<()> {
    let bytes = file.metadata().ok()?.blocks() * BLOCK_BYTES;
    if bytes < *written + STEP_BYTES {
        return None;
    }
    *written = bytes;
    // Advice: what is not taken costs time at the end, nothing else.
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    Some(())
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::FileExt, thread::sleep, time::Instant};

    use super::*;

    #[test]
    fn writeback_ends_when_it_is_dropped_and_takes_no_page_away() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let writeback = Writeback::start(vec![file.try_clone().unwrap()]);
        let bytes = vec![7; 1 << 20];
        for at in 0..(2 * STEP_BYTES) >> 20 {
            file.write_all_at(&bytes, at << 20).unwrap();
        }
        sleep(3 * LOOK_EVERY);
        let begun = Instant::now();
        drop(writeback);
        assert!(begun.elapsed() < Duration::from_secs(5));
        let mut back = vec![0; 1 << 20];
        for at in 0..(2 * STEP_BYTES) >> 20 {
            file.read_exact_at(&mut back, at << 20).unwrap();
            assert!(back == bytes, "every byte is where it was");
        }
    }
}
