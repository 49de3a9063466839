//! Unix sockets: descriptors that come with bytes, bytes that wait, the process on the other side.
//!
//! In:    connected or listening unix stream sockets
//! Out:   bytes and owned descriptors
//! Runs:  on the caller's thread; nothing here blocks unless the socket does
//! Full:  the kernel closes descriptors of a message for which there is no room, and marks the message (MSG_CTRUNC)
//! Trust: the peer with nothing: every descriptor that the kernel installs is owned at once and closed when dropped,
//!        also those of a marked message and those that are not SCM_RIGHTS
#![expect(unsafe_code, reason = "descriptors that the kernel hands out as numbers become owned ones")]

use std::{
    io::{self, IoSlice},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt, send, sendmsg,
        setsockopt, socket,
        sockopt::{AcceptConn, PeerCredentials, SendTimeout},
    },
    sys::time::TimeVal,
};

use super::SysError;

/// Descriptors that [`receive`] takes from one message.
pub const DESCRIPTORS_MAX: usize = 4;
/// Descriptors that one message can carry (SCM_MAX_FD, include/net/scm.h).
pub const MESSAGE_DESCRIPTORS_MAX: usize = 253;
/// Bytes of `struct cmsghdr`: size_t length with this header, int level, int type.
const CONTROL_HEADER_BYTES: usize = size_of::<libc::cmsghdr>();
/// A pidfd among the control data (SCM_PIDFD, include/linux/socket.h), where the socket's owner asked for it.
const SCM_PIDFD: libc::c_int = 4;

/// The process that connected, as it was when it did (SO_PEERCRED).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Its process id.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
}

impl Peer {
    /// The pid of `other` as this peer may see it: root sees all, a user its own; 0 stands for the rest.
    pub fn told_pid(self, other: Self) -> u32 {
        if self.uid == 0 || self.uid == other.uid { other.pid } else { 0 }
    }

    /// Who connected `socket`.
    pub fn of(socket: &UnixStream) -> Result<Self, SysError> {
        let credentials = getsockopt(socket, PeerCredentials).map_err(SysError::of("getsockopt SO_PEERCRED"))?;
        // 0 is what the kernel gives for a process of another pid namespace.
        Ok(Self { pid: u32::try_from(credentials.pid()).unwrap_or(0), uid: credentials.uid() })
    }
}

/// Connects to a socket. A process that listens there and does not accept is waited for up to `wait_max`, then
/// `WouldBlock`.
pub fn dial(path: &Path, wait_max: Duration) -> io::Result<UnixStream> {
    let descriptor = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // unix(7): connect waits for room in the backlog as long as a send would.
    setsockopt(
        &descriptor,
        SendTimeout,
        &TimeVal::new(wait_max.as_secs().try_into().unwrap_or(i64::MAX), wait_max.subsec_micros().into()),
    )?;
    connect(descriptor.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(descriptor.into())
}

/// Whether `socket` accepts connections (SO_ACCEPTCONN).
pub fn is_listening(socket: BorrowedFd<'_>) -> Result<bool, SysError> {
    getsockopt(&socket, AcceptConn).map_err(SysError::of("getsockopt SO_ACCEPTCONN"))
}

/// Whether the other end of a connected socket has been closed, read or not what came before that.
pub fn has_hung_up(socket: &UnixStream) -> bool {
    let mut polled = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    // What cannot be polled is not there any more, either.
    poll(&mut polled, PollTimeout::ZERO) != Ok(0)
}

/// Takes what has come, without waiting: bytes (0: the other side closed) and up to [`DESCRIPTORS_MAX`] descriptors that
/// came with them, close-on-exec.
pub fn receive(socket: BorrowedFd<'_>, into: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), SysError> {
    receive_with(socket, into, DESCRIPTORS_MAX)
}

/// The same with room for `descriptors_max` descriptors, at most [`MESSAGE_DESCRIPTORS_MAX`]; alignment may leave room
/// for one more.
pub fn receive_with(
    socket: BorrowedFd<'_>,
    into: &mut [u8],
    descriptors_max: usize,
) -> Result<(usize, Vec<OwnedFd>), SysError> {
    const WORDS: usize = (CONTROL_HEADER_BYTES + MESSAGE_DESCRIPTORS_MAX * size_of::<RawFd>()).div_ceil(8);
    let mut control = [0u64; WORDS];
    let room = CONTROL_HEADER_BYTES + descriptors_max.min(MESSAGE_DESCRIPTORS_MAX) * size_of::<RawFd>();
    let mut bytes = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    // SAFETY: a header of zeros has no name, no bytes and no control data.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut bytes;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = room.next_multiple_of(size_of::<u64>());
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the header names one buffer and one control buffer, both borrowed for the call and as long as it says.
    let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
    let count = Errno::result(count).map_err(SysError::of("recvmsg"))?;
    // Before anything can fail: what the kernel has installed is this process's.
    let descriptors = adopt(&control, header.msg_controllen);
    Ok((usize::try_from(count).unwrap_or(0), descriptors))
}

/// Owns every descriptor among `bytes` of control data. The kernel counts in each header what it has installed, also
/// where the rest had no room.
fn adopt(control: &[u64], bytes: usize) -> Vec<OwnedFd> {
    let data: Vec<u8> = control.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let mut rest = &data[..bytes.min(data.len())];
    let mut descriptors = Vec::new();
    while rest.len() >= CONTROL_HEADER_BYTES {
        let length = usize::from_ne_bytes(*rest.first_chunk().expect("a header is longer"));
        let level = i32::from_ne_bytes(*rest[8..].first_chunk().expect("a header is longer"));
        let kind = i32::from_ne_bytes(*rest[12..].first_chunk().expect("a header is longer"));
        let end = length.clamp(CONTROL_HEADER_BYTES, rest.len());
        if level == libc::SOL_SOCKET && matches!(kind, libc::SCM_RIGHTS | SCM_PIDFD) {
            let numbers = rest[CONTROL_HEADER_BYTES..end].chunks_exact(size_of::<RawFd>());
            let numbers = numbers.map(|number| RawFd::from_ne_bytes(*number.first_chunk().expect("four bytes")));
            // SAFETY: the kernel has just installed these descriptors for us; no other code knows their numbers. A pidfd
            // that could not be had is a negative number.
            descriptors
                .extend(numbers.filter(|number| *number >= 0).map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
        rest = &rest[end.next_multiple_of(size_of::<u64>()).min(rest.len())..];
    }
    descriptors
}

/// Sends what fits now, without waiting; the descriptor, if any, goes with the first byte.
pub fn send_now(socket: BorrowedFd<'_>, bytes: &[u8], with: Option<BorrowedFd<'_>>) -> Result<usize, SysError> {
    transmit(socket, bytes, with.as_slice(), MsgFlags::MSG_DONTWAIT)
}

/// Sends everything; waits as the socket does. The descriptors, at most [`MESSAGE_DESCRIPTORS_MAX`], go with the first
/// byte.
pub fn send_all(socket: BorrowedFd<'_>, bytes: &[u8], with: &[BorrowedFd<'_>]) -> Result<(), SysError> {
    let (mut done, mut with) = (0, with);
    while done < bytes.len() {
        match transmit(socket, &bytes[done..], with, MsgFlags::empty()) {
            Ok(sent) => (done, with) = (done + sent, &[]),
            Err(SysError { errno: Errno::EINTR, .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn transmit(socket: BorrowedFd<'_>, bytes: &[u8], with: &[BorrowedFd<'_>], flags: MsgFlags) -> Result<usize, SysError> {
    let flags = flags | MsgFlags::MSG_NOSIGNAL;
    if with.is_empty() {
        return send(socket.as_raw_fd(), bytes, flags).map_err(SysError::of("send"));
    }
    let numbers: Vec<RawFd> = with.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&numbers)];
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], &control, flags, None).map_err(SysError::of("sendmsg"))
}

/// A descriptor that was open when this program started and whose number is an argument (`--fd`).
/// Call it once for a number, before anything else was opened.
pub fn inherited(number: RawFd) -> Result<OwnedFd, SysError> {
    // SAFETY: F_GETFD touches no memory; it fails if the descriptor is not open.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    Errno::result(flags).map_err(SysError::of("fcntl F_GETFD"))?;
    // SAFETY: it is open, and it is the caller's to give away: nothing in this program opened it.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    // It must not leak into children.
    let close_on_exec = nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC);
    nix::fcntl::fcntl(descriptor.as_fd(), close_on_exec).map_err(SysError::of("fcntl F_SETFD"))?;
    Ok(descriptor)
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write};

    use super::*;

    #[test]
    fn descriptor_travels_with_its_bytes() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = File::open("/dev/null").unwrap();
        send_all(ours.as_fd(), b"plain", &[]).unwrap();
        send_all(ours.as_fd(), b"with", &[file.as_fd()]).unwrap();
        let (mut bytes, mut descriptors) = (Vec::new(), Vec::new());
        while bytes.len() < 9 {
            let mut piece = [0; 64];
            let (count, more) = receive(theirs.as_fd(), &mut piece).unwrap();
            bytes.extend_from_slice(&piece[..count]);
            descriptors.extend(more);
        }
        assert_eq!((&bytes[..], descriptors.len()), (&b"plainwith"[..], 1));
    }

    /// Descriptors of this process that lead to this socket.
    fn descriptors_of(socket: &UnixStream) -> usize {
        let link = |number: RawFd| std::fs::read_link(format!("/proc/self/fd/{number}")).ok();
        let wanted = link(socket.as_raw_fd());
        let numbers = std::fs::read_dir("/proc/self/fd").unwrap();
        let numbers = numbers.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        numbers.filter(|number| link(*number) == wanted).count()
    }

    #[test]
    fn every_descriptor_of_a_message_with_too_many_is_closed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (sent, _other) = UnixStream::pair().unwrap();
        for count in [1, 3, 4, 5, 6, 32, MESSAGE_DESCRIPTORS_MAX] {
            for room in [0, 1, DESCRIPTORS_MAX, 32, MESSAGE_DESCRIPTORS_MAX] {
                send_all(ours.as_fd(), b"x", &vec![sent.as_fd(); count]).unwrap();
                let (bytes, descriptors) = receive_with(theirs.as_fd(), &mut [0; 8], room).unwrap();
                assert_eq!(bytes, 1);
                let installed = descriptors.len();
                assert!((count.min(room)..=count.min(room + 1)).contains(&installed), "{installed} of {count}");
                assert_eq!(descriptors_of(&sent), 1 + installed, "all that were installed are owned");
                drop(descriptors);
                assert_eq!(descriptors_of(&sent), 1, "{count} sent, room for {room}");
            }
        }
    }

    #[test]
    fn closed_socket_reads_as_nothing_and_an_empty_one_would_block() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        assert!(receive(theirs.as_fd(), &mut [0; 4]).unwrap_err().would_block());
        ours.write_all(b"x").unwrap();
        drop(ours);
        assert_eq!(receive(theirs.as_fd(), &mut [0; 4]).unwrap().0, 1);
        assert_eq!(receive(theirs.as_fd(), &mut [0; 4]).unwrap().0, 0);
    }

    #[test]
    fn number_that_is_not_open_is_refused() {
        assert_eq!(inherited(1 << 20).unwrap_err().errno, Errno::EBADF);
    }

    #[test]
    fn peer_is_this_process() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert_eq!(Peer::of(&ours).unwrap().pid, std::process::id());
        assert!(!is_listening(ours.as_fd()).unwrap());
    }
}
