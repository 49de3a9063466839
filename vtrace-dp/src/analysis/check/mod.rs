//! Are a guest's times where the host says that its vCPUs ran?
//!
//! In:    the trace.dat of a host and those of its guests, ours or stock trace-cmd's
//! Out:   [`Report`]: for each guest how many events lie in the windows of their vCPU, and a verdict
//! Runs:  on the caller's thread; once through each file
//! Full:  windows are held, events are not; see [`super::host_windows::BOUNDARIES_MAX`] and [`super::pairs::CAUSES_MAX`]
//! Trust: nothing: files come from anyone, and a guest's events from the guest
//!
//! A guest's code runs between kvm_entry and kvm_exit of its vCPU's thread and at no other time. So each of its events,
//! once converted as stock readers do ([`crate::trace::read::times`]), must lie in one of these windows; one that does not
//! has a wrong time. Where the host's file has no kvm_entry (TCG, PVM), the thread must at least have been on a CPU.

pub mod guest;
pub mod report;

use std::collections::BTreeMap;

use vtrace_common::ids::Cpu;

use super::{CheckError, host_windows::HostWindows};
use crate::trace::{
    format::option::TraceOption,
    read::{Reader, input::Source},
};
use guest::{GuestFile, Vcpus, check_guest};
use report::{GuestReport, Report};

/// Checks guests against their host.
///
/// # Errors
/// A file that cannot be read to its end: which one (`None`: the host's), and why.
pub fn check<S: Source>(host: &Reader<S>, guests: &[GuestFile<'_, S>]) -> Result<Report, (Option<usize>, CheckError)> {
    let named: Vec<Vcpus> = guests.iter().map(|guest| named(host, guest.reader)).collect();
    let threads: Vec<u32> = named.iter().flat_map(|vcpus| vcpus.threads.values().copied()).collect();
    let mut seen = HostWindows::read(host, &threads).map_err(|error| (None, error))?;
    let mut report = Report { guests: Vec::new() };
    for (index, (guest, mut vcpus)) in guests.iter().zip(named).enumerate() {
        if vcpus.threads.is_empty() && guests.len() == 1 {
            learn(&mut vcpus, &seen);
        }
        let checked: Result<GuestReport, CheckError> = check_guest(host, &mut seen, guest, &vcpus);
        report.guests.push(checked.map_err(|error| (Some(index), error))?);
    }
    Ok(report)
}

/// What the host's GUEST option says of this file.
fn named<S: Source>(host: &Reader<S>, guest: &Reader<S>) -> Vcpus {
    let id = guest.options().iter().find_map(|option| match option {
        TraceOption::TraceId(id) => Some(*id),
        _ => None,
    });
    let link = host.options().iter().find_map(|option| match option {
        TraceOption::Guest { name, trace_id, vcpus } if Some(*trace_id) == id => Some((name, vcpus)),
        _ => None,
    });
    match link {
        Some((name, vcpus)) => Vcpus {
            name: Some(name.clone()),
            threads: vcpus.iter().copied().filter(|(_, thread)| *thread > 0).collect(),
            note: None,
        },
        None => Vcpus { note: Some("the host's file does not name this guest".into()), ..Vcpus::default() },
    }
}

/// The host does not say whose thread is whose, but there is only this guest, and each vCPU id has one thread.
fn learn(vcpus: &mut Vcpus, host: &HostWindows) {
    let mut threads = BTreeMap::new();
    for (thread, vcpu) in &host.vcpu_ids {
        if threads.insert(Cpu(*vcpu), *thread).is_some() {
            return;
        }
    }
    if !threads.is_empty() {
        vcpus.threads = threads;
        vcpus.note = Some("its threads are taken from kvm_entry: vCPU ids are assumed to be CPU numbers".into());
    }
}

#[cfg(test)]
mod tests;
