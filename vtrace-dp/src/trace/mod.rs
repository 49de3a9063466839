//! trace.dat: what stock tools read.
//!
//! In:    what a machine tells about itself ([`metadata::Metadata`]), where the pages of its lanes lie, options
//! Out:   a version 7 file ([`writer::Writer`]), in another form if one asks ([`pack`]); the contents of a version 6 or 7 file ([`reader::Reader`])
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

pub mod areas;
pub mod collapse;
pub mod compressed;
pub mod doubt;
pub mod early;
pub mod fields;
pub mod format;
pub mod found;
mod frame;
pub mod hosted;
pub mod input;
pub mod keep;
pub mod layout;
pub mod merge;
pub mod metadata;
pub mod option;
pub mod pack;
pub mod reader;
pub mod restore;
pub mod rewrite;
pub mod section;
pub mod segments;
pub mod stamp;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod walk;
pub mod writer;
