//! What a session owns while it exists: the instance, the pump, the counts from before.
//!
//! In:    an [`Arm`]; ports
//! Out:   messages for the host, given to `tell` one by one
//! Runs:  on the control thread
//! Full:  `tell` waits for the host
//! Trust: the kernel
//!
//! Order of the end: pump (it holds the taps), then instance: an instance with an open tap cannot be removed.

use std::{
    os::fd::BorrowedFd,
    path::Path,
    time::{Duration, Instant},
};

use vtrace_common::{
    ids::Cpu,
    ledger::Ledger,
    limits::TEXT_BYTES_MAX,
    time::GuestTsc,
    wire::agent::{Arm, Armed, CommandRequest, Failure, FailureKind, FromAgent, LaneReport, Piece, SettingChange},
};

use super::{
    command::RunningCommand,
    lane_io::{LaneEnd, PumpError},
    late_cpus::{LateCpus, LateLane},
    link::HostGone,
    port::SerialPorts,
    process_tree::end_orphans,
    pump::Pump,
};
use crate::{
    sys::{account::Account, tsc},
    tracefs::{INSTANCE_PREFIX, Instance, Tap, Tracefs, stats::events_lost},
};

/// How often the host hears that a session is still being made: it waits for half a minute of silence.
const ARMING_EVERY: Duration = Duration::from_secs(1);

/// Why something was not done.
#[derive(Debug)]
pub(super) enum Refused {
    /// The request cannot be met: the host is told.
    Failed(Failure),
    /// The host is gone: it cannot be told.
    Gone(HostGone),
}

impl From<Failure> for Refused {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<HostGone> for Refused {
    fn from(gone: HostGone) -> Self {
        Self::Gone(gone)
    }
}

/// How messages reach the host.
pub(super) type SendToHost<'a> = &'a dyn Fn(&FromAgent) -> Result<(), HostGone>;

/// An armed session.
#[derive(Debug)]
pub(super) struct ArmedSession {
    // Fields are dropped in this order.
    /// What runs for the host, by its place in the request.
    pub(super) commands: Vec<RunningCommand>,
    requests: Vec<CommandRequest>,
    own_only: bool,
    pump: Option<Pump>,
    late_cpus: LateCpus,
    ends: Vec<LaneEnd>,
    stats_before: Vec<(Cpu, String)>,
    /// Events lost so far, as the host was last told.
    events_lost: u64,
    /// Settings that had changed when tracing was switched off.
    changes: Vec<SettingChange>,
    /// What else the closing table has to say about the recording.
    remarks: Vec<String>,
    instance: Instance,
}

impl ArmedSession {
    /// Makes everything `arm` asks for, describes the machine, says `Armed`. Nothing is left of a failed one.
    pub(super) fn arm(
        arm: &Arm,
        ports: &SerialPorts,
        without_indirect: bool,
        tee: Option<&Path>,
        tell: SendToHost<'_>,
    ) -> Result<Self, Refused> {
        let name = format!("{INSTANCE_PREFIX}{}-{:x}", std::process::id(), arm.session);
        let instance = instance(&name, arm, tell)?;
        let (mut lanes, found) = (Vec::new(), ports.lanes());
        for cpu in instance.cpus() {
            lanes.push((instance.tap(*cpu)?, found.open(*cpu, without_indirect)?));
        }
        let late_cpus = LateCpus::find(&instance, ports, &found, without_indirect);
        described(|each| instance.describe(arm.kallsyms, each), tell)?;
        let armed = Armed {
            lanes: [instance.cpus(), late_cpus.cpus()].concat(),
            spare: late_cpus.cpus().to_vec(),
            page_bytes: instance.page_bytes(),
            clock: instance.clock(),
            events: instance.events(),
        };
        let stats_before = instance.cpus().iter().map(|cpu| (*cpu, instance.stats(*cpu))).collect();
        let pump = start_pump(lanes, instance.page_bytes(), tee)?;
        let session = Self {
            commands: Vec::new(),
            requests: arm.commands.clone(),
            own_only: arm.own_only,
            pump: Some(pump),
            late_cpus,
            ends: Vec::new(),
            stats_before,
            events_lost: 0,
            changes: Vec::new(),
            remarks: Vec::new(),
            instance,
        };
        tell(&FromAgent::Armed(armed))?;
        Ok(session)
    }

    /// Readable when the pump has ended; `None` once [`ArmedSession::pumped`] was called.
    pub(super) fn done(&self) -> Option<BorrowedFd<'_>> {
        self.pump.as_ref().map(Pump::done)
    }

    /// Begins the lanes of CPUs that have come online. Only while a host is there: it is told of each port.
    pub(super) fn look(&mut self) {
        let come = self.late_cpus.come(&self.instance);
        self.begin(come);
    }

    fn begin(&mut self, come: Vec<LateLane>) {
        for (cpu, lane) in come {
            let Some(pump) = &mut self.pump else { return };
            match lane.and_then(|lane| pump.join_lane(lane).map_err(refused)) {
                Ok(()) => log::info!("{cpu} came online: its lane begins"),
                Err(Failure { object, detail, .. }) => log::warn!("{cpu} is not recorded: {object}: {detail}"),
            }
        }
    }

    /// Tracing on, start marker written: the TSC around both.
    pub(super) fn start(&mut self, marker: &str) -> Result<FromAgent, Failure> {
        let before = GuestTsc(tsc::read());
        self.instance.start_tracing()?;
        if let Err(failure) = self.instance.mark(marker) {
            self.instance.set_tracing(false)?;
            return Err(failure);
        }
        Ok(FromAgent::Started { before, after: GuestTsc(tsc::read()) })
    }

    /// Starts the commands.
    pub(super) fn start_commands(&mut self, user: Option<Account>) -> Result<(), Failure> {
        let buffer = self.own_only.then(|| self.instance.path());
        for (index, request) in (0..).zip(&self.requests) {
            self.commands.push(RunningCommand::start(index, request, user, buffer)?);
        }
        Ok(())
    }

    /// Writes a marker.
    pub(super) fn mark(&self, text: &str) -> Result<FromAgent, Failure> {
        let before = GuestTsc(tsc::read());
        self.instance.mark(text)?;
        Ok(FromAgent::Marked { before, after: GuestTsc(tsc::read()) })
    }

    /// The events that ring buffers have lost, if there are more than at the last call.
    pub(super) fn new_losses(&mut self) -> Option<FromAgent> {
        let mut lanes = Vec::new();
        let mut sum = 0_u64;
        for (cpu, before) in &self.stats_before {
            let lost = events_lost(before, &self.instance.stats(*cpu)).unwrap_or(0);
            if lost > 0 {
                lanes.push((*cpu, lost));
                sum = sum.saturating_add(lost);
            }
        }
        if sum <= self.events_lost {
            return None;
        }
        self.events_lost = sum;
        Some(FromAgent::EventsLost { lanes })
    }

    /// Tracing off; the pump moves what is left, then [`ArmedSession::done`] is readable.
    pub(super) fn drain(&mut self) {
        self.changes = self.instance.setting_changes();
        if let Err(failure) = self.instance.set_tracing(false) {
            log::error!("tracing cannot be switched off: {}: {}", failure.object, failure.detail);
        }
        self.remarks = self.instance.remarks();
        let come = self.late_cpus.arrived_before_end(&self.instance);
        self.begin(come);
        if let Some(pump) = &self.pump {
            pump.drain();
        }
    }

    /// The pump has ended: takes its counts.
    pub(super) fn pumped(&mut self) {
        let Some(pump) = self.pump.take() else { return };
        self.ends = pump.join().unwrap_or_else(|| {
            log::error!("the pump has panicked");
            let cpus = self.stats_before.iter().map(|(cpu, _)| *cpu);
            cpus.map(|cpu| LaneEnd::nothing(cpu, "the pump has panicked".into())).collect()
        });
    }

    /// Says what the lanes did, the command lines, and `Stopped`.
    pub(super) fn report(&self, tell: SendToHost<'_>) -> Result<(), Refused> {
        for (cpu, stats_before) in &self.stats_before {
            self.report_lane(*cpu, stats_before, tell)?;
        }
        let late_cpus = self.late_cpus.cpus();
        for cpu in late_cpus {
            self.report_lane(*cpu, "", tell)?;
        }
        let portless = self.instance.absent_cpus().into_iter().filter(|cpu| !late_cpus.contains(cpu));
        for cpu in portless.filter(|cpu| self.instance.has_recorded(*cpu)) {
            log::warn!("{cpu} came online after the start: it is not recorded");
            let stats_after = self.instance.stats(cpu);
            tell(&FromAgent::Lane(LaneReport { cpu, stats_after, ..LaneReport::default() }))?;
        }
        described(|each| self.instance.describe_end(each), tell)?;
        for change in &self.changes {
            tell(&FromAgent::Changed(change.clone()))?;
        }
        for remark in &self.remarks {
            tell(&FromAgent::Remark { text: shortened(remark.clone()) })?;
        }
        tell(&FromAgent::Stopped)?;
        Ok(())
    }

    fn report_lane(&self, cpu: Cpu, stats_before: &str, tell: SendToHost<'_>) -> Result<(), HostGone> {
        let nothing = || LaneEnd::nothing(cpu, String::new());
        let end = self.ends.iter().find(|end| end.cpu == cpu).cloned().unwrap_or_else(nothing);
        let has_come = !self.late_cpus.is_absent(cpu);
        let stats_after = if has_come { self.instance.stats(cpu) } else { String::new() };
        let ledger = Ledger { events_lost: events_lost(stats_before, &stats_after), ..end.ledger };
        let report = LaneReport {
            cpu,
            ledger,
            stats_before: stats_before.into(),
            stats_after,
            trouble: end.trouble,
            apic: self.late_cpus.apic(cpu),
        };
        if has_come {
            log::info!("{cpu}: {} pages, {} lost", ledger.pages_out, ledger.pages_lost);
        }
        tell(&FromAgent::Lane(report))
    }

    /// Abandons what is on its way: ports and taps are not used any more.
    pub(super) fn abandon(&mut self) {
        self.pump = None;
    }

    /// Abandons what is on its way and removes the instance.
    pub(super) fn remove(self) {
        if !self.commands.is_empty() {
            drop(self.commands);
            end_orphans();
        }
        drop(self.pump);
        if let Err(failure) = self.instance.remove() {
            log::error!("{} stays: {}", failure.object, failure.detail);
        }
    }
}

/// Makes the instance, and says now and then how far it is.
fn instance(name: &str, arm: &Arm, tell: SendToHost<'_>) -> Result<Instance, Refused> {
    let (mut said, mut told) = (Instant::now(), Ok(()));
    let made = Tracefs::find_or_mount()?.arm_with_markers(name, arm, &mut |events| {
        if said.elapsed() >= ARMING_EVERY && told.is_ok() {
            said = Instant::now();
            told = tell(&FromAgent::Arming { events: u32::try_from(events).unwrap_or(u32::MAX) });
        }
    })?;
    told?;
    Ok(made)
}

fn start_pump(lanes: Vec<(Tap, std::os::fd::OwnedFd)>, page_bytes: u32, tee: Option<&Path>) -> Result<Pump, Failure> {
    Pump::start(lanes, page_bytes, tee).map_err(refused)
}

fn refused(error: PumpError) -> Failure {
    Failure::new(FailureKind::Kernel, &shortened(error.object), &error.source.to_string())
}

/// Passes pieces on; the first failure to tell one is the answer.
fn described(
    describe: impl FnOnce(&mut dyn FnMut(Piece)) -> Result<(), Failure>,
    tell: SendToHost<'_>,
) -> Result<(), Refused> {
    let mut told = Ok(());
    describe(&mut |piece| {
        if told.is_ok() {
            told = tell(&FromAgent::Describe(piece));
        }
    })?;
    told.map_err(Refused::Gone)
}

fn shortened(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
    text
}
