//! The thread that serves all data rings of one device.
//!
//! In:    kicks, commands, a timer
//! Out:   pages in the file, used entries, answers
//! Runs:  as the thread `drain-NAME`. It sleeps in epoll without a timeout; the timer runs only while chains are held, so
//!        an idle guest costs no wake-up
//! Full:  while it waits for a write nothing else of this guest is served; the guest's ring buffers take that up
//! Trust: guests end their own rings by what they do wrong. A panic ends the lane it happened in, not the thread

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crossbeam::channel::{Receiver, Sender};
use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        eventfd::EventFd,
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
};
use vtrace_common::{
    ids::{Cpu, GuestId, LaneId},
    limits::DEVICE_LANES_MAX,
    wire::client::{LaneLedger, LaneSent},
};

use super::{lane::Lane, source::Road};
use crate::{
    drain::{
        ledger::Counters,
        sink::{Landed, NullSink, Sink},
    },
    virtq::{
        memory::{Memory, Span},
        ring::{CHAIN_SPANS_MAX, Ring, RingFault},
    },
};

/// Chains are held back so that one write and one interrupt serve many: for one tick at least, for two at most.
const TICK_US: u64 = 750;
/// Panics after which rings are not served any more, only commands.
const PANICS_MAX: u32 = 8;
/// Roads of one guest: every ring and every lane may be of a CPU that the other kind does not have.
const ROADS_MAX: usize = 2 * DEVICE_LANES_MAX;
/// Events of one epoll_wait.
const EVENTS_MAX: usize = 128;
const COMMAND: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;
const LANDED: u64 = u64::MAX - 2;

/// What is done with a road.
type Act = fn(&mut Road, &mut dyn Sink, &mut Vec<Span>) -> Result<(), RingFault>;

/// What is called with the ledgers when the lanes are closed.
pub(crate) type Done = Box<dyn FnOnce(Vec<LaneLedger>) + Send>;

/// A session's lanes, made by the caller so that the worker need not.
#[derive(Debug)]
pub(crate) struct Attachment {
    pub(crate) sink: Box<dyn Sink>,
    pub(crate) lanes: Vec<(Cpu, Lane)>,
    pub(crate) counters: Vec<Arc<Counters>>,
}

/// What others want of the worker.
pub(crate) enum Command {
    RingStarted(Cpu, Box<Ring>),
    RingStopped(Cpu, Sender<Option<u16>>),
    Remap(Arc<Memory>, Sender<()>),
    CallChanged(Cpu, Option<OwnedFd>),
    Attach(Attachment, Sender<bool>),
    Finish(Vec<LaneSent>, Duration, Done),
    Detach(Sender<()>),
    Stop,
    #[cfg(test)]
    Panic(Option<Cpu>),
}

/// A finish that waits for what is still on its way.
struct Finish {
    ends: Vec<LaneSent>,
    deadline: Instant,
    done: Done,
}

pub(super) struct Worker {
    guest: GuestId,
    commands: Receiver<Command>,
    wake: Arc<EventFd>,
    epoll: Epoll,
    timer: TimerFd,
    timer_runs: bool,
    roads: Vec<Road>,
    /// Roads that are ready, each once.
    ready: Vec<usize>,
    /// Those that are being served.
    serving: Vec<usize>,
    /// Roads that hold chains, each once; the timer runs if there are any.
    timed: Vec<usize>,
    sink: Box<dyn Sink>,
    /// Of the lanes there are.
    counters: Vec<Arc<Counters>>,
    finish: Option<Finish>,
    spans: Vec<Span>,
    discarded_bytes: Arc<AtomicU64>,
    /// The road that is being served, should it panic.
    current: Option<usize>,
    panics: u32,
    stopping: bool,
}

impl Worker {
    pub(super) fn new(
        guest: GuestId,
        commands: Receiver<Command>,
        wake: Arc<EventFd>,
        discarded_bytes: Arc<AtomicU64>,
    ) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        epoll.add(&*wake, EpollEvent::new(EpollFlags::EPOLLIN, COMMAND))?;
        epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, TIMER))?;
        let (timer_runs, stopping, finish, current, panics) = (false, false, None, None, 0);
        let (roads, counters, spans) = (Vec::new(), Vec::new(), Vec::with_capacity(CHAIN_SPANS_MAX));
        let list = || Vec::with_capacity(ROADS_MAX);
        let (ready, serving, timed, sink) = (list(), list(), list(), Box::new(NullSink));
        Ok(Self {
            guest,
            commands,
            wake,
            epoll,
            timer,
            timer_runs,
            roads,
            ready,
            serving,
            timed,
            sink,
            counters,
            finish,
            spans,
            discarded_bytes,
            current,
            panics,
            stopping,
        })
    }

    /// Runs until it is told to stop.
    pub(super) fn run(mut self) {
        loop {
            match catch_unwind(AssertUnwindSafe(|| while self.turn() {})) {
                Ok(()) => return,
                Err(_) if self.stopping && self.panics >= PANICS_MAX => return,
                Err(_) => self.panicked(),
            }
        }
    }

    /// Sleeps, then does what there is to do. False to stop. Hot.
    fn turn(&mut self) -> bool {
        let (mut commands, mut tick) = (false, false);
        let mut events = [EpollEvent::empty(); EVENTS_MAX];
        let count = match self.epoll.wait(&mut events, self.timeout()) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => panic!("epoll_wait on descriptors of our own: {errno}"),
        };
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
        if self.stopping {
            self.detach();
            return false;
        }
        if self.panics < PANICS_MAX {
            self.serve(tick);
        }
        // What ended meanwhile does not ring again.
        self.land(false);
        self.check_finish();
        true
    }

    fn timeout(&self) -> EpollTimeout {
        let ready = self.panics < PANICS_MAX && !self.ready.is_empty();
        if ready || self.stopping {
            return EpollTimeout::ZERO;
        }
        let Some(finish) = &self.finish else { return EpollTimeout::NONE };
        let left = finish.deadline.saturating_duration_since(Instant::now()).as_millis() + 1;
        EpollTimeout::try_from(left).unwrap_or(EpollTimeout::MAX)
    }

    fn kicked(&mut self, index: u64) {
        let Some(index) = usize::try_from(index).ok().filter(|index| *index < self.roads.len()) else { return };
        let road = &mut self.roads[index];
        if let Some(ring) = road.ring() {
            let mut counter = [0; 8];
            // Non-blocking; if another read was faster there is nothing to read, and looking at the ring costs little.
            let _ = nix::unistd::read(ring.kick(), &mut counter);
            road.ready = true;
            self.note(index);
        }
    }

    fn timer_expired(&mut self) -> bool {
        let _ = nix::unistd::read(self.timer.as_fd(), &mut [0; 8]);
        self.timer_runs = false;
        true
    }

    /// Puts a road onto the lists that it belongs to. Hot.
    fn note(&mut self, index: usize) {
        let road = &mut self.roads[index];
        if road.ready && !std::mem::replace(&mut road.queued, true) {
            self.ready.push(index);
        }
        if road.holds() && !std::mem::replace(&mut road.timed, true) {
            self.timed.push(index);
        }
        let discarded = road.discarded_bytes();
        if discarded > 0 {
            self.discarded_bytes.fetch_add(discarded, Ordering::Relaxed);
        }
    }

    /// Serves the rings that were kicked, and those that hold chains if the time is up. Hot.
    fn serve(&mut self, tick: bool) {
        if tick {
            self.each_of(|worker| &mut worker.timed, |road| road.timed = false, Road::tick);
        }
        self.each_of(
            |worker| &mut worker.ready,
            |road| road.queued = false,
            |road, sink, spans| {
                if road.ready { road.serve(sink, spans) } else { Ok(()) }
            },
        );
        if !self.timer_runs && !self.timed.is_empty() {
            let time = Expiration::OneShot(TimeSpec::from_duration(Duration::from_micros(TICK_US)));
            self.timer.set(time, TimerSetTimeFlags::empty()).expect("a timer of our own takes a short time");
            self.timer_runs = true;
        }
    }

    /// Does something with each road that is on a list now, which is empty before the first has its turn. Hot.
    fn each_of(&mut self, list: fn(&mut Self) -> &mut Vec<usize>, leave: fn(&mut Road), act: Act) {
        let mut serving = std::mem::take(&mut self.serving);
        std::mem::swap(&mut serving, list(self));
        serving.iter().for_each(|index| leave(&mut self.roads[*index]));
        for index in serving.drain(..) {
            self.with_road(index, act);
        }
        self.serving = serving;
    }

    /// Does something with a road; a fault ends its ring. Hot.
    fn with_road(
        &mut self,
        index: usize,
        act: impl FnOnce(&mut Road, &mut dyn Sink, &mut Vec<Span>) -> Result<(), RingFault>,
    ) {
        self.current = Some(index);
        let road = &mut self.roads[index];
        if let Err(fault) = act(road, &mut *self.sink, &mut self.spans) {
            self.end_ring(index, fault);
        }
        self.note(index);
        self.current = None;
    }

    /// Takes the ends of writes; all of them if it shall `wait`: then nothing of any guest's memory is in use. Hot.
    fn land(&mut self, wait: bool) {
        while let Some(Landed { tag, written }) = self.sink.landed(wait) {
            let index = Lane::numbered(tag);
            if index < self.roads.len() {
                self.with_road(index, |road, _, _| road.landed(tag, written));
            }
        }
    }

    fn end_ring(&mut self, index: usize, fault: RingFault) {
        let road = &mut self.roads[index];
        log::warn!("{}: ring is not served any more: {fault}", LaneId { guest: self.guest, cpu: road.cpu });
        unwatch(&self.epoll, road);
        road.end(&mut *self.sink);
    }

    /// Writes what is held, and waits until it is written.
    fn flush_all(&mut self) {
        for index in 0..self.roads.len() {
            self.with_road(index, |road, sink, _| road.flush(sink));
        }
        self.land(true);
    }

    /// Takes what waits in each ring, writes it, gives it back.
    fn drain_all(&mut self) {
        for index in 0..self.roads.len() {
            self.with_road(index, |road, sink, spans| if road.runs() { road.drain(sink, spans) } else { Ok(()) });
        }
        self.land(true);
    }

    /// Commands, in order.
    fn obey(&mut self) {
        let _ = self.wake.read();
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::RingStarted(cpu, ring) => self.ring_started(cpu, *ring),
                Command::RingStopped(cpu, answer) => reply(&answer, self.ring_stopped(cpu)),
                Command::Remap(memory, answer) => {
                    self.remap(&memory);
                    reply(&answer, ());
                }
                Command::CallChanged(cpu, call) => {
                    if let Some(road) = self.roads.iter_mut().find(|road| road.cpu == cpu) {
                        road.set_call(call);
                    }
                }
                Command::Attach(attachment, answer) => reply(&answer, self.attach(attachment)),
                Command::Finish(ends, wait, done) => self.start_finish(ends, wait, done),
                Command::Detach(answer) => {
                    self.detach();
                    reply(&answer, ());
                }
                Command::Stop => self.stopping = true,
                #[cfg(test)]
                Command::Panic(cpu) => {
                    self.current = self.roads.iter().position(|road| Some(road.cpu) == cpu);
                    panic!("as the test wants");
                }
            }
        }
    }

    fn road(&mut self, cpu: Cpu) -> Option<usize> {
        if let Some(index) = self.roads.iter().position(|road| road.cpu == cpu) {
            return Some(index);
        }
        if let Some(index) = self.roads.iter().position(Road::unused) {
            self.roads[index].cpu = cpu;
            return Some(index);
        }
        (self.roads.len() < ROADS_MAX).then(|| {
            self.roads.push(Road::new(cpu));
            self.roads.len() - 1
        })
    }

    fn ring_started(&mut self, cpu: Cpu, ring: Ring) {
        self.ring_stopped(cpu);
        let Some(index) = self.road(cpu) else {
            log::warn!("{}: more rings than {DEVICE_LANES_MAX}", LaneId { guest: self.guest, cpu });
            return;
        };
        let data = u64::try_from(index).expect("at most ROADS_MAX roads");
        match self.epoll.add(ring.kick(), EpollEvent::new(EpollFlags::EPOLLIN, data)) {
            Ok(()) => {
                self.roads[index].start(ring);
                self.note(index);
            }
            Err(errno) => log::warn!("{}: kick cannot be watched: {errno}", LaneId { guest: self.guest, cpu }),
        }
    }

    fn ring_stopped(&mut self, cpu: Cpu) -> Option<u16> {
        let index = self.roads.iter().position(|road| road.cpu == cpu)?;
        if self.roads[index].runs() {
            // What waits there would be lost: a driver that falls asleep frees what was not taken.
            self.with_road(index, Road::drain);
        }
        self.land(true);
        unwatch(&self.epoll, &self.roads[index]);
        self.roads[index].stop()
    }

    fn remap(&mut self, memory: &Arc<Memory>) {
        self.flush_all();
        for index in 0..self.roads.len() {
            self.with_road(index, |road, _, _| road.remap(Arc::clone(memory)));
        }
    }

    /// False if there are lanes already.
    fn attach(&mut self, attachment: Attachment) -> bool {
        if !self.counters.is_empty() || self.finish.is_some() {
            return false;
        }
        // What is in the rings now was sent before: it is none of these lanes'.
        self.drain_all();
        if let Some(bell) = attachment.sink.bell()
            && let Err(errno) = self.epoll.add(bell, EpollEvent::new(EpollFlags::EPOLLIN, LANDED))
        {
            log::warn!("guest{}: the ends of writes cannot be watched: {errno}", self.guest.0);
            return false;
        }
        for (cpu, mut lane) in attachment.lanes {
            if let Some(index) = self.road(cpu) {
                lane.number(index);
                self.roads[index].lane = Some(lane);
            }
        }
        (self.sink, self.counters) = (attachment.sink, attachment.counters);
        true
    }

    fn start_finish(&mut self, ends: Vec<LaneSent>, wait: Duration, done: Done) {
        self.end_finish();
        let now = Instant::now();
        let deadline = now.checked_add(wait).unwrap_or(now);
        self.finish = Some(Finish { ends, deadline, done });
        self.drain_all();
    }

    fn check_finish(&mut self) {
        let Some(finish) = &self.finish else { return };
        let complete = |end: &LaneSent| {
            let road = self.roads.iter().find(|road| road.cpu == end.cpu);
            let lane = road.filter(|road| road.runs()).and_then(|road| road.lane.as_ref());
            lane.is_none_or(|lane| lane.bytes_in() >= end.bytes_out)
        };
        if self.panics >= PANICS_MAX || finish.ends.iter().all(complete) || Instant::now() >= finish.deadline {
            self.end_finish();
        }
    }

    /// Closes the lanes of a finish, if there is one, and says so.
    fn end_finish(&mut self) {
        if self.finish.is_none() {
            return;
        }
        self.drain_all();
        self.close_lanes();
        if let Some(finish) = self.finish.take() {
            (finish.done)(std::mem::take(&mut self.counters).iter().map(|counters| counters.read()).collect());
        }
    }

    /// Closes all lanes; from now on what comes is discarded. Rings were flushed.
    fn close_lanes(&mut self) {
        for index in 0..self.roads.len() {
            self.with_road(index, |road, sink, _| road.end_lane(sink));
        }
        self.land(true);
        for index in 0..self.roads.len() {
            let cpu = self.roads[index].cpu;
            let ends = self.finish.as_ref().map_or(&[][..], |finish| &finish.ends);
            let sent = ends.iter().find(|end| end.cpu == cpu).map(|end| end.bytes_out);
            self.with_road(index, |road, sink, _| {
                road.close(sink, sent);
                Ok(())
            });
        }
        if let Some(bell) = self.sink.bell() {
            // It was added when the lanes were attached.
            let _ = self.epoll.delete(bell);
        }
        self.sink = Box::new(NullSink);
    }

    fn detach(&mut self) {
        self.end_finish();
        self.flush_all();
        self.close_lanes();
        self.counters.clear();
    }

    /// A mistake of ours: the lane it happened in ends, the others go on.
    fn panicked(&mut self) {
        self.panics += 1;
        log::error!("guest{}: drain panicked ({} of {PANICS_MAX})", self.guest.0, self.panics);
        // Commands may wait behind the one that panicked, and they were all announced once.
        let _ = self.wake.write(1);
        // So may roads: the list that was being worked on is gone.
        self.ready.clear();
        self.timed.clear();
        for index in 0..self.roads.len() {
            (self.roads[index].queued, self.roads[index].timed) = (false, false);
            self.note(index);
        }
        let Some(index) = self.current.take() else { return };
        let road = &mut self.roads[index];
        unwatch(&self.epoll, road);
        road.abandon();
        let cpu = road.cpu;
        self.counters.iter().filter(|counters| counters.cpu() == cpu).for_each(|counters| counters.settle());
    }
}

/// Takes a ring's kick out of the epoll set. Closing it would not: the VMM has the same eventfd open.
fn unwatch(epoll: &Epoll, road: &Road) {
    if let Some(ring) = road.ring() {
        // Every ring that is served was added; the descriptor is still open.
        let _ = epoll.delete(ring.kick());
    }
}

fn reply<T>(answer: &Sender<T>, value: T) {
    // Nobody waits any more: then nobody needs it.
    let _ = answer.send(value);
}
