//! One guest's part of a session: a state machine without I/O.
//!
//! In:    the server's messages about this guest ([`GuestSession::on`]), requests of record ([`GuestSession::stop`] …)
//! Out:   messages to the server
//! Trust: the server; the agent's answers in any order and with any content
//!
//! ```text
//! Claiming ─► Arming ─► Armed ─► Ready ─► Running ─► Stopping ─► Draining ─► Drained ─► Closing ─► Closed
//!     │          │        │        │         └──── agent gone ────────►│                   ▲
//!     └──────────┴────────┴────────┴───────────── trouble ────────────────────────────────┘
//! ```

use std::{collections::BTreeSet, time::Instant};

use vtrace_common::{
    ids::Cpu,
    ledger::Ledger,
    limits::{CHANGES_MAX, CPUS_MAX, PAGE_BYTES_MAX, PAGE_BYTES_MIN},
    time::GuestTsc,
    wire::{
        agent::{Arm, Armed, Failure, FromAgent, LaneReport, SettingChange, ToAgent},
        client::{Area, Claimed, FromServer, Gone, LaneLedger, LaneSent, Lanes, Refusal, ToServer},
    },
};

use super::{command_output::CommandOutputs, refusal::reason, silence::Silence};
use crate::{
    clock::sync::Round,
    ftrace::metadata::{Metadata, MetadataFault},
    printable::printable,
    server::link::LinkError,
};

/// How long the server waits for pages that an agent has sent and that have not arrived, ms.
const WAIT_MS_MAX: u32 = 5000;
/// Remarks of one agent.
const REMARKS_MAX: usize = 16;

/// The phase of a guest's session, in order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Phase {
    /// `Claim` is sent.
    Claiming,
    /// The agent arms and describes its machine.
    Arming,
    /// The agent is armed; its file can be created.
    Armed,
    /// The server has the lanes' areas.
    Ready,
    /// Tracing is on.
    Running,
    /// The agent moves the pages that are left in its ring buffers.
    Stopping,
    /// The server writes the pages that are in transit.
    Draining,
    /// Every page is in the file or counted as lost.
    Drained,
    /// The agent removes its instance, the server frees the guest.
    Closing,
    /// The session has ended.
    Closed,
}

/// Why a guest's part of a recording failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Trouble {
    /// The server refused a request.
    #[error("the server refused: {}", reason(.0))]
    Refused(Refusal),
    /// The agent reported a failure.
    #[error("{}: {}", .0.object, .0.detail)]
    Failed(Failure),
    /// The agent or the virtual machine went away.
    #[error("{}", match .0 { Gone::Agent => "its agent went away", Gone::Device => "its virtual machine went away" })]
    Gone(Gone),
    /// The link to the server was lost, with the ledgers since the last reading.
    #[error("the server went away")]
    Server,
    /// The server stopped answering. It may continue later.
    #[error("the server (pid {pid}) has not answered for {seconds} s: it is stopped or hangs")]
    ServerStalled {
        /// The server's process.
        pid: u32,
        /// Time without an answer.
        seconds: u64,
    },
    /// The guest's description is invalid.
    #[error("its description was refused: {0}")]
    Metadata(#[from] MetadataFault),
    /// An answer that does not belong to this phase.
    #[error("its agent sent {answer} in phase {phase:?}")]
    OutOfOrder {
        /// The phase.
        phase: Phase,
        /// The answer's variant.
        answer: String,
    },
    /// No answer in time.
    #[error("no answer for {seconds} s in phase {phase:?}")]
    Silent {
        /// The phase.
        phase: Phase,
        /// Time without an answer.
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
    /// The guest's VMM and machine, once claimed.
    pub claimed: Option<Claimed>,
    /// The guest's description: formats, symbols, command lines.
    pub metadata: Metadata,
    /// Lanes, page size, clock, once armed.
    pub armed: Option<Armed>,
    /// The guest's TSC before and after tracing was switched on.
    pub started: Option<(GuestTsc, GuestTsc)>,
    marks_due: u32,
    /// The answer to the last probe, with the server's timestamps.
    pub echo: Option<(u32, Round)>,
    /// The agent's ledger of each lane.
    pub reports: Vec<LaneReport>,
    /// The agent's ledger of CPUs that came online after the start and have no lane.
    pub late: Vec<LaneReport>,
    /// Events that its ring buffers have lost so far, by CPU.
    events_lost: Vec<(Cpu, u64)>,
    /// Settings of its buffer that were changed while it recorded.
    pub changes: Vec<SettingChange>,
    /// Remarks of the agent for the closing table.
    pub remarks: Vec<String>,
    /// Why the agent refused the last probe.
    pub probe_refused: Option<Failure>,
    probing: bool,
    /// The server's ledger of each lane.
    pub ledgers: Vec<LaneLedger>,
    finished: bool,
    /// It was stopped at its `--max-guest-bytes`.
    pub is_full: bool,
    /// Output and exit status of its commands.
    pub outputs: CommandOutputs,
    /// The first failure.
    pub trouble: Option<Trouble>,
    /// Times for which its agent owed an answer.
    pub silence: Silence,
}

impl GuestSession {
    /// A new session, and its first request: the claim.
    pub fn new(name: &str, arm: Arm) -> (Self, ToServer) {
        let session = Self {
            name: name.into(),
            outputs: CommandOutputs::new(&arm.commands),
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
            events_lost: Vec::new(),
            changes: Vec::new(),
            remarks: Vec::new(),
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

    /// The current phase.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The size of each of its CPUs' buffers that was asked for, KiB; 0 for the kernel's default.
    pub(crate) fn buffer_kb(&self) -> u32 {
        self.arm.buffer_kb
    }

    /// Lanes, page size and clock of a guest that has a file.
    pub(crate) fn armed(&self) -> &Armed {
        self.armed.as_ref().expect("every guest is armed before its file is made")
    }

    /// Whether the server has sent the final ledger.
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// Records that a marker was requested, if the guest is running.
    pub fn mark_asked(&mut self) {
        self.marks_due += u32::from(self.phase == Phase::Running);
    }

    /// Whether the answer to a marker request is outstanding.
    pub fn owes_mark(&self) -> bool {
        self.phase == Phase::Running && self.marks_due > 0
    }

    /// A request for the TSC of a CPU. Until [`GuestSession::probed`], a failure is counted as this probe's.
    pub fn probe(&mut self, id: u32, cpu: Cpu) -> ToServer {
        (self.probing, self.probe_refused) = (true, None);
        self.ask(ToAgent::Probe { id, cpu })
    }

    /// The probe was answered or timed out.
    pub fn probed(&mut self) {
        self.probing = false;
    }

    /// A request for this guest's agent.
    pub fn ask(&self, request: ToAgent) -> ToServer {
        ToServer::Agent { guest: self.name.clone(), request }
    }

    /// The request that gives the server the lanes' areas; the file's descriptor is sent with it.
    pub fn lanes(&self, areas: &[Area]) -> Option<ToServer> {
        let page_bytes = self.armed.as_ref()?.page_bytes;
        let (guest, areas) = (self.name.clone(), areas.to_vec());
        Some(ToServer::Lanes(Lanes { guest, page_bytes, areas }))
    }

    /// Takes a message of the server about this guest. The messages to send back.
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
            // Answers to requests that a failure has made void.
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
            (Phase::Running | Phase::Stopping, FromAgent::EventsLost { lanes }) => {
                self.events_lost = lanes;
                vec![]
            }
            (Phase::Stopping, FromAgent::Changed(change)) => {
                if self.changes.len() < CHANGES_MAX {
                    self.changes.push(shown_change(&change));
                }
                vec![]
            }
            (Phase::Stopping, FromAgent::Remark { text }) => {
                if self.remarks.len() < REMARKS_MAX {
                    self.remarks.push(printable(&text));
                }
                vec![]
            }
            (Phase::Stopping, FromAgent::Stopped) => self.drain(self.sent(), WAIT_MS_MAX),
            // The probed CPU went offline: its earlier measurement stays.
            (_, FromAgent::Failed(failure)) if self.probing => {
                self.probe_refused = Some(shown_failure(failure));
                vec![]
            }
            (_, FromAgent::Failed(failure)) => self.fail(Trouble::Failed(shown_failure(failure))),
            (_, FromAgent::Pong { .. } | FromAgent::Machine(_) | FromAgent::Closed) => vec![],
            // Sent by the agent before it learned that the session has ended.
            (Phase::Draining | Phase::Drained | Phase::Closing | Phase::Closed, _) => vec![],
            (phase, answer) => {
                let answer = format!("{answer:?}").split(['(', ' ']).next().unwrap_or_default().to_owned();
                self.fail(Trouble::OutOfOrder { phase, answer })
            }
        }
    }

    /// Stops tracing and lets the agent move the rest.
    pub fn stop(&mut self) -> Vec<ToServer> {
        match self.phase {
            Phase::Running => {
                self.phase = Phase::Stopping;
                vec![self.ask(ToAgent::Stop)]
            }
            _ => vec![],
        }
    }

    /// Stops this guest before the others, at its `--max-guest-bytes`.
    pub fn stop_at_bound(&mut self) -> Vec<ToServer> {
        if self.phase == Phase::Running {
            log::warn!("{}: stopped at its size limit (--max-guest-bytes)", self.name);
            self.is_full = true;
        }
        self.stop()
    }

    /// A ping was sent at `now`: a running agent owes an answer.
    pub fn pinged(&mut self, now: Instant) {
        if matches!(self.phase, Phase::Running | Phase::Stopping) {
            self.silence.asked(now);
        }
    }

    /// A message arrived. An answer of the agent, or the end of the session, ends its silence.
    pub fn received(&mut self, is_agents: bool, now: Instant) {
        if is_agents || self.phase > Phase::Stopping {
            self.silence.ends(now);
        }
    }

    /// Whether no command of this guest runs any more.
    pub fn commands_are_over(&self) -> bool {
        self.outputs.all_ended() || self.phase > Phase::Running
    }

    /// Ends the recording at once: keeps the pages that have arrived, does not wait for the agent.
    pub fn abandon(&mut self) -> Vec<ToServer> {
        match self.phase {
            Phase::Running | Phase::Stopping => self.drain(vec![], 0),
            Phase::Draining | Phase::Drained | Phase::Closing | Phase::Closed => vec![],
            _ => self.close(),
        }
    }

    /// Releases the guest.
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

    /// The agent has not answered for `seconds`.
    pub fn silent(&mut self, seconds: u64) -> Vec<ToServer> {
        self.fail(Trouble::Silent { phase: self.phase, seconds })
    }

    /// The link to the server is lost.
    pub fn server_gone(&mut self, error: &LinkError) {
        self.trouble.get_or_insert(match error {
            LinkError::Stalled { pid, waited } => Trouble::ServerStalled { pid: *pid, seconds: waited.as_secs() },
            _ => Trouble::Server,
        });
        // Without the server, the agent's silence is not known.
        self.silence.forget();
        self.phase = Phase::Closed;
    }

    /// Whether the server may still write pages to this guest's file: it has neither finished nor closed the link.
    pub fn may_be_written(&self) -> bool {
        !self.is_finished() && self.trouble != Some(Trouble::Server)
    }

    fn fail(&mut self, trouble: Trouble) -> Vec<ToServer> {
        let is_unanswered = matches!(trouble, Trouble::Silent { .. } | Trouble::Refused(Refusal::State { .. }));
        // A part that was finished before the others' stays valid whatever happens to its machine.
        if !(self.is_full && self.phase >= Phase::Drained) {
            self.trouble.get_or_insert(trouble);
        }
        match (self.phase, is_unanswered) {
            (Phase::Draining, true) => self.step(Phase::Drained),
            // The server still answers `Finish` with the pages that it has written.
            (Phase::Draining, false) => vec![],
            (Phase::Closing, _) => self.step(Phase::Closed),
            _ => self.abandon(),
        }
    }

    fn drain(&mut self, sent: Vec<LaneSent>, wait_ms_max: u32) -> Vec<ToServer> {
        self.phase = Phase::Draining;
        vec![ToServer::Finish { guest: self.name.clone(), sent, wait_ms_max }]
    }

    fn sent(&self) -> Vec<LaneSent> {
        self.reports.iter().map(|report| LaneSent { cpu: report.cpu, bytes_out: report.ledger.bytes_out }).collect()
    }

    /// Whether the report of this lane is outstanding.
    fn is_due(&self, cpu: Cpu) -> bool {
        let is_armed = self.armed.as_ref().is_some_and(|armed| armed.lanes.contains(&cpu));
        is_armed && self.reports.iter().all(|report| report.cpu != cpu)
    }

    /// Its lanes without those of CPUs that were offline when it was armed and sent no page.
    pub fn lanes_in_use(&self) -> Vec<Cpu> {
        self.armed.as_ref().map(|armed| lanes_in_use(armed, &self.ledgers)).unwrap_or_default()
    }

    /// The server's ledgers of those lanes, with the events lost that the agent last reported.
    pub fn ledgers_in_use(&self) -> Vec<LaneLedger> {
        let lanes = self.lanes_in_use();
        let mut ledgers = Vec::new();
        for lane in self.ledgers.iter().filter(|lane| lanes.contains(&lane.cpu)) {
            let lost = self.events_lost.iter().find(|(cpu, _)| *cpu == lane.cpu).map_or(0, |(_, lost)| *lost);
            ledgers.push(LaneLedger { ledger: Ledger { events_lost: Some(lost), ..lane.ledger }, ..*lane });
        }
        ledgers
    }

    /// Whether a CPU came online after the start and is not yet reported.
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

/// The lanes of a machine without those of CPUs that were offline when it was armed and sent no page.
pub(crate) fn lanes_in_use(armed: &Armed, ledgers: &[LaneLedger]) -> Vec<Cpu> {
    let has_pages = |cpu: Cpu| ledgers.iter().any(|ledger| ledger.cpu == cpu && ledger.ledger.pages_in > 0);
    armed.lanes.iter().copied().filter(|cpu| !armed.spare.contains(cpu) || has_pages(*cpu)).collect()
}

/// Whether a file can be created for the lanes and pages that an agent announces.
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

fn shown_change(change: &SettingChange) -> SettingChange {
    let [setting, armed, found] = [&change.setting, &change.armed, &change.found].map(|text| printable(text));
    SettingChange { setting, armed, found }
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
