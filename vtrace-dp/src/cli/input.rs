//! Files that verbs read.
//!
//! In:    a path that the user named
//! Out:   an open regular file, or what the path is instead
//! Runs:  on the caller's thread; never waits: opening a FIFO would wait for a writer
//! Trust: nothing

use std::{
    fs::{File, FileType, OpenOptions},
    io,
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::Path,
};

use nix::libc::{O_NOCTTY, O_NONBLOCK};

/// A path that cannot be read as a file.
#[derive(Debug, thiserror::Error)]
pub(super) enum InputError {
    /// It is something else: `a FIFO`.
    #[error("it is {0}, not a file")]
    NotFile(&'static str),
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Opens a regular file.
pub(super) fn open(path: &Path, options: &mut OpenOptions) -> Result<File, InputError> {
    // Devices may act when they are opened: look first.
    check(std::fs::metadata(path)?.file_type())?;
    let file = options.custom_flags(O_NONBLOCK | O_NOCTTY).open(path)?;
    check(file.metadata()?.file_type())?;
    Ok(file)
}

fn check(kind: FileType) -> Result<(), InputError> {
    let name = match kind {
        kind if kind.is_file() => return Ok(()),
        kind if kind.is_dir() => "a directory",
        kind if kind.is_fifo() => "a FIFO",
        kind if kind.is_socket() => "a socket",
        _ => "a device",
    };
    Err(InputError::NotFile(name))
}

#[cfg(test)]
mod tests {
    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    #[test]
    fn only_regular_files_are_opened_and_nothing_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("file"), "x").unwrap();
        mkfifo(&path("fifo"), Mode::S_IRUSR).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        let error = |path: &Path| open(path, OpenOptions::new().read(true)).unwrap_err().to_string();
        assert!(open(&path("file"), OpenOptions::new().read(true)).is_ok());
        assert_eq!(error(&path("fifo")), "it is a FIFO, not a file");
        assert_eq!(error(&path("socket")), "it is a socket, not a file");
        assert_eq!(error(folder.path()), "it is a directory, not a file");
        assert_eq!(error(Path::new("/dev/zero")), "it is a device, not a file");
        assert!(error(&path("missing")).contains("No such file"));
    }
}
