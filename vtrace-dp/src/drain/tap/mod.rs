//! Moves this machine's own pages from its ring buffers to a file.
//!
//! In:    taps ([`crate::tracefs::Tap`]), areas of a file
//! Out:   pages at their final place; counts for each lane
//! Runs:  [`Pump`] is a handle; the thread `vt-pump/host` lives from [`Pump::spawn`] to [`Pump::stop`]: one session
//! Full:  a slow file leaves pages in the ring buffer, which overwrites and counts
//! Trust: this machine's kernel
//!
//! It uses nothing of [`crate::drain::session`]: a pump has its lanes and its file from start to stop, so there is no
//! attach, finish or detach, and a panic ends the recording.
//!
//! | file | what |
//! |---|---|
//! | [`worker`] | the thread: waits for pages, moves them, stops |
//! | [`source`] | what takes pages from the taps; through the page cache |
//! | [`lane`] | one CPU: tap ─► pipe ─► its area |
//! | [`direct`] | past the page cache: tap ─► block of huge pages ─► O_DIRECT write |

mod direct;
pub mod lane;
mod source;
pub mod worker;

use std::{
    fs::File,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc::sync_channel,
    },
    thread::{Builder, JoinHandle},
};

use vtrace_common::wire::client::{Area, LaneLedger};

use self::worker::{PumpSettings, Pumped, TapWorker};
use crate::{
    drain::ledger::Counters,
    sys::{realtime::run_in_real_time, splice::Pipe, wait::Waker},
    tracefs::Tap,
};

/// The pipe between tap and file: 256 pages of 4 KiB, what an unprivileged pipe may have.
const PIPE_BYTES: usize = 1 << 20;

/// A running pump. Dropped, it leaves what is in the ring buffers and waits for its thread.
#[derive(Debug)]
pub(crate) struct Pump {
    counters: Arc<[Counters]>,
    stop: Arc<Waker>,
    abandoned: Arc<AtomicBool>,
    thread: Option<JoinHandle<Pumped>>,
}

impl Pump {
    /// Starts the thread. `taps` and `areas` belong together by their index.
    ///
    /// # Errors
    /// A descriptor, a thread, or the real-time priority is refused.
    pub(crate) fn spawn(taps: Vec<Tap>, areas: Vec<Area>, file: File, settings: PumpSettings) -> io::Result<Self> {
        assert!(taps.iter().map(|tap| tap.cpu).eq(areas.iter().map(|area| area.cpu)), "an area for each tap");
        let counters: Arc<[Counters]> = areas.iter().map(|area| Counters::new(area.cpu)).collect();
        let stop = Arc::new(Waker::new()?);
        let abandoned = Arc::new(AtomicBool::new(false));
        let worker = TapWorker {
            taps,
            areas,
            counters: Arc::clone(&counters),
            file,
            pipe: Pipe::new(PIPE_BYTES.max(settings.page_bytes))?,
            settings,
            stop: Arc::clone(&stop),
            abandoned: Arc::clone(&abandoned),
        };
        let (report, reported) = sync_channel(1);
        let thread = Builder::new().name("vt-pump/host".into()).spawn(move || {
            let prioritised = settings.priority.map_or(Ok(()), run_in_real_time);
            let refused = prioritised.is_err();
            report.send(prioritised).expect("who started it waits for this");
            if refused { Pumped::default() } else { worker.run() }
        })?;
        let prioritised = reported.recv().expect("a thread reports this first");
        prioritised.map_err(|error| io::Error::other(format!("real-time priority: {error}")))?;
        Ok(Self { counters, stop, abandoned, thread: Some(thread) })
    }

    /// What has been moved so far, by the taps' index.
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
