//! trace.dat: files that stock tools read.
//!
//! Top down; each module uses only those below it:
//!
//! | module | what |
//! |---|---|
//! | `write::pack` | converts a finished file to another form |
//! | `restore` | finishes a file whose recording was killed |
//! | `restore::uncounted_pages` | finds the pages of a lane whose length was never stored |
//! | `write` | a file whose pages are written to their final place |
//! | `write::host_lanes` | gives all lanes host times, so that a kill at any moment loses nothing |
//! | `write::host_times` | rewrites the pages of one lane with host times |
//! | `write::frame` | the fixed parts of a file, and how it is finished |
//! | `write::collapse` | removes the holes between lanes, in place |
//! | `write::newest_pages` | which pages stay when only the newest are kept |
//! | `write::early_options` | options stored before the end, so that they survive a crash |
//! | `read::merge` | the events of many lanes in time order |
//! | `read::times` | the times that a stock reader shows |
//! | `read` | reads files: ours, and versions 6 and 7 of stock trace-cmd |
//! | `read::input` | bounded reading |
//! | `format::areas` | where the lanes are while a file is written |
//! | `format::description` | the sections that describe a machine |
//! | `format::option` | ids and payloads of options |
//! | `format::segments` | the clock of a guest in its file |
//! | `format::uncertainty` | the times that are not exact, and the error of each |
//! | `format::compressed` | blocks of zstd or zlib |
//! | `format::section` | the 16 bytes before every section |
//! | `format::layout` | numbers and fixed parts |
//!
//! In:    the description of a machine ([`crate::ftrace::metadata::Metadata`]), the pages of its lanes, options
//! Out:   a file of version 7 ([`self::write::Writer`]), or of another form ([`self::write::pack`]); the contents of a file of
//!        version 6 or 7 ([`self::read::Reader`])
//! Runs:  on the caller's thread; the writer is not used while pages are moved into its file
//! Full:  a full disk leaves every page where it was, and [`self::format::areas`] records where
//! Trust: descriptions come from guests, files from anyone: bounds are checked before memory is allocated, and what stock
//!        parsers fail on is refused
//!
//! Sources: Documentation/trace-cmd/trace-cmd.dat.v{6,7}.5.txt of trace-cmd, and its reader.
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
