//! Whoever takes a stock port's bytes: spliced into a file as trace-cmd's recorder does it.
//!
//! In:    a FIFO that QEMU writes, or a socket that it listens on
//! Out:   a file in memory that begins anew for each sending
//! Runs:  a thread, until QEMU closes
//! Trust: no data is sent while the file is truncated

use std::{
    fs::File,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::OpenOptionsExt, net::UnixStream},
    },
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result};
use nix::{libc::O_NONBLOCK, poll::PollTimeout};

use crate::{place::Place, rig::stock::Mover};

/// A receiver.
pub(super) struct Receiver {
    file: File,
    received: Arc<AtomicU64>,
    thread: JoinHandle<Result<()>>,
}

impl Receiver {
    pub(super) fn fifo(name: &str, path: &Path) -> Result<Self> {
        let fifo = File::options().read(true).custom_flags(O_NONBLOCK).open(path)?;
        Self::start(name, fifo.into())
    }

    pub(super) fn socket(name: &str, path: &Path) -> Result<Self> {
        Self::start(name, UnixStream::connect(path)?.into())
    }

    fn start(name: &str, source: OwnedFd) -> Result<Self> {
        let (file, received) = (Place::Disk.file()?, Arc::<AtomicU64>::default());
        let (target, count) = (file.try_clone()?, Arc::clone(&received));
        let thread = thread::Builder::new().name(name.into()).spawn(move || receive(&source, &target, &count))?;
        Ok(Self { file, received, thread })
    }

    /// Bytes since the file began.
    pub(super) fn received(&self) -> u64 {
        self.received.load(Ordering::Acquire)
    }

    pub(super) fn start_over(&self) -> Result<()> {
        self.file.set_len(0)?;
        self.received.store(0, Ordering::Release);
        Ok(())
    }

    /// QEMU is gone.
    pub(super) fn end(self) -> Result<()> {
        self.thread.join().ok().context("a receiver panicked")?
    }
}

fn receive(source: &OwnedFd, target: &File, received: &AtomicU64) -> Result<()> {
    let mover = Mover::new()?;
    loop {
        Mover::wait(source.as_fd(), PollTimeout::NONE)?;
        // Only now: the file may have begun anew while nothing came.
        let mut offset = received.load(Ordering::Acquire);
        match mover.step(source.as_fd(), target.as_fd(), Some(&mut offset))? {
            Some(0) => return Ok(()),
            None => {}
            Some(_) => received.store(offset, Ordering::Release),
        }
    }
}
