//! What a person reads when something failed: what, on what, why, and what to try.
//!
//! In:    facts from the library's errors
//! Out:   one message, one exit status; the only place where advice is given

use std::fmt;

use vtrace_common::wire::{
    agent::{Failure, FailureKind},
    client::{DriverState, Gone, Refusal},
};

use super::{FAILED, USAGE, plan_fault::PlanFault};
use crate::{
    agent::AgentError,
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

/// A failed request, explained.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Complaint {
    /// What failed, on what.
    failed: String,
    /// Why.
    why: String,
    /// What to try.
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
    /// It failed, because, try.
    pub(super) fn new(failed: impl fmt::Display, why: impl fmt::Display, remedy: impl fmt::Display) -> Self {
        Self { failed: failed.to_string(), why: why.to_string(), remedy: remedy.to_string(), status: FAILED }
    }

    /// The same where something else than a recording was wanted.
    pub(super) fn instead(self, failed: String) -> Self {
        Self { failed, ..self }
    }

    /// The command line makes no sense.
    pub(super) fn usage(failed: impl fmt::Display, why: impl fmt::Display, remedy: impl fmt::Display) -> Self {
        Self { status: USAGE, ..Self::new(failed, why, remedy) }
    }

    /// A system call of ours.
    pub(super) fn system(call: &str, error: impl fmt::Display) -> Self {
        Self::new(call, error, "")
    }

    /// Recording needs root.
    pub(super) fn not_root() -> Self {
        Self::new("cannot record", "tracefs can be written by root only", "sudo vtrace record …")
    }

    /// A guest without which the recording goes on.
    pub(super) fn left_out(guest: &str, trouble: &Trouble) -> Self {
        let mut complaint = guest_trouble(guest, trouble);
        complaint.failed.push_str(" and leave it out");
        complaint
    }

    /// A recording that did not come about.
    pub(super) fn recording(error: RecordError, plan: &Plan) -> Self {
        match error {
            RecordError::Host(HostError::Refused(failure)) => failed("the host", &failure),
            RecordError::Host(HostError::Metadata(fault)) => {
                Self::new("cannot record the host", fault, "fewer events, or --no-kallsyms")
            }
            RecordError::Host(HostError::Descriptor(source)) => Self::system("dup", source),
            RecordError::Guest { guest, trouble } => guest_trouble(&guest, &trouble),
            RecordError::Guests(GuestsError::Link(error)) => error.into(),
            RecordError::Guests(GuestsError::Refused(refusal)) => refused(&refusal),
            RecordError::Guests(GuestsError::Interrupted) => {
                Self::new("nothing recorded", "interrupted before the recording began", "")
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
            PlanFault::GuestWithoutEvents(_) => "give it events behind its name: --dom GUEST -e sched",
            PlanFault::GuestTwice(_) | PlanFault::Twice { .. } => "give it once, with all its options behind it",
            PlanFault::NoEventBefore { .. } => "-e sched_switch -f 'prev_prio < 100'",
            PlanFault::Process(_) => "-P 42 or -P 42,43",
            PlanFault::NotText(_) => "an alias of that file whose name is UTF-8",
            PlanFault::Clock(_) => "leave -C out, or record the host alone",
            PlanFault::ExecOnHost => "--dom GUEST --exec COMMAND \\; or COMMAND at the end",
            PlanFault::CommandMissing(_) => "name it at the end, or for a guest with --exec COMMAND \\;",
            PlanFault::ParentMissing(_) => "-P PID -c",
            PlanFault::GuestName(_) => "vtrace list shows the names there are",
            PlanFault::InstanceName(_) => "-B irqs -e irq",
            PlanFault::InstanceTwice(_) => "give it once, with all its options behind it",
            PlanFault::InstanceWithoutEvents(_) => "give it events behind its name: -B NAME -e irq",
            PlanFault::InstanceSecond { .. } => "one -B for each guest, with all its -e behind it",
            PlanFault::InstanceBeside { .. } => "--dom GUEST -B NAME -e EVENT, everything behind -B; or leave -B out",
            PlanFault::InstanceClock { .. } => "-C before the first -B, for all of the host",
            PlanFault::InstancePages(_) => "the same --subbuf-size for both, or --file-version 7",
            PlanFault::CompressedVersion6 => "--file-version 7, or leave --compression out",
            PlanFault::DateClock(_) => "leave -C out, or one of mono, mono_raw, boot and tai",
            PlanFault::Timeout(_) => "--timeout 2.5",
        };
        Self::usage("cannot record", &fault, remedy)
    }
}

impl From<LinkError> for Complaint {
    fn from(error: LinkError) -> Self {
        let remedy = match &error {
            LinkError::NoServer { .. } => "start it: vtrace server --dom GUEST; or say where it is: --dir DIR",
            LinkError::Denied { .. } => "be root, or a member of group vtrace",
            LinkError::Stalled { .. } => {
                "see whether its process is stopped (kill -CONT), or end it and start it again"
            }
            LinkError::Version { .. } => "use the same version of vtrace for server and record",
            LinkError::Full { .. } => "wait for another client to end",
            _ => "look at the server's log",
        };
        Self::new("cannot talk to the server", &error, remedy)
    }
}

impl From<AgentError> for Complaint {
    fn from(error: AgentError) -> Self {
        let remedy = match &error {
            AgentError::Busy { .. } => "one agent serves all hosts: stop the other one",
            AgentError::Port { .. } => "be root",
            AgentError::Policy(_) => "vtrace agent --policy FILE: a file that exists and has the keys of README",
            AgentError::CpuPlacement(_) => "vtrace agent --agent-cpus LIST: CPUs that are online",
            AgentError::System(_) => "",
        };
        Self::new("the agent cannot run", chain(&error), remedy)
    }
}

impl From<ServerError> for Complaint {
    fn from(error: ServerError) -> Self {
        let (status, remedy) = match &error {
            ServerError::Name(_) | ServerError::Twice(_) => {
                (USAGE, "letters, digits, '.', '_' and '-', each name once")
            }
            ServerError::Devices { .. } => (USAGE, "vtrace server --dom GUEST --devices 2"),
            ServerError::Count(_) => (USAGE, "vtrace server --dom guest1"),
            ServerError::Directory { .. } => (FAILED, "be root, or --dir DIR"),
            ServerError::Confinement(_) => (FAILED, "--user NAME: a user of this machine; or be root"),
            ServerError::Socket(_) => (FAILED, "stop the other server, or --dir DIR"),
            ServerError::Activation(_) => {
                (FAILED, "sockets at DIR/control.sock and DIR/GUEST.sock, each guest by --dom")
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
            Complaint::new(format!("cannot record {guest}"), trouble, "look at the agent's output in the guest")
        }
        Trouble::Silent { .. } => {
            Complaint::new(format!("cannot record {guest}"), trouble, "see whether the guest runs and is not paused")
        }
        _ => Complaint::new(format!("cannot record {guest}"), trouble, ""),
    }
}

fn failed(machine: &str, failure: &Failure) -> Complaint {
    let Failure { kind, object, detail, near } = failure;
    let near = near.join(", ");
    let cannot = format!("cannot record {machine}");
    match kind {
        FailureKind::NoSuchEvent => {
            let listed = if machine == "the host" { "--host".into() } else { format!("--dom {machine}") };
            let remedy = if near.is_empty() { format!("vtrace list {listed} -e") } else { format!("-e {near}") };
            Complaint::new(cannot, format!("no event there matches {object:?}"), remedy)
        }
        FailureKind::NoSuchClock => {
            Complaint::new(cannot, format!("it has no trace clock {object:?}"), format!("it has: {near}"))
        }
        FailureKind::NoTracefs => Complaint::new(
            cannot,
            format!("no tracefs: {detail}"),
            format!("mount -t tracefs nodev /sys/kernel/tracing on {machine}; its kernel needs CONFIG_FTRACE"),
        ),
        FailureKind::NoPort => {
            let remedy = "give its device 2 × (CPUs + 2) rings, num_vqs=…; beyond 126 CPUs it needs several devices";
            Complaint::new(cannot, format!("{object} has no data port: {detail}"), remedy)
        }
        FailureKind::NoIndirect => {
            Complaint::new(cannot, format!("{object}: {detail}"), "use a device that offers indirect descriptors")
        }
        FailureKind::Memory => Complaint::new(
            cannot,
            format!("{object}: {detail}"),
            "a smaller -b, or more memory; in a guest, its owner's buffer_mib_max (/etc/vtrace/agent.toml)",
        ),
        FailureKind::NoSuchPageSize => {
            Complaint::new(cannot, format!("{object}: {detail}"), "4, 8, 16, 32, 64, 128, 256 or 512")
        }
        FailureKind::State => Complaint::new(cannot, format!("{object}: {detail}"), "wait for the other recording"),
        FailureKind::NoSuchTracer => {
            Complaint::new(cannot, format!("it has no tracer {object:?}"), format!("it has: {near}"))
        }
        FailureKind::NoSuchFunction => Complaint::new(
            cannot,
            format!("{object:?}: {detail}"),
            "grep NAME available_filter_functions in its tracefs",
        ),
        FailureKind::NoSuchOption => {
            Complaint::new(cannot, format!("it has no trace option {object:?}"), options(&near))
        }
        FailureKind::Expression => Complaint::new(
            cannot,
            format!("{object}: {detail}"),
            "the fields are in events/SYSTEM/EVENT/format of its tracefs",
        ),
        FailureKind::NoSuchProgram => Complaint::new(cannot, format!("{object}: {detail}"), "a full path"),
        FailureKind::NotAllowed => Complaint::new(
            cannot,
            format!("{object}: {detail}"),
            "its owner's rules, /etc/vtrace/agent.toml there (for commands, or vtrace agent --allow-exec); then start the agent anew",
        ),
        FailureKind::Kernel => Complaint::new(cannot, format!("{object}: {detail}"), ""),
    }
}

fn options(near: &str) -> String {
    if near.is_empty() { "trace_options in its tracefs lists them".into() } else { format!("-O {near}") }
}

/// The server refused a guest.
pub(super) fn refused(refusal: &Refusal) -> Complaint {
    let cannot = |guest: &str| format!("cannot record {guest}");
    match refusal {
        Refusal::NoSuchGuest { guest, known } => unknown(&cannot(guest), known),
        Refusal::NotConnected { guest, socket } => Complaint::new(
            cannot(guest),
            format!("no virtual machine is connected to {socket}"),
            "start QEMU 10.2 or newer with -chardev socket on that path (vtrace server --help shows the lines)",
        ),
        Refusal::Driver { guest, state } => driver(guest, state),
        Refusal::NoAgent { guest } => Complaint::new(
            cannot(guest),
            "its device is there, but no agent has opened the control port",
            "run vtrace agent in the guest",
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
            "copy this vtrace into the guest and start its agent again",
        ),
        Refusal::Held { guest, holder_pid: 0, holder_uid } => {
            Complaint::new(cannot(guest), held_by(0, *holder_uid), "wait for that user, or ask root to stop it")
        }
        Refusal::Held { guest, holder_pid, holder_uid } => {
            Complaint::new(cannot(guest), held_by(*holder_pid, *holder_uid), "wait for it, or stop it")
        }
        Refusal::State { guest, detail } => Complaint::new(cannot(guest), detail, ""),
        Refusal::Request { detail } => Complaint::new("the server refused", detail, ""),
        Refusal::Full => Complaint::new("the server refused", "it serves as many clients as it can", "wait for one"),
    }
}

/// The server does not know the guest.
pub(super) fn unknown(cannot: &str, known: &[String]) -> Complaint {
    let known = if known.is_empty() { "it has none".into() } else { format!("it has: {}", known.join(", ")) };
    Complaint::new(cannot, "the server has no guest of this name", known)
}

/// A driver that cannot be used.
pub(super) fn driver(guest: &str, state: &DriverState) -> Complaint {
    let cannot = format!("cannot record {guest}");
    match state {
        DriverState::Absent => Complaint::new(
            cannot,
            "its virtual machine is connected, but no driver runs in the guest",
            "wait until it has booted; its kernel needs virtio_console",
        ),
        DriverState::Running => Complaint::new(cannot, "its driver was not ready", "once more"),
        DriverState::Unfit(feature) => Complaint::new(
            cannot,
            format!("its driver did not accept {feature}: pages would be lost unseen"),
            "do not switch indirect_desc off on the device",
        ),
        DriverState::MemoryNotShared => Complaint::new(
            cannot,
            "its memory is not shared with the server",
            "-object memory-backend-memfd,id=mem0,size=SIZE,share=on -machine …,memory-backend=mem0",
        ),
    }
}

fn file(error: &FileError) -> Complaint {
    let FileError { path, what, source } = error;
    let remedy = match source.kind() {
        std::io::ErrorKind::StorageFull => "free some space there, or -o to another file system",
        std::io::ErrorKind::AlreadyExists => "-o to another file, or leave --no-clobber out",
        std::io::ErrorKind::ResourceBusy => "wait for it, or -o to another file",
        std::io::ErrorKind::NotFound => "make its folder, or -o to another path",
        _ => "-o to a place that can be written",
    };
    Complaint::new(format!("cannot {what} {}", path.display()), chain(source), remedy)
}

fn command(error: &CommandError, plan: &Plan) -> Complaint {
    let typed = plan.command.first().map(|word| word.display().to_string()).unwrap_or_default();
    match error {
        CommandError::NotFound(_) => {
            Complaint::new(format!("cannot run {typed}"), "command not found", "options of record go before it")
        }
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
        let text = "vtrace: cannot record guest1: no event there matches \"shced\"\n  try: -e sched";
        assert_eq!(complaint.to_string(), text);
    }

    #[test]
    fn unknown_guest_is_answered_with_those_there_are() {
        let complaint = refused(&Refusal::NoSuchGuest { guest: "gust1".into(), known: vec!["guest1".into()] });
        let text = "vtrace: cannot record gust1: the server has no guest of this name\n  try: it has: guest1";
        assert_eq!(complaint.to_string(), text);
    }

    #[test]
    fn request_that_makes_no_sense_exits_with_the_usage_status() {
        let complaint = Complaint::from(PlanFault::GuestWithoutEvents("guest1".into()));
        assert_eq!(complaint.status, USAGE);
        assert!(complaint.to_string().contains("no event (-e) and no tracer (-p) after --dom guest1"), "{complaint}");
    }

    #[test]
    fn memory_that_is_not_shared_is_answered_with_the_line_to_add() {
        let state = DriverState::MemoryNotShared;
        let complaint = refused(&Refusal::Driver { guest: "guest1".into(), state });
        assert!(complaint.to_string().contains("memory-backend-memfd"), "{complaint}");
    }
}
