//! All guests of a session over one link to the server: sends what their state machines want, feeds them what comes.
//!
//! In:    messages of the server, signals of a person
//! Out:   requests; sessions that have reached a phase or have trouble
//! Runs:  on record's thread
//! Full:  a server that does not read blocks a send for at most the socket's timeout, one that does not answer is waited
//!        for for [`ANSWER_MAX`]; then the link is lost
//! Trust: the server; guests only through [`super::session`]

pub mod command_output;
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

use super::{
    plan::GuestPlan,
    session::{GuestSession, Phase},
};
use crate::{
    clock::sync::{Measurement, Round},
    server::link::{Link, LinkError},
    sys::signal::Signals,
};

/// A guest that says nothing of use for this long, where an answer is due, is given up.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// A server that does not say for this long how far it is, which takes it no time, is stopped.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// A guest that was told to stop may be silent for this long: it may be paused, or hang.
const STOP_SILENCE_MAX: Duration = Duration::from_secs(20);
/// A guest may take this long to move what was in its ring buffers when it was stopped.
const DRAIN_MAX: Duration = Duration::from_secs(300);
/// A marker is not waited for longer: the guest may be paused.
const MARK_MAX: Duration = Duration::from_secs(5);
/// Nor is the measurement of a guest's clock, at either end.
const MEASURE_MAX: Duration = Duration::from_secs(10);
/// How often agents hear from us: they give up a session whose host is silent for ten seconds.
const PING_EVERY: Duration = Duration::from_secs(1);
/// Messages taken before something else gets its turn.
const MESSAGES_MAX: usize = 256;
/// A probe that is not answered in this time is not waited for.
const ECHO_MAX: Duration = Duration::from_secs(2);
/// Round trips of one session's measurement, shared among its vCPUs.
const ROUNDS_WANTED: usize = 256;

/// Why the guests cannot go on together.
#[derive(Debug, thiserror::Error)]
pub enum GuestsError {
    /// The server is gone or was never there.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The server refused something that belongs to no guest.
    #[error("the server refused: {0:?}")]
    Refused(Refusal),
    /// Ctrl-C before the recording began.
    #[error("interrupted")]
    Interrupted,
}

/// The guests of a session.
#[derive(Debug)]
pub struct Guests {
    link: Link,
    /// In the order typed.
    pub sessions: Vec<GuestSession>,
    probes: u32,
    heard: Instant,
    pinged: Instant,
    /// Since when the server owes us a ledger.
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
            heard: Instant::now(),
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

    /// The link, to be polled.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Takes messages until every guest has reached `phase`; one that stays silent gets trouble and moves on.
    pub fn wait(&mut self, phase: Phase, signals: Option<&Signals>) -> Result<(), GuestsError> {
        let begun = Instant::now();
        self.heard = begun;
        let patience = if phase >= Phase::Draining { DRAIN_MAX } else { SILENCE_MAX };
        if phase == Phase::Draining {
            self.tell_who_is_silent();
        }
        while self.sessions.iter().any(|session| session.phase() < phase) {
            if signals.is_some_and(|signals| signals.take_stop() > 0) {
                return Err(GuestsError::Interrupted);
            }
            self.take(Duration::from_millis(200))?;
            self.give_up_silent(begun)?;
            if self.heard.elapsed() > patience {
                self.give_up_below(phase, patience)?;
            }
        }
        Ok(())
    }

    /// A person who wants to stop hears whom that waits for.
    fn tell_who_is_silent(&self) {
        let (now, seconds) = (Instant::now(), self.stop_silence_max.as_secs());
        let stopping = self.sessions.iter().filter(|session| session.phase() == Phase::Stopping);
        for session in stopping.filter(|session| session.silence.lasts(now) >= silence::SHOWN) {
            let silent = session.silence.lasts(now).as_secs();
            log::warn!(
                "{}: silent for {silent} s; waited for, {seconds} s at most: Ctrl-C once more keeps what came",
                session.name
            );
        }
    }

    /// Guests that were told to stop, at `begun` or before, and say nothing, not even that they are there.
    fn give_up_silent(&mut self, begun: Instant) -> Result<(), GuestsError> {
        let (now, most) = (Instant::now(), self.stop_silence_max);
        let stopping = self.sessions.iter_mut().filter(|session| session.phase() == Phase::Stopping);
        let silent = stopping.filter(|session| session.silence.lasts(now).min(now - begun) >= most);
        let requests = silent.flat_map(|session| {
            session.silence.ends(now);
            session.silent(most.as_secs())
        });
        let requests = requests.collect();
        self.send(requests)
    }

    /// Has every running guest write a marker, and waits until they have, but not for ever.
    pub fn mark(&mut self, text: String) -> Result<(), GuestsError> {
        self.ask_all(Phase::Running, &ToAgent::Mark { text })?;
        self.sessions.iter_mut().for_each(GuestSession::mark_asked);
        let asked = Instant::now();
        while self.sessions.iter().any(GuestSession::owes_mark) && asked.elapsed() < MARK_MAX {
            self.take(Duration::from_millis(200))?;
        }
        Ok(())
    }

    /// Whether anybody is left to hear from.
    pub fn is_live(&self) -> bool {
        self.sessions.iter().any(|session| session.phase() < Phase::Closed)
    }

    /// Takes what has come, up to a bound: a guest that floods must not hold up the rest.
    pub fn take_all(&mut self) -> Result<(), GuestsError> {
        for _ in 0..MESSAGES_MAX {
            if !self.take(Duration::ZERO)? {
                break;
            }
        }
        Ok(())
    }

    /// Takes one message if one comes within `wait`. True if one came.
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
            self.heard = Instant::now();
        }
        let is_agents = matches!(message, FromServer::Agent { .. } | FromServer::Echo { .. });
        let effects = session.on(message);
        session.heard(is_agents, Instant::now());
        self.send(effects)?;
        Ok(true)
    }

    /// Sends what a state machine wants to say.
    pub fn send(&mut self, requests: Vec<ToServer>) -> Result<(), GuestsError> {
        requests.iter().try_for_each(|request| self.link.send(request).map_err(Into::into))
    }

    /// Asks the agent of every guest in `phase`.
    pub fn ask_all(&mut self, phase: Phase, request: &ToAgent) -> Result<(), GuestsError> {
        let asked = self.sessions.iter().filter(|session| session.phase() == phase);
        let requests = asked.map(|session| session.ask(request.clone())).collect();
        self.send(requests)
    }

    /// Tells the server where the pages of guest `index` go: descriptors of one file, the second past the page cache.
    pub fn send_lanes(&mut self, index: usize, areas: &[Area], files: &[&File]) -> Result<(), GuestsError> {
        let Some(request) = self.sessions[index].lanes(areas) else { return Ok(()) };
        Ok(self.link.send_with_files(&request, files)?)
    }

    /// Applies one step of the state machine to every guest and sends what it wants.
    pub fn step_all(&mut self, step: fn(&mut GuestSession) -> Vec<ToServer>) -> Result<(), GuestsError> {
        let requests = self.sessions.iter_mut().flat_map(step).collect();
        self.send(requests)
    }

    /// Lets every agent of a session that is under way hear from us.
    fn ping(&mut self) -> Result<(), GuestsError> {
        // One that is done before the others is let go with them.
        let is_under_way = |phase| (Phase::Arming..=Phase::Drained).contains(&phase);
        let asked = self.sessions.iter_mut().filter(|session| is_under_way(session.phase()));
        let requests = asked.map(|session| {
            session.pinged(self.pinged);
            session.ask(ToAgent::Ping { id: self.probes })
        });
        let requests = requests.collect();
        self.send(requests)
    }

    /// Asks the server what has come so far.
    pub fn ask_ledgers(&mut self) -> Result<(), GuestsError> {
        let running = self.sessions.iter().filter(|session| session.phase() == Phase::Running);
        let requests: Vec<_> = running.map(|session| ToServer::Ledger { guest: session.name.clone() }).collect();
        if !requests.is_empty() {
            self.owed.get_or_insert_with(Instant::now);
        }
        self.send(requests)
    }

    /// A server that is stopped (SIGSTOP) has a socket that takes what is sent, for a long time.
    fn check_server(&self) -> Result<(), GuestsError> {
        let waited = self.owed.map_or(Duration::ZERO, |since| since.elapsed());
        if waited <= self.answer_max {
            return Ok(());
        }
        Err(LinkError::Stalled { pid: self.link.peer().pid, waited }.into())
    }

    /// Measures each vCPU's clock against the host's by round trips. A vCPU that does not answer is left out.
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
        self.heard = Instant::now();
        let silent = self.sessions.iter_mut().filter(|session| session.phase() < phase);
        let requests = silent.flat_map(|session| session.silent(patience.as_secs())).collect();
        self.send(requests)
    }
}

/// Whether a message brings a session on. An agent that only says that it is there is not waited for.
fn is_progress(message: &FromServer) -> bool {
    let FromServer::Agent { answer, .. } = message else { return !matches!(message, FromServer::Ledger { .. }) };
    !matches!(answer, FromAgent::Pong { .. } | FromAgent::Marked { .. } | FromAgent::Machine(_))
}

/// Whose message it is.
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
