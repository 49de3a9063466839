//! The thread that serves all data rings of one device.
//!
//! In:    kicks, commands, a timer
//! Out:   pages in the file, used entries, answers
//! Runs:  as the thread `vt-drain/NAME`. It sleeps in epoll without a timeout; the timer runs only while chains are held, so
//!        an idle guest costs no wake-up
//! Full:  while it waits for a write nothing else of this guest is served; the guest's ring buffers take that up
//! Trust: guests end their own rings by what they do wrong. A panic ends the lane it happened in, not the thread

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam::channel::{Receiver, Sender};
use nix::sys::{
    epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    eventfd::EventFd,
    time::TimeSpec,
    timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
};
use vtrace_common::{
    ids::{Cpu, GuestId},
    limits::DEVICE_LANES_MAX,
    wire::client::LaneSent,
};

use super::{lane::RingLane, source::RingSource};
use crate::{
    drain::{
        session::{Attachment, DrainCommand, Lanes, Session, SessionCommand, reply},
        sink::{Landed, NullSink, Sink},
    },
    sys::{log_limit::PeerLog, wait::take_events},
    virtq::{
        memory::{Memory, Span},
        ring::{CHAIN_SPANS_MAX, Ring, RingFault},
    },
};

/// Chains are held back so that one write and one interrupt serve many: for one tick at least, for two at most.
const TICK_US: u64 = 750;
/// Sources of one guest: every ring and every lane may be of a CPU that the other kind does not have.
const SOURCES_MAX: usize = 2 * DEVICE_LANES_MAX;
/// Events of one epoll_wait.
const EVENTS_MAX: usize = 128;
const COMMAND: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;
const LANDED: u64 = u64::MAX - 2;

/// What is done with a source.
type Act = fn(&mut RingSource, &mut dyn Sink, &mut Vec<Span>) -> Result<(), RingFault>;

/// Commands to the worker.
pub(crate) enum RingCommand {
    RingStarted(Cpu, Box<Ring>),
    RingStopped(Cpu, Sender<Option<u16>>),
    Remap(Arc<Memory>, Sender<()>),
    CallChanged(Cpu, Option<OwnedFd>),
    Session(SessionCommand<Box<dyn Sink>, RingLane>),
    #[cfg(test)]
    Panic(Option<Cpu>),
}

impl DrainCommand for RingCommand {
    type Sink = Box<dyn Sink>;
    type Lane = RingLane;
    fn session(command: SessionCommand<Self::Sink, Self::Lane>) -> Self {
        Self::Session(command)
    }
}

pub(super) struct RingWorker {
    guest: GuestId,
    /// What the guest and its VMM cause.
    log: PeerLog,
    commands: Receiver<RingCommand>,
    wake: Arc<EventFd>,
    epoll: Epoll,
    timer: TimerFd,
    timer_runs: bool,
    sources: Vec<RingSource>,
    /// Sources that are ready, each once.
    ready: Vec<usize>,
    /// Those that are being served.
    serving: Vec<usize>,
    /// Sources that hold chains, each once; the timer runs if there are any.
    timed: Vec<usize>,
    sink: Box<dyn Sink>,
    session: Session,
    spans: Vec<Span>,
    /// The source that is being served, should it panic.
    current: Option<usize>,
}

impl RingWorker {
    pub(super) fn new(guest: GuestId, commands: Receiver<RingCommand>, wake: Arc<EventFd>) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        epoll.add(&*wake, EpollEvent::new(EpollFlags::EPOLLIN, COMMAND))?;
        epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, TIMER))?;
        Ok(Self {
            guest,
            log: PeerLog::new(&format!("guest{}", guest.0)),
            commands,
            wake,
            epoll,
            timer,
            timer_runs: false,
            sources: Vec::new(),
            ready: Vec::with_capacity(SOURCES_MAX),
            serving: Vec::with_capacity(SOURCES_MAX),
            timed: Vec::with_capacity(SOURCES_MAX),
            sink: Box::new(NullSink),
            session: Session::default(),
            spans: Vec::with_capacity(CHAIN_SPANS_MAX),
            current: None,
        })
    }

    /// Runs until it is told to stop.
    pub(super) fn run(mut self) {
        loop {
            match catch_unwind(AssertUnwindSafe(|| while self.turn() {})) {
                Ok(()) => return,
                Err(_) if self.session.stopping && self.session.is_broken() => return,
                Err(_) => self.panicked(),
            }
        }
    }

    /// Sleeps, then does what there is to do. False to stop. Hot.
    fn turn(&mut self) -> bool {
        let (mut commands, mut tick) = (false, false);
        let mut events = [EpollEvent::empty(); EVENTS_MAX];
        let count = take_events(&self.epoll, &mut events, self.timeout()).expect("an epoll set of our own");
        for event in &events[..count] {
            match event.data() {
                COMMAND => commands = true,
                TIMER => tick = self.timer_expired(),
                LANDED => {}
                index => self.kicked(index),
            }
        }
        if commands {
            self.obey();
        }
        if self.session.stopping {
            self.detach();
            return false;
        }
        if !self.session.is_broken() {
            self.serve(tick);
        }
        // What ended meanwhile does not ring again.
        self.land(false);
        self.check_finish();
        true
    }

    fn timeout(&self) -> EpollTimeout {
        let ready = !self.session.is_broken() && !self.ready.is_empty();
        if ready || self.session.stopping {
            return EpollTimeout::ZERO;
        }
        let Some(deadline) = self.session.deadline() else { return EpollTimeout::NONE };
        let left = deadline.saturating_duration_since(Instant::now()).as_millis() + 1;
        EpollTimeout::try_from(left).unwrap_or(EpollTimeout::MAX)
    }

    fn kicked(&mut self, index: u64) {
        let Some(index) = usize::try_from(index).ok().filter(|index| *index < self.sources.len()) else { return };
        let source = &mut self.sources[index];
        if let Some(ring) = source.ring() {
            let mut counter = [0; 8];
            // Non-blocking; if another read was faster there is nothing to read, and looking at the ring costs little.
            let _ = nix::unistd::read(ring.kick(), &mut counter);
            source.ready = true;
            self.note(index);
        }
    }

    fn timer_expired(&mut self) -> bool {
        let _ = nix::unistd::read(self.timer.as_fd(), &mut [0; 8]);
        self.timer_runs = false;
        true
    }

    /// Puts a source onto the lists that it belongs to. Hot.
    fn note(&mut self, index: usize) {
        let source = &mut self.sources[index];
        if source.ready && !std::mem::replace(&mut source.queued, true) {
            self.ready.push(index);
        }
        if source.holds() && !std::mem::replace(&mut source.timed, true) {
            self.timed.push(index);
        }
    }

    /// Serves the rings that were kicked, and those that hold chains if the time is up. Hot.
    fn serve(&mut self, tick: bool) {
        if tick {
            self.each_of(|worker| &mut worker.timed, |source| source.timed = false, RingSource::tick);
        }
        self.each_of(
            |worker| &mut worker.ready,
            |source| source.queued = false,
            |source, sink, spans| {
                if source.ready { source.serve(sink, spans) } else { Ok(()) }
            },
        );
        if !self.timer_runs && !self.timed.is_empty() {
            let time = Expiration::OneShot(TimeSpec::from_duration(Duration::from_micros(TICK_US)));
            self.timer.set(time, TimerSetTimeFlags::empty()).expect("a timer of our own takes a short time");
            self.timer_runs = true;
        }
    }

    /// Does something with each source that is on a list now, which is empty before the first has its turn. Hot.
    fn each_of(&mut self, list: fn(&mut Self) -> &mut Vec<usize>, leave: fn(&mut RingSource), act: Act) {
        let mut serving = std::mem::take(&mut self.serving);
        std::mem::swap(&mut serving, list(self));
        serving.iter().for_each(|index| leave(&mut self.sources[*index]));
        for index in serving.drain(..) {
            self.with_source(index, act);
        }
        self.serving = serving;
    }

    /// Does something with a source; a fault ends its ring. Hot.
    fn with_source(
        &mut self,
        index: usize,
        act: impl FnOnce(&mut RingSource, &mut dyn Sink, &mut Vec<Span>) -> Result<(), RingFault>,
    ) {
        self.current = Some(index);
        let source = &mut self.sources[index];
        if let Err(fault) = act(source, &mut *self.sink, &mut self.spans) {
            self.end_ring(index, fault);
        }
        self.note(index);
        self.current = None;
    }

    /// Takes the ends of writes; all of them if it shall `wait`: then nothing of any guest's memory is in use. Hot.
    fn land(&mut self, wait: bool) {
        while let Some(Landed { tag, written }) = self.sink.landed(wait) {
            let index = RingLane::numbered(tag);
            if index < self.sources.len() {
                self.with_source(index, |source, _, _| source.landed(tag, written));
            }
        }
    }

    fn end_ring(&mut self, index: usize, fault: RingFault) {
        let source = &mut self.sources[index];
        self.log.warn(format_args!("{}: ring is not served any more: {fault}", source.cpu));
        unwatch(&self.epoll, source);
        source.end(&mut *self.sink);
    }

    /// Writes what is held, and waits until it is written.
    fn flush_all(&mut self) {
        for index in 0..self.sources.len() {
            self.with_source(index, |source, sink, _| source.flush(sink));
        }
        self.land(true);
    }

    /// Commands, in order.
    fn obey(&mut self) {
        let _ = self.wake.read();
        while let Ok(command) = self.commands.try_recv() {
            match command {
                RingCommand::RingStarted(cpu, ring) => self.ring_started(cpu, *ring),
                RingCommand::RingStopped(cpu, answer) => reply(&answer, self.ring_stopped(cpu)),
                RingCommand::Remap(memory, answer) => {
                    self.remap(&memory);
                    reply(&answer, ());
                }
                RingCommand::CallChanged(cpu, call) => {
                    if let Some(source) = self.sources.iter_mut().find(|source| source.cpu == cpu) {
                        source.set_call(call);
                    }
                }
                RingCommand::Session(command) => self.obey_session(command),
                #[cfg(test)]
                RingCommand::Panic(cpu) => {
                    self.current = self.sources.iter().position(|source| Some(source.cpu) == cpu);
                    panic!("as the test wants");
                }
            }
        }
    }

    fn source(&mut self, cpu: Cpu) -> Option<usize> {
        if let Some(index) = self.sources.iter().position(|source| source.cpu == cpu) {
            return Some(index);
        }
        if let Some(index) = self.sources.iter().position(RingSource::unused) {
            self.sources[index].cpu = cpu;
            return Some(index);
        }
        (self.sources.len() < SOURCES_MAX).then(|| {
            self.sources.push(RingSource::new(cpu));
            self.sources.len() - 1
        })
    }

    fn ring_started(&mut self, cpu: Cpu, ring: Ring) {
        self.ring_stopped(cpu);
        let Some(index) = self.source(cpu) else {
            self.log.warn(format_args!("{cpu}: more rings than {DEVICE_LANES_MAX}"));
            return;
        };
        let data = u64::try_from(index).expect("at most SOURCES_MAX sources");
        match self.epoll.add(ring.kick(), EpollEvent::new(EpollFlags::EPOLLIN, data)) {
            Ok(()) => {
                self.sources[index].start(ring);
                self.note(index);
            }
            Err(errno) => self.log.warn(format_args!("{cpu}: kick cannot be watched: {errno}")),
        }
    }

    fn ring_stopped(&mut self, cpu: Cpu) -> Option<u16> {
        let index = self.sources.iter().position(|source| source.cpu == cpu)?;
        if self.sources[index].runs() {
            // What waits there would be lost: a driver that falls asleep frees what was not taken.
            self.with_source(index, RingSource::drain);
        }
        self.land(true);
        unwatch(&self.epoll, &self.sources[index]);
        self.sources[index].stop()
    }

    fn remap(&mut self, memory: &Arc<Memory>) {
        self.flush_all();
        for index in 0..self.sources.len() {
            self.with_source(index, |source, _, _| source.remap(Arc::clone(memory)));
        }
    }

    /// After a panic: the lane in which it happened ends, the others go on.
    fn panicked(&mut self) {
        self.session.panicked(&format!("guest{}", self.guest.0));
        // Commands may wait after the one that panicked; the eventfd counted them once.
        let _ = self.wake.write(1);
        // So may sources: the list that was being worked on is gone.
        self.ready.clear();
        self.timed.clear();
        for index in 0..self.sources.len() {
            (self.sources[index].queued, self.sources[index].timed) = (false, false);
            self.note(index);
        }
        let Some(index) = self.current.take() else { return };
        let source = &mut self.sources[index];
        unwatch(&self.epoll, source);
        source.abandon();
        self.session.settle(Some(source.cpu));
    }
}

impl Lanes for RingWorker {
    type Sink = Box<dyn Sink>;
    type Lane = RingLane;

    fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    fn attach(&mut self, attachment: Attachment<Box<dyn Sink>, RingLane>, answer: Sender<bool>) {
        // What is in the rings now was sent before: it does not belong to these lanes.
        self.drain();
        if let Some(ended) = attachment.sink.ended_fd()
            && let Err(errno) = self.epoll.add(ended, EpollEvent::new(EpollFlags::EPOLLIN, LANDED))
        {
            self.log.warn(format_args!("the ends of writes cannot be watched: {errno}"));
            return reply(&answer, false);
        }
        for (cpu, mut lane) in attachment.lanes {
            if let Some(index) = self.source(cpu) {
                lane.number(index);
                self.sources[index].lane = Some(lane);
            }
        }
        self.sink = attachment.sink;
        self.session.begin(attachment.counters);
        reply(&answer, true);
    }

    fn drain(&mut self) {
        for index in 0..self.sources.len() {
            self.with_source(
                index,
                |source, sink, spans| {
                    if source.runs() { source.drain(sink, spans) } else { Ok(()) }
                },
            );
        }
        self.land(true);
    }

    fn flush(&mut self) {
        self.flush_all();
    }

    fn has_received(&self, sent: &LaneSent) -> bool {
        let source = self.sources.iter().find(|source| source.cpu == sent.cpu);
        let lane = source.filter(|source| source.runs()).and_then(|source| source.lane.as_ref());
        lane.is_none_or(|lane| lane.bytes_in() >= sent.bytes_out)
    }

    /// What comes from now on is discarded. The rings were flushed.
    fn close(&mut self, sent: &[LaneSent]) {
        for index in 0..self.sources.len() {
            self.with_source(index, |source, sink, _| source.end_lane(sink));
        }
        self.land(true);
        for index in 0..self.sources.len() {
            let cpu = self.sources[index].cpu;
            let bytes_sent = sent.iter().find(|lane| lane.cpu == cpu).map(|lane| lane.bytes_out);
            self.with_source(index, |source, sink, _| {
                source.close(sink, bytes_sent);
                Ok(())
            });
        }
        if let Some(ended) = self.sink.ended_fd() {
            // It was added when the lanes were attached.
            let _ = self.epoll.delete(ended);
        }
        self.sink = Box::new(NullSink);
    }
}

/// Takes a ring's kick out of the epoll set. Closing it would not: the VMM has the same eventfd open.
fn unwatch(epoll: &Epoll, source: &RingSource) {
    if let Some(ring) = source.ring() {
        // Every ring that is served was added; the descriptor is still open.
        let _ = epoll.delete(ring.kick());
    }
}
