//! The thread that moves the host's pages: tap ─► pipe ─► file.
//!
//! In:    taps, a file, an area for each
//! Out:   pages in the areas; [`Pumped`] when it ends
//! Runs:  one thread, asleep in poll(2) until a buffer has filled to `BUFFER_PERCENT` or it is told to stop
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
    thread::{Builder, JoinHandle},
    time::Duration,
};

use nix::sys::{
    resource::{UsageWho, getrusage},
    signal::SigSet,
};
use vtrace_common::{ids::Cpu, wire::client::Area};

use super::lane::{Counts, End, Lane, Pages};
use crate::{
    sys::{
        SysError,
        splice::Pipe,
        wait::{Waker, readable},
    },
    tracefs::Tap,
};

/// The pipe between tap and file: 256 pages of 4 KiB, what an unprivileged pipe may have.
const PIPE_BYTES: usize = 1 << 20;
/// Batches of one lane before the others have their turn.
const BATCHES_MAX: usize = 4;
/// A wake-up that found no full page is followed by this pause. It happens where poll(2) does not keep to
/// `buffer_percent`: with less than 100 / `BUFFER_PERCENT` pages a CPU, and on kernels without 42fb0a1e84ff (6.1).
const IDLE_PAUSE: Duration = Duration::from_millis(10);

/// A running pump. Dropped, it leaves what is in the ring buffers and waits for its thread.
#[derive(Debug)]
pub(super) struct Pump {
    counts: Arc<[Counts]>,
    stop: Arc<Waker>,
    abandoned: Arc<AtomicBool>,
    thread: Option<JoinHandle<Pumped>>,
}

/// How a lane ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct LaneEnd {
    pub(super) cpu: Cpu,
    pub(super) pages: Pages,
    pub(super) end: Option<End>,
}

/// What a pump has done.
#[derive(Debug)]
pub(super) struct Pumped {
    pub(super) lanes: Vec<LaneEnd>,
    pub(super) used: PumpUse,
    /// The wait itself failed; all lanes were given what they had.
    pub(super) failed: Option<SysError>,
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
    pipe: Pipe,
    stop: Arc<Waker>,
    abandoned: Arc<AtomicBool>,
    counts: Arc<[Counts]>,
}

impl Pump {
    /// Starts the thread. `taps` and `areas` belong together by their place.
    pub(super) fn spawn(taps: Vec<Tap>, areas: Vec<Area>, file: File, page_bytes: usize) -> io::Result<Self> {
        assert!(taps.iter().map(|tap| tap.cpu).eq(areas.iter().map(|area| area.cpu)), "an area for each tap");
        let stop = Arc::new(Waker::new()?);
        let counts: Arc<[Counts]> = areas.iter().map(|_| Counts::default()).collect();
        let pipe = Pipe::new(PIPE_BYTES.max(page_bytes))?;
        let abandoned = Arc::new(AtomicBool::new(false));
        let run = Run {
            taps,
            areas,
            file,
            page_bytes,
            pipe,
            stop: stop.clone(),
            abandoned: abandoned.clone(),
            counts: counts.clone(),
        };
        let thread = Builder::new().name("vtrace-pump".into()).spawn(move || run.run())?;
        Ok(Self { counts, stop, abandoned, thread: Some(thread) })
    }

    /// What has been moved so far, by place.
    pub(super) fn counts(&self) -> &[Counts] {
        &self.counts
    }

    /// Moves what is left in the ring buffers, partly filled pages too, closes the taps and ends. Tracing has to be
    /// off, or there is always more left.
    pub(super) fn stop(mut self) -> Pumped {
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
        let zip = self.areas.iter().zip(self.counts.iter());
        let mut lanes: Vec<Lane<'_>> = zip.map(|(area, counts)| Lane::new(*area, self.page_bytes, counts)).collect();
        let mut used = PumpUse::default();
        let failed = self.pump(&mut lanes, &mut used).err();
        if !self.abandoned.load(Relaxed) {
            self.finish(&mut lanes);
        }
        used.cpu_ns = thread_cpu_ns();
        let end =
            |(lane, counts): (&Lane<'_>, &Counts)| LaneEnd { cpu: lane.cpu(), pages: counts.read(), end: lane.end() };
        Pumped { lanes: lanes.iter().zip(self.counts.iter()).map(end).collect(), used, failed }
    }

    /// Moves full pages until it is told to stop.
    fn pump(&self, lanes: &mut [Lane<'_>], used: &mut PumpUse) -> Result<(), SysError> {
        let mut ready = Vec::with_capacity(lanes.len() + 1);
        loop {
            let open: Vec<usize> = (0..lanes.len()).filter(|at| lanes[*at].end().is_none()).collect();
            let taps = open.iter().map(|at| self.taps[*at].fd.as_fd());
            let sources: Vec<_> = std::iter::once(self.stop.as_fd()).chain(taps).collect();
            readable(&sources, None, &mut ready)?;
            if ready.first() == Some(&0) {
                return Ok(());
            }
            used.wakeups += 1;
            let moved = ready.iter().filter(|source| self.move_batches(lanes, open[**source - 1])).count();
            if moved == 0 {
                used.wakeups_idle += 1;
                readable(&sources[..1], Some(IDLE_PAUSE), &mut ready)?;
            }
        }
    }

    /// Whether anything was there. Hot.
    fn move_batches(&self, lanes: &mut [Lane<'_>], at: usize) -> bool {
        let (lane, tap) = (&mut lanes[at], self.taps[at].fd.as_fd());
        (0..BATCHES_MAX).take_while(|_| lane.move_pages(tap, &self.pipe, self.file.as_fd())).count() > 0
    }

    /// Empties every ring buffer.
    fn finish(&self, lanes: &mut [Lane<'_>]) {
        let mut page = vec![0; self.page_bytes];
        for (lane, tap) in lanes.iter_mut().zip(&self.taps) {
            while lane.move_pages(tap.fd.as_fd(), &self.pipe, self.file.as_fd()) {}
            while lane.move_rest(tap.fd.as_fd(), &mut page, self.file.as_fd()) {}
        }
    }
}

fn thread_cpu_ns() -> u64 {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_THREAD) else { return 0 };
    let ns = |time: nix::sys::time::TimeVal| u64::try_from(time.tv_sec() * 1_000_000_000 + time.tv_usec() * 1000);
    ns(usage.user_time()).unwrap_or(0) + ns(usage.system_time()).unwrap_or(0)
}
