//! The thread that moves the pages of all streams of a device.
//!
//! In:    connections and FIFOs with pages; commands
//! Out:   pages in the file; counts; answers
//! Runs:  as the thread `vt-drain/NAME`. It sleeps in io_uring, which says for all ports at once which has bytes
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
use vtrace_common::wire::client::LaneSent;

use super::{
    lane::StreamLane,
    port::{LanePort, Peers, Port, accept, open_reader},
    source::{StreamSource, Target, Turn},
};
use crate::{
    drain::session::{Attachment, Lanes, Session, SessionCommand, reply},
    sys::{
        SysError,
        uring::{READABLE, Ring},
    },
};

/// A lane on which nothing has come for so long has nothing of an earlier session in transit: QEMU moves what waits in
/// the queue as soon as there is room.
const QUIET: Duration = Duration::from_millis(50);
/// A guest that never is quiet is not waited for longer.
const QUIET_WAIT_MAX: Duration = Duration::from_secs(2);

const COMMAND: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

/// Commands to the worker.
pub(super) type StreamCommand = SessionCommand<File, StreamLane>;

/// Lanes that wait for the streams to be quiet.
struct Pending {
    attachment: Attachment<File, StreamLane>,
    answer: Sender<bool>,
    deadline: Instant,
}

/// A port and what is known of it.
struct StreamPort {
    spec: LanePort,
    source: Option<StreamSource>,
    lane: Option<StreamLane>,
    /// When bytes came that belong to no lane.
    last: Option<Instant>,
    /// It has trouble that was told.
    told: bool,
}

/// The thread's state.
pub(super) struct StreamWorker {
    name: String,
    peers: Peers,
    commands: Receiver<StreamCommand>,
    wake: Arc<EventFd>,
    ring: Ring,
    timer: TimerFd,
    ports: Vec<StreamPort>,
    nowhere: File,
    file: Option<File>,
    pending: Option<Pending>,
    session: Session,
}

impl StreamWorker {
    pub(super) fn new(
        name: &str,
        ports: Vec<LanePort>,
        peers: Peers,
        commands: Receiver<StreamCommand>,
        wake: Arc<EventFd>,
    ) -> std::io::Result<Self> {
        let mut worker = Self {
            name: name.to_owned(),
            peers,
            commands,
            wake,
            ring: Ring::new(ports.len() + 4)?,
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?,
            ports: ports.into_iter().map(StreamPort::new).collect(),
            nowhere: File::options().write(true).open("/dev/null")?,
            file: None,
            pending: None,
            session: Session::default(),
        };
        for index in 0..worker.ports.len() {
            worker.ports[index].open()?;
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
            if self.session.is_broken() {
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
        if self.session.stopping {
            self.detach();
            return false;
        }
        self.set_timer();
        true
    }

    /// A peer connects to a port, bytes have come over it, or its other end is closed.
    fn ready(&mut self, index: usize) {
        let port = &mut self.ports[index];
        if port.source.is_none() {
            port.connect(&self.peers);
        } else if self.serve(index) == Turn::Ended {
            self.ended(index);
        }
        if let Err(error) = self.watch(index) {
            log::error!("{}: {} cannot be watched: {error}", self.name, self.ports[index].spec.path);
        }
    }

    /// Moves what has come over a port; when it came is noted only while no session wants it.
    fn serve(&mut self, index: usize) -> Turn {
        let StreamPort { source, lane, last, .. } = &mut self.ports[index];
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
        let port = &mut self.ports[index];
        port.source = None;
        if let Some(lane) = &mut port.lane {
            lane.cut();
            lane.publish();
        }
        if let Err(error) = port.open() {
            port.say(&format!("cannot be opened again: {error}"));
        }
    }

    /// Asks for the next time that something happens on a port. Hot.
    fn watch(&mut self, index: usize) -> Result<(), SysError> {
        let tag = u64::try_from(index).expect("few ports");
        let port = &self.ports[index];
        match (&port.source, &port.spec.port) {
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
            self.obey_session(command);
        }
    }

    /// Lanes begin when nothing that was sent before them comes any more.
    fn check_pending(&mut self) {
        let Some(deadline) = self.pending.as_ref().map(|pending| pending.deadline) else { return };
        for index in 0..self.ports.len() {
            if self.serve(index) == Turn::Ended {
                // Its poll is outstanding, and will say the same.
                self.ports[index].last = None;
            }
        }
        let now = Instant::now();
        if self.quiet_at().is_some_and(|at| now < at.min(deadline)) {
            return;
        }
        let Some(Pending { attachment, answer, .. }) = self.pending.take() else { return };
        for (cpu, lane) in attachment.lanes {
            if let Some(port) = self.ports.iter_mut().find(|port| port.spec.cpu == cpu) {
                port.lane = Some(lane);
            }
        }
        self.file = Some(attachment.sink);
        self.session.begin(attachment.counters);
        reply(&answer, true);
    }

    /// When all lanes will have been quiet for long enough, if nothing comes.
    fn quiet_at(&self) -> Option<Instant> {
        self.ports.iter().filter_map(|port| port.last).max().map(|last| last + QUIET)
    }

    /// Wakes this thread when something is due although nothing happens.
    fn set_timer(&mut self) {
        let quiet = self
            .pending
            .as_ref()
            .map(|pending| self.quiet_at().map_or(pending.deadline, |at| at.min(pending.deadline)));
        let Some(due) = [quiet, self.session.deadline()].into_iter().flatten().min() else {
            return;
        };
        let left = due.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        let time = Expiration::OneShot(TimeSpec::from_duration(left));
        self.timer.set(time, TimerSetTimeFlags::empty()).expect("a timer of our own takes a short time");
    }

    /// After a panic: the session's lanes end, the streams go on.
    fn panicked(&mut self) {
        self.session.panicked(&self.name);
        self.ports.iter_mut().for_each(|port| port.lane = None);
        self.session.settle(None);
        self.file = None;
        self.pending = None;
        for index in 0..self.ports.len() {
            // A second poll of the same port wakes once more than needed.
            let _ = self.watch(index);
        }
        let _ = self.ring.push_poll(self.wake.as_fd(), READABLE, COMMAND);
        // Commands may wait after the one that panicked; the eventfd counted them once.
        let _ = self.wake.write(1);
    }
}

impl Lanes for StreamWorker {
    type Sink = File;
    type Lane = StreamLane;

    fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    /// Waits for the streams to be quiet: [`StreamWorker::check_pending`].
    fn attach(&mut self, attachment: Attachment<File, StreamLane>, answer: Sender<bool>) {
        if self.pending.is_some() {
            return reply(&answer, false);
        }
        self.pending = Some(Pending { attachment, answer, deadline: Instant::now() + QUIET_WAIT_MAX });
    }

    fn drain(&mut self) {
        for index in 0..self.ports.len() {
            // A stream that has ended is reported again by its next poll.
            while self.file.is_some() && self.ports[index].lane.is_some() && self.serve(index) == Turn::More {}
        }
    }

    fn flush(&mut self) {
        if let Some(pending) = self.pending.take() {
            reply(&pending.answer, false);
        }
        self.drain();
    }

    fn has_received(&self, sent: &LaneSent) -> bool {
        let port = self.ports.iter().find(|port| port.spec.cpu == sent.cpu);
        let lane = port.and_then(|port| port.lane.as_ref());
        lane.is_none_or(|lane| lane.is_cut() || lane.bytes_in() >= sent.bytes_out)
    }

    /// What comes from now on goes nowhere.
    fn close(&mut self, sent: &[LaneSent]) {
        let Some(file) = self.file.take() else { return };
        for port in &mut self.ports {
            let Some(lane) = port.lane.take() else { continue };
            let bytes_sent = sent.iter().find(|sent| sent.cpu == port.spec.cpu).map(|sent| sent.bytes_out);
            lane.close(&file, bytes_sent);
            port.last = Some(Instant::now());
        }
    }
}

impl StreamPort {
    fn new(port: LanePort) -> Self {
        Self { spec: port, source: None, lane: None, last: None, told: false }
    }

    /// Makes a FIFO ready for whoever opens it next; a socket is, by its listener.
    fn open(&mut self) -> std::io::Result<()> {
        let is_fifo = match &self.spec.port {
            Port::Socket(_) => false,
            Port::Fifos { from_guest, .. } => {
                self.source = Some(StreamSource::Fifo(open_reader(from_guest)?));
                true
            }
        };
        self.spec.is_there.store(is_fifo, Ordering::Relaxed);
        Ok(())
    }

    fn connect(&mut self, peers: &Peers) {
        let Port::Socket(listener) = &self.spec.port else { return };
        let source = accept(listener, peers).and_then(|accepted| {
            let source = accepted.map(|(socket, _, admission)| StreamSource::socket(socket, admission));
            Ok(source.transpose()?)
        });
        match source {
            Ok(source) => {
                self.spec.is_there.store(source.is_some(), Ordering::Relaxed);
                self.source = source;
            }
            Err(error) => self.say(&format!("a connection is turned away: {error}")),
        }
    }

    /// Once a port: a guest must not fill the log.
    fn say(&mut self, what: &str) {
        if !std::mem::replace(&mut self.told, true) {
            log::warn!("{}: {what}", self.spec.path);
        }
    }
}
