//! The thread that moves the pages of all streams of a device.
//!
//! In:    connections and FIFOs with pages; commands
//! Out:   pages in the file; counts; answers
//! Runs:  as the thread `drain-NAME`. It sleeps in io_uring, which says for all ports at once which has bytes
//! Full:  while it waits for the file nothing else of these lanes moves; the guest's ring buffers take that up
//! Trust: guests end their own streams by what they do wrong. A panic ends the lanes, not the thread

use std::{
    fs::File,
    os::fd::AsFd,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use crossbeam::channel::{Receiver, Sender};
use nix::sys::{
    eventfd::EventFd,
    time::TimeSpec,
    timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
};
use vtrace_common::{
    ids::Cpu,
    wire::client::{LaneLedger, LaneSent},
};

use super::{
    lane::Lane,
    port::{LanePort, Peers, Port, accept, open_reader},
    source::{Source, Target, Turn},
};
use crate::{
    drain::{Done, ledger::Counters},
    sys::{
        SysError,
        uring::{READABLE, Ring},
    },
};

/// A lane on which nothing has come for so long has nothing of an earlier session on its way: QEMU moves what waits in
/// the queue as soon as there is room.
const QUIET: Duration = Duration::from_millis(50);
/// A guest that never is quiet is not waited for longer.
const QUIET_WAIT_MAX: Duration = Duration::from_secs(2);
/// Panics after which nothing moves any more.
const PANICS_MAX: u32 = 8;

const COMMAND: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

/// A session's lanes.
#[derive(Debug)]
pub(super) struct Attachment {
    pub(super) file: File,
    pub(super) lanes: Vec<(Cpu, Lane)>,
    pub(super) counters: Vec<Arc<Counters>>,
}

/// What others want of the worker.
pub(super) enum Command {
    Attach(Attachment, Sender<bool>),
    Finish(Vec<LaneSent>, Duration, Done),
    Detach(Sender<()>),
    Stop,
}

/// A finish that waits for what is still on its way.
struct Finish {
    ends: Vec<LaneSent>,
    deadline: Instant,
    done: Done,
}

/// Lanes that wait for the streams to be quiet.
struct Pending {
    attachment: Attachment,
    answer: Sender<bool>,
    deadline: Instant,
}

/// A port and what is known of it.
struct Way {
    port: LanePort,
    source: Option<Source>,
    lane: Option<Lane>,
    /// When bytes came that belong to no lane.
    last: Option<Instant>,
    /// It has trouble that was told.
    told: bool,
}

/// The thread's state.
pub(super) struct Worker {
    name: String,
    peers: Peers,
    commands: Receiver<Command>,
    wake: Arc<EventFd>,
    ring: Ring,
    timer: TimerFd,
    ways: Vec<Way>,
    nowhere: File,
    file: Option<File>,
    counters: Vec<Arc<Counters>>,
    pending: Option<Pending>,
    finish: Option<Finish>,
    panics: u32,
    stopping: bool,
}

impl Worker {
    pub(super) fn new(
        name: &str,
        ports: Vec<LanePort>,
        peers: Peers,
        commands: Receiver<Command>,
        wake: Arc<EventFd>,
    ) -> std::io::Result<Self> {
        let mut worker = Self {
            name: name.to_owned(),
            peers,
            commands,
            wake,
            ring: Ring::new(ports.len() + 4)?,
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?,
            ways: ports.into_iter().map(Way::new).collect(),
            nowhere: File::options().write(true).open("/dev/null")?,
            file: None,
            counters: Vec::new(),
            pending: None,
            finish: None,
            panics: 0,
            stopping: false,
        };
        for index in 0..worker.ways.len() {
            worker.ways[index].open()?;
            worker.watch(index)?;
        }
        worker.ring.push_poll(worker.wake.as_fd(), READABLE, COMMAND)?;
        worker.ring.push_poll(worker.timer.as_fd(), READABLE, TIMER)?;
        Ok(worker)
    }

    /// Runs until it is told to stop.
    pub(super) fn run(mut self) {
        loop {
            match catch_unwind(AssertUnwindSafe(|| while self.turn() {})) {
                Ok(()) => return,
                Err(_) => self.panicked(),
            }
            if self.panics >= PANICS_MAX {
                return log::error!("{}: its pages are not moved any more", self.name);
            }
        }
    }

    /// Sleeps, then does what there is to do. False to stop.
    fn turn(&mut self) -> bool {
        self.ring.submit_and_wait().expect("a ring of our own can be waited for");
        while let Some(end) = self.ring.pop() {
            match end.tag {
                COMMAND => self.obey(),
                TIMER => {
                    let _ = nix::unistd::read(self.timer.as_fd(), &mut [0; 8]);
                    self.ring
                        .push_poll(self.timer.as_fd(), READABLE, TIMER)
                        .expect("a ring takes more than it has room for");
                }
                tag => self.ready(usize::try_from(tag).expect("an index of ours")),
            }
        }
        self.check_pending();
        self.check_finish();
        if self.stopping {
            self.detach();
            return false;
        }
        self.set_timer();
        true
    }

    /// Somebody connects to a port, or bytes have come over it, or its other end is closed.
    fn ready(&mut self, index: usize) {
        let way = &mut self.ways[index];
        if way.source.is_none() {
            way.connect(&self.peers);
        } else if self.serve(index) == Turn::Ended {
            self.ended(index);
        }
        if let Err(error) = self.watch(index) {
            log::error!("{}: {} cannot be watched: {error}", self.name, self.ways[index].port.path);
        }
    }

    /// Moves what has come over a port; when it came is noted only while no session wants it.
    fn serve(&mut self, index: usize) -> Turn {
        let Way { source, lane, last, .. } = &mut self.ways[index];
        let Some(source) = source else { return Turn::Empty(0) };
        let session = lane.as_mut().zip(self.file.as_ref());
        let idle = session.is_none();
        let turn = source.serve(&mut Target { lane: session, nowhere: &self.nowhere });
        if let Some(lane) = lane {
            lane.publish();
        }
        if idle && !matches!(turn, Turn::Empty(0)) {
            *last = Some(Instant::now());
        }
        turn
    }

    /// The other end is closed: whoever opens it next is another QEMU, or the same with another stream.
    fn ended(&mut self, index: usize) {
        let way = &mut self.ways[index];
        way.source = None;
        if let Some(lane) = &mut way.lane {
            lane.cut();
            lane.publish();
        }
        if let Err(error) = way.open() {
            way.say(&format!("cannot be opened again: {error}"));
        }
    }

    /// Asks for the next time that something happens on a port. Hot.
    fn watch(&mut self, index: usize) -> Result<(), SysError> {
        let tag = u64::try_from(index).expect("few ports");
        let way = &self.ways[index];
        match (&way.source, &way.port.port) {
            (Some(source), _) => self.ring.push_poll(source.fd(), READABLE, tag),
            (None, Port::Socket(listener)) => self.ring.push_poll(listener.as_fd(), READABLE, tag),
            (None, Port::Fifos { .. }) => Ok(()),
        }
    }

    /// Commands, in order.
    fn obey(&mut self) {
        let _ = self.wake.read();
        self.ring.push_poll(self.wake.as_fd(), READABLE, COMMAND).expect("a ring takes more than it has room for");
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Attach(attachment, answer) => self.attach(attachment, answer),
                Command::Finish(ends, wait, done) => self.start_finish(ends, wait, done),
                Command::Detach(answer) => {
                    self.detach();
                    reply(&answer, ());
                }
                Command::Stop => self.stopping = true,
            }
        }
    }

    fn attach(&mut self, attachment: Attachment, answer: Sender<bool>) {
        if !self.counters.is_empty() || self.finish.is_some() || self.pending.is_some() {
            return reply(&answer, false);
        }
        self.pending = Some(Pending { attachment, answer, deadline: Instant::now() + QUIET_WAIT_MAX });
    }

    /// Lanes begin when nothing that was sent before them comes any more.
    fn check_pending(&mut self) {
        let Some(deadline) = self.pending.as_ref().map(|pending| pending.deadline) else { return };
        for index in 0..self.ways.len() {
            if self.serve(index) == Turn::Ended {
                // Its poll is outstanding, and will say the same.
                self.ways[index].last = None;
            }
        }
        let now = Instant::now();
        if self.quiet_at().is_some_and(|at| now < at.min(deadline)) {
            return;
        }
        let Some(Pending { attachment, answer, .. }) = self.pending.take() else { return };
        for (cpu, lane) in attachment.lanes {
            if let Some(way) = self.ways.iter_mut().find(|way| way.port.cpu == cpu) {
                way.lane = Some(lane);
            }
        }
        (self.file, self.counters) = (Some(attachment.file), attachment.counters);
        reply(&answer, true);
    }

    /// When all lanes will have been quiet for long enough, if nothing comes.
    fn quiet_at(&self) -> Option<Instant> {
        self.ways.iter().filter_map(|way| way.last).max().map(|last| last + QUIET)
    }

    fn start_finish(&mut self, ends: Vec<LaneSent>, wait: Duration, done: Done) {
        self.end_finish();
        let now = Instant::now();
        self.finish = Some(Finish { ends, deadline: now.checked_add(wait).unwrap_or(now), done });
    }

    fn check_finish(&mut self) {
        let Some(finish) = &self.finish else { return };
        let complete = |end: &LaneSent| {
            let way = self.ways.iter().find(|way| way.port.cpu == end.cpu);
            let lane = way.and_then(|way| way.lane.as_ref());
            lane.is_none_or(|lane| lane.is_cut() || lane.bytes_in() >= end.bytes_out)
        };
        if finish.ends.iter().all(complete) || Instant::now() >= finish.deadline {
            self.end_finish();
        }
    }

    /// Closes the lanes of a finish, if there is one, and says so.
    fn end_finish(&mut self) {
        let Some(finish) = self.finish.take() else { return };
        self.take_rest();
        self.close_lanes(&finish.ends);
        (finish.done)(self.ledgers());
        self.counters.clear();
    }

    /// Takes what waits in the streams, as far as it is there.
    fn take_rest(&mut self) {
        for index in 0..self.ways.len() {
            // A stream that has ended says so again to whoever polls it.
            while self.file.is_some() && self.ways[index].lane.is_some() && self.serve(index) == Turn::More {}
        }
    }

    fn ledgers(&self) -> Vec<LaneLedger> {
        self.counters.iter().map(|counters| counters.read()).collect()
    }

    /// From now on what comes goes nowhere.
    fn close_lanes(&mut self, ends: &[LaneSent]) {
        let Some(file) = self.file.take() else { return };
        for way in &mut self.ways {
            let Some(lane) = way.lane.take() else { continue };
            let sent = ends.iter().find(|end| end.cpu == way.port.cpu).map(|end| end.bytes_out);
            lane.close(&file, sent);
            way.last = Some(Instant::now());
        }
    }

    fn detach(&mut self) {
        if let Some(pending) = self.pending.take() {
            reply(&pending.answer, false);
        }
        self.end_finish();
        self.take_rest();
        self.close_lanes(&[]);
        self.counters.clear();
    }

    /// Wakes this thread when something is due although nothing happens.
    fn set_timer(&mut self) {
        let quiet = self
            .pending
            .as_ref()
            .map(|pending| self.quiet_at().map_or(pending.deadline, |at| at.min(pending.deadline)));
        let Some(due) = [quiet, self.finish.as_ref().map(|finish| finish.deadline)].into_iter().flatten().min() else {
            return;
        };
        let left = due.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        let time = Expiration::OneShot(TimeSpec::from_duration(left));
        self.timer.set(time, TimerSetTimeFlags::empty()).expect("a timer of our own takes a short time");
    }

    /// A mistake of ours: the session's lanes end, the streams go on.
    fn panicked(&mut self) {
        self.panics += 1;
        log::error!("{}: drain panicked ({} of {PANICS_MAX})", self.name, self.panics);
        self.ways.iter_mut().for_each(|way| way.lane = None);
        self.counters.iter().for_each(|counters| counters.settle());
        (self.file, self.pending) = (None, None);
        for index in 0..self.ways.len() {
            // A second poll of the same port wakes once more than needed.
            let _ = self.watch(index);
        }
        let _ = self.ring.push_poll(self.wake.as_fd(), READABLE, COMMAND);
        // Commands may wait behind the one that panicked, and they were all announced once.
        let _ = self.wake.write(1);
    }
}

impl Way {
    fn new(port: LanePort) -> Self {
        Self { port, source: None, lane: None, last: None, told: false }
    }

    /// Makes a FIFO ready for whoever opens it next; a socket is, by its listener.
    fn open(&mut self) -> std::io::Result<()> {
        let is_fifo = match &self.port.port {
            Port::Socket(_) => false,
            Port::Fifos { from_guest, .. } => {
                self.source = Some(Source::Fifo(open_reader(from_guest)?));
                true
            }
        };
        self.port.is_there.store(is_fifo, Ordering::Relaxed);
        Ok(())
    }

    fn connect(&mut self, peers: &Peers) {
        let Port::Socket(listener) = &self.port.port else { return };
        let source = accept(listener, peers).and_then(|accepted| {
            let source = accepted.map(|(socket, _, seat)| Source::socket(socket, seat));
            Ok(source.transpose()?)
        });
        match source {
            Ok(source) => {
                self.port.is_there.store(source.is_some(), Ordering::Relaxed);
                self.source = source;
            }
            Err(error) => self.say(&format!("a connection is turned away: {error}")),
        }
    }

    /// Once a port: a guest must not fill the log.
    fn say(&mut self, what: &str) {
        if !std::mem::replace(&mut self.told, true) {
            log::warn!("{}: {what}", self.port.path);
        }
    }
}

fn reply<T>(answer: &Sender<T>, value: T) {
    // Nobody waits any more: then nobody needs it.
    let _ = answer.send(value);
}
