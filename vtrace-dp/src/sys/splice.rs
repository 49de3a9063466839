//! Pages between descriptors: splice(2), tee(2) and the pipe between them, and read(2) and pwrite(2) for the rest.
//!
//! In:    a source, a target, how many bytes at most
//! Out:   how many were moved; 0 is the end of the source
//! Runs:  on the caller's thread; blocks only if both descriptors and the flags allow it
//! Full:  EAGAIN ([`SysError::would_block`]) when a non-blocking side has no data or no room
//! Trust: the kernel

use std::{
    io::IoSliceMut,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

pub use nix::fcntl::SpliceFFlags as SpliceFlags;
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    unistd::pipe2,
};

use super::SysError;

/// Moves up to `bytes_max` from `source` to `target`; one of them is a pipe. A `target_offset` is where in a file to
/// write, and is moved on by what was written. From `trace_pipe_raw` only whole sub-buffers come. Hot.
pub fn splice(
    source: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    target_offset: Option<&mut u64>,
    bytes_max: usize,
    flags: SpliceFlags,
) -> Result<usize, SysError> {
    let failed = SysError::of("splice");
    let Some(offset) = target_offset else {
        return nix::fcntl::splice(source, None, target, None, bytes_max, flags).map_err(failed);
    };
    let Ok(mut at) = i64::try_from(*offset) else { return Err(failed(Errno::EOVERFLOW)) };
    let moved = nix::fcntl::splice(source, None, target, Some(&mut at), bytes_max, flags).map_err(failed)?;
    *offset = u64::try_from(at).expect("a file offset grows");
    Ok(moved)
}

/// Doubles up to `bytes_max` of what waits in one pipe into another; the source keeps it. Hot.
pub fn tee(
    source: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    bytes_max: usize,
    flags: SpliceFlags,
) -> Result<usize, SysError> {
    nix::fcntl::tee(source, target, bytes_max, flags).map_err(SysError::of("tee"))
}

/// Reads into `bytes`; from `trace_pipe_raw` at most one sub-buffer, also a partly filled one. Hot.
pub fn read(source: BorrowedFd<'_>, bytes: &mut [u8]) -> Result<usize, SysError> {
    nix::unistd::read(source, bytes).map_err(SysError::of("read"))
}

/// Reads into all of `pieces` with one call; from `trace_pipe_raw` one sub-buffer into each. Hot.
pub fn read_pieces(source: BorrowedFd<'_>, pieces: &mut [IoSliceMut<'_>]) -> Result<usize, SysError> {
    nix::sys::uio::readv(source, pieces).map_err(SysError::of("readv"))
}

/// Writes `bytes` at `offset` of a file; returns how many were written. Hot.
pub fn write_at(target: BorrowedFd<'_>, bytes: &[u8], offset: u64) -> Result<usize, SysError> {
    let failed = SysError::of("pwrite");
    let Ok(at) = i64::try_from(offset) else { return Err(failed(Errno::EOVERFLOW)) };
    nix::sys::uio::pwrite(target, bytes, at).map_err(failed)
}

/// A pipe whose slots are numbered in pages.
#[derive(Debug)]
pub struct Pipe {
    /// What was put in comes out here.
    pub reader: OwnedFd,
    /// Bytes go in here.
    pub writer: OwnedFd,
    /// Bytes it holds when every slot is a full page.
    pub bytes_max: usize,
}

impl Pipe {
    /// A close-on-exec pipe, non-blocking at both ends, of `bytes` (rounded up by the kernel to a power of two of
    /// pages) or, where the system's limits refuse that, of the size the kernel gives (64 KiB).
    pub fn new(bytes: usize) -> Result<Self, SysError> {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(SysError::of("pipe2"))?;
        let asked = i32::try_from(bytes).unwrap_or(i32::MAX);
        let given = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(asked))
            .or_else(|_| fcntl(&writer, FcntlArg::F_GETPIPE_SZ))
            .map_err(SysError::of("fcntl(F_GETPIPE_SZ)"))?;
        Ok(Self { reader, writer, bytes_max: usize::try_from(given).expect("a pipe has a size") })
    }

    /// Where bytes come out.
    pub fn reader_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }

    /// Where bytes go in.
    pub fn writer_fd(&self) -> BorrowedFd<'_> {
        self.writer.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::FileExt};

    use super::*;

    fn filled(bytes: &[u8]) -> Pipe {
        let pipe = Pipe::new(1 << 16).unwrap();
        std::fs::File::from(pipe.writer.try_clone().unwrap()).write_all(bytes).unwrap();
        pipe
    }

    #[test]
    fn bytes_land_at_the_offset_and_the_offset_moves_on() {
        let pipe = filled(b"page");
        let file = tempfile::tempfile().unwrap();
        let mut offset = 4096;
        let moved = splice(pipe.reader.as_fd(), file.as_fd(), Some(&mut offset), 100, SpliceFlags::empty()).unwrap();
        assert_eq!((moved, offset), (4, 4100));
        let mut back = [0; 4];
        file.read_exact_at(&mut back, 4096).unwrap();
        assert_eq!(&back, b"page");
    }

    #[test]
    fn empty_pipe_would_block() {
        let pipe = Pipe::new(1 << 16).unwrap();
        let file = tempfile::tempfile().unwrap();
        let fault = splice(pipe.reader.as_fd(), file.as_fd(), Some(&mut 0), 100, SpliceFlags::SPLICE_F_NONBLOCK);
        assert!(fault.unwrap_err().would_block());
    }

    #[test]
    fn offset_no_file_can_have_is_refused_and_kept() {
        let pipe = filled(b"page");
        let file = tempfile::tempfile().unwrap();
        let mut offset = u64::MAX;
        let fault = splice(pipe.reader.as_fd(), file.as_fd(), Some(&mut offset), 100, SpliceFlags::empty());
        assert_eq!((fault.unwrap_err().errno, offset), (Errno::EOVERFLOW, u64::MAX));
    }

    #[test]
    fn tee_leaves_the_source_as_it_was() {
        let (source, copy) = (filled(b"page"), Pipe::new(1 << 16).unwrap());
        for _ in 0..2 {
            assert_eq!(tee(source.reader.as_fd(), copy.writer.as_fd(), 100, SpliceFlags::empty()), Ok(4));
        }
    }

    #[test]
    fn pipe_has_the_size_asked_for_or_says_another() {
        assert!(Pipe::new(1 << 20).unwrap().bytes_max >= 1 << 16);
    }
}
