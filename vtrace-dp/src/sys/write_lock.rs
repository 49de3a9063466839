//! The lock of a file that is being written: only a descriptor that can write can take it or hold it against others.
//!
//! In:    a file opened to write
//! Out:   the lock, held as long as the open file description lives, in whatever process; or that another holds it
//! Trust: readers of the file. They can take a read lock (and any flock), which does not count here: only a write lock
//!        (F_OFD_SETLK) refuses a file, and the kernel gives it to writers only

use std::{fs::File, io};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    libc,
};

/// The byte that is locked: beyond any file's end.
const LOCKED_BYTE: i64 = i64::MAX - 1;

/// The result of an attempt to lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WriteLock {
    /// This open file description holds the lock.
    Held,
    /// Another one does: a process writes to the file.
    Busy,
    /// A reader's lock is in the way. No process that holds the write lock writes to the file.
    ReadLocked,
}

/// Tries to lock `file`, which is open to write.
///
/// # Errors
/// As fcntl(2), F_OFD_SETLK.
pub fn try_write_lock(file: &File) -> io::Result<WriteLock> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&byte(libc::F_WRLCK))) {
        Ok(_) => return Ok(WriteLock::Held),
        Err(Errno::EAGAIN | Errno::EACCES) => {}
        Err(errno) => return Err(errno.into()),
    }
    // Only a write lock conflicts with a read lock.
    let mut conflict = byte(libc::F_RDLCK);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut conflict))?;
    let is_free = i32::from(conflict.l_type) == libc::F_UNLCK;
    Ok(if is_free { WriteLock::ReadLocked } else { WriteLock::Busy })
}

fn byte(kind: i32) -> libc::flock {
    let l_type = i16::try_from(kind).expect("lock types are small");
    let l_whence = i16::try_from(libc::SEEK_SET).expect("0");
    libc::flock { l_type, l_whence, l_start: LOCKED_BYTE, l_len: 1, l_pid: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_lock_refuses_no_writer_and_a_writers_lock_does() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.dat");
        let writer = File::create(&path).unwrap();
        let reader = File::open(&path).unwrap();
        reader.lock().unwrap(); // flock, exclusive: it needs no permission to write
        fcntl(&reader, FcntlArg::F_OFD_SETLK(&byte(libc::F_RDLCK))).unwrap();
        assert!(fcntl(&reader, FcntlArg::F_OFD_SETLK(&byte(libc::F_WRLCK))).is_err(), "a reader cannot write-lock");
        assert_eq!(try_write_lock(&writer).unwrap(), WriteLock::ReadLocked);
        drop(reader);
        assert_eq!(try_write_lock(&writer).unwrap(), WriteLock::Held);
        let other = File::options().write(true).open(&path).unwrap();
        assert_eq!(try_write_lock(&other).unwrap(), WriteLock::Busy);
        let duplicate = writer.try_clone().unwrap();
        drop(writer);
        assert_eq!(try_write_lock(&other).unwrap(), WriteLock::Busy, "the duplicate is the same description");
        drop(duplicate);
        assert_eq!(try_write_lock(&other).unwrap(), WriteLock::Held);
    }
}
