//! A recording from its plan to its summary: the order of things.
//!
//! In:    a validated [`Plan`]
//! Out:   files and a [`Summary`]; on an error every guest is let go, the host's instance removed, and a file that
//!        this run made and did not fill is gone again
//! Runs:  on the caller's thread, which must have opened [`Signals`] before any other thread was started
//! Full:  a slow disk holds pages back in the rings; the kernels count what they overwrite
//! Trust: see [`super::session`] and [`super::guests`]
//!
//! Order: files opened ─► guests claimed ─► all armed ─► KVM watched ─► clocks measured ─► host started, guests started ─► markers ─►
//! command ─► markers ─► guests stopped, host stopped ─► guests drained ─► clocks measured ─► KVM's last word ─► guests let go ─► files finished.

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
    command::Command,
    error::RecordError,
    files::{self, limit::FileState, machine_file::MachineFile, output::Output},
    guests::{Guests, GuestsError, command_output::Line},
    instances,
    plan::Plan,
    progress::{Counted, MachineProgress},
    session::{GuestSession, Phase, Trouble},
    state::{Clocks, Recording},
    summary::Summary,
};
use crate::{
    clock::{
        sync::Measurement,
        watch::{KvmFault, Watch},
    },
    sys::{signal::Signals, tsc},
};

/// How often agents hear from us and the status line is renewed.
const TICK: Duration = Duration::from_secs(1);

/// What a status line shows.
#[derive(Clone, PartialEq, Debug, serde::Serialize)]
pub struct Progress {
    /// Since the start.
    pub elapsed: Duration,
    /// The host first.
    pub machines: Vec<MachineProgress>,
}

/// What a person may want to see while it runs.
#[derive(Clone, PartialEq, Debug)]
pub enum News {
    /// All machines record.
    Begun,
    /// How far it is; about once a second.
    Progress(Progress),
    /// A guest cannot be recorded; the others are.
    LeftOut {
        /// Which guest.
        guest: String,
        /// Why.
        trouble: Trouble,
    },
    /// A guest's command wrote this.
    Output {
        /// Which guest.
        guest: String,
        /// What.
        line: Line,
    },
}

/// Who is told.
pub type Tell<'a> = &'a mut dyn FnMut(&News);

/// Records.
pub fn record(plan: &Plan, signals: &Signals, tell: Tell<'_>) -> Result<Summary, RecordError> {
    Command::check(&plan.command)?;
    let outputs = files::open(plan)?;
    let mut guests = match &plan.guests[..] {
        [] => None,
        named => Some(Guests::claim(&plan.dir, named)?),
    };
    let result = record_with(plan, signals, &mut guests, outputs, tell);
    if let (Err(_), Some(guests)) = (&result, &mut guests) {
        // The first error is the one to report; a guest that cannot be let go is freed when the link closes.
        let _ = guests.step_all(GuestSession::abandon);
        let _ = let_go(guests);
    }
    result
}

fn record_with(
    plan: &Plan,
    signals: &Signals,
    guests: &mut Option<Guests>,
    outputs: Vec<Output>,
    tell: Tell<'_>,
) -> Result<Summary, RecordError> {
    let mut recording = Recording::arm(plan, guests)?;
    let result = recording.go(signals, outputs, tell);
    *guests = recording.guests.take();
    result
}

impl Recording<'_> {
    fn go(&mut self, signals: &Signals, mut outputs: Vec<Output>, tell: Tell<'_>) -> Result<Summary, RecordError> {
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
        files::keep_options_of(self, &files[0]);
        self.start(&files, signals)?;
        let command = Command::start(&self.plan.command, &self.bound_to())?;
        files::begin(files.iter_mut().chain(instances::files(&mut self.instances)));
        tell(&News::Begun);
        let behind = files::write_behind(files.iter().chain(self.instances.iter().filter_map(|one| one.file.as_ref())));
        let begun = Instant::now();
        let status = self.run_command(command, signals, begun, &mut files, tell)?;
        self.surviving(|recording| recording.mark_around("stop"))?;
        self.surviving(Self::stop_guests)?;
        // No event of a guest may lie behind the host's last: nobody could say whether its vCPU ran.
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
        self.surviving(|recording| recording.guests.as_mut().map_or(Ok(()), let_go).map_err(Into::into))?;
        drop(behind);
        Ok(files::finish(self, files, &report, seconds, status))
    }

    fn arm_guests(&mut self, signals: &Signals) -> Result<(), RecordError> {
        let Some(guests) = &mut self.guests else { return Ok(()) };
        Ok(guests.wait(Phase::Armed, Some(signals))?)
    }

    /// A guest that has trouble before the recording begins stops all, or is left out. `of_machines` has something for the
    /// host, then for each guest.
    fn leave_out<T>(&mut self, of_machines: &mut Vec<T>, tell: Tell<'_>) -> Result<(), RecordError> {
        let Some(guests) = self.guests.as_mut().filter(|_| self.plan.keep_going) else { return self.refuse_trouble() };
        for index in (0..guests.sessions.len()).rev() {
            let session = &guests.sessions[index];
            let Some(trouble) = session.trouble.clone() else { continue };
            let guest = session.name.clone();
            if guests.sessions.len() == 1 && !self.plan.host_records() {
                return Err(RecordError::Guest { guest, trouble }); // nothing would be left
            }
            tell(&News::LeftOut { guest: guest.clone(), trouble: trouble.clone() });
            guests.sessions.remove(index);
            self.clocks.remove(index);
            of_machines.remove(index + 1);
            self.left_out.push((guest, trouble));
        }
        Ok(())
    }

    /// The buffers that the command has to join.
    fn bound_to(&self) -> Vec<&Path> {
        let recorders = std::iter::once(&self.host).chain(self.instances.iter().map(|instance| &instance.host));
        recorders.filter_map(|host| host.recorder.bound_to()).collect()
    }

    /// From now on every change of a guest's TSC is known, where this host's KVM tells it.
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

    /// Does `part` with the watch, which is over when that fails.
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

    /// Until the recording has begun, one guest in trouble stops all.
    fn refuse_trouble(&self) -> Result<(), RecordError> {
        let sessions = self.guests.iter().flat_map(|guests| &guests.sessions);
        for session in sessions {
            if let Some(trouble) = &session.trouble {
                return Err(RecordError::Guest { guest: session.name.clone(), trouble: trouble.clone() });
            }
        }
        Ok(())
    }

    fn measure(&mut self, place: fn(&mut Clocks) -> &mut Vec<Measurement>) -> Result<(), RecordError> {
        let Some(guests) = &mut self.guests else { return Ok(()) };
        for (index, clocks) in self.clocks.iter_mut().enumerate() {
            let able = guests.sessions[index].trouble.is_none();
            if able {
                *place(clocks) = guests.measure(index)?;
            }
        }
        Ok(())
    }

    fn start(&mut self, files: &[MachineFile], signals: &Signals) -> Result<(), RecordError> {
        let marker = files::marker(self.plan, "start");
        self.host.attach(&files[0].writer, self.plan.rt)?;
        self.since = HostTsc(tsc::read());
        self.host.start(&marker)?;
        instances::start(&mut self.instances, &marker)?;
        if let Some(guests) = &mut self.guests {
            guests.ask_all(Phase::Ready, &ToAgent::Start { marker })?;
            guests.wait(Phase::Running, Some(signals))?;
        }
        self.refuse_trouble()?;
        self.mark_around("common")
    }

    /// Writes a marker in every guest between two on the host: their order in the merged files can be checked.
    fn mark_around(&mut self, word: &str) -> Result<(), RecordError> {
        let Some(guests) = &mut self.guests else { return Ok(()) };
        self.host.mark(&files::marker(self.plan, &format!("{word} before guests")));
        guests.mark(files::marker(self.plan, word))?;
        self.host.mark(&files::marker(self.plan, &format!("{word} after guests")));
        Ok(())
    }

    /// Runs the command, or waits for Ctrl-C, the time-out, or the end of all guests.
    fn run_command(
        &mut self,
        mut command: Command,
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
                // A Ctrl-C that reached the command and us is one, not a second.
                signals.take_stop();
                return Ok(status);
            }
            let over = ends.is_some_and(|ends| ends <= Instant::now()) || self.guest_commands_ended();
            if signals.take_stop() > 0 || over || self.ended.is_some() || !self.records_anything() {
                command.stop(signals)?;
                return Ok(None);
            }
            if tick <= Instant::now() {
                tick += TICK;
                self.surviving(|recording| recording.on_tick(begun, files, tell))?;
            }
        }
    }

    /// Without a command of the host, the recording ends with those of the guests.
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

    /// A host that records events goes on alone; one that is there only for its guests ends with the last of them.
    fn records_anything(&self) -> bool {
        let guests = self.guests.iter().flat_map(|guests| &guests.sessions);
        self.plan.host_records() || guests.into_iter().any(|session| session.phase() == Phase::Running)
    }

    fn wait_event(&mut self, signals: &Signals, wait: Duration) -> Result<(), RecordError> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut waited = vec![signals.stop(), signals.child()];
        waited.extend(self.watch.as_ref().map(AsFd::as_fd));
        let live = self.guests.as_mut().filter(|guests| guests.is_live());
        waited.extend(live.as_ref().map(|guests| guests.link().as_fd()));
        let mut polled: Vec<PollFd> = waited.into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        let timeout = PollTimeout::try_from(wait + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut polled, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(RecordError::System { call: "poll", source: errno.into() }),
        }
        drop(polled);
        live.map_or(Ok(()), Guests::take_all)?;
        self.with_watch(Watch::collect);
        Ok(())
    }

    fn on_tick(&mut self, begun: Instant, made: &mut [MachineFile], tell: Tell<'_>) -> Result<(), RecordError> {
        self.with_watch(|watch| {
            watch.stamp();
            Ok(())
        });
        let machines = self.ledgers();
        let state = |(at, Counted { ledgers, page_bytes, .. }): (usize, &Counted)| {
            let state = file_state(ledgers, *page_bytes);
            // What is not written of the host's pages, no file took.
            let refused = at <= self.instances.len() && ledgers.iter().any(|lane| lane.pages_refused > 0);
            FileState { failed: state.failed || refused, ..state }
        };
        let states: Vec<FileState> = machines.iter().enumerate().map(state).collect();
        self.ended = self.limit.tick(&states);
        self.stop_full_guests()?;
        if self.plan.newest_bytes.is_some() {
            // Gives the room of older pages back.
            let (host, guests) = made.split_first_mut().expect("the host has a file");
            let files = std::iter::once(host).chain(instances::files(&mut self.instances)).chain(guests);
            files.zip(&machines).for_each(|(file, machine)| {
                file.drop_older(&files::filled(&machine.ledgers, machine.page_bytes));
            });
        }
        if let Some(guests) = &mut self.guests {
            guests.ask_ledgers()?;
        }
        let machines = self.meter.tick(&machines);
        tell(&News::Progress(Progress { elapsed: begun.elapsed(), machines }));
        Ok(())
    }

    /// Guests that have had their share are stopped in order; the others go on.
    fn stop_full_guests(&mut self) -> Result<(), RecordError> {
        let Some(guests) = &mut self.guests else { return Ok(()) };
        for index in self.limit.full_guests(guests.sessions.len()) {
            let requests = guests.sessions[index].stop_at_bound();
            guests.send(requests)?;
        }
        Ok(())
    }

    /// Of the host, its instances and the guests.
    fn ledgers(&self) -> Vec<Counted> {
        let counted = |name, ledgers, page_bytes| Counted { name, ledgers, page_bytes, silent_s: 0 };
        let host = counted("host".into(), self.host.recorder.ledger(), self.host.armed.page_bytes);
        let instances = self.instances.iter();
        let instances = instances.map(|one| counted(one.title(), one.ledger(), one.host.armed.page_bytes));
        let now = Instant::now();
        let guests = self.sessions().map(|session| Counted {
            silent_s: session.silence.lasts(now).as_secs(),
            ..counted(session.name.clone(), session.ledgers_in_use(), session.page_bytes())
        });
        std::iter::once(host).chain(instances).chain(guests).collect()
    }

    fn stop_guests(&mut self) -> Result<(), RecordError> {
        let Some(guests) = &mut self.guests else { return Ok(()) };
        Ok(guests.step_all(GuestSession::stop)?)
    }

    /// Waits until the guests have stopped, or until every page is in a file or counted as lost; asked to stop once more,
    /// it keeps what is there.
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

    /// Does `part`. A server that goes away ends the guests' parts, not the recording.
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

fn let_go(guests: &mut Guests) -> Result<(), GuestsError> {
    guests.step_all(GuestSession::close)?;
    guests.wait(Phase::Closed, None)
}

/// How far a machine's file is.
fn file_state(ledgers: &[LaneLedger], page_bytes: u32) -> FileState {
    let pages = ledgers.iter().map(|lane| lane.pages_out).fold(0, u64::saturating_add);
    let failed = ledgers.iter().any(|lane| lane.write_errno != 0);
    FileState { bytes: pages.saturating_mul(u64::from(page_bytes)), failed }
}
