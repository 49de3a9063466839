//! What kind of object a foreign descriptor leads to, found out without waiting for whoever serves it.
//!
//! In:    descriptors of a peer
//! Out:   the same, checked, or a [`DescriptorFault`]
//! Runs:  on the caller's thread. `fstat` of a file on FUSE waits for the process that serves the file system; what is
//!        asked here is answered from the kernel's own memory
//! Trust: the peer with nothing
#![expect(unsafe_code, reason = "statx, fstatfs and F_GET_SEALS of a descriptor that may be anything")]

use std::{
    fs::File,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
};

use super::SysError;

/// File systems whose files can back a guest's memory: a page of them comes from memory or from a local disk, never from
/// another process (include/uapi/linux/magic.h, f_type of statfs(2)).
const LOCAL_FILE_SYSTEMS: [u32; 8] = [
    0x0102_1994, // tmpfs
    0x9584_58f6, // hugetlbfs
    0x8584_58f6, // ramfs
    0xef53,      // ext2, ext3, ext4
    0x5846_5342, // XFS
    0x9123_683e, // btrfs
    0xf2f5_2010, // f2fs
    0x2fc1_2fc1, // ZFS
];

/// Why a descriptor is not used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DescriptorFault {
    /// It is no eventfd.
    #[error("the descriptor is not an eventfd")]
    NotEvent,
    /// It is no regular file.
    #[error("the descriptor is not a regular file")]
    NotFile,
    /// Its pages may come from another process or from the network.
    #[error("the file is on a file system of type {0:#x}, whose pages may never come: use a memfd, tmpfs or hugetlbfs")]
    FileSystem(u32),
    /// A system call failed.
    #[error(transparent)]
    System(#[from] SysError),
}

/// An eventfd that does not block. Its owner may still change that: it shares the flag.
pub fn eventfd(descriptor: OwnedFd) -> Result<OwnedFd, DescriptorFault> {
    // Eventfds, like epoll and timerfd, are anonymous inodes: their mode has no type.
    if kind(descriptor.as_fd())? != 0 {
        return Err(DescriptorFault::NotEvent);
    }
    let flags = OFlag::from_bits_retain(fcntl(&descriptor, FcntlArg::F_GETFL).map_err(SysError::of("fcntl F_GETFL"))?);
    if flags & OFlag::O_ACCMODE != OFlag::O_RDWR {
        return Err(DescriptorFault::NotEvent);
    }
    fcntl(&descriptor, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map_err(SysError::of("fcntl F_SETFL"))?;
    // An eventfd takes eight bytes, also of the number 0; other anonymous inodes take none.
    match nix::unistd::write(&descriptor, &0u64.to_ne_bytes()) {
        Ok(8) | Err(Errno::EAGAIN) => Ok(descriptor),
        Ok(_) | Err(_) => Err(DescriptorFault::NotEvent),
    }
}

/// Refuses a file whose pages may come from another process: a load from it could wait for ever.
pub fn check_memory_file(file: &File) -> Result<(), DescriptorFault> {
    // Only files of tmpfs and hugetlbfs, memfds among them, have seals.
    // SAFETY: F_GET_SEALS touches no memory of this process.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    if seals >= 0 {
        return Ok(());
    }
    if kind(file.as_fd())? != libc::S_IFREG {
        return Err(DescriptorFault::NotFile);
    }
    let mut about = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the call fills the structure, which lives until after it.
    let result = unsafe { libc::fstatfs(file.as_raw_fd(), about.as_mut_ptr()) };
    Errno::result(result).map_err(SysError::of("fstatfs"))?;
    // SAFETY: the call succeeded; and all zeros is a value of it, too.
    let about = unsafe { about.assume_init() };
    let file_system = u32::try_from(about.f_type & 0xffff_ffff).unwrap_or(0);
    if LOCAL_FILE_SYSTEMS.contains(&file_system) { Ok(()) } else { Err(DescriptorFault::FileSystem(file_system)) }
}

/// The type bits of a descriptor's mode (S_IFMT), as far as the kernel knows them without asking a file system's server.
fn kind(descriptor: BorrowedFd<'_>) -> Result<u32, SysError> {
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    let mut about = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty string, and the call fills the structure, which lives until after it.
    let result =
        unsafe { libc::statx(descriptor.as_raw_fd(), c"".as_ptr(), flags, libc::STATX_TYPE, about.as_mut_ptr()) };
    Errno::result(result).map_err(SysError::of("statx"))?;
    // SAFETY: the call succeeded; and all zeros is a value of it, too.
    let about = unsafe { about.assume_init() };
    Ok(u32::from(about.stx_mode) & libc::S_IFMT)
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::net::UnixStream};

    use nix::sys::{
        epoll::{Epoll, EpollCreateFlags},
        eventfd::{EfdFlags, EventFd},
        timerfd::{ClockId, TimerFd, TimerFlags},
    };

    use super::*;

    #[test]
    fn eventfd_is_made_non_blocking_and_its_counter_stays() {
        let blocking = EventFd::from_value_and_flags(7, EfdFlags::EFD_CLOEXEC).unwrap();
        let checked = eventfd(OwnedFd::from(blocking)).unwrap();
        let mut count = [0; 8];
        nix::unistd::read(&checked, &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 7);
        assert_eq!(nix::unistd::read(&checked, &mut count), Err(Errno::EAGAIN));
    }

    #[test]
    fn eventfd_whose_counter_is_full_is_one_all_the_same() {
        let full = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC).unwrap();
        full.write(u64::MAX - 1).unwrap();
        let checked = eventfd(OwnedFd::from(full)).unwrap();
        assert_eq!(nix::unistd::write(&checked, &1u64.to_ne_bytes()), Err(Errno::EAGAIN), "and does not block");
    }

    #[test]
    fn whatever_is_no_eventfd_is_refused() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let (socket, _peer) = UnixStream::pair().unwrap();
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::empty()).unwrap();
        let others: [OwnedFd; 7] = [
            reader,
            writer,
            socket.into(),
            Epoll::new(EpollCreateFlags::empty()).unwrap().0,
            timer.into(),
            File::options().read(true).write(true).open("/dev/null").unwrap().into(),
            tempfile::tempfile().unwrap().into(),
        ];
        for (at, other) in others.into_iter().enumerate() {
            assert_eq!(eventfd(other).unwrap_err(), DescriptorFault::NotEvent, "number {at}");
        }
    }

    #[test]
    fn memory_is_taken_from_files_that_the_kernel_has_itself() {
        let mut file = File::from(nix::sys::memfd::memfd_create(c"m", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap());
        file.write_all(&[1]).unwrap();
        check_memory_file(&file).unwrap();
        let proc_file = File::open("/proc/self/status").unwrap();
        assert!(matches!(check_memory_file(&proc_file), Err(DescriptorFault::FileSystem(0x9fa0))));
        let (reader, _writer) = nix::unistd::pipe().unwrap();
        assert_eq!(check_memory_file(&File::from(reader)), Err(DescriptorFault::NotFile));
        assert_eq!(check_memory_file(&File::open("/dev/null").unwrap()), Err(DescriptorFault::NotFile));
    }
}
