//! One machine's file while it is recorded: pages have their places in it, and what is known is kept in it.
//!
//! In:    an opened file, a description and lanes; options as they become known
//! Out:   a [`Writer`] whose areas pages go to
//! Runs:  on record's thread; others write into the areas meanwhile
//! Full:  as [`crate::trace::write`]
//! Trust: as [`crate::trace::write`]

use std::fs::File;

use vtrace_common::{ids::Cpu, wire::agent::Armed};

use super::output::{FileError, Output};
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
    pub(crate) output: Output,
    pub(crate) trace_id: u64,
    pub(crate) writer: Writer,
    /// A guest's file once more, past the page cache, if it is written so.
    pub(crate) direct: Option<File>,
}

impl MachineFile {
    /// Writes the head, and reserves an area for each lane.
    pub(crate) fn create(
        metadata: &Metadata,
        armed: &Armed,
        output: Output,
        bounds: Bounds,
    ) -> Result<Self, FileError> {
        let failed = |source| FileError { path: output.path().into(), what: "write", source };
        let file = output.file.try_clone().map_err(failed)?;
        let writer = Writer::create_bounded(file, metadata, &armed.clock, armed.page_bytes, &armed.lanes, bounds);
        let writer = writer.map_err(|fault| failed(fault.into()))?;
        Ok(Self { output, trace_id: random() | 1, writer, direct: None })
    }

    /// Keeps options in it. A file that cannot keep them is no worse if its recording ends well.
    pub(crate) fn keep(&mut self, options: &[TraceOption]) {
        if let Err(fault) = self.writer.update_options(options) {
            log::warn!("{}: {}", self.output.path().display(), chain(&fault));
        }
    }

    /// Gives the room of pages back that are too old, when so many bytes were written to each lane.
    pub(crate) fn drop_older(&mut self, written: &[(Cpu, u64)]) {
        if let Err(error) = self.writer.drop_older(written) {
            log::debug!("{}: old pages keep their room: {error}", self.output.path().display());
        }
    }
}
