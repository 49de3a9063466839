//! One file finished: its pages, options and note are written; then it gets the form that was asked for.

use std::{fs::File, io};

use vtrace_common::{ids::Cpu, wire::agent::LaneReport};

use super::{
    finish_form::{PartFile, WantedForm, reform},
    machine_file::MachineFile,
};
use crate::{
    printable::chain, recorder::summary::MachineSummary, sys::folder_entry::FolderEntry,
    trace::format::option::TraceOption,
};

/// A remark about a lane that ended early.
pub(super) fn trouble_of(report: &LaneReport) -> Option<String> {
    (!report.trouble.is_empty()).then(|| format!("{}: {}", report.cpu, report.trouble))
}

/// Finishes one file; a failure is a remark.
pub(super) fn write(
    file: MachineFile,
    filled: &[(Cpu, u64)],
    cmdlines: &[u8],
    options: &[TraceOption],
    machine: &mut MachineSummary,
) {
    let note = serde_json::to_string(machine).expect("a summary is plain data");
    let path = file.output.path();
    match file.writer.finish(filled, cmdlines, options, &note) {
        Ok(finished) => machine.bytes = finished.bytes,
        Err(source) => {
            machine.failed = true;
            machine.remarks.push(format!("{} could not be finished: {}", path.display(), chain(&source)));
        }
    }
}

/// Counts the pages that newer ones have replaced (`-m`).
pub(super) fn note_old_pages(file: &MachineFile, filled: &[(Cpu, u64)], machine: &mut MachineSummary) {
    for (cpu, bytes) in filled {
        let area = file.writer.areas().iter().find(|area| area.cpu == *cpu);
        let kept = area.map_or(*bytes, |area| file.writer.kept_bytes(area, *bytes));
        let old = bytes.saturating_sub(kept);
        if let Some(lane) = machine.lanes.iter_mut().find(|lane| lane.cpu == cpu.0 && old > 0) {
            lane.pages_old = lane.ledger.pages_out * old / bytes;
        }
    }
    let old: u64 = machine.lanes.iter().map(|lane| lane.pages_old).sum();
    if old > 0 {
        machine.remarks.push(format!("{old} older pages were replaced by newer ones"));
    }
}

/// A file that gets another form once it is finished.
pub(super) struct Reform<'a> {
    entry: FolderEntry,
    file: io::Result<File>,
    wanted: WantedForm<'a>,
    parts: Vec<PartFile>,
}

impl<'a> Reform<'a> {
    pub(super) fn of(file: &MachineFile, wanted: WantedForm<'a>, parts: Vec<PartFile>) -> Self {
        Self { entry: file.output.entry().clone(), file: file.output.file.try_clone(), wanted, parts }
    }

    /// Rewrites the finished file; a failure is a remark.
    pub(super) fn apply(self, machine: &mut MachineSummary) {
        let Self { entry, file, wanted, parts } = self;
        if machine.bytes == 0 {
            return; // it could not be finished, which is a remark already
        }
        let failure = match file {
            Ok(file) => match reform(&entry, &file, parts, wanted) {
                Ok(bytes) => {
                    machine.bytes = bytes.unwrap_or(machine.bytes);
                    return;
                }
                Err(error) => chain(&error),
            },
            Err(error) => format!("{}: {error}", entry.path().display()),
        };
        machine.failed = true;
        machine.remarks.push(failure);
    }
}
