//! Write speed and free space of the directory for trace files.
//!
//! In:    a directory, the expected data rate
//! Out:   a [`Finding`]
//! Runs:  writes for at most a second, then waits for the disk
//! Full:  a full disk is a finding

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::{Duration, Instant},
};

use nix::{libc::O_TMPFILE, sys::statvfs::statvfs};

use super::Finding;

/// Bytes of one write.
const BLOCK_BYTES: usize = 1 << 20;
/// Maximum number of writes.
const BLOCKS_MAX: u32 = 256;
const TIME_MAX: Duration = Duration::from_secs(1);
/// Free space for a shorter recording is a warning.
const ROOM_MIN: Duration = Duration::from_secs(60);
const CHECK: &str = "disk";

/// Measures the speed with a file that has no name.
pub fn disk(folder: &Path, rate_mb: u32) -> Finding {
    let place = folder.display();
    let free_bytes = match statvfs(folder) {
        Ok(about) => about.blocks_available().saturating_mul(about.fragment_size()),
        Err(errno) => {
            return Finding::fail(
                CHECK,
                format!("{place}: {}", errno.desc()),
                "--output DIR names the directory for trace files",
            );
        }
    };
    match speed_mb(folder) {
        Err(error) => {
            Finding::fail(CHECK, format!("{place}: {error}"), "--output DIR names the directory for trace files")
        }
        Ok(speed_mb) => judge(&place.to_string(), speed_mb, free_bytes, rate_mb),
    }
}

fn judge(place: &str, speed_mb: u64, free_bytes: u64, rate_mb: u32) -> Finding {
    let rate_mb = u64::from(rate_mb.max(1));
    let room = Duration::from_secs(free_bytes / (rate_mb * 1_000_000));
    let found = format!("{place}: {speed_mb} MB/s, space for {} s at {rate_mb} MB/s", room.as_secs());
    if speed_mb < rate_mb {
        let remedy = "record to another disk or a tmpfs (-o), fewer events, or only the newest data (-m)";
        return Finding::warn(CHECK, found, remedy);
    }
    if room < ROOM_MIN {
        return Finding::warn(
            CHECK,
            found,
            "free some space, limit the files (--max-file), or keep only the newest data (-m)",
        );
    }
    Finding::ok(CHECK, found)
}

/// MB/s, including the time to reach the disk.
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

/// A file without a name; file systems without O_TMPFILE get one that is unlinked at once.
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
    use super::{super::Severity, *};

    #[test]
    fn slow_or_full_disk_is_a_warning() {
        let verdict = |speed_mb, free_bytes| judge("/t", speed_mb, free_bytes, 100).verdict;
        assert_eq!(verdict(500, 1 << 40), Severity::Ok);
        assert_eq!(verdict(99, 1 << 40), Severity::Warn);
        assert_eq!(verdict(500, 5_900_000_000), Severity::Warn);
        assert_eq!(verdict(500, 6_000_000_000), Severity::Ok);
    }

    #[test]
    fn directory_is_measured_and_not_changed() {
        let folder = tempfile::tempdir().unwrap();
        let finding = disk(folder.path(), u32::MAX);
        assert_eq!((finding.verdict, finding.check.as_str()), (Severity::Warn, "disk"), "no disk is so fast");
        assert!(!finding.found.contains(": 0 MB/s"), "{finding}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        assert_eq!(disk(&folder.path().join("missing"), 1).verdict, Severity::Fail);
    }
}
