//! How fast pages can be written to where a recording is to go, and for how long.
//!
//! In:    a folder, the rate that is expected
//! Out:   a [`Finding`]
//! Runs:  writes for at most a second, then waits until that is on the disk
//! Full:  a full disk is a finding
//! Trust: the person who named the folder

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::{Duration, Instant},
};

use nix::{libc::O_TMPFILE, sys::statvfs::statvfs};

use super::Finding;

/// Written at a time.
const BLOCK_BYTES: usize = 1 << 20;
/// No more than so many.
const BLOCKS_MAX: u32 = 256;
const TIME_MAX: Duration = Duration::from_secs(1);
/// Room for less is worth a word.
const ROOM_MIN: Duration = Duration::from_secs(60);
const CHECK: &str = "disk";

/// Writes a file that has no name, and compares.
pub fn disk(folder: &Path, rate_mb: u32) -> Finding {
    let place = folder.display();
    let free_bytes = match statvfs(folder) {
        Ok(about) => about.blocks_available().saturating_mul(about.fragment_size()),
        Err(errno) => {
            return Finding::fail(CHECK, format!("{place}: {}", errno.desc()), "--output DIR: where files go");
        }
    };
    match speed_mb(folder) {
        Err(error) => Finding::fail(CHECK, format!("{place}: {error}"), "--output DIR: where files go"),
        Ok(speed_mb) => judge(&place.to_string(), speed_mb, free_bytes, rate_mb),
    }
}

fn judge(place: &str, speed_mb: u64, free_bytes: u64, rate_mb: u32) -> Finding {
    let rate_mb = u64::from(rate_mb.max(1));
    let room = Duration::from_secs(free_bytes / (rate_mb * 1_000_000));
    let found = format!("{place}: {speed_mb} MB/s, room for {} s at {rate_mb} MB/s", room.as_secs());
    if speed_mb < rate_mb {
        let remedy = "another disk or a tmpfs (-o), fewer events, or -m to keep only the newest";
        return Finding::warn(CHECK, found, remedy);
    }
    if room < ROOM_MIN {
        return Finding::warn(CHECK, found, "free some space, --max-file SIZE, or -m to keep only the newest");
    }
    Finding::ok(CHECK, found)
}

/// Megabytes a second, until they are on the disk.
fn speed_mb(folder: &Path) -> std::io::Result<u64> {
    let mut file = nameless(folder)?;
    let block = vec![0x5a; BLOCK_BYTES];
    let begun = Instant::now();
    let mut written: u128 = 0;
    for _ in 0..BLOCKS_MAX {
        file.write_all(&block)?;
        written += BLOCK_BYTES as u128;
        if begun.elapsed() > TIME_MAX {
            break;
        }
    }
    file.sync_data()?;
    Ok(u64::try_from(written / begun.elapsed().as_micros().max(1)).unwrap_or(u64::MAX))
}

/// A file that goes with this process; some file systems have none without a name.
fn nameless(folder: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).mode(0o600);
    match options.clone().custom_flags(O_TMPFILE).open(folder) {
        Err(error) if matches!(error.raw_os_error(), Some(nix::libc::EOPNOTSUPP | nix::libc::EISDIR)) => {
            let path = folder.join(format!(".vtrace-doctor-{}", std::process::id()));
            let file = options.create_new(true).open(&path)?;
            std::fs::remove_file(&path)?;
            Ok(file)
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Verdict, *};

    #[test]
    fn disk_that_is_too_slow_or_too_full_is_warned_of() {
        let verdict = |speed_mb, free_bytes| judge("/t", speed_mb, free_bytes, 100).verdict;
        assert_eq!(verdict(500, 1 << 40), Verdict::Ok);
        assert_eq!(verdict(99, 1 << 40), Verdict::Warn);
        assert_eq!(verdict(500, 5_900_000_000), Verdict::Warn);
        assert_eq!(verdict(500, 6_000_000_000), Verdict::Ok);
    }

    #[test]
    fn folder_is_measured_and_left_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let finding = disk(folder.path(), u32::MAX);
        assert_eq!((finding.verdict, finding.check.as_str()), (Verdict::Warn, "disk"), "no disk is so fast");
        assert!(!finding.found.contains(": 0 MB/s"), "{finding}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        assert_eq!(disk(&folder.path().join("missing"), 1).verdict, Verdict::Fail);
    }
}
