//! `vtrace restore`

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{
    args::RestoreArgs,
    complaint::Complaint,
    exit_status::{FAILED, LOST},
    input,
    output::{put, put_json},
};
use crate::{
    printable::chain,
    sys::folder_entry::FolderEntry,
    trace::{
        format::{layout::MAGIC, option::TraceOption},
        read::{
            Reader,
            input::{FileSource, Source},
        },
        restore::{RestoreFault, Restored, Was, restore},
    },
};

/// The result for one file.
#[derive(Serialize)]
struct RestoredFile {
    file: String,
    #[serde(flatten)]
    restored: Option<Restored>,
    error: Option<String>,
}

/// Restores every file and prints a line for each, and one for each of its lanes.
pub(super) fn run(args: &RestoreArgs) -> Result<u8, Complaint> {
    let mut outcomes = Vec::new();
    for path in &args.paths {
        if path.is_dir() {
            outcomes.extend(traces(path)?.into_iter().filter_map(|file| restore_in_folder(&file)));
        } else {
            outcomes.push(outcome(path, restore_one(path)));
        }
    }
    if args.json {
        put_json(&outcomes)?;
    } else if outcomes.is_empty() {
        put("no files of vtrace found")?;
    } else {
        put(&outcomes.iter().map(text).collect::<Vec<_>>().join("\n"))?;
    }
    Ok(exit_status(args, &outcomes))
}

fn exit_status(args: &RestoreArgs, outcomes: &[RestoredFile]) -> u8 {
    let is_missing = |outcome: &RestoredFile| outcome.restored.as_ref().is_some_and(Restored::is_missing_pages);
    match () {
        () if outcomes.iter().any(|outcome| outcome.error.is_some()) => FAILED,
        () if args.strict && outcomes.iter().any(is_missing) => LOST,
        () => 0,
    }
}

/// The files of a directory that begin like trace.dat, sorted by name.
fn traces(folder: &Path) -> Result<Vec<PathBuf>, Complaint> {
    let failed = |error| Complaint::new(format!("cannot read {}", folder.display()), error, "");
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if is_trace(&path) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn is_trace(path: &Path) -> bool {
    let mut magic = [0; MAGIC.len()];
    let Ok(mut file) = input::open(path, fs::OpenOptions::new().read(true)) else { return false };
    file.read_exact(&mut magic).is_ok() && magic == MAGIC
}

/// `None` for a trace of another program: it was not named on the command line.
fn restore_in_folder(path: &Path) -> Option<RestoredFile> {
    let result = restore_one(path);
    (!matches!(result, Err(RestoreFault::NotOurs))).then(|| outcome(path, result))
}

fn restore_one(path: &Path) -> Result<Restored, RestoreFault> {
    let file = FolderEntry::resolve(path)
        .and_then(|entry| entry.open())
        .map_err(|source| RestoreFault::Io { action: "open", source })?;
    let same_file = file.try_clone().map_err(|source| RestoreFault::Io { action: "open", source })?;
    match restore(file) {
        // Version 6, compressed files and those with instances are written when a recording has ended.
        Err(RestoreFault::NotOurs) => finished(same_file).ok_or(RestoreFault::NotOurs),
        result => result,
    }
}

/// A file of vtrace's that can be read as a whole.
fn finished(file: fs::File) -> Option<Restored> {
    let reader = Reader::open(FileSource::new(file).ok()?).ok()?;
    let is_ours =
        |option: &TraceOption| matches!(option, TraceOption::Version(version) if version.starts_with("vtrace"));
    reader.options().iter().any(is_ours).then(|| Restored {
        was: Was::Finished,
        bytes: reader.source().bytes(),
        sparse: false,
        linked: true,
        converted: 0,
        lanes: Vec::new(),
    })
}

fn outcome(path: &Path, result: Result<Restored, RestoreFault>) -> RestoredFile {
    let (restored, error) = match result {
        Ok(restored) => (Some(restored), None),
        Err(fault) => (None, Some(chain(&fault))),
    };
    RestoredFile { file: path.display().to_string(), restored, error }
}

fn text(outcome: &RestoredFile) -> String {
    let file = &outcome.file;
    let restored = match (&outcome.restored, &outcome.error) {
        (Some(restored), _) => restored,
        (None, error) => return format!("{file}: not restored: {}", error.as_deref().unwrap_or_default()),
    };
    let was = match restored.was {
        Was::Finished => return format!("{file}: finished already ({} bytes)", restored.bytes),
        Was::Open => "was being recorded",
        Was::Closed => "was being finished",
    };
    let mut lines = vec![format!("{file}: restored, {was} ({} bytes)", restored.bytes)];
    lines.push(format!("  {:<6} {:>10} {:>10} {:>10} {:>10}", "cpu", "pages", "missing", "torn", "left out"));
    lines.extend(restored.lanes.iter().map(|lane| {
        let [pages, missing, torn, left] = [lane.pages, lane.pages_missing, lane.pages_torn, lane.pages_left_out];
        format!("  {:<6} {pages:>10} {missing:>10} {torn:>10} {left:>10}", lane.cpu)
    }));
    if restored.converted > 0 {
        lines.push(format!("  {} events were converted to the host's time", restored.converted));
    }
    if restored.sparse {
        lines.push("  there are holes between its lanes: copy it with cp, tar -S or rsync -S".into());
    }
    if !restored.linked {
        lines.push("  recording was killed before the clock was known: times are TSC cycles".into());
    }
    lines.join("\n")
}
