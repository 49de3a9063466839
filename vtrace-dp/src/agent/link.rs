//! Messages over an open control port.
//!
//! In:    bytes of the host; our messages
//! Out:   frames, and the TSC of each read; messages, written whole
//! Runs:  on the control thread; reading never blocks, sending waits for the host or for a signal
//! Full:  sending waits at most [`HOST_SILENCE`] for a host that reads nothing, then the host counts as gone
//! Trust: nothing; after a malformed frame everything that was read is discarded
//!
//! virtio_console (drivers/char/virtio_console.c): read(2) gives 0 while no host has the port open, EAGAIN while one
//! has; ENODEV once the port is unplugged. poll(2) reports HUP all the time in the first case, so waiting is edge-triggered.

use std::{
    cell::RefCell,
    io::Read,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd,
};
use vtrace_common::{
    time::GuestTsc,
    wire::{Decoder, Fault, Frame, Message, encode},
};

use crate::sys::tsc;

/// How long a host may send nothing, or read nothing, before it counts as gone; it pings every second.
pub(super) const HOST_SILENCE: Duration = Duration::from_secs(10);

/// The part of it that has to pass after the silence was noticed: the clock of a machine that was stopped jumps.
pub(super) const LAST_SILENCE: Duration = Duration::from_secs(2);
/// How long to wait for a host that has hung up: after a suspend its ports are closed until the driver has announced them.
const RETURN_MAX: Duration = Duration::from_secs(1);
/// The interval between looks at the port meanwhile.
const RETURN_LOOK: Duration = Duration::from_millis(10);

/// Why nothing can be sent to the host any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum HostGone {
    /// No host has the port open; one may open it.
    #[error("no host has the control port open")]
    Absent,
    /// The host does not read.
    #[error("the host has not read for {} s", HOST_SILENCE.as_secs())]
    Stalled,
    /// The host does not send.
    #[error("the host has sent nothing for {} s", HOST_SILENCE.as_secs())]
    Silent,
    /// Another hello: the host before it went unnoticed.
    #[error("another host has connected")]
    Replaced,
    /// The port is unplugged or has failed: it has to be found and opened again.
    #[error("the control port is gone: {0}")]
    Unplugged(Errno),
    /// The agent was asked to end.
    #[error("the agent was asked to end")]
    Asked,
}

/// The outcome of a read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum LinkRead {
    /// Bytes, and the TSC after the read.
    Bytes(GuestTsc),
    /// None now; a host has the port open.
    Nothing,
}

/// The control port, and the bytes of the next frame that were read.
#[derive(Debug)]
pub(super) struct Link {
    port: std::fs::File,
    decoder: Decoder,
    buffer: Vec<u8>,
    /// The rest of a message that a stalled host has not taken; it is sent before any other.
    unsent: RefCell<Vec<u8>>,
}

impl Link {
    /// Takes a non-blocking port.
    pub(super) fn new(port: OwnedFd) -> Self {
        Self { port: port.into(), decoder: Decoder::default(), buffer: vec![0; 4096], unsent: RefCell::default() }
    }

    /// Whether no host has the port open. A change is an edge for epoll.
    pub(super) fn is_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(self.port.as_fd(), PollFlags::empty())];
        let polled = poll(&mut fds, PollTimeout::ZERO).is_ok();
        polled && fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
    }

    /// Waits up to [`RETURN_MAX`] for a host that has hung up; whether it has the port open again.
    pub(super) fn returns(&self, quit: BorrowedFd<'_>) -> Result<bool, HostGone> {
        let begun = Instant::now();
        while self.is_hung_up() {
            if begun.elapsed() >= RETURN_MAX {
                return Ok(false);
            }
            let mut fds = [PollFd::new(quit, PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(RETURN_LOOK).expect("ten milliseconds");
            if poll(&mut fds, timeout) == Ok(1) {
                return Err(HostGone::Asked);
            }
        }
        Ok(true)
    }

    /// Reads once.
    pub(super) fn hear(&mut self) -> Result<LinkRead, HostGone> {
        match self.port.read(&mut self.buffer) {
            Ok(0) => Err(HostGone::Absent),
            Ok(count) => {
                let stamp = GuestTsc(tsc::read());
                self.decoder.push(&self.buffer[..count]);
                Ok(LinkRead::Bytes(stamp))
            }
            Err(error) => match Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO)) {
                Errno::EAGAIN => Ok(LinkRead::Nothing),
                Errno::EINTR => self.hear(),
                Errno::ECONNRESET | Errno::EPIPE => Err(HostGone::Absent),
                errno => Err(HostGone::Unplugged(errno)),
            },
        }
    }

    /// The next whole frame. After a fault everything that was read is discarded.
    pub(super) fn next_frame(&mut self) -> Result<Option<Frame>, Fault> {
        let frame = self.decoder.next_frame();
        if frame.is_err() {
            self.decoder.reset();
        }
        frame
    }

    /// Discards what was read and what was not taken: for a new host.
    pub(super) fn reset(&mut self) {
        self.decoder.reset();
        self.unsent.take();
    }

    /// Writes one message. Gives up when `quit` is readable.
    pub(super) fn send<M: Message>(&self, message: &M, quit: BorrowedFd<'_>) -> Result<(), HostGone> {
        let mut unsent = self.unsent.borrow_mut();
        self.write(&mut unsent, quit)?;
        *unsent = encode(message).expect("our own messages are within their bounds");
        let whole = unsent.len();
        let written = self.write(&mut unsent, quit);
        if unsent.len() == whole {
            unsent.clear(); // nothing of it is in the stream
        }
        written
    }

    /// Writes until nothing of `bytes` is left.
    fn write(&self, bytes: &mut Vec<u8>, quit: BorrowedFd<'_>) -> Result<(), HostGone> {
        while !bytes.is_empty() {
            match unistd::write(&self.port, bytes) {
                Ok(count) => drop(bytes.drain(..count)),
                Err(Errno::EAGAIN) => self.wait_writable(quit)?,
                Err(Errno::EINTR) => {}
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(HostGone::Absent),
                Err(errno) => return Err(HostGone::Unplugged(errno)),
            }
        }
        Ok(())
    }

    fn wait_writable(&self, quit: BorrowedFd<'_>) -> Result<(), HostGone> {
        let mut fds = [PollFd::new(self.port.as_fd(), PollFlags::POLLOUT), PollFd::new(quit, PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(HOST_SILENCE).expect("ten seconds are milliseconds");
        match poll(&mut fds, timeout) {
            Ok(0) => return Err(HostGone::Stalled),
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(()),
            Err(errno) => return Err(HostGone::Unplugged(errno)),
        }
        let said = |fd: &PollFd<'_>, flags| fd.revents().is_some_and(|events| events.intersects(flags));
        if said(&fds[1], PollFlags::POLLIN) {
            return Err(HostGone::Asked);
        }
        let hung_up = said(&fds[0], PollFlags::POLLHUP) && !said(&fds[0], PollFlags::POLLOUT);
        if !hung_up || self.returns(quit)? { Ok(()) } else { Err(HostGone::Absent) }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.port.as_fd()
    }
}
