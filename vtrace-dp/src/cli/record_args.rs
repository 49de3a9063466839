//! The command line of `vtrace record` and `vtrace start`.

use std::{ffi::OsString, path::PathBuf};

use clap::Args as ClapArgs;

use super::control_args::{BackgroundArgs, SESSION};
use crate::{
    drain::sink::choice::SinkChoice,
    server::DIRECTORY,
    trace::{format::compressed::Compression, write::pack::FormatVersion},
};

const EVENTS: &str = "Events and tracers (for the preceding machine or instance)";
const FILTERS: &str = "Filters (for the preceding machine or instance)";
const RINGS: &str = "Ring buffers (for the preceding machine or instance)";
const MACHINES: &str = "Machines";
const FILES: &str = "Output files";
const REPORT: &str = "Report";

/// `vtrace record [OPTIONS] [--dom GUEST [GUEST OPTIONS]]… [--] [COMMAND]`
#[derive(ClapArgs, Debug)]
#[command(
    override_usage = "vtrace record [OPTIONS] [-e EVENT]... [-B NAME -e EVENT...]... [--dom GUEST -e EVENT... [--exec COMMAND... \\;]]... [--] [COMMAND]...",
    after_help = "Options after --dom apply to that guest, options after -B to that instance.\n\n\
        Recording ends with COMMAND, else with the last --exec, at --timeout, or with Ctrl-C. A second Ctrl-C stops at \
        once and keeps what has been written.\n\n\
        The host's events go to FILE, each guest's to FILE-GUEST.dat.\n\n\
        Exit status: 0 recorded (also if --timeout or Ctrl-C ended COMMAND), 1 failed, 2 usage, 3 data lost under \
        --strict, else the exit status of COMMAND.\n\n\
        Examples:\n  \
        vtrace record -e sched -e irq -- make\n  \
        vtrace record -e kvm --dom guest1 -e sched -- sleep 10\n  \
        vtrace record -e kvm --dom guest1 -e all --exec ./app \\; --timeout 30\n  \
        trace-cmd report -i trace.dat -i trace-guest1.dat"
)]
pub struct RecordArgs {
    /// Options that each machine has
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Also record this guest; the options that follow apply to it
    #[arg(short = 'A', long = "dom", value_name = "GUEST", help_heading = MACHINES)]
    pub dom: Vec<String>,
    /// Also record into a trace instance of this name; the options that follow apply to it. Before the first --dom it is
    /// an instance of the host, stored in the host's file. After --dom it names that guest's buffer in its file, at most
    /// once per guest
    #[arg(short = 'B', long = "instance", value_name = "NAME", help_heading = MACHINES)]
    pub instance: Vec<String>,
    /// File for the host; a guest's file has its name before the suffix, and ends in .dat: x.y gives x-guest1.y.dat
    #[arg(short, long, value_name = "FILE", default_value = "trace.dat", help_heading = FILES)]
    pub output: PathBuf,
    /// Record without the guests that cannot be recorded; the exit status is still 1
    #[arg(long, help_heading = SESSION)]
    pub keep_going: bool,
    /// Stop after this many seconds
    #[arg(long, value_name = "SECONDS", help_heading = SESSION)]
    pub timeout: Option<f64>,
    /// Run the host's recording threads with SCHED_FIFO at this priority
    #[arg(long, value_name = "PRIO", num_args = 0..=1, require_equals = true, default_missing_value = "1",
          value_parser = clap::value_parser!(u8).range(1..=99), help_heading = SESSION)]
    pub rt: Option<u8>,
    /// Keep only the newest data of each CPU, at least this many KiB. Before the first -B and --dom it applies to all
    /// machines that have none of their own
    #[arg(short = 'm', long = "newest", value_name = "KB", value_parser = clap::value_parser!(u32).range(1..), help_heading = FILES)]
    pub newest_kb: Vec<u32>,
    /// Ignored, for compatibility with trace-cmd: recording does not wake up at an interval
    #[arg(short = 's', value_name = "USEC", help_heading = FILES)]
    pub interval: Vec<u64>,
    /// Stop when the trace data in one file reaches SIZE (suffixes K, M, G, T). Checked once a second; metadata (some MB)
    /// is not counted
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = FILES)]
    pub max_file: Option<u64>,
    /// Do not overwrite existing files
    #[arg(long, help_heading = FILES)]
    pub no_clobber: bool,
    /// Compress the files when recording ends
    #[arg(long, value_enum, value_name = "HOW", default_value_t, help_heading = FILES)]
    pub compression: Compression,
    /// Version of the file format: use 6 for readers that do not support 7. Version 6 and compressed files are written
    /// when recording ends, and need the same disk space again until then
    #[arg(long, value_enum, value_name = "VERSION", default_value_t, help_heading = FILES)]
    pub file_version: FormatVersion,
    /// Use wall-clock timestamps, in seconds since 1970
    #[arg(long, help_heading = FILES)]
    pub date: bool,
    /// Stop recording a guest, and only that guest, before its file exceeds SIZE bytes
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = FILES)]
    pub max_guest_bytes: Option<u64>,
    /// Do not store kernel symbols: recording starts faster, functions are shown as addresses
    #[arg(long, help_heading = FILES)]
    pub no_kallsyms: bool,
    /// How guest pages are written: with O_DIRECT where the file system supports it, or as given
    #[arg(long, value_enum, value_name = "HOW", default_value_t, help_heading = FILES)]
    pub sink: SinkChoice,
    /// Keep guest timestamps in the guest's clock
    #[arg(long, help_heading = FILES)]
    pub raw_clock: bool,
    /// Exit with status 3 if a page or an event was lost
    #[arg(long, help_heading = REPORT)]
    pub strict: bool,
    /// Print the summary as JSON
    #[arg(long, help_heading = REPORT)]
    pub json: bool,
    /// Show no status line and no summary
    #[arg(short, long, help_heading = REPORT)]
    pub quiet: bool,
    /// Options of recordings in the background
    #[command(flatten)]
    pub background: BackgroundArgs,
    /// Directory of the server's sockets
    #[arg(long, value_name = "DIR", default_value = DIRECTORY, help_heading = SESSION)]
    pub dir: PathBuf,
    /// Command to run while recording
    #[arg(value_name = "COMMAND", trailing_var_arg = true)]
    pub command: Vec<OsString>,
}

/// Options before the first `--dom` apply to the host (after a `-B`, to that instance), options after one to that guest,
/// as in trace-cmd.
///
/// Their order matters: [`super::plan`] reads it from clap's matches.
#[derive(ClapArgs, Debug)]
pub struct MachineArgs {
    /// Event to record: SYSTEM, SYSTEM:EVENT, globs in either part, or `all`; can be repeated
    #[arg(short = 'e', long = "event", value_name = "EVENT", help_heading = EVENTS)]
    pub event: Vec<String>,
    /// Filter for the preceding -e; an event must pass all of them
    #[arg(short = 'f', long, value_name = "FILTER", help_heading = EVENTS)]
    pub filter: Vec<String>,
    /// Trigger for the preceding -e
    #[arg(short = 'R', long, value_name = "TRIGGER", help_heading = EVENTS)]
    pub trigger: Vec<String>,
    /// Exclude the events of every following -e
    #[arg(
        short = 'v',
        long = "exclude",
        num_args = 0,
        default_missing_value = "true",
        help_heading = EVENTS
    )]
    pub exclude: Vec<bool>,
    /// Tracer: function, function_graph, or another one of that machine
    #[arg(short = 'p', long, value_name = "TRACER", help_heading = EVENTS)]
    pub tracer: Vec<String>,
    /// Function to trace (glob); can be repeated
    #[arg(short = 'l', long, value_name = "FUNC", help_heading = EVENTS)]
    pub function: Vec<String>,
    /// Function to exclude (glob); can be repeated
    #[arg(short = 'n', long, value_name = "FUNC", help_heading = EVENTS)]
    pub notrace: Vec<String>,
    /// Function whose call graph function_graph records; can be repeated
    #[arg(short = 'g', long, value_name = "FUNC", help_heading = EVENTS)]
    pub graph_function: Vec<String>,
    /// Maximum call depth of function_graph
    #[arg(long, value_name = "N", help_heading = EVENTS)]
    pub max_graph_depth: Vec<u32>,
    /// Trace option; the prefix `no` switches it off
    #[arg(short = 'O', long = "option", value_name = "OPTION", help_heading = EVENTS)]
    pub option: Vec<String>,
    /// Record a kernel stack with every event
    #[arg(
        short = 'T',
        long = "stacks",
        num_args = 0,
        default_missing_value = "true",
        help_heading = EVENTS
    )]
    pub stacks: Vec<bool>,
    /// Record a kernel stack with every traced function
    #[arg(long = "func-stack", num_args = 0, default_missing_value = "true", help_heading = EVENTS)]
    pub function_stacks: Vec<bool>,
    /// Record only these processes
    #[arg(short = 'P', long = "pid", value_name = "PID,...", help_heading = FILTERS)]
    pub pid: Vec<String>,
    /// Record only the machine's command (COMMAND on the host, --exec in a guest)
    #[arg(
        short = 'F',
        long = "command-only",
        num_args = 0,
        default_missing_value = "true",
        help_heading = FILTERS
    )]
    pub command_only: Vec<bool>,
    /// With -P or -F, also record child processes
    #[arg(short = 'c', long, num_args = 0, default_missing_value = "true", help_heading = FILTERS)]
    pub children: Vec<bool>,
    /// CPUs to record: a hexadecimal mask, or `all`
    #[arg(short = 'M', long = "cpu-mask", value_name = "MASK", help_heading = FILTERS)]
    pub cpu_mask: Vec<String>,
    /// Trace clock of the host; with guests it is always x86-tsc
    #[arg(short = 'C', long, value_name = "CLOCK", help_heading = RINGS)]
    pub clock: Vec<String>,
    /// Size of each CPU's ring buffer, in KiB
    #[arg(short = 'b', long = "buffer-size", value_name = "KB", help_heading = RINGS)]
    pub buffer_kb: Vec<u32>,
    /// Size of the ring buffer's pages (sub-buffers), in KiB: a power of two up to 512. Larger pages cost less CPU time
    /// and reach the file later; 64 suits heavy loads. Needs kernel 6.8
    #[arg(long = "subbuf-size", value_name = "KB", help_heading = RINGS)]
    pub subbuf_kb: Vec<u32>,
    /// Run this command in the guest while recording; `\;` ends it
    #[arg(
        long,
        value_name = "COMMAND",
        num_args = 1..,
        value_terminator = ";",
        allow_hyphen_values = true,
        action = clap::ArgAction::Append,
        help_heading = MACHINES
    )]
    pub exec: Vec<OsString>,
}

/// `vtrace launch [--buffer DIR] [--uid N --gid N] -- COMMAND`
#[derive(ClapArgs, Debug)]
pub struct LaunchArgs {
    /// Tracefs directory of a buffer that filters by process
    #[arg(long, value_name = "DIR")]
    pub buffer: Vec<PathBuf>,
    /// User ID of the command
    #[arg(long, value_name = "N", requires = "gid")]
    pub uid: Option<u32>,
    /// Group ID of the command
    #[arg(long, value_name = "N", requires = "uid")]
    pub gid: Option<u32>,
    /// Command to execute
    #[arg(value_name = "COMMAND", trailing_var_arg = true, required = true)]
    pub command: Vec<OsString>,
}

/// Why a text is not a number of bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not a size; examples: 512M, 4G")]
struct SizeFault;

/// A number of bytes with an optional suffix K, M, G or T.
fn size(text: &str) -> Result<u64, SizeFault> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" | "k" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(SizeFault),
    };
    let bytes = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes.filter(|bytes| *bytes > 0).ok_or(SizeFault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_a_suffix_or_are_bytes() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("64K"), Ok(64 << 10));
        assert_eq!(size("2T"), Ok(2 << 40));
        for wrong in ["", "0", "-1", "4X", "G", "1.5G", "99999999999G", "4é"] {
            assert!(size(wrong).is_err(), "{wrong:?}");
        }
    }
}
