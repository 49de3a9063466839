//! The control loop: reads requests of the host, does what the session's state allows, answers.
//!
//! In:    frames on the control port; the end of the pump; the signal to quit
//! Out:   answers; [`ControlEnd`], why the loop has ended
//! Runs:  on the main thread; sleeps in epoll. Idle: no wake-ups. In a session: one per message of the host
//! Full:  one request at a time; later ones wait in the port
//! Trust: nothing: the host may ask anything; one that is silent for 10 s during a session counts as gone
//!
//! Each side sends its hello when it sees the other, without waiting. A host that closes the port and opens it again at
//! once cannot be noticed: a hello in any state ends the current session and is answered. A host with another wire version
//! receives our hello and refusals.

use std::{
    os::fd::{BorrowedFd, OwnedFd},
    path::PathBuf,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    unistd::Pid,
};
use vtrace_common::{
    ids::Cpu,
    time::GuestTsc,
    wire::{
        Family, Frame, Hello, VERSION,
        agent::{Arm, Echo, Failure, FailureKind, FromAgent, ToAgent},
    },
};

use super::{
    armed::{ArmedSession, Refused},
    command::{RunningCommand, STREAMS, Stream},
    cpu_placement::CpuPlacement,
    link::{HOST_SILENCE, HostGone, LAST_SILENCE, Link, LinkRead},
    machine,
    policy::Policy,
    port::SerialPorts,
    session::{Effect, SessionOutcome, SessionState},
};
use crate::{
    sys::{SysError, tsc, wait::take_events},
    tracefs::{Tracefs, online_cpus},
};

/// Why the loop has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ControlEnd {
    /// It was asked to quit.
    Asked,
    /// The control port is gone; another may come.
    Unplugged,
    /// `once` was set, and one session is over.
    Served,
}

/// Settings of the loop.
#[derive(Debug)]
pub(super) struct ControlOptions {
    /// A directory for copies of the pages.
    pub(super) tee: Option<PathBuf>,
    /// End after one session.
    pub(super) once: bool,
    /// Use ports that may lose pages (which are counted).
    pub(super) without_indirect: bool,
    /// The owner's rules.
    pub(super) policy: Policy,
    /// The agent's own CPUs.
    pub(super) place: CpuPlacement,
}

/// Which hellos were exchanged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum HelloState {
    /// No host has the port open.
    Absent,
    /// We have sent ours.
    Said,
    /// Both were sent, and the versions match.
    Met,
    /// Both were sent, and the versions do not match.
    Foreign,
}

const PORT: u64 = 0;
const QUIT: u64 = 1;
const PUMP: u64 = 2;
/// The first tag of the commands, which have one for each of [`STREAMS`].
const COMMANDS: u64 = 16;

/// The loop's state.
pub(super) struct Control<'a> {
    options: &'a ControlOptions,
    ports: &'a SerialPorts,
    quit: BorrowedFd<'a>,
    epoll: Epoll,
    link: Link,
    hello_state: HelloState,
    state: SessionState,
    work: Option<ArmedSession>,
    heard: Instant,
    /// When the host's silence was noticed.
    silent_since: Option<Instant>,
    served: bool,
    affinity: CpuSet,
    pinned: Option<Cpu>,
}

impl<'a> Control<'a> {
    /// A loop over an open, non-blocking control port that ends when `quit` becomes readable.
    pub(super) fn new(
        port: OwnedFd,
        ports: &'a SerialPorts,
        options: &'a ControlOptions,
        quit: BorrowedFd<'a>,
    ) -> Result<Self, SysError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(SysError::of("epoll_create1"))?;
        let link = Link::new(port);
        // A host that opens the port and sends nothing makes it writable, not readable.
        let edges = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
        epoll.add(&link, EpollEvent::new(edges, PORT)).map_err(SysError::of("epoll_ctl"))?;
        epoll.add(quit, EpollEvent::new(EpollFlags::EPOLLIN, QUIT)).map_err(SysError::of("epoll_ctl"))?;
        let affinity = sched_getaffinity(Pid::from_raw(0)).map_err(SysError::of("sched_getaffinity"))?;
        Ok(Self {
            options,
            ports,
            quit,
            epoll,
            link,
            hello_state: HelloState::Absent,
            state: SessionState::default(),
            work: None,
            heard: Instant::now(),
            silent_since: None,
            served: false,
            affinity,
            pinned: None,
        })
    }

    /// Serves hosts until there is a reason to end; then nothing is left in tracefs.
    pub(super) fn serve(mut self) -> Result<ControlEnd, SysError> {
        let end = self.run();
        self.remove();
        end
    }

    fn run(&mut self) -> Result<ControlEnd, SysError> {
        // If the host opened the port before us, there is no edge.
        let mut gone = self.read_requests().err();
        loop {
            match gone.take() {
                Some(HostGone::Asked) => return Ok(ControlEnd::Asked),
                Some(reason @ HostGone::Unplugged(_)) => {
                    log::warn!("{reason}");
                    return Ok(ControlEnd::Unplugged);
                }
                Some(HostGone::Absent) => gone = self.host_is_absent(),
                Some(reason @ (HostGone::Stalled | HostGone::Replaced)) => self.drop_session(reason),
                Some(HostGone::Silent) => gone = self.drop_silent_host(),
                None => {}
            }
            if self.options.once && self.served {
                return Ok(ControlEnd::Served);
            }
            gone = match gone {
                None => self.turn()?.err(),
                again => again,
            };
        }
    }

    /// Sleeps until there is an event, and acts on all of them.
    fn turn(&mut self) -> Result<Result<(), HostGone>, SysError> {
        let mut events = [EpollEvent::empty(); 8];
        let count = take_events(&self.epoll, &mut events, self.wait_max())?;
        let happened = |tag| events[..count].iter().any(|event| event.data() == tag);
        if happened(QUIT) {
            return Ok(Err(HostGone::Asked));
        }
        let mut result = Ok(());
        if happened(PORT) {
            result = self.read_requests();
        }
        for tag in events[..count].iter().filter_map(|event| event.data().checked_sub(COMMANDS)) {
            if result.is_ok() {
                result = self.pass_output(usize::try_from(tag).expect("few commands"));
            }
        }
        if result.is_ok() && happened(PUMP) {
            result = self.pump_has_ended();
        }
        if result.is_ok() && self.work.is_some() {
            result = self.check_silence();
        }
        Ok(result)
    }

    /// A machine that was stopped while its clock went on sees a silence that was none: the last part of it has to pass
    /// after it was noticed.
    fn check_silence(&mut self) -> Result<(), HostGone> {
        let first = HOST_SILENCE - LAST_SILENCE;
        match self.heard.elapsed() {
            silent if silent < first => {}
            _ if self.silent_since.is_none() => self.silent_since = Some(Instant::now()),
            _ if self.silent_since.is_some_and(|since| since.elapsed() >= LAST_SILENCE) => {
                return Err(HostGone::Silent);
            }
            _ => {}
        }
        Ok(())
    }

    fn wait_max(&self) -> EpollTimeout {
        if self.work.is_none() {
            return EpollTimeout::NONE;
        }
        let left = match self.silent_since {
            Some(since) => LAST_SILENCE.saturating_sub(since.elapsed()),
            None => (HOST_SILENCE - LAST_SILENCE).saturating_sub(self.heard.elapsed()),
        } + Duration::from_millis(1);
        EpollTimeout::try_from(left).expect("ten seconds are milliseconds")
    }

    /// Reads all requests that have arrived and carries them out.
    fn read_requests(&mut self) -> Result<(), HostGone> {
        loop {
            // Bytes may arrive before the event that the host has opened the port: an answer would be lost.
            if self.hello_state == HelloState::Absent && self.link.is_hung_up() {
                return Ok(());
            }
            let heard = self.link.hear()?;
            if self.hello_state == HelloState::Absent {
                self.hello_state = HelloState::Said;
                self.send_hello()?;
            }
            let LinkRead::Bytes(stamp) = heard else { return Ok(()) };
            self.take_frames(stamp)?;
            // Arming and reporting can take longer than a host may be silent.
            self.host_is_alive();
        }
    }

    fn host_is_alive(&mut self) {
        (self.heard, self.silent_since) = (Instant::now(), None);
    }

    fn take_frames(&mut self, stamp: GuestTsc) -> Result<(), HostGone> {
        loop {
            match self.link.next_frame() {
                Ok(Some(frame)) => self.take_frame(&frame, stamp)?,
                Ok(None) => return Ok(()),
                Err(fault) => {
                    log::warn!("the host sent a malformed frame: {fault}");
                    return Ok(());
                }
            }
        }
    }

    fn take_frame(&mut self, frame: &Frame, stamp: GuestTsc) -> Result<(), HostGone> {
        if frame.family == Family::Hello {
            return match frame.open::<Hello>() {
                Ok(hello) => self.take_hello(&hello),
                Err(fault) => self.refuse_frame(&fault.to_string()),
            };
        }
        match frame.open::<ToAgent>() {
            Ok(_) if self.hello_state == HelloState::Said => self.refuse_frame("a request before the hello"),
            Ok(_) if self.hello_state != HelloState::Met => {
                self.refuse_frame(&format!("this agent has wire version {VERSION} only"))
            }
            Ok(request) => self.request(request, stamp),
            Err(fault) => self.refuse_frame(&fault.to_string()),
        }
    }

    fn take_hello(&mut self, hello: &Hello) -> Result<(), HostGone> {
        self.drop_session(HostGone::Replaced);
        self.release();
        if self.hello_state != HelloState::Said {
            self.send_hello()?;
        }
        if !hello.speaks_ours() {
            self.hello_state = HelloState::Foreign;
            let (min, max) = (hello.version_min, hello.version_max);
            log::error!(
                "the host ({}) has wire versions {min} to {max}, this agent has {VERSION}: \
                 its requests are refused; copy the host's vtrace into this guest",
                hello.software
            );
            return Ok(());
        }
        self.hello_state = HelloState::Met;
        log::info!("the host is {}", hello.software);
        self.tell(&FromAgent::Machine(machine::describe(self.ports.lanes().cpus())))
    }

    fn request(&mut self, request: ToAgent, stamp: GuestTsc) -> Result<(), HostGone> {
        if !matches!(request, ToAgent::Probe { .. }) {
            self.unpin();
            // About once a second: a host pings.
            self.work.iter_mut().for_each(ArmedSession::look);
        }
        self.release();
        let done = match self.state.on(request) {
            Effect::Arm(arm) => self.arm(*arm),
            Effect::Start { marker } => self.start(&marker),
            Effect::Mark { text } => self.mark(&text),
            Effect::Echo { id, cpu } => self.echo(id, cpu, stamp),
            Effect::Pong { id } => self.pong(id).map_err(Refused::Gone),
            Effect::Offer => self.offer(),
            Effect::Drain => self.drain(),
            Effect::Close => self.close(),
            Effect::Refuse(failure) => Err(Refused::Failed(failure)),
        };
        match done {
            Ok(()) => Ok(()),
            Err(Refused::Gone(gone)) => Err(gone),
            Err(Refused::Failed(failure)) => {
                self.release();
                self.send_failure(failure)
            }
        }
    }

    /// Closes the ports of a session that is over. Only right after a message of the host.
    fn release(&self) {
        if self.work.is_none() {
            self.ports.release();
        }
    }

    fn arm(&mut self, arm: Arm) -> Result<(), Refused> {
        let ControlOptions { tee, without_indirect, policy, .. } = self.options;
        let cpus = online_cpus().map_or(1, |cpus| cpus.len());
        let arm = &policy.check(arm, &Tracefs::find_or_mount()?, cpus)?;
        let work =
            ArmedSession::arm(arm, self.ports, *without_indirect, tee.as_deref(), &|message| self.tell(message))?;
        let done = work.done().expect("it has just been started");
        let watched = self.epoll.add(done, EpollEvent::new(EpollFlags::EPOLLIN, PUMP));
        watched.map_err(unwatched)?;
        log::info!("session {:#x} is armed", arm.session);
        self.work = Some(work);
        self.state = self.state.after(SessionOutcome::Armed);
        Ok(())
    }

    fn start(&mut self, marker: &str) -> Result<(), Refused> {
        let work = self.work.as_mut().expect("SessionState::on allows this only while a session exists");
        let started = work.start(marker)?;
        self.state = self.state.after(SessionOutcome::Started);
        self.tell(&started)?;
        self.start_commands()
    }

    /// Starts the session's commands; the first that cannot be started is a failure.
    fn start_commands(&mut self) -> Result<(), Refused> {
        let Some(work) = &mut self.work else { return Ok(()) };
        let ControlOptions { place, policy, .. } = self.options;
        place.with_inherited_cpus(|| work.start_commands(policy.user))?;
        for (index, command) in work.commands.iter().enumerate() {
            for (place, stream) in STREAMS.into_iter().enumerate() {
                let Some(fd) = command.fd(stream) else { continue };
                let tag = COMMANDS + u64::try_from(STREAMS.len() * index + place).expect("few commands");
                let watched = self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, tag));
                watched.map_err(unwatched)?;
            }
        }
        Ok(())
    }

    /// Sends a piece of a command's output, or its exit status. An output leaves the epoll set when it is closed.
    fn pass_output(&mut self, tag: usize) -> Result<(), HostGone> {
        let stream = STREAMS[tag % STREAMS.len()];
        let commands = self.work.as_mut().map(|work| &mut work.commands);
        let Some(command) = commands.and_then(|commands| commands.get_mut(tag / STREAMS.len())) else { return Ok(()) };
        if stream != Stream::End {
            // One piece each time, so that requests of the host and other commands are not delayed.
            return command.read(stream).map_or(Ok(()), |piece| self.tell(&piece));
        }
        if let Some(end) = command.fd(Stream::End) {
            // It stays readable.
            self.epoll.delete(end).expect("it was added when it was started");
        }
        let told = command.end();
        told.iter().try_for_each(|message| self.tell(message))
    }

    fn mark(&mut self, text: &str) -> Result<(), Refused> {
        let marked = self.armed().mark(text)?;
        Ok(self.tell(&marked)?)
    }

    /// Answers a probe on its CPU. The thread stays there until another kind of request arrives: the next probe of a series
    /// needs no migration.
    fn echo(&mut self, id: u32, cpu: Cpu, stamp: GuestTsc) -> Result<(), Refused> {
        let received = if self.pinned == Some(cpu) {
            stamp
        } else {
            self.pin(cpu).map_err(|errno| Failure::new(FailureKind::Kernel, &cpu.to_string(), errno.desc()))?;
            GuestTsc(tsc::read())
        };
        Ok(self.tell(&FromAgent::Echo(Echo { id, cpu, received, sent: GuestTsc(tsc::read()) }))?)
    }

    fn offer(&self) -> Result<(), Refused> {
        let mut told = Ok(());
        Tracefs::find_or_mount()?.offer(&mut |piece| {
            if told.is_ok() {
                told = self.tell(&FromAgent::Offer(piece));
            }
        })?;
        Ok(told?)
    }

    fn drain(&mut self) -> Result<(), Refused> {
        let work = self.work.as_mut().expect("SessionState::on allows this only while a session exists");
        work.commands.iter().for_each(RunningCommand::stop);
        work.drain();
        self.state = self.state.after(SessionOutcome::Draining);
        match self.armed().done() {
            Some(_) => Ok(()), // the report follows when the pump has ended
            None => self.report(),
        }
    }

    fn close(&mut self) -> Result<(), Refused> {
        self.served |= self.work.is_some();
        // The host has just sent a message; removing an instance may take a second.
        self.work.iter_mut().for_each(ArmedSession::abandon);
        self.ports.release();
        self.remove();
        Ok(self.tell(&FromAgent::Closed)?)
    }

    fn report(&mut self) -> Result<(), Refused> {
        self.armed().report(&|message| self.tell(message))?;
        self.state = self.state.after(SessionOutcome::Reported);
        Ok(())
    }

    fn pump_has_ended(&mut self) -> Result<(), HostGone> {
        let Some(work) = &mut self.work else { return Ok(()) };
        if let Some(done) = work.done() {
            self.epoll.delete(done).expect("it was added when it was made");
        }
        work.pumped();
        if self.state != SessionState::Stopping {
            return Ok(()); // an error, which is logged; the report is sent at the stop
        }
        let reported = self.report();
        self.host_is_alive();
        match reported {
            Ok(()) => Ok(()),
            Err(Refused::Gone(gone)) => Err(gone),
            Err(Refused::Failed(failure)) => self.send_failure(failure),
        }
    }

    /// Answers a ping; while tracing is on, also with the events that were lost since.
    fn pong(&mut self, id: u32) -> Result<(), HostGone> {
        self.tell(&FromAgent::Pong { id })?;
        let running = self.work.as_mut().filter(|_| self.state == SessionState::Running);
        match running.and_then(ArmedSession::new_losses) {
            Some(losses) => self.tell(&losses),
            None => Ok(()),
        }
    }

    fn armed(&self) -> &ArmedSession {
        self.work.as_ref().expect("SessionState::on allows this only while a session exists")
    }

    /// During a session, waits a little for a host that has hung up: after a suspend the port is closed for a moment. A new
    /// host sends a hello.
    fn host_is_absent(&mut self) -> Option<HostGone> {
        if self.work.is_some() {
            match self.link.returns(self.quit) {
                Ok(true) => match self.read_requests() {
                    Err(HostGone::Absent) => {}
                    heard => return heard.err(),
                },
                Ok(false) => {}
                Err(gone) => return Some(gone),
            }
        }
        self.drop_session(HostGone::Absent);
        self.link.reset();
        self.hello_state = HelloState::Absent;
        None
    }

    fn drop_session(&mut self, reason: HostGone) {
        if self.work.is_some() {
            log::warn!("the session is dropped: {reason}");
            self.served = true;
        }
        self.remove();
    }

    /// Drops the session of a silent host, and sends the reason: if it is only slow, it must not wait for a report.
    fn drop_silent_host(&mut self) -> Option<HostGone> {
        self.drop_session(HostGone::Silent);
        let failure = Failure::new(FailureKind::State, "session", &HostGone::Silent.to_string());
        self.send_failure(failure).err()
    }

    fn remove(&mut self) {
        self.unpin();
        if let Some(work) = self.work.take() {
            work.remove();
        }
        self.state = self.state.after(SessionOutcome::Removed);
    }

    fn send_hello(&self) -> Result<(), HostGone> {
        self.link.send(&Hello::ours(concat!("vtrace agent ", env!("CARGO_PKG_VERSION"))), self.quit)
    }

    fn tell(&self, message: &FromAgent) -> Result<(), HostGone> {
        self.link.send(message, self.quit)
    }

    fn send_failure(&self, failure: Failure) -> Result<(), HostGone> {
        log::warn!("refused: {:?}: {}: {}", failure.kind, failure.object, failure.detail);
        self.tell(&FromAgent::Failed(failure))
    }

    fn refuse_frame(&self, detail: &str) -> Result<(), HostGone> {
        self.send_failure(Failure::new(FailureKind::State, "message", detail))
    }

    fn pin(&mut self, cpu: Cpu) -> Result<(), Errno> {
        let mut only = CpuSet::new();
        only.set(usize::try_from(cpu.0).map_err(|_| Errno::EINVAL)?)?;
        sched_setaffinity(Pid::from_raw(0), &only)?;
        self.pinned = Some(cpu);
        Ok(())
    }

    fn unpin(&mut self) {
        if self.pinned.take().is_some()
            && let Err(errno) = sched_setaffinity(Pid::from_raw(0), &self.affinity)
        {
            log::warn!("cannot restore the CPU affinity of the control thread: {errno}");
        }
    }
}

fn unwatched(errno: Errno) -> Failure {
    Failure::new(FailureKind::Kernel, "epoll_ctl", errno.desc())
}

#[cfg(test)]
mod tests;
