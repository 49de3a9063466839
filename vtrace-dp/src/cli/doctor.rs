//! `vtrace doctor`

use std::path::{Path, PathBuf};

use vtrace_common::{
    limits::{DEVICE_LANES_MAX, DEVICES_MAX},
    wire::client::GuestState,
};

use super::{
    attach::{absolute, sockets},
    complaint::Complaint,
    control_args::DoctorArgs,
    exit_status::FAILED,
    list::guests,
    output::{put, put_json},
};
use crate::{
    doctor::{Finding, Severity, SystemPaths, disk, machine, server, vmm, worst},
    server::link::Link,
    vmm::{qmp::Qmp, running::inspect},
};

/// Prints a line for each check. Status 1 if one failed.
pub(super) fn run(args: &DoctorArgs) -> Result<u8, Complaint> {
    if args.qmp.is_some() && args.dom.len() != 1 {
        let why = format!("--qmp needs one guest, but {} are given", args.dom.len());
        return Err(Complaint::usage("cannot check", why, "give one --dom"));
    }
    let paths = SystemPaths::of_this_machine();
    let mut findings = machine::all(&paths, args.qemu.as_deref());
    findings.push(disk::disk(args.output.as_deref().unwrap_or(Path::new(".")), args.rate));
    findings.extend([server::run_directory(&args.dir), server::control_socket(&paths, &args.dir)]);
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
        put_json(&findings)?;
    } else {
        put(&findings.iter().map(Finding::to_string).collect::<Vec<_>>().join("\n"))?;
    }
    Ok(if worst(&findings) == Severity::Fail { FAILED } else { 0 })
}

/// Inspects the guest's QEMU; without a server, for its default sockets.
fn running(args: &DoctorArgs, socket: &Path, guest: &str, state: Option<&GuestState>) -> Vec<Finding> {
    // A socket passed by systemd has no path here.
    let named = state.map(|state| PathBuf::from(&state.socket)).filter(|path| path.is_absolute());
    let first = named.unwrap_or_else(|| args.dir.join(format!("{guest}.sock")));
    let devices = state.map_or(DEVICES_MAX, |state| state.further.len() + 1);
    let lanes = state.map_or(DEVICE_LANES_MAX, |state| usize::try_from(state.lanes_per_device).unwrap_or(1));
    let sockets = sockets(&absolute(&first), devices);
    let inspected = Qmp::connect(socket).and_then(|mut qmp| inspect(&mut qmp, &sockets));
    vmm::vmm(vmm::GuestVm { guest, qmp: socket, lanes_per_device: lanes }, &inspected)
}
