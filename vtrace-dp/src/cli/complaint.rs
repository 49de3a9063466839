//! Error messages: what failed, on what, why, and what to try.
//!
//! In:    the library's errors, which contain facts only
//! Out:   a message with advice, and an exit status

use std::fmt;

use vtrace_common::wire::{
    agent::{Failure, FailureKind},
    client::{DriverState, Gone, Refusal},
};

use super::{
    exit_status::{FAILED, USAGE},
    plan_fault::PlanFault,
};
use crate::{
    agent::AgentError,
    doctor::remedy,
    printable::chain,
    recorder::{
        command::CommandError,
        error::RecordError,
        files::output::FileError,
        guests::{GuestsError, refusal::held_by, session::Trouble},
        host::HostError,
        plan::Plan,
    },
    server::{ServerError, link::LinkError},
};

/// An error message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Complaint {
    /// What failed, on what.
    failed: String,
    /// The reason.
    why: String,
    /// Advice; may be empty.
    remedy: String,
    /// Exit status.
    pub(super) status: u8,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { failed, why, remedy, .. } = self;
        write!(f, "vtrace: {failed}: {why}")?;
        if remedy.is_empty() { Ok(()) } else { write!(f, "\n  try: {remedy}") }
    }
}

impl Complaint {
    /// A failed request: what failed, why, advice.
    pub(super) fn new(failed: impl fmt::Display, why: impl fmt::Display, remedy: impl fmt::Display) -> Self {
        Self { failed: failed.to_string(), why: why.to_string(), remedy: remedy.to_string(), status: FAILED }
    }

    /// The same error of another request.
    pub(super) fn instead(self, failed: String) -> Self {
        Self { failed, ..self }
    }

    /// A command line that is not valid.
    pub(super) fn usage(failed: impl fmt::Display, why: impl fmt::Display, remedy: impl fmt::Display) -> Self {
        Self { status: USAGE, ..Self::new(failed, why, remedy) }
    }

    /// A failed system call.
    pub(super) fn system(call: &str, error: impl fmt::Display) -> Self {
        Self::new(call, error, "")
    }

    /// Recording by a user other than root.
    pub(super) fn not_root() -> Self {
        Self::new("cannot record", "only root can write to tracefs", "sudo vtrace record …")
    }

    /// A guest that is left out of a recording that goes on.
    pub(super) fn left_out(guest: &str, trouble: &Trouble) -> Self {
        let mut complaint = guest_trouble(guest, trouble);
        complaint.failed.push_str("; continuing without it");
        complaint
    }

    /// A recording that failed.
    pub(super) fn recording(error: RecordError, plan: &Plan) -> Self {
        match error {
            RecordError::Host(HostError::Refused(failure)) => failed("the host", &failure),
            RecordError::Host(HostError::Metadata(fault)) => {
                Self::new("cannot record the host", fault, "record fewer events, or use --no-kallsyms")
            }
            RecordError::Host(HostError::Descriptor(source)) => Self::system("dup", source),
            RecordError::Guest { guest, trouble } => guest_trouble(&guest, &trouble),
            RecordError::Guests(GuestsError::Link(error)) => error.into(),
            RecordError::Guests(GuestsError::Refused(refusal)) => refused(&refusal),
            RecordError::Guests(GuestsError::Interrupted) => {
                Self::new("nothing recorded", "interrupted before recording began", "")
            }
            RecordError::File(error) => file(&error),
            RecordError::Command(error) => command(&error, plan),
            RecordError::System { call, source } => Self::system(call, source),
        }
    }
}

impl From<PlanFault> for Complaint {
    fn from(fault: PlanFault) -> Self {
        let remedy = match &fault {
            PlanFault::Nothing => "vtrace record -e sched -- sleep 1",
            PlanFault::GuestWithoutEvents(_) => "name events after the guest: --dom GUEST -e sched",
            PlanFault::GuestTwice(_) | PlanFault::Twice { .. } => "give it once, followed by all its options",
            PlanFault::NoEventBefore { .. } => "-e sched_switch -f 'prev_prio < 100'",
            PlanFault::Process(_) => "-P 42 or -P 42,43",
            PlanFault::CpuMask { .. } => "-M 3 for CPUs 0 and 1, or -M all",
            PlanFault::NotText(_) => "use a link to that file whose name is UTF-8",
            PlanFault::Clock(_) => "omit -C, or record the host alone",
            PlanFault::ExecOnHost => "--dom GUEST --exec COMMAND \\; or COMMAND as last argument",
            PlanFault::CommandMissing(_) => "give COMMAND as last argument, or for a guest --exec COMMAND \\;",
            PlanFault::ParentMissing(_) => "-P PID -c",
            PlanFault::GuestName(_) => "vtrace list shows the guests' names",
            PlanFault::InstanceName(_) => "-B irqs -e irq",
            PlanFault::InstanceTwice(_) => "give it once, followed by all its options",
            PlanFault::InstanceWithoutEvents(_) => "name events after the instance: -B NAME -e irq",
            PlanFault::InstanceSecond { .. } => "give one -B for each guest, followed by all its -e",
            PlanFault::InstanceBeside { .. } => "--dom GUEST -B NAME -e EVENT: give all options after -B, or omit -B",
            PlanFault::InstanceClock { .. } => "give -C before the first -B: it applies to the whole host",
            PlanFault::InstancePages(_) => "use the same --subbuf-size for both, or --file-version 7",
            PlanFault::CompressedVersion6 => "use --file-version 7, or omit --compression",
            PlanFault::DateClock(_) => "omit -C, or use mono, mono_raw, boot or tai",
            PlanFault::Timeout(_) => "--timeout 2.5",
        };
        Self::usage("cannot record", &fault, remedy)
    }
}

impl From<LinkError> for Complaint {
    fn from(error: LinkError) -> Self {
        Self::new("cannot reach the server", &error, remedy::of_link(&error))
    }
}

impl From<AgentError> for Complaint {
    fn from(error: AgentError) -> Self {
        let remedy = match &error {
            AgentError::Busy { .. } => "stop the other agent: one agent serves all hosts",
            AgentError::Port { .. } => "run as root",
            AgentError::Policy(_) => "--policy FILE: name a file that exists and has the keys in README",
            AgentError::CpuPlacement(_) => "--agent-cpus LIST: name CPUs that are online",
            AgentError::System(_) => "",
        };
        Self::new("the agent cannot run", chain(&error), remedy)
    }
}

impl From<ServerError> for Complaint {
    fn from(error: ServerError) -> Self {
        let (status, remedy) = match &error {
            ServerError::Name(_) | ServerError::Twice(_) => {
                (USAGE, "use letters, digits, '.', '_' and '-', and each name once")
            }
            ServerError::Devices { .. } => (USAGE, "vtrace server --dom GUEST --devices 2"),
            ServerError::Count(_) => (USAGE, "vtrace server --dom guest1"),
            ServerError::Directory { .. } => (FAILED, "run as root, or use --dir DIR"),
            ServerError::Confinement(_) => (FAILED, "--user NAME: name a user of this machine; or run as root"),
            ServerError::Socket(_) => (FAILED, "stop the other server, or use --dir DIR"),
            ServerError::Activation(_) => {
                (FAILED, "name the sockets DIR/control.sock and DIR/GUEST.sock, and each guest by --dom")
            }
            ServerError::Descriptor { .. } => (FAILED, "--socket-path PATH"),
            ServerError::Thread { .. } | ServerError::System { .. } => (FAILED, ""),
        };
        Self { status, ..Self::new("the server cannot run", chain(&error), remedy) }
    }
}

fn guest_trouble(guest: &str, trouble: &Trouble) -> Complaint {
    match trouble {
        Trouble::Refused(refusal) => refused(refusal),
        Trouble::Failed(failure) => failed(guest, failure),
        Trouble::Gone(Gone::Agent) => {
            Complaint::new(format!("cannot record {guest}"), trouble, "see the agent's output in the guest")
        }
        Trouble::Silent { .. } => Complaint::new(format!("cannot record {guest}"), trouble, remedy::SILENT_GUEST),
        _ => Complaint::new(format!("cannot record {guest}"), trouble, ""),
    }
}

/// What to try where lockdown forbids tracing.
const LOCKDOWN: &str = "boot it without lockdown: lockdown= on its kernel command line, or Secure Boot, turns it on";

fn failed(machine: &str, failure: &Failure) -> Complaint {
    let Failure { kind, object, detail, near } = failure;
    let near = near.join(", ");
    let cannot = format!("cannot record {machine}");
    match kind {
        FailureKind::NoSuchEvent => {
            let listed = if machine == "the host" { "--host".into() } else { format!("--dom {machine}") };
            let remedy = if near.is_empty() { format!("vtrace list {listed} -e") } else { format!("-e {near}") };
            Complaint::new(cannot, format!("no event matches {object:?}"), remedy)
        }
        FailureKind::NoSuchClock => {
            Complaint::new(cannot, format!("it has no trace clock {object:?}"), format!("it has: {near}"))
        }
        FailureKind::NoTracefs | FailureKind::Kernel if detail.contains("kernel lockdown") => {
            Complaint::new(cannot, format!("{object}: {detail}"), LOCKDOWN)
        }
        FailureKind::NoTracefs => Complaint::new(
            cannot,
            format!("no tracefs: {detail}"),
            format!("mount -t tracefs nodev /sys/kernel/tracing on {machine}; its kernel needs CONFIG_FTRACE"),
        ),
        FailureKind::NoPort => Complaint::new(cannot, format!("{object} has no data port: {detail}"), remedy::NO_PORT),
        FailureKind::NoIndirect => {
            Complaint::new(cannot, format!("{object}: {detail}"), "use a device that offers indirect descriptors")
        }
        FailureKind::Memory => Complaint::new(
            cannot,
            format!("{object}: {detail}"),
            "use a smaller -b, or more memory; in a guest, buffer_mib_max in /etc/vtrace/agent.toml limits it",
        ),
        FailureKind::NoSuchPageSize => {
            Complaint::new(cannot, format!("{object}: {detail}"), "4, 8, 16, 32, 64, 128, 256 or 512")
        }
        FailureKind::State => {
            Complaint::new(cannot, format!("{object}: {detail}"), "wait for the other recording to end")
        }
        FailureKind::NoSuchTracer => {
            Complaint::new(cannot, format!("it has no tracer {object:?}"), format!("it has: {near}"))
        }
        FailureKind::NoSuchFunction => {
            Complaint::new(cannot, format!("{object:?}: {detail}"), "see available_filter_functions in its tracefs")
        }
        FailureKind::NoSuchOption => {
            Complaint::new(cannot, format!("it has no trace option {object:?}"), options(&near))
        }
        FailureKind::Expression => Complaint::new(
            cannot,
            format!("{object}: {detail}"),
            "see the fields in events/SYSTEM/EVENT/format of its tracefs",
        ),
        FailureKind::NoSuchProgram => Complaint::new(cannot, format!("{object}: {detail}"), "give the full path"),
        FailureKind::NotAllowed => Complaint::new(
            cannot,
            format!("{object}: {detail}"),
            "change the policy, /etc/vtrace/agent.toml there (for commands also vtrace agent --allow-exec), and restart the agent",
        ),
        FailureKind::Kernel => Complaint::new(cannot, format!("{object}: {detail}"), kernel_remedy(object, machine)),
    }
}

/// What to try when the kernel refuses a file of tracefs.
fn kernel_remedy(object: &str, machine: &str) -> String {
    let is_function = ["set_ftrace_", "set_graph_", "current_tracer"].iter().any(|file| object.contains(file));
    match object {
        "set_event_pid" => "run it outside the container, or without -P and -F".into(),
        "kernel.ftrace_enabled" => format!("sysctl kernel.ftrace_enabled=1 on {machine}"),
        _ if is_function => "record events only (-e), without -p and -l: this kernel forbids function tracing".into(),
        _ => String::new(),
    }
}

fn options(near: &str) -> String {
    if near.is_empty() { "see trace_options in its tracefs".into() } else { format!("-O {near}") }
}

/// A guest that the server refused.
pub(super) fn refused(refusal: &Refusal) -> Complaint {
    let cannot = |guest: &str| format!("cannot record {guest}");
    match refusal {
        Refusal::NoSuchGuest { guest, known } => unknown(&cannot(guest), known),
        Refusal::NotConnected { guest, socket } => Complaint::new(
            cannot(guest),
            format!("no virtual machine is connected to {socket}"),
            "start QEMU 10.2 or newer with the options that vtrace setup prints, or vtrace attach",
        ),
        Refusal::Driver { guest, state } => driver(guest, state),
        Refusal::NoAgent { guest } => Complaint::new(
            cannot(guest),
            "its device is present, but no agent has opened the control port",
            remedy::NO_AGENT,
        ),
        Refusal::AgentVersion { guest, hello } => Complaint::new(
            cannot(guest),
            format!(
                "its agent ({}) speaks wire version {} to {}, this server speaks {}",
                hello.software,
                hello.version_min,
                hello.version_max,
                vtrace_common::wire::VERSION
            ),
            remedy::AGENT_VERSION,
        ),
        Refusal::Held { guest, holder_pid: 0, holder_uid } => {
            Complaint::new(cannot(guest), held_by(0, *holder_uid), "wait for that user, or ask root to stop it")
        }
        Refusal::Held { guest, holder_pid, holder_uid } => {
            Complaint::new(cannot(guest), held_by(*holder_pid, *holder_uid), "wait for it, or stop it")
        }
        Refusal::State { guest, detail } => Complaint::new(cannot(guest), detail, ""),
        Refusal::Request { detail } => Complaint::new("the server refused", detail, ""),
        Refusal::Full => Complaint::new(
            "the server refused",
            "it serves the maximum number of clients",
            "try again when another client has ended",
        ),
    }
}

/// A guest that the server does not know.
pub(super) fn unknown(cannot: &str, known: &[String]) -> Complaint {
    let known = if known.is_empty() { "it has none".into() } else { format!("it has: {}", known.join(", ")) };
    Complaint::new(cannot, "the server has no guest of this name", known)
}

/// A guest whose driver cannot be used.
pub(super) fn driver(guest: &str, state: &DriverState) -> Complaint {
    let why = match state {
        DriverState::Absent => "its virtual machine is connected, but no driver runs in the guest".into(),
        DriverState::Running => "its driver was not ready".into(),
        DriverState::Unfit(feature) => format!("its driver did not accept {feature}: pages would be lost unnoticed"),
        DriverState::MemoryNotShared => "its memory is not shared with the server".into(),
    };
    Complaint::new(format!("cannot record {guest}"), why, remedy::of_driver(state))
}

fn file(error: &FileError) -> Complaint {
    let FileError { path, what, source } = error;
    let remedy = match source.kind() {
        std::io::ErrorKind::StorageFull => "free some space there, or use -o on another file system",
        std::io::ErrorKind::AlreadyExists => "name another file (-o), or omit --no-clobber",
        std::io::ErrorKind::ResourceBusy => "wait for it, or name another file (-o)",
        std::io::ErrorKind::NotFound => "create the directory, or name another file (-o)",
        _ => "name a file that can be written (-o)",
    };
    Complaint::new(format!("cannot {what} {}", path.display()), chain(source), remedy)
}

fn command(error: &CommandError, plan: &Plan) -> Complaint {
    let typed = plan.command.first().map(|word| word.display().to_string()).unwrap_or_default();
    match error {
        CommandError::NotFound(_) => Complaint::new(
            format!("cannot run {typed}"),
            "command not found",
            "give the options of record before COMMAND",
        ),
        CommandError::Start { source, .. } => Complaint::new(format!("cannot run {typed}"), source, ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_that_does_not_exist_is_named_with_near_matches() {
        let failure = Failure {
            kind: FailureKind::NoSuchEvent,
            object: "shced".into(),
            detail: String::new(),
            near: vec!["sched".into()],
        };
        let complaint = guest_trouble("guest1", &Trouble::Failed(failure));
        let text = "vtrace: cannot record guest1: no event matches \"shced\"\n  try: -e sched";
        assert_eq!(complaint.to_string(), text);
    }

    #[test]
    fn unknown_guest_is_answered_with_the_known_ones() {
        let complaint = refused(&Refusal::NoSuchGuest { guest: "gust1".into(), known: vec!["guest1".into()] });
        let text = "vtrace: cannot record gust1: the server has no guest of this name\n  try: it has: guest1";
        assert_eq!(complaint.to_string(), text);
    }

    #[test]
    fn invalid_request_exits_with_the_usage_status() {
        let complaint = Complaint::from(PlanFault::GuestWithoutEvents("guest1".into()));
        assert_eq!(complaint.status, USAGE);
        assert!(complaint.to_string().contains("no event (-e) and no tracer (-p) after --dom guest1"), "{complaint}");
    }

    #[test]
    fn memory_that_is_not_shared_is_answered_with_the_option_to_add() {
        let state = DriverState::MemoryNotShared;
        let complaint = refused(&Refusal::Driver { guest: "guest1".into(), state });
        assert!(complaint.to_string().contains("memory-backend-memfd"), "{complaint}");
    }
}
