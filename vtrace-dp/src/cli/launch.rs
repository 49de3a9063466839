//! `vtrace launch`: joins the processes that are traced, changes the user if requested, then executes the command.
//!
//! Another process cannot add it in time: its first instructions would be missing. Only root may write to tracefs, so the
//! user changes last.

use std::{os::unix::process::CommandExt, process};

use super::{complaint::Complaint, exit_status::FAILED, record_args::LaunchArgs};
use crate::tracefs;

/// Exit status of a shell whose command was not found (POSIX, 2.8.2).
const NOT_FOUND: u8 = 127;

/// Executes the command; returns only if that fails.
pub(super) fn run(args: &LaunchArgs) -> Result<u8, Complaint> {
    let (program, arguments) = args.command.split_first().expect("clap asks for a command");
    args.buffer
        .iter()
        .try_for_each(|buffer| tracefs::join(buffer))
        .map_err(|failure| Complaint::new(failure.object, failure.detail, "check that the recording still runs"))?;
    let mut command = process::Command::new(program);
    command.args(arguments);
    if let (Some(uid), Some(gid)) = (args.uid, args.gid) {
        command.uid(uid).gid(gid);
    }
    let error = command.exec();
    let status = if error.kind() == std::io::ErrorKind::NotFound { NOT_FOUND } else { FAILED };
    let mut complaint = Complaint::new(program.display(), error, "");
    complaint.status = status;
    Err(complaint)
}
