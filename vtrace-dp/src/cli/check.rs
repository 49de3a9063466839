//! `vtrace check`

use std::{fs::File, path::Path};

use super::{FAILED, USAGE, args::CheckArgs, complaint::Complaint, put};
use crate::{
    analysis::check::{check, guest::GuestFile, report::Verdict},
    printable::chain,
    trace::read::{Reader, input::FileSource},
};

/// Checks and prints. Status 0: nothing contradicts the times; 1: something does; 2: nothing could be checked.
pub(super) fn run(args: &CheckArgs) -> Result<u8, Complaint> {
    let host = open(&args.host)?;
    let readers = args.guests.iter().map(|path| open(path)).collect::<Result<Vec<_>, _>>()?;
    let name = |path: &Path| path.display().to_string();
    let files = args.guests.iter().zip(&readers);
    let guests: Vec<_> = files.map(|(path, reader)| GuestFile { file: name(path), reader }).collect();
    let report = check(&host, &guests).map_err(|(guest, error)| {
        let path = guest.map_or(&args.host, |index| &args.guests[index]);
        Complaint::new(
            format!("cannot check {}", path.display()),
            chain(&error),
            "trace-cmd dump --validate tells more",
        )
    })?;
    if args.json {
        put(&serde_json::to_string_pretty(&report).expect("a report is plain data"))?;
    } else {
        put(&report.text(args.verbose))?;
    }
    Ok(match report.verdict() {
        Verdict::Exact | Verdict::WithinBound => 0,
        Verdict::Wrong => FAILED,
        Verdict::Unchecked => USAGE,
    })
}

fn open(path: &Path) -> Result<Reader<FileSource>, Complaint> {
    let failed = |why: String| Complaint::new(format!("cannot read {}", path.display()), why, "");
    let source = File::open(path).and_then(FileSource::new).map_err(|error| failed(error.to_string()))?;
    Reader::open(source).map_err(|fault| failed(chain(&fault)))
}
