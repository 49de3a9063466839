//! A client's side of the control socket.
//!
//! In:    requests, with files for one of them; the server's frames
//! Out:   messages, or a [`LinkError`] that says why there are none
//! Runs:  on the caller's thread
//! Full:  a send waits until the server has read, [`SEND_TIME_MAX`] at most; the server reads whenever its answers are
//!        read, so one that does not is stopped or dead, and after that the link is of no use
//! Trust: the server, though not with its frames: they are checked like any others

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::errno::Errno;
use vtrace_common::{
    limits::{CLIENTS_MAX, USER_CLIENTS_MAX},
    wire::{
        Decoder, Fault, Frame, Hello, Message,
        client::{FromServer, Refusal, ToServer},
        encode,
    },
};

use super::CONTROL_SOCKET;
use crate::sys::{
    SysError,
    socket::{Peer, receive, send_all},
    wait::readable,
};

/// How long a server may take to greet.
const HELLO_TIME_MAX: Duration = Duration::from_secs(5);
/// How long a server may leave what was sent unread.
pub const SEND_TIME_MAX: Duration = Duration::from_secs(10);
/// Bytes read at a time.
const PIECE_BYTES: usize = 16 << 10;

/// Why a request to a server failed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// No process listens there.
    #[error("no server at {}", path.display())]
    NoServer {
        /// The socket.
        path: PathBuf,
        /// Why it cannot be connected.
        source: io::Error,
    },
    /// The socket's permissions keep this user out.
    #[error("the server at {} is not for this user", path.display())]
    Denied {
        /// The socket.
        path: PathBuf,
        /// Why it cannot be connected.
        source: io::Error,
    },
    /// The server speaks another wire version.
    #[error(
        "the server ({}) speaks wire versions {} to {}, this client speaks {}",
        hello.software, hello.version_min, hello.version_max, vtrace_common::wire::VERSION
    )]
    Version {
        /// What it says of itself.
        hello: Hello,
    },
    /// The server connected and said nothing.
    #[error("the server at {} does not answer", path.display())]
    Silent {
        /// The socket.
        path: PathBuf,
    },
    /// The server neither reads nor answers: it is stopped, or hangs.
    #[error("the server (pid {pid}) has neither read nor answered for {} s", waited.as_secs())]
    Stalled {
        /// Its process.
        pid: u32,
        /// How long that was waited for.
        waited: Duration,
    },
    /// It has no place for one more client.
    #[error("the server (pid {pid}) serves as many clients as it can: {CLIENTS_MAX}, {USER_CLIENTS_MAX} of one user")]
    Full {
        /// Its process.
        pid: u32,
    },
    /// The server has closed the link.
    #[error("the server has closed the link")]
    Closed,
    /// The server sent something that is no message, or the request is beyond its bounds.
    #[error("message: {0}")]
    Message(Fault),
    /// The socket failed.
    #[error("socket")]
    Socket(#[from] SysError),
}

impl From<Fault> for LinkError {
    fn from(fault: Fault) -> Self {
        Self::Message(fault)
    }
}

/// A link to a server that speaks our version.
#[derive(Debug)]
pub struct Link {
    socket: UnixStream,
    decoder: Decoder,
    server: Hello,
    peer: Peer,
    send_time_max: Duration,
}

impl Link {
    /// Connects to the server of `directory` and exchanges hellos.
    pub fn connect(directory: &Path) -> Result<Self, LinkError> {
        let path = directory.join(CONTROL_SOCKET);
        let socket = UnixStream::connect(&path).map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => LinkError::Denied { path: path.clone(), source },
            _ => LinkError::NoServer { path: path.clone(), source },
        })?;
        Self::greet(socket, &path, SEND_TIME_MAX)
    }

    fn greet(socket: UnixStream, path: &Path, send_time_max: Duration) -> Result<Self, LinkError> {
        let peer = Peer::of(&socket)?;
        let refused = |error: io::Error| SysError {
            call: "setsockopt SO_SNDTIMEO",
            errno: Errno::from_raw(error.raw_os_error().unwrap_or_default()),
        };
        socket.set_write_timeout(Some(send_time_max)).map_err(refused)?;
        let server = Hello { version_min: 0, version_max: 0, ..Hello::ours("") };
        let mut link = Self { socket, decoder: Decoder::default(), server, peer, send_time_max };
        // A server that is full says so and closes, and may have done it before our hello: what it said is still there.
        let sent = link.transmit(&Hello::ours(vtrace_common::SOFTWARE), &[]);
        if !matches!(sent, Err(LinkError::Closed)) {
            sent?;
        }
        let frame = link.frame(Some(HELLO_TIME_MAX))?.ok_or_else(|| LinkError::Silent { path: path.into() })?;
        link.server = frame.open()?;
        if link.server.speaks_ours() { Ok(link) } else { Err(LinkError::Version { hello: link.server }) }
    }

    /// What the server says of itself.
    pub fn server(&self) -> &Hello {
        &self.server
    }

    /// The server's process.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Sends a request.
    pub fn send(&mut self, request: &ToServer) -> Result<(), LinkError> {
        self.request(request, &[])
    }

    /// Sends a request and descriptors for `files` with it.
    pub fn send_with_files(&mut self, request: &ToServer, files: &[&File]) -> Result<(), LinkError> {
        let descriptors: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
        self.request(request, &descriptors)
    }

    /// A server that has closed the link may have sent the reason before.
    fn request(&mut self, request: &ToServer, with: &[BorrowedFd<'_>]) -> Result<(), LinkError> {
        let sent = self.transmit(request, with);
        if !matches!(sent, Err(LinkError::Closed)) {
            return sent;
        }
        while let Ok(Some(message)) = self.receive(Some(Duration::ZERO)) {
            if message == FromServer::Refused(Refusal::Full) {
                return Err(LinkError::Full { pid: self.peer.pid });
            }
        }
        sent
    }

    /// The next message; waits for `timeout`, or for ever. `None`: none came in time.
    ///
    /// One read can bring several messages, so after the descriptor polled readable call this with
    /// `Some(Duration::ZERO)` until it gives `None`.
    pub fn receive(&mut self, timeout: Option<Duration>) -> Result<Option<FromServer>, LinkError> {
        Ok(self.frame(timeout)?.map(|frame| frame.open()).transpose()?)
    }

    fn transmit(&self, message: &impl Message, with: &[BorrowedFd<'_>]) -> Result<(), LinkError> {
        match send_all(self.socket.as_fd(), &encode(message)?, with) {
            Err(SysError { errno: Errno::EPIPE | Errno::ECONNRESET, .. }) => Err(LinkError::Closed),
            Err(error) if error.would_block() => {
                Err(LinkError::Stalled { pid: self.peer.pid, waited: self.send_time_max })
            }
            result => Ok(result?),
        }
    }

    fn frame(&mut self, timeout: Option<Duration>) -> Result<Option<Frame>, LinkError> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let mut piece = [0; PIECE_BYTES];
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok(Some(frame));
            }
            match receive(self.socket.as_fd(), &mut piece) {
                Ok((0, _)) | Err(SysError { errno: Errno::ECONNRESET, .. }) => return Err(LinkError::Closed),
                Ok((count, _)) => self.decoder.push(&piece[..count]),
                Err(error) if error.would_block() => {
                    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
                    if left == Some(Duration::ZERO) {
                        return Ok(None);
                    }
                    self.wait(left)?;
                }
                Err(SysError { errno: Errno::EINTR, .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn wait(&self, left: Option<Duration>) -> Result<(), LinkError> {
        let limit = left.map(|left| left + Duration::from_millis(1));
        Ok(readable(&[self.socket.as_fd()], limit, &mut Vec::new())?)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::socket::send_now;

    #[test]
    fn server_that_is_full_is_named_although_it_has_closed_the_link() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let hello = encode(&Hello::ours(vtrace_common::SOFTWARE)).unwrap();
        let full = encode(&FromServer::Refused(Refusal::Full)).unwrap();
        send_now(theirs.as_fd(), &[hello, full].concat(), None).unwrap();
        let mut link = Link::greet(ours, Path::new("there"), SEND_TIME_MAX).unwrap();
        drop(theirs);
        let error = link.send(&ToServer::List).unwrap_err();
        assert!(matches!(error, LinkError::Full { pid } if pid == std::process::id()), "{error}");
        assert!(matches!(link.send(&ToServer::List), Err(LinkError::Closed)), "said once");
    }

    #[test]
    fn server_that_does_not_read_holds_up_a_send_for_a_while_only() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let hello = encode(&Hello::ours(vtrace_common::SOFTWARE)).unwrap();
        send_now(theirs.as_fd(), &hello, None).unwrap();
        let limit = Duration::from_millis(50);
        let mut link = Link::greet(ours, Path::new("there"), limit).unwrap();
        let begun = Instant::now();
        let error = loop {
            if let Err(error) = link.send(&ToServer::Claim { guest: "g".repeat(60) }) {
                break error;
            }
        };
        assert!(matches!(error, LinkError::Stalled { pid, waited } if pid == std::process::id() && waited == limit));
        assert!((limit..Duration::from_secs(20)).contains(&begun.elapsed()));
    }
}
