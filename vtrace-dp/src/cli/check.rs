//! `vtrace check`

use std::{fs::File, path::Path};

use super::{
    args::CheckArgs,
    complaint::Complaint,
    exit_status::{FAILED, USAGE},
    output::{put, put_json},
};
use crate::{
    analysis::check::{check, guest::GuestFile, report::ClockVerdict},
    printable::chain,
    trace::read::{Reader, input::FileSource},
};

/// Prints a report. Status 0: nothing contradicts the times; 1: something does; 2: nothing could be checked.
pub(super) fn run(args: &CheckArgs) -> Result<u8, Complaint> {
    let host = open(&args.host)?;
    let readers = args.guests.iter().map(|path| open(path)).collect::<Result<Vec<_>, _>>()?;
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

fn open(path: &Path) -> Result<Reader<FileSource>, Complaint> {
    let cannot = format!("cannot read {}", path.display());
    let source = File::open(path).and_then(FileSource::new).map_err(|error| Complaint::new(&cannot, error, ""))?;
    Reader::open(source).map_err(|fault| Complaint::new(&cannot, chain(&fault), ""))
}
