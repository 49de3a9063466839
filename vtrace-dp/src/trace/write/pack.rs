//! Rewrites a finished file in another form: version 6, compressed, or with the pages of more instances in it.
//!
//! In:    finished files: that of the top instance, and one of each named one
//! Out:   one file that stock trace-cmd reads, as if it had written it
//! Runs:  on the caller's thread, after the last page is written
//! Full:  a full disk is an error; the input files are unchanged
//! Trust: the files are our own, but are read as untrusted input
//!
//! Everything but pages comes in front, below 2 GiB. A section need not hold the pages that its option points to: those
//! of the named instances are empty, and the last one, the top instance's, reaches to the end of the file.

use std::{collections::BTreeMap, fs::File, io, os::unix::fs::FileExt};

use nix::fcntl::copy_file_range;
use vtrace_common::ids::Cpu;

use super::early_options::{self, RawOption};
use crate::{
    ftrace::metadata::Metadata,
    trace::{
        format::{
            compressed::Compression,
            description,
            layout::{
                MAGIC, NO_DESCRIPTION, SECTION_COMPRESSED, SECTION_HEADER_BYTES, V6_FLYRECORD, V6_OPTIONS, VERSION_7,
                id,
            },
            option::{self, OptionFault, TraceOption},
            section::{self, SectionHeader, bytes_of},
        },
        read::{
            Buffer, LaneData, Reader,
            input::{FileSource, ReadFault},
        },
    },
};

/// Pages are compressed in pieces of this, or one by one where they are larger. Stock trace-cmd takes 40 KiB.
const CHUNK_BYTES: usize = 64 << 10;
/// Pages begin at multiples of this, and of their own size.
const UNIT_BYTES: u64 = 4096;
const COPY_BYTES: usize = 1 << 20;

/// How a file is to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Form {
    /// Its version.
    pub version: FormatVersion,
    /// How it is compressed; version 6 cannot be.
    pub compression: Compression,
}

/// The version of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub enum FormatVersion {
    /// For readers that do not support version 7 (gpuvis, Trace Compass)
    #[value(name = "6")]
    V6,
    /// What trace-cmd 3 and KernelShark 2 read
    #[value(name = "7")]
    #[default]
    V7,
}

/// Why a file cannot be had in another form.
#[derive(Debug, thiserror::Error)]
pub enum PackFault {
    /// What there is cannot be read.
    #[error(transparent)]
    Read(#[from] ReadFault),
    /// An option that no file can hold.
    #[error("cannot write an option")]
    Option(#[from] OptionFault),
    /// Something that the form has no place for.
    #[error("{0}")]
    Unfit(&'static str),
    /// Reading, writing or compressing failed.
    #[error("cannot {action}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

fn failed(action: &'static str) -> impl FnOnce(io::Error) -> PackFault {
    move |source| PackFault::Io { action, source }
}

/// An instance and where its pages are going to be.
struct Part<'a> {
    name: &'a str,
    reader: &'a Reader<FileSource>,
    buffer: Buffer,
    /// By the places of the buffer's lanes.
    placed: Vec<LaneData>,
}

/// Writes `top`, and the top instances of `named` under their names, into `out`, which is empty. Its size comes back.
///
/// # Errors
/// See [`PackFault`]; what is in `out` then is of no use.
pub fn pack(top: File, named: &[(&str, File)], form: Form, out: &File) -> Result<u64, PackFault> {
    let open = |file: File| {
        let source = FileSource::new(file).map_err(failed("ask for the size"))?;
        Ok::<_, PackFault>(Reader::open(source)?)
    };
    let top = open(top)?;
    let clones = named.iter().map(|(name, file)| Ok((*name, open(file.try_clone().map_err(failed("open"))?)?)));
    let named = clones.collect::<Result<Vec<_>, PackFault>>()?;
    let all = || std::iter::once(("", &top)).chain(named.iter().map(|(name, reader)| (*name, reader)));
    let part = |(name, reader)| Part { name, reader, buffer: lanes_of(reader), placed: Vec::new() };
    let mut packer = Packer {
        out,
        at: 0,
        form,
        metadata: joined(all().map(|(_, reader)| reader.metadata())),
        options: options(all())?,
        parts: all().map(part).collect(),
        page_bytes: top.top().map_or(4096, |buffer| buffer.page_bytes),
    };
    match form.version {
        FormatVersion::V7 => packer.write_7(&top),
        FormatVersion::V6 => packer.write_6(),
    }
}

/// Writes a file whose top instance is empty, and whose instance `name` is what was the top one of `file`, into `out`,
/// which is empty. Its size comes back.
///
/// # Errors
/// See [`PackFault`]; what is in `out` then is of no use.
pub fn pack_instance(file: File, name: &str, form: Form, out: &File) -> Result<u64, PackFault> {
    let reader = Reader::open(FileSource::new(file).map_err(failed("ask for the size"))?)?;
    let buffer = lanes_of(&reader);
    let mut options = options([("", &reader), (name, &reader)].into_iter())?;
    // The statistics are those of the instance.
    options.retain(|(option, text)| *option != id::CPUSTAT || text.starts_with(INSTANCE.as_bytes()));
    let page_bytes = buffer.page_bytes;
    let empty = Buffer { lanes: Vec::new(), ..buffer.clone() };
    let part = |name, buffer| Part { name, reader: &reader, buffer, placed: Vec::new() };
    let parts = vec![part("", empty), part(name, buffer)];
    let metadata = reader.metadata().clone();
    let mut packer = Packer { out, at: 0, form, metadata, options, parts, page_bytes };
    match form.version {
        FormatVersion::V7 => packer.write_7(&reader),
        FormatVersion::V6 => packer.write_6(),
    }
}

/// What the statistics of a named instance begin with.
const INSTANCE: &str = "Instance: ";

/// The lanes of a file's top instance that have pages.
fn lanes_of(reader: &Reader<FileSource>) -> Buffer {
    let mut buffer = reader.top().cloned().unwrap_or_default();
    buffer.lanes.retain(|lane| lane.bytes > 0);
    buffer
}

/// What machines of one kernel tell, each of its own events.
fn joined<'a>(all: impl Iterator<Item = &'a Metadata>) -> Metadata {
    let (mut joined, mut lines) = (Metadata::default(), BTreeMap::new());
    for (at, metadata) in all.enumerate() {
        if at == 0 {
            joined = metadata.clone();
        }
        for (system, formats) in &metadata.event_formats {
            let known = joined.event_formats.entry(system.clone()).or_default();
            known
                .extend(formats.iter().filter(|format| at > 0 && !known.contains(format)).cloned().collect::<Vec<_>>());
        }
        for line in metadata.cmdlines.split_inclusive(|byte| *byte == b'\n') {
            let task = line.split(|byte| *byte == b' ').next().unwrap_or_default();
            lines.entry(task).or_insert(line);
        }
    }
    joined.cmdlines = lines.into_values().collect::<Vec<_>>().concat();
    joined
}

/// The top file's options, and the statistics of the others.
fn options<'a>(all: impl Iterator<Item = (&'a str, &'a Reader<FileSource>)>) -> Result<Vec<RawOption>, PackFault> {
    let (mut raw, mut cpus) = (Vec::new(), 0);
    for (at, (name, reader)) in all.enumerate() {
        for option in reader.options() {
            match option {
                TraceOption::CpuCount(count) => cpus = cpus.max(*count),
                TraceOption::CpuStat(text) if at > 0 => {
                    raw.push((id::CPUSTAT, TraceOption::CpuStat(format!("{INSTANCE}{name}\n{text}")).encode()?));
                }
                option if at == 0 => raw.push((option.id(), option.encode()?)),
                _ => {}
            }
        }
        raw.extend(reader.other_options().iter().filter(|_| at == 0).cloned());
    }
    // After everything else: a stock reader of version 6 takes the number of CPUs from here.
    raw.push((id::CPUCOUNT, TraceOption::CpuCount(cpus).encode()?));
    Ok(raw)
}

struct Packer<'a> {
    out: &'a File,
    at: u64,
    form: Form,
    metadata: Metadata,
    options: Vec<RawOption>,
    /// The top instance first.
    parts: Vec<Part<'a>>,
    page_bytes: u32,
}

impl Packer<'_> {
    fn write_7(&mut self, top: &Reader<FileSource>) -> Result<u64, PackFault> {
        let (name, version) = self.form.compression.name();
        let head = [&MAGIC[..], &VERSION_7, &self.page_bytes.to_le_bytes(), name.as_bytes(), b"\0", version.as_bytes()];
        self.put(&head.concat())?;
        self.put(b"\0")?;
        let pointer_at = self.at;
        self.put(&[0; 8])?;
        let mut places = Vec::new();
        for section in description::FIXED_SECTIONS.into_iter().chain([id::CMDLINES]) {
            places.push((section, self.at));
            let body = self.body(section)?;
            self.put_section(section, &body)?;
        }
        for (section, body) in extras(top)? {
            self.put(&SectionHeader::plain(section, bytes_of(&body)).encode())?;
            self.put(&body)?;
        }
        // Written twice: where the pages are is known when they are written, how long this is now.
        let options_at = self.at;
        let sections_at = |bytes: u64| options_at + SECTION_HEADER_BYTES + bytes;
        let bytes = bytes_of(&self.options_7(&places, 0)?);
        self.at = sections_at(bytes) + SECTION_HEADER_BYTES * u64::try_from(self.parts.len()).unwrap_or(u64::MAX);
        let data_at = self.at;
        self.write_lanes()?;
        let end = self.at.max(data_at);
        self.out.set_len(end).map_err(failed("set the size"))?;
        let options = self.options_7(&places, sections_at(bytes))?;
        let mut front = Vec::new();
        section::push(&mut front, id::OPTIONS, &options);
        let flags = if self.form.compression == Compression::None { 0 } else { SECTION_COMPRESSED };
        for at in (0..self.parts.len()).rev() {
            let bytes = if at == 0 { end - data_at } else { 0 };
            front.extend(SectionHeader { id: id::BUFFER, flags, description: NO_DESCRIPTION, bytes }.encode());
        }
        self.out.write_all_at(&front, options_at).map_err(failed("write options"))?;
        let pointed = self.out.write_all_at(&options_at.to_le_bytes(), pointer_at);
        pointed.map_err(failed("write the place of the options"))?;
        Ok(end)
    }

    /// The payload of the options section; BUFFER sections lie from `sections_at` on, the top instance's last.
    fn options_7(&self, places: &[(u16, u64)], sections_at: u64) -> Result<Vec<u8>, PackFault> {
        let mut out = Vec::new();
        for (section, at) in places {
            option::push(&mut out, *section, &at.to_le_bytes())?;
        }
        out.extend(early_options::encode(&self.options)?);
        for (at, part) in self.parts.iter().enumerate() {
            let before = u64::try_from(self.parts.len() - 1 - at).unwrap_or(u64::MAX);
            option::push(&mut out, id::BUFFER, &part.option(sections_at + SECTION_HEADER_BYTES * before))?;
        }
        option::push(&mut out, id::OPTIONS, &0u64.to_le_bytes())?;
        Ok(out)
    }

    fn write_6(&mut self) -> Result<u64, PackFault> {
        if self.form.compression != Compression::None {
            return Err(PackFault::Unfit("version 6 cannot be compressed"));
        }
        if self.parts.iter().any(|part| !part.buffer.lanes.is_empty() && part.buffer.page_bytes != self.page_bytes) {
            return Err(PackFault::Unfit("version 6 has one page size for all instances"));
        }
        let mut front = [&MAGIC, &b"6\0\0\x08"[..], &self.page_bytes.to_le_bytes()].concat();
        for section in description::FIXED_SECTIONS.into_iter().chain([id::CMDLINES]) {
            front.extend(self.body(section)?);
        }
        let cpus = self.options.iter().rev().find(|(option, _)| *option == id::CPUCOUNT);
        let cpus = cpus.and_then(|(_, payload)| payload.as_array().copied()).map_or(0, u32::from_le_bytes);
        front.extend(cpus.to_le_bytes());
        front.extend(V6_OPTIONS);
        front.extend(early_options::encode(&self.options)?);
        // Twice: first to know how long it is.
        let length = self.tables_6(bytes_of(&front), cpus)?.len();
        self.at = bytes_of(&front) + u64::try_from(length).unwrap_or(u64::MAX);
        self.write_lanes()?;
        let tables = self.tables_6(bytes_of(&front), cpus)?;
        front.extend(tables);
        self.out.write_all_at(&front, 0).map_err(failed("write descriptions"))?;
        self.out.set_len(self.at.max(bytes_of(&front))).map_err(failed("set the size"))?;
        Ok(self.at)
    }

    /// The options of the named instances, and the tables of all.
    fn tables_6(&self, begin: u64, cpus: u32) -> Result<Vec<u8>, PackFault> {
        let clock = self.options.iter().find(|(option, _)| *option == id::TRACECLOCK);
        let mut clock_text = Vec::new();
        clock.iter().for_each(|(_, text)| description::push_long(&mut clock_text, text));
        let table_bytes = bytes_of(V6_FLYRECORD) + 16 * u64::from(cpus) + bytes_of(&clock_text);
        let named = &self.parts[1..];
        let options_bytes: u64 = named.iter().map(|part| 6 + 8 + bytes_of(part.name.as_bytes()) + 1).sum();
        let tables_at = begin + options_bytes + 2;
        let mut out = Vec::new();
        for (at, part) in (1u64..).zip(named) {
            let payload = [&(tables_at + at * table_bytes).to_le_bytes(), part.name.as_bytes(), b"\0"].concat();
            option::push(&mut out, id::BUFFER, &payload)?;
        }
        out.extend(0u16.to_le_bytes());
        for part in &self.parts {
            out.extend(V6_FLYRECORD);
            for cpu in (0..cpus).map(Cpu) {
                let lane = part.placed.iter().find(|lane| lane.cpu == cpu);
                let (offset, bytes) = lane.map_or((0, 0), |lane| (lane.offset, lane.bytes));
                out.extend(offset.to_le_bytes());
                out.extend(bytes.to_le_bytes());
            }
            out.extend(&clock_text);
        }
        Ok(out)
    }

    fn body(&self, section: u16) -> Result<Vec<u8>, PackFault> {
        description::body(section, &self.metadata).ok_or(PackFault::Unfit("a description is too long"))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), PackFault> {
        self.out.write_all_at(bytes, self.at).map_err(failed("write"))?;
        self.at += bytes_of(bytes);
        Ok(())
    }

    fn put_section(&mut self, section: u16, body: &[u8]) -> Result<(), PackFault> {
        let compression = self.form.compression;
        let (flags, body) = match compression {
            Compression::None => (0, body.to_vec()),
            _ => (SECTION_COMPRESSED, compression.pack(body).map_err(failed("compress"))?),
        };
        let header = SectionHeader { id: section, flags, description: NO_DESCRIPTION, bytes: bytes_of(&body) };
        self.put(&header.encode())?;
        self.put(&body)
    }

    /// Writes all pages from here on, and notes where.
    fn write_lanes(&mut self) -> Result<(), PackFault> {
        for index in 0..self.parts.len() {
            let Part { reader, buffer, .. } = &self.parts[index];
            let (reader, buffer) = (*reader, buffer.clone());
            let unit = UNIT_BYTES.max(u64::from(buffer.page_bytes));
            let mut placed = Vec::new();
            for lane in &buffer.lanes {
                self.at = self.at.next_multiple_of(unit);
                let offset = self.at;
                match self.form.compression {
                    Compression::None => self.copy(reader, lane)?,
                    _ => self.compress(reader, &buffer, lane)?,
                }
                placed.push(LaneData { cpu: lane.cpu, offset, bytes: self.at - offset });
            }
            self.parts[index].placed = placed;
        }
        Ok(())
    }

    /// u32 number of chunks, then the chunks.
    fn compress(&mut self, reader: &Reader<FileSource>, buffer: &Buffer, lane: &LaneData) -> Result<(), PackFault> {
        let (count_at, mut count) = (self.at, 0u32);
        self.put(&[0; 4])?;
        let page_bytes = usize::try_from(buffer.page_bytes).unwrap_or(usize::MAX);
        let mut chunk = Vec::with_capacity(CHUNK_BYTES.max(page_bytes));
        let mut pages = reader.pages(buffer, lane).peekable();
        while let Some(page) = pages.next() {
            chunk.extend(page?.1);
            if chunk.len() + page_bytes > CHUNK_BYTES || pages.peek().is_none() {
                let block = self.form.compression.pack(&chunk).map_err(failed("compress"))?;
                self.put(&block)?;
                count += 1;
                chunk.clear();
            }
        }
        let counted = self.out.write_all_at(&count.to_le_bytes(), count_at);
        counted.map_err(failed("write"))
    }

    /// In the kernel where it can be, without a copy where the file system shares blocks.
    fn copy(&mut self, reader: &Reader<FileSource>, lane: &LaneData) -> Result<(), PackFault> {
        let (from, mut done) = (reader.source().file(), 0);
        let signed = |at: u64| i64::try_from(at).map_err(|_| failed("copy pages")(io::ErrorKind::FileTooLarge.into()));
        while done < lane.bytes {
            let (mut off_in, mut off_out) = (signed(lane.offset + done)?, signed(self.at)?);
            let length = usize::try_from(lane.bytes - done).unwrap_or(usize::MAX).min(1 << 30);
            let copied = match copy_file_range(from, Some(&mut off_in), self.out, Some(&mut off_out), length) {
                Ok(copied) if copied > 0 => copied,
                _ => self.copy_through_memory(from, lane.offset + done, length.min(COPY_BYTES))?,
            };
            let copied = u64::try_from(copied).unwrap_or(u64::MAX);
            (done, self.at) = (done + copied, self.at + copied);
        }
        Ok(())
    }

    fn copy_through_memory(&self, from: &File, at: u64, bytes: usize) -> Result<usize, PackFault> {
        let mut buffer = vec![0; bytes];
        from.read_exact_at(&mut buffer, at).map_err(failed("read pages"))?;
        self.out.write_all_at(&buffer, self.at).map_err(failed("write pages"))?;
        Ok(bytes)
    }
}

impl Part<'_> {
    /// u64 place of the section, name, clock, page, lanes.
    fn option(&self, section_at: u64) -> Vec<u8> {
        let mut out = section_at.to_le_bytes().to_vec();
        for text in [self.name, &self.buffer.clock] {
            out.extend(text.as_bytes());
            out.push(0);
        }
        out.extend(self.buffer.page_bytes.to_le_bytes());
        let lanes = &self.buffer.lanes;
        out.extend(u32::try_from(lanes.len()).expect("bounded by limits::CPUS_MAX").to_le_bytes());
        for (at, lane) in lanes.iter().enumerate() {
            let (offset, bytes) = self.placed.get(at).map_or((0, 0), |placed| (placed.offset, placed.bytes));
            out.extend(lane.cpu.0.to_le_bytes());
            out.extend(offset.to_le_bytes());
            out.extend(bytes.to_le_bytes());
        }
        out
    }
}

/// Sections of ours that no option points to, but the list of areas: there are none in this file.
fn extras(reader: &Reader<FileSource>) -> Result<Vec<(u16, Vec<u8>)>, PackFault> {
    let mut extras = Vec::new();
    if let Some(notes) = reader.notes()? {
        extras.push((id::NOTES, notes.into_bytes()));
    }
    if let Some(segments) = reader.segments()? {
        extras.push((id::SEGMENTS, segments.encode()));
    }
    Ok(extras)
}
