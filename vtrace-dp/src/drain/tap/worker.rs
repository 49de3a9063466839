//! The thread that moves the host's pages, past the page cache ([`super::direct`]) or through it ([`super::splice`]).
//!
//! In:    taps, a file, an area for each
//! Out:   pages in the areas; [`Pumped`] when it ends
//! Runs:  one thread (and the writer of [`super::direct`]), asleep in poll(2) until a buffer has filled to
//!        `buffer_percent` or it is told to stop
//! Full:  a slow disk blocks the thread; the kernel overwrites the oldest pages and counts them
//! Trust: the kernel
//!
//! What it adds to the trace itself: for each wake-up one wake-up and two switches of its own thread, plus the file
//! system's events where those are on. [`PumpUse`] says how many wake-ups there were.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc::sync_channel,
    },
    thread::{Builder, JoinHandle, scope},
    time::{Duration, Instant},
};

use crossbeam::channel::bounded;
use memmap2::{Advice, MmapMut};
use nix::sys::{
    resource::{UsageWho, getrusage},
    signal::SigSet,
};
use vtrace_common::{
    ids::Cpu,
    ledger::Ledger,
    wire::client::{Area, LaneLedger},
};

use super::{
    direct::{BLOCK_BYTES, Direct, Fate, Files, SPARE_BLOCKS, Writer, all_free},
    splice::{PageMover, TapEnd, TapLane},
};
use crate::{
    drain::ledger::Counters,
    sys::{
        SysError,
        realtime::run_in_real_time,
        splice::Pipe,
        wait::{Waker, readable},
    },
    tracefs::Tap,
};

/// The pipe between tap and file: 256 pages of 4 KiB, what an unprivileged pipe may have.
const PIPE_BYTES: usize = 1 << 20;
/// Batches of one lane before the others have their turn.
const BATCHES_MAX: usize = 4;
/// Pages that came for a lane wait this long, at most, for more to be written with them: what a crash of this process
/// can take along. An idle pump has none and sleeps.
const HOLD_MAX: Duration = Duration::from_secs(1);
/// A wake-up that found no full page is followed by this pause. It happens where poll(2) does not keep to
/// `buffer_percent`: with less than 100 / `BUFFER_PERCENT` pages a CPU, and on kernels without 42fb0a1e84ff (6.1).
const IDLE_PAUSE: Duration = Duration::from_millis(10);

/// A running pump. Dropped, it leaves what is in the ring buffers and waits for its thread.
#[derive(Debug)]
pub(crate) struct Pump {
    counters: Arc<[Counters]>,
    stop: Arc<Waker>,
    abandoned: Arc<AtomicBool>,
    thread: Option<JoinHandle<Pumped>>,
}

/// How a pump moves pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PumpSettings {
    /// Bytes of one page.
    pub(crate) page_bytes: usize,
    /// Pages that are full, at least, when poll(2) says that a tap can be read; 0 where it makes no such promise.
    pub(crate) batch_pages: usize,
    /// Real-time priority of the threads (SCHED_FIFO).
    pub(crate) priority: Option<u8>,
}

/// How a lane ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct TapReport {
    pub(crate) cpu: Cpu,
    pub(crate) ledger: Ledger,
    pub(crate) end: Option<TapEnd>,
}

/// What a pump has done.
#[derive(Debug, Default)]
pub(crate) struct Pumped {
    pub(crate) lanes: Vec<TapReport>,
    pub(crate) used: PumpUse,
    /// The wait itself failed; all lanes were given what they had.
    pub(crate) failed: Option<SysError>,
}

/// What the pump itself cost and added.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PumpUse {
    /// Times it was woken.
    pub wakeups: u64,
    /// Of those, times it found no full page.
    pub wakeups_idle: u64,
    /// CPU time of its thread, in user and kernel.
    pub cpu_ns: u64,
}

struct Run {
    taps: Vec<Tap>,
    areas: Vec<Area>,
    file: File,
    page_bytes: usize,
    batch_pages: usize,
    pipe: Pipe,
    stop: Arc<Waker>,
    abandoned: Arc<AtomicBool>,
    counters: Arc<[Counters]>,
}

impl Pump {
    /// Starts the thread. `taps` and `areas` belong together by their place.
    ///
    /// # Errors
    /// A descriptor, a thread, or the real-time priority is refused.
    pub(crate) fn spawn(taps: Vec<Tap>, areas: Vec<Area>, file: File, settings: PumpSettings) -> io::Result<Self> {
        let PumpSettings { page_bytes, batch_pages, priority } = settings;
        assert!(taps.iter().map(|tap| tap.cpu).eq(areas.iter().map(|area| area.cpu)), "an area for each tap");
        let stop = Arc::new(Waker::new()?);
        let counters: Arc<[Counters]> = areas.iter().map(|area| Counters::new(area.cpu)).collect();
        let pipe = Pipe::new(PIPE_BYTES.max(page_bytes))?;
        let abandoned = Arc::new(AtomicBool::new(false));
        let run = Run {
            taps,
            areas,
            file,
            page_bytes,
            batch_pages,
            pipe,
            stop: stop.clone(),
            abandoned: abandoned.clone(),
            counters: counters.clone(),
        };
        let (said, settled) = sync_channel(1);
        let thread = Builder::new().name("vtrace-pump".into()).spawn(move || {
            let prioritised = priority.map_or(Ok(()), run_in_real_time);
            let refused = prioritised.is_err();
            said.send(prioritised).expect("who started it waits for this");
            if refused { Pumped::default() } else { run.run() }
        })?;
        let prioritised = settled.recv().expect("a thread says this first");
        prioritised.map_err(|error| io::Error::other(format!("real-time priority: {error}")))?;
        Ok(Self { counters, stop, abandoned, thread: Some(thread) })
    }

    /// What has been moved so far, by place.
    pub(crate) fn ledger(&self) -> Vec<LaneLedger> {
        self.counters.iter().map(Counters::read).collect()
    }

    /// Moves what is left in the ring buffers, partly filled pages too, closes the taps and ends. Tracing has to be
    /// off, or there is always more left.
    pub(crate) fn stop(mut self) -> Pumped {
        self.stop.wake();
        let thread = self.thread.take().expect("stopped once");
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.abandoned.store(true, Relaxed);
            self.stop.wake();
            if thread.join().is_err() {
                log::error!("the host's pump panicked");
            }
        }
    }
}

impl Run {
    fn run(self) -> Pumped {
        let signals = SigSet::all().thread_block(); // they are for the thread that waits for them
        if let Err(errno) = signals {
            log::debug!("signals stay on in the pump: {errno}");
        }
        match self.direct() {
            Some(direct) => self.run_direct(direct),
            None => self.run_spliced(),
        }
    }

    /// The file opened with O_DIRECT and the lanes' blocks, where the system gives both.
    fn direct(&self) -> Option<(Files, MmapMut)> {
        if self.batch_pages == 0 {
            return None;
        }
        let refused = |error: io::Error| log::debug!("the host's pages go through the page cache: {error}");
        let files = Files::open(&self.file).map_err(refused).ok()?;
        let memory = MmapMut::map_anon((self.areas.len() + SPARE_BLOCKS) * BLOCK_BYTES).map_err(refused).ok()?;
        if let Err(error) = memory.advise(Advice::HugePage) {
            log::debug!("no huge pages: {error}");
        }
        Some((files, memory))
    }

    fn run_direct(self, (files, mut memory): (Files, MmapMut)) -> Pumped {
        let counters = self.counters.clone();
        let fates: Vec<Fate<'_>> =
            self.areas.iter().zip(counters.iter()).map(|(area, counters)| Fate::new(*area, counters)).collect();
        let (files, fates) = (&files, &fates[..]);
        let (mut ends, failed, used) = scope(|scope| {
            let (jobs, queue) = bounded(fates.len() + SPARE_BLOCKS);
            let (give_back, free) = all_free(memory.chunks_exact_mut(BLOCK_BYTES));
            let writer = Writer { files, fates, page_bytes: self.page_bytes, jobs: queue, free: give_back };
            let writer = scope.spawn(move || {
                writer.run();
                thread_cpu_ns()
            });
            let mut mover = Direct::new((files, fates), self.page_bytes, self.batch_pages, jobs, free);
            let (failed, mut used) = self.pump_all(&mut mover);
            let ends: Vec<Option<TapEnd>> = (0..fates.len()).map(|at| mover.end(at)).collect();
            drop(mover);
            used.cpu_ns += writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            (ends, failed, used)
        });
        for (end, fate) in ends.iter_mut().zip(fates) {
            *end = fate.settle(self.page_bytes).or(*end);
        }
        self.report(&ends, used, failed)
    }

    fn run_spliced(self) -> Pumped {
        let counters = self.counters.clone();
        let zip = self.areas.iter().zip(counters.iter());
        let lanes = zip.map(|(area, counters)| TapLane::new(*area, self.page_bytes, counters)).collect();
        let page = vec![0; self.page_bytes];
        let mut mover = Spliced { lanes, page, pipe: &self.pipe, file: self.file.as_fd() };
        let (failed, used) = self.pump_all(&mut mover);
        let ends: Vec<Option<TapEnd>> = (0..self.areas.len()).map(|at| mover.end(at)).collect();
        self.report(&ends, used, failed)
    }

    fn report(&self, ends: &[Option<TapEnd>], used: PumpUse, failed: Option<SysError>) -> Pumped {
        let lanes = self.counters.iter().zip(ends).map(|(counters, end)| TapReport {
            cpu: counters.cpu(),
            ledger: counters.ledger(),
            end: *end,
        });
        Pumped { lanes: lanes.collect(), used, failed }
    }

    /// Moves all pages, from the first to the last.
    fn pump_all(&self, mover: &mut dyn PageMover) -> (Option<SysError>, PumpUse) {
        let mut used = PumpUse::default();
        let failed = self.pump(mover, &mut used).err();
        if !self.abandoned.load(Relaxed) {
            self.taps.iter().enumerate().for_each(|(at, tap)| mover.take_rest(at, tap.fd.as_fd()));
        }
        used.cpu_ns = thread_cpu_ns();
        (failed, used)
    }

    /// Moves full pages until it is told to stop.
    fn pump(&self, mover: &mut dyn PageMover, used: &mut PumpUse) -> Result<(), SysError> {
        let mut ready = Vec::with_capacity(self.taps.len() + 1);
        let mut flushed = Instant::now();
        loop {
            let open: Vec<usize> = (0..self.taps.len()).filter(|at| !mover.has_ended(*at)).collect();
            let taps = open.iter().map(|at| self.taps[*at].fd.as_fd());
            let sources: Vec<_> = std::iter::once(self.stop.as_fd()).chain(taps).collect();
            readable(&sources, mover.holds_pages().then_some(HOLD_MAX), &mut ready)?;
            if ready.first() == Some(&0) {
                return Ok(());
            }
            if flushed.elapsed() >= HOLD_MAX {
                mover.flush();
                flushed = Instant::now();
            }
            if ready.is_empty() {
                continue;
            }
            used.wakeups += 1;
            let mut moved = false;
            for source in &ready {
                let at = open[*source - 1];
                moved |= mover.take(at, self.taps[at].fd.as_fd());
            }
            if !moved {
                used.wakeups_idle += 1;
                readable(&sources[..1], Some(IDLE_PAUSE), &mut ready)?;
            }
        }
    }
}

/// Moves pages through the page cache.
struct Spliced<'a> {
    lanes: Vec<TapLane<'a>>,
    page: Vec<u8>,
    pipe: &'a Pipe,
    file: BorrowedFd<'a>,
}

impl PageMover for Spliced<'_> {
    fn has_ended(&self, at: usize) -> bool {
        self.lanes[at].end().is_some()
    }

    /// Hot.
    fn take(&mut self, at: usize, tap: BorrowedFd<'_>) -> bool {
        let lane = &mut self.lanes[at];
        (0..BATCHES_MAX).take_while(|_| lane.move_pages(tap, self.pipe, self.file)).count() > 0
    }

    fn take_rest(&mut self, at: usize, tap: BorrowedFd<'_>) {
        let lane = &mut self.lanes[at];
        while lane.move_pages(tap, self.pipe, self.file) {}
        while lane.move_rest(tap, &mut self.page, self.file) {}
    }

    fn holds_pages(&self) -> bool {
        false
    }

    fn flush(&mut self) {}

    fn end(&self, at: usize) -> Option<TapEnd> {
        self.lanes[at].end()
    }
}

fn thread_cpu_ns() -> u64 {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_THREAD) else { return 0 };
    let ns = |time: nix::sys::time::TimeVal| u64::try_from(time.tv_sec() * 1_000_000_000 + time.tv_usec() * 1000);
    ns(usage.user_time()).unwrap_or(0) + ns(usage.system_time()).unwrap_or(0)
}
