//! One machine's file while it is being recorded: areas for its lanes' pages, options stored early.
//!
//! In:    an opened file, a description and lanes; options as they become known
//! Out:   a [`Writer`] whose areas receive the pages
//! Runs:  on record's thread; the pump and the server write into the areas at the same time

use std::fs::File;

use vtrace_common::{
    ids::Cpu,
    wire::{agent::Armed, client::LaneLedger},
};

use super::output::{FileError, OutputFile};
use crate::{
    ftrace::metadata::Metadata,
    printable::chain,
    sys::random,
    trace::{
        format::option::TraceOption,
        write::{Bounds, Writer},
    },
};

/// A file that pages are being written to.
#[derive(Debug)]
pub(crate) struct MachineFile {
    pub(crate) output: OutputFile,
    pub(crate) trace_id: u64,
    pub(crate) writer: Writer,
    /// A guest's file opened with O_DIRECT, if its pages bypass the page cache.
    pub(crate) direct: Option<File>,
}

impl MachineFile {
    /// Writes the head, and reserves an area for each lane.
    pub(crate) fn create(
        metadata: &Metadata,
        armed: &Armed,
        output: OutputFile,
        bounds: Bounds,
    ) -> Result<Self, FileError> {
        let failed = |source| FileError { path: output.path().into(), what: "write", source };
        let file = output.file.try_clone().map_err(failed)?;
        let writer = Writer::create_bounded(file, metadata, &armed.clock, armed.page_bytes, &armed.lanes, bounds);
        let writer = writer.map_err(|fault| failed(fault.into()))?;
        Ok(Self { output, trace_id: random() | 1, writer, direct: None })
    }

    /// Stores options for `restore`. A failure is only logged: a recording that ends in order writes them again.
    pub(crate) fn keep(&mut self, options: &[TraceOption]) {
        if let Err(fault) = self.writer.update_options(options) {
            log::warn!("{}: {}", self.output.path().display(), chain(&fault));
        }
    }

    /// Frees the blocks of pages that are too old; `written`: bytes written to each lane so far.
    pub(crate) fn drop_older(&mut self, written: &[(Cpu, u64)]) {
        if let Err(error) = self.writer.drop_older(written) {
            log::debug!("{}: old pages keep their blocks: {error}", self.output.path().display());
        }
    }
}

/// Bytes that were written to each lane's area.
pub(crate) fn filled(ledgers: &[LaneLedger]) -> Vec<(Cpu, u64)> {
    ledgers.iter().map(|lane| (lane.cpu, lane.ledger.bytes_out)).collect()
}
