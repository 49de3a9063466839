//! Requests that are not valid.

use vtrace_common::limits::NAME_BYTES_MAX;

use crate::recorder::plan::CLOCK;

/// A request that is not valid.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum PlanFault {
    /// No event, no tracer and no guest.
    #[error("nothing to record: no event (-e), no tracer (-p) and no guest (--dom)")]
    Nothing,
    /// A guest without an event.
    #[error("no event (-e) and no tracer (-p) after --dom {0}")]
    GuestWithoutEvents(String),
    /// A guest that is given twice.
    #[error("--dom {0} is given twice")]
    GuestTwice(String),
    /// A name that no guest can have.
    #[error("{0:?} is not valid as a guest's name: letters, digits, '.', '_' and '-' only, {max} at most, no leading '.'", max = NAME_BYTES_MAX)]
    GuestName(String),
    /// An option that is given twice for a machine.
    #[error("{option} is given twice for {machine}")]
    Twice {
        /// The option.
        option: &'static str,
        /// The machine.
        machine: String,
    },
    /// A filter or trigger without its event.
    #[error("{option} applies to the preceding -e, but {machine} has none")]
    NoEventBefore {
        /// The option.
        option: &'static str,
        /// The machine.
        machine: String,
    },
    /// Not a process ID.
    #[error("-P {0}: not a process ID")]
    Process(String),
    /// A CPU mask that selects no CPU.
    #[error("-M {mask} for {machine}: not a hexadecimal mask of at least one CPU")]
    CpuMask {
        /// The mask.
        mask: String,
        /// The machine.
        machine: String,
    },
    /// An argument that is not UTF-8.
    #[error("{0:?} is not UTF-8")]
    NotText(String),
    /// A clock that guests cannot share with the host.
    #[error("-C {0}: with guests the clock must be {CLOCK}")]
    Clock(String),
    /// `--exec` before the first `--dom`.
    #[error("--exec is for guests; the host's command is the last argument")]
    ExecOnHost,
    /// `-F` without a command.
    #[error("-F for {0} without a command")]
    CommandMissing(String),
    /// `-c` without processes.
    #[error("-c for {0} needs -P or -F")]
    ParentMissing(String),
    /// A name that no instance can have.
    #[error("-B {0:?}: letters, digits, '.', '_' and '-' only, {max} at most, no leading '.'", max = NAME_BYTES_MAX)]
    InstanceName(String),
    /// An instance that is given twice.
    #[error("-B {0} is given twice")]
    InstanceTwice(String),
    /// An instance without an event.
    #[error("no event (-e) and no tracer (-p) after -B {0}")]
    InstanceWithoutEvents(String),
    /// A second instance of a guest.
    #[error(
        "-B {instance} is the second for {guest}: a guest has one instance, since a port carries one buffer per CPU"
    )]
    InstanceSecond {
        /// Name of the instance.
        instance: String,
        /// Name of the guest.
        guest: String,
    },
    /// Options for a guest's top buffer, besides an instance.
    #[error("options between --dom {guest} and -B {instance}: a guest has either -B or its top buffer")]
    InstanceBeside {
        /// Name of the instance.
        instance: String,
        /// Name of the guest.
        guest: String,
    },
    /// An instance with another clock than the host.
    #[error("-C {clock} for -B {instance}: the host's file has one clock, {host}")]
    InstanceClock {
        /// Name of the instance.
        instance: String,
        /// Clock of the instance.
        clock: String,
        /// Clock of the host.
        host: String,
    },
    /// An instance with another page size in a file of version 6.
    #[error("--file-version 6 has one page size, but --subbuf-size differs for -B {0}")]
    InstancePages(String),
    /// Compression of a file of version 6.
    #[error("--file-version 6 cannot be compressed")]
    CompressedVersion6,
    /// A clock that cannot be converted to wall-clock time.
    #[error("--date with -C {0}: user space cannot read this clock")]
    DateClock(String),
    /// Not a duration.
    #[error("--timeout {0}: not a number of seconds")]
    Timeout(String),
}
