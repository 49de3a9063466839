//! The host as one more machine: armed, described, started, stopped and reported like a guest.
//!
//! In:    an [`Arm`], a file with an area for each CPU
//! Out:   pages in the areas, pieces of description, a [`HostReport`] whose ledger adds up
//! Runs:  on the caller's thread; pages are moved by the pump's thread ([`Pump`])
//! Full:  the kernel overwrites pages and counts them; a full area or disk ends only that lane
//! Trust: the kernel
//!
//! Order: `arm`, `describe`, `attach`, `start`, `mark` at any time, `stop`, `describe_end`, `close`. Dropping it at any
//! point removes its instance, threads and descriptors.

pub(crate) mod instances;

use std::fs::File;

use vtrace_common::{
    ids::Cpu,
    ledger::Ledger,
    time::HostTsc,
    wire::{
        agent::{Arm, Armed, Failure, FailureKind, LaneReport, Piece, SettingChange},
        client::{Area, LaneLedger},
    },
};

use crate::{
    drain::tap::{
        Pump,
        lane::TapEnd,
        worker::{PumpSettings, PumpUse, TapReport},
    },
    ftrace::metadata::{Metadata, MetadataFault},
    sys::tsc,
    trace::write::Writer,
    tracefs::{INSTANCE_PREFIX, Instance, Tracefs, stats::events_lost},
};

/// The host's part of a recording.
#[derive(Debug)]
pub struct HostRecorder {
    pump: Option<Pump>,
    cpus: Vec<Cpu>,
    own_only: bool,
    stats_before: Vec<String>,
    instance: Instance,
}

/// The result of the host's part.
#[derive(Clone, PartialEq, Debug)]
pub struct HostReport {
    /// One entry per CPU, in the order of the areas. `bytes_out`: bytes in its area.
    pub lanes: Vec<LaneReport>,
    /// Why lanes ended early, in the same order.
    pub ends: Vec<Option<TapEnd>>,
    /// TSC right after tracing was switched off.
    pub stopped: HostTsc,
    /// What the closing table has to say about the buffer.
    pub remarks: Vec<String>,
    /// CPU use of the pump.
    pub pump: PumpUse,
    /// Settings that were changed while it recorded.
    pub changes: Vec<SettingChange>,
}

/// Why the host's part cannot be recorded.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The kernel refused a request.
    #[error("{}: {}", .0.object, .0.detail)]
    Refused(Failure),
    /// Its description is too large.
    #[error("the host: {0}")]
    Metadata(#[from] MetadataFault),
    /// Its file's descriptor cannot be duplicated.
    #[error("dup: {0}")]
    Descriptor(#[source] std::io::Error),
}

impl HostRecorder {
    /// Creates an instance named after this process and `session` and applies `arm`; tracing stays off. One buffer of a
    /// recording has the markers of applications.
    ///
    /// # Errors
    /// As [`Tracefs::arm`]; `NoTracefs`.
    fn arm(arm: &Arm, has_markers: bool) -> Result<Self, Failure> {
        let tracefs = Tracefs::find_or_mount()?;
        tracefs.remove_stale();
        let name = format!("{INSTANCE_PREFIX}{}-{:x}", std::process::id(), arm.session);
        let instance = match has_markers {
            true => tracefs.arm_with_markers(&name, arm, &mut |_| {})?,
            false => tracefs.arm(&name, arm)?,
        };
        Ok(Self { pump: None, cpus: Vec::new(), own_only: arm.own_only, stats_before: Vec::new(), instance })
    }

    /// The same answer as an agent's: lanes, page size, clock, number of enabled events.
    pub fn armed(&self) -> Armed {
        Armed {
            lanes: self.instance.cpus().to_vec(),
            spare: Vec::new(),
            page_bytes: self.instance.page_bytes(),
            clock: self.instance.clock(),
            events: self.instance.events(),
        }
    }

    /// The instance's directory, if only processes that join it are recorded.
    pub fn bound_to(&self) -> Option<&std::path::Path> {
        self.own_only.then(|| self.instance.path())
    }

    /// The description that is known before the trace, in pieces as an agent sends it.
    ///
    /// # Errors
    /// `Kernel`
    pub fn describe(&self, kallsyms: bool, each: &mut dyn FnMut(Piece)) -> Result<(), Failure> {
        self.instance.describe(kallsyms, each)
    }

    /// Starts to move pages into these areas of `file`, one for each CPU. With a `priority`, the pump runs in real time
    /// (SCHED_FIFO).
    ///
    /// # Errors
    /// `State` when called twice; `Kernel` when a tap, a pipe, a thread or its priority is refused.
    pub fn attach(&mut self, file: File, areas: &[Area], priority: Option<u8>) -> Result<(), Failure> {
        if self.pump.is_some() || !self.cpus.is_empty() {
            return Err(state("the host's lanes are attached already"));
        }
        let taps = areas.iter().map(|area| self.instance.tap(area.cpu)).collect::<Result<_, _>>()?;
        let page_bytes = usize::try_from(self.instance.page_bytes()).expect("usize is 64 bits");
        let refused = |error: std::io::Error| Failure {
            kind: FailureKind::Kernel,
            object: "the host's pump".into(),
            detail: error.to_string(),
            near: Vec::new(),
        };
        let settings = PumpSettings { page_bytes, batch_pages: self.instance.pages_promised(), priority };
        self.pump = Some(Pump::spawn(taps, areas.to_vec(), file, settings).map_err(refused)?);
        self.cpus = areas.iter().map(|area| area.cpu).collect();
        Ok(())
    }

    /// Switches tracing on and writes `marker` as the first event. The TSC before and after both.
    ///
    /// # Errors
    /// `State` before `attach`; `Kernel`
    pub fn start(&mut self, marker: &str) -> Result<(HostTsc, HostTsc), Failure> {
        if self.pump.is_none() {
            return Err(state("the host's lanes are not attached"));
        }
        self.stats_before = self.stats();
        let before = HostTsc(tsc::read());
        self.instance.start_tracing()?;
        self.instance.mark(marker)?;
        Ok((before, HostTsc(tsc::read())))
    }

    /// Writes `text` into the trace. The TSC before and after.
    ///
    /// # Errors
    /// `Kernel`; tracing is off
    pub fn mark(&self, text: &str) -> Result<(HostTsc, HostTsc), Failure> {
        let before = HostTsc(tsc::read());
        self.instance.mark(text)?;
        Ok((before, HostTsc(tsc::read())))
    }

    /// The current ledgers. Readings of a lane that is moving pages may not add up.
    pub fn ledger(&self) -> Vec<LaneLedger> {
        let mut lanes = self.pump.as_ref().map(Pump::ledger).unwrap_or_default();
        for (lane, before) in lanes.iter_mut().zip(&self.stats_before) {
            lane.ledger.events_lost = events_lost(before, &self.instance.stats(lane.cpu));
        }
        lanes
    }

    /// Switches tracing off, moves the remaining pages, closes the taps and reports.
    ///
    /// # Errors
    /// `State` before `attach`; `Kernel`
    pub fn stop(&mut self) -> Result<HostReport, Failure> {
        let changes = self.instance.setting_changes();
        self.instance.set_tracing(false)?;
        let remarks = self.instance.remarks();
        let stopped = HostTsc(tsc::read());
        let pump = self.pump.take().ok_or_else(|| state("nothing of the host is being recorded"))?;
        let pumped = pump.stop();
        if let Some(error) = pumped.failed {
            log::warn!("the host's pump ended early: {error}");
        }
        let before = self.stats_before.iter().cloned().chain(std::iter::repeat(String::new()));
        let lanes = pumped.lanes.iter().zip(before.zip(self.stats()));
        let lanes = lanes.map(|(lane, stats)| report(lane, stats)).collect();
        let ends = pumped.lanes.iter().map(|lane| lane.end).collect();
        Ok(HostReport { lanes, ends, stopped, remarks, pump: pumped.used, changes })
    }

    /// The description that is known only after the trace: command lines.
    ///
    /// # Errors
    /// `Kernel`
    pub fn describe_end(&self, each: &mut dyn FnMut(Piece)) -> Result<(), Failure> {
        self.instance.describe_end(each)
    }

    fn stats(&self) -> Vec<String> {
        self.cpus.iter().map(|cpu| self.instance.stats(*cpu)).collect()
    }
}

/// One buffer of the host with its description.
pub(crate) struct Host {
    pub(crate) recorder: HostRecorder,
    pub(crate) metadata: Metadata,
    pub(crate) armed: Armed,
    /// TSC before and after tracing was switched on.
    pub(crate) started: Option<(HostTsc, HostTsc)>,
}

impl Host {
    /// Creates the buffer and describes the machine; tracing stays off. One buffer of a recording has the markers of
    /// applications.
    pub(crate) fn arm(arm: &Arm, has_markers: bool) -> Result<Self, HostError> {
        let recorder = HostRecorder::arm(arm, has_markers).map_err(HostError::Refused)?;
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

    /// Starts to move pages into the file.
    pub(crate) fn attach(&mut self, writer: &Writer, priority: Option<u8>) -> Result<(), HostError> {
        let file = writer.file().try_clone().map_err(HostError::Descriptor)?;
        self.recorder.attach(file, writer.areas(), priority).map_err(HostError::Refused)
    }

    /// Switches tracing on.
    pub(crate) fn start(&mut self, marker: &str) -> Result<(), HostError> {
        self.started = Some(self.recorder.start(marker).map_err(HostError::Refused)?);
        Ok(())
    }

    /// Writes `text` into the trace; a failure is only logged.
    pub(crate) fn mark(&self, text: &str) {
        if let Err(failure) = self.recorder.mark(text) {
            log::warn!("{}: {}", failure.object, failure.detail);
        }
    }

    /// Switches tracing off, moves the remaining pages, and completes the description.
    pub(crate) fn stop(&mut self) -> Result<HostReport, HostError> {
        let report = self.recorder.stop().map_err(HostError::Refused)?;
        let metadata = &mut self.metadata;
        let mut added = Ok(());
        let describe = self.recorder.describe_end(&mut |piece| {
            if added.is_ok() {
                added = metadata.add(piece);
            }
        });
        // Command lines are optional.
        if let Err(failure) = describe {
            log::warn!("{}: {}", failure.object, failure.detail);
        }
        if let Err(fault) = added {
            log::warn!("the host: {fault}");
        }
        Ok(report)
    }
}

fn report(lane: &TapReport, (stats_before, stats_after): (String, String)) -> LaneReport {
    assert!(lane.ledger.is_balanced(), "{}: every page is in the ledger: {:?}", lane.cpu, lane.ledger);
    LaneReport {
        cpu: lane.cpu,
        ledger: Ledger { events_lost: events_lost(&stats_before, &stats_after), ..lane.ledger },
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
