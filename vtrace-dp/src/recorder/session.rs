//! The state of a running recording, and the facts that all its files share.
//!
//! In:    filled by [`super::run`], in its order
//! Out:   read by [`super::files`] and [`super::clocks`]
//! Runs:  on record's thread

use vtrace_common::{
    time::HostTsc,
    wire::agent::{Arm, EventRequest},
};

use super::{
    error::RecordError,
    files::{
        date,
        limit::{Ended, Limit},
        machine_file::MachineFile,
    },
    guests::{
        Guests,
        session::{GuestSession, Trouble},
    },
    host::{
        Host,
        instances::{self, Instance},
    },
    plan::Plan,
    progress::Meter,
};
use crate::{
    clock::{
        scale::{Calibration, Scale},
        sync::Measurement,
        vcpus::TimedChange,
        watch::{self, KvmFault, Watch},
    },
    sys::tsc,
    trace::format::option::TraceOption,
};

/// A recording from its arming to its summary.
pub(crate) struct Recording<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) guests: Option<Guests>,
    pub(crate) host: Host,
    /// The host's other buffers.
    pub(crate) instances: Vec<Instance>,
    /// Guests that could not be armed (`--keep-going`).
    pub(crate) left_out: Vec<(String, Trouble)>,
    pub(crate) calibration: Calibration,
    /// One entry per guest session.
    pub(crate) clocks: Vec<ClockReadings>,
    pub(crate) watch: Option<Watch>,
    /// KVM's reports on the vCPUs of all guests, once the recording has stopped.
    pub(crate) kvm: Result<Vec<TimedChange>, KvmFault>,
    pub(crate) limit: Limit,
    pub(crate) meter: Meter,
    /// Set when the files end the recording.
    pub(crate) ended: Option<Ended>,
    /// The host's TSC before tracing was switched on.
    pub(crate) since: HostTsc,
}

/// Measurements of one guest's clock at both ends of a recording.
#[derive(Default, Debug)]
pub(crate) struct ClockReadings {
    pub(crate) start: Vec<Measurement>,
    pub(crate) end: Vec<Measurement>,
}

/// Facts that all files of a recording share.
pub(crate) struct SharedFacts {
    /// The trace id of the host's file.
    pub(crate) host_id: u64,
    /// TSC cycles to nanoseconds.
    pub(crate) scale: Scale,
    /// The DATE option, if times of day were asked for.
    pub(crate) date: Option<TraceOption>,
}

impl<'a> Recording<'a> {
    /// Arms the host, whose tracing stays off, and takes over the guests.
    pub(crate) fn arm(plan: &'a Plan, guests: &mut Option<Guests>) -> Result<Self, RecordError> {
        let calibration = Calibration::begin();
        let host = Host::arm(&host_arm(plan), true)?;
        let instances = instances::arm(plan)?;
        Ok(Self {
            plan,
            guests: guests.take(),
            host,
            instances,
            left_out: Vec::new(),
            calibration,
            clocks: plan.guests.iter().map(|_| ClockReadings::default()).collect(),
            watch: None,
            kvm: Err(KvmFault::Unwatched),
            limit: Limit::new(plan.file_bytes_max, plan.guest_bytes_max),
            meter: Meter::default(),
            ended: None,
            since: HostTsc(tsc::read()),
        })
    }

    /// The guests' sessions, in the order typed.
    pub(crate) fn sessions(&self) -> impl Iterator<Item = &GuestSession> {
        self.guests.iter().flat_map(|guests| &guests.sessions)
    }

    /// The shared facts as they are known now; `host` is the host's file.
    pub(crate) fn shared(&self, host: &MachineFile) -> SharedFacts {
        let scale = self.calibration.scale();
        let date = self.plan.date.then(|| date::option(&self.plan.host.arm.clock, &scale)).flatten();
        SharedFacts { host_id: host.trace_id, scale, date }
    }
}

/// What the host's top buffer records: the plan's events, and with guests the announcements of our eBPF program.
fn host_arm(plan: &Plan) -> Arm {
    let mut arm = plan.host.arm.clone();
    if !plan.guests.is_empty() && watch::can_announce() {
        arm.events.push(EventRequest { pattern: watch::ANNOUNCED.into(), ..EventRequest::default() });
    }
    arm
}
