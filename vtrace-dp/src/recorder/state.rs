//! What is known of a recording while it runs, and what all its files share.
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
    guests::Guests,
    host::Host,
    instances::{self, Instance},
    plan::Plan,
    progress::Meter,
    session::{GuestSession, Trouble},
};
use crate::{
    clock::{
        scale::{Calibration, Scale},
        sync::Measurement,
        vcpus::Told,
        watch::{self, KvmFault, Watch},
    },
    sys::tsc,
    trace::format::option::TraceOption,
};

/// Everything of a running session.
pub(crate) struct Recording<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) guests: Option<Guests>,
    pub(crate) host: Host,
    /// The host's other buffers.
    pub(crate) instances: Vec<Instance>,
    /// Guests that could not be armed.
    pub(crate) left_out: Vec<(String, Trouble)>,
    pub(crate) calibration: Calibration,
    pub(crate) clocks: Vec<Clocks>,
    pub(crate) watch: Option<Watch>,
    /// What KVM told of all guests' vCPUs, once the recording is over.
    pub(crate) kvm: Result<Vec<Told>, KvmFault>,
    pub(crate) limit: Limit,
    pub(crate) meter: Meter,
    /// The files ended it.
    pub(crate) ended: Option<Ended>,
    /// The host's TSC before anything was traced.
    pub(crate) since: HostTsc,
}

/// One guest's clock, measured before and after.
#[derive(Default, Debug)]
pub(crate) struct Clocks {
    pub(crate) start: Vec<Measurement>,
    pub(crate) end: Vec<Measurement>,
}

/// What is the same in all files of a session.
pub(crate) struct Common {
    pub(crate) host_id: u64,
    pub(crate) scale: Scale,
    /// What makes times of day of the host's clock.
    pub(crate) date: Option<TraceOption>,
}

impl<'a> Recording<'a> {
    /// Prepares the host, whose tracing stays off, and takes over the guests.
    pub(crate) fn arm(plan: &'a Plan, guests: &mut Option<Guests>) -> Result<Self, RecordError> {
        let calibration = Calibration::begin();
        let host = Host::arm(&top_arm(plan))?;
        let instances = instances::arm(plan)?;
        Ok(Self {
            plan,
            guests: guests.take(),
            host,
            instances,
            left_out: Vec::new(),
            calibration,
            clocks: plan.guests.iter().map(|_| Clocks::default()).collect(),
            watch: None,
            kvm: Err(KvmFault::Unwatched),
            limit: Limit::new(plan.file_bytes_max, plan.guest_bytes_max),
            meter: Meter::default(),
            ended: None,
            since: HostTsc(tsc::read()),
        })
    }

    /// The guests' parts.
    pub(crate) fn sessions(&self) -> impl Iterator<Item = &GuestSession> {
        self.guests.iter().flat_map(|guests| &guests.sessions)
    }

    /// What is the same in all files, as far as it is known now; `host` is the host's file.
    pub(crate) fn common(&self, host: &MachineFile) -> Common {
        let scale = self.calibration.scale();
        let date = self.plan.date.then(|| date::option(&self.plan.host.arm.clock, &scale)).flatten();
        Common { host_id: host.trace_id, scale, date }
    }
}

/// What the host's top buffer records: where there are guests, what our own eBPF program says too.
fn top_arm(plan: &Plan) -> Arm {
    let mut arm = plan.host.arm.clone();
    if !plan.guests.is_empty() && watch::can_announce() {
        arm.events.push(EventRequest { pattern: watch::ANNOUNCED.into(), ..EventRequest::default() });
    }
    arm
}
