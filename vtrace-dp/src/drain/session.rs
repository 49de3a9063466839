//! The life of a session at a drain worker: attach, finish, detach, and what is left after a panic.
//!
//! In:    [`SessionCommand`]s of a handle
//! Out:   answers; the ledgers of the closed lanes
//! Runs:  on the worker's thread
//! Full:  a finish waits for bytes that are on their way until its deadline

use std::{
    mem,
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam::channel::Sender;
use vtrace_common::{
    ids::Cpu,
    wire::client::{Area, LaneSent},
};

use super::{Done, ledger::Counters};

/// Panics after which a worker serves commands only.
pub(crate) const PANICS_MAX: u32 = 8;

/// A session's lanes and where their pages go. Made by the caller, so that the worker allocates nothing.
#[derive(Debug)]
pub(crate) struct Attachment<S, L> {
    pub(crate) sink: S,
    pub(crate) lanes: Vec<(Cpu, L)>,
    pub(crate) counters: Vec<Arc<Counters>>,
}

impl<S, L> Attachment<S, L> {
    /// One lane for each area.
    pub(crate) fn new(sink: S, areas: &[Area], lane: impl Fn(Area, Arc<Counters>) -> L) -> Self {
        let mut attachment = Self { sink, lanes: Vec::new(), counters: Vec::new() };
        for area in areas {
            let counters = Arc::new(Counters::new(area.cpu));
            attachment.lanes.push((area.cpu, lane(*area, Arc::clone(&counters))));
            attachment.counters.push(counters);
        }
        attachment
    }
}

/// What every worker is asked.
pub(crate) enum SessionCommand<S, L> {
    /// Answered with false if there are lanes already.
    Attach(Attachment<S, L>, Sender<bool>),
    /// The agents have sent this much; the wait for it; the receiver of the ledgers.
    Finish(Vec<LaneSent>, Duration, Done),
    Detach(Sender<()>),
    Stop,
}

/// The commands of one kind of worker.
pub(crate) trait DrainCommand: Sized {
    type Sink;
    type Lane;
    fn session(command: SessionCommand<Self::Sink, Self::Lane>) -> Self;
}

impl<S, L> DrainCommand for SessionCommand<S, L> {
    type Sink = S;
    type Lane = L;
    fn session(command: Self) -> Self {
        command
    }
}

/// A finish that waits for bytes on their way.
struct Finish {
    sent: Vec<LaneSent>,
    deadline: Instant,
    done: Done,
}

/// A worker's session.
#[derive(Default)]
pub(crate) struct Session {
    counters: Vec<Arc<Counters>>,
    finish: Option<Finish>,
    panics: u32,
    /// The worker was told to stop.
    pub(crate) stopping: bool,
}

impl Session {
    /// Lanes are attached, or a finish is not over.
    pub(crate) fn is_busy(&self) -> bool {
        !self.counters.is_empty() || self.finish.is_some()
    }

    /// Lanes with these counts are attached.
    pub(crate) fn begin(&mut self, counters: Vec<Arc<Counters>>) {
        self.counters = counters;
    }

    /// When a finish waits no longer.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.finish.as_ref().map(|finish| finish.deadline)
    }

    /// Too many panics: only commands are served.
    pub(crate) fn is_broken(&self) -> bool {
        self.panics >= PANICS_MAX
    }

    /// Counts a panic.
    pub(crate) fn panicked(&mut self, name: &str) {
        self.panics += 1;
        log::error!("{name}: drain panicked ({} of {PANICS_MAX})", self.panics);
    }

    /// Counts what a CPU's lane held as lost; `None` for every lane's.
    pub(crate) fn settle(&self, cpu: Option<Cpu>) {
        let lost = self.counters.iter().filter(|counters| cpu.is_none_or(|cpu| counters.cpu() == cpu));
        lost.for_each(|counters| counters.settle());
    }
}

/// A worker's lanes, as its session needs them.
pub(crate) trait Lanes {
    type Sink;
    type Lane;

    /// The state of the session.
    fn session(&mut self) -> &mut Session;
    /// Attaches lanes, now or later, calls [`Session::begin`] and answers. No session is busy.
    fn attach(&mut self, attachment: Attachment<Self::Sink, Self::Lane>, answer: Sender<bool>);
    /// Takes and writes everything that waits at the sources.
    fn drain(&mut self);
    /// Writes what the lanes hold, and gives up lanes that are not attached yet.
    fn flush(&mut self);
    /// Whether a lane has everything that its agent sent, or nothing more can come.
    fn has_received(&self, sent: &LaneSent) -> bool;
    /// Closes every lane, of which agents have sent this much.
    fn close(&mut self, sent: &[LaneSent]);

    /// Does what a command of the session asks for.
    fn obey_session(&mut self, command: SessionCommand<Self::Sink, Self::Lane>) {
        match command {
            SessionCommand::Attach(_, answer) if self.session().is_busy() => reply(&answer, false),
            SessionCommand::Attach(attachment, answer) => self.attach(attachment, answer),
            SessionCommand::Finish(sent, wait, done) => {
                self.end_finish();
                let now = Instant::now();
                let deadline = now.checked_add(wait).unwrap_or(now);
                self.session().finish = Some(Finish { sent, deadline, done });
                self.drain();
            }
            SessionCommand::Detach(answer) => {
                self.detach();
                reply(&answer, ());
            }
            SessionCommand::Stop => self.session().stopping = true,
        }
    }

    /// Ends a finish that is complete, or whose time is up.
    fn check_finish(&mut self) {
        let Some(finish) = self.session().finish.take() else { return };
        let is_over = finish.sent.iter().all(|sent| self.has_received(sent)) || Instant::now() >= finish.deadline;
        let session = self.session();
        session.finish = Some(finish);
        if is_over || session.is_broken() {
            self.end_finish();
        }
    }

    /// Closes the lanes of a finish, if there is one, and reports.
    fn end_finish(&mut self) {
        if self.session().finish.is_none() {
            return;
        }
        self.drain();
        // The finish stays until the lanes are closed: should that panic, it is answered nevertheless.
        let sent = self.session().finish.as_mut().map(|finish| mem::take(&mut finish.sent)).unwrap_or_default();
        self.close(&sent);
        let session = self.session();
        let counters = mem::take(&mut session.counters);
        if let Some(finish) = session.finish.take() {
            (finish.done)(counters.iter().map(|counters| counters.read()).collect());
        }
    }

    /// Closes the lanes at once.
    fn detach(&mut self) {
        self.end_finish();
        self.flush();
        self.close(&[]);
        self.session().counters.clear();
    }
}

/// Answers a command.
pub(crate) fn reply<T>(answer: &Sender<T>, value: T) {
    // The asker may have stopped waiting.
    let _ = answer.send(value);
}
