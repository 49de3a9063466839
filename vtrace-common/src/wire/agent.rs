//! Server (on behalf of record) ⇄ agent, over the control port.
//!
//! One session: `Arm` → `Describe`* `Armed`; `Start` → `Started`, then `Output`* `Exited` for each command; `Probe` →
//! `Echo`, `Offer` → `Offer`* and `Mark` → `Marked` at any time; `Stop` → `Lane`* `Describe`* `Stopped`; `Close` → `Closed`. `Failed` answers
//! any request; after a failed `Arm` the agent is idle again. `Close` is allowed in every state and always answered.

use alloc::{boxed::Box, string::String, vec::Vec};

use serde::{Deserialize, Serialize};

pub use super::arm::{Arm, CommandRequest, EventRequest, Tracer};
use super::{Family, Fault, Message, bounded, text};
use crate::{
    ids::Cpu,
    ledger::Ledger,
    limits::{COMMANDS_MAX, CPUS_MAX, LANES_MAX, NEAR_MAX, OUTPUT_BYTES_MAX, PIECE_BYTES_MAX},
    time::GuestTsc,
};

extern crate alloc;

/// Requests to an agent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ToAgent {
    /// Prepare a session: instance, clock, events, taps. Tracing stays off.
    Arm(Box<Arm>),
    /// Switch tracing on and write `marker` as the first event.
    Start {
        /// Text of the start marker.
        marker: String,
    },
    /// Read the TSC on `cpu` and answer at once. The server stamps both ends with the host's TSC.
    Probe {
        /// Comes back in the echo.
        id: u32,
        /// Where the answering thread has to run.
        cpu: Cpu,
    },
    /// Write `text` into the trace.
    Mark {
        /// Text of the marker.
        text: String,
    },
    /// Are you there?
    Ping {
        /// Comes back in the pong.
        id: u32,
    },
    /// Switch tracing off, move what is left, report.
    Stop,
    /// Remove the instance and forget the session.
    Close,
    /// What could be traced there? Answered at any time.
    Offer,
}

/// Answers of an agent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum FromAgent {
    /// Follows the hello: the machine the agent runs on.
    Machine(Machine),
    /// A piece of what a trace.dat needs.
    Describe(Piece),
    /// The session is ready to start.
    Armed(Armed),
    /// Tracing is on.
    Started {
        /// TSC right before tracing was switched on.
        before: GuestTsc,
        /// TSC right after the start marker was written.
        after: GuestTsc,
    },
    /// Answer to a probe.
    Echo(Echo),
    /// Answer to a mark.
    Marked {
        /// TSC right before the write.
        before: GuestTsc,
        /// TSC right after it.
        after: GuestTsc,
    },
    /// Answer to a ping.
    Pong {
        /// The ping's.
        id: u32,
    },
    /// A command of the session has written this.
    Output(Output),
    /// A command of the session has ended.
    Exited {
        /// Its place among the session's commands.
        command: u32,
        /// Its exit code, or 128 + signal as a shell gives it.
        status: u8,
        /// What it wrote beyond [`OUTPUT_TOTAL_BYTES_MAX`](crate::limits::OUTPUT_TOTAL_BYTES_MAX).
        output_dropped_bytes: u64,
    },
    /// One lane's end.
    Lane(LaneReport),
    /// All lanes are reported and all pages are in the ports.
    Stopped,
    /// The instance is gone.
    Closed,
    /// A request could not be met.
    Failed(Failure),
    /// A piece of what could be traced. [`Offered::Events`] come last.
    Offer(OfferPiece),
    /// The session is being made ready, which can take a slow machine minutes; said about once a second.
    Arming {
        /// So many events are on.
        events: u32,
    },
    /// Events that ring buffers have lost since the start, of CPUs that lost any. Follows a pong when it has grown.
    EventsLost {
        /// Each CPU once.
        lanes: Vec<(Cpu, u64)>,
    },
    /// A setting of the buffer was changed while it was recorded. Sent before `Stopped`.
    Changed(SettingChange),
    /// A line of the closing table about this machine. Sent before `Stopped`.
    Remark {
        /// One line.
        text: String,
    },
}

/// What a machine offers. Each kind's text is the file of that name in tracefs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum Offered {
    /// trace_clock
    Clocks,
    /// available_tracers
    Tracers,
    /// available_events
    Events,
}

/// Up to [`PIECE_BYTES_MAX`] of one text.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct OfferPiece {
    /// Of which.
    pub offered: Offered,
    /// The bytes.
    pub bytes: Vec<u8>,
    /// The text ends here.
    pub last: bool,
}

/// Where an agent runs.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Machine {
    /// `uname`: "Linux node release machine".
    pub uname: String,
    /// /proc/sys/kernel/random/boot_id.
    pub boot_id: String,
    /// CPUs that are online.
    pub cpus: Vec<Cpu>,
    /// CPUs that have a data port.
    pub lanes: Vec<Cpu>,
    /// The APIC id that each online CPU was given at its start: KVM's `vcpu_id`. Empty where there are none.
    pub apics: Vec<(Cpu, u32)>,
}

/// What a piece belongs to. Each kind's text is the file of that name in tracefs or procfs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Part {
    /// events/header_page
    HeaderPage,
    /// events/header_event
    HeaderEvent,
    /// events/ftrace/NAME/format
    FtraceFormat,
    /// events/SYSTEM/NAME/format; the piece's name is the system
    EventFormat,
    /// printk_formats
    PrintkFormats,
    /// /proc/kallsyms
    Kallsyms,
    /// saved_cmdlines, completed from /proc/PID/comm
    Cmdlines,
}

/// Up to [`PIECE_BYTES_MAX`] of one text.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Piece {
    /// Which part of the description.
    pub part: Part,
    /// The system of an event format, else empty.
    pub name: String,
    /// The bytes.
    pub bytes: Vec<u8>,
    /// The text ends here; the next piece of this part starts another.
    pub last: bool,
}

/// A session is armed.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Armed {
    /// Lanes that will carry pages, each CPU once.
    pub lanes: Vec<Cpu>,
    /// Of those: CPUs that are offline and have a port. Should one come online, its lane carries pages from then on.
    pub spare: Vec<Cpu>,
    /// Bytes of one page.
    pub page_bytes: u32,
    /// Contents of trace_clock, the chosen one in brackets.
    pub clock: String,
    /// Events that were switched on.
    pub events: u32,
}

/// A piece of what a command writes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Output {
    /// Its place among the session's commands.
    pub command: u32,
    /// It came from standard error, not from standard output.
    pub is_error: bool,
    /// What it wrote, at most [`OUTPUT_BYTES_MAX`].
    pub bytes: Vec<u8>,
}

/// Answer to a probe, as the guest saw it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Echo {
    /// The probe's.
    pub id: u32,
    /// Where the answering thread ran.
    pub cpu: Cpu,
    /// TSC when the probe had been read.
    pub received: GuestTsc,
    /// TSC right before the echo was sent.
    pub sent: GuestTsc,
}

/// What one lane did in a session. For a CPU that came online later and was not armed, or whose tap was never read, the
/// ledger is empty: the events that `stats_after` counts are in no page.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct LaneReport {
    /// Which lane.
    pub cpu: Cpu,
    /// From ring buffer to port. Lost: a splice that moved nothing, a port that vanished.
    pub ledger: Ledger,
    /// per_cpu/cpuN/stats before tracing was switched on.
    pub stats_before: String,
    /// The same after it was switched off and the ring buffer was emptied.
    pub stats_after: String,
    /// Why a lane ended early, empty if it did not.
    pub trouble: String,
    /// The APIC id that its CPU was given at its start; `None` if it has no APIC id or was never online.
    pub apic: Option<u32>,
}

/// A setting of a recorded buffer that another program, or a trigger, changed. If both values are empty, the file was
/// written, or the pipe was opened, and nothing else is known.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SettingChange {
    /// The file in the buffer's directory.
    pub setting: String,
    /// Its value when tracing was switched on.
    pub armed: String,
    /// Its value before tracing was switched off.
    pub found: String,
}

/// Which rule a request broke.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum FailureKind {
    /// No tracefs, and none could be mounted.
    NoTracefs,
    /// An event pattern matched nothing; `near` names some that exist.
    NoSuchEvent,
    /// The clock does not exist there; `near` names those that do.
    NoSuchClock,
    /// The tracer does not exist there; `near` names those that do.
    NoSuchTracer,
    /// No function there is meant by it.
    NoSuchFunction,
    /// The trace option does not exist there; `near` names some that do.
    NoSuchOption,
    /// A filter or trigger that the kernel does not understand; the detail has its words.
    Expression,
    /// No such program there.
    NoSuchProgram,
    /// The guest's owner has not allowed it.
    NotAllowed,
    /// The kernel refused: the object is the file, the detail its error.
    Kernel,
    /// A session is running already, or none is.
    State,
    /// Not enough memory for the ring buffers asked for.
    Memory,
    /// A data port is missing for a CPU.
    NoPort,
    /// The kernel has no pages (sub-buffers) of that size.
    NoSuchPageSize,
    /// The driver did not accept VIRTIO_RING_F_INDIRECT_DESC: pages would be lost unseen.
    NoIndirect,
}

/// Why a request could not be met.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// Which rule.
    pub kind: FailureKind,
    /// On what.
    pub object: String,
    /// Why, in the kernel's or the agent's words.
    pub detail: String,
    /// Names that exist and look like the object.
    pub near: Vec<String>,
}

impl Failure {
    /// A failure without names to suggest.
    pub fn new(kind: FailureKind, object: &str, detail: &str) -> Self {
        Self { kind, object: object.into(), detail: detail.into(), near: Vec::new() }
    }
}

impl Message for ToAgent {
    const FAMILY: Family = Family::ToAgent;
    fn check(&self) -> Result<(), Fault> {
        match self {
            Self::Arm(arm) => arm.check(),
            Self::Start { marker: words } | Self::Mark { text: words } => text(words),
            Self::Probe { .. } | Self::Ping { .. } | Self::Stop | Self::Close | Self::Offer => Ok(()),
        }
    }
}

impl Message for FromAgent {
    const FAMILY: Family = Family::FromAgent;
    fn check(&self) -> Result<(), Fault> {
        match self {
            Self::Machine(machine) => {
                bounded(machine.cpus.len(), CPUS_MAX)?;
                bounded(machine.lanes.len(), LANES_MAX)?;
                bounded(machine.apics.len(), CPUS_MAX)?;
                text(&machine.uname)?;
                text(&machine.boot_id)
            }
            Self::Describe(piece) => {
                bounded(piece.bytes.len(), PIECE_BYTES_MAX)?;
                text(&piece.name)
            }
            Self::Offer(piece) => bounded(piece.bytes.len(), PIECE_BYTES_MAX),
            Self::Armed(armed) => {
                bounded(armed.lanes.len(), LANES_MAX)?;
                bounded(armed.spare.len(), LANES_MAX)?;
                text(&armed.clock)
            }
            Self::Remark { text: line } => text(line),
            Self::Output(output) => bounded(output.bytes.len(), OUTPUT_BYTES_MAX),
            Self::Exited { command, .. } => bounded(usize::try_from(*command).unwrap_or(usize::MAX), COMMANDS_MAX),
            Self::Lane(lane) => {
                text(&lane.stats_before)?;
                text(&lane.stats_after)?;
                text(&lane.trouble)
            }
            Self::EventsLost { lanes } => bounded(lanes.len(), CPUS_MAX),
            Self::Changed(change) => {
                text(&change.setting)?;
                text(&change.armed)?;
                text(&change.found)
            }
            Self::Failed(failure) => {
                bounded(failure.near.len(), NEAR_MAX)?;
                failure.near.iter().try_for_each(|name| text(name))?;
                text(&failure.object)?;
                text(&failure.detail)
            }
            Self::Started { .. } | Self::Echo(_) | Self::Marked { .. } => Ok(()),
            Self::Pong { .. } | Self::Arming { .. } | Self::Stopped | Self::Closed => Ok(()),
        }
    }
}
