//! Writes a trace.dat whose pages go to their final place at once.
//!
//! In:    an empty file, what the machine tells about itself, its lanes; options as soon as they are known; at the end:
//!        how much was written to each area, options
//! Out:   [`Area`]s to write pages to; a version 7 file, uncompressed
//! Runs:  on the caller's thread; between [`Writer::create`] and [`Writer::finish`] others write into the areas
//! Full:  an area that the file system cannot hold is made smaller; a full disk at the end leaves holes, or an error
//!        with every page where [`super::format::areas`] says
//! Trust: descriptions were checked when they were gathered ([`crate::ftrace::metadata`]); our own mistakes are errors here too

pub mod collapse;
pub mod early_options;
pub(crate) mod frame;
pub mod host_lanes;
pub mod host_times;
pub mod newest_pages;
pub mod pack;

use std::{fs::File, io};

use nix::sys::{resource, statvfs};
use vtrace_common::{
    ids::Cpu,
    limits::{CMDLINES_BYTES_MAX, CPUS_MAX, PAGE_BYTES_MAX, PAGE_BYTES_MIN},
    wire::client::Area,
};

pub use self::frame::{Finished, WriteFault};
use self::{
    collapse::{punch, reserve},
    frame::{Frame, Sections, Texts, bounded, raw, segments},
    host_lanes::{Hosted, PENDING_NOTE, host_lanes},
};
use super::format::{
    areas::{Areas, Extent, LaneArea, WriteState},
    description,
    layout::{
        AREA_BYTES_MAX, AREA_BYTES_MIN, AREAS_BYTES_MAX, FIRST_SECTION_AT, MAGIC, NOTES_BYTES_MAX, OPTIONS_BYTES_MAX,
        OPTIONS_POINTER_AT, SECTION_HEADER_BYTES, SEGMENTS_BYTES_MAX, UNCOMPRESSED, VERSION_7, id,
    },
    option::{OptionFault, TraceOption},
    section::{self, bytes_of},
    segments::{Segments, Shown},
};
use crate::{clock::table::Table, ftrace::metadata::Metadata};

/// What bounds the lanes of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Bounds {
    /// No lane may take more than this.
    pub lane_bytes_max: Option<u64>,
    /// Each lane keeps only its newest bytes, at least this many, and wraps to the start of its area at the end.
    pub newest_bytes: Option<u64>,
}

/// A trace.dat being written: metadata first, then options, then one area per lane.
#[derive(Debug)]
pub struct Writer {
    frame: Frame,
    areas: Vec<Area>,
    /// Of each area, where only the newest bytes are kept.
    newest: Vec<newest_pages::Newest>,
    bounds: Bounds,
    early_at: u64,
    turn: u64,
    cpu_count_min: u32,
    /// Lanes that lie elsewhere than in their areas, with host times.
    hosted: Vec<LaneArea>,
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
        Self::create_bounded(file, metadata, clock, page_bytes, lanes, Bounds::default())
    }

    /// The same for lanes that have bounds.
    ///
    /// # Errors
    /// See [`WriteFault`]; what is in the file then is of no use.
    pub fn create_bounded(
        file: File,
        metadata: &Metadata,
        clock: &str,
        page_bytes: u32,
        lanes: &[Cpu],
        bounds: Bounds,
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
        let early_at = (tail_at + tail_bytes_max()).next_multiple_of(unit);
        let data_at = (early_at + early_options::ROOM_BYTES).next_multiple_of(unit);
        let areas = reserve_areas(&file, data_at, unit, &lanes, bounds)?;
        let cpu_count_min = lanes.last().map_or(0, |cpu| cpu.0 + 1);
        let frame = Frame { file, clock, page_bytes, unit, sections, areas_at, tail_at };
        let keep = |bytes| areas.iter().map(|area| newest_pages::Newest::new(area.bytes_max, bytes, unit)).collect();
        let newest = bounds.newest_bytes.map_or_else(Vec::new, keep);
        let writer = Self { frame, areas, newest, bounds, early_at, turn: 0, cpu_count_min, hosted: Vec::new() };
        writer.begin(&front, &metadata.cmdlines, data_at)?;
        Ok(writer)
    }

    /// Everything that is known now, so that a file is one from its first byte on.
    fn begin(&self, front: &[u8], cmdlines: &[u8], data_at: u64) -> Result<(), WriteFault> {
        let frame = &self.frame;
        frame.write(front, 0, "write descriptions")?;
        reserve(&frame.file, Extent { offset: frame.areas_at, bytes: frame.tail_at - frame.areas_at + RESERVED_BYTES });
        let file_bytes = data_at.max(self.areas.last().map_or(0, area_end));
        frame.save(&self.lane_areas(WriteState::Open, file_bytes))?;
        let options = raw(&[], self.cpu_count_min)?;
        let tail = frame.tail(&Texts { cmdlines: cmdlines.to_vec(), options, ..Texts::default() }, &[])?;
        frame.write_tail(&tail, 0, file_bytes)?;
        frame.point_to(&tail)
    }

    /// The lanes' areas, in the order of their CPUs.
    pub fn areas(&self) -> &[Area] {
        &self.areas
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.frame.file
    }

    /// Keeps these options for [`super::restore`], instead of those that were kept before: what the file shall have if
    /// [`finish`](Self::finish) is never reached.
    ///
    /// # Errors
    /// See [`WriteFault`]; those that were kept before are kept still.
    pub fn update_options(&mut self, options: &[TraceOption]) -> Result<(), WriteFault> {
        let options = raw(options, self.cpu_count_min)?;
        let written = early_options::write(self.file(), self.early_at, self.turn, &options);
        written.map_err(|source| WriteFault::Io { action: "write early options", source })?;
        self.turn += 1;
        Ok(())
    }

    /// The file gets this clock when it is finished: the one that its pages were recorded with in the end.
    pub fn set_clock(&mut self, clock: &str) {
        chosen(clock).clone_into(&mut self.frame.clock);
    }

    /// Gives all events of all lanes their host times. `filled`: as for [`finish`](Self::finish); lanes can become longer.
    /// `cmdlines`, `options`: what the file shall have if [`finish`](Self::finish) is never reached:
    /// [`super::restore`] goes on where this was killed.
    ///
    /// # Errors
    /// See [`WriteFault`]: no lane was touched. Lanes that could not be rewritten are [`Hosted::fault`].
    pub fn host_times(
        &mut self,
        filled: &mut [(Cpu, u64)],
        table: &Table,
        cmdlines: &[u8],
        options: &[TraceOption],
    ) -> Result<Hosted, WriteFault> {
        let mut areas = self.begin_hosting(filled, table, cmdlines, options)?;
        let frame = &self.frame;
        let hosted = host_lanes(&frame.file, &mut areas, frame.unit, table, &mut |areas| frame.save(areas));
        self.hosted = areas.lanes.into_iter().filter(|lane| lane.is_hosted).collect();
        for lane in &self.hosted {
            filled.iter_mut().filter(|(cpu, _)| *cpu == lane.cpu).for_each(|(_, bytes)| *bytes = lane.rest.bytes);
        }
        Ok(hosted)
    }

    /// Puts everything into the file that it takes to go on after a kill.
    pub(super) fn begin_hosting(
        &self,
        filled: &[(Cpu, u64)],
        table: &Table,
        cmdlines: &[u8],
        options: &[TraceOption],
    ) -> Result<Areas, WriteFault> {
        let mut areas = self.fill(filled)?;
        let pending =
            TraceOption::Segments(Segments { shown: Shown::Pending, table: table.clone(), uncertainties: Vec::new() });
        let (options, segments) = (raw(options, self.cpu_count_min)?, segments(&[pending])?);
        let texts = Texts { cmdlines: cmdlines.to_vec(), options, notes: PENDING_NOTE.into(), segments };
        self.frame.close(&mut areas, &texts)?;
        Ok(areas)
    }

    /// Collapses the holes and writes command lines, options and notes. `filled`: bytes of pages that were written to
    /// each lane; lanes not named are empty. `notes`: a JSON text that stock tools pass over
    /// ([`super::read::Reader::notes`]).
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
        let areas = self.fill(filled)?;
        let (segments, options) = (segments(options)?, raw(options, self.cpu_count_min)?);
        self.frame.finish(areas, &Texts { cmdlines: cmdlines.to_vec(), options, notes: notes.to_owned(), segments })
    }

    /// `written`: bytes that each lane has taken so far. Where only the newest are kept, older ones give their room back.
    ///
    /// # Errors
    /// A file system that makes no holes; the file is right, and larger than it should be.
    pub fn drop_older(&mut self, written: &[(Cpu, u64)]) -> io::Result<()> {
        for (area, newest) in self.areas.iter().zip(&mut self.newest) {
            let now = written.iter().find(|(cpu, _)| *cpu == area.cpu).map_or(0, |(_, bytes)| *bytes);
            while let Some(old) = newest.too_old(now) {
                punch(&self.frame.file, Extent { offset: area.offset + old.offset, bytes: old.bytes })?;
            }
        }
        Ok(())
    }

    /// How many of the bytes that were written to a lane are in the file.
    pub fn kept_bytes(&self, area: &Area, written: u64) -> u64 {
        self.bounds.newest_bytes.map_or(written, |newest_bytes| {
            let kept = newest_pages::kept(area.bytes_max, newest_bytes, self.frame.unit, written);
            kept.older.bytes + kept.newer.bytes
        })
    }

    /// The areas, closed, with what is in them.
    fn fill(&self, filled: &[(Cpu, u64)]) -> Result<Areas, WriteFault> {
        let about = self.file().metadata();
        let file_bytes = about.map_err(|source| WriteFault::Io { action: "ask for the size", source })?.len();
        let mut areas = self.lane_areas(WriteState::Closed, file_bytes);
        areas.lanes.iter_mut().for_each(|lane| lane.rest.bytes = 0);
        for (cpu, bytes) in filled {
            let at = self.areas.iter().position(|area| area.cpu == *cpu);
            let kept = at.and_then(|at| Some((at, self.place(&self.areas[at], *bytes)?)));
            let (index, lane) = kept.ok_or(WriteFault::Filled { cpu: *cpu, bytes: *bytes })?;
            if areas.lanes[index].rest.bytes > 0 {
                return Err(WriteFault::Lanes);
            }
            areas.lanes[index] = lane;
        }
        Ok(areas)
    }

    /// Where the pages of a lane are that has written so much; none if that cannot be.
    fn place(&self, area: &Area, written: u64) -> Option<LaneArea> {
        if let Some(lane) = self.hosted.iter().find(|lane| lane.cpu == area.cpu) {
            return (lane.rest.bytes == written).then_some(*lane);
        }
        let at = |part: Extent| Extent { offset: area.offset + part.offset, bytes: part.bytes };
        let lane = |moved, rest| LaneArea { cpu: area.cpu, moved, rest, is_hosted: false };
        let Some(newest_bytes) = self.bounds.newest_bytes else {
            let rest = at(Extent { offset: 0, bytes: written });
            return (written <= area.bytes_max).then_some(lane(Extent::default(), rest));
        };
        let kept = newest_pages::kept(area.bytes_max, newest_bytes, self.frame.unit, written);
        Some(lane(at(kept.older), at(kept.newer)))
    }

    fn lane_areas(&self, state: WriteState, file_bytes: u64) -> Areas {
        let lane = |area: &Area| LaneArea {
            cpu: area.cpu,
            moved: Extent::default(),
            rest: Extent { offset: area.offset, bytes: area.bytes_max },
            is_hosted: false,
        };
        Areas {
            state,
            page_bytes: self.frame.page_bytes,
            file_bytes,
            pending: Extent::default(),
            early_at: self.early_at,
            newest_bytes: self.bounds.newest_bytes.unwrap_or(0),
            lanes: self.areas.iter().map(lane).collect(),
        }
    }
}

/// What a tail usually takes, taken from the disk when the file is made.
const RESERVED_BYTES: u64 = 256 << 10;

fn tail_bytes_max() -> u64 {
    let texts = CMDLINES_BYTES_MAX + OPTIONS_BYTES_MAX + NOTES_BYTES_MAX + SEGMENTS_BYTES_MAX;
    u64::try_from(texts).expect("usize has at most 64 bits") + 8 + 5 * SECTION_HEADER_BYTES
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
    for id in description::FIXED_SECTIONS {
        let bytes_max = usize::try_from(u32::MAX).unwrap_or(usize::MAX);
        let body = description::body(id, metadata);
        let body = body.ok_or(WriteFault::TooLong { what: "a description", bytes: usize::MAX, bytes_max })?;
        sections.push((id, bytes_of(&out)));
        section::push(&mut out, id, &body);
    }
    // Stock readers seek with an int.
    bounded("descriptions", out.len(), 1 << 30)?;
    Ok((out, sections))
}

/// What is taken out of a file has to begin and end at blocks of the file system, and pages at multiples of their size.
pub(super) fn unit_bytes(file: &File, page_bytes: u32) -> Result<u64, WriteFault> {
    let block = about(file)?.fragment_size();
    let block = if block.is_power_of_two() && block <= 1 << 20 { block } else { 4096 };
    Ok(block.max(u64::from(page_bytes)))
}

fn about(file: &File) -> Result<statvfs::Statvfs, WriteFault> {
    let about = statvfs::fstatvfs(file);
    about.map_err(|errno| WriteFault::Io { action: "ask for the block size", source: errno.into() })
}

/// Reserves areas: the largest that the file system and the limits of this process allow, but not larger than the file
/// system itself: where holes stay, a reader that does not know holes has less to read.
fn reserve_areas(file: &File, data_at: u64, unit: u64, lanes: &[Cpu], bounds: Bounds) -> Result<Vec<Area>, WriteFault> {
    let count = u64::try_from(lanes.len()).expect("usize has at most 64 bits");
    // Beyond this limit the kernel does not only refuse: it kills (SIGXFSZ).
    let limit = resource::getrlimit(resource::Resource::RLIMIT_FSIZE).map_or(u64::MAX, |(soft, _)| soft);
    let slack = bounds.newest_bytes.map_or(0, |newest_bytes| newest_pages::slack_bytes(newest_bytes, unit));
    let least = bounds
        .newest_bytes
        .map_or(AREA_BYTES_MIN.next_multiple_of(unit), |newest_bytes| newest_pages::area_bytes_min(newest_bytes, unit));
    let mut bytes_max = AREA_BYTES_MAX.min(AREAS_BYTES_MAX / count.max(1)).saturating_sub(slack);
    if bounds.newest_bytes.is_none() {
        bytes_max = bytes_max.min(disk_bytes(file)?);
    }
    bytes_max = bytes_max.min(bounds.lane_bytes_max.unwrap_or(u64::MAX)).max(least);
    loop {
        bytes_max = bytes_max / unit * unit;
        let file_bytes = data_at + count * (bytes_max + slack);
        let result =
            if file_bytes > limit { Err(io::ErrorKind::FileTooLarge.into()) } else { file.set_len(file_bytes) };
        match result {
            Ok(()) => break,
            Err(error) if is_too_large(&error) && bytes_max > least => bytes_max = (bytes_max / 2).max(least),
            Err(error) if is_too_large(&error) => return Err(WriteFault::NoRoom(error)),
            Err(source) => return Err(WriteFault::Io { action: "reserve areas", source }),
        }
    }
    let area = |(index, cpu)| Area {
        cpu,
        offset: data_at + index * (bytes_max + slack),
        bytes_max,
        begins_again: bounds.newest_bytes.is_some(),
    };
    Ok((0..).zip(lanes.iter().copied()).map(area).collect())
}

/// All bytes of a file system; what has none to tell (a memory without a limit) counts as without end.
fn disk_bytes(file: &File) -> Result<u64, WriteFault> {
    let about = about(file)?;
    let bytes = about.blocks().saturating_mul(about.fragment_size());
    Ok(if bytes == 0 { u64::MAX } else { bytes })
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
