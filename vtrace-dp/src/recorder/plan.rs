//! A validated request: what to record, where to. `cli` makes it.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use nix::time::ClockId;
use vtrace_common::wire::agent::Arm;

use crate::{
    drain::sink::choice::SinkChoice,
    trace::write::{Bounds, pack::Form},
};

/// The default trace clock: the only one whose host and guest readings can be converted exactly.
pub const CLOCK: &str = "x86-tsc";

/// A recording's settings.
#[derive(Clone, PartialEq, Debug)]
pub struct Plan {
    /// The host's part.
    pub host: MachinePlan,
    /// Instances of the host, in the order typed.
    pub instances: Vec<InstancePlan>,
    /// The guests, in the order typed.
    pub guests: Vec<GuestPlan>,
    /// The command to run; empty: record until a stop signal.
    pub command: Vec<OsString>,
    /// Real-time priority of the host's pump.
    pub rt: Option<u8>,
    /// Stop after this long.
    pub timeout: Option<Duration>,
    /// How guests' pages are written.
    pub sink: SinkChoice,
    /// Stop before a file exceeds this many bytes.
    pub file_bytes_max: Option<u64>,
    /// Stop a guest before its file exceeds this many bytes.
    pub guest_bytes_max: Option<u64>,
    /// Guests' files keep the guests' times.
    pub raw_clock: bool,
    /// Version and compression of the finished files.
    pub form: Form,
    /// Existing files are not replaced.
    pub no_clobber: bool,
    /// Times are shown as times of day.
    pub date: bool,
    /// A guest that cannot be armed is left out.
    pub keep_going: bool,
    /// Exit status 3 on any loss.
    pub strict: bool,
    /// The closing table as JSON.
    pub json: bool,
    /// No status line and no table.
    pub quiet: bool,
    /// The run directory, with the server's socket.
    pub dir: PathBuf,
}

/// One machine's part.
#[derive(Clone, PartialEq, Debug)]
pub struct MachinePlan {
    /// What its ring buffers record.
    pub arm: Arm,
    /// The path of its file.
    pub output: PathBuf,
    /// Keep only the newest pages of each lane, at least this many bytes.
    pub newest_bytes: Option<u64>,
}

/// An instance of the host.
#[derive(Clone, PartialEq, Debug)]
pub struct InstancePlan {
    /// Its name in the file.
    pub name: String,
    /// What it records.
    pub arm: Arm,
    /// Keep only the newest pages of each lane, at least this many bytes.
    pub newest_bytes: Option<u64>,
}

/// One guest's part.
#[derive(Clone, PartialEq, Debug)]
pub struct GuestPlan {
    /// Its name at the server.
    pub name: String,
    /// What it records, and its file.
    pub machine: MachinePlan,
    /// The name of its buffer in its file; `None` for the top buffer.
    pub instance: Option<String>,
}

impl Plan {
    /// Whether the host or an instance records anything.
    pub fn host_records(&self) -> bool {
        self.host.records() || !self.instances.is_empty()
    }

    /// Limits of the lanes of a file of the host that keeps `newest_bytes` of each.
    pub fn bounds(&self, newest_bytes: Option<u64>) -> Bounds {
        Bounds { lane_bytes_max: self.file_bytes_max, newest_bytes }
    }

    /// The guest of this name.
    pub fn guest(&self, name: &str) -> Option<&GuestPlan> {
        self.guests.iter().find(|guest| guest.name == name)
    }

    /// Limits of the lanes of a guest's file.
    pub fn guest_bounds(&self, name: &str) -> Bounds {
        let lane_bytes_max = [self.file_bytes_max, self.guest_bytes_max].into_iter().flatten().min();
        Bounds { lane_bytes_max, newest_bytes: self.guest(name).and_then(|guest| guest.machine.newest_bytes) }
    }

    /// Whether a file keeps only the newest pages.
    pub fn keeps_newest(&self) -> bool {
        let guests = self.guests.iter().map(|guest| guest.machine.newest_bytes);
        let host = self.instances.iter().map(|instance| instance.newest_bytes).chain([self.host.newest_bytes]);
        host.chain(guests).any(|newest_bytes| newest_bytes.is_some())
    }
}

/// Whether an event or a tracer is enabled.
pub fn records(arm: &Arm) -> bool {
    !arm.events.is_empty() || !matches!(arm.tracer.name.as_str(), "" | "nop")
}

impl MachinePlan {
    /// Whether an event or a tracer is enabled.
    pub fn records(&self) -> bool {
        records(&self.arm)
    }
}

/// The POSIX clock that counts like a trace clock; `None` for clocks that user space cannot read.
pub fn wall_clock(clock: &str) -> Option<ClockId> {
    match clock {
        CLOCK | "mono" => Some(ClockId::CLOCK_MONOTONIC),
        "mono_raw" => Some(ClockId::CLOCK_MONOTONIC_RAW),
        "boot" => Some(ClockId::CLOCK_BOOTTIME),
        "tai" => Some(ClockId::CLOCK_TAI),
        _ => None,
    }
}
