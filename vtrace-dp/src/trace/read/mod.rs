//! Reads a trace.dat: ours, and version 6 and 7 of stock trace-cmd, little endian, 64 bits.
//!
//! In:    a [`Source`]
//! Out:   what its machine told, options, notes, and the pages of each lane
//! Runs:  anywhere; only descriptions and options are held in memory, and pages one at a time
//! Full:  every count and length has a bound ([`ReadFault::TooLarge`])
//! Trust: nothing

pub mod input;
pub mod merge;
pub mod times;

use std::collections::BTreeSet;

use vtrace_common::{
    ids::Cpu,
    limits::{CPUS_MAX, METADATA_BYTES_MAX, NAME_BYTES_MAX, PAGE_BYTES_MAX, PAGE_BYTES_MIN, TEXT_BYTES_MAX},
};

use self::input::{Input, ReadFault, Source};
use super::format::{
    areas::Areas,
    compressed::{CHUNK_BYTES_MAX, Compression},
    description,
    layout::{
        FIRST_SECTION_AT, MAGIC, NOTES_BYTES_MAX, OPTIONS_BYTES_MAX, OPTIONS_SECTIONS_MAX, SECTION_HEADER_BYTES,
        SECTIONS_MAX, V6_FLYRECORD, V6_OPTIONS, id,
    },
    option::TraceOption,
    section::SectionHeader,
    segments::Segments,
};
use crate::ftrace::{
    events::{Events, PageFault},
    metadata::Metadata,
};

/// An open trace.dat.
#[derive(Debug)]
pub struct Reader<S> {
    source: S,
    contents: Contents,
}

/// What is held of a file.
#[derive(Debug, Default)]
struct Contents {
    version: u32,
    page_bytes: u32,
    compression: Compression,
    metadata: Metadata,
    options: Vec<TraceOption>,
    others: Vec<(u16, Vec<u8>)>,
    buffers: Vec<Buffer>,
    sections: Vec<(u64, SectionHeader)>,
    /// Descriptions that were read: each only once, or a small file could fill the memory.
    described: BTreeSet<u16>,
    /// Bytes of options so far: a chain can run in circles.
    option_bytes: usize,
}

/// The pages of one instance.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Buffer {
    /// Its name; empty for the top one.
    pub name: String,
    /// Its trace clock; empty if the file does not say.
    pub clock: String,
    /// Bytes of one page.
    pub page_bytes: u32,
    /// Its lanes.
    pub lanes: Vec<LaneData>,
}

/// Where the pages of one lane are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LaneData {
    /// The lane's CPU.
    pub cpu: Cpu,
    /// Where they begin.
    pub offset: u64,
    /// How many bytes there are in the file.
    pub bytes: u64,
}

/// Why a lane cannot be walked to its end.
#[derive(Debug, thiserror::Error)]
pub enum WalkFault {
    /// A page cannot be read.
    #[error(transparent)]
    Read(#[from] ReadFault),
    /// A page cannot be walked.
    #[error("the page at {offset:#x} is broken")]
    Page {
        /// Where the page begins.
        offset: u64,
        /// In which way.
        source: PageFault,
    },
}

impl<S: Source> Reader<S> {
    /// Reads everything but pages.
    ///
    /// # Errors
    /// See [`ReadFault`]. A file whose pages are cut off is refused as a whole.
    pub fn open(source: S) -> Result<Self, ReadFault> {
        let mut input = Input::new(&source, 0, u64::MAX);
        if input.array::<10>("magic").map_err(|_| ReadFault::NotATrace)? != MAGIC {
            return Err(ReadFault::NotATrace);
        }
        let version = input.text(16, "version")?;
        let mut contents = Contents::default();
        let [big_endian, long] = input.array("byte order")?;
        if big_endian != 0 || long != 8 {
            return Err(unsupported(format!("byte order {big_endian} and longs of {long} bytes")));
        }
        contents.page_bytes = input.u32("page size")?;
        check_page(contents.page_bytes, input.at() - 4)?;
        match version.as_slice() {
            b"6" => contents.read_6(&mut input, &source)?,
            b"7" => contents.read_7(&mut input, &source)?,
            other => return Err(unsupported(format!("version {:?}", String::from_utf8_lossy(other)))),
        }
        contents.check_lanes(source.bytes())?;
        Ok(Self { source, contents })
    }

    /// What is read.
    pub fn source(&self) -> &S {
        &self.source
    }

    /// 6 or 7.
    pub fn version(&self) -> u32 {
        self.contents.version
    }

    /// How descriptions and pages are compressed.
    pub fn compression(&self) -> Compression {
        self.contents.compression
    }

    /// What the machine told about itself.
    pub fn metadata(&self) -> &Metadata {
        &self.contents.metadata
    }

    /// Options, in the order of the file.
    pub fn options(&self) -> &[TraceOption] {
        &self.contents.options
    }

    /// Options that [`TraceOption`] has no words for: id and payload.
    pub fn other_options(&self) -> &[(u16, Vec<u8>)] {
        &self.contents.others
    }

    /// The instances' pages.
    pub fn buffers(&self) -> &[Buffer] {
        &self.contents.buffers
    }

    /// The top instance's pages.
    pub fn top(&self) -> Option<&Buffer> {
        self.contents.buffers.iter().find(|buffer| buffer.name.is_empty())
    }

    /// Sections of a version 7 file: place and header, in the order of the file.
    pub fn sections(&self) -> &[(u64, SectionHeader)] {
        &self.contents.sections
    }

    /// The text our writer left about the recording.
    ///
    /// # Errors
    /// It is too long, or not UTF-8.
    pub fn notes(&self) -> Result<Option<String>, ReadFault> {
        let Some((offset, header)) = self.contents.section(id::NOTES) else {
            return Ok(None);
        };
        let mut input = payload(&self.source, offset, header);
        let text = input.bytes(header.bytes, NOTES_BYTES_MAX, "notes")?;
        String::from_utf8(text).map(Some).map_err(|_| ReadFault::Nonsense { what: "notes", offset })
    }

    /// The guest's clock, as our writer left it.
    ///
    /// # Errors
    /// The section is broken.
    pub fn segments(&self) -> Result<Option<Segments>, ReadFault> {
        let found = self.contents.section(id::SEGMENTS);
        found.map(|(offset, header)| Segments::read(&mut payload(&self.source, offset, header))).transpose()
    }

    /// Where our writer says the lanes are, right even for a file that was never finished.
    ///
    /// # Errors
    /// The section is broken.
    pub fn areas(&self) -> Result<Option<Areas>, ReadFault> {
        let Some((offset, header)) = self.contents.section(id::AREAS) else {
            return Ok(None);
        };
        let areas = Areas::read(&mut payload(&self.source, offset, header))?;
        Ok(Some(areas.settle(self.source.bytes())))
    }

    /// The pages of a lane, each whole; the last one may be short.
    pub fn pages<'a>(&'a self, buffer: &Buffer, lane: &LaneData) -> LanePages<'a, S> {
        let chunks = match self.contents.compression {
            Compression::None => None,
            compression => Some(Chunks { compression, left: None, bytes: Vec::new(), used: 0, offset: lane.offset }),
        };
        // Stock trace-cmd counts a compressed lane four bytes short.
        let end = if chunks.is_some() { self.source.bytes() } else { lane.offset + lane.bytes };
        LanePages { source: &self.source, at: lane.offset, end, page_bytes: buffer.page_bytes, chunks }
    }

    /// Calls `each` with (raw time, event) for every event of a lane.
    ///
    /// # Errors
    /// A page cannot be read, or is broken; events before it have been seen.
    pub fn events(&self, buffer: &Buffer, lane: &LaneData, mut each: impl FnMut(u64, &[u8])) -> Result<(), WalkFault> {
        for page in self.pages(buffer, lane) {
            let (offset, page) = page?;
            let broken = |source| WalkFault::Page { offset, source };
            for event in Events::new(&page).map_err(broken)? {
                let event = event.map_err(broken)?;
                each(event.time, event.data);
            }
        }
        Ok(())
    }
}

/// LanePages of one lane: place (of a compressed one: of its chunk) and bytes. After an error there are no more.
#[derive(Debug)]
pub struct LanePages<'a, S> {
    source: &'a S,
    at: u64,
    end: u64,
    page_bytes: u32,
    chunks: Option<Chunks>,
}

/// Where a compressed lane has been read to.
#[derive(Debug)]
struct Chunks {
    compression: Compression,
    /// Chunks to come; nothing before their number has been read.
    left: Option<u32>,
    /// The chunk that is being used up, and how far.
    bytes: Vec<u8>,
    used: usize,
    offset: u64,
}

impl<S: Source> Iterator for LanePages<'_, S> {
    type Item = Result<(u64, Vec<u8>), ReadFault>;

    fn next(&mut self) -> Option<Self::Item> {
        let page = if self.chunks.is_some() { self.unpacked().transpose()? } else { self.plain()? };
        if page.is_err() {
            (self.at, self.chunks) = (self.end, None);
        }
        Some(page)
    }
}

impl<'a, S: Source> LanePages<'a, S> {
    /// Those pages of a lane that is not compressed in which events of `from..=to` can be, in raw stamps: found by the
    /// times in their headers, which never decrease. The lane need not be in a finished file.
    ///
    /// # Errors
    /// A header cannot be read, or the page size makes no sense.
    pub fn between(source: &'a S, lane: &LaneData, page_bytes: u32, from: u64, to: u64) -> Result<Self, ReadFault> {
        check_page(page_bytes, lane.offset)?;
        let step = u64::from(page_bytes);
        let place = |page: u64| lane.offset + page * step;
        let begins = |page: u64| Input::new(source, place(page), place(page + 1)).u64("time of a page");
        // The first page that begins after `time`.
        let after = |time: u64| {
            let (mut low, mut high) = (0, lane.bytes / step);
            while low < high {
                let middle = low + (high - low) / 2;
                if begins(middle)? <= time {
                    low = middle + 1;
                } else {
                    high = middle;
                }
            }
            Ok(low)
        };
        let (at, end) = (place(after(from.saturating_sub(1))?.saturating_sub(1)), place(after(to)?));
        Ok(Self { source, at, end, page_bytes, chunks: None })
    }

    fn plain(&mut self) -> Option<Result<(u64, Vec<u8>), ReadFault>> {
        let bytes = u64::from(self.page_bytes).min(self.end - self.at);
        if bytes == 0 {
            return None;
        }
        let offset = self.at;
        self.at += bytes;
        let page = Input::new(self.source, offset, self.end).bytes(bytes, PAGE_BYTES_MAX, "page");
        Some(page.map(|page| (offset, page)))
    }

    /// u32 number of chunks; each: a block of whole pages.
    fn unpacked(&mut self) -> Result<Option<(u64, Vec<u8>)>, ReadFault> {
        let Some(chunks) = &mut self.chunks else { return Ok(None) };
        let mut input = Input::new(self.source, self.at, self.end);
        while chunks.used == chunks.bytes.len() {
            let left = match chunks.left {
                Some(left) => left,
                None => input.u32("number of chunks")?,
            };
            chunks.left = left.checked_sub(1);
            if chunks.left.is_none() {
                chunks.left = Some(0);
                return Ok(None);
            }
            chunks.offset = input.at();
            chunks.bytes = chunks.compression.block(&mut input, CHUNK_BYTES_MAX)?;
            chunks.used = 0;
        }
        self.at = input.at();
        let page_bytes = usize::try_from(self.page_bytes).expect("usize is 64 bits");
        let rest = &chunks.bytes[chunks.used..];
        let page = rest[..page_bytes.min(rest.len())].to_vec();
        chunks.used += page.len();
        Ok(Some((chunks.offset, page)))
    }
}

impl Contents {
    /// Header, descriptions, CPUs, options, table of pages: one after the other.
    fn read_6<S: Source>(&mut self, input: &mut Input<'_, S>, source: &S) -> Result<(), ReadFault> {
        self.version = 6;
        for section in description::FIXED_SECTIONS.into_iter().chain([id::CMDLINES]) {
            description::read(section, input, &mut self.metadata)?;
        }
        let cpus = read_cpus(input)?;
        let mut next = input.array::<10>("kind of a version 6 file")?;
        let mut instances = Vec::new();
        if &next == V6_OPTIONS {
            self.read_options(input, false, &mut instances)?;
            next = input.array("kind of a version 6 file")?;
        }
        if &next != V6_FLYRECORD {
            return Err(unsupported("no pages (a latency trace)".to_owned()));
        }
        let lanes = read_table(input, cpus)?;
        self.buffers.push(Buffer { page_bytes: self.page_bytes, lanes, ..Buffer::default() });
        for (offset, name) in instances {
            let mut input = Input::new(source, offset, u64::MAX);
            if &input.array::<10>("pages of an instance")? != V6_FLYRECORD {
                return Err(ReadFault::Nonsense { what: "pages of an instance", offset });
            }
            // An instance of another number of CPUs says so in an option that follows its own; stock writes none.
            let lanes = read_table(&mut input, cpus)?;
            self.buffers.push(Buffer { name, page_bytes: self.page_bytes, lanes, ..Buffer::default() });
        }
        Ok(())
    }

    fn read_7<S: Source>(&mut self, input: &mut Input<'_, S>, source: &S) -> Result<(), ReadFault> {
        self.version = 7;
        let compression = input.text(64, "name of the compression")?;
        input.text(64, "version of the compression")?;
        self.compression = Compression::named(&compression)
            .ok_or_else(|| unsupported(format!("compression {:?}", String::from_utf8_lossy(&compression))))?;
        let mut next = input.u64("place of the options")?;
        self.walk_sections(input.at(), source)?;
        if next == 0 {
            // The end was never written. What is in front of it is there.
            let written = self.sections.iter().filter(|(_, header)| description::FIXED_SECTIONS.contains(&header.id));
            for (place, header) in written.copied().collect::<Vec<_>>() {
                self.read_section(source, header.id, place)?;
            }
            return Ok(());
        }
        for _ in 0..OPTIONS_SECTIONS_MAX {
            if next == 0 {
                return Ok(());
            }
            let (mut input, header) = open_section(source, next)?;
            if header.id != id::OPTIONS {
                return Err(ReadFault::Nonsense { what: "options", offset: next });
            }
            let mut places = Vec::new();
            next = self.read_options(&mut input, true, &mut places)?;
        }
        let count_max = u64::try_from(OPTIONS_SECTIONS_MAX).unwrap_or(u64::MAX);
        Err(ReadFault::TooLarge { what: "chain of options", offset: next, count: count_max + 1, count_max })
    }

    /// All headers from the first to the end of the file, as far as they make sense.
    fn walk_sections<S: Source>(&mut self, first: u64, source: &S) -> Result<(), ReadFault> {
        let mut at = first;
        while at < source.bytes() && self.sections.len() < SECTIONS_MAX {
            let Ok((_, header)) = open_section(source, at) else { break };
            self.sections.push((at, header));
            let Some(next) = at.checked_add(SECTION_HEADER_BYTES).and_then(|at| at.checked_add(header.bytes)) else {
                break;
            };
            at = next;
        }
        if self.sections.is_empty() {
            Err(ReadFault::Short { what: "sections", offset: FIRST_SECTION_AT })
        } else {
            Ok(())
        }
    }

    fn section(&self, id: u16) -> Option<(u64, SectionHeader)> {
        self.sections.iter().copied().find(|(_, header)| header.id == id && !header.is_compressed())
    }

    /// Reads options up to the last one; returns the offset of the next options section, 0 after the last.
    fn read_options<S: Source>(
        &mut self,
        input: &mut Input<'_, S>,
        sections: bool,
        instances: &mut Vec<(u64, String)>,
    ) -> Result<u64, ReadFault> {
        loop {
            let id = input.u16("id of an option")?;
            if id == id::OPTIONS && !sections {
                return Ok(0);
            }
            let bytes = input.u32("length of an option")?;
            let offset = input.at();
            let room = OPTIONS_BYTES_MAX - self.option_bytes;
            let payload = input.bytes(u64::from(bytes), room, "option")?;
            self.option_bytes += payload.len();
            let view = payload.as_slice();
            let mut inner = Input::new(&view, 0, u64::MAX);
            match id {
                id::OPTIONS => return inner.u64("place of the next options"),
                id::BUFFER if sections => self.buffers.push(read_buffer(&mut inner)?),
                id::BUFFER => instances.push((inner.u64("place of an instance")?, read_name(&mut inner)?)),
                id::HEADER_INFO..=id::CMDLINES if sections => {
                    let place = inner.u64("place of a section")?;
                    self.read_section(input.source(), id, place)?;
                }
                _ => match TraceOption::parse(id, &payload).map_err(|fault| moved(fault, offset))? {
                    Some(option) => self.options.push(option),
                    None => self.others.push((id, payload)),
                },
            }
        }
    }

    fn read_section<S: Source>(&mut self, source: &S, id: u16, place: u64) -> Result<(), ReadFault> {
        let (mut input, header) = open_section(source, place)?;
        if header.id != id || !self.described.insert(id) {
            return Err(ReadFault::Nonsense { what: "description", offset: place });
        }
        if header.is_compressed() {
            let bytes = self.compression.block(&mut input, METADATA_BYTES_MAX)?;
            let inner = bytes.as_slice();
            return description::read(id, &mut Input::new(&inner, 0, u64::MAX), &mut self.metadata);
        }
        description::read(id, &mut input, &mut self.metadata)
    }

    fn check_lanes(&self, file_bytes: u64) -> Result<(), ReadFault> {
        for buffer in &self.buffers {
            check_page(buffer.page_bytes, 0)?;
            for lane in &buffer.lanes {
                let end = lane.offset.checked_add(lane.bytes);
                if end.is_none_or(|end| end > file_bytes) {
                    return Err(ReadFault::Short { what: "pages of a lane", offset: lane.offset });
                }
            }
        }
        Ok(())
    }
}

fn unsupported(what: String) -> ReadFault {
    ReadFault::Unsupported { what }
}

fn check_page(page_bytes: u32, offset: u64) -> Result<(), ReadFault> {
    let fits = usize::try_from(page_bytes).is_ok_and(|bytes| (PAGE_BYTES_MIN..=PAGE_BYTES_MAX).contains(&bytes));
    if fits { Ok(()) } else { Err(ReadFault::Nonsense { what: "page size", offset }) }
}

/// Offsets inside an option's payload become offsets in the file.
fn moved(fault: ReadFault, by: u64) -> ReadFault {
    match fault {
        ReadFault::Short { what, offset } => ReadFault::Short { what, offset: offset + by },
        ReadFault::Nonsense { what, offset } => ReadFault::Nonsense { what, offset: offset + by },
        ReadFault::TooLarge { what, offset, count, count_max } => {
            ReadFault::TooLarge { what, offset: offset + by, count, count_max }
        }
        other => other,
    }
}

fn open_section<S: Source>(source: &S, at: u64) -> Result<(Input<'_, S>, SectionHeader), ReadFault> {
    let end = at.checked_add(SECTION_HEADER_BYTES).ok_or(ReadFault::Short { what: "section", offset: at })?;
    let header = SectionHeader::parse(&Input::new(source, at, end).array("header of a section")?);
    Ok((payload(source, at, header), header))
}

fn payload<S: Source>(source: &S, at: u64, header: SectionHeader) -> Input<'_, S> {
    let start = at + SECTION_HEADER_BYTES;
    Input::new(source, start, start.saturating_add(header.bytes))
}

fn read_cpus<S: Source>(input: &mut Input<'_, S>) -> Result<u32, ReadFault> {
    let offset = input.at();
    let count = input.u32("number of CPUs")?;
    let max = u64::try_from(CPUS_MAX).unwrap_or(u64::MAX);
    let fits = u64::from(count) <= max;
    let large = ReadFault::TooLarge { what: "list of CPUs", offset, count: u64::from(count), count_max: max };
    if fits { Ok(count) } else { Err(large) }
}

fn read_table<S: Source>(input: &mut Input<'_, S>, cpus: u32) -> Result<Vec<LaneData>, ReadFault> {
    let mut lanes = Vec::new();
    for cpu in 0..cpus {
        let lane =
            LaneData { cpu: Cpu(cpu), offset: input.u64("place of a lane")?, bytes: input.u64("size of a lane")? };
        if lane.bytes > 0 {
            lanes.push(lane);
        }
    }
    Ok(lanes)
}

fn read_name(input: &mut Input<'_, &[u8]>) -> Result<String, ReadFault> {
    let name = input.text(TEXT_BYTES_MAX, "name of an instance")?;
    Ok(String::from_utf8_lossy(&name).into_owned())
}

fn read_buffer(input: &mut Input<'_, &[u8]>) -> Result<Buffer, ReadFault> {
    input.u64("place of pages")?;
    let name = read_name(input)?;
    let clock = String::from_utf8_lossy(&input.text(NAME_BYTES_MAX, "clock of an instance")?).into_owned();
    let page_bytes = input.u32("page size")?;
    let mut lanes = Vec::new();
    for _ in 0..read_cpus(input)? {
        let cpu = Cpu(input.u32("CPU of a lane")?);
        lanes.push(LaneData { cpu, offset: input.u64("place of a lane")?, bytes: input.u64("size of a lane")? });
    }
    Ok(Buffer { name, clock, page_bytes, lanes })
}

const _: () = assert!(OPTIONS_BYTES_MAX <= METADATA_BYTES_MAX);

#[cfg(test)]
mod tests;
