//! Whose word is taken for a guest's times: KVM's, where it is known and can be written; else what was measured.
//!
//! In:    measurements at both ends, what KVM said meanwhile
//! Out:   [`GuestClock`]: the plan of the file's times, and what the summary says of it
//! Trust: KVM; a guest's measurements are checked against it, its own word places only its own events

use super::{
    files::{Common, chain},
    run::{Clocks, Recording},
    session::GuestSession,
    summary::{ClockSummary, KVM, MEASURED},
};
use crate::clock::{
    plan::{ClockPlan, plan},
    ratio::Isa,
    vcpus::{Vcpu, exactly, of_guest, segments},
};

/// How one guest's times become host times.
pub(super) struct GuestClock {
    /// Of the file; nothing if the guest's times stay its own.
    pub(super) plan: Option<ClockPlan>,
    /// Of the closing table.
    pub(super) summary: Option<ClockSummary>,
}

impl GuestClock {
    /// Decides for the guest `index`, which was armed.
    pub(super) fn of(recording: &Recording, index: usize, session: &GuestSession, common: &Common) -> Self {
        let clocks = &recording.clocks[index];
        let isa = Isa::of_this_machine().unwrap_or(Isa::None);
        let (kvm, why) = match by_kvm(recording, clocks, session, isa) {
            Ok(kvm) => (kvm, None),
            Err(why) => (Vec::new(), Some(why)),
        };
        let lanes = session.armed.as_ref().map(|armed| armed.lanes.clone()).unwrap_or_default();
        if let Some(exact) = exactly(&kvm, isa).filter(|exact| !exact.is_empty()) {
            let plan = plan(&exact, &[], &lanes, common.host_id);
            let summary = plan.as_ref().map(|plan| summary(KVM, plan, common, kvm, None));
            return Self { plan, summary };
        }
        let why = why.unwrap_or_else(|| "what KVM did to its TSC is in the file's note only".into());
        let plan = plan(&clocks.start, &clocks.end, &lanes, common.host_id);
        let summary = plan.as_ref().map(|plan| summary(MEASURED, plan, common, kvm, Some(why)));
        Self { plan, summary }
    }

    /// What KVM said of it; nothing if that is not known.
    pub(super) fn kvm(&self) -> &[Vcpu] {
        self.summary.as_ref().map(|summary| &summary.kvm[..]).unwrap_or_default()
    }
}

/// The guest's vCPUs as KVM told them, or why they are not known.
fn by_kvm(recording: &Recording, clocks: &Clocks, session: &GuestSession, isa: Isa) -> Result<Vec<Vcpu>, String> {
    let told = recording.kvm.as_ref().map_err(|fault| chain(fault))?;
    let (Some(claimed), Some(armed)) = (&session.claimed, &session.armed) else {
        return Err("it was not armed".into());
    };
    let measured = [&clocks.start[..], &clocks.end[..]].concat();
    let apics = &claimed.machine.apics;
    of_guest(told, claimed.vmm_pid, apics, &armed.lanes, &measured, isa).map_err(|unknown| unknown.to_string())
}

fn summary(
    source: &str,
    plan: &ClockPlan,
    common: &Common,
    kvm: Vec<Vcpu>,
    why_measured: Option<String>,
) -> ClockSummary {
    ClockSummary {
        source: source.into(),
        vcpus: plan.vcpus,
        bound_ns: common.scale.ns(plan.bound_cycles),
        steady: plan.steady,
        segments: segments(&kvm),
        kvm,
        why_measured,
    }
}
