//! All guests of a recording over one link to the server: carries messages between the server and the sessions' state
//! machines.
//!
//! In:    messages of the server, stop signals
//! Out:   requests; sessions that have reached a phase or failed
//! Runs:  on record's thread
//! Full:  a server that does not read blocks a send for at most the socket's timeout; one that does not answer for
//!        [`ANSWER_MAX`] counts as lost
//! Trust: the server; guests only through [`session`]

pub mod command_output;
pub(crate) mod lanes;
pub mod refusal;
pub mod session;
pub mod silence;

use std::{
    fs::File,
    path::Path,
    time::{Duration, Instant},
};

use vtrace_common::{
    ids::Cpu,
    limits::CLOCK_ROUNDS_MAX,
    wire::{
        agent::{FromAgent, ToAgent},
        client::{Area, FromServer, Refusal, ToServer},
    },
};

use self::session::{GuestSession, Phase};
use super::plan::GuestPlan;
use crate::{
    clock::sync::{Measurement, Round},
    server::link::{Link, LinkError},
    sys::signal::Signals,
};

/// A guest that makes no progress for this long, where an answer is due, has failed.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// A server that owes a ledger for this long is stopped or hangs.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// After a stop request, a guest may be silent for this long: it may be paused.
const STOP_SILENCE_MAX: Duration = Duration::from_secs(20);
/// A stopped guest may take this long to move the pages left in its ring buffers.
const DRAIN_MAX: Duration = Duration::from_secs(300);
/// Longest wait for a marker: the guest may be paused.
const MARK_MAX: Duration = Duration::from_secs(5);
/// Longest measurement of a guest's clock, at either end.
const MEASURE_MAX: Duration = Duration::from_secs(10);
/// Interval of pings: agents end a session after ten seconds without a message from the host.
const PING_EVERY: Duration = Duration::from_secs(1);
/// Messages taken before signals and the watch are checked again.
const MESSAGES_MAX: usize = 256;
/// Longest wait for a probe's answer.
const ECHO_MAX: Duration = Duration::from_secs(2);
/// Round trips of one measurement, divided among the guest's vCPUs.
const ROUNDS_WANTED: usize = 256;

/// Why the link to the guests failed.
#[derive(Debug, thiserror::Error)]
pub enum GuestsError {
    /// The server does not run or went away.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The server refused a request that belongs to no guest.
    #[error("the server refused: {0:?}")]
    Refused(Refusal),
    /// A stop signal before the recording began.
    #[error("interrupted")]
    Interrupted,
}

/// The guests of a recording.
#[derive(Debug)]
pub struct Guests {
    link: Link,
    /// In the order typed.
    pub sessions: Vec<GuestSession>,
    probes: u32,
    progress_at: Instant,
    pinged: Instant,
    /// Since when the server has owed a ledger.
    owed: Option<Instant>,
    answer_max: Duration,
    stop_silence_max: Duration,
}

impl Guests {
    /// Connects to the server and claims every guest.
    pub fn claim(dir: &Path, plans: &[GuestPlan]) -> Result<Self, GuestsError> {
        let mut guests = Self {
            link: Link::connect(dir)?,
            sessions: Vec::new(),
            probes: 0,
            progress_at: Instant::now(),
            pinged: Instant::now(),
            owed: None,
            answer_max: ANSWER_MAX,
            stop_silence_max: STOP_SILENCE_MAX,
        };
        for plan in plans {
            let (session, claim) = GuestSession::new(&plan.name, plan.machine.arm.clone());
            guests.sessions.push(session);
            guests.link.send(&claim)?;
        }
        Ok(guests)
    }

    /// The link, to be polled for input.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Takes messages until every guest has reached `phase`. A guest that stays silent fails, which also ends the wait for it.
    pub fn wait(&mut self, phase: Phase, signals: Option<&Signals>) -> Result<(), GuestsError> {
        let begun = Instant::now();
        self.progress_at = begun;
        let patience = if phase >= Phase::Draining { DRAIN_MAX } else { SILENCE_MAX };
        if phase == Phase::Draining {
            self.warn_of_silent();
        }
        while self.sessions.iter().any(|session| session.phase() < phase) {
            if signals.is_some_and(|signals| signals.take_stop() > 0) {
                return Err(GuestsError::Interrupted);
            }
            self.take(Duration::from_millis(200))?;
            self.give_up_silent(begun)?;
            if self.progress_at.elapsed() > patience {
                self.give_up_below(phase, patience)?;
            }
        }
        Ok(())
    }

    /// Names the silent guests that a stop has to wait for.
    fn warn_of_silent(&self) {
        let (now, seconds) = (Instant::now(), self.stop_silence_max.as_secs());
        let stopping = self.sessions.iter().filter(|session| session.phase() == Phase::Stopping);
        for session in stopping.filter(|session| session.silence.lasts(now) >= silence::SHOWN) {
            let silent = session.silence.lasts(now).as_secs();
            log::warn!(
                "{}: silent for {silent} s; waiting for at most {seconds} s: a second Ctrl-C keeps the pages that have arrived",
                session.name
            );
        }
    }

    /// Fails guests that have not answered since the stop request (`begun` or before).
    fn give_up_silent(&mut self, begun: Instant) -> Result<(), GuestsError> {
        let (now, most) = (Instant::now(), self.stop_silence_max);
        let stopping = self.sessions.iter_mut().filter(|session| session.phase() == Phase::Stopping);
        let mut requests = Vec::new();
        for session in stopping.filter(|session| session.silence.lasts(now).min(now - begun) >= most) {
            session.silence.ends(now);
            requests.extend(session.silent(most.as_secs()));
        }
        self.send(requests)
    }

    /// Has every running guest write a marker, and waits for the answers, at most [`MARK_MAX`].
    pub fn mark(&mut self, text: String) -> Result<(), GuestsError> {
        self.ask_all(Phase::Running, &ToAgent::Mark { text })?;
        self.sessions.iter_mut().for_each(GuestSession::mark_asked);
        let asked = Instant::now();
        while self.sessions.iter().any(GuestSession::owes_mark) && asked.elapsed() < MARK_MAX {
            self.take(Duration::from_millis(200))?;
        }
        Ok(())
    }

    /// Whether any session has not ended.
    pub fn is_live(&self) -> bool {
        self.sessions.iter().any(|session| session.phase() < Phase::Closed)
    }

    /// Takes the messages that have arrived, at most [`MESSAGES_MAX`]: a guest cannot keep this thread busy.
    pub fn take_all(&mut self) -> Result<(), GuestsError> {
        for _ in 0..MESSAGES_MAX {
            if !self.take(Duration::ZERO)? {
                break;
            }
        }
        Ok(())
    }

    /// Takes one message if one arrives within `wait`. True if one did.
    pub fn take(&mut self, wait: Duration) -> Result<bool, GuestsError> {
        if self.pinged.elapsed() >= PING_EVERY {
            self.pinged = Instant::now();
            self.ping()?;
        }
        let Some(message) = self.link.receive(Some(wait))? else { return self.check_server().map(|()| false) };
        if matches!(message, FromServer::Ledger { .. }) {
            self.owed = None;
        }
        let Some(name) = guest_of(&message) else {
            return match message {
                FromServer::Refused(refusal) => Err(GuestsError::Refused(refusal)),
                _ => Ok(true),
            };
        };
        let Some(session) = self.sessions.iter_mut().find(|session| session.name == name) else { return Ok(true) };
        if is_progress(&message) {
            self.progress_at = Instant::now();
        }
        let is_agent = matches!(message, FromServer::Agent { .. } | FromServer::Echo { .. });
        let effects = session.on(message);
        session.received(is_agent, Instant::now());
        self.send(effects)?;
        Ok(true)
    }

    /// Sends the requests of a state machine.
    pub fn send(&mut self, requests: Vec<ToServer>) -> Result<(), GuestsError> {
        requests.iter().try_for_each(|request| self.link.send(request).map_err(Into::into))
    }

    /// Asks the agent of every guest in `phase`.
    pub fn ask_all(&mut self, phase: Phase, request: &ToAgent) -> Result<(), GuestsError> {
        let asked = self.sessions.iter().filter(|session| session.phase() == phase);
        let requests = asked.map(|session| session.ask(request.clone())).collect();
        self.send(requests)
    }

    /// Gives the server the areas and the file of guest `index`: one descriptor, and optionally a second with O_DIRECT.
    pub fn send_lanes(&mut self, index: usize, areas: &[Area], files: &[&File]) -> Result<(), GuestsError> {
        let Some(request) = self.sessions[index].lanes(areas) else { return Ok(()) };
        Ok(self.link.send_with_files(&request, files)?)
    }

    /// Applies one step of the state machine to every guest and sends the resulting requests.
    pub fn step_all(&mut self, step: fn(&mut GuestSession) -> Vec<ToServer>) -> Result<(), GuestsError> {
        let requests = self.sessions.iter_mut().flat_map(step).collect();
        self.send(requests)
    }

    /// Pings the agent of every active session.
    fn ping(&mut self) -> Result<(), GuestsError> {
        // A session that drained before the others stays active until all are released.
        let mut requests = Vec::new();
        for session in &mut self.sessions {
            if (Phase::Arming..=Phase::Drained).contains(&session.phase()) {
                session.pinged(self.pinged);
                requests.push(session.ask(ToAgent::Ping { id: self.probes }));
            }
        }
        self.send(requests)
    }

    /// Asks the server for the ledgers of all running guests.
    pub fn ask_ledgers(&mut self) -> Result<(), GuestsError> {
        let running = self.sessions.iter().filter(|session| session.phase() == Phase::Running);
        let requests: Vec<_> = running.map(|session| ToServer::Ledger { guest: session.name.clone() }).collect();
        if !requests.is_empty() {
            self.owed.get_or_insert_with(Instant::now);
        }
        self.send(requests)
    }

    /// Detects a stopped server (SIGSTOP): its socket still accepts messages.
    fn check_server(&self) -> Result<(), GuestsError> {
        let waited = self.owed.map_or(Duration::ZERO, |since| since.elapsed());
        if waited <= self.answer_max {
            return Ok(());
        }
        Err(LinkError::Stalled { pid: self.link.peer().pid, waited }.into())
    }

    /// Measures each vCPU's clock against the host's by round trips. vCPUs that do not answer are left out.
    pub fn measure(&mut self, index: usize) -> Result<Vec<Measurement>, GuestsError> {
        let cpus = self.sessions[index].lanes_in_use();
        let rounds = (ROUNDS_WANTED / cpus.len().max(1)).clamp(8, CLOCK_ROUNDS_MAX);
        let (mut measured, begun) = (Vec::new(), Instant::now());
        for cpu in cpus {
            let mut taken = Vec::with_capacity(rounds);
            for _ in 0..rounds {
                if begun.elapsed() > MEASURE_MAX {
                    break;
                }
                let Some(round) = self.probe(index, cpu)? else { break };
                taken.push(round);
            }
            measured.extend(Measurement::new(cpu, &taken));
        }
        Ok(measured)
    }

    fn probe(&mut self, index: usize, cpu: Cpu) -> Result<Option<Round>, GuestsError> {
        self.probes = self.probes.wrapping_add(1);
        let id = self.probes;
        let probe = self.sessions[index].probe(id, cpu);
        self.link.send(&probe)?;
        let answer = self.await_echo(index, id);
        self.sessions[index].probed();
        answer
    }

    fn await_echo(&mut self, index: usize, id: u32) -> Result<Option<Round>, GuestsError> {
        let asked = Instant::now();
        while asked.elapsed() < ECHO_MAX && self.sessions[index].trouble.is_none() {
            self.take(Duration::from_millis(100))?;
            if let Some((_, round)) = self.sessions[index].echo.take_if(|(answered, _)| *answered == id) {
                return Ok(Some(round));
            }
            if let Some(refused) = &self.sessions[index].probe_refused {
                log::debug!("{}: {}: {}", self.sessions[index].name, refused.object, refused.detail);
                break;
            }
        }
        Ok(None)
    }

    fn give_up_below(&mut self, phase: Phase, patience: Duration) -> Result<(), GuestsError> {
        self.progress_at = Instant::now();
        let silent = self.sessions.iter_mut().filter(|session| session.phase() < phase);
        let requests = silent.flat_map(|session| session.silent(patience.as_secs())).collect();
        self.send(requests)
    }
}

/// Whether a message is progress of its session: pongs and markers are not.
fn is_progress(message: &FromServer) -> bool {
    let FromServer::Agent { answer, .. } = message else { return !matches!(message, FromServer::Ledger { .. }) };
    !matches!(answer, FromAgent::Pong { .. } | FromAgent::Marked { .. } | FromAgent::Machine(_))
}

/// The guest that a message is about.
fn guest_of(message: &FromServer) -> Option<&str> {
    match message {
        FromServer::Claimed(claimed) => Some(&claimed.guest),
        FromServer::Agent { guest, .. }
        | FromServer::Echo { guest, .. }
        | FromServer::LanesReady { guest }
        | FromServer::Ledger { guest, .. }
        | FromServer::Finished { guest, .. }
        | FromServer::Released { guest }
        | FromServer::Gone { guest, .. } => Some(guest),
        FromServer::Refused(refusal) => match refusal {
            Refusal::NoSuchGuest { guest, .. }
            | Refusal::NotConnected { guest, .. }
            | Refusal::Driver { guest, .. }
            | Refusal::NoAgent { guest }
            | Refusal::AgentVersion { guest, .. }
            | Refusal::Held { guest, .. }
            | Refusal::State { guest, .. } => Some(guest),
            Refusal::Request { .. } | Refusal::Full => None,
        },
        FromServer::Guests(_) => None,
    }
}

#[cfg(test)]
mod tests;
