//! The server's sockets in the file system.
//!
//! In:    paths
//! Out:   listening sockets that are removed when the server ends
//! Runs:  once, at the start
//! Full:  the kernel's backlog
//! Trust: the directory: whoever may write there may be the server. A socket that a process listens on is left alone.
//!
//! Permissions are set between bind and listen, before a process can connect.

use std::{
    fs, io,
    os::{
        fd::AsRawFd,
        unix::{
            fs::{FileTypeExt, MetadataExt, PermissionsExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind as bind_socket, listen, socket},
    unistd::{Gid, chown},
};

use super::CONTROL_GROUP;
use crate::sys::{
    account,
    socket::{Peer, dial},
};

/// Owner and group may connect, which takes permission to write.
const MODE: u32 = 0o660;

/// How long a process that listens at one of our paths and does not accept is waited for.
const LOOK_MAX: Duration = Duration::from_secs(2);

/// Why a socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketFault {
    /// A process listens there.
    #[error("another server (pid {pid}) listens at {}", path.display())]
    Taken {
        /// The socket.
        path: PathBuf,
        /// Its process.
        pid: u32,
    },
    /// Something else is there.
    #[error("{} is there and is not a socket", path.display())]
    NotSocket {
        /// The path.
        path: PathBuf,
    },
    /// The kernel refused.
    #[error("socket {}: {call}", path.display())]
    Refused {
        /// The path.
        path: PathBuf,
        /// The call that failed.
        call: &'static str,
        /// Its error.
        source: io::Error,
    },
}

/// Who may connect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Access {
    /// The group [`CONTROL_GROUP`], if there is one.
    Clients,
    /// The group of the directory: often QEMU's.
    Vmm,
}

/// A socket's path, unlinked when dropped.
#[derive(Debug)]
pub(super) struct Bound {
    path: PathBuf,
    /// Of the socket we made: another one at the same path is not ours to remove.
    inode: u64,
}

impl Bound {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Listens at `path`, non-blocking. A socket there that no process listens on is replaced.
pub(super) fn bind(path: &Path, access: Access) -> Result<(UnixListener, Bound), SocketFault> {
    remove_stale(path)?;
    let refused = |call| move |source: io::Error| SocketFault::Refused { path: path.into(), call, source };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let descriptor =
        socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(|errno| refused("socket")(errno.into()))?;
    let address = UnixAddr::new(path).map_err(|errno| refused("address")(errno.into()))?;
    bind_socket(descriptor.as_raw_fd(), &address).map_err(|errno| refused("bind")(errno.into()))?;
    let inode = fs::symlink_metadata(path).map_err(refused("stat"))?.ino();
    let bound = Bound { path: path.into(), inode };
    fs::set_permissions(path, fs::Permissions::from_mode(MODE)).map_err(refused("chmod"))?;
    if let Some(group) = group(path, access)
        && let Err(errno) = chown(path, None, Some(group))
    {
        log::warn!("{}: its group stays as it is: {errno}", path.display());
    }
    listen(&descriptor, Backlog::MAXCONN).map_err(|errno| refused("listen")(errno.into()))?;
    Ok((descriptor.into(), bound))
}

fn group(path: &Path, access: Access) -> Option<Gid> {
    match access {
        Access::Clients => account::group(CONTROL_GROUP).map(Gid::from_raw),
        Access::Vmm => fs::metadata(path.parent()?).ok().map(|directory| Gid::from_raw(directory.gid())),
    }
}

fn remove_stale(path: &Path) -> Result<(), SocketFault> {
    let refused = |call| move |source| SocketFault::Refused { path: path.into(), call, source };
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => return Err(SocketFault::NotSocket { path: path.into() }),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(refused("stat")(error)),
    }
    match dial(path, LOOK_MAX) {
        Ok(listener) => {
            let pid = Peer::of(&listener).map_or(0, |peer| peer.pid);
            Err(SocketFault::Taken { path: path.into(), pid })
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(refused("remove a stale socket"))
        }
        Err(error) => Err(refused("connect")(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_with_a_listener_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let first = bind(&path, Access::Clients).unwrap();
        let Err(SocketFault::Taken { pid, .. }) = bind(&path, Access::Clients) else { panic!("not refused") };
        assert_eq!(pid, std::process::id());
        drop(first);
        assert!(!path.exists());
    }

    #[test]
    fn socket_without_a_listener_is_replaced_and_a_file_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("guest1.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let (_listener, bound) = bind(&path, Access::Vmm).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, MODE);
        drop(bound);
        fs::write(&path, "a person's file").unwrap();
        assert!(matches!(bind(&path, Access::Vmm), Err(SocketFault::NotSocket { .. })));
        let fifo = folder.path().join("guest2.sock");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(bind(&fifo, Access::Vmm), Err(SocketFault::NotSocket { .. })));
        let link = folder.path().join("guest3.sock");
        std::os::unix::fs::symlink(&fifo, &link).unwrap();
        assert!(matches!(bind(&link, Access::Vmm), Err(SocketFault::NotSocket { .. })));
    }

    #[test]
    fn server_that_listens_and_never_accepts_is_left_alone_after_a_bounded_wait() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        let _first = std::os::unix::net::UnixStream::connect(&path).unwrap();
        let begun = std::time::Instant::now();
        let fault = bind(&path, Access::Clients).unwrap_err();
        assert!(matches!(fault, SocketFault::Refused { call: "connect", .. }), "{fault}");
        assert!(begun.elapsed() < 10 * LOOK_MAX && path.exists());
    }

    #[test]
    fn socket_of_a_successor_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("guest1.sock");
        let (_listener, bound) = bind(&path, Access::Vmm).unwrap();
        fs::remove_file(&path).unwrap();
        // Kept open so that the inode is not used again.
        let _successor = UnixListener::bind(&path).unwrap();
        drop(bound);
        assert!(path.exists());
    }
}
