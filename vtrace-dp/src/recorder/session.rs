//! One guest's part of a session: a state machine without I/O.
//!
//! In:    what the server says about this guest ([`GuestSession::on`]), what record wants ([`GuestSession::stop`] …)
//! Out:   what to say to the server
//! Trust: the server; the agent's answers in any order and with any content
//!
//! ```text
//! Claiming ─► Arming ─► Armed ─► Ready ─► Running ─► Stopping ─► Draining ─► Drained ─► Closing ─► Closed
//!     │          │        │        │         └──── agent gone ────────►│                   ▲
//!     └──────────┴────────┴────────┴───────────── trouble ────────────────────────────────┘
//! ```

use std::{collections::BTreeSet, time::Instant};

use nix::errno::Errno;
use vtrace_common::{
    ids::Cpu,
    limits::{CPUS_MAX, PAGE_BYTES_MAX, PAGE_BYTES_MIN},
    time::GuestTsc,
    wire::{
        agent::{Arm, Armed, Failure, FromAgent, LaneReport, ToAgent},
        client::{Area, Claimed, FromServer, Gone, GuestState, LaneEnd, LaneLedger, Lanes, Refusal, ToServer},
    },
};

use super::{
    guests::{command_output::Outputs, silence::Silence},
    summary::LaneSummary,
};
use crate::{
    clock::sync::Round,
    ftrace::metadata::{Metadata, MetadataFault},
    printable::printable,
    server::link::LinkError,
};

/// How long the server waits for pages that an agent has sent and that have not come out of the ring.
const WAIT_MS_MAX: u32 = 5000;

/// How far a guest has come.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Phase {
    /// Claim is sent.
    Claiming,
    /// The agent prepares and describes its machine.
    Arming,
    /// The agent is prepared; its file can be made.
    Armed,
    /// The server knows where pages go.
    Ready,
    /// Tracing is on.
    Running,
    /// The agent moves what is left.
    Stopping,
    /// The server writes what is on its way.
    Draining,
    /// Every page is in the file or counted as lost.
    Drained,
    /// The agent removes its instance, the server frees the guest.
    Closing,
    /// Over.
    Closed,
}

/// What went wrong with a guest.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Trouble {
    /// The server refused.
    #[error("the server refused: {}", reason(.0))]
    Refused(Refusal),
    /// The agent could not do what was asked.
    #[error("{}: {}", .0.object, .0.detail)]
    Failed(Failure),
    /// It went away.
    #[error("{}", match .0 { Gone::Agent => "its agent went away", Gone::Device => "its virtual machine went away" })]
    Gone(Gone),
    /// The server went away, and what it knew with it.
    #[error("the server went away")]
    Server,
    /// The server took no notice any more, and may go on one day.
    #[error("the server (pid {pid}) took no notice for {seconds} s: it is stopped, or hangs")]
    ServerStalled {
        /// Its process.
        pid: u32,
        /// How long that was waited for.
        seconds: u64,
    },
    /// Its description is not acceptable.
    #[error("its description was refused: {0}")]
    Metadata(#[from] MetadataFault),
    /// An answer nobody asked for.
    #[error("its agent said {answer} while it was {phase:?}")]
    OutOfOrder {
        /// When.
        phase: Phase,
        /// What, shortened.
        answer: String,
    },
    /// No answer.
    #[error("no answer for {seconds} s while it was {phase:?}")]
    Silent {
        /// When.
        phase: Phase,
        /// How long.
        seconds: u64,
    },
}

/// One guest's part of a session.
#[derive(Debug)]
pub struct GuestSession {
    /// Its name.
    pub name: String,
    arm: Arm,
    phase: Phase,
    /// VMM and machine, once claimed.
    pub claimed: Option<Claimed>,
    /// What it told about itself.
    pub metadata: Metadata,
    /// Lanes, page size, clock, once armed.
    pub armed: Option<Armed>,
    /// TSC around the switch, once running.
    pub started: Option<(GuestTsc, GuestTsc)>,
    marks_due: u32,
    /// The last probe's answer, stamped by the server.
    pub echo: Option<(u32, Round)>,
    /// What its lanes sent, as the agent counts.
    pub reports: Vec<LaneReport>,
    /// CPUs that came online later and have no lane, as the agent counts.
    pub late: Vec<LaneReport>,
    /// Why the last probe was not answered.
    pub probe_refused: Option<Failure>,
    probing: bool,
    /// What its lanes brought, as the server counts.
    pub ledgers: Vec<LaneLedger>,
    finished: bool,
    /// It was stopped because it had recorded as much as it may.
    pub is_full: bool,
    /// What its commands wrote, and how they ended.
    pub outputs: Outputs,
    /// The first thing that went wrong.
    pub trouble: Option<Trouble>,
    /// How long its agent has left us without an answer since it runs.
    pub silence: Silence,
}

impl GuestSession {
    /// A session that begins with a claim.
    pub fn new(name: &str, arm: Arm) -> (Self, ToServer) {
        let session = Self {
            name: name.into(),
            outputs: Outputs::new(&arm.commands),
            arm,
            phase: Phase::Claiming,
            claimed: None,
            metadata: Metadata::default(),
            armed: None,
            started: None,
            marks_due: 0,
            echo: None,
            reports: Vec::new(),
            late: Vec::new(),
            probe_refused: None,
            probing: false,
            ledgers: Vec::new(),
            finished: false,
            is_full: false,
            trouble: None,
            silence: Silence::default(),
        };
        (session, ToServer::Claim { guest: name.into() })
    }

    /// How far it has come.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Bytes of a page of its lanes; 0 until it is armed.
    pub fn page_bytes(&self) -> u32 {
        self.armed.as_ref().map_or(0, |armed| armed.page_bytes)
    }

    /// Whether the server has said what is in the file.
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// A marker was asked for, if the guest is running.
    pub fn mark_asked(&mut self) {
        self.marks_due += u32::from(self.phase == Phase::Running);
    }

    /// Whether a marker's answer is still to come.
    pub fn owes_mark(&self) -> bool {
        self.phase == Phase::Running && self.marks_due > 0
    }

    /// Asks for the TSC of a CPU; until [`GuestSession::probed`] a failure is this probe's.
    pub fn probe(&mut self, id: u32, cpu: Cpu) -> ToServer {
        (self.probing, self.probe_refused) = (true, None);
        self.ask(ToAgent::Probe { id, cpu })
    }

    /// The probe is answered, or not waited for any more.
    pub fn probed(&mut self) {
        self.probing = false;
    }

    /// A request for this guest's agent.
    pub fn ask(&self, request: ToAgent) -> ToServer {
        ToServer::Agent { guest: self.name.clone(), request }
    }

    /// Where its pages go. The file's descriptor has to travel with it.
    pub fn lanes(&self, areas: &[Area]) -> Option<ToServer> {
        let page_bytes = self.armed.as_ref()?.page_bytes;
        let (guest, areas) = (self.name.clone(), areas.to_vec());
        Some(ToServer::Lanes(Lanes { guest, page_bytes, areas }))
    }

    /// The server says this about the guest: what to answer.
    pub fn on(&mut self, message: FromServer) -> Vec<ToServer> {
        match message {
            FromServer::Claimed(claimed) if self.phase == Phase::Claiming => {
                self.claimed = Some(claimed);
                self.phase = Phase::Arming;
                vec![self.ask(ToAgent::Arm(Box::new(self.arm.clone())))]
            }
            FromServer::Agent { answer, .. } => self.on_agent(answer),
            FromServer::Echo { host_sent, echo, host_received, .. } => {
                let round = Round { host_sent, guest_received: echo.received, guest_sent: echo.sent, host_received };
                self.echo = Some((echo.id, round));
                vec![]
            }
            FromServer::LanesReady { .. } if self.phase == Phase::Armed => self.step(Phase::Ready),
            FromServer::Ledger { lanes, .. } => {
                self.ledgers = lanes;
                vec![]
            }
            FromServer::Finished { lanes, .. } if self.phase >= Phase::Draining => {
                (self.ledgers, self.finished) = (lanes, true);
                self.step(self.phase.max(Phase::Drained))
            }
            FromServer::Released { .. } => self.step(Phase::Closed),
            FromServer::Gone { what, .. } => self.fail(Trouble::Gone(what)),
            FromServer::Refused(refusal) => self.fail(Trouble::Refused(refusal)),
            // Answers to a request that has been overtaken by trouble.
            FromServer::Guests(_)
            | FromServer::Claimed(_)
            | FromServer::LanesReady { .. }
            | FromServer::Finished { .. } => vec![],
        }
    }

    fn on_agent(&mut self, answer: FromAgent) -> Vec<ToServer> {
        match (self.phase, answer) {
            (Phase::Arming | Phase::Stopping, FromAgent::Describe(piece)) => match self.metadata.add(piece) {
                Ok(()) => vec![],
                Err(fault) => self.fail(fault.into()),
            },
            (Phase::Arming, FromAgent::Arming { events }) => {
                log::info!("{}: {events} events are on, more follow", self.name);
                vec![]
            }
            (Phase::Arming, FromAgent::Armed(armed)) if is_possible(&armed) => {
                self.armed = Some(Armed { clock: printable(&armed.clock), ..armed });
                self.step(Phase::Armed)
            }
            (Phase::Ready, FromAgent::Started { before, after }) => {
                self.started = Some((before, after));
                self.step(Phase::Running)
            }
            (_, FromAgent::Marked { .. }) => {
                self.marks_due = self.marks_due.saturating_sub(1);
                vec![]
            }
            (Phase::Running | Phase::Stopping, FromAgent::Output(output)) => {
                self.outputs.take(&output);
                vec![]
            }
            (Phase::Running | Phase::Stopping, FromAgent::Exited { command, status, output_dropped_bytes }) => {
                self.outputs.end(command, status, output_dropped_bytes);
                vec![]
            }
            (Phase::Stopping, FromAgent::Lane(report)) if self.is_due(report.cpu) => {
                self.reports.push(shown_report(report));
                vec![]
            }
            (Phase::Stopping, FromAgent::Lane(report)) if self.is_late(report.cpu) => {
                self.late.push(shown_report(report));
                vec![]
            }
            (Phase::Stopping, FromAgent::Stopped) => self.drain(self.ends(), WAIT_MS_MAX),
            // A CPU that is offline by now: its clock stays as it was known.
            (_, FromAgent::Failed(failure)) if self.probing => {
                self.probe_refused = Some(shown_failure(failure));
                vec![]
            }
            (_, FromAgent::Failed(failure)) => self.fail(Trouble::Failed(shown_failure(failure))),
            (_, FromAgent::Pong { .. } | FromAgent::Machine(_) | FromAgent::Closed) => vec![],
            // What the agent had said before it heard that the session is over.
            (Phase::Draining | Phase::Drained | Phase::Closing | Phase::Closed, _) => vec![],
            (phase, answer) => {
                let answer = format!("{answer:?}").split(['(', ' ']).next().unwrap_or_default().to_owned();
                self.fail(Trouble::OutOfOrder { phase, answer })
            }
        }
    }

    /// Ends the recording in order.
    pub fn stop(&mut self) -> Vec<ToServer> {
        match self.phase {
            Phase::Running => {
                self.phase = Phase::Stopping;
                vec![self.ask(ToAgent::Stop)]
            }
            _ => vec![],
        }
    }

    /// Ends this guest's part in order, before the others': it has recorded as much as it may.
    pub fn stop_at_bound(&mut self) -> Vec<ToServer> {
        if self.phase == Phase::Running {
            log::warn!("{}: stopped: it has recorded as much as it may", self.name);
            self.is_full = true;
        }
        self.stop()
    }

    /// Its agent is asked whether it is there: from `now` on it owes an answer, if it records.
    pub fn pinged(&mut self, now: Instant) {
        if matches!(self.phase, Phase::Running | Phase::Stopping) {
            self.silence.asked(now);
        }
    }

    /// `message` has come: an agent that says something is there, and one that is gone or given up is not waited for.
    pub fn heard(&mut self, is_agents: bool, now: Instant) {
        if is_agents || self.phase > Phase::Stopping {
            self.silence.ends(now);
        }
    }

    /// Nothing more comes from its commands.
    pub fn commands_are_over(&self) -> bool {
        self.outputs.all_ended() || self.phase > Phase::Running
    }

    /// Ends the recording at once: what has come is kept, the agent is not waited for.
    pub fn abandon(&mut self) -> Vec<ToServer> {
        match self.phase {
            Phase::Running | Phase::Stopping => self.drain(vec![], 0),
            Phase::Draining | Phase::Drained | Phase::Closing | Phase::Closed => vec![],
            _ => self.close(),
        }
    }

    /// Lets go of the guest.
    pub fn close(&mut self) -> Vec<ToServer> {
        if self.phase >= Phase::Closing {
            return vec![];
        }
        let claimed = self.claimed.is_some();
        self.phase = if claimed { Phase::Closing } else { Phase::Closed };
        if !claimed {
            return vec![];
        }
        vec![self.ask(ToAgent::Close), ToServer::Release { guest: self.name.clone() }]
    }

    /// Nothing has been heard for `seconds`.
    pub fn silent(&mut self, seconds: u64) -> Vec<ToServer> {
        self.fail(Trouble::Silent { phase: self.phase, seconds })
    }

    /// The link to the server is lost: nobody is left to ask.
    pub fn server_gone(&mut self, error: &LinkError) {
        self.trouble.get_or_insert(match error {
            LinkError::Stalled { pid, waited } => Trouble::ServerStalled { pid: *pid, seconds: waited.as_secs() },
            _ => Trouble::Server,
        });
        // Who can say whether its agent was silent too?
        self.silence.forget();
        self.phase = Phase::Closed;
    }

    /// A server that has not said that it is done may still write pages to the file it was given, when it goes on.
    pub fn may_be_written(&self) -> bool {
        !self.is_finished() && self.trouble != Some(Trouble::Server)
    }

    fn fail(&mut self, trouble: Trouble) -> Vec<ToServer> {
        let is_unanswered = matches!(trouble, Trouble::Silent { .. } | Trouble::Refused(Refusal::State { .. }));
        // What is finished before the others' is not spoiled by what becomes of its machine.
        if !(self.is_full && self.phase >= Phase::Drained) {
            self.trouble.get_or_insert(trouble);
        }
        match (self.phase, is_unanswered) {
            (Phase::Draining, true) => self.step(Phase::Drained),
            // The server still answers `Finish`: what it has written must not be forgotten.
            (Phase::Draining, false) => vec![],
            (Phase::Closing, _) => self.step(Phase::Closed),
            _ => self.abandon(),
        }
    }

    fn drain(&mut self, ends: Vec<LaneEnd>, wait_ms_max: u32) -> Vec<ToServer> {
        self.phase = Phase::Draining;
        vec![ToServer::Finish { guest: self.name.clone(), ends, wait_ms_max }]
    }

    fn ends(&self) -> Vec<LaneEnd> {
        self.reports.iter().map(|report| LaneEnd { cpu: report.cpu, bytes_sent: report.bytes_sent }).collect()
    }

    /// Whether a lane's report is still to come.
    fn is_due(&self, cpu: Cpu) -> bool {
        let is_armed = self.armed.as_ref().is_some_and(|armed| armed.lanes.contains(&cpu));
        is_armed && self.reports.iter().all(|report| report.cpu != cpu)
    }

    /// Its lanes, but those of CPUs that were offline when it was armed and of which nothing has come.
    pub fn lanes_in_use(&self) -> Vec<Cpu> {
        self.armed.as_ref().map(|armed| in_use(armed, &self.ledgers)).unwrap_or_default()
    }

    /// What the server counts of those.
    pub fn ledgers_in_use(&self) -> Vec<LaneLedger> {
        let lanes = self.lanes_in_use();
        self.ledgers.iter().filter(|ledger| lanes.contains(&ledger.cpu)).copied().collect()
    }

    /// Whether a CPU came online after the start and was not heard of.
    fn is_late(&self, cpu: Cpu) -> bool {
        let is_armed = self.armed.as_ref().is_some_and(|armed| armed.lanes.contains(&cpu));
        let is_new = self.late.iter().all(|report| report.cpu != cpu);
        !is_armed && is_new && self.late.len() < CPUS_MAX && usize::try_from(cpu.0).is_ok_and(|cpu| cpu < CPUS_MAX)
    }

    fn step(&mut self, phase: Phase) -> Vec<ToServer> {
        self.phase = phase;
        vec![]
    }
}

/// The lanes of a machine, but those of CPUs that were offline when it was armed and of which nothing has come.
pub(crate) fn in_use(armed: &Armed, ledgers: &[LaneLedger]) -> Vec<Cpu> {
    let has_come = |cpu: Cpu| ledgers.iter().any(|ledger| ledger.cpu == cpu && ledger.pages_in > 0);
    armed.lanes.iter().copied().filter(|cpu| !armed.spare.contains(cpu) || has_come(*cpu)).collect()
}

/// What became of a guest's lanes, and what a reader has to know of it. Lanes of CPUs that did not come are left out.
pub(crate) fn guest_lanes(session: &GuestSession, ledgers: &[LaneLedger]) -> (Vec<LaneSummary>, Vec<String>) {
    let report = |cpu: Cpu| session.reports.iter().find(|report| report.cpu == cpu);
    let is_spare = |cpu: Cpu| session.armed.as_ref().is_some_and(|armed| armed.spare.contains(&cpu));
    let is_idle = |ledger: &LaneLedger| {
        let tapped = report(ledger.cpu).is_some_and(|report| report.pages_tapped > 0);
        is_spare(ledger.cpu) && ledger.pages_in == 0 && !tapped
    };
    let summed = ledgers.iter().filter(|ledger| !is_idle(ledger));
    let summed = summed.map(|ledger| LaneSummary::guest(report(ledger.cpu), ledger));
    let (mut lanes, balanced): (Vec<_>, Vec<_>) = summed.unzip();
    let mut remarks = Vec::new();
    // CPUs that came online and whose pages nobody took.
    let idle = ledgers.iter().filter(|ledger| is_idle(ledger)).filter_map(|ledger| report(ledger.cpu));
    for lane in idle.chain(&session.late).map(LaneSummary::late).filter(|lane| lane.events_lost > 0) {
        let LaneSummary { cpu, events_lost, .. } = lane;
        remarks.push(format!("{} came online after the start: its {events_lost} events are in no file", Cpu(cpu)));
        lanes.push(lane);
    }
    for ledger in ledgers.iter().filter(|ledger| ledger.write_errno != 0) {
        let (cpu, why) = (ledger.cpu, Errno::from_raw(ledger.write_errno).desc());
        remarks.push(format!("{cpu}: {} pages could not be written: {why}", ledger.pages_refused));
    }
    if session.reports.len() < ledgers.len() {
        remarks.push("its own page counts are missing: what was lost inside it is not known".into());
    }
    if balanced.contains(&false) {
        remarks.push("its agent's page counts do not fit what arrived".into());
    }
    (lanes, remarks)
}

/// Who holds a guest. Of another user's processes there is no pid, 0.
pub fn held_by(pid: u32, uid: u32) -> String {
    match pid {
        0 => format!("user {uid} is recording it"),
        pid => format!("process {pid} of user {uid} is recording it"),
    }
}

/// Who records a guest, if anybody does.
pub fn holder(guest: &GuestState) -> Option<String> {
    Some(held_by(guest.holder_pid?, guest.holder_uid.unwrap_or(0)))
}

/// A refusal in few words.
fn reason(refusal: &Refusal) -> String {
    match refusal {
        Refusal::NoSuchGuest { .. } => "it knows no guest of this name".into(),
        Refusal::NotConnected { socket, .. } => format!("no virtual machine is connected to {socket}"),
        Refusal::Driver { .. } => "no driver of the guest serves its device".into(),
        Refusal::NoAgent { .. } => "no agent runs in the guest".into(),
        Refusal::AgentVersion { hello, .. } => {
            format!("the agent is of another version ({})", printable(&hello.software))
        }
        Refusal::Held { holder_pid, holder_uid, .. } => held_by(*holder_pid, *holder_uid),
        Refusal::State { detail, .. } | Refusal::Request { detail } => detail.clone(),
        Refusal::Full => "it serves as many clients as it can".into(),
    }
}

/// Whether a file can be made for what an agent says it will send.
fn is_possible(armed: &Armed) -> bool {
    let bytes = usize::try_from(armed.page_bytes).unwrap_or(0);
    let page = (PAGE_BYTES_MIN..=PAGE_BYTES_MAX).contains(&bytes) && bytes.is_power_of_two();
    let lanes: BTreeSet<Cpu> = armed.lanes.iter().copied().collect();
    let spare: BTreeSet<Cpu> = armed.spare.iter().copied().collect();
    page && spare.is_subset(&lanes) && spare.len() < lanes.len() && lanes.len() == armed.lanes.len()
}

fn shown_failure(failure: Failure) -> Failure {
    let near = failure.near.iter().map(|name| printable(name)).collect();
    Failure { object: printable(&failure.object), detail: printable(&failure.detail), near, ..failure }
}

fn shown_report(report: LaneReport) -> LaneReport {
    let lines = |text: &str| text.lines().map(printable).collect::<Vec<_>>().join("\n");
    LaneReport {
        stats_before: lines(&report.stats_before),
        stats_after: lines(&report.stats_after),
        trouble: printable(&report.trouble),
        ..report
    }
}

#[cfg(test)]
mod tests;
