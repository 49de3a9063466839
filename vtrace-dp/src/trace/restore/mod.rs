//! Finishes a file that its recording left unfinished.
//!
//! In:    a file of ours that a killed recording, or a machine that went down, left
//! Out:   a valid trace.dat in its place, with every whole page that is in it; what was found and what is missing
//! Runs:  on the caller's thread, under the lock that a recording holds; may itself be killed and run again
//! Full:  a full disk leaves a file that can be restored later
//! Trust: nothing: areas are compared with each other and with the file before a byte is moved
//!
//! | the areas say | pages | options |
//! |---|---|---|
//! | open | looked for ([`self::uncounted_pages`]) | the early ones ([`super::write::early_options`]) |
//! | closed | counted; maybe half moved together | those of the end, where they were written whole; else the early ones |
//! | closed, host times pending | counted; those with the guest's own times get the host's ([`super::write::host_lanes`]) | those of the end |
//! | finished | | the file is left as it is |

pub mod uncounted_pages;

use std::{cell::Cell, fs::File, io, os::unix::fs::FileExt};

use serde::Serialize;
use vtrace_common::limits::{
    CMDLINES_BYTES_MAX, CPUS_MAX, NAME_BYTES_MAX, PAGE_BYTES_MAX, PAGE_BYTES_MIN, TEXT_BYTES_MAX,
};

use self::uncounted_pages::Scan;
use super::{
    format::{
        areas::{Areas, LaneArea, WriteState},
        description,
        layout::{
            FIRST_SECTION_AT, MAGIC, NOTES_BYTES_MAX, OPTIONS_BYTES_MAX, SECTION_HEADER_BYTES, SEGMENTS_BYTES_MAX,
            UNCOMPRESSED, VERSION_7, id,
        },
        option::TraceOption,
        section::{SectionHeader, bytes_of},
        segments::{Segments, Shown},
    },
    read::{
        Reader,
        input::{FileSource, Input, ReadFault, Source},
    },
    write::{
        WriteFault,
        collapse::Compaction,
        early_options::{self, RawOption},
        frame::{Frame, Sections, Texts, raw},
        host_lanes::{HostingFault, host_lanes},
        host_times::Rewritten,
        unit_bytes,
    },
};
use crate::sys::write_lock::{WriteLock, try_write_lock};

/// Why a file cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreFault {
    /// No file that this program writes.
    #[error("not a file that vtrace recorded")]
    NotOurs,
    /// A recording writes to it.
    #[error("a recording is writing to it")]
    Busy,
    /// What it says of its lanes contradicts itself.
    #[error("it contradicts itself: {0}")]
    Areas(&'static str),
    /// It cannot be read.
    #[error(transparent)]
    Read(#[from] ReadFault),
    /// It cannot be written.
    #[error(transparent)]
    Write(#[from] WriteFault),
    /// The host's times could not be given to all of its lanes.
    #[error("cannot give it the host's times")]
    Hosting(#[from] HostingFault),
    /// A system call failed.
    #[error("cannot {action}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// How far a file had come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Was {
    /// Pages were being written.
    Open,
    /// Pages were being moved together.
    Closed,
    /// It was finished: nothing was done.
    Finished,
}

/// A file that is valid now.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Restored {
    /// How far it had come.
    pub was: Was,
    /// Its size.
    pub bytes: u64,
    /// Holes between lanes are still there: it is sparse.
    pub sparse: bool,
    /// Options were kept before the end. Without them times are cycles, and host and guest do not know each other.
    pub linked: bool,
    /// Events that got the host's times now: it was killed while they were being converted.
    pub converted: u64,
    /// One entry a lane; none for a finished file.
    pub lanes: Vec<LaneFound>,
}

/// What was found of a lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct LaneFound {
    /// The lane's CPU.
    pub cpu: u32,
    /// Whole pages, all in the file.
    pub pages: u64,
    /// Pages before the last one that were never written, or written partly.
    pub pages_missing: u64,
    /// Pages anywhere that were written partly.
    pub pages_torn: u64,
    /// Whole pages that are no longer in the file: those after a gap wider than a recording leaves.
    pub pages_left_out: u64,
}

impl Restored {
    fn finished(bytes: u64) -> Self {
        Self { was: Was::Finished, bytes, sparse: false, linked: true, converted: 0, lanes: Vec::new() }
    }

    /// Whether anything is missing that a whole recording would have.
    pub fn is_missing_pages(&self) -> bool {
        self.lanes.iter().any(|lane| lane.pages_missing + lane.pages_torn + lane.pages_left_out > 0)
    }
}

/// What is fixed in a file, as far as it can be trusted.
struct Skeleton {
    page_bytes: u32,
    sections: Sections,
    areas_at: u64,
    areas: Areas,
}

impl Skeleton {
    fn tail_at(&self) -> u64 {
        self.areas_at + Areas::section_bytes(self.areas.lanes.len())
    }
}

/// Restores a file that is open for reading and writing. A finished one is not touched.
///
/// # Errors
/// See [`RestoreFault`].
pub fn restore(file: File) -> Result<Restored, RestoreFault> {
    match try_write_lock(&file) {
        Ok(WriteLock::Busy) => return Err(RestoreFault::Busy),
        // A reader's lock does not keep the file from being restored.
        Ok(WriteLock::Held | WriteLock::ReadLocked) => {}
        Err(source) => return Err(RestoreFault::Io { action: "lock", source }),
    }
    let io = |action| move |source| RestoreFault::Io { action, source };
    let source = FileSource::new(file.try_clone().map_err(io("open again"))?).map_err(io("ask for the size"))?;
    let bytes = source.bytes();
    let skeleton = match inspect(&source) {
        Ok(skeleton) if skeleton.areas.state == WriteState::Finished => return Ok(Restored::finished(bytes)),
        Err(RestoreFault::NotOurs) if is_packed(source) => return Ok(Restored::finished(bytes)),
        inspected => inspected?,
    };
    let source = FileSource::new(file.try_clone().map_err(io("open again"))?).map_err(io("ask for the size"))?;
    let unit = unit_bytes(&file, skeleton.page_bytes)?;
    let mut plan = plan(&source, &skeleton, unit)?;
    plan.changes.sort_unstable_by_key(|(at, _)| *at);
    for (at, bytes) in &plan.changes {
        file.write_all_at(bytes, *at).map_err(io("mark a gap"))?;
    }
    let (tail_at, Skeleton { page_bytes, sections, areas_at, .. }) = (skeleton.tail_at(), skeleton);
    let frame = Frame { file, clock: plan.clock, page_bytes, unit, sections, areas_at, tail_at };
    let converted = host_times(&frame, &mut plan.areas, &mut plan.texts)?;
    for (lane, area) in plan.lanes.iter_mut().zip(&plan.areas.lanes).filter(|(_, area)| area.is_hosted) {
        lane.pages = area.rest.bytes / u64::from(page_bytes);
    }
    let finished = frame.finish(plan.areas, &plan.texts)?;
    let sparse = finished.compaction == Compaction::Left;
    Ok(Restored { was: plan.was, bytes: finished.bytes, sparse, linked: plan.linked, converted, lanes: plan.lanes })
}

/// Whether this is a finished recording of ours in a form without areas: with named instances, compressed, or version 6.
/// Such a file gets its name when it is complete.
fn is_packed(source: FileSource) -> bool {
    let is_ours = |option: &TraceOption| matches!(option, TraceOption::Version(text) if text.starts_with("vtrace "));
    Reader::open(source).is_ok_and(|reader| reader.options().iter().any(is_ours))
}

/// Resumes a recording that was killed while it gave its lanes the host's times. Returns how many events got them now.
fn host_times(frame: &Frame, areas: &mut Areas, texts: &mut Texts) -> Result<u64, RestoreFault> {
    let pending =
        texts.segments.first().map(|payload| Segments::read(&mut Input::new(&payload.as_slice(), 0, u64::MAX)));
    let Some(Segments { shown: Shown::Pending, table, .. }) = pending.transpose()? else { return Ok(0) };
    let hosted = host_lanes(&frame.file, areas, frame.unit, &table, &mut |areas| frame.save(areas));
    if let Some(fault) = hosted.fault {
        return Err(fault.into());
    }
    let mut total = Rewritten::default();
    hosted.lanes.iter().for_each(|(_, done)| total.join(done));
    let note = serde_json::json!({ "restored": { "converted": total.events } });
    let segments =
        TraceOption::Segments(Segments { shown: Shown::Rewritten, table, uncertainties: hosted.uncertainties });
    texts.notes = note.to_string();
    texts.segments = vec![segments.encode().map_err(WriteFault::from)?];
    Ok(total.events)
}

/// Looks at a file as [`restore`] would, without changing it.
///
/// # Errors
/// As [`restore`].
pub fn look<S: Source>(source: &S, unit: u64) -> Result<Vec<LaneFound>, RestoreFault> {
    let skeleton = inspect(source)?;
    Ok(plan(source, &skeleton, unit.max(u64::from(skeleton.page_bytes)))?.lanes)
}

/// What to do.
struct RestorePlan {
    was: Was,
    linked: bool,
    clock: String,
    areas: Areas,
    texts: Texts,
    lanes: Vec<LaneFound>,
    /// Bytes to be written into gaps.
    changes: Vec<(u64, Vec<u8>)>,
}

fn plan<S: Source>(source: &S, skeleton: &Skeleton, unit: u64) -> Result<RestorePlan, RestoreFault> {
    let tail = read_tail(source, skeleton).ok();
    let early = early_options::read(source, skeleton.areas.early_at).map(|(_, options)| options);
    let areas = skeleton.areas.clone();
    let cpus = areas.lanes.iter().map(|lane| lane.cpu.0 + 1).max().unwrap_or(0);
    let is_open = areas.state == WriteState::Open;
    let written = tail.as_ref().filter(|tail| !is_open && !tail.texts.notes.is_empty());
    let clock = tail.as_ref().map(|tail| tail.clock.clone());
    let clock = clock.or_else(|| early.as_ref().and_then(|options| clock_of(options))).unwrap_or_default();
    let linked = written.is_some() || early.is_some();
    let mut plan = RestorePlan {
        was: if is_open { Was::Open } else { Was::Closed },
        linked,
        clock,
        areas,
        texts: Texts::default(),
        lanes: Vec::new(),
        changes: Vec::new(),
    };
    if is_open {
        plan.find(source, unit)?
    } else {
        plan.count(source)
    }
    plan.texts = match written {
        Some(tail) => tail.texts.clone(),
        None => Texts {
            cmdlines: tail.map(|tail| tail.texts.cmdlines).unwrap_or_default(),
            options: early.map_or_else(|| raw(&[], cpus), Ok)?,
            notes: notes(&plan),
            segments: Vec::new(),
        },
    };
    Ok(plan)
}

impl RestorePlan {
    /// An open file: looks for the pages.
    fn find<S: Source>(&mut self, source: &S, unit: u64) -> Result<(), RestoreFault> {
        let page = u64::from(self.areas.page_bytes);
        let starts: Vec<u64> = self.areas.lanes.iter().map(|lane| lane.rest.offset).collect();
        let newest = self.areas.newest_bytes > 0;
        for (index, area) in self.areas.lanes.iter_mut().enumerate() {
            let scan: Scan = uncounted_pages::scan(source, area.rest, self.areas.page_bytes)?;
            let room_end = starts.get(index + 1).copied().unwrap_or(u64::MAX);
            let lane = scan.lane(area.rest, page, unit, newest, room_end);
            (area.moved, area.rest) = (lane.older, lane.newer);
            self.lanes.push(LaneFound {
                cpu: area.cpu.0,
                pages: lane.pages,
                pages_missing: lane.missing,
                pages_torn: scan.torn,
                pages_left_out: if newest { 0 } else { lane.left_out },
            });
            self.changes.extend(lane.fillers.iter().map(|(at, time)| (*at, uncounted_pages::filler(*time).to_vec())));
            for at in lane.marks {
                let commit = Input::new(source, at + 8, at + 16).u64("commit word")?;
                self.changes.extend(uncounted_pages::marked(commit).map(|word| (at + 8, word.to_le_bytes().to_vec())));
            }
        }
        Ok(())
    }

    /// A closed file: the pages are counted already. One that was cut off since has fewer.
    fn count<S: Source>(&mut self, source: &S) {
        let page = u64::from(self.areas.page_bytes);
        for area in &mut self.areas.lanes {
            let pages = |area: &LaneArea| (area.moved.bytes + area.rest.bytes) / page;
            let said = pages(area);
            for part in [&mut area.moved, &mut area.rest] {
                let left = source.bytes().saturating_sub(part.offset);
                part.bytes = if part.bytes > left { left / page * page } else { part.bytes };
            }
            let lane = LaneFound { cpu: area.cpu.0, pages: pages(area), ..LaneFound::default() };
            self.lanes.push(LaneFound { pages_missing: said - lane.pages, ..lane });
        }
    }
}

/// The text that a file that was never closed has instead of the closing table.
fn notes(plan: &RestorePlan) -> String {
    let note = serde_json::json!({ "restored": { "was": plan.was, "linked": plan.linked, "lanes": plan.lanes } });
    note.to_string()
}

/// Head and fixed sections, up to the areas.
fn inspect<S: Source>(source: &S) -> Result<Skeleton, RestoreFault> {
    let mut input = Input::new(source, 0, u64::MAX);
    let ours = |input: &mut Input<'_, S>, bytes: &[u8]| {
        let found = input.bytes(bytes_of(bytes), bytes.len(), "head").map_err(|_| RestoreFault::NotOurs)?;
        if found == bytes { Ok(()) } else { Err(RestoreFault::NotOurs) }
    };
    ours(&mut input, &MAGIC)?;
    ours(&mut input, &VERSION_7)?;
    let page_bytes = input.u32("page size")?;
    ours(&mut input, &UNCOMPRESSED)?;
    let (mut sections, mut at) = (Sections::new(), FIRST_SECTION_AT);
    for expected in description::FIXED_SECTIONS.into_iter().chain([id::AREAS]) {
        let (mut payload, header) = open(source, at).map_err(|_| RestoreFault::NotOurs)?;
        if header.id != expected || header.is_compressed() {
            return Err(RestoreFault::NotOurs);
        }
        if expected == id::AREAS {
            let areas = Areas::read(&mut payload)?.settle(source.bytes());
            let skeleton = Skeleton { page_bytes, sections, areas_at: at, areas };
            check(&skeleton)?;
            return Ok(skeleton);
        }
        sections.push((expected, at));
        at = (at + SECTION_HEADER_BYTES).checked_add(header.bytes).ok_or(RestoreFault::NotOurs)?;
    }
    Err(RestoreFault::NotOurs)
}

/// Checks that nothing that is moved later overlaps anything else.
fn check(skeleton: &Skeleton) -> Result<(), RestoreFault> {
    let Skeleton { page_bytes, areas, .. } = skeleton;
    let page = usize::try_from(*page_bytes).unwrap_or(0);
    if !page.is_power_of_two() || !(PAGE_BYTES_MIN..=PAGE_BYTES_MAX).contains(&page) || areas.page_bytes != *page_bytes
    {
        return Err(RestoreFault::Areas("its pages have no size"));
    }
    if !areas.lanes.is_sorted_by(|one, next| one.cpu < next.cpu) {
        return Err(RestoreFault::Areas("its lanes have no order"));
    }
    if areas.lanes.last().is_some_and(|lane| usize::try_from(lane.cpu.0).map_or(true, |cpu| cpu >= CPUS_MAX)) {
        return Err(RestoreFault::Areas("it has lanes of impossible CPUs"));
    }
    let page = u64::from(*page_bytes);
    let mut end = skeleton.tail_at();
    for lane in &areas.lanes {
        let mut parts = [lane.moved, lane.rest];
        parts.sort_unstable_by_key(|part| part.offset);
        for part in parts.into_iter().filter(|part| part.bytes > 0) {
            let last = part.offset.checked_add(part.bytes).filter(|last| i64::try_from(*last).is_ok());
            if part.offset < end || last.is_none() || !part.offset.is_multiple_of(page) {
                return Err(RestoreFault::Areas("its lanes lie over each other"));
            }
            if areas.state == WriteState::Closed && !part.bytes.is_multiple_of(page) {
                return Err(RestoreFault::Areas("a lane ends within a page"));
            }
            end = part.end();
        }
    }
    Ok(())
}

fn open<S: Source>(source: &S, at: u64) -> Result<(Input<'_, S>, SectionHeader), ReadFault> {
    let start = at.checked_add(SECTION_HEADER_BYTES).ok_or(ReadFault::Short { what: "section", offset: at })?;
    let header = SectionHeader::parse(&Input::new(source, at, start).array("header of a section")?);
    let end = start.checked_add(header.bytes).filter(|end| *end <= source.bytes());
    let end = end.ok_or(ReadFault::Short { what: "section", offset: at })?;
    Ok((Input::new(source, start, end), header))
}

/// The texts and options written at the end, as they were.
struct Tail {
    texts: Texts,
    clock: String,
}

fn read_tail<S: Source>(source: &S, skeleton: &Skeleton) -> Result<Tail, ReadFault> {
    let at = Cell::new(skeleton.tail_at());
    let next = |expected: u16| {
        let start = at.get();
        let nonsense = ReadFault::Nonsense { what: "end of the file", offset: start };
        let (input, header) = open(source, start)?;
        if header.id != expected || header.is_compressed() {
            return Err(nonsense);
        }
        at.set(start + SECTION_HEADER_BYTES + header.bytes);
        Ok((input, header))
    };
    let (mut input, _) = next(id::CMDLINES)?;
    let bytes = input.u64("length of the command lines")?;
    let cmdlines = input.bytes(bytes, CMDLINES_BYTES_MAX, "command lines")?;
    let (mut input, _) = next(id::OPTIONS)?;
    let (options, clock) = read_options(&mut input)?;
    let notes = match next(id::NOTES) {
        Ok((mut input, header)) => input.bytes(header.bytes, NOTES_BYTES_MAX, "notes")?,
        Err(_) => Vec::new(),
    };
    let notes = String::from_utf8(notes).unwrap_or_default();
    let mut segments = Vec::new();
    if let Ok((mut input, header)) = next(id::SEGMENTS) {
        segments.push(input.bytes(header.bytes, SEGMENTS_BYTES_MAX, "segments")?);
    }
    Ok(Tail { texts: Texts { cmdlines, options, notes, segments }, clock })
}

/// Options but those that say where things are, and the clock of the pages. The end has to be there.
fn read_options<S: Source>(input: &mut Input<'_, S>) -> Result<(Vec<RawOption>, String), ReadFault> {
    let (mut options, mut clock, mut room) = (Vec::new(), String::new(), OPTIONS_BYTES_MAX);
    loop {
        let id = input.u16("id of an option")?;
        let bytes = input.u32("length of an option")?;
        let payload = input.bytes(u64::from(bytes), room, "option")?;
        room -= payload.len();
        match id {
            id::OPTIONS => return Ok((options, clock)),
            id::BUFFER => clock = buffer_clock(&payload)?,
            id::HEADER_INFO..=id::CMDLINES => {}
            _ => options.push((id, payload)),
        }
    }
}

fn buffer_clock(payload: &[u8]) -> Result<String, ReadFault> {
    let mut input = Input::new(&payload, 0, bytes_of(payload));
    input.u64("place of pages")?;
    input.text(TEXT_BYTES_MAX, "name of an instance")?;
    let clock = input.text(NAME_BYTES_MAX, "clock of an instance")?;
    Ok(String::from_utf8_lossy(&clock).into_owned())
}

fn clock_of(options: &[RawOption]) -> Option<String> {
    let (_, payload) = options.iter().find(|(id, _)| *id == id::TRACECLOCK)?;
    match TraceOption::parse(id::TRACECLOCK, payload) {
        Ok(Some(TraceOption::TraceClock(clock))) => Some(clock),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
