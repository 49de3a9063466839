//! What the handle of a drain has in common with others: a thread of its own, messages to it, its lanes' counts.
//!
//! In:    commands
//! Out:   answers; ledgers
//! Runs:  on any thread; the worker on `vt-drain/NAME`, until the handle is dropped
//! Full:  who asks waits for the answer; a wait longer than [`SLOW_WAIT`] is said in the log, and when it is over
//! Trust: its own worker

use std::{
    fmt, io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vtrace_common::wire::client::{LaneLedger, LaneSent};

use super::{
    Done,
    ledger::Counters,
    session::{Attachment, DrainCommand, SessionCommand},
};

/// From then on a wait for the worker is told.
pub(super) const SLOW_WAIT: Duration = Duration::from_secs(5);

/// A worker that takes commands `C`. When it is dropped the worker is told to stop and waited for.
pub(crate) struct Handle<C: DrainCommand> {
    name: String,
    commands: Sender<C>,
    wake: Arc<EventFd>,
    counters: Mutex<Vec<Arc<Counters>>>,
    thread: Option<JoinHandle<()>>,
}

impl<C: DrainCommand> fmt::Debug for Handle<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("name", &self.name).field("counters", &self.counters).finish_non_exhaustive()
    }
}

impl<C: DrainCommand + Send + 'static> Handle<C> {
    /// Starts the thread. `worker` makes what runs there from the receiver of its commands and the descriptor that wakes
    /// it.
    pub(crate) fn spawn<Run: FnOnce() + Send + 'static>(
        name: &str,
        worker: impl FnOnce(Receiver<C>, Arc<EventFd>) -> io::Result<Run>,
    ) -> io::Result<Self> {
        let (commands, receiver) = unbounded();
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
        let run = worker(receiver, Arc::clone(&wake))?;
        let thread = thread::Builder::new().name(format!("vt-drain/{name}")).spawn(run)?;
        Ok(Self { name: name.into(), commands, wake, counters: Mutex::default(), thread: Some(thread) })
    }
}

impl<C: DrainCommand> Handle<C> {
    pub(crate) fn tell(&self, command: C) {
        // The worker outlives this handle. If it has died, the command is dropped.
        if self.commands.send(command).is_ok() {
            let _ = self.wake.write(1);
        }
    }

    /// Waits for the answer. `None` if the worker drops the command unanswered.
    pub(crate) fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> C) -> Option<T> {
        let (answer, answered) = bounded(1);
        self.tell(command(answer));
        let slow = match answered.recv_timeout(SLOW_WAIT) {
            Err(RecvTimeoutError::Timeout) => Instant::now(),
            answer => return answer.ok(),
        };
        let Self { name, .. } = self;
        log::warn!("{name}: a write has not ended for {SLOW_WAIT:?}; its virtual machine or its client waits for it");
        let answer = answered.recv().ok();
        log::info!("{name}: the write has ended after {:?}", SLOW_WAIT + slow.elapsed());
        answer
    }

    /// Hands lanes to the worker.
    ///
    /// Errors: `ResourceBusy` if there are lanes.
    pub(crate) fn attach(&self, attachment: Attachment<C::Sink, C::Lane>) -> io::Result<()> {
        // Locked until the answer has come: of two clients at a time, neither sees the other's counts.
        let mut known = self.counters();
        let counters = attachment.counters.clone();
        match self.ask(|answer| C::session(SessionCommand::Attach(attachment, answer))) {
            Some(true) => *known = counters,
            Some(false) => return Err(io::ErrorKind::ResourceBusy.into()),
            None => return Err(io::ErrorKind::BrokenPipe.into()),
        }
        Ok(())
    }

    /// Closes the lanes when they have received what was sent, or after `wait_ms_max`. `done` is called by the worker.
    pub(crate) fn finish(&self, sent: Vec<LaneSent>, wait_ms_max: u32, done: Done) {
        let wait = Duration::from_millis(wait_ms_max.into());
        self.tell(C::session(SessionCommand::Finish(sent, wait, done)));
    }

    /// Closes the lanes at once and forgets their counts. Waits.
    pub(crate) fn detach(&self) {
        let mut known = self.counters();
        self.ask(|answer| C::session(SessionCommand::Detach(answer)));
        known.clear();
    }

    /// The lanes' counters, locked.
    pub(super) fn counters(&self) -> MutexGuard<'_, Vec<Arc<Counters>>> {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What each lane has counted.
    pub(crate) fn ledger(&self) -> Vec<LaneLedger> {
        self.counters().iter().map(|counters| counters.read()).collect()
    }
}

impl<C: DrainCommand> Drop for Handle<C> {
    fn drop(&mut self) {
        self.tell(C::session(SessionCommand::Stop));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
