//! The name of a recording's file: what was there before stays until the recording has begun.
//!
//! In:    a path
//! Out:   an empty, locked file that gets this path when the recording begins
//! Runs:  on record's thread
//! Full:  a folder in which no file can be created is an error before any guest is claimed
//! Trust: other recordings in the same folder; not the folder's owner (see [`FolderEntry`])
//!
//! A file is written as `NAME.new` beside `NAME`, and renamed when all machines record. O_TMPFILE would not do: pages
//! arrive before the last machine has started, and a recording that is killed then must leave a file to restore.
//! `NAME.new` is always created (O_EXCL), never reused: one that is there already is removed if it is a file that no
//! process writes, and refused if it is anything else, such as a link to another file. A recorder holds the write lock
//! ([`try_write_lock`]) of the file that it writes, and until it begins also of the file that it will replace; `restore`
//! takes the same lock. It belongs to the open file description: a server that still writes a killed record's pages
//! keeps it.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    thread::sleep,
    time::Duration,
};

use nix::sys::stat::{Mode, fchmod, fstat};

use crate::sys::{
    folder_entry::FolderEntry,
    write_lock::{WriteLock, try_write_lock},
};

/// Suffix of a file whose recording has not begun.
const SUFFIX: &str = ".new";
/// Attempts to create a file whose name or lock another process takes at the same time.
const TRIES_MAX: u32 = 100;
const TRY_PAUSE: Duration = Duration::from_millis(1);

/// An operation on a file failed.
#[derive(Debug, thiserror::Error)]
#[error("{}: {what}: {source}", .path.display())]
pub struct FileError {
    /// The file.
    pub path: PathBuf,
    /// The operation: open, write, finish.
    pub what: &'static str,
    /// The error.
    pub source: io::Error,
}

/// A file that is open, locked and empty.
#[derive(Debug)]
pub(crate) struct OutputFile {
    /// Its name once the recording has begun.
    entry: FolderEntry,
    /// Its name until then.
    new: FolderEntry,
    /// Pages go there.
    pub(crate) file: File,
    /// The file that it replaces, locked.
    old: Option<File>,
    no_clobber: bool,
    begun: bool,
}

impl Drop for OutputFile {
    fn drop(&mut self) {
        if !self.begun && self.new.refers_to(&self.file) {
            // Best effort: an empty file that stays is not worth a second error.
            let _ = self.new.remove();
        }
    }
}

impl OutputFile {
    /// Creates the file. What has this path now is not changed.
    pub(crate) fn open(path: &Path) -> Result<Self, FileError> {
        let failed = |source| FileError { path: path.into(), what: "open", source };
        let entry = FolderEntry::resolve(path).map_err(failed)?;
        let old = open_old(&entry).map_err(failed)?;
        let new = new_entry(&entry);
        let file = create_locked(&new).map_err(failed)?;
        let output = Self { entry, new, file, old, no_clobber: false, begun: false };
        output.copy_mode().map_err(failed)?;
        Ok(output)
    }

    /// The same where nothing may have this path.
    pub(crate) fn open_new(path: &Path) -> Result<Self, FileError> {
        if path.symlink_metadata().is_ok() {
            let source = io::Error::new(io::ErrorKind::AlreadyExists, "it exists already (--no-clobber)");
            return Err(FileError { path: path.into(), what: "record to", source });
        }
        let mut output = Self::open(path)?;
        output.no_clobber = true;
        Ok(output)
    }

    fn copy_mode(&self) -> io::Result<()> {
        let Some(old) = &self.old else { return Ok(()) };
        Ok(fchmod(&self.file, Mode::from_bits_truncate(fstat(old)?.st_mode & 0o777))?)
    }

    /// Its path, once it has begun.
    pub(crate) fn path(&self) -> &Path {
        self.entry.path()
    }

    /// Its name in its folder, once it has begun.
    pub(crate) fn entry(&self) -> &FolderEntry {
        &self.entry
    }

    /// The recording has begun: the file gets its name, and stays from now on.
    pub(crate) fn begin(&mut self) {
        self.begun = true;
        if let Err(error) = self.new.rename_to(&self.entry, !self.no_clobber) {
            log::warn!("{} stays {}: {error}", self.entry.path().display(), self.new.path().display());
            self.entry = self.new.clone();
        }
        self.old = None;
        // The name survives a power failure where the file system can sync a folder.
        let _ = self.entry.sync_folder();
    }
}

/// The name of a file until it gets its own.
pub(crate) fn new_entry(entry: &FolderEntry) -> FolderEntry {
    entry.with_suffix(SUFFIX)
}

/// The file that a recording will replace, locked where a reader's lock does not prevent that; `None` if it is missing.
fn open_old(entry: &FolderEntry) -> io::Result<Option<File>> {
    for _ in 0..TRIES_MAX {
        let old = match entry.open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            old => old?,
        };
        if try_write_lock(&old)? == WriteLock::Busy {
            return Err(busy());
        }
        if entry.refers_to(&old) {
            return Ok(Some(old));
        }
        // It was replaced in the meantime.
    }
    Err(busy())
}

/// Creates the file of this name and locks it. A file that a killed recording left is removed first.
pub(crate) fn create_locked(entry: &FolderEntry) -> io::Result<File> {
    for _ in 0..TRIES_MAX {
        match entry.create_new() {
            Ok(file) => {
                if try_write_lock(&file)? == WriteLock::Held && entry.refers_to(&file) {
                    return Ok(file);
                }
                // Another process opened it between its creation and its lock.
                if entry.refers_to(&file) {
                    entry.remove()?;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => remove_stale(entry)?,
            Err(error) => return Err(error),
        }
        sleep(TRY_PAUSE);
    }
    Err(busy())
}

/// Removes a file that no process writes.
fn remove_stale(entry: &FolderEntry) -> io::Result<()> {
    let stale = match entry.open() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io::Error::new(error.kind(), format!("{}: {error}", entry.path().display()))),
        Ok(stale) => stale,
    };
    match try_write_lock(&stale)? {
        WriteLock::Busy => Err(busy()),
        WriteLock::Held | WriteLock::ReadLocked if entry.refers_to(&stale) => entry.remove(),
        WriteLock::Held | WriteLock::ReadLocked => Ok(()),
    }
}

fn busy() -> io::Error {
    io::Error::new(io::ErrorKind::ResourceBusy, "another recording writes to it")
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn what_was_there_stays_until_the_recording_begins() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.dat");
        fs::write(&path, "before").unwrap();
        drop(OutputFile::open(&path).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"before");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
        let mut output = OutputFile::open(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"before");
        output.begin();
        drop(output);
        assert_eq!(fs::read(&path).unwrap(), b"");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn file_that_must_not_be_replaced_is_not_even_if_it_comes_meanwhile() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.dat");
        let mut output = OutputFile::open_new(&path).unwrap();
        fs::write(&path, "another's").unwrap();
        assert_eq!(OutputFile::open_new(&path).unwrap_err().source.kind(), io::ErrorKind::AlreadyExists);
        output.begin();
        assert_eq!(fs::read(&path).unwrap(), b"another's");
        assert_eq!(output.path(), folder.path().join("trace.dat.new"), "the recording keeps its first name");
    }

    #[test]
    fn second_recording_to_the_same_file_is_refused_before_and_after_the_first_has_begun() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.dat");
        for there in [false, true] {
            let mut first = OutputFile::open(&path).unwrap();
            assert_eq!(OutputFile::open(&path).unwrap_err().source.kind(), io::ErrorKind::ResourceBusy, "{there}");
            first.begin();
            assert_eq!(OutputFile::open(&path).unwrap_err().source.kind(), io::ErrorKind::ResourceBusy, "{there}");
        }
    }

    #[test]
    fn link_stays_and_what_it_leads_to_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("real.dat"), folder.path().join("link.dat"));
        fs::write(&path, "before").unwrap();
        symlink(&path, &link).unwrap();
        OutputFile::open(&link).unwrap().begin();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read(&path).unwrap(), b"");
    }

    #[test]
    fn what_is_not_a_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(OutputFile::open(folder.path()).is_err());
        assert!(OutputFile::open(Path::new("/dev/null")).is_err());
    }

    #[test]
    fn link_in_the_place_of_the_new_file_is_refused_and_its_target_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.dat");
        let precious = folder.path().join("precious");
        fs::write(&precious, "precious").unwrap();
        symlink(&precious, folder.path().join("trace.dat.new")).unwrap();
        let error = OutputFile::open(&path).unwrap_err();
        assert!(error.to_string().contains("trace.dat.new: it is not a file"), "{error}");
        assert_eq!(fs::read(&precious).unwrap(), b"precious");
    }

    #[test]
    fn file_that_a_killed_recording_left_is_replaced_and_not_written_to() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.dat");
        let left = folder.path().join("trace.dat.new");
        fs::write(&left, "left").unwrap();
        let mut reader = File::open(&left).unwrap();
        let output = OutputFile::open(&path).unwrap();
        assert_eq!(fs::read(&left).unwrap(), b"");
        assert_eq!(io::read_to_string(&mut reader).unwrap(), "left", "another inode");
        drop(output);
        assert!(!left.exists());
    }

    #[test]
    fn readers_lock_keeps_no_recording_from_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.dat");
        fs::write(&path, "before").unwrap();
        let reader = File::open(&path).unwrap();
        reader.lock().unwrap();
        let mut output = OutputFile::open(&path).unwrap();
        output.begin();
        assert_eq!(fs::read(&path).unwrap(), b"");
        let reader = File::open(&path).unwrap();
        reader.lock().unwrap();
        assert_eq!(OutputFile::open(&path).unwrap_err().source.kind(), io::ErrorKind::ResourceBusy, "it is written");
    }

    #[test]
    fn dangling_link_stays_and_its_target_is_created() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link.dat");
        symlink("real.dat", &link).unwrap();
        OutputFile::open(&link).unwrap().begin();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert!(folder.path().join("real.dat").is_file());
    }
}
