//! `vtrace doctor`

use std::path::{Path, PathBuf};

use vtrace_common::{
    limits::{DEVICE_LANES_MAX, DEVICES_MAX},
    wire::client::GuestState,
};

use super::{
    FAILED,
    attach::{absolute, sockets},
    complaint::Complaint,
    control_args::DoctorArgs,
    list::guests,
    put,
};
use crate::{
    doctor::{Finding, Place, Verdict, disk, machine, server, vmm, worst},
    server::link::Link,
    vmm::{qmp::Qmp, running::look},
};

/// Prints a line for each check. Status 1 if one failed.
pub(super) fn run(args: &DoctorArgs) -> Result<u8, Complaint> {
    if args.qmp.is_some() && args.dom.len() != 1 {
        let why = format!("--qmp is one guest's, and {} are asked for", args.dom.len());
        return Err(Complaint::usage("cannot look", why, "one --dom"));
    }
    let place = Place::here();
    let mut findings = machine::all(&place, args.qemu.as_deref());
    findings.push(disk::disk(args.output.as_deref().unwrap_or(Path::new(".")), args.rate));
    findings.extend([server::run_directory(&args.dir), server::control_socket(&place, &args.dir)]);
    let mut link = Link::connect(&args.dir);
    findings.push(server::server(&link));
    let mut states = Vec::new();
    if let Ok(link) = &mut link {
        states = guests(link)?;
        findings.extend(server::guests(&states, &args.dom));
    }
    if let (Some(qmp), [guest]) = (&args.qmp, &args.dom[..]) {
        findings.extend(running(args, qmp, guest, states.iter().find(|state| state.name == *guest)));
    }
    if args.json {
        put(&serde_json::to_string_pretty(&findings).expect("a finding is plain data"))?;
    } else {
        put(&findings.iter().map(Finding::to_string).collect::<Vec<_>>().join("\n"))?;
    }
    Ok(if worst(&findings) == Verdict::Fail { FAILED } else { 0 })
}

/// What the guest's QEMU says; without a server, of the sockets that one would have.
fn running(args: &DoctorArgs, socket: &Path, guest: &str, state: Option<&GuestState>) -> Vec<Finding> {
    // One that systemd has opened has no path here.
    let named = state.map(|state| PathBuf::from(&state.socket)).filter(|path| path.is_absolute());
    let first = named.unwrap_or_else(|| args.dir.join(format!("{guest}.sock")));
    let devices = state.map_or(DEVICES_MAX, |state| state.further.len() + 1);
    let lanes = state.map_or(DEVICE_LANES_MAX, |state| usize::try_from(state.lanes_per_device).unwrap_or(1));
    let sockets = sockets(&absolute(&first), devices);
    let looked = Qmp::connect(socket).and_then(|mut qmp| look(&mut qmp, &sockets));
    vmm::vmm(vmm::Asked { guest, qmp: socket, lanes_per_device: lanes }, &looked)
}
