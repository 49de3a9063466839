//! A recording from its plan to its summary, in order.
//!
//! In:    a validated [`Plan`]
//! Out:   files and a [`Summary`]; after an error every guest is released, the host's instance removed, and new files
//!        without pages are removed
//! Runs:  on the caller's thread, which must have opened [`Signals`] before any other thread was started
//! Full:  with a slow disk pages stay in the ring buffers; the kernels count what they overwrite
//! Trust: see [`super::guests`]
//!
//! Order: open files ─► claim guests ─► arm all ─► watch KVM ─► measure clocks ─► start host, start guests ─► markers ─►
//! command ─► markers ─► stop guests, stop host ─► drain guests ─► measure clocks ─► end the watch ─► release guests ─►
//! finish files.

use std::{
    os::fd::AsFd,
    path::Path,
    time::{Duration, Instant},
};

use vtrace_common::{
    time::HostTsc,
    wire::{agent::ToAgent, client::LaneLedger},
};

use super::{
    command::HostCommand,
    error::RecordError,
    files::{
        self, finish,
        limit::FileState,
        machine_file::{MachineFile, filled},
        options::marker,
        output::OutputFile,
    },
    guests::{
        Guests, GuestsError,
        command_output::OutputLine,
        session::{GuestSession, Phase, Trouble},
    },
    host::instances,
    plan::Plan,
    progress::{MachineCounts, MachineProgress},
    session::{ClockReadings, Recording},
    summary::Summary,
};
use crate::{
    clock::{
        sync::Measurement,
        watch::{KvmFault, Watch},
    },
    sys::{signal::Signals, tsc, wait::readable},
};

/// Interval of the status line, of pings and of the limits' checks.
const TICK: Duration = Duration::from_secs(1);

/// How far a recording has come.
#[derive(Clone, PartialEq, Debug, serde::Serialize)]
pub struct Progress {
    /// Time since the start.
    pub elapsed: Duration,
    /// The host first.
    pub machines: Vec<MachineProgress>,
}

/// What is reported while a recording runs.
#[derive(Clone, PartialEq, Debug)]
pub enum News {
    /// All machines record.
    Begun,
    /// How far it has come, about once a second.
    Progress(Progress),
    /// A guest cannot be recorded; the others are (`--keep-going`).
    LeftOut {
        /// The guest's name.
        guest: String,
        /// What went wrong with it.
        trouble: Trouble,
    },
    /// A guest's command wrote a line.
    Output {
        /// The guest's name.
        guest: String,
        /// The line.
        line: OutputLine,
    },
}

/// Receives reports.
pub type Tell<'a> = &'a mut dyn FnMut(&News);

/// Records as planned.
pub fn record(plan: &Plan, signals: &Signals, tell: Tell<'_>) -> Result<Summary, RecordError> {
    HostCommand::check(&plan.command)?;
    let outputs = files::open(plan)?;
    let mut guests = match &plan.guests[..] {
        [] => None,
        named => Some(Guests::claim(&plan.dir, named)?),
    };
    let result = record_with(plan, signals, &mut guests, outputs, tell);
    if let (Err(_), Some(guests)) = (&result, &mut guests) {
        // The first error is reported. A guest that cannot be released here is freed when the link closes.
        let _ = guests.step_all(GuestSession::abandon);
        let _ = release(guests);
    }
    result
}

fn record_with(
    plan: &Plan,
    signals: &Signals,
    guests: &mut Option<Guests>,
    outputs: Vec<OutputFile>,
    tell: Tell<'_>,
) -> Result<Summary, RecordError> {
    let mut recording = Recording::arm(plan, guests)?;
    let result = recording.go(signals, outputs, tell);
    *guests = recording.guests.take();
    result
}

impl Recording<'_> {
    fn go(&mut self, signals: &Signals, mut outputs: Vec<OutputFile>, tell: Tell<'_>) -> Result<Summary, RecordError> {
        self.arm_guests(signals)?;
        self.leave_out(&mut outputs, tell)?;
        let mut files = files::create(self, outputs)?;
        instances::attach(self.plan, &mut self.instances)?;
        self.send_lanes(&files, signals)?;
        self.leave_out(&mut files, tell)?;
        self.watch_kvm();
        self.measure(|clocks| &mut clocks.start)?;
        if self.guests.is_some() {
            files::keep_options(self, &mut files);
        }
        files::keep_instance_options(self, &files[0]);
        self.start(&files, signals)?;
        let command = HostCommand::start(&self.plan.command, &self.bound_to())?;
        files::begin(files.iter_mut().chain(instances::files(&mut self.instances)));
        tell(&News::Begun);
        let writeback = files::writeback(files.iter().chain(self.instances.iter().filter_map(|one| one.file.as_ref())));
        let begun = Instant::now();
        let status = self.run_command(command, signals, begun, &mut files, tell)?;
        self.surviving(|recording| recording.mark_around("stop"))?;
        self.surviving(Self::stop_guests)?;
        // The host stops last: for every event of a guest the host's trace shows whether its vCPU ran.
        self.surviving(|recording| recording.wait_guests(Phase::Draining, signals))?;
        let report = self.host.stop()?;
        instances::stop(&mut self.instances)?;
        self.surviving(|recording| recording.wait_guests(Phase::Drained, signals))?;
        self.pass_outputs(tell);
        let seconds = begun.elapsed().as_secs_f64();
        self.surviving(|recording| recording.measure(|clocks| &mut clocks.end))?;
        if let Some(watch) = self.watch.take() {
            self.kvm = watch.finish();
        }
        self.surviving(|recording| recording.guests.as_mut().map_or(Ok(()), release).map_err(Into::into))?;
        drop(writeback);
        Ok(finish::finish(self, files, &report, seconds, status))
    }

    fn arm_guests(&mut self, signals: &Signals) -> Result<(), RecordError> {
        let Some(guests) = &mut self.guests else { return Ok(()) };
        Ok(guests.wait(Phase::Armed, Some(signals))?)
    }

    /// A guest that fails before the recording begins stops all, or is left out (`--keep-going`). `of_machines`: one entry
    /// for the host, then one per guest; entries of guests that are left out are removed.
    fn leave_out<T>(&mut self, of_machines: &mut Vec<T>, tell: Tell<'_>) -> Result<(), RecordError> {
        let Some(guests) = self.guests.as_mut().filter(|_| self.plan.keep_going) else { return self.refuse_trouble() };
        for index in (0..guests.sessions.len()).rev() {
            let session = &guests.sessions[index];
            let Some(trouble) = session.trouble.clone() else { continue };
            let guest = session.name.clone();
            if guests.sessions.len() == 1 && !self.plan.host_records() {
                return Err(RecordError::Guest { guest, trouble }); // no machine would be left
            }
            tell(&News::LeftOut { guest: guest.clone(), trouble: trouble.clone() });
            guests.sessions.remove(index);
            self.clocks.remove(index);
            of_machines.remove(index + 1);
            self.left_out.push((guest, trouble));
        }
        Ok(())
    }

    /// Directories of the instances that record only this command's processes.
    fn bound_to(&self) -> Vec<&Path> {
        let recorders = std::iter::once(&self.host).chain(self.instances.iter().map(|instance| &instance.host));
        recorders.filter_map(|host| host.recorder.bound_to()).collect()
    }

    /// Starts to collect every change of a guest's TSC offset, where this host's KVM can be traced.
    fn watch_kvm(&mut self) {
        let claimed = self.guests.iter().flat_map(|guests| &guests.sessions).filter_map(|guest| guest.claimed.as_ref());
        let mut pids = claimed.map(|claimed| claimed.vmm_pid).peekable();
        if pids.peek().is_none() {
            return;
        }
        match Watch::begin(pids) {
            Ok(watch) => self.watch = Some(watch),
            Err(fault) => self.kvm = Err(fault),
        }
    }

    /// Runs `part` with the watch; an error ends the watch.
    fn with_watch(&mut self, part: fn(&mut Watch) -> Result<(), KvmFault>) {
        if let Some(Err(fault)) = self.watch.as_mut().map(part) {
            self.watch = None;
            self.kvm = Err(fault);
        }
    }

    fn send_lanes(&mut self, files: &[MachineFile], signals: &Signals) -> Result<(), RecordError> {
        let Some(guests) = &mut self.guests else { return Ok(()) };
        for (index, file) in files.iter().skip(1).enumerate() {
            let files: Vec<_> = [file.writer.file()].into_iter().chain(&file.direct).collect();
            guests.send_lanes(index, file.writer.areas(), &files)?;
        }
        Ok(guests.wait(Phase::Ready, Some(signals))?)
    }

    /// Before the recording begins, the failure of one guest ends it.
    fn refuse_trouble(&self) -> Result<(), RecordError> {
        let sessions = self.guests.iter().flat_map(|guests| &guests.sessions);
        for session in sessions {
            if let Some(trouble) = &session.trouble {
                return Err(RecordError::Guest { guest: session.name.clone(), trouble: trouble.clone() });
            }
        }
        Ok(())
    }

    /// Measures the clocks of all guests that work; `readings_at` selects the start or the end.
    fn measure(&mut self, readings_at: fn(&mut ClockReadings) -> &mut Vec<Measurement>) -> Result<(), RecordError> {
        let Some(guests) = &mut self.guests else { return Ok(()) };
        for (index, readings) in self.clocks.iter_mut().enumerate() {
            if guests.sessions[index].trouble.is_none() {
                *readings_at(readings) = guests.measure(index)?;
            }
        }
        Ok(())
    }

    fn start(&mut self, files: &[MachineFile], signals: &Signals) -> Result<(), RecordError> {
        let start_marker = marker(self.plan, "start");
        self.host.attach(&files[0].writer, self.plan.rt)?;
        self.since = HostTsc(tsc::read());
        self.host.start(&start_marker)?;
        instances::start(&mut self.instances, &start_marker)?;
        if let Some(guests) = &mut self.guests {
            guests.ask_all(Phase::Ready, &ToAgent::Start { marker: start_marker })?;
            guests.wait(Phase::Running, Some(signals))?;
        }
        self.refuse_trouble()?;
        self.mark_around("common")
    }

    /// Writes a marker in every guest between two on the host: `vtrace check` verifies their order in the merged files.
    fn mark_around(&mut self, word: &str) -> Result<(), RecordError> {
        let Some(guests) = &mut self.guests else { return Ok(()) };
        self.host.mark(&marker(self.plan, &format!("{word} before guests")));
        guests.mark(marker(self.plan, word))?;
        self.host.mark(&marker(self.plan, &format!("{word} after guests")));
        Ok(())
    }

    /// Runs the command, or waits for Ctrl-C, the time-out, or the end of all guests.
    fn run_command(
        &mut self,
        mut command: HostCommand,
        signals: &Signals,
        begun: Instant,
        files: &mut [MachineFile],
        tell: Tell<'_>,
    ) -> Result<Option<u8>, RecordError> {
        let mut tick = begun + TICK;
        loop {
            let now = Instant::now();
            let ends = self.plan.timeout.and_then(|timeout| begun.checked_add(timeout));
            let wait = ends.map_or(tick, |ends| ends.min(tick)).saturating_duration_since(now);
            self.surviving(|recording| recording.wait_event(signals, wait))?;
            self.pass_outputs(tell);
            if let Some(status) = command.ended(signals)? {
                // A Ctrl-C that ended the command has reached this process, too: it is not a second one.
                signals.take_stop();
                return Ok(status);
            }
            let is_over = ends.is_some_and(|ends| ends <= Instant::now()) || self.guest_commands_ended();
            if signals.take_stop() > 0 || is_over || self.ended.is_some() || !self.records_anything() {
                command.stop(signals)?;
                return Ok(None);
            }
            if tick <= Instant::now() {
                tick += TICK;
                self.surviving(|recording| recording.on_tick(begun, files, tell))?;
            }
        }
    }

    /// Without a command on the host, the recording ends with the guests' commands.
    fn guest_commands_ended(&self) -> bool {
        let mut with_commands = self.sessions().filter(|session| !session.outputs.commands().is_empty()).peekable();
        let ended = with_commands.peek().is_some() && with_commands.all(GuestSession::commands_are_over);
        ended && self.plan.command.is_empty()
    }

    fn pass_outputs(&mut self, tell: Tell<'_>) {
        for session in self.guests.iter_mut().flat_map(|guests| &mut guests.sessions) {
            for line in session.outputs.lines() {
                tell(&News::Output { guest: session.name.clone(), line });
            }
        }
    }

    /// A host that records events continues alone; otherwise the recording ends with the last guest.
    fn records_anything(&self) -> bool {
        let guests = self.guests.iter().flat_map(|guests| &guests.sessions);
        self.plan.host_records() || guests.into_iter().any(|session| session.phase() == Phase::Running)
    }

    fn wait_event(&mut self, signals: &Signals, wait: Duration) -> Result<(), RecordError> {
        let live = self.guests.as_mut().filter(|guests| guests.is_live());
        let mut descriptors = vec![signals.stop(), signals.child()];
        descriptors.extend(self.watch.as_ref().map(AsFd::as_fd));
        descriptors.extend(live.as_ref().map(|guests| guests.link().as_fd()));
        readable(&descriptors, Some(wait + Duration::from_millis(1)), &mut Vec::new())
            .map_err(|error| RecordError::System { call: error.call, source: error.into() })?;
        live.map_or(Ok(()), Guests::take_all)?;
        self.with_watch(Watch::collect);
        Ok(())
    }

    fn on_tick(&mut self, begun: Instant, files: &mut [MachineFile], tell: Tell<'_>) -> Result<(), RecordError> {
        self.with_watch(|watch| {
            watch.read_clocks();
            Ok(())
        });
        let machines = self.counts();
        let mut states = Vec::with_capacity(machines.len());
        for (index, machine) in machines.iter().enumerate() {
            let mut state = file_state(&machine.ledgers);
            // A page of the host is refused only when its file cannot take it.
            let is_host = index <= self.instances.len();
            state.failed |= is_host && machine.ledgers.iter().any(|lane| lane.ledger.pages_lost > 0);
            states.push(state);
        }
        self.ended = self.limit.tick(&states);
        self.stop_full_guests()?;
        if self.plan.keeps_newest() {
            // Frees the blocks of older pages.
            let (host, guests) = files.split_first_mut().expect("the host has a file");
            let in_order = std::iter::once(host).chain(instances::files(&mut self.instances)).chain(guests);
            for (file, machine) in in_order.zip(&machines) {
                file.drop_older(&filled(&machine.ledgers));
            }
        }
        if let Some(guests) = &mut self.guests {
            guests.ask_ledgers()?;
        }
        let progress = Progress { elapsed: begun.elapsed(), machines: self.meter.tick(&machines) };
        tell(&News::Progress(progress));
        Ok(())
    }

    /// Stops guests at their size limit; the others continue.
    fn stop_full_guests(&mut self) -> Result<(), RecordError> {
        let Some(guests) = &mut self.guests else { return Ok(()) };
        for index in self.limit.full_guests(guests.sessions.len()) {
            let requests = guests.sessions[index].stop_at_bound();
            guests.send(requests)?;
        }
        Ok(())
    }

    /// The ledgers of the host, its instances and the guests, in this order.
    fn counts(&self) -> Vec<MachineCounts> {
        let mut counts = vec![MachineCounts { name: "host".into(), ledgers: self.host.recorder.ledger(), silent_s: 0 }];
        for instance in &self.instances {
            let (name, ledgers) = (instance.title(), instance.ledger());
            counts.push(MachineCounts { name, ledgers, silent_s: 0 });
        }
        let now = Instant::now();
        for session in self.sessions() {
            counts.push(MachineCounts {
                name: session.name.clone(),
                ledgers: session.ledgers_in_use(),
                silent_s: session.silence.lasts(now).as_secs(),
            });
        }
        counts
    }

    fn stop_guests(&mut self) -> Result<(), RecordError> {
        let Some(guests) = &mut self.guests else { return Ok(()) };
        Ok(guests.step_all(GuestSession::stop)?)
    }

    /// Waits until all guests have reached `phase`. A second stop request keeps the pages that have arrived and waits for
    /// no agent.
    fn wait_guests(&mut self, phase: Phase, signals: &Signals) -> Result<(), RecordError> {
        let Some(guests) = &mut self.guests else { return Ok(()) };
        match guests.wait(phase, Some(signals)) {
            Err(GuestsError::Interrupted) => {
                guests.step_all(GuestSession::abandon)?;
                Ok(guests.wait(phase, None)?)
            }
            result => Ok(result?),
        }
    }

    /// Runs `part`. A lost server ends the guests' parts, not the recording.
    fn surviving(&mut self, part: impl FnOnce(&mut Self) -> Result<(), RecordError>) -> Result<(), RecordError> {
        match part(self) {
            Err(RecordError::Guests(GuestsError::Link(error))) => {
                log::warn!("{error}");
                let sessions = self.guests.iter_mut().flat_map(|guests| &mut guests.sessions);
                sessions.for_each(|session| session.server_gone(&error));
                Ok(())
            }
            result => result,
        }
    }
}

fn release(guests: &mut Guests) -> Result<(), GuestsError> {
    guests.step_all(GuestSession::close)?;
    guests.wait(Phase::Closed, None)
}

/// The state of a machine's file.
fn file_state(ledgers: &[LaneLedger]) -> FileState {
    let bytes = ledgers.iter().map(|lane| lane.ledger.bytes_out).fold(0, u64::saturating_add);
    let failed = ledgers.iter().any(|lane| lane.write_errno != 0);
    FileState { bytes, failed }
}
