//! A request to record: who, what, where to. Whoever makes one has validated it ([`crate::cli`]).

use std::{ffi::OsString, path::PathBuf, time::Duration};

use nix::time::ClockId;
use vtrace_common::wire::agent::Arm;

use crate::{
    drain::sink::choice::SinkChoice,
    trace::write::{Bounds, pack::Form},
};

/// The trace clock of every machine: the only one whose host and guest readings can be converted exactly.
pub const CLOCK: &str = "x86-tsc";

/// What to record.
#[derive(Clone, PartialEq, Debug)]
pub struct Plan {
    /// The host.
    pub host: MachinePlan,
    /// Instances of the host, in the order typed.
    pub instances: Vec<InstancePlan>,
    /// The guests, in the order typed.
    pub guests: Vec<GuestPlan>,
    /// Runs while we record; empty: until Ctrl-C.
    pub command: Vec<OsString>,
    /// Real-time priority of the host's recorder.
    pub rt: Option<u8>,
    /// Stop after this long.
    pub timeout: Option<Duration>,
    /// How guests' pages are written.
    pub sink: SinkChoice,
    /// Keep the newest bytes of each lane only, at least so many.
    pub newest_bytes: Option<u64>,
    /// Stop before a file grows beyond this.
    pub file_bytes_max: Option<u64>,
    /// Stop a guest before its file grows beyond this.
    pub guest_bytes_max: Option<u64>,
    /// Guests' times stay their own.
    pub raw_clock: bool,
    /// What the files are like in the end.
    pub form: Form,
    /// A file that is there stays.
    pub no_clobber: bool,
    /// Times are shown as times of day.
    pub date: bool,
    /// A guest that cannot be armed is left out.
    pub keep_going: bool,
    /// Exit with 3 on any loss.
    pub strict: bool,
    /// The closing table as JSON.
    pub json: bool,
    /// No status line and no table.
    pub quiet: bool,
    /// Where the server is.
    pub dir: PathBuf,
}

/// One machine's part.
#[derive(Clone, PartialEq, Debug)]
pub struct MachinePlan {
    /// What its ring buffers record.
    pub arm: Arm,
    /// Its file.
    pub output: PathBuf,
}

/// One more buffer of the host.
#[derive(Clone, PartialEq, Debug)]
pub struct InstancePlan {
    /// Its name in the file.
    pub name: String,
    /// What it records.
    pub arm: Arm,
}

/// One guest's part.
#[derive(Clone, PartialEq, Debug)]
pub struct GuestPlan {
    /// Its name at the server.
    pub name: String,
    /// What and where to.
    pub machine: MachinePlan,
    /// What its buffer is called in its file; without a name it is the top one.
    pub instance: Option<String>,
}

impl Plan {
    /// Whether anything of the host would come.
    pub fn host_records(&self) -> bool {
        self.host.records() || !self.instances.is_empty()
    }

    /// What bounds the lanes of every file.
    pub fn bounds(&self) -> Bounds {
        Bounds { lane_bytes_max: self.file_bytes_max, newest_bytes: self.newest_bytes }
    }

    /// The same for guests' files.
    pub fn guest_bounds(&self) -> Bounds {
        let lane_bytes_max = [self.file_bytes_max, self.guest_bytes_max].into_iter().flatten().min();
        Bounds { lane_bytes_max, ..self.bounds() }
    }
}

/// Whether anything would come.
pub fn records(arm: &Arm) -> bool {
    !arm.events.is_empty() || !matches!(arm.tracer.name.as_str(), "" | "nop")
}

impl MachinePlan {
    /// Whether anything would come.
    pub fn records(&self) -> bool {
        records(&self.arm)
    }
}

/// The clock that a trace clock other than [`CLOCK`] can be compared with; none for those that only the kernel reads.
pub fn wall_clock(clock: &str) -> Option<ClockId> {
    match clock {
        CLOCK | "mono" => Some(ClockId::CLOCK_MONOTONIC),
        "mono_raw" => Some(ClockId::CLOCK_MONOTONIC_RAW),
        "boot" => Some(ClockId::CLOCK_BOOTTIME),
        "tai" => Some(ClockId::CLOCK_TAI),
        _ => None,
    }
}
