//! One lane's descriptors, and how its bytes move.
//!
//! In:    a connection or a FIFO with a guest's pages; a lane and its file, while a client wants them
//! Out:   bytes at their place in the file, or nowhere
//! Runs:  on the worker's thread; waits for nothing but the file
//! Full:  a slow file leaves bytes where they are: the socket or FIFO fills, QEMU stops taking from the queue, the
//!        guest's ring buffer overwrites and counts
//! Trust: the guest with nothing: see [`StreamLane`]
//!
//! The bytes pass through the kernel only: a FIFO is spliced into the file, a socket into a pipe of ours and on.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::errno::Errno;

use super::{lane::StreamLane, port::Admission};
use crate::sys::{
    SysError,
    splice::{Pipe, SpliceFlags, splice},
};

/// Bytes moved by one call at most, and what a socket's pipe holds.
const STEP_BYTES: usize = 256 << 10;
/// Steps before other lanes have their turn.
const STEPS_MAX: usize = 16;
const FLAGS: SpliceFlags = SpliceFlags::SPLICE_F_MOVE.union(SpliceFlags::SPLICE_F_NONBLOCK);

/// What a lane's bytes come out of.
#[derive(Debug)]
pub(super) enum StreamSource {
    /// A connection, and the pipe that its bytes go through.
    Socket {
        /// The connection.
        socket: OwnedFd,
        /// Empty between two turns.
        pipe: Pipe,
        /// Keeps the port counted for its process.
        _admission: Admission,
    },
    /// A FIFO's end.
    Fifo(OwnedFd),
}

/// How a turn has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Turn {
    /// Nothing is left; this many bytes have come.
    Empty(u64),
    /// There may be more.
    More,
    /// The other end is closed.
    Ended,
}

/// Where bytes go.
pub(super) struct Target<'a> {
    /// A session's lane and its file.
    pub(super) lane: Option<(&'a mut StreamLane, &'a File)>,
    /// /dev/null.
    pub(super) nowhere: &'a File,
}

impl StreamSource {
    /// A connection.
    pub(super) fn socket(socket: OwnedFd, admission: Admission) -> Result<Self, SysError> {
        Ok(Self::Socket { socket, pipe: Pipe::new(STEP_BYTES)?, _admission: admission })
    }

    /// What becomes readable when bytes have come or the other end is closed.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Socket { socket, .. } => socket.as_fd(),
            Self::Fifo(fifo) => fifo.as_fd(),
        }
    }

    /// Moves what has come, for a while. Hot.
    pub(super) fn serve(&mut self, target: &mut Target<'_>) -> Turn {
        let mut bytes = 0;
        for _ in 0..STEPS_MAX {
            match self.step(target) {
                Ok(0) => return Turn::Ended,
                Ok(moved) => bytes += moved,
                Err(Errno::EAGAIN) => return Turn::Empty(bytes),
                Err(Errno::EINTR) => {}
                Err(_) => return Turn::Ended,
            }
        }
        Turn::More
    }

    /// Moves once; 0 if the other end is closed. Hot.
    fn step(&self, target: &mut Target<'_>) -> Result<u64, Errno> {
        let Self::Socket { socket, pipe, .. } = self else { return target.take(self.fd(), STEP_BYTES) };
        let came = splice(socket.as_fd(), pipe.writer_fd(), None, STEP_BYTES, FLAGS).map_err(|error| error.errno)?;
        let mut left = came;
        while left > 0 {
            match target.take(pipe.reader_fd(), left) {
                Ok(moved) => left -= usize::try_from(moved).expect("at most what was there"),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(counted(came))
    }
}

impl Target<'_> {
    /// Moves up to `bytes_max` out of a pipe to where they belong; what the file does not take goes nowhere. Hot.
    fn take(&mut self, pipe: BorrowedFd<'_>, bytes_max: usize) -> Result<u64, Errno> {
        let nowhere = |bytes_max| {
            splice(pipe, self.nowhere.as_fd(), None, bytes_max, FLAGS).map(counted).map_err(|error| error.errno)
        };
        // What comes after a cut belongs to no lane.
        let Some((lane, file)) = self.lane.as_mut().filter(|(lane, _)| !lane.is_cut()) else {
            return nowhere(bytes_max);
        };
        let room = usize::try_from(lane.room()).unwrap_or(usize::MAX).min(bytes_max);
        if room == 0 {
            let moved = nowhere(bytes_max)?;
            if moved > 0 {
                lane.refused(moved);
            }
            return Ok(moved);
        }
        let mut offset = lane.offset();
        match splice(pipe, file.as_fd(), Some(&mut offset), room, FLAGS) {
            Ok(moved) => {
                lane.landed(counted(moved), file);
                Ok(counted(moved))
            }
            Err(SysError { errno: errno @ (Errno::EAGAIN | Errno::EINTR), .. }) => Err(errno),
            Err(error) => {
                lane.fail(&io::Error::from(error));
                Err(Errno::EINTR)
            }
        }
    }
}

fn counted(bytes: usize) -> u64 {
    u64::try_from(bytes).expect("a count of bytes")
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        os::unix::{fs::FileExt, net::UnixStream},
        sync::Arc,
    };

    use vtrace_common::{ids::Cpu, wire::client::Area};

    use super::*;
    use crate::{
        drain::{ledger::Counters, stream::port::Peers},
        sys::socket::Peer,
    };

    fn lane() -> StreamLane {
        let counters = Arc::new(Counters::new(Cpu(0)));
        StreamLane::new(Area { cpu: Cpu(0), offset: 4096, bytes_max: 1 << 20, begins_again: false }, 4096, counters)
    }

    fn page(time: u8) -> Vec<u8> {
        let mut page = vec![time; 4096];
        page[..8].copy_from_slice(&u64::from(time).to_le_bytes());
        page[8..16].copy_from_slice(&100u64.to_le_bytes());
        page
    }

    fn connected() -> (UnixStream, StreamSource) {
        let (theirs, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let admission = Peers::new("test").admit(Peer { pid: 1, uid: 0 }).unwrap();
        (theirs, StreamSource::socket(ours.into(), admission).unwrap())
    }

    #[test]
    fn pages_of_a_socket_are_in_the_file_and_its_end_is_seen() {
        let (mut theirs, mut source) = connected();
        let (file, nowhere, mut lane) = (tempfile::tempfile().unwrap(), File::create("/dev/null").unwrap(), lane());
        let bytes = [page(1), page(2)].concat();
        for piece in bytes.chunks(3000) {
            theirs.write_all(piece).unwrap();
            let mut target = Target { lane: Some((&mut lane, &file)), nowhere: &nowhere };
            assert!(matches!(source.serve(&mut target), Turn::Empty(1..)));
        }
        drop(theirs);
        assert_eq!(source.serve(&mut Target { lane: Some((&mut lane, &file)), nowhere: &nowhere }), Turn::Ended);
        let counts = lane.close(&file, Some(8192));
        assert_eq!((counts.ledger.pages_out, counts.bytes_missing, counts.bytes_torn), (2, Some(0), 0));
        let mut back = vec![0; 8192];
        file.read_exact_at(&mut back, 4096).unwrap();
        assert_eq!(back, bytes);
    }

    #[test]
    fn bytes_without_a_lane_go_nowhere() {
        let (mut theirs, mut source) = connected();
        let nowhere = File::create("/dev/null").unwrap();
        theirs.write_all(&[7; 5000]).unwrap();
        assert_eq!(source.serve(&mut Target { lane: None, nowhere: &nowhere }), Turn::Empty(5000));
    }

    #[test]
    fn file_that_takes_nothing_does_not_stop_the_stream() {
        let (mut theirs, mut source) = connected();
        let nowhere = File::create("/dev/null").unwrap();
        let full = File::options().read(true).write(true).open("/dev/full").unwrap();
        let mut lane = lane();
        theirs.write_all(&[page(1), page(2)].concat()).unwrap();
        source.serve(&mut Target { lane: Some((&mut lane, &full)), nowhere: &nowhere });
        let counts = lane.close(&tempfile::tempfile().unwrap(), None);
        assert_eq!((counts.ledger.pages_in, counts.ledger.pages_lost, counts.ledger.pages_out), (2, 2, 0));
        assert_ne!(counts.write_errno, 0);
    }
}
