//! The name of a recording's file: what was there before stays until the recording has begun.
//!
//! In:    a path
//! Out:   an empty, locked file that gets this path when the recording begins
//! Runs:  on record's thread
//! Full:  a folder in which no file can be made is an error before anything is asked of anyone
//! Trust: other recordings, in the same folder at the same time
//!
//! A file is written under `NAME.new` beside `NAME` and renamed when all machines record. Not as a file without a name
//! (O_TMPFILE): pages come before the last machine has started, and a recording that is killed there has to leave
//! something to be found; nor does every file system have those. Who records holds a lock (flock) on the file it
//! writes, which goes with it when it is renamed, and until then on the file it will replace: whoever wants to record
//! there, or to restore, meets one of the two. The lock belongs to the open file, so a server that still writes a
//! killed record's pages keeps it.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

/// Behind the name of a file whose recording has not begun.
const SUFFIX: &str = ".new";

/// What was being done to a file.
#[derive(Debug, thiserror::Error)]
#[error("{}: {what}: {source}", .path.display())]
pub struct FileError {
    /// Which file.
    pub path: PathBuf,
    /// open, write, finish.
    pub what: &'static str,
    /// Why not.
    pub source: io::Error,
}

/// A file that is open, locked and empty.
#[derive(Debug)]
pub(crate) struct OutputFile {
    path: PathBuf,
    new: PathBuf,
    /// Pages go there.
    pub(crate) file: File,
    /// What it replaces, locked.
    old: Option<File>,
    /// Nothing is replaced.
    no_clobber: bool,
    begun: bool,
}

impl Drop for OutputFile {
    fn drop(&mut self) {
        if !self.begun {
            // Best effort: an empty file that stays is not worth a second error.
            let _ = fs::remove_file(&self.new);
        }
    }
}

impl OutputFile {
    /// Makes the file. What is at `path` is not touched.
    pub(crate) fn open(path: &Path) -> Result<Self, FileError> {
        let failed = |source| FileError { path: path.into(), what: "open", source };
        // A link stays one: what it leads to is replaced.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.into());
        if fs::metadata(&path).is_ok_and(|about| !about.is_file()) {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file")));
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let old = match locked(&path, &options) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            old => Some(old.map_err(failed)?),
        };
        let new = new_path(&path);
        let file = locked(&new, options.create(true)).map_err(failed)?;
        let emptied = file.set_len(0).and_then(|()| match &old {
            Some(old) => file.set_permissions(old.metadata()?.permissions()),
            None => Ok(()),
        });
        let output = Self { path, new, file, old, no_clobber: false, begun: false };
        emptied.map_err(failed)?;
        Ok(output)
    }

    /// The same where nothing may be at `path`.
    pub(crate) fn open_new(path: &Path) -> Result<Self, FileError> {
        if fs::symlink_metadata(path).is_ok() {
            let source = io::Error::new(io::ErrorKind::AlreadyExists, "it is there already (--no-clobber)");
            return Err(FileError { path: path.into(), what: "record to", source });
        }
        let mut output = Self::open(path)?;
        output.no_clobber = true;
        Ok(output)
    }

    /// Where it is, once it has begun.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The recording has begun: the file gets its name, and stays whatever happens.
    pub(crate) fn begin(&mut self) {
        self.begun = true;
        let flags = if self.no_clobber { RenameFlags::RENAME_NOREPLACE } else { RenameFlags::empty() };
        if let Err(error) = renameat2(AT_FDCWD, &self.new, AT_FDCWD, &self.path, flags) {
            log::warn!("{} stays {}: {error}", self.path.display(), self.new.display());
            self.path.clone_from(&self.new);
        }
        self.old = None;
        // So that the name is there after a power failure, if the folder can be synced at all.
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let _ = File::open(folder.unwrap_or(Path::new("."))).and_then(|folder| folder.sync_all());
    }
}

/// Where a file is until it gets its name.
pub(crate) fn new_path(path: &Path) -> PathBuf {
    let mut new = path.as_os_str().to_owned();
    new.push(SUFFIX);
    new.into()
}

/// Opens and locks what has this name, and has it still when the lock is taken.
fn locked(path: &Path, options: &OpenOptions) -> io::Result<File> {
    loop {
        let file = options.open(path)?;
        file.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => io::Error::new(io::ErrorKind::ResourceBusy, "another recording writes to it"),
            TryLockError::Error(error) => error,
        })?;
        let about = file.metadata()?;
        match fs::metadata(path) {
            Ok(named) if (named.dev(), named.ino()) == (about.dev(), about.ino()) => return Ok(file),
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {} // renamed or removed in between
        }
    }
}

#[cfg(test)]
mod tests {
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
        fs::write(&path, "somebody's").unwrap();
        assert_eq!(OutputFile::open_new(&path).unwrap_err().source.kind(), io::ErrorKind::AlreadyExists);
        output.begin();
        assert_eq!(fs::read(&path).unwrap(), b"somebody's");
        assert_eq!(output.path(), new_path(&path), "the recording keeps its first name");
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
        std::os::unix::fs::symlink(&path, &link).unwrap();
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
}
