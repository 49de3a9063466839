//! The thread that moves the host's pages, past the page cache ([`super::direct`]) or through it ([`Spliced`]).
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
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::scope,
    time::{Duration, Instant},
};

use crossbeam::channel::bounded;
use memmap2::{Advice, MmapMut};
use nix::sys::{
    resource::{UsageWho, getrusage},
    signal::SigSet,
};
use vtrace_common::{ids::Cpu, ledger::Ledger, wire::client::Area};

use super::{
    direct::{BLOCK_BYTES, Direct, Fate, Files, SPARE_BLOCKS, Writer, all_free},
    lane::{TapEnd, TapLane},
    source::{PageMover, Spliced},
};
use crate::{
    drain::ledger::Counters,
    sys::{
        SysError,
        splice::Pipe,
        wait::{Waker, readable},
    },
    tracefs::Tap,
};

/// Pages that came for a lane wait this long, at most, for more to be written with them: what a crash of this process
/// can take along. An idle pump has none and sleeps.
const HOLD_MAX: Duration = Duration::from_secs(1);
/// A wake-up that found no full page is followed by this pause. It happens where poll(2) does not keep to
/// `buffer_percent`: with less than 100 / `BUFFER_PERCENT` pages a CPU, and on kernels without 42fb0a1e84ff (6.1).
const IDLE_PAUSE: Duration = Duration::from_millis(10);

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

/// What the thread works with. `taps` and `areas` belong together by their index.
pub(super) struct TapWorker {
    pub(super) taps: Vec<Tap>,
    pub(super) areas: Vec<Area>,
    pub(super) counters: Arc<[Counters]>,
    pub(super) file: File,
    pub(super) pipe: Pipe,
    pub(super) settings: PumpSettings,
    pub(super) stop: Arc<Waker>,
    /// What is in the ring buffers at the stop stays there.
    pub(super) abandoned: Arc<AtomicBool>,
}

impl TapWorker {
    pub(super) fn run(self) -> Pumped {
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
        if self.settings.batch_pages == 0 {
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
            let writer = Writer { files, fates, page_bytes: self.settings.page_bytes, jobs: queue, free: give_back };
            let writer = scope.spawn(move || {
                writer.run();
                thread_cpu_ns()
            });
            let mut mover =
                Direct::new((files, fates), self.settings.page_bytes, self.settings.batch_pages, jobs, free);
            let (failed, mut used) = self.pump_all(&mut mover);
            let ends: Vec<Option<TapEnd>> = (0..fates.len()).map(|at| mover.end(at)).collect();
            drop(mover);
            used.cpu_ns += writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            (ends, failed, used)
        });
        for (end, fate) in ends.iter_mut().zip(fates) {
            *end = fate.settle(self.settings.page_bytes).or(*end);
        }
        self.report(&ends, used, failed)
    }

    fn run_spliced(self) -> Pumped {
        let counters = self.counters.clone();
        let zip = self.areas.iter().zip(counters.iter());
        let lanes = zip.map(|(area, counters)| TapLane::new(*area, self.settings.page_bytes, counters)).collect();
        let page = vec![0; self.settings.page_bytes];
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

fn thread_cpu_ns() -> u64 {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_THREAD) else { return 0 };
    let ns = |time: nix::sys::time::TimeVal| u64::try_from(time.tv_sec() * 1_000_000_000 + time.tv_usec() * 1000);
    ns(usage.user_time()).unwrap_or(0) + ns(usage.system_time()).unwrap_or(0)
}
