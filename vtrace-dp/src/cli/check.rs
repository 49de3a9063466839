//! `vtrace check`

use std::{fs::OpenOptions, path::Path};

use super::{
    args::CheckArgs,
    complaint::Complaint,
    exit_status::{FAILED, USAGE},
    input,
    output::{put, put_json},
};
use crate::{
    analysis::check::{check, guest::GuestFile, report::ClockVerdict},
    printable::chain,
    trace::{
        format::option::TraceOption,
        read::{Reader, input::FileSource},
    },
};

/// Prints a report. Status 0: nothing contradicts the times; 1: something does; 2: nothing could be checked.
pub(super) fn run(args: &CheckArgs) -> Result<u8, Complaint> {
    let host = open(&args.host)?;
    let readers = args.guests.iter().map(|path| open(path)).collect::<Result<Vec<_>, _>>()?;
    check_order(args, &host, &readers)?;
    let guests: Vec<GuestFile<'_, FileSource>> = args
        .guests
        .iter()
        .zip(&readers)
        .map(|(path, reader)| GuestFile { file: path.display().to_string(), reader })
        .collect();
    let report = check(&host, &guests).map_err(|(guest, error)| {
        let path = guest.map_or(&args.host, |index| &args.guests[index]);
        Complaint::new(format!("cannot check {}", path.display()), chain(&error), "see trace-cmd dump --validate")
    })?;
    if args.json {
        put_json(&report)?;
    } else {
        put(&report.text(args.verbose))?;
    }
    Ok(match report.verdict() {
        ClockVerdict::Exact | ClockVerdict::WithinBound => 0,
        ClockVerdict::Wrong => FAILED,
        ClockVerdict::Unchecked => USAGE,
    })
}

/// Refuses a host that is given as a guest.
fn check_order(args: &CheckArgs, host: &Reader<FileSource>, guests: &[Reader<FileSource>]) -> Result<(), Complaint> {
    let host_id = trace_id(host);
    for (path, guest) in args.guests.iter().zip(guests) {
        let (host_path, guest_path) = (args.host.display(), path.display());
        if host_id.is_some() && trace_id(guest) == host_id {
            let why = format!("{host_path} and {guest_path} are of the same machine");
            return Err(Complaint::usage("cannot check", why, "give the host's file, then those of its guests"));
        }
        let names_host =
            |option: &TraceOption| matches!(option, TraceOption::Guest { trace_id, .. } if Some(*trace_id) == host_id);
        if guest.options().iter().any(names_host) {
            let why = format!("{guest_path} is the host's file, {host_path} that of its guest");
            return Err(Complaint::usage("cannot check", why, format!("vtrace check {guest_path} {host_path}")));
        }
    }
    Ok(())
}

/// Session id of the file's machine.
fn trace_id(reader: &Reader<FileSource>) -> Option<u64> {
    reader.options().iter().find_map(|option| match option {
        TraceOption::TraceId(id) => Some(*id),
        _ => None,
    })
}

fn open(path: &Path) -> Result<Reader<FileSource>, Complaint> {
    let cannot = format!("cannot read {}", path.display());
    let file = input::open(path, OpenOptions::new().read(true)).map_err(|error| Complaint::new(&cannot, error, ""))?;
    let source = FileSource::new(file).map_err(|error| Complaint::new(&cannot, error, ""))?;
    Reader::open(source).map_err(|fault| Complaint::new(&cannot, chain(&fault), ""))
}
