//! `vtrace doctor`

use std::path::Path;

use vtrace_common::wire::client::{FromServer, GuestState, ToServer};

use super::{FAILED, complaint::Complaint, control_args::DoctorArgs, list::ANSWER_MAX, put};
use crate::{
    doctor::{Finding, Place, Verdict, disk, machine, server, worst},
    server::link::{Link, LinkError},
};

/// Prints a line for each check. Status 1 if one failed.
pub(super) fn run(args: &DoctorArgs) -> Result<u8, Complaint> {
    let place = Place::here();
    let mut findings = machine::all(&place, args.qemu.as_deref());
    findings.push(disk::disk(args.output.as_deref().unwrap_or(Path::new(".")), args.rate));
    findings.extend([server::run_directory(&args.dir), server::control_socket(&place, &args.dir)]);
    let mut link = Link::connect(&args.dir);
    findings.push(server::server(&link));
    if let Ok(link) = &mut link {
        findings.extend(server::guests(&guests(link)?, &args.dom));
    }
    if args.json {
        put(&serde_json::to_string_pretty(&findings).expect("a finding is plain data"))?;
    } else {
        put(&findings.iter().map(Finding::to_string).collect::<Vec<_>>().join("\n"))?;
    }
    Ok(if worst(&findings) == Verdict::Fail { FAILED } else { 0 })
}

fn guests(link: &mut Link) -> Result<Vec<GuestState>, LinkError> {
    link.send(&ToServer::List)?;
    match link.receive(Some(ANSWER_MAX))? {
        Some(FromServer::Guests(guests)) => Ok(guests),
        _ => Ok(Vec::new()),
    }
}
