//! Ends a recording, or a guest's part of it, when a file reaches its size limit or cannot grow.
//!
//! In:    once a tick, the bytes of every file so far and whether a write has failed
//! Out:   [`Ended`] if the recording has to stop; the guests whose part has to stop
//! Runs:  pure
//!
//! `--max-file` guarantees that no lane takes more than the limit (its area ends there), and that the recording stops at
//! the tick that expects the next one to exceed it. A file can exceed the limit by the increase of its rate in the last
//! second, and by the contents of the ring buffers at the stop. `--max-guest-bytes` is the same for each guest's file,
//! and ends that guest's part only.

use serde::Serialize;

/// Why a recording ended before its command did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ended {
    /// A file has reached `--max-file`.
    FileSize,
    /// A write failed, most likely because the disk is full.
    CannotWrite,
}

/// One machine's file at a tick.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FileState {
    /// Bytes of pages in it.
    pub bytes: u64,
    /// A write has failed.
    pub failed: bool,
}

/// The growth of all files.
#[derive(Debug, Default)]
pub struct Limit {
    bytes_max: Option<u64>,
    guest_bytes_max: Option<u64>,
    last: Vec<u64>,
    /// Expected bytes of each file at the next tick.
    expected: Vec<u64>,
}

impl Limit {
    /// Limits for every file, and for guests' files, in bytes.
    pub fn new(bytes_max: Option<u64>, guest_bytes_max: Option<u64>) -> Self {
        Self { bytes_max, guest_bytes_max, ..Self::default() }
    }

    /// Indices of the guests whose part has to stop, as of the last tick. `guests`: their number; their files are the last.
    pub fn full_guests(&self, guests: usize) -> Vec<usize> {
        let Some(bytes_max) = self.guest_bytes_max else { return Vec::new() };
        let first = self.expected.len().saturating_sub(guests);
        let of_guests = self.expected.iter().skip(first).enumerate();
        of_guests.filter(|(_, expected)| **expected >= bytes_max).map(|(guest, _)| guest).collect()
    }

    /// Takes the files' sizes at a tick, the host's first.
    pub fn tick(&mut self, files: &[FileState]) -> Option<Ended> {
        self.expected = Vec::with_capacity(files.len());
        for (index, file) in files.iter().enumerate() {
            let before = self.last.get(index).copied().unwrap_or(0);
            self.expected.push(file.bytes.saturating_add(file.bytes.saturating_sub(before)));
        }
        let expected = self.expected.iter().copied().max().unwrap_or(0);
        self.last = files.iter().map(|file| file.bytes).collect();
        if files.iter().any(|file| file.failed) {
            return Some(Ended::CannotWrite);
        }
        self.bytes_max.is_some_and(|bytes_max| expected >= bytes_max).then_some(Ended::FileSize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(bytes: [u64; 2]) -> [FileState; 2] {
        bytes.map(|bytes| FileState { bytes, failed: false })
    }

    #[test]
    fn recording_stops_before_the_tick_that_would_pass_the_limit() {
        let mut limit = Limit::new(Some(100), None);
        assert_eq!(limit.tick(&files([10, 20])), None);
        assert_eq!(limit.tick(&files([20, 50])), None);
        assert_eq!(limit.tick(&files([30, 74])), None);
        assert_eq!(limit.tick(&files([40, 87])), Some(Ended::FileSize));
    }

    #[test]
    fn guest_at_its_limit_stops_alone() {
        let mut limit = Limit::new(None, Some(100));
        assert_eq!(limit.tick(&files([500, 40])), None);
        assert!(limit.full_guests(1).is_empty(), "the host is not bound by it");
        assert_eq!(limit.tick(&files([900, 70])), None);
        assert_eq!(limit.full_guests(1), [0]);
    }

    #[test]
    fn without_a_limit_only_a_failed_write_ends_it() {
        let mut limit = Limit::new(None, None);
        assert_eq!(limit.tick(&files([u64::MAX, 1])), None);
        assert_eq!(limit.tick(&[FileState { bytes: 0, failed: true }]), Some(Ended::CannotWrite));
    }
}
