//! Descriptors past the page cache: what a file allows, and how to get one.
//!
//! In:    an open file
//! Out:   another description of it, with O_DIRECT; what its file system says about such writes
//! Runs:  on the caller's thread
//! Trust: the kernel
#![expect(unsafe_code, reason = "statx with STATX_DIOALIGN has no safe wrapper")]

use std::{
    fs::{File, OpenOptions},
    io, mem,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::OpenOptionsExt,
    },
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    libc,
};

use super::SysError;

/// What a file system asks of writes past the page cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Terms {
    /// Addresses are multiples of this. 0: there are no such writes, or it is not known.
    pub memory_alignment: u32,
    /// Offsets and lengths are multiples of this.
    pub offset_alignment: u32,
    /// The file system lies on a block device, and on no other file system.
    pub is_on_block_device: bool,
}

impl Terms {
    /// Those of `file` (statx with STATX_DIOALIGN, Linux 6.1).
    pub fn of(file: &File) -> Result<Self, SysError> {
        // SAFETY: all fields of a statx are integers, for which zero is a value.
        let mut about: libc::statx = unsafe { mem::zeroed() };
        // SAFETY: the path is an empty string that ends, with which AT_EMPTY_PATH means the descriptor, which is open;
        // the kernel fills the structure that is the last argument, which is a local variable's.
        let result = unsafe {
            libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut about)
        };
        Errno::result(result).map_err(SysError::of("statx"))?;
        let is_told = about.stx_mask & libc::STATX_DIOALIGN != 0;
        Ok(Self {
            memory_alignment: if is_told { about.stx_dio_mem_align } else { 0 },
            offset_alignment: if is_told { about.stx_dio_offset_align } else { 0 },
            // File systems that have no device of their own get a number with major 0.
            is_on_block_device: about.stx_dev_major != 0,
        })
    }

    /// Whether memory, lengths and offsets that are multiples of `alignment` are good enough.
    pub fn are_met_by(&self, alignment: u32) -> bool {
        let meets = |wanted: u32| wanted > 0 && alignment.is_multiple_of(wanted);
        meets(self.memory_alignment) && meets(self.offset_alignment)
    }
}

/// Opens the file that `file` is once more, for writing past the page cache. Whether a description is one for that is
/// a property of its own, so the first one stays as it is.
pub fn reopen(file: &File) -> io::Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(path)
}

/// Whether writes to `file` go past the page cache.
pub fn is_direct(file: &File) -> Result<bool, SysError> {
    let flags = fcntl(file.as_fd(), FcntlArg::F_GETFL).map_err(SysError::of("fcntl F_GETFL"))?;
    Ok(OFlag::from_bits_retain(flags).contains(OFlag::O_DIRECT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_file_has_no_block_device_and_a_second_description_is_of_the_same_file() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        assert!(!Terms::of(&file).unwrap().is_on_block_device);
        assert!(!is_direct(&file).unwrap());
        let here = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        match reopen(&here) {
            Ok(direct) => {
                use std::os::unix::fs::MetadataExt;
                assert!(is_direct(&direct).unwrap() && !is_direct(&here).unwrap());
                assert_eq!(direct.metadata().unwrap().ino(), here.metadata().unwrap().ino());
            }
            Err(error) => println!("skipped: no O_DIRECT in the source folder: {error}"),
        }
    }

    #[test]
    fn unknown_terms_are_never_met() {
        let terms = Terms { memory_alignment: 0, offset_alignment: 512, is_on_block_device: true };
        assert!(!terms.are_met_by(4096));
        assert!(Terms { memory_alignment: 4, ..terms }.are_met_by(4096));
        assert!(!Terms { memory_alignment: 4, offset_alignment: 65536, ..terms }.are_met_by(4096));
    }
}
