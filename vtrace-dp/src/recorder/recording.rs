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
    date,
    error::RecordError,
    file::MachineFile,
    guests::Guests,
    host::Host,
    instances::{self, Instance},
    kvm::{self, KvmFault, Watch},
    limit::{Ended, Limit},
    plan::Plan,
    progress::Meter,
    session::{GuestSession, Trouble},
    tsc::{Calibration, Scale},
};
use crate::{
    clock::{sync::Measurement, vcpus::Told},
    sys::tsc,
    trace::option::TraceOption,
};

/// Everything of a running session.
pub(super) struct Recording<'a> {
    pub(super) plan: &'a Plan,
    pub(super) guests: Option<Guests>,
    pub(super) host: Host,
    /// The host's other buffers.
    pub(super) instances: Vec<Instance>,
    /// Guests that could not be armed.
    pub(super) left_out: Vec<(String, Trouble)>,
    pub(super) calibration: Calibration,
    pub(super) clocks: Vec<Clocks>,
    pub(super) watch: Option<Watch>,
    /// What KVM told of all guests' vCPUs, once the recording is over.
    pub(super) kvm: Result<Vec<Told>, KvmFault>,
    pub(super) limit: Limit,
    pub(super) meter: Meter,
    /// The files ended it.
    pub(super) ended: Option<Ended>,
    /// The host's TSC before anything was traced.
    pub(super) since: HostTsc,
}

/// One guest's clock, measured before and after.
#[derive(Default, Debug)]
pub(super) struct Clocks {
    pub(super) start: Vec<Measurement>,
    pub(super) end: Vec<Measurement>,
}

/// What is the same in all files of a session.
pub(super) struct Common {
    pub(super) host_id: u64,
    pub(super) scale: Scale,
    /// What makes times of day of the host's clock.
    pub(super) date: Option<TraceOption>,
}

impl<'a> Recording<'a> {
    /// Prepares the host, whose tracing stays off, and takes over the guests.
    pub(super) fn arm(plan: &'a Plan, guests: &mut Option<Guests>) -> Result<Self, RecordError> {
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
    pub(super) fn sessions(&self) -> impl Iterator<Item = &GuestSession> {
        self.guests.iter().flat_map(|guests| &guests.sessions)
    }

    /// What is the same in all files, as far as it is known now; `host` is the host's file.
    pub(super) fn common(&self, host: &MachineFile) -> Common {
        let scale = self.calibration.scale();
        let date = self.plan.date.then(|| date::option(&self.plan.host.arm.clock, &scale)).flatten();
        Common { host_id: host.trace_id, scale, date }
    }
}

/// What the host's top buffer records: where there are guests, what our own eBPF program says too.
fn top_arm(plan: &Plan) -> Arm {
    let mut arm = plan.host.arm.clone();
    if !plan.guests.is_empty() && kvm::can_announce() {
        arm.events.push(EventRequest { pattern: kvm::ANNOUNCED.into(), ..EventRequest::default() });
    }
    arm
}
