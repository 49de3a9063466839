//! The three transports out of the guest, seen from the host.
//!
//! In:    sockets and FIFOs in a folder
//! Out:   bytes in files on this machine's disk, counted; ours past the page cache, as a recording writes them
//! Runs:  a device and a drain for ours; a thread for each stock port, named after it
//! Trust: QEMU: it closes what it opened

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Result, ensure};
use nix::{sys::stat::Mode, unistd::mkfifo};
use vtrace_common::{
    ids::Cpu,
    wire::client::{Area, LaneSent},
};
use vtrace_dp::{
    drain::{
        ring::RingDrain,
        sink::{FileSink, Sink, direct::DirectSink},
    },
    sys::direct::reopen,
};

use super::{below, receiver::Receiver, wait_until};
use crate::{
    measure,
    place::Place,
    rig::{
        backend::{Backend, finish},
        lanes::PAGE,
    },
};

/// A way to the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Transport {
    VhostUser,
    Fifo,
    Socket,
}

impl Transport {
    /// What the names of its ports in the guest begin with.
    pub(super) fn prefix(self) -> &'static str {
        match self {
            Self::VhostUser => "trace-path-cpu",
            Self::Fifo => "fifo-path-cpu",
            Self::Socket => "socket-path-cpu",
        }
    }

    /// CPU time of those threads of ours that take its bytes.
    pub(super) fn receiver_cpu(self) -> Result<Duration> {
        match self {
            Self::VhostUser => {
                Ok(measure::threads("vt-drain/guest")? + measure::threads("vt-dev/guest")? + measure::io_workers()?)
            }
            Self::Fifo => measure::threads("receive-fifo"),
            Self::Socket => measure::threads("receive-socket"),
        }
    }
}

/// What QEMU needs to find when it starts.
pub(super) struct Transports {
    folder: PathBuf,
    backend: Backend,
}

impl Transports {
    pub(super) fn prepare(folder: &Path) -> Result<Self> {
        for direction in ["in", "out"] {
            mkfifo(&below(folder, &format!("fifo.{direction}")), Mode::S_IRUSR | Mode::S_IWUSR)?;
        }
        let backend = Backend::listening("guest", &below(folder, "vhost-user.sock"))?;
        Ok(Self { folder: folder.into(), backend })
    }

    pub(super) fn vhost_user(&self) -> PathBuf {
        below(&self.folder, "vhost-user.sock")
    }

    pub(super) fn fifo(&self) -> PathBuf {
        below(&self.folder, "fifo")
    }

    pub(super) fn socket(&self) -> PathBuf {
        below(&self.folder, "port.sock")
    }

    /// Waits until every transport has its receiver; the guest runs.
    pub(super) fn connect(self) -> Result<Open> {
        let fifo = Receiver::fifo("receive-fifo", &below(&self.folder, "fifo.out"))?;
        let socket = Receiver::socket("receive-socket", &self.socket())?;
        Ok(Open { backend: self.backend, fifo, socket })
    }
}

/// Transports with their receivers.
pub(super) struct Open {
    backend: Backend,
    fifo: Receiver,
    socket: Receiver,
}

/// More than is sent over one transport, bytes.
const FILE_BYTES: u64 = 4 << 30;

/// A transfer that is expected over one transport.
pub(super) enum Receipt<'a> {
    RingDrain(&'a RingDrain),
    Receiver(&'a Receiver),
}

impl Open {
    /// Makes ready for the next bytes: an empty file.
    pub(super) fn expect(&self, transport: Transport) -> Result<Receipt<'_>> {
        let receiver = match transport {
            Transport::VhostUser => {
                let area = Area { cpu: Cpu(0), offset: 0, bytes_max: 1 << 40, begins_again: false };
                let file = Place::Disk.file()?;
                // As in a recording: the area is longer than everything that will be written.
                file.set_len(FILE_BYTES)?;
                let sink: Box<dyn Sink> = match reopen(&file) {
                    Ok(direct) => Box::new(DirectSink::new(file, direct)?),
                    Err(_) => Box::new(FileSink::new(file)?),
                };
                self.backend.drain.attach_sink(sink, PAGE, vec![area])?;
                return Ok(Receipt::RingDrain(&self.backend.drain));
            }
            Transport::Fifo => &self.fifo,
            Transport::Socket => &self.socket,
        };
        receiver.start_over()?;
        Ok(Receipt::Receiver(receiver))
    }

    /// QEMU is gone.
    pub(super) fn end(self) -> Result<()> {
        self.fifo.end()?;
        self.socket.end()
    }
}

impl Receipt<'_> {
    /// Waits for exactly so many.
    pub(super) fn await_bytes(self, bytes: u64) -> Result<()> {
        match self {
            Self::RingDrain(drain) => finish(drain, vec![LaneSent { cpu: Cpu(0), bytes_out: bytes }]),
            Self::Receiver(receiver) => {
                wait_until("bytes of the guest are missing", || receiver.received() >= bytes)?;
                ensure!(receiver.received() == bytes, "more came than was sent");
                Ok(())
            }
        }
    }
}
