//! The pump: moves pages from taps to ports by splice(2), and sleeps in io_uring until there is something to move
//! (in epoll where io_uring is forbidden).
//!
//! In:    taps and ports of a session; orders to drain or to abandon
//! Out:   pages in the ports; one [`LaneEnd`] per lane when the threads have ended
//! Runs:  threads of its own, each with one ring for its lanes. A quiet guest wakes nothing
//! Full:  a lane whose port has no room waits for it, the others go on; the ring buffer then overwrites and counts
//! Trust: the kernel; a splice that moved nothing although pages waited is counted as loss

use std::{
    collections::VecDeque,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        mpsc::{Receiver, Sender, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        eventfd::{EfdFlags, EventFd},
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
};

use super::{
    lane::{Next, Step, Wait},
    lane_io::{LaneEnd, LaneIo, PumpError},
};
use crate::{
    sys::{
        SysError,
        poll_set::Waits,
        uring::{Completion, READABLE, WRITABLE},
    },
    tracefs::Tap,
};

/// Lanes of one thread, and threads at most (then they have more lanes each).
const LANES_A_THREAD: usize = 8;
const THREADS_MAX: usize = 8;
/// First and longest pause of lanes whose taps call themselves readable and give nothing: kernels whose poll ignores
/// the watermark (before 6.1, where stable updates lack "Have polling block on watermark").
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_millis(100);
/// How long cancelled operations may take to come back.
const CANCEL_WAIT: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Order {
    Drain,
    Abandon,
}

/// What a thread is asked.
#[derive(Debug)]
enum PumpCommand {
    Order(Order),
    /// One more lane. None follows an order.
    Join(Box<LaneIo>),
}

/// A running pump. Dropping it abandons what is on its way.
#[derive(Debug)]
pub(super) struct Pump {
    threads: Vec<PumpThread>,
    done: Arc<EventFd>,
    /// Of the threads, while one of them runs.
    last: Weak<Done>,
    page_bytes: u32,
    tee: Option<PathBuf>,
}

/// Handle of one of its threads.
#[derive(Debug)]
struct PumpThread {
    commands: Sender<PumpCommand>,
    wake: Arc<EventFd>,
    lanes: usize,
    handle: JoinHandle<Vec<LaneEnd>>,
}

impl Pump {
    /// Starts moving pages from each tap to its port. Neither blocks from now on. With `tee`, a copy of every page goes
    /// to `TEE/cpuN.raw` before it goes to the port (to verify the pump, not to record: it costs as much).
    pub(super) fn start(lanes: Vec<(Tap, OwnedFd)>, page_bytes: u32, tee: Option<&Path>) -> Result<Self, PumpError> {
        let done = Arc::new(eventfd()?);
        let last = Arc::new(Done(Arc::clone(&done)));
        let mut lanes = lanes
            .into_iter()
            .map(|(tap, port)| LaneIo::new(tap, port, page_bytes, tee))
            .collect::<Result<VecDeque<_>, _>>()?;
        let tee = tee.map(Path::to_path_buf);
        let mut pump = Self { threads: Vec::new(), done, last: Arc::downgrade(&last), page_bytes, tee };
        // Neighbours stay together: they share caches, and memory is near.
        let share = share(lanes.len());
        loop {
            let its_lanes = lanes.drain(..share.min(lanes.len())).collect();
            pump.threads.push(PumpThread::start(its_lanes, page_bytes, Arc::clone(&last))?);
            if lanes.is_empty() {
                return Ok(pump);
            }
        }
    }

    /// Moves the pages of one more tap, until the order to drain is given: by the thread with the fewest lanes, or by
    /// one of its own where all have many.
    pub(super) fn join_lane(&mut self, (tap, port): (Tap, OwnedFd)) -> Result<(), PumpError> {
        let lane_io = LaneIo::new(tap, port, self.page_bytes, self.tee.as_deref())?;
        let threads = self.threads.len();
        let thread = self.threads.iter_mut().min_by_key(|thread| thread.lanes).expect("a pump has a thread");
        if thread.lanes < LANES_A_THREAD || threads >= THREADS_MAX {
            thread.lanes += 1;
            return thread.tell(PumpCommand::Join(Box::new(lane_io))).ok_or_else(ended);
        }
        let last = self.last.upgrade().ok_or_else(ended)?;
        self.threads.push(PumpThread::start(vec![lane_io], self.page_bytes, last)?);
        Ok(())
    }

    /// Readable once the pump has ended, by an order or in trouble.
    pub(super) fn done(&self) -> BorrowedFd<'_> {
        self.done.as_fd()
    }

    /// Tracing is off: move everything, then end.
    pub(super) fn drain(&self) {
        self.order(Order::Drain);
    }

    /// What the lanes did, after [`Pump::done`] (or it waits). `None` when a thread has panicked.
    pub(super) fn join(mut self) -> Option<Vec<LaneEnd>> {
        // All of them are waited for, whatever became of the first.
        let ends: Vec<_> = self.threads.drain(..).map(|thread| thread.handle.join().ok()).collect();
        Some(ends.into_iter().collect::<Option<Vec<_>>>()?.concat())
    }

    fn order(&self, order: Order) {
        for thread in &self.threads {
            // A thread that has ended has nothing left to do.
            let _ = thread.tell(PumpCommand::Order(order));
        }
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.order(Order::Abandon);
        for thread in self.threads.drain(..) {
            match thread.handle.join() {
                Ok(ends) => {
                    for end in ends.iter().filter(|end| end.ledger.pages_lost > 0) {
                        log::warn!("{}: {} pages are abandoned", end.cpu, end.ledger.pages_lost);
                    }
                }
                Err(_) => log::error!("the pump has panicked"),
            }
        }
    }
}

impl PumpThread {
    fn start(lanes: Vec<LaneIo>, page_bytes: u32, last: Arc<Done>) -> Result<Self, PumpError> {
        let wake = Arc::new(eventfd()?);
        let (commands, receiver) = channel();
        let count = lanes.len();
        let name = lanes.first().map_or_else(|| "vt-pump".into(), |first| format!("vt-pump/{}", first.tap.cpu.0));
        let ring = Waits::new(2 * count + 4).map_err(PumpError::of("io_uring"))?;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)
            .map_err(PumpError::of("timerfd"))?;
        let worker = PumpWorker {
            ring,
            turns: VecDeque::with_capacity(count),
            lanes,
            wake: Arc::clone(&wake),
            commands: receiver,
            timer,
            pause: PAUSE_MIN,
            timer_runs: false,
            order: None,
            scratch: vec![0; usize::try_from(page_bytes).expect("a page fits memory")],
        };
        let handle = std::thread::Builder::new().name(name).spawn(move || {
            let _last = last;
            worker.run()
        });
        Ok(Self { commands, wake, lanes: count, handle: handle.map_err(PumpError::of("thread"))? })
    }

    /// Sends a command; `None` if the thread has ended.
    fn tell(&self, command: PumpCommand) -> Option<()> {
        self.commands.send(command).ok()?;
        self.wake.write(1).expect("an eventfd counts a few wake-ups");
        Some(())
    }
}

fn ended() -> PumpError {
    PumpError::of("the pump has ended")(Errno::ESRCH)
}

/// Lanes of each thread, of so many.
fn share(lanes: usize) -> usize {
    lanes.div_ceil(lanes.div_ceil(LANES_A_THREAD).clamp(1, THREADS_MAX))
}

/// Wakes whoever waits for the pump when its last thread ends, by return or panic.
#[derive(Debug)]
struct Done(Arc<EventFd>);

impl Drop for Done {
    fn drop(&mut self) {
        self.0.write(1).expect("written once");
    }
}

fn eventfd() -> Result<EventFd, PumpError> {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(PumpError::of("eventfd"))
}

/// What an operation was for: the low byte of its tag; the lane's index stands above it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Operation {
    Page = 1,
    Room = 2,
    Command = 3,
    Timer = 4,
    Cancel = 5,
}

impl Operation {
    const ALL: [Self; 5] = [Self::Page, Self::Room, Self::Command, Self::Timer, Self::Cancel];

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

/// The state of one thread.
struct PumpWorker {
    ring: Waits,
    lanes: Vec<LaneIo>,
    /// Lanes that may have more pages, in order.
    turns: VecDeque<usize>,
    wake: Arc<EventFd>,
    commands: Receiver<PumpCommand>,
    timer: TimerFd,
    /// The next pause without a page; a page makes it short again.
    pause: Duration,
    timer_runs: bool,
    order: Option<Order>,
    scratch: Vec<u8>,
}

impl PumpWorker {
    fn run(mut self) -> Vec<LaneEnd> {
        if let Err(error) = self.serve() {
            log::error!("the pump stops: {error}");
            self.lanes.iter_mut().for_each(|lane_io| lane_io.lane.give_up(error.errno));
        }
        self.lanes.iter().map(LaneIo::end).collect()
    }

    fn serve(&mut self) -> Result<(), SysError> {
        self.ring.push_poll(self.wake.as_fd(), READABLE, Operation::Command.tag(0))?;
        self.ring.push_poll(self.timer.as_fd(), READABLE, Operation::Timer.tag(0))?;
        for index in 0..self.lanes.len() {
            self.wait(index, Wait::Page)?;
        }
        while self.order.is_none() || self.lanes.iter().any(|lane_io| lane_io.lane.step() != Step::Ended) {
            if self.turns.is_empty() {
                self.ring.submit_and_wait()?
            } else {
                self.ring.submit()?
            }
            while let Some(completion) = self.ring.pop() {
                self.complete(completion)?;
            }
            // A lane that has more after its turn goes to the end, after those that became ready meanwhile.
            for _ in 0..self.turns.len() {
                let Some(index) = self.turns.pop_front() else { break };
                let next = self.lanes[index].lane.resumed();
                self.go(index, next)?;
            }
        }
        Ok(())
    }

    /// Hot.
    fn complete(&mut self, completion: Completion) -> Result<(), SysError> {
        let (operation, index) = Operation::of(completion.tag);
        let outcome = completion.outcome();
        let next = match operation {
            Operation::Page => self.lanes[index].lane.readable(outcome),
            Operation::Room => self.lanes[index].lane.writable(outcome),
            Operation::Command => return self.obey(),
            Operation::Timer => return self.resume(),
            Operation::Cancel => return Ok(()),
        };
        self.go(index, next)
    }

    /// Does what a lane wants next, until it has to wait. Hot.
    fn go(&mut self, index: usize, next: Next) -> Result<(), SysError> {
        let lane_io = &mut self.lanes[index];
        let before = lane_io.lane.bytes_moved();
        let wait = lane_io.go(next, &mut self.scratch);
        if lane_io.lane.bytes_moved() != before {
            self.pause = PAUSE_MIN;
        }
        self.wait(index, wait)
    }

    /// Registers what a lane waits for. Hot (but for the end).
    fn wait(&mut self, index: usize, wait: Wait) -> Result<(), SysError> {
        let lane_io = &self.lanes[index];
        match wait {
            Wait::Page => self.ring.push_poll(lane_io.tap.fd.as_fd(), READABLE, Operation::Page.tag(index)),
            Wait::Room => self.ring.push_poll(lane_io.port.as_fd(), WRITABLE, Operation::Room.tag(index)),
            Wait::Turn => {
                self.turns.push_back(index);
                Ok(())
            }
            Wait::Timer => self.pause(),
            Wait::End => {
                let trouble = lane_io.lane.trouble();
                if !trouble.is_empty() {
                    log::warn!("{} has ended early: {trouble}", lane_io.tap.cpu);
                }
                Ok(())
            }
        }
    }

    /// Lets a lane pause until the timer that runs, or a new one. Hot.
    fn pause(&mut self) -> Result<(), SysError> {
        if std::mem::replace(&mut self.timer_runs, true) { Ok(()) } else { self.set_timer(self.pause) }
    }

    fn set_timer(&self, after: Duration) -> Result<(), SysError> {
        let expiration = Expiration::OneShot(TimeSpec::from_duration(after));
        self.timer.set(expiration, TimerSetTimeFlags::empty()).map_err(SysError::of("timerfd_settime"))
    }

    fn resume(&mut self) -> Result<(), SysError> {
        if self.order == Some(Order::Abandon) {
            return Err(SysError { call: "cancel", errno: Errno::ETIMEDOUT });
        }
        // Nothing to read means that the timer has been set again meanwhile: it will fire again.
        if self.timer.wait().is_ok() {
            self.timer_runs = false;
            self.pause = (self.pause * 2).min(PAUSE_MAX);
            self.resume_pausing()?;
        }
        self.ring.push_poll(self.timer.as_fd(), READABLE, Operation::Timer.tag(0))
    }

    fn resume_pausing(&mut self) -> Result<(), SysError> {
        for index in 0..self.lanes.len() {
            if self.lanes[index].lane.step() == Step::Pausing {
                let next = self.lanes[index].lane.resumed();
                self.go(index, next)?;
            }
        }
        Ok(())
    }

    fn obey(&mut self) -> Result<(), SysError> {
        while self.wake.read().is_ok() {}
        while let Ok(command) = self.commands.try_recv() {
            let order = match command {
                PumpCommand::Order(order) => order,
                PumpCommand::Join(lane_io) => {
                    assert!(self.order.is_none(), "no lane joins after an order");
                    self.lanes.push(*lane_io);
                    self.wait(self.lanes.len() - 1, Wait::Page)?;
                    continue;
                }
            };
            self.order = Some(order);
            if order == Order::Abandon {
                self.set_timer(CANCEL_WAIT)?;
            }
            self.pass_on(order)?;
        }
        self.ring.push_poll(self.wake.as_fd(), READABLE, Operation::Command.tag(0))
    }

    fn pass_on(&mut self, order: Order) -> Result<(), SysError> {
        for (index, lane_io) in self.lanes.iter_mut().enumerate() {
            let outstanding = match order {
                Order::Drain => lane_io.lane.drain(),
                Order::Abandon => lane_io.lane.cancel(),
            };
            let operation = match lane_io.lane.step() {
                Step::Waiting => Operation::Page,
                Step::Blocked => Operation::Room,
                Step::Filling | Step::Sending | Step::Pausing | Step::Ended => continue,
            };
            if outstanding {
                self.ring.push_cancel(operation.tag(index), Operation::Cancel.tag(index))?;
            }
        }
        self.resume_pausing()
    }
}

#[cfg(test)]
mod tests;
