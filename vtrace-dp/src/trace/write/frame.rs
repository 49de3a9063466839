//! What is fixed in a file from its beginning, and how its end is written.
//!
//! In:    where descriptions, areas and the room for what comes late are; at the end: where the pages are, texts
//! Out:   a finished file, for the recording as for `restore` after a crash
//! Runs:  on the caller's thread, after the last page is written
//! Full:  every step leaves a file that `restore` can finish
//! Trust: the caller has checked all offsets
//!
//! Order: areas say *closed* ─► options and all, places of the pages left wrong, no pointer to them yet ─► holes out ─►
//! the same bytes with the right places ─► pointer ─► areas say *finished*. From the second step on the options can be
//! read back from where they are, before it from [`super::early_options`].

use std::{fs::File, io, os::unix::fs::FileExt};

use vtrace_common::{ids::Cpu, limits::CMDLINES_BYTES_MAX};

use super::{
    collapse::{COPY_BYTES_MAX, Collapse, Compaction, STEP_BYTES},
    early_options::{self, RawOption},
};
use crate::trace::format::{
    areas::{Areas, LaneArea, WriteState},
    description,
    layout::{
        AREA_BYTES_MIN, NOTES_BYTES_MAX, OPTION_HEADER_BYTES, OPTIONS_BYTES_MAX, OPTIONS_POINTER_AT,
        SECTION_HEADER_BYTES, id,
    },
    option::{self, OptionFault, TraceOption},
    section::{self, SectionHeader, bytes_of},
};

/// Why a file cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteFault {
    /// Not a page size of ftrace.
    #[error("a page of {0} bytes")]
    PageSize(u32),
    /// More lanes than a machine has CPUs, or the same twice.
    #[error("too many lanes, or one twice")]
    Lanes,
    /// A lane that was not reserved, or more in it than was.
    #[error("{cpu} holds {bytes} bytes that its area does not")]
    Filled {
        /// Which lane.
        cpu: Cpu,
        /// What it is said to hold.
        bytes: u64,
    },
    /// A text is too long.
    #[error("{what} of {bytes} bytes, more than {bytes_max}")]
    TooLong {
        /// What the text is.
        what: &'static str,
        /// Its length.
        bytes: usize,
        /// The longest allowed.
        bytes_max: usize,
    },
    /// An option that no file can hold.
    #[error("cannot write an option")]
    Option(#[from] OptionFault),
    /// The file system (or a limit of this process) does not allow files large enough.
    #[error("no room for areas of {AREA_BYTES_MIN} bytes")]
    NoRoom(#[source] io::Error),
    /// Reading, writing or moving failed.
    #[error("cannot {action}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl From<WriteFault> for io::Error {
    fn from(fault: WriteFault) -> Self {
        match &fault {
            WriteFault::Io { source, .. } | WriteFault::NoRoom(source) => Self::new(source.kind(), fault),
            _ => Self::new(io::ErrorKind::InvalidInput, fault),
        }
    }
}

/// Ids and offsets of the sections that are written once.
pub(crate) type Sections = Vec<(u16, u64)>;

/// The fixed parts of a file.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) file: File,
    pub(crate) clock: String,
    pub(crate) page_bytes: u32,
    /// Lanes begin at multiples of this.
    pub(crate) unit: u64,
    pub(crate) sections: Sections,
    pub(crate) areas_at: u64,
    pub(crate) tail_at: u64,
}

/// What is written at the end.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Texts {
    pub(crate) cmdlines: Vec<u8>,
    pub(crate) options: Vec<RawOption>,
    pub(crate) notes: String,
    /// Payloads of sections of ours that no option points to.
    pub(crate) segments: Vec<Vec<u8>>,
}

/// A finished file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Finished {
    /// Its size.
    pub bytes: u64,
    /// What became of the holes between the areas.
    pub compaction: Compaction,
}

impl Frame {
    /// Says that all pages are where `areas` says, and puts the texts where `restore` finds them; gives where the tail
    /// ends.
    pub(crate) fn close(&self, areas: &mut Areas, texts: &Texts) -> Result<u64, WriteFault> {
        areas.state = WriteState::Closed;
        self.save(areas)?;
        // The tail's length does not depend on where the data will be: no option is written in numbers of varying length.
        let tail = self.tail(texts, &areas.lanes)?;
        let tail_end = self.tail_at + tail.bytes();
        let start = tail_end.next_multiple_of(self.unit);
        let begins = |lane: &LaneArea| [lane.moved, lane.rest].into_iter().filter(|part| part.bytes > 0);
        if areas.lanes.iter().flat_map(begins).any(|part| part.offset < start) {
            return Err(WriteFault::TooLong { what: "the end", bytes: tail.bytes.len(), bytes_max: 0 });
        }
        self.write_tail(&tail, 0, areas.file_bytes.max(tail_end))?;
        Ok(tail_end)
    }

    /// Finishes a file whose pages are where `areas` says.
    pub(crate) fn finish(&self, mut areas: Areas, texts: &Texts) -> Result<Finished, WriteFault> {
        let tail_end = self.close(&mut areas, texts)?;
        let start = tail_end.next_multiple_of(self.unit);
        let mut put = |areas: &Areas| self.file.write_all_at(&areas.encode(), self.areas_at);
        let (file, unit, step_bytes, copy_bytes_max) = (&self.file, self.unit, STEP_BYTES, COPY_BYTES_MAX);
        let mut collapse = Collapse { file, areas: &mut areas, unit, step_bytes, copy_bytes_max, save: &mut put };
        let compaction =
            collapse.run(start).map_err(|source| WriteFault::Io { action: "move pages together", source })?;

        let tail = self.tail(texts, &areas.lanes)?;
        let has_data = areas.lanes.iter().any(|lane| lane.rest.bytes > 0);
        let (padding, bytes) = if has_data { (start - tail_end, areas.file_bytes) } else { (0, tail_end) };
        self.write_tail(&tail, padding, bytes)?;
        self.point_to(&tail)?;
        let resized = self.file.set_len(bytes);
        resized.map_err(|source| WriteFault::Io { action: "cut the file", source })?;
        areas.state = WriteState::Finished;
        areas.file_bytes = bytes;
        self.save(&areas)?;
        Ok(Finished { bytes, compaction })
    }

    /// Everything between the areas section and the data.
    pub(crate) fn tail(&self, texts: &Texts, lanes: &[LaneArea]) -> Result<Tail, WriteFault> {
        let mut body = Vec::new();
        description::push_long(&mut body, whole_lines(&texts.cmdlines));
        let mut bytes = Vec::new();
        section::push(&mut bytes, id::CMDLINES, &body);
        let options_at = self.tail_at + bytes_of(&bytes);

        let mut payload = Vec::new();
        for (id, offset) in self.sections.iter().chain(&[(id::CMDLINES, self.tail_at)]) {
            option::push(&mut payload, *id, &offset.to_le_bytes())?;
        }
        payload.extend(early_options::encode(&texts.options)?);
        let buffer_at = payload.len() + OPTION_HEADER_BYTES;
        option::push(&mut payload, id::BUFFER, &self.buffer_option(lanes))?;
        option::push(&mut payload, id::OPTIONS, &0u64.to_le_bytes())?;
        bounded("options", payload.len(), OPTIONS_BYTES_MAX)?;
        bounded("notes", texts.notes.len(), NOTES_BYTES_MAX)?;
        section::push(&mut bytes, id::OPTIONS, &payload);
        if !texts.notes.is_empty() {
            section::push(&mut bytes, id::NOTES, texts.notes.as_bytes());
        }
        texts.segments.iter().for_each(|segments| section::push(&mut bytes, id::SEGMENTS, segments));
        // Only now is it known where the BUFFER section is that its option points to.
        let section_at = self.tail_at + bytes_of(&bytes);
        let place = usize::try_from(options_at - self.tail_at + SECTION_HEADER_BYTES).expect("bounded") + buffer_at;
        bytes[place..place + 8].copy_from_slice(&section_at.to_le_bytes());
        Ok(Tail { bytes, options_at })
    }

    /// u64 place of the section (filled in later), name of the instance (none: the top one), clock, page, lanes. Which
    /// lanes have pages does not change while they are moved: what is written twice has one length.
    fn buffer_option(&self, lanes: &[LaneArea]) -> Vec<u8> {
        let lanes = lanes.iter().filter(|lane| lane.moved.bytes + lane.rest.bytes > 0);
        let count = u32::try_from(lanes.clone().count()).expect("bounded by limits::CPUS_MAX");
        let mut out = vec![0; 8 + 1];
        out.extend(self.clock.as_bytes());
        out.push(0);
        out.extend(self.page_bytes.to_le_bytes());
        out.extend(count.to_le_bytes());
        for lane in lanes {
            out.extend(lane.cpu.0.to_le_bytes());
            out.extend(lane.rest.offset.to_le_bytes());
            out.extend(lane.rest.bytes.to_le_bytes());
        }
        out
    }

    /// Writes the tail, the header of the BUFFER section that reaches from there to the end of the file, and zeros up
    /// to the data. Nothing points to it.
    pub(crate) fn write_tail(&self, tail: &Tail, padding: u64, file_bytes: u64) -> Result<(), WriteFault> {
        let buffer_bytes = file_bytes - self.tail_at - tail.bytes();
        let mut bytes = tail.bytes.clone();
        bytes.extend(SectionHeader::plain(id::BUFFER, buffer_bytes).encode());
        bytes.extend((0..padding).map(|_| 0));
        // After an error in between, a reader of the file sees that it has no options yet.
        self.write(&[0; 8], OPTIONS_POINTER_AT, "write the place of the options")?;
        self.write(&bytes, self.tail_at, "write options")
    }

    pub(crate) fn point_to(&self, tail: &Tail) -> Result<(), WriteFault> {
        self.write(&tail.options_at.to_le_bytes(), OPTIONS_POINTER_AT, "write the place of the options")
    }

    pub(crate) fn write(&self, bytes: &[u8], at: u64, action: &'static str) -> Result<(), WriteFault> {
        self.file.write_all_at(bytes, at).map_err(|source| WriteFault::Io { action, source })
    }

    /// Puts the areas into the file.
    pub(crate) fn save(&self, areas: &Areas) -> Result<(), WriteFault> {
        self.write(&areas.encode(), self.areas_at, "write the areas")
    }
}

/// Command lines, options and notes, as sections.
pub(crate) struct Tail {
    bytes: Vec<u8>,
    options_at: u64,
}

impl Tail {
    /// Its length, including the header of the BUFFER section after it.
    pub(crate) fn bytes(&self) -> u64 {
        bytes_of(&self.bytes) + SECTION_HEADER_BYTES
    }
}

/// As a file holds them. CPUCOUNT is always there, and never less than KernelShark needs for these CPUs.
pub(crate) fn raw(options: &[TraceOption], cpu_count_min: u32) -> Result<Vec<RawOption>, WriteFault> {
    let mut cpus = cpu_count_min;
    let mut raw = Vec::new();
    for option in options {
        match option {
            TraceOption::CpuCount(count) => cpus = cpus.max(*count),
            TraceOption::Segments(_) => {} // a section of its own
            option => raw.push((option.id(), option.encode()?)),
        }
    }
    raw.push((id::CPUCOUNT, TraceOption::CpuCount(cpus).encode()?));
    Ok(raw)
}

/// Those that are sections of their own.
pub(crate) fn segments(options: &[TraceOption]) -> Result<Vec<Vec<u8>>, WriteFault> {
    let segments = options.iter().filter(|option| option.id() == id::SEGMENTS);
    Ok(segments.map(TraceOption::encode).collect::<Result<_, _>>()?)
}

pub(crate) fn bounded(what: &'static str, bytes: usize, bytes_max: usize) -> Result<(), WriteFault> {
    if bytes > bytes_max { Err(WriteFault::TooLong { what, bytes, bytes_max }) } else { Ok(()) }
}

/// As many whole lines as a file has room for.
fn whole_lines(text: &[u8]) -> &[u8] {
    if text.len() <= CMDLINES_BYTES_MAX {
        return text;
    }
    let text = &text[..CMDLINES_BYTES_MAX];
    let end = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    &text[..end]
}
