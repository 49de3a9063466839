//! The host as one more machine: armed, described, started, stopped and reported like a guest.
//!
//! In:    an [`Arm`], a file with an area for each CPU
//! Out:   pages in the areas, pieces of description, a [`HostReport`] whose ledger adds up
//! Runs:  calls on the caller's thread; pages are moved by the pump's own ([`pump`])
//! Full:  see [`lane`]: the kernel overwrites and counts, a full area or disk ends that lane alone
//! Trust: the kernel
//!
//! Order: `arm`, `describe`, `attach`, `start`, `mark` at any time, `stop`, `describe_end`, `close`. Dropped at any
//! point, it leaves no instance, thread or descriptor behind.

use std::fs::File;

use vtrace_common::{
    ids::Cpu,
    time::HostTsc,
    wire::{
        agent::{Arm, Armed, Failure, FailureKind, LaneReport, Piece},
        client::{Area, LaneLedger},
    },
};

use crate::{
    drain::tap::{
        splice::{Counts, End},
        worker::{LaneEnd, Pump, PumpUse, Way},
    },
    ftrace::metadata::{Metadata, MetadataFault},
    sys::tsc,
    trace::write::Writer,
    tracefs::{INSTANCE_PREFIX, Instance, Tracefs},
};

/// The host's part of a session.
#[derive(Debug)]
pub struct HostRecorder {
    pump: Option<Pump>,
    cpus: Vec<Cpu>,
    own_only: bool,
    stats_before: Vec<String>,
    instance: Instance,
}

/// What the host recorded.
#[derive(Clone, PartialEq, Debug)]
pub struct HostReport {
    /// One entry a CPU, in the order of the areas. `bytes_sent` is what its area holds.
    pub lanes: Vec<LaneReport>,
    /// Why lanes ended before the session did, by the same place.
    pub ends: Vec<Option<End>>,
    /// TSC right after tracing was switched off.
    pub stopped: HostTsc,
    /// What moving the pages cost.
    pub pump: PumpUse,
}

/// Why the host's part cannot be recorded.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The kernel, or what was asked of it.
    #[error("{}: {}", .0.object, .0.detail)]
    Refused(Failure),
    /// Its description is too large.
    #[error("the host: {0}")]
    Metadata(#[from] MetadataFault),
    /// No second descriptor of its file.
    #[error("dup: {0}")]
    Descriptor(#[source] std::io::Error),
}

impl HostRecorder {
    /// Makes an instance named after this process and `session`, and prepares everything `arm` asks for; tracing
    /// stays off.
    ///
    /// # Errors
    /// As [`Tracefs::arm`]; `NoTracefs`.
    pub fn arm(arm: &Arm) -> Result<Self, Failure> {
        let tracefs = Tracefs::find_or_mount()?;
        tracefs.remove_stale();
        let name = format!("{INSTANCE_PREFIX}{}-{:x}", std::process::id(), arm.session);
        let instance = tracefs.arm(&name, arm)?;
        let (cpus, stats_before, own_only) = (Vec::new(), Vec::new(), arm.own_only);
        Ok(Self { pump: None, cpus, own_only, stats_before, instance })
    }

    /// What an agent would answer: the lanes it needs areas for, the page, the clock, how many events are on.
    pub fn armed(&self) -> Armed {
        Armed {
            lanes: self.instance.cpus().to_vec(),
            spare: Vec::new(),
            page_bytes: self.instance.page_bytes(),
            clock: self.instance.clock(),
            events: self.instance.events(),
        }
    }

    /// The buffer that a command has to join, if it is bound to processes.
    pub fn bound_to(&self) -> Option<&std::path::Path> {
        self.own_only.then(|| self.instance.path())
    }

    /// What is known before the trace, as an agent would send it.
    ///
    /// # Errors
    /// `Kernel`
    pub fn describe(&self, kallsyms: bool, each: &mut dyn FnMut(Piece)) -> Result<(), Failure> {
        self.instance.describe(kallsyms, each)
    }

    /// Pages go to these areas of `file` from now on, one area for each CPU that is to be recorded. With a `priority`
    /// they are moved in real time (SCHED_FIFO).
    ///
    /// # Errors
    /// `State` when pages have a place already; `Kernel` when a tap, a pipe, a thread or its priority is refused.
    pub fn attach(&mut self, file: File, areas: &[Area], priority: Option<u8>) -> Result<(), Failure> {
        if self.pump.is_some() || !self.cpus.is_empty() {
            return Err(state("the host's pages have a place already"));
        }
        let taps = areas.iter().map(|area| self.instance.tap(area.cpu)).collect::<Result<_, _>>()?;
        let page_bytes = usize::try_from(self.instance.page_bytes()).expect("usize is 64 bits");
        let refused = |error: std::io::Error| Failure {
            kind: FailureKind::Kernel,
            object: "the host's pump".into(),
            detail: error.to_string(),
            near: Vec::new(),
        };
        let way = Way { page_bytes, batch_pages: self.instance.pages_promised(), priority };
        self.pump = Some(Pump::spawn(taps, areas.to_vec(), file, way).map_err(refused)?);
        self.cpus = areas.iter().map(|area| area.cpu).collect();
        Ok(())
    }

    /// Switches tracing on and writes `marker` as the first event. The TSC right before the one, right after the other.
    ///
    /// # Errors
    /// `State` before `attach`; `Kernel`
    pub fn start(&mut self, marker: &str) -> Result<(HostTsc, HostTsc), Failure> {
        if self.pump.is_none() {
            return Err(state("the host's pages have no place yet"));
        }
        self.stats_before = self.stats();
        let before = HostTsc(tsc::read());
        self.instance.set_tracing(true)?;
        self.instance.mark(marker)?;
        Ok((before, HostTsc(tsc::read())))
    }

    /// Writes `text` into the trace. The TSC right before and after.
    ///
    /// # Errors
    /// `Kernel`; tracing is off
    pub fn mark(&self, text: &str) -> Result<(HostTsc, HostTsc), Failure> {
        let before = HostTsc(tsc::read());
        self.instance.mark(text)?;
        Ok((before, HostTsc(tsc::read())))
    }

    /// What has been moved so far: two readings of a lane that is moving pages may not add up.
    pub fn ledger(&self) -> Vec<LaneLedger> {
        let Some(pump) = &self.pump else { return Vec::new() };
        let entry = |(cpu, counts): (&Cpu, &Counts)| {
            let pages = counts.read();
            LaneLedger {
                cpu: *cpu,
                pages_in: pages.taken,
                pages_out: pages.written,
                pages_refused: pages.lost,
                ..LaneLedger::default()
            }
        };
        self.cpus.iter().zip(pump.counts()).map(entry).collect()
    }

    /// Switches tracing off, moves what is left, closes the taps and reports.
    ///
    /// # Errors
    /// `State` before `attach`; `Kernel`
    pub fn stop(&mut self) -> Result<HostReport, Failure> {
        self.instance.set_tracing(false)?;
        let stopped = HostTsc(tsc::read());
        let pump = self.pump.take().ok_or_else(|| state("nothing of the host is being recorded"))?;
        let pumped = pump.stop();
        if let Some(error) = pumped.failed {
            log::warn!("the host's pump gave up waiting: {error}");
        }
        let before = self.stats_before.iter().cloned().chain(std::iter::repeat(String::new()));
        let lanes = pumped.lanes.iter().zip(before.zip(self.stats()));
        let lanes = lanes.map(|(lane, stats)| report(lane, self.instance.page_bytes(), stats)).collect();
        let ends = pumped.lanes.iter().map(|lane| lane.end).collect();
        Ok(HostReport { lanes, ends, stopped, pump: pumped.used })
    }

    /// What is known only after the trace: command lines.
    ///
    /// # Errors
    /// `Kernel`
    pub fn describe_end(&self, each: &mut dyn FnMut(Piece)) -> Result<(), Failure> {
        self.instance.describe_end(each)
    }

    /// Removes the instance, and says if that failed.
    ///
    /// # Errors
    /// `Kernel`
    pub fn close(mut self) -> Result<(), Failure> {
        drop(self.pump.take());
        self.instance.remove()
    }

    fn stats(&self) -> Vec<String> {
        self.cpus.iter().map(|cpu| self.instance.stats(*cpu)).collect()
    }
}

/// One buffer of the host, and what an agent would have said of it.
pub(crate) struct Host {
    pub(crate) recorder: HostRecorder,
    pub(crate) metadata: Metadata,
    pub(crate) armed: Armed,
    /// TSC around the switch.
    pub(crate) started: Option<(HostTsc, HostTsc)>,
}

impl Host {
    /// Makes the buffer and describes the machine; tracing stays off.
    pub(crate) fn arm(arm: &Arm) -> Result<Self, HostError> {
        let recorder = HostRecorder::arm(arm).map_err(HostError::Refused)?;
        let mut metadata = Metadata::default();
        let mut added = Ok(());
        let describe = recorder.describe(arm.kallsyms, &mut |piece| {
            if added.is_ok() {
                added = metadata.add(piece);
            }
        });
        describe.map_err(HostError::Refused)?;
        added?;
        let armed = recorder.armed();
        Ok(Self { recorder, metadata, armed, started: None })
    }

    /// Pages go to the file from now on.
    pub(crate) fn attach(&mut self, writer: &Writer, priority: Option<u8>) -> Result<(), HostError> {
        let file = writer.file().try_clone().map_err(HostError::Descriptor)?;
        self.recorder.attach(file, writer.areas(), priority).map_err(HostError::Refused)
    }

    /// Switches tracing on.
    pub(crate) fn start(&mut self, marker: &str) -> Result<(), HostError> {
        self.started = Some(self.recorder.start(marker).map_err(HostError::Refused)?);
        Ok(())
    }

    /// Writes `text` into the trace; without it the trace is poorer, not useless.
    pub(crate) fn mark(&self, text: &str) {
        if let Err(failure) = self.recorder.mark(text) {
            log::warn!("{}: {}", failure.object, failure.detail);
        }
    }

    /// Switches tracing off, takes what is left, and asks for what is known only now.
    pub(crate) fn stop(&mut self) -> Result<HostReport, HostError> {
        let report = self.recorder.stop().map_err(HostError::Refused)?;
        let metadata = &mut self.metadata;
        let mut added = Ok(());
        let describe = self.recorder.describe_end(&mut |piece| {
            if added.is_ok() {
                added = metadata.add(piece);
            }
        });
        // Without command lines a file is poorer, not useless.
        if let Err(failure) = describe {
            log::warn!("{}: {}", failure.object, failure.detail);
        }
        if let Err(fault) = added {
            log::warn!("the host: {fault}");
        }
        Ok(report)
    }
}

fn report(lane: &LaneEnd, page_bytes: u32, (stats_before, stats_after): (String, String)) -> LaneReport {
    let pages = lane.pages;
    assert_eq!(pages.taken, pages.written + pages.lost, "{}: the ledger adds up", lane.cpu);
    LaneReport {
        cpu: lane.cpu,
        pages_tapped: pages.taken,
        pages_sent: pages.written,
        pages_lost: pages.lost,
        bytes_sent: pages.written * u64::from(page_bytes),
        stats_before,
        stats_after,
        trouble: lane.end.map(|end| end.to_string()).unwrap_or_default(),
        apic: None,
    }
}

fn state(detail: &str) -> Failure {
    Failure { kind: FailureKind::State, object: "host".into(), detail: detail.into(), near: Vec::new() }
}

#[cfg(test)]
mod tests;
