//! Why what was typed cannot be a plan.

use vtrace_common::limits::NAME_BYTES_MAX;

use crate::recorder::plan::CLOCK;

/// Why a request cannot be a plan.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum PlanFault {
    /// Neither an event nor a guest.
    #[error("nothing to record: no event (-e), no tracer (-p) and no guest (--dom)")]
    Nothing,
    /// A guest without an event.
    #[error("no event (-e) and no tracer (-p) after --dom {0}")]
    GuestWithoutEvents(String),
    /// The same guest twice.
    #[error("--dom {0} is given twice")]
    GuestTwice(String),
    /// A name that cannot be a guest's.
    #[error("{0:?} cannot be a guest's name: letters, digits, '.', '_' and '-' only, {max} at most, no leading '.'", max = NAME_BYTES_MAX)]
    GuestName(String),
    /// An option that one machine can have once.
    #[error("{option} is given twice for {machine}")]
    Twice {
        /// Which.
        option: &'static str,
        /// Whose.
        machine: String,
    },
    /// A filter or trigger without its event.
    #[error("{option} belongs to the -e before it, and there is none for {machine}")]
    NoEventBefore {
        /// Which.
        option: &'static str,
        /// Whose.
        machine: String,
    },
    /// Not the number of a process.
    #[error("-P {0}: not the number of a process")]
    Process(String),
    /// Bytes that are no text.
    #[error("{0:?} is not UTF-8")]
    NotText(String),
    /// Guests and host cannot be brought together by such a clock.
    #[error("-C {0}: guests can only be recorded by {CLOCK}")]
    Clock(String),
    /// `--exec` before the first `--dom`.
    #[error("--exec is for guests; the host's command stands at the end")]
    ExecOnHost,
    /// `-F` without a command.
    #[error("-F for {0}, which runs no command")]
    CommandMissing(String),
    /// `-c` without processes.
    #[error("-c for {0} without -P or -F: children of whom?")]
    ParentMissing(String),
    /// A name that cannot be an instance's.
    #[error("-B {0:?}: letters, digits, '.', '_' and '-' only, {max} at most, no leading '.'", max = NAME_BYTES_MAX)]
    InstanceName(String),
    /// The same instance twice.
    #[error("-B {0} is given twice")]
    InstanceTwice(String),
    /// An instance without an event.
    #[error("no event (-e) and no tracer (-p) after -B {0}")]
    InstanceWithoutEvents(String),
    /// A second instance of a guest.
    #[error("-B {instance} is the second of {guest}: a port carries one buffer of a CPU, so a guest has one instance")]
    InstanceSecond {
        /// Its name.
        instance: String,
        /// Whose it would be.
        guest: String,
    },
    /// What a guest's top buffer is to record, and an instance too.
    #[error("options between --dom {guest} and -B {instance}: a port carries one buffer of a CPU, and -B names that")]
    InstanceBeside {
        /// Its name.
        instance: String,
        /// Whose it is.
        guest: String,
    },
    /// One file has one clock.
    #[error("-C {clock} for -B {instance}, which is in one file with what is recorded by {host}")]
    InstanceClock {
        /// Its name.
        instance: String,
        /// Its clock.
        clock: String,
        /// The host's.
        host: String,
    },
    /// Version 6 has one page size.
    #[error("--file-version 6 has one page size for all, but --subbuf-size is another for -B {0}")]
    InstancePages(String),
    /// Version 6 knows no compression.
    #[error("--file-version 6 cannot be compressed")]
    CompressedVersion6,
    /// A clock whose time of day is not known.
    #[error("--date with -C {0}, whose times cannot be read outside of the kernel")]
    DateClock(String),
    /// Not a duration.
    #[error("--timeout {0}: not a number of seconds")]
    Timeout(String),
}
