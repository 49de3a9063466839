//! Numbers and fixed parts of a trace.dat.
//!
//! Source: Documentation/trace-cmd/trace-cmd.dat.v7.5.txt and lib/trace-cmd/include/private/trace-cmd-private.h of
//! trace-cmd. All integers are little endian: traces of big endian machines are not written, and refused when read.

use vtrace_common::limits::{CMDLINES_BYTES_MAX, CPUS_MAX, METADATA_BYTES_MAX};

/// First bytes of every trace.dat.
pub const MAGIC: [u8; 10] = *b"\x17\x08\x44tracing";
/// After the magic of a version 7 file: version, little endian, sizeof(long).
pub const VERSION_7: [u8; 4] = *b"7\0\0\x08";
/// No compression: its name and its version.
pub const UNCOMPRESSED: [u8; 6] = *b"none\0\0";
/// Where the offset of the first options section stands in an uncompressed version 7 file: after magic, version,
/// page size and compression.
pub const OPTIONS_POINTER_AT: u64 = 24;
/// Where the first section of such a file begins.
pub const FIRST_SECTION_AT: u64 = OPTIONS_POINTER_AT + 8;

/// Bytes of a section's header.
pub const SECTION_HEADER_BYTES: u64 = 16;
/// Bytes of an option's header: u16 id, u32 size.
pub const OPTION_HEADER_BYTES: usize = 6;
/// Section flag: the payload is compressed.
pub const SECTION_COMPRESSED: u16 = 1;
/// Description of a section without one.
pub const NO_DESCRIPTION: u32 = u32::MAX;

/// Ids of options and sections (`enum` of `TRACECMD_OPTION_*`).
pub mod id {
    /// Options section; as an option: the last one, with the offset of the next options section.
    pub const OPTIONS: u16 = 0;
    /// Microseconds to wall-clock time, as a text.
    pub const DATE: u16 = 1;
    /// per_cpu stats of one CPU.
    pub const CPUSTAT: u16 = 2;
    /// Pages: a section, and the option that says what is in it.
    pub const BUFFER: u16 = 3;
    /// Contents of trace_clock.
    pub const TRACECLOCK: u16 = 4;
    /// uname.
    pub const UNAME: u16 = 5;
    /// What `--ts-offset` adds, as a text.
    pub const OFFSET: u16 = 7;
    /// Number of CPUs.
    pub const CPUCOUNT: u16 = 8;
    /// The writing program.
    pub const VERSION: u16 = 9;
    /// Session id.
    pub const TRACEID: u16 = 11;
    /// Guest time to host time.
    pub const TIME_SHIFT: u16 = 12;
    /// A guest of this host.
    pub const GUEST: u16 = 13;
    /// Cycles to nanoseconds.
    pub const TSC2NSEC: u16 = 14;
    /// events/header_page and events/header_event.
    pub const HEADER_INFO: u16 = 16;
    /// events/ftrace/*/format.
    pub const FTRACE_EVENTS: u16 = 17;
    /// events/SYSTEM/*/format.
    pub const EVENT_FORMATS: u16 = 18;
    /// /proc/kallsyms.
    pub const KALLSYMS: u16 = 19;
    /// printk_formats.
    pub const PRINTK: u16 = 20;
    /// saved_cmdlines.
    pub const CMDLINES: u16 = 21;
    /// Ours: where the lanes lie while the file is being written ([`super::super::areas`]). No option points to it.
    pub const AREAS: u16 = 0x7641;
    /// Ours: a JSON text about the recording. No option points to it.
    pub const NOTES: u16 = 0x764e;
    /// Ours: the guest's clock ([`super::super::segments`]). No option points to it.
    pub const SEGMENTS: u16 = 0x7653;
}

/// Name in front of the header page's text in HEADER_INFO.
pub const HEADER_PAGE_NAME: &[u8] = b"header_page\0";
/// Name in front of the header event's text.
pub const HEADER_EVENT_NAME: &[u8] = b"header_event\0";
/// In front of the options of a version 6 file.
pub const V6_OPTIONS: &[u8; 10] = b"options  \0";
/// In front of the table of pages in a version 6 file.
pub const V6_FLYRECORD: &[u8; 10] = b"flyrecord\0";

/// TIME_SHIFT flag: linear between samples (`TRACECMD_TSYNC_FLAG_INTERPOLATE`).
pub const INTERPOLATE: u32 = 1;

/// Room kept for options while a file is written. A hole: it costs nothing.
pub const OPTIONS_BYTES_MAX: usize = 32 << 20;
/// Room kept for notes.
pub const NOTES_BYTES_MAX: usize = 16 << 20;
/// Room kept for segments.
pub const SEGMENTS_BYTES_MAX: usize = 12 << 20;
/// Room kept, twice, for options that are known before the end ([`crate::trace::write::early_options`]).
pub const EARLY_BYTES_MAX: u64 = 1 << 20;
/// Options sections of one file that a reader follows.
pub const OPTIONS_SECTIONS_MAX: usize = 256;
/// Sections of one file that a reader looks at.
pub const SECTIONS_MAX: usize = 4096;
/// Apparent size of all areas of one file; ext4 with blocks of 4096 bytes ends at 16 TiB.
pub const AREAS_BYTES_MAX: u64 = 8 << 40;
/// Apparent size of one area.
pub const AREA_BYTES_MAX: u64 = 1 << 40;
/// Below this a file system (or a limit of the process) is too small to record into.
pub const AREA_BYTES_MIN: u64 = 1 << 20;

const _: () = {
    let head = MAGIC.len() + VERSION_7.len() + 4 + UNCOMPRESSED.len();
    assert!(head == 24 && OPTIONS_POINTER_AT == 24);
    // Stock readers seek with an int: everything but pages has to begin below 2 GiB.
    let front = METADATA_BYTES_MAX
        + CMDLINES_BYTES_MAX
        + OPTIONS_BYTES_MAX
        + NOTES_BYTES_MAX
        + SEGMENTS_BYTES_MAX
        + 64 * CPUS_MAX;
    assert!(front < 1 << 30, "room for format counts and section headers must be left below 2 GiB");
    assert!(AREA_BYTES_MAX <= AREAS_BYTES_MAX && AREA_BYTES_MIN < AREA_BYTES_MAX);
};
