//! Writes a trace.dat whose pages go to their final place at once.
//!
//! In:    an empty file, what the machine tells about itself, its lanes; at the end: how much is in each area, options
//! Out:   [`Area`]s to write pages to; a version 7 file, uncompressed
//! Runs:  on the caller's thread; between [`Writer::create`] and [`Writer::finish`] others write into the areas
//! Full:  an area that the file system cannot hold is made smaller; a full disk at the end leaves holes, or an error
//!        with every page where [`super::areas`] says
//! Trust: descriptions were checked when they were gathered ([`super::metadata`]); our own mistakes are errors here too

use std::{fs::File, io, os::unix::fs::FileExt};

use nix::sys::{resource, statvfs};
use vtrace_common::{
    ids::Cpu,
    limits::{CMDLINES_BYTES_MAX, CPUS_MAX, PAGE_BYTES_MAX, PAGE_BYTES_MIN},
    wire::client::Area,
};

use super::{
    areas::{Areas, Extent, LaneArea, State},
    collapse::{Collapse, STEP_BYTES, Way, reserve},
    format,
    layout::{
        AREA_BYTES_MAX, AREA_BYTES_MIN, AREAS_BYTES_MAX, FIRST_SECTION_AT, MAGIC, NOTES_BYTES_MAX, OPTION_HEADER_BYTES,
        OPTIONS_BYTES_MAX, OPTIONS_POINTER_AT, SECTION_HEADER_BYTES, SEGMENTS_BYTES_MAX, UNCOMPRESSED, VERSION_7, id,
    },
    metadata::Metadata,
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
        /// Which.
        what: &'static str,
        /// How long.
        bytes: usize,
        /// How long it may be.
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

/// A trace.dat being written: metadata in front, one area per lane behind, options between them.
#[derive(Debug)]
pub struct Writer {
    file: File,
    clock: String,
    page_bytes: u32,
    unit: u64,
    sections: Sections,
    areas_at: u64,
    tail_at: u64,
    areas: Vec<Area>,
    cpu_count_min: u32,
}

/// Ids and offsets of the sections that are written once.
type Sections = Vec<(u16, u64)>;

/// A finished file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Finished {
    /// Its size.
    pub bytes: u64,
    /// What became of the holes between the areas.
    pub way: Way,
}

impl Writer {
    /// Writes the head and reserves one area for each lane, as large as the file system allows.
    ///
    /// `file` is empty and open for reading and writing, not for appending. `clock` is the chosen trace clock, or the
    /// contents of trace_clock with it in brackets.
    ///
    /// # Errors
    /// See [`WriteFault`]; what is in the file then is of no use.
    pub fn create(
        file: File,
        metadata: &Metadata,
        clock: &str,
        page_bytes: u32,
        lanes: &[Cpu],
    ) -> Result<Self, WriteFault> {
        let fits = usize::try_from(page_bytes).is_ok_and(|bytes| (PAGE_BYTES_MIN..=PAGE_BYTES_MAX).contains(&bytes));
        if !fits || !page_bytes.is_power_of_two() {
            return Err(WriteFault::PageSize(page_bytes));
        }
        let clock = chosen(clock).to_owned();
        if clock.contains('\0') {
            return Err(OptionFault::Nul(id::BUFFER).into());
        }
        let lanes = sorted(lanes)?;
        let unit = unit_bytes(&file, page_bytes)?;
        let (front, sections) = front(metadata, page_bytes)?;
        let areas_at = bytes_of(&front);
        let tail_at = areas_at + Areas::section_bytes(lanes.len());
        let data_at = (tail_at + tail_bytes_max()).next_multiple_of(unit);
        let areas = reserve_areas(&file, data_at, unit, &lanes)?;
        let cpu_count_min = lanes.last().map_or(0, |cpu| cpu.0 + 1);
        let writer = Self { file, clock, page_bytes, unit, sections, areas_at, tail_at, areas, cpu_count_min };
        writer.write(&front, 0, "write descriptions")?;
        reserve(&writer.file, Extent { offset: areas_at, bytes: tail_at - areas_at + RESERVED_BYTES });
        let file_bytes = data_at.max(writer.areas.last().map_or(0, area_end));
        save(&writer.file, areas_at, &writer.lane_areas(State::Open, file_bytes))?;
        let cmdlines = whole_lines(&metadata.cmdlines);
        let tail = writer.tail(cmdlines, &[], "", &[])?;
        writer.write_tail(&tail, 0, file_bytes)?;
        Ok(writer)
    }

    /// The lanes' areas, in the order of their CPUs.
    pub fn areas(&self) -> &[Area] {
        &self.areas
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Collapses the holes and writes command lines, options and notes. `filled`: bytes of pages in each lane; lanes
    /// not named are empty. `notes`: a JSON text that stock tools pass over ([`super::reader::Reader::notes`]).
    ///
    /// CPUCOUNT is written even if `options` have none, and never less than KernelShark needs for these lanes.
    ///
    /// # Errors
    /// See [`WriteFault`]. Nothing is lost: all pages are where the file's areas section says.
    pub fn finish(
        self,
        filled: &[(Cpu, u64)],
        cmdlines: &[u8],
        options: &[TraceOption],
        notes: &str,
    ) -> Result<Finished, WriteFault> {
        let mut areas = self.fill(filled)?;
        let cmdlines = whole_lines(cmdlines);
        // The tail's length does not depend on where the data will be: no option is written in numbers of varying length.
        let tail_bytes = self.tail(cmdlines, options, notes, &areas.lanes)?.bytes();
        let start = (self.tail_at + tail_bytes).next_multiple_of(self.unit);
        let mut put = |areas: &Areas| self.file.write_all_at(&areas.encode(), self.areas_at);
        let (file, unit, step_bytes) = (&self.file, self.unit, STEP_BYTES);
        let mut collapse = Collapse { file, areas: &mut areas, unit, step_bytes, save: &mut put };
        let way = collapse.run(start).map_err(|source| WriteFault::Io { action: "move pages together", source })?;

        let tail = self.tail(cmdlines, options, notes, &areas.lanes)?;
        let has_data = areas.lanes.iter().any(|lane| lane.rest.bytes > 0);
        let tail_end = self.tail_at + tail.bytes();
        let (padding, bytes) = if has_data { (start - tail_end, areas.file_bytes) } else { (0, tail_end) };
        self.write_tail(&tail, padding, bytes)?;
        let resized = self.file.set_len(bytes);
        resized.map_err(|source| WriteFault::Io { action: "cut the file", source })?;
        areas.state = State::Finished;
        areas.file_bytes = bytes;
        save(&self.file, self.areas_at, &areas)?;
        Ok(Finished { bytes, way })
    }

    /// The areas, closed, with what is in them.
    fn fill(&self, filled: &[(Cpu, u64)]) -> Result<Areas, WriteFault> {
        let file_bytes =
            self.file.metadata().map_err(|source| WriteFault::Io { action: "ask for the size", source })?.len();
        let mut areas = self.lane_areas(State::Closed, file_bytes);
        areas.lanes.iter_mut().for_each(|lane| lane.rest.bytes = 0);
        for (cpu, bytes) in filled {
            let area = self.areas.iter().position(|area| area.cpu == *cpu && *bytes <= area.bytes_max);
            let index = area.ok_or(WriteFault::Filled { cpu: *cpu, bytes: *bytes })?;
            if areas.lanes[index].rest.bytes > 0 {
                return Err(WriteFault::Lanes);
            }
            areas.lanes[index].rest.bytes = *bytes;
        }
        Ok(areas)
    }

    fn lane_areas(&self, state: State, file_bytes: u64) -> Areas {
        let lane = |area: &Area| LaneArea {
            cpu: area.cpu,
            moved: Extent::default(),
            rest: Extent { offset: area.offset, bytes: area.bytes_max },
        };
        let lanes = self.areas.iter().map(lane).collect();
        Areas { state, page_bytes: self.page_bytes, file_bytes, pending: Extent::default(), lanes }
    }

    /// Everything between the areas section and the data.
    fn tail(
        &self,
        cmdlines: &[u8],
        options: &[TraceOption],
        notes: &str,
        lanes: &[LaneArea],
    ) -> Result<Tail, WriteFault> {
        let mut body = Vec::new();
        format::push_long(&mut body, cmdlines);
        let mut bytes = Vec::new();
        section::push(&mut bytes, id::CMDLINES, &body);
        let options_at = self.tail_at + bytes_of(&bytes);

        let mut payload = Vec::new();
        for (id, offset) in self.sections.iter().chain(&[(id::CMDLINES, self.tail_at)]) {
            option::push(&mut payload, *id, &offset.to_le_bytes())?;
        }
        self.push_options(&mut payload, options)?;
        let buffer_at = payload.len() + OPTION_HEADER_BYTES;
        option::push(&mut payload, id::BUFFER, &self.buffer_option(lanes))?;
        option::push(&mut payload, id::OPTIONS, &0u64.to_le_bytes())?;
        bounded("options", payload.len(), OPTIONS_BYTES_MAX)?;
        bounded("notes", notes.len(), NOTES_BYTES_MAX)?;
        section::push(&mut bytes, id::OPTIONS, &payload);
        if !notes.is_empty() {
            section::push(&mut bytes, id::NOTES, notes.as_bytes());
        }
        for segments in options.iter().filter(|option| option.id() == id::SEGMENTS) {
            section::push(&mut bytes, id::SEGMENTS, &segments.encode()?);
        }
        // Only now is it known where the BUFFER section is that its option points to.
        let section_at = self.tail_at + bytes_of(&bytes);
        let place = usize::try_from(options_at - self.tail_at + SECTION_HEADER_BYTES).expect("bounded") + buffer_at;
        bytes[place..place + 8].copy_from_slice(&section_at.to_le_bytes());
        Ok(Tail { bytes, options_at })
    }

    fn push_options(&self, payload: &mut Vec<u8>, options: &[TraceOption]) -> Result<(), WriteFault> {
        let mut cpus = self.cpu_count_min;
        for option in options {
            match option {
                TraceOption::CpuCount(count) => cpus = cpus.max(*count),
                TraceOption::Segments(_) => {} // a section of its own
                option => option::push(payload, option.id(), &option.encode()?)?,
            }
        }
        Ok(option::push(payload, id::CPUCOUNT, &TraceOption::CpuCount(cpus).encode()?)?)
    }

    /// u64 place of the section (filled in later), name of the instance (none: the top one), clock, page, lanes.
    fn buffer_option(&self, lanes: &[LaneArea]) -> Vec<u8> {
        let lanes = lanes.iter().filter(|lane| lane.rest.bytes > 0);
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

    /// Writes the tail, the header of the BUFFER section that reaches from there to the end of the file, zeros up to
    /// the data, and then the pointer to the options.
    fn write_tail(&self, tail: &Tail, padding: u64, file_bytes: u64) -> Result<(), WriteFault> {
        let buffer_bytes = file_bytes - self.tail_at - tail.bytes();
        let mut bytes = tail.bytes.clone();
        bytes.extend(SectionHeader::plain(id::BUFFER, buffer_bytes).encode());
        bytes.extend((0..padding).map(|_| 0));
        // Whoever reads the file after an error in between knows that there are no options yet.
        self.write(&[0; 8], OPTIONS_POINTER_AT, "write the place of the options")?;
        self.write(&bytes, self.tail_at, "write options")?;
        self.write(&tail.options_at.to_le_bytes(), OPTIONS_POINTER_AT, "write the place of the options")
    }

    fn write(&self, bytes: &[u8], at: u64, action: &'static str) -> Result<(), WriteFault> {
        self.file.write_all_at(bytes, at).map_err(|source| WriteFault::Io { action, source })
    }
}

/// Command lines, options and notes, as sections.
struct Tail {
    bytes: Vec<u8>,
    options_at: u64,
}

impl Tail {
    /// Its length with the header of the BUFFER section behind it.
    fn bytes(&self) -> u64 {
        bytes_of(&self.bytes) + SECTION_HEADER_BYTES
    }
}

/// What a tail usually takes, taken from the disk when the file is made.
const RESERVED_BYTES: u64 = 256 << 10;

fn tail_bytes_max() -> u64 {
    let texts = CMDLINES_BYTES_MAX + OPTIONS_BYTES_MAX + NOTES_BYTES_MAX + SEGMENTS_BYTES_MAX;
    u64::try_from(texts).expect("usize has at most 64 bits") + 8 + 5 * SECTION_HEADER_BYTES
}

fn bounded(what: &'static str, bytes: usize, bytes_max: usize) -> Result<(), WriteFault> {
    if bytes > bytes_max { Err(WriteFault::TooLong { what, bytes, bytes_max }) } else { Ok(()) }
}

fn save(file: &File, at: u64, areas: &Areas) -> Result<(), WriteFault> {
    file.write_all_at(&areas.encode(), at).map_err(|source| WriteFault::Io { action: "write the areas", source })
}

fn area_end(area: &Area) -> u64 {
    area.offset + area.bytes_max
}

fn sorted(lanes: &[Cpu]) -> Result<Vec<Cpu>, WriteFault> {
    let mut sorted = lanes.to_vec();
    sorted.sort_unstable();
    let twice = sorted.windows(2).any(|pair| pair[0] == pair[1]);
    let beyond = sorted.last().is_some_and(|cpu| usize::try_from(cpu.0).map_or(true, |cpu| cpu >= CPUS_MAX));
    if twice || beyond { Err(WriteFault::Lanes) } else { Ok(sorted) }
}

/// The head and the sections that are written once, and where those are.
fn front(metadata: &Metadata, page_bytes: u32) -> Result<(Vec<u8>, Sections), WriteFault> {
    let mut out = Vec::new();
    out.extend(MAGIC);
    out.extend(VERSION_7);
    out.extend(page_bytes.to_le_bytes());
    out.extend(UNCOMPRESSED);
    assert_eq!(bytes_of(&out), OPTIONS_POINTER_AT);
    out.extend(0u64.to_le_bytes());
    assert_eq!(bytes_of(&out), FIRST_SECTION_AT);
    let mut sections = Vec::new();
    for id in format::FIXED_SECTIONS {
        let bytes_max = usize::try_from(u32::MAX).unwrap_or(usize::MAX);
        let body = format::body(id, metadata);
        let body = body.ok_or(WriteFault::TooLong { what: "a description", bytes: usize::MAX, bytes_max })?;
        sections.push((id, bytes_of(&out)));
        section::push(&mut out, id, &body);
    }
    // Stock readers seek with an int.
    bounded("descriptions", out.len(), 1 << 30)?;
    Ok((out, sections))
}

/// What is taken out of a file has to begin and end at blocks of the file system, and pages at multiples of their size.
fn unit_bytes(file: &File, page_bytes: u32) -> Result<u64, WriteFault> {
    let about = statvfs::fstatvfs(file);
    let about = about.map_err(|errno| WriteFault::Io { action: "ask for the block size", source: errno.into() })?;
    let block = about.fragment_size();
    let block = if block.is_power_of_two() && block <= 1 << 20 { block } else { 4096 };
    Ok(block.max(u64::from(page_bytes)))
}

/// Reserves areas: the largest that the file system and the limits of this process allow.
fn reserve_areas(file: &File, data_at: u64, unit: u64, lanes: &[Cpu]) -> Result<Vec<Area>, WriteFault> {
    let count = u64::try_from(lanes.len()).expect("usize has at most 64 bits");
    // Beyond this limit the kernel does not only refuse: it kills (SIGXFSZ).
    let limit = resource::getrlimit(resource::Resource::RLIMIT_FSIZE).map_or(u64::MAX, |(soft, _)| soft);
    let mut bytes_max = AREA_BYTES_MAX.min(AREAS_BYTES_MAX / count.max(1));
    loop {
        bytes_max = bytes_max / unit * unit;
        if bytes_max < AREA_BYTES_MIN {
            return Err(WriteFault::NoRoom(io::ErrorKind::FileTooLarge.into()));
        }
        let file_bytes = data_at + count * bytes_max;
        let result =
            if file_bytes > limit { Err(io::ErrorKind::FileTooLarge.into()) } else { file.set_len(file_bytes) };
        match result {
            Ok(()) => break,
            Err(error) if is_too_large(&error) => bytes_max /= 2,
            Err(source) => return Err(WriteFault::Io { action: "reserve areas", source }),
        }
    }
    let area = |(index, cpu)| Area { cpu, offset: data_at + index * bytes_max, bytes_max };
    Ok((0..).zip(lanes.iter().copied()).map(area).collect())
}

fn is_too_large(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, InvalidInput, QuotaExceeded, StorageFull};
    matches!(error.kind(), FileTooLarge | InvalidInput | QuotaExceeded | StorageFull)
}

/// The clock in brackets, or the whole text.
fn chosen(clock: &str) -> &str {
    let inside = clock.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    inside.map_or(clock, |(chosen, _)| chosen).trim()
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
