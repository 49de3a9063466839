//! When a recording, or a guest's part of it, has to stop because of its files: one has grown to its limit, or cannot grow
//! any more.
//!
//! In:    once a tick, the bytes of every file so far and whether a write has failed
//! Out:   [`Ended`], if it is time; the guests that have had their share
//! Runs:  pure
//!
//! What `--max-file` guarantees: no lane takes more than the limit (its area ends there), and the recording stops at
//! the tick that expects the next one to pass it. So a file may pass the limit by what its machine records faster in
//! the last second than in the one before, and by what is in the ring buffers when it stops. `--max-guest-bytes` is the
//! same for each guest's file, and ends that guest's part only.

use serde::Serialize;

/// Why a recording ended before its command did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ended {
    /// A file has reached `--max-file`.
    FileSize,
    /// Pages cannot be written, most likely because the disk is full.
    CannotWrite,
}

/// One machine's file, as far as it is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FileState {
    /// Bytes of pages in it.
    pub bytes: u64,
    /// A write has failed.
    pub failed: bool,
}

/// Remembers how fast files grow.
#[derive(Debug, Default)]
pub struct Limit {
    bytes_max: Option<u64>,
    guest_bytes_max: Option<u64>,
    last: Vec<u64>,
    /// What each file will have at the next tick.
    expected: Vec<u64>,
}

impl Limit {
    /// No file, and no guest's file, shall be larger than this.
    pub fn new(bytes_max: Option<u64>, guest_bytes_max: Option<u64>) -> Self {
        Self { bytes_max, guest_bytes_max, ..Self::default() }
    }

    /// Of so many guests, whose files are the last: those, counted from 0, whose part has to stop, as of the last tick.
    pub fn full_guests(&self, guests: usize) -> Vec<usize> {
        let Some(bytes_max) = self.guest_bytes_max else { return Vec::new() };
        let guests = self.expected.iter().skip(self.expected.len().saturating_sub(guests)).enumerate();
        guests.filter(|(_, expected)| **expected >= bytes_max).map(|(guest, _)| guest).collect()
    }

    /// A tick has passed; the host's file is the first.
    pub fn tick(&mut self, files: &[FileState]) -> Option<Ended> {
        let grown = |(index, file): (usize, &FileState)| {
            let before = self.last.get(index).copied().unwrap_or(0);
            file.bytes.saturating_add(file.bytes.saturating_sub(before))
        };
        self.expected = files.iter().enumerate().map(grown).collect();
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
    fn guest_that_has_had_its_share_stops_alone() {
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
