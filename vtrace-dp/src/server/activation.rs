//! Sockets that were open before the server was: systemd listens, and starts the server at the first connection.
//!
//! In:    LISTEN_PID and LISTEN_FDS (sd_listen_fds(3)): descriptors from 3 on
//! Out:   listening sockets, each for the path it is bound to
//! Runs:  once, at the start
//! Full:  [`SOCKETS_MAX`] descriptors
//! Trust: whoever started this process. A descriptor that is not a listening socket, or whose path no guest has, is refused:
//!        a machine that connects there would wait for ever
//!
//! Such a socket is not made, not given rights, and not removed here: all that is the unit's.

use std::{
    io,
    os::{
        fd::{AsFd, RawFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
};

use vtrace_common::limits::{DEVICES_MAX, GUESTS_MAX};

use super::sockets::{self, Access, Bound, SocketFault};
use crate::sys::{
    SysError,
    socket::{inherited, is_listening},
};

/// The first descriptor (SD_LISTEN_FDS_START).
const FIRST: RawFd = 3;
/// One for each device, and the clients'.
const SOCKETS_MAX: usize = GUESTS_MAX * DEVICES_MAX + 1;

/// Why a server cannot take the sockets it was started with.
#[derive(Debug, thiserror::Error)]
pub enum ActivationFault {
    /// LISTEN_FDS is no number, or more than there can be.
    #[error("LISTEN_FDS is {0:?}: not a number of sockets up to {SOCKETS_MAX}")]
    Count(String),
    /// A descriptor is not what it should be.
    #[error("descriptor {number} of LISTEN_FDS")]
    Descriptor {
        /// Its number.
        number: RawFd,
        /// What is wrong with it.
        source: io::Error,
    },
    /// A socket that no guest and no client has.
    #[error("the socket at {} is neither the clients' nor a guest's", .0.display())]
    Stray(PathBuf),
}

/// Which descriptors this process was started with, from the values of LISTEN_PID and LISTEN_FDS. Those meant for
/// another process are none.
///
/// # Errors
/// [`ActivationFault::Count`]
pub fn descriptors(
    pid: u32,
    listen_pid: Option<&str>,
    listen_fds: Option<&str>,
) -> Result<Vec<RawFd>, ActivationFault> {
    let (Some(listen_pid), Some(count)) = (listen_pid, listen_fds) else { return Ok(Vec::new()) };
    if listen_pid.parse() != Ok(pid) {
        return Ok(Vec::new());
    }
    match count.parse::<usize>() {
        Ok(number) if number <= SOCKETS_MAX => Ok((FIRST..).take(number).collect()),
        _ => Err(ActivationFault::Count(count.into())),
    }
}

/// Listening sockets that are not assigned yet.
#[derive(Default, Debug)]
pub(super) struct Passed(Vec<(PathBuf, UnixListener)>);

impl Passed {
    /// Owns the descriptors of these numbers.
    pub(super) fn adopt(numbers: &[RawFd]) -> Result<Self, ActivationFault> {
        let adopt =
            |number: &RawFd| adopt(*number).map_err(|source| ActivationFault::Descriptor { number: *number, source });
        numbers.iter().map(adopt).collect::<Result<_, _>>().map(Self)
    }

    /// The socket that is bound to `path`, or a new one there.
    pub(super) fn bind(&mut self, path: &Path, access: Access) -> Result<(UnixListener, Option<Bound>), SocketFault> {
        let wanted = resolved(path);
        match self.0.iter().position(|(bound, _)| resolved(bound) == wanted) {
            Some(at) => {
                log::info!("{}: taken over as it is", path.display());
                Ok((self.0.swap_remove(at).1, None))
            }
            None => sockets::bind(path, access).map(|(listener, bound)| (listener, Some(bound))),
        }
    }

    /// All of them have been asked for.
    pub(super) fn check_taken(self) -> Result<(), ActivationFault> {
        self.0.into_iter().next().map_or(Ok(()), |(path, _)| Err(ActivationFault::Stray(path)))
    }
}

fn adopt(number: RawFd) -> io::Result<(PathBuf, UnixListener)> {
    let wrong = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, why);
    let descriptor = inherited(number)?;
    // Only a socket has a name to ask for.
    if !is_listening(descriptor.as_fd()).map_err(|error: SysError| io::Error::from(error))? {
        return Err(wrong("it does not listen"));
    }
    let listener = UnixListener::from(descriptor);
    listener.set_nonblocking(true)?;
    let path = listener.local_addr()?.as_pathname().ok_or_else(|| wrong("it is bound to no path"))?.to_path_buf();
    Ok((path, listener))
}

/// The same socket may be named through a link (/var/run).
fn resolved(path: &Path) -> PathBuf {
    match (path.parent().map(Path::canonicalize), path.file_name()) {
        (Some(Ok(parent)), Some(name)) => parent.join(name),
        _ => path.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    #[test]
    fn only_descriptors_meant_for_this_process_are_taken() {
        let count =
            |pid, listen_pid, listen_fds| descriptors(pid, listen_pid, listen_fds).map(|found| found.len()).ok();
        assert_eq!(descriptors(7, Some("7"), Some("2")).unwrap(), [3, 4]);
        assert_eq!(count(7, Some("8"), Some("2")), Some(0));
        assert_eq!(count(7, None, Some("2")), Some(0));
        assert_eq!(count(7, Some("7"), None), Some(0));
        for wrong in ["-1", "many", "", "99999"] {
            assert_eq!(count(7, Some("7"), Some(wrong)), None, "{wrong}");
        }
    }

    #[test]
    fn passed_socket_is_found_by_its_path_and_a_stray_one_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let number = |name: &str| UnixListener::bind(path(name)).unwrap().into_raw_fd();
        let mut passed = Passed::adopt(&[number("a.sock"), number("b.sock")]).unwrap();
        let through = folder.path().join("..").join(folder.path().file_name().unwrap()).join("b.sock");
        assert!(passed.bind(&through, Access::Vmm).unwrap().1.is_none(), "another name of the same folder");
        let (_listener, bound) = passed.bind(&path("c.sock"), Access::Vmm).unwrap();
        assert!(bound.is_some());
        let error = passed.check_taken().unwrap_err();
        assert!(matches!(&error, ActivationFault::Stray(stray) if *stray == path("a.sock")), "{error}");
    }

    #[test]
    fn descriptor_that_does_not_listen_is_refused() {
        let file = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
        assert!(matches!(Passed::adopt(&[file]), Err(ActivationFault::Descriptor { .. })));
        let (connected, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(matches!(Passed::adopt(&[connected.into_raw_fd()]), Err(ActivationFault::Descriptor { .. })));
        assert!(matches!(Passed::adopt(&[1 << 20]), Err(ActivationFault::Descriptor { .. })));
    }
}
