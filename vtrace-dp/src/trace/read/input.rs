//! Bounded reading of an untrusted file.
//!
//! In:    a [`Source`]: a file or bytes in memory
//! Out:   integers, texts and byte strings, or why there are none
//! Trust: nothing; a length is compared with what is left and with its own bound before memory is asked for

use std::{fs::File, io, os::unix::fs::FileExt};

use nix::{
    errno::Errno,
    unistd::{Whence, lseek64},
};

use crate::trace::format::section::bytes_of;

/// Something that can be read at any place.
pub trait Source {
    /// Its size.
    fn bytes(&self) -> u64;
    /// Fills `buffer` from `at`.
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()>;
    /// The offset of the first byte from `at` on that may differ from zero; the size if all are zero.
    fn data_at(&self, at: u64) -> u64 {
        at.min(self.bytes())
    }
}

/// A file and its size when it was opened. A file that shrinks meanwhile gives errors, not nonsense.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    bytes: u64,
}

impl FileSource {
    /// Asks for the size once.
    pub fn new(file: File) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        Ok(Self { file, bytes })
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Source for FileSource {
    fn bytes(&self) -> u64 {
        self.bytes
    }
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, at)
    }
    fn data_at(&self, at: u64) -> u64 {
        let Ok(offset) = i64::try_from(at) else { return self.bytes };
        match lseek64(&self.file, offset, Whence::SeekData) {
            Ok(data) => u64::try_from(data).unwrap_or(at).clamp(at, self.bytes.max(at)),
            Err(Errno::ENXIO) => self.bytes.max(at),
            Err(_) => at, // a file system that does not know its holes
        }
    }
}

impl Source for &[u8] {
    fn bytes(&self) -> u64 {
        bytes_of(self)
    }
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        let range = usize::try_from(at).ok().and_then(|at| Some(at..at.checked_add(buffer.len())?));
        let bytes = range.and_then(|range| self.get(range)).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }
}

/// Why a file cannot be read. Offsets are bytes from its start.
#[derive(Debug, thiserror::Error)]
pub enum ReadFault {
    /// The first bytes are not those of a trace.dat.
    #[error("not a trace.dat")]
    NotATrace,
    /// A trace.dat of a kind that is not read here.
    #[error("a trace.dat with {what} is not supported")]
    Unsupported {
        /// Which kind.
        what: String,
    },
    /// Something reaches beyond its end.
    #[error("{what} at {offset:#x} reaches beyond its end")]
    Short {
        /// What was read.
        what: &'static str,
        /// Where it begins.
        offset: u64,
    },
    /// A length or count beyond its bound.
    #[error("{what} at {offset:#x} has {count}, more than {count_max}")]
    TooLarge {
        /// What was read.
        what: &'static str,
        /// Its offset in the file.
        offset: u64,
        /// How many it claims.
        count: u64,
        /// How many there may be.
        count_max: u64,
    },
    /// Contents that no writer writes.
    #[error("{what} at {offset:#x} makes no sense")]
    Nonsense {
        /// What was read.
        what: &'static str,
        /// Its offset in the file.
        offset: u64,
    },
    /// The file cannot be read.
    #[error("cannot read at {offset:#x}")]
    Io {
        /// Its offset in the file.
        offset: u64,
        /// Why it failed.
        source: io::Error,
    },
}

/// A place in a source that moves on with what is read and never beyond `end`.
#[derive(Debug)]
pub struct Input<'a, S: Source + ?Sized> {
    source: &'a S,
    at: u64,
    end: u64,
}

impl<'a, S: Source + ?Sized> Input<'a, S> {
    /// Reads `at..end`, or less if the source is shorter.
    pub fn new(source: &'a S, at: u64, end: u64) -> Self {
        let end = end.min(source.bytes());
        Self { source, at: at.min(end), end }
    }

    /// What is read.
    pub fn source(&self) -> &'a S {
        self.source
    }

    /// The next byte's place.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Bytes that are left.
    pub fn left(&self) -> u64 {
        self.end - self.at
    }

    fn fill(&mut self, buffer: &mut [u8], what: &'static str) -> Result<(), ReadFault> {
        let bytes = bytes_of(buffer);
        if bytes > self.left() {
            return Err(ReadFault::Short { what, offset: self.at });
        }
        self.source.read_at(buffer, self.at).map_err(|source| ReadFault::Io { offset: self.at, source })?;
        self.at += bytes;
        Ok(())
    }

    /// `N` bytes.
    pub fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], ReadFault> {
        let mut bytes = [0; N];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    /// A u16.
    pub fn u16(&mut self, what: &'static str) -> Result<u16, ReadFault> {
        Ok(u16::from_le_bytes(self.array(what)?))
    }

    /// A u32.
    pub fn u32(&mut self, what: &'static str) -> Result<u32, ReadFault> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    /// A u64.
    pub fn u64(&mut self, what: &'static str) -> Result<u64, ReadFault> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// `count` bytes, at most `count_max`.
    pub fn bytes(&mut self, count: u64, count_max: usize, what: &'static str) -> Result<Vec<u8>, ReadFault> {
        let offset = self.at;
        let max = u64::try_from(count_max).unwrap_or(u64::MAX);
        if count > max {
            return Err(ReadFault::TooLarge { what, offset, count, count_max: max });
        }
        if count > self.left() {
            return Err(ReadFault::Short { what, offset });
        }
        let mut bytes = vec![0; usize::try_from(count).map_err(|_| ReadFault::Short { what, offset })?];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    /// A text that ends with a NUL (not returned) within `bytes_max` bytes.
    pub fn text(&mut self, bytes_max: usize, what: &'static str) -> Result<Vec<u8>, ReadFault> {
        let offset = self.at;
        let room = usize::try_from(self.left()).unwrap_or(usize::MAX).min(bytes_max.saturating_add(1));
        let mut bytes = vec![0; room];
        self.fill(&mut bytes, what)?;
        let end = bytes.iter().position(|byte| *byte == 0).ok_or(ReadFault::Short { what, offset })?;
        self.at = offset + bytes_of(&bytes[..end]) + 1;
        bytes.truncate(end);
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_without_its_nul_is_refused() {
        let bytes: &[u8] = b"abc";
        assert!(matches!(Input::new(&bytes, 0, 3).text(16, "name"), Err(ReadFault::Short { offset: 0, .. })));
    }

    #[test]
    fn text_leaves_the_place_after_its_nul() {
        let bytes: &[u8] = b"abc\0\x05\0rest";
        let mut input = Input::new(&bytes, 0, u64::MAX);
        assert_eq!(input.text(16, "name").unwrap(), b"abc");
        assert_eq!(input.u16("number").unwrap(), 5);
    }

    #[test]
    fn count_beyond_what_is_left_asks_for_no_memory() {
        let bytes: &[u8] = &[0; 8];
        let refused = Input::new(&bytes, 0, 8).bytes(1 << 40, usize::MAX, "text");
        assert!(matches!(refused, Err(ReadFault::Short { .. })));
        let refused = Input::new(&bytes, 0, 8).bytes(5, 4, "text");
        assert!(matches!(refused, Err(ReadFault::TooLarge { count: 5, count_max: 4, .. })));
    }

    #[test]
    fn section_does_not_read_its_neighbour() {
        let bytes: &[u8] = &[0; 64];
        let mut input = Input::new(&bytes, 8, 12);
        assert!(input.u32("inside").is_ok());
        assert!(matches!(input.u16("outside"), Err(ReadFault::Short { offset: 12, .. })));
    }
}
