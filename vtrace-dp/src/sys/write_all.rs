//! Writes into a file that go on until everything is written.
//!
//! In:    bytes, or a call that writes some of them; their place in the file
//! Out:   [`Written`]: how far they came, and why no further
//! Runs:  on the caller's thread, which waits for the file
//! Trust: the kernel

use std::{
    fs::File,
    io,
    os::{fd::BorrowedFd, unix::fs::FileExt},
};

use nix::errno::Errno;

use super::{SysError, splice::write_at};

/// How a write ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Written {
    /// Bytes that the file has taken.
    pub bytes: u64,
    /// Why it has not taken all of them.
    pub fault: Option<SysError>,
}

/// Calls `write` with the number of bytes that are `done` until it is `bytes`. A call that a signal interrupts is
/// repeated; one that writes nothing is an I/O error. Hot.
pub fn write_all(bytes: u64, mut done: u64, mut write: impl FnMut(u64) -> Result<usize, SysError>) -> Written {
    while done < bytes {
        match write(done) {
            Ok(0) => return Written { bytes: done, fault: Some(SysError { call: "write", errno: Errno::EIO }) },
            Ok(more) => done += u64::try_from(more).expect("a count of bytes"),
            Err(error) if error.errno == Errno::EINTR => {}
            Err(error) => return Written { bytes: done, fault: Some(error) },
        }
    }
    Written { bytes: done, fault: None }
}

/// Writes all of `bytes` at `offset`. Hot.
pub fn write_all_at(file: BorrowedFd<'_>, bytes: &[u8], offset: u64) -> Written {
    let whole = u64::try_from(bytes.len()).expect("a count of bytes");
    let rest = |done| &bytes[usize::try_from(done).expect("at most the length of a slice")..];
    write_all(whole, 0, |done| write_at(file, rest(done), offset + done))
}

/// Makes a stretch of a file zero.
pub fn erase(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    const ZEROS: [u8; 4096] = [0; 4096];
    let mut done = 0;
    while done < bytes {
        let step = (bytes - done).min(4096);
        file.write_all_at(&ZEROS[..usize::try_from(step).expect("at most 4096")], offset + done)?;
        done += step;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn short_and_interrupted_writes_go_on_where_they_ended() {
        let mut answers = [Ok(3), Err(Errno::EINTR), Ok(4), Ok(1)].into_iter();
        let mut asked = Vec::new();
        let written = write_all(10, 2, |done| {
            asked.push(done);
            answers.next().expect("no call after the last byte").map_err(SysError::of("write"))
        });
        assert_eq!((written, &asked[..]), (Written { bytes: 10, fault: None }, &[2, 5, 5, 9][..]));
    }

    #[test]
    fn write_that_fails_or_takes_nothing_says_how_far_it_came() {
        for (last, errno) in [(Err(Errno::ENOSPC), Errno::ENOSPC), (Ok(0), Errno::EIO)] {
            let mut answers = [Ok(3), last].into_iter();
            let written =
                write_all(10, 0, |_| answers.next().expect("no call after an error").map_err(SysError::of("write")));
            assert_eq!((written.bytes, written.fault.map(|fault| fault.errno)), (3, Some(errno)));
        }
    }

    #[test]
    fn only_the_stretch_is_erased() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(write_all_at(file.as_fd(), &[7; 10_000], 50), Written { bytes: 10_000, fault: None });
        erase(&file, 60, 9000).unwrap();
        let mut bytes = vec![0; 10_050];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!((50..10_050).all(|at| (bytes[at] == 7) != (60..9060).contains(&at)));
    }
}
