//! The vhost-user connection of one VMM: whole requests in, answers out.
//!
//! In:    bytes and descriptors of the socket, in whatever pieces they come
//! Out:   requests, each whole and with no more descriptors than it may have, to the `vhost` crate; its answers to the VMM
//! Runs:  on the device's thread; nothing here waits
//! Full:  while the VMM has not read its answers no further request is read; a longer request than the protocol's
//!        longest is taken out of the stream
//! Trust: the VMM with nothing. The crate would wait for the rest of half a request, take the body of a malformed one for
//!        the next, and lose descriptors that it did not expect. So it reads from a socket pair of ours: only what was
//!        checked here, and nothing of one request is left for the next.
//!
//! Source: QEMU docs/interop/vhost-user.rst, "Message Specification": u32 request, u32 flags, u32 size of the payload.

use std::{
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use vhost::vhost_user::{
    BackendReqHandler, Error,
    message::{FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE},
};

use super::backend::Backend;
use crate::sys::{
    SysError,
    socket::{receive_with, send_all, send_now},
};

/// Time in which a request that has begun must be whole. QEMU sends each in one call.
pub(super) const REQUEST_TIME_MAX: Duration = Duration::from_secs(10);

/// Bytes of a header.
const HEADER_BYTES: usize = 12;
/// Flags: version in the two lowest bits, then these.
const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;
/// SET_MEM_TABLE's payload up to the first region: u32 regions, u32 padding.
const TABLE_BYTES: usize = 8;

/// A request's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Request {
    code: u32,
    flags: u32,
    bytes: usize,
}

impl Request {
    /// The header that `bytes` begin with, if they are long enough.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let number = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        Some(Self { code: number(0)?, flags: number(4)?, bytes: usize::try_from(number(8)?).unwrap_or(usize::MAX) })
    }

    /// What the crate calls it; `None` for a request that it does not know or that is not one of ours.
    fn known(&self) -> Option<FrontendReq> {
        let is_request = self.flags & !NEED_REPLY == VERSION;
        FrontendReq::try_from(self.code).ok().filter(|_| is_request)
    }

    fn needs_reply(&self) -> bool {
        self.flags & NEED_REPLY != 0
    }

    /// The answer `value` to a request that asks for one.
    fn answer(&self, value: u64) -> Vec<u8> {
        let header = [self.code, VERSION | REPLY, 8].map(u32::to_le_bytes).concat();
        [header, value.to_le_bytes().to_vec()].concat()
    }
}

/// Descriptors that a request may have. Those of requests that were not offered are of no use: the crate refuses them.
fn descriptors_max(request: FrontendReq) -> usize {
    match request {
        FrontendReq::SET_MEM_TABLE => MAX_ATTACHED_FD_ENTRIES,
        FrontendReq::ADD_MEM_REG
        | FrontendReq::SET_VRING_KICK
        | FrontendReq::SET_VRING_CALL
        | FrontendReq::SET_VRING_ERR => 1,
        _ => 0,
    }
}

/// What a step came to.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Progress {
    /// There is nothing to do until the socket is ready again.
    Waits,
    /// A request was served.
    DeviceRings,
    /// A request was skipped, or served without what was wrong with it.
    Faulty(RequestFault),
}

/// What was wrong with a request.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum RequestFault {
    #[error("request {code} with flags {flags:#x} and {bytes} bytes is unknown: skipped")]
    Unknown { code: u32, flags: u32, bytes: usize },
    #[error("request {code} came with {found} descriptors and may have {allowed}: they are closed")]
    Descriptors { code: u32, found: usize, allowed: usize },
    #[error("request {code} is refused: {why}")]
    Refused { code: u32, why: String },
}

/// Why a connection has ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error("it was closed")]
    Closed,
    #[error("a request did not become whole within {} s", REQUEST_TIME_MAX.as_secs())]
    Stalled,
    #[error("{0}")]
    Socket(#[from] SysError),
    #[error("the request handler failed: {0}")]
    Handler(Error),
}

/// One VMM.
pub(super) struct Connection {
    socket: UnixStream,
    handler: BackendReqHandler<Mutex<Backend>>,
    /// The other end of the handler's socket.
    inner: UnixStream,
    /// The handler's socket, to take out what it has left unread.
    handled: UnixStream,
    /// The request that is arriving, and when its first byte came.
    request: Vec<u8>,
    since: Option<Instant>,
    /// Bytes of a request that is too long, still to be taken out of the stream.
    skipped: Option<(Request, usize)>,
    descriptors: Vec<OwnedFd>,
    descriptors_found: usize,
    /// Answers that the VMM's socket has not taken.
    answers: Vec<u8>,
}

impl Connection {
    /// Serves requests of `socket` by `backend`. Nothing is read yet.
    pub(super) fn new(socket: UnixStream, backend: Arc<Mutex<Backend>>) -> std::io::Result<Self> {
        socket.set_nonblocking(true)?;
        let (inner, handled) = UnixStream::pair()?;
        let handler = BackendReqHandler::from_stream(handled.try_clone()?, backend);
        Ok(Self {
            socket,
            handler,
            inner,
            handled,
            request: Vec::new(),
            since: None,
            skipped: None,
            descriptors: Vec::new(),
            descriptors_found: 0,
            answers: Vec::new(),
        })
    }

    /// The VMM's socket.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// When [`Connection::step`] is due without the socket being ready.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.since.map(|since| since + REQUEST_TIME_MAX)
    }

    /// Serves the next request, if it is there whole. An error is the connection's end.
    pub(super) fn step(&mut self, backend: &Mutex<Backend>) -> Result<Progress, ConnectionError> {
        if !self.flush()? {
            return Ok(Progress::Waits);
        }
        if !self.fill()? {
            let is_late = self.deadline().is_some_and(|deadline| Instant::now() >= deadline);
            return if is_late { Err(ConnectionError::Stalled) } else { Ok(Progress::Waits) };
        }
        let progress = self.serve(backend)?;
        self.flush()?;
        Ok(progress)
    }

    /// Sends what waits; true if all of it is sent.
    fn flush(&mut self) -> Result<bool, ConnectionError> {
        while !self.answers.is_empty() {
            match send_now(self.socket.as_fd(), &self.answers, None) {
                Ok(sent) => drop(self.answers.drain(..sent)),
                Err(error) if error.would_block() => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    /// Reads on until a request is whole (true) or nothing more has come.
    fn fill(&mut self) -> Result<bool, ConnectionError> {
        loop {
            let missing = match (&mut self.skipped, Request::parse(&self.request)) {
                (Some((_, 0)), _) => return Ok(true),
                (Some((_, left)), _) => *left,
                (None, None) => HEADER_BYTES - self.request.len(),
                (None, Some(request)) if request.bytes > MAX_MSG_SIZE => {
                    self.skipped = Some((request, request.bytes));
                    continue;
                }
                (None, Some(request)) => HEADER_BYTES + request.bytes - self.request.len(),
            };
            if missing == 0 {
                return Ok(true);
            }
            let mut piece = [0; HEADER_BYTES + MAX_MSG_SIZE];
            let room = missing.min(piece.len());
            let Some((count, descriptors)) = self.read(&mut piece[..room])? else { return Ok(false) };
            self.since.get_or_insert_with(Instant::now);
            self.descriptors_found += descriptors.len();
            let free = MAX_ATTACHED_FD_ENTRIES.saturating_sub(self.descriptors.len());
            self.descriptors.extend(descriptors.into_iter().take(free));
            match &mut self.skipped {
                Some((_, left)) => *left -= count,
                None => self.request.extend_from_slice(&piece[..count]),
            }
        }
    }

    /// Bytes and descriptors that have come; `None` if there are none.
    fn read(&self, into: &mut [u8]) -> Result<Option<(usize, Vec<OwnedFd>)>, ConnectionError> {
        match receive_with(self.socket.as_fd(), into, MAX_ATTACHED_FD_ENTRIES + 1) {
            Ok((0, _)) => Err(ConnectionError::Closed),
            Ok(read) => Ok(Some(read)),
            Err(error) if error.would_block() || error.errno == nix::errno::Errno::EINTR => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Serves the request that is whole, and forgets it.
    fn serve(&mut self, backend: &Mutex<Backend>) -> Result<Progress, ConnectionError> {
        let bytes = std::mem::take(&mut self.request);
        let mut descriptors = std::mem::take(&mut self.descriptors);
        let found = std::mem::take(&mut self.descriptors_found);
        let skipped = self.skipped.take().map(|(request, _)| request);
        self.since = None;
        let Some(request) = skipped.or_else(|| Request::parse(&bytes)) else { return Ok(Progress::DeviceRings) };
        let Request { code, flags, bytes: payload_bytes } = request;
        let Some(known) = request.known().filter(|_| skipped.is_none()) else {
            if request.needs_reply() {
                self.answers = request.answer(1);
            }
            return Ok(Progress::Faulty(RequestFault::Unknown { code, flags, bytes: payload_bytes }));
        };
        if is_private_memory(known, &bytes) {
            backend.lock().unwrap_or_else(std::sync::PoisonError::into_inner).memory_is_private();
            if request.needs_reply() {
                self.answers = request.answer(0);
            }
            return Ok(Progress::DeviceRings);
        }
        let allowed = descriptors_max(known);
        if found > allowed {
            // Which of them are meant is not known: none is used.
            descriptors.clear();
        }
        let refused = self.hand_over(&request, &bytes, &descriptors)?;
        Ok(match refused {
            _ if found > allowed => Progress::Faulty(RequestFault::Descriptors { code, found, allowed }),
            Some(error) => Progress::Faulty(RequestFault::Refused { code, why: error.to_string() }),
            None => Progress::DeviceRings,
        })
    }

    /// Gives the crate a whole request and takes its answer; the error with which it refused, if it did.
    fn hand_over(
        &mut self,
        request: &Request,
        bytes: &[u8],
        descriptors: &[OwnedFd],
    ) -> Result<Option<Error>, ConnectionError> {
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        // It is empty and holds much more than a request.
        send_all(self.inner.as_fd(), bytes, &borrowed)?;
        let result = self.handler.handle_request();
        discard(&self.handled)?;
        self.answers = drain(&self.inner)?;
        let Err(error) = result else { return Ok(None) };
        if matches!(error, Error::Disconnected | Error::SocketBroken(_) | Error::SocketError(_)) {
            return Err(ConnectionError::Handler(error));
        }
        if request.needs_reply() && self.answers.is_empty() {
            self.answers = request.answer(1);
        }
        Ok(Some(error))
    }
}

/// A memory table without regions: none of the VMM's memory can be shared. The crate refuses such a table.
fn is_private_memory(request: FrontendReq, bytes: &[u8]) -> bool {
    let payload = &bytes[HEADER_BYTES..];
    request == FrontendReq::SET_MEM_TABLE && payload.len() == TABLE_BYTES && payload[..4] == [0; 4]
}

/// Takes all that waits in a socket of ours.
fn drain(socket: &UnixStream) -> Result<Vec<u8>, SysError> {
    let (mut all, mut piece) = (Vec::new(), [0; HEADER_BYTES + MAX_MSG_SIZE]);
    loop {
        match receive_with(socket.as_fd(), &mut piece, MAX_ATTACHED_FD_ENTRIES + 1) {
            Ok((0, _)) => return Ok(all),
            Ok((count, _)) => all.extend_from_slice(&piece[..count]),
            Err(error) if error.would_block() => return Ok(all),
            Err(error) => return Err(error),
        }
    }
}

/// Takes all that waits in a socket of ours, and drops it.
fn discard(socket: &UnixStream) -> Result<(), SysError> {
    drain(socket)?;
    Ok(())
}

#[cfg(test)]
mod tests;
