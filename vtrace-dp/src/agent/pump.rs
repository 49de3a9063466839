//! The pump: moves pages from taps to ports by io_uring splice.
//!
//! In:    taps and ports of a session; orders to drain or to abandon
//! Out:   pages in the ports; one [`LaneEnd`] per lane when the thread ends
//! Runs:  its own thread, one ring for all lanes; splices run in kernel workers. A quiet guest wakes nothing
//! Full:  a port whose host is slow blocks the worker of that lane's splice; the ring buffer then overwrites and counts
//! Trust: the kernel; a splice that moved nothing although pages waited is counted as loss
//!
//! The rest of a ring buffer (a page that is not full can only be read(2)) goes through the same pipe as every other
//! page, so there is one way into a port, one place that counts, and one place that tees.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::{
        eventfd::{EfdFlags, EventFd},
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
};
use vtrace_common::ids::Cpu;

use super::lane::{Lane, Ledger, Next, Step};
use crate::{
    sys::{
        SysError,
        splice::{Pipe, SpliceFlags, splice, tee},
        uring::{Completion, READABLE, Ring},
    },
    tracefs::Tap,
};

/// What one lane keeps on its way at most: the largest pipe an ordinary system allows.
const PIPE_BYTES: usize = 1 << 20;
/// First and longest rest of lanes whose taps call themselves readable and give nothing: kernels whose poll ignores
/// the watermark (before 6.1, where stable updates lack "Have polling block on watermark").
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_millis(100);
/// How long cancelled operations may take to come back.
const CANCEL_WAIT: Duration = Duration::from_secs(2);

/// Why a pump cannot start.
#[derive(Debug, thiserror::Error)]
#[error("{object}: {source}")]
pub(super) struct PumpError {
    /// What it is about.
    pub(super) object: String,
    /// What the kernel said.
    pub(super) source: std::io::Error,
}

impl PumpError {
    fn of<E: Into<std::io::Error>>(object: impl Into<String>) -> impl FnOnce(E) -> Self {
        let object = object.into();
        move |source| Self { object, source: source.into() }
    }
}

/// One lane's end. `pages_tapped == pages_sent + pages_lost`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct LaneEnd {
    pub(super) cpu: Cpu,
    pub(super) pages_tapped: u64,
    pub(super) pages_sent: u64,
    pub(super) pages_lost: u64,
    pub(super) bytes_sent: u64,
    /// Why it ended early; empty if it did not.
    pub(super) trouble: String,
}

impl LaneEnd {
    /// A lane that moved nothing, for this reason.
    pub(super) fn nothing(cpu: Cpu, trouble: String) -> Self {
        Self { cpu, pages_tapped: 0, pages_sent: 0, pages_lost: 0, bytes_sent: 0, trouble }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Order {
    Drain,
    Abandon,
}

/// A running pump. Dropping it abandons what is on its way.
#[derive(Debug)]
pub(super) struct Pump {
    orders: Sender<Order>,
    bell: Arc<EventFd>,
    done: Arc<EventFd>,
    thread: Option<JoinHandle<Vec<LaneEnd>>>,
}

impl Pump {
    /// Starts moving pages from each tap to its port. The ports block, the taps do not. With `tee`, a copy of every
    /// page goes to `TEE/cpuN.raw` before it goes to the port (to verify the way, not to record: it costs as much).
    pub(super) fn start(lanes: Vec<(Tap, OwnedFd)>, page_bytes: u32, tee: Option<&Path>) -> Result<Self, PumpError> {
        let bell = Arc::new(signal()?);
        let done = Arc::new(signal()?);
        let (orders, inbox) = channel();
        let roads = lanes.into_iter().map(|(tap, port)| Road::new(tap, port, page_bytes, tee));
        let roads: Vec<Road> = roads.collect::<Result<_, _>>()?;
        let ring = Ring::new(2 * roads.len() + 4).map_err(PumpError::of("io_uring"))?;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)
            .map_err(PumpError::of("timerfd"))?;
        let scratch = vec![0; usize::try_from(page_bytes).expect("a page fits memory")];
        let (bell_inside, last) = (Arc::clone(&bell), Done(Arc::clone(&done)));
        let work = Work {
            ring,
            roads,
            bell: bell_inside,
            inbox,
            timer,
            pause: PAUSE_MIN,
            alarmed: false,
            order: None,
            scratch,
        };
        let thread = std::thread::Builder::new()
            .name("vtrace-pump".into())
            .spawn(move || {
                let _last = last;
                work.run()
            })
            .map_err(PumpError::of("thread"))?;
        Ok(Self { orders, bell, done, thread: Some(thread) })
    }

    /// Readable once the pump has ended, by an order or in trouble.
    pub(super) fn done(&self) -> BorrowedFd<'_> {
        self.done.as_fd()
    }

    /// Tracing is off: move everything, then end.
    pub(super) fn drain(&self) {
        self.order(Order::Drain);
    }

    /// What the lanes did, after [`Pump::done`] (or it waits). `None` when the thread has panicked.
    pub(super) fn join(mut self) -> Option<Vec<LaneEnd>> {
        self.thread.take().and_then(|thread| thread.join().ok())
    }

    fn order(&self, order: Order) {
        // A pump that has ended listens no more, and has nothing left to do.
        if self.orders.send(order).is_ok() {
            self.bell.write(1).expect("a bell of few rings has room");
        }
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.order(Order::Abandon);
        match self.thread.take().map(JoinHandle::join) {
            None => {}
            Some(Ok(ends)) => {
                for end in ends.iter().filter(|end| end.pages_lost > 0) {
                    log::warn!("{}: {} pages are abandoned", end.cpu, end.pages_lost);
                }
            }
            Some(Err(_)) => log::error!("the pump has panicked"),
        }
    }
}

/// Rings when the thread ends, whichever way.
struct Done(Arc<EventFd>);

impl Drop for Done {
    fn drop(&mut self) {
        self.0.write(1).expect("rung once");
    }
}

fn signal() -> Result<EventFd, PumpError> {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(PumpError::of("eventfd"))
}

/// What an operation was for: the low byte of its tag; the lane's index stands above it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Operation {
    Poll = 1,
    Fill = 2,
    Send = 3,
    Bell = 4,
    Timer = 5,
    Cancel = 6,
}

impl Operation {
    const ALL: [Self; 6] = [Self::Poll, Self::Fill, Self::Send, Self::Bell, Self::Timer, Self::Cancel];

    fn tag(self, lane: usize) -> u64 {
        u64::try_from(lane).expect("lanes are few") << 8 | u64::from(self as u8)
    }

    fn of(tag: u64) -> (Self, usize) {
        let code = tag & 0xff;
        let operation = Self::ALL.into_iter().find(|operation| u64::from(*operation as u8) == code);
        let lane = usize::try_from(tag >> 8).expect("tags are ours");
        (operation.expect("tags are ours"), lane)
    }
}

/// One lane's descriptors.
#[derive(Debug)]
struct Road {
    tap: Tap,
    port: OwnedFd,
    pipe: Pipe,
    lane: Lane,
    tee: Option<Tee>,
    /// It has lost pages, and the log says so.
    is_lossy: bool,
}

impl Road {
    fn new(tap: Tap, port: OwnedFd, page_bytes: u32, tee: Option<&Path>) -> Result<Self, PumpError> {
        let pipe = waiting_pipe()?;
        let pipe_bytes = u32::try_from(pipe.bytes_max).unwrap_or(u32::MAX / 2);
        if pipe_bytes < page_bytes {
            let object = format!("pipe of {pipe_bytes} bytes for pages of {page_bytes}");
            return Err(PumpError::of(object)(Errno::EINVAL));
        }
        let tee = tee.map(|directory| Tee::new(directory, tap.cpu, pipe.bytes_max)).transpose()?;
        Ok(Self { tap, port, pipe, lane: Lane::new(page_bytes, pipe_bytes), tee, is_lossy: false })
    }

    /// Reads what is no full page into the pipe: a page per read(2), each padded to a whole one.
    fn read_rest(&mut self, scratch: &mut [u8]) -> Result<u32, Errno> {
        let page_bytes = u32::try_from(scratch.len()).expect("a page");
        let mut taken = 0;
        while taken + page_bytes <= self.lane.fill_bytes() {
            let count = match nix::unistd::read(&self.tap.fd, scratch) {
                Ok(0) | Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => continue,
                Ok(count) => count,
                Err(errno) => return Err(errno),
            };
            scratch[count..].fill(0);
            if nix::unistd::write(&self.pipe.writer, scratch)? != scratch.len() {
                return Err(Errno::ENOBUFS);
            }
            taken += page_bytes;
        }
        Ok(taken)
    }

    /// Empties the pipe: another one takes its place.
    fn discard(&mut self) -> Result<(), PumpError> {
        self.pipe = waiting_pipe()?;
        Ok(())
    }

    fn end(&self, page_bytes: u64) -> LaneEnd {
        let Ledger { tapped, sent, lost } = self.lane.ledger();
        let end = LaneEnd {
            cpu: self.tap.cpu,
            pages_tapped: tapped / page_bytes,
            pages_sent: sent / page_bytes,
            pages_lost: lost.div_ceil(page_bytes),
            bytes_sent: sent,
            trouble: self.lane.trouble(),
        };
        assert_eq!(end.pages_tapped, end.pages_sent + end.pages_lost, "every page of {} is in the ledger", end.cpu);
        end
    }
}

/// A pipe whose reading side waits: a splice from a non-blocking one would not wait for the port either (fs/splice.c,
/// where the port is a pipe).
fn waiting_pipe() -> Result<Pipe, PumpError> {
    let pipe = Pipe::new(PIPE_BYTES).map_err(PumpError::of("pipe"))?;
    fcntl(&pipe.reader, FcntlArg::F_SETFL(OFlag::empty())).map_err(PumpError::of("pipe"))?;
    Ok(pipe)
}

/// A copy of a lane's pages in a file.
#[derive(Debug)]
struct Tee {
    pipe: Pipe,
    file: File,
    path: PathBuf,
}

impl Tee {
    fn new(directory: &Path, cpu: Cpu, pipe_bytes: usize) -> Result<Self, PumpError> {
        let path = directory.join(format!("{cpu}.raw"));
        let file = File::create(&path).map_err(PumpError::of(path.display().to_string()))?;
        let pipe = Pipe::new(pipe_bytes).map_err(PumpError::of("pipe"))?;
        Ok(Self { pipe, file, path })
    }

    fn copy(&self, source: &Pipe, bytes: usize) -> Result<(), SysError> {
        let mut left = tee(source.reader.as_fd(), self.pipe.writer.as_fd(), bytes, SpliceFlags::SPLICE_F_NONBLOCK)?;
        if left != bytes {
            return Err(SysError { call: "tee", errno: Errno::ENOSPC });
        }
        while left > 0 {
            left -= splice(self.pipe.reader.as_fd(), self.file.as_fd(), None, left, SpliceFlags::empty())?;
        }
        Ok(())
    }
}

struct Work {
    ring: Ring,
    roads: Vec<Road>,
    bell: Arc<EventFd>,
    inbox: Receiver<Order>,
    timer: TimerFd,
    /// The next rest without a page; a page makes it short again.
    pause: Duration,
    alarmed: bool,
    order: Option<Order>,
    scratch: Vec<u8>,
}

impl Work {
    fn run(mut self) -> Vec<LaneEnd> {
        if let Err(error) = self.work() {
            log::error!("the pump stops: {error}");
            self.roads.iter_mut().for_each(|road| road.lane.give_up(error.errno));
        }
        let page_bytes = u64::try_from(self.scratch.len()).expect("a page");
        self.roads.iter().map(|road| road.end(page_bytes)).collect()
    }

    fn work(&mut self) -> Result<(), SysError> {
        self.ring.push_poll(self.bell.as_fd(), READABLE, Operation::Bell.tag(0))?;
        self.ring.push_poll(self.timer.as_fd(), READABLE, Operation::Timer.tag(0))?;
        for index in 0..self.roads.len() {
            self.go(index, Next::Poll)?;
        }
        while self.order.is_none() || self.roads.iter().any(|road| road.lane.step() != Step::Ended) {
            self.ring.submit_and_wait()?;
            while let Some(completion) = self.ring.pop() {
                self.complete(completion)?;
            }
        }
        Ok(())
    }

    /// Hot.
    fn complete(&mut self, Completion { tag, result }: Completion) -> Result<(), SysError> {
        let (operation, index) = Operation::of(tag);
        let next = match operation {
            Operation::Poll => self.roads[index].lane.polled(result),
            Operation::Fill => {
                if result > 0 {
                    self.pause = PAUSE_MIN;
                }
                let next = self.roads[index].lane.filled(result);
                self.tee(index, next);
                next
            }
            Operation::Send => self.roads[index].lane.sent(result),
            Operation::Bell => return self.obey(),
            Operation::Timer => return self.resume(),
            Operation::Cancel => return Ok(()),
        };
        self.go(index, next)
    }

    /// Does what a lane wants next, until something is outstanding for it or it has ended. Hot (but for the end).
    fn go(&mut self, index: usize, mut next: Next) -> Result<(), SysError> {
        loop {
            let road = &mut self.roads[index];
            let fill_bytes = road.lane.fill_bytes();
            next = match next {
                Next::Poll => {
                    return self.ring.push_poll(road.tap.fd.as_fd(), READABLE, Operation::Poll.tag(index));
                }
                Next::Fill => {
                    let (tap, pipe) = (road.tap.fd.as_fd(), road.pipe.writer.as_fd());
                    let flags = SpliceFlags::SPLICE_F_MOVE | SpliceFlags::SPLICE_F_NONBLOCK;
                    return self.ring.push_splice(tap, pipe, fill_bytes, flags, Operation::Fill.tag(index));
                }
                Next::Send(bytes) => {
                    let (pipe, port) = (road.pipe.reader.as_fd(), road.port.as_fd());
                    let flags = SpliceFlags::SPLICE_F_MOVE;
                    return self.ring.push_splice(pipe, port, bytes, flags, Operation::Send.tag(index));
                }
                Next::Pause => return self.rest(),
                Next::ReadRest => {
                    let next = match road.read_rest(&mut self.scratch) {
                        Ok(bytes) => road.lane.read_rest(bytes),
                        Err(errno) => road.lane.rest_failed(errno),
                    };
                    self.tee(index, next);
                    next
                }
                Next::Discard => {
                    if !std::mem::replace(&mut road.is_lossy, true) {
                        log::warn!("{}: the port takes pages and loses them", road.tap.cpu);
                    }
                    match road.discard() {
                        Ok(()) => road.lane.discarded(),
                        Err(_) => road.lane.rest_failed(Errno::EMFILE),
                    }
                }
                Next::End => {
                    let trouble = road.lane.trouble();
                    if !trouble.is_empty() {
                        log::warn!("{} has ended early: {trouble}", road.tap.cpu);
                    }
                    return Ok(());
                }
            };
        }
    }

    /// Copies pages that have just come into the pipe, when that is wanted. Hot (when it is not).
    fn tee(&mut self, index: usize, next: Next) {
        let road = &mut self.roads[index];
        let (Some(tee), Next::Send(bytes)) = (&road.tee, next) else { return };
        if let Err(error) = tee.copy(&road.pipe, usize::try_from(bytes).expect("a pipe fits memory")) {
            log::error!("{}: the copy ends here: {error}", tee.path.display());
            road.tee = None;
        }
    }

    /// Lets a lane pause until the alarm that is set, or a new one. Hot.
    fn rest(&mut self) -> Result<(), SysError> {
        if std::mem::replace(&mut self.alarmed, true) { Ok(()) } else { self.alarm(self.pause) }
    }

    fn alarm(&self, after: Duration) -> Result<(), SysError> {
        let expiration = Expiration::OneShot(TimeSpec::from_duration(after));
        self.timer.set(expiration, TimerSetTimeFlags::empty()).map_err(SysError::of("timerfd_settime"))
    }

    fn resume(&mut self) -> Result<(), SysError> {
        if self.order == Some(Order::Abandon) {
            return Err(SysError { call: "cancel", errno: Errno::ETIMEDOUT });
        }
        // Nothing to read means that the timer has been set again meanwhile: it will fire again.
        if self.timer.wait().is_ok() {
            self.alarmed = false;
            self.pause = (self.pause * 2).min(PAUSE_MAX);
            self.resume_pausing()?;
        }
        self.ring.push_poll(self.timer.as_fd(), READABLE, Operation::Timer.tag(0))
    }

    fn resume_pausing(&mut self) -> Result<(), SysError> {
        for index in 0..self.roads.len() {
            if self.roads[index].lane.step() == Step::Pausing {
                let next = self.roads[index].lane.resumed();
                self.go(index, next)?;
            }
        }
        Ok(())
    }

    fn obey(&mut self) -> Result<(), SysError> {
        while self.bell.read().is_ok() {}
        while let Ok(order) = self.inbox.try_recv() {
            self.order = Some(order);
            if order == Order::Abandon {
                self.alarm(CANCEL_WAIT)?;
            }
            self.pass_on(order)?;
        }
        self.ring.push_poll(self.bell.as_fd(), READABLE, Operation::Bell.tag(0))
    }

    fn pass_on(&mut self, order: Order) -> Result<(), SysError> {
        for (index, road) in self.roads.iter_mut().enumerate() {
            let outstanding = match order {
                Order::Drain => road.lane.drain(),
                Order::Abandon => road.lane.cancel(),
            };
            let operation = match road.lane.step() {
                Step::Waiting => Operation::Poll,
                Step::Filling => Operation::Fill,
                Step::Sending => Operation::Send,
                Step::Pausing | Step::Ended => continue,
            };
            if outstanding {
                self.ring.push_cancel(operation.tag(index), Operation::Cancel.tag(index))?;
            }
        }
        self.resume_pausing()
    }
}

#[cfg(test)]
#[path = "pump_tests.rs"]
mod tests;
