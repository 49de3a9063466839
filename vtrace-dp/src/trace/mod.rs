//! trace.dat: what stock tools read.
//!
//! From the top down; each module uses only what stands below it:
//!
//! | module | what |
//! |---|---|
//! | `pack` | a finished file once more, in another form |
//! | `restore` | finishes a file whose recording did not |
//! | `found` | the pages of a lane that nobody counted |
//! | `writer` | a file whose pages go to their final place at once |
//! | `hosted` | its lanes get the host's times, so that a kill at any moment loses nothing |
//! | `rewrite` | the pages of one lane get them |
//! | `frame` | what is fixed in a file from its beginning, and how its end is written |
//! | `collapse` | the holes between lanes are taken out, in place |
//! | `keep` | which pages stay when only the newest are wanted |
//! | `merge` | the events of many lanes, by time |
//! | `stamp` | the times that a stock reader shows |
//! | `reader` | files read: ours, and versions 6 and 7 of stock trace-cmd |
//! | `fields` | the fields of events |
//! | `walk` | the events of one page |
//! | `areas` | where the lanes lie while a file is written |
//! | `early` | options that a crash cannot take |
//! | `format` | the bodies of the sections that describe a machine |
//! | `metadata` | what a machine tells about itself |
//! | `option` | ids and payloads |
//! | `segments` | the clock of a guest in its file |
//! | `uncertainty` | which times are not exact, and how far off each can be |
//! | `compressed` | blocks of zstd or zlib |
//! | `input` | bounded reading |
//! | `section` | the 16 bytes in front of every section |
//! | `layout` | numbers and fixed parts |
//!
//! In:    what a machine tells about itself ([`crate::ftrace::metadata::Metadata`]), where the pages of its lanes lie, options
//! Out:   a version 7 file ([`self::write::Writer`]), in another form if one asks ([`pack`]); the contents of a version 6 or 7 file ([`self::read::Reader`])
//! Runs:  on the caller's thread; the writer is not used while pages are moved into its file
//! Full:  a disk without room leaves every page where it was, and [`areas`] says where
//! Trust: descriptions come from guests, files from anyone: bounds are checked before memory is asked for, and what
//!        stock parsers would trip over is refused
//!
//! Sources: Documentation/trace-cmd/trace-cmd.dat.v{6,7}.5.txt of trace-cmd, and what its reader does.
//!
//! ```text
//! head ─ HEADER_INFO ─ FTRACE_EVENTS ─ EVENT_FORMATS ─ KALLSYMS ─ PRINTK      written once, never moved
//! AREAS (ours) ─ CMDLINES ─ OPTIONS ─ NOTES (ours) ─┐ early options (ours)     written again when the trace ends
//! BUFFER ─ padding ─ lane ─ lane ─ …               ◄┘ holes are collapsed      pages, in their final place at once
//! ```

pub mod format;
pub mod read;
pub mod restore;
pub mod write;
