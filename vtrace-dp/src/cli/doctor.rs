//! `vtrace doctor`

use std::path::Path;

use super::{FAILED, complaint::Complaint, control_args::DoctorArgs, list::guests, put};
use crate::{
    doctor::{Finding, Place, Verdict, disk, machine, server, worst},
    server::link::Link,
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
