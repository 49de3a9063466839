//! The command line as typed. One definition gives parser, help, man page and completions.

use std::{ffi::OsString, path::PathBuf};

use clap::{Args as ClapArgs, Parser, Subcommand, builder::RangedU64ValueParser};
use vtrace_common::limits::{DEVICE_LANES_MAX, DEVICES_MAX, LANES_MAX};

use super::control_args::{
    AttachArgs, BackgroundArgs, DetachArgs, DoctorArgs, ListArgs, SESSION, StatusArgs, StopArgs,
};
use crate::{
    drain::sink::choice::SinkChoice,
    server::DIRECTORY,
    trace::{format::compressed::Compression, write::pack::Version},
    vmm::{
        qemu,
        setup::{ROOT, Transport},
    },
};

/// Host and guests in one trace.
#[derive(Parser, Debug)]
#[command(name = "vtrace", version, max_term_width = 100, disable_help_subcommand = true)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// What vtrace can do.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Record host and guests together, into one file each
    Record(Box<RecordArgs>),
    /// Record in the background: all options of record
    #[command(override_usage = "vtrace start [OPTIONS OF RECORD]... [--] [COMMAND]...")]
    Start(Box<RecordArgs>),
    /// End a recording in the background, show its closing table
    Stop(StopArgs),
    /// Show what is recorded now, as counters: in the background, and what a terminal waits for
    Status(StatusArgs),
    /// Serve guests: the backend of their virtio-serial device (on the host, one for all guests)
    Server(ServerArgs),
    /// Make what a guest's virtual machine needs, and print what to add to it (on the host, once a guest)
    Setup(SetupArgs),
    /// Record for a host (inside a guest)
    Agent(AgentArgs),
    /// Show the guests of the server and how far each one is
    List(ListArgs),
    /// Plug a guest's device into a QEMU that runs already
    Attach(AttachArgs),
    /// Take a guest's device out of its QEMU, before its server is stopped or after it was killed
    Detach(DetachArgs),
    /// Look at everything a recording needs, and say what is missing
    Doctor(DoctorArgs),
    /// Check that every event of a guest lies where the host says its vCPU ran
    Check(CheckArgs),
    /// Become a command that is traced from its first instruction on (record and agent use it for -F)
    #[command(hide = true)]
    Launch(LaunchArgs),
    /// Finish files whose recording was killed
    Restore(RestoreArgs),
    /// Print what a shell needs to complete words of vtrace
    Completions(CompletionsArgs),
    /// Write man pages
    Man(ManArgs),
}

const WHAT: &str = "What to record (each for the machine or instance before it)";
const WHOSE: &str = "Whose events (each for the machine or instance before it)";
const RINGS: &str = "Ring buffers (each for the machine or instance before it)";
const MACHINES: &str = "Machines";
const FILES: &str = "Files";
const SAYS: &str = "What is said";

/// `vtrace record [OPTIONS] [--dom GUEST [GUEST OPTIONS]]… [--] [COMMAND]`
#[derive(ClapArgs, Debug)]
#[command(
    override_usage = "vtrace record [OPTIONS] [-e EVENT]... [-B NAME -e EVENT...]... [--dom GUEST -e EVENT... [--exec COMMAND... \\;]]... [--] [COMMAND]...",
    after_help = "Options after --dom belong to that guest, those after -B to that instance.\n\n\
                  Recording ends with COMMAND, else with the last --exec, at --timeout, or with Ctrl-C;\n\
                  a second Ctrl-C stops at once and keeps what is there.\n\n\
                  Files: FILE for the host, FILE-GUEST.dat for each guest. Open them together:\n  \
                  trace-cmd report -i trace.dat -i trace-guest1.dat\n\n\
                  Exit status: 0 recorded (also if --timeout or Ctrl-C ended COMMAND), 1 failed, 2 usage,\n\
                  3 data lost under --strict, else COMMAND's own."
)]
pub struct RecordArgs {
    /// What to record on each machine
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Record this guest too; what follows is for it
    #[arg(short = 'A', long = "dom", value_name = "GUEST", help_heading = MACHINES)]
    pub dom: Vec<String>,
    /// Record into an instance of this name too, on the host; what follows is for it. It becomes a part of the host's
    /// file. Behind --dom: what that guest records has this name in its file; one for each guest
    #[arg(short = 'B', long = "instance", value_name = "NAME", help_heading = MACHINES)]
    pub instance: Vec<String>,
    /// The host's file; a guest's has the guest's name before the suffix
    #[arg(short, long, value_name = "FILE", default_value = "trace.dat", help_heading = FILES)]
    pub output: PathBuf,
    /// Leave out a guest that cannot be recorded, instead of recording nothing; status 1 all the same
    #[arg(long, help_heading = SESSION)]
    pub keep_going: bool,
    /// Stop after this many seconds
    #[arg(long, value_name = "SECONDS", help_heading = SESSION)]
    pub timeout: Option<f64>,
    /// Record the host in real time (SCHED_FIFO), before everything that is traced, with this priority
    #[arg(long, value_name = "PRIO", num_args = 0..=1, require_equals = true, default_missing_value = "1",
          value_parser = clap::value_parser!(u8).range(1..=99), help_heading = SESSION)]
    pub rt: Option<u8>,
    /// Keep only the newest pages of each CPU, at least this many KiB
    #[arg(short = 'm', long = "newest", value_name = "KB", value_parser = clap::value_parser!(u32).range(1..), help_heading = FILES)]
    pub newest_kb: Option<u32>,
    /// Without effect, for scripts that give it to trace-cmd: nothing here wakes up at an interval
    #[arg(short = 's', value_name = "USEC", help_heading = FILES)]
    pub interval: Vec<u64>,
    /// Stop once the pages in a file near SIZE bytes (K, M, G and T are taken): looked at once a second, and what describes the
    /// machine, some MB, is not counted
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = FILES)]
    pub max_file: Option<u64>,
    /// Do not replace a file that is there
    #[arg(long, help_heading = FILES)]
    pub no_clobber: bool,
    /// Compress the files when they are finished
    #[arg(long, value_enum, value_name = "HOW", default_value_t, help_heading = FILES)]
    pub compression: Compression,
    /// Version of the files: 6 is for readers that know nothing newer. It is made when they are finished, as compressed
    /// ones are, and needs as much room again until then
    #[arg(long, value_enum, value_name = "VERSION", default_value_t, help_heading = FILES)]
    pub file_version: Version,
    /// Show times of day, in seconds since 1970
    #[arg(long, help_heading = FILES)]
    pub date: bool,
    /// Stop a guest, and no other, before its file grows beyond SIZE bytes
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = FILES)]
    pub max_guest_bytes: Option<u64>,
    /// Leave kernel symbols out: arms faster, functions stay numbers
    #[arg(long, help_heading = FILES)]
    pub no_kallsyms: bool,
    /// How guests' pages are written: past the page cache where that is to be had, or one way
    #[arg(long, value_enum, value_name = "HOW", default_value_t, help_heading = FILES)]
    pub sink: SinkChoice,
    /// Leave guests' times as their own clocks told them
    #[arg(long, help_heading = FILES)]
    pub raw_clock: bool,
    /// Exit with status 3 if a single page or event was lost
    #[arg(long, help_heading = SAYS)]
    pub strict: bool,
    /// Print the closing table as JSON
    #[arg(long, help_heading = SAYS)]
    pub json: bool,
    /// No status line, no closing table
    #[arg(short, long, help_heading = SAYS)]
    pub quiet: bool,
    /// In the background, or not
    #[command(flatten)]
    pub background: BackgroundArgs,
    /// Where the server's sockets are
    #[arg(long, value_name = "DIR", default_value = DIRECTORY, help_heading = SESSION)]
    pub dir: PathBuf,
    /// Command to run while recording
    #[arg(value_name = "COMMAND", trailing_var_arg = true)]
    pub command: Vec<OsString>,
}

/// What stands before the first `--dom` is for the host (behind a `-B`, for that instance), what follows one for that
/// guest. The meaning is trace-cmd's.
///
/// Their order matters, so [`super::plan`] reads them from clap's matches; this is their one definition.
#[derive(ClapArgs, Debug)]
pub struct MachineArgs {
    /// Event to record: SYSTEM, SYSTEM:EVENT, globs in either part, or `all`; can be given often
    #[arg(short = 'e', long = "event", value_name = "EVENT", help_heading = WHAT)]
    pub event: Vec<String>,
    /// Only where this holds, for the -e before it
    #[arg(short = 'f', long, value_name = "FILTER", help_heading = WHAT)]
    pub filter: Vec<String>,
    /// Trigger for the -e before it
    #[arg(short = 'R', long, value_name = "TRIGGER", help_heading = WHAT)]
    pub trigger: Vec<String>,
    /// Leave out what the -e behind it name
    #[arg(
        short = 'v',
        long = "exclude",
        num_args = 0,
        default_missing_value = "true",
        help_heading = WHAT
    )]
    pub exclude: Vec<bool>,
    /// Tracer: function, function_graph, or any that the machine has
    #[arg(short = 'p', long, value_name = "TRACER", help_heading = WHAT)]
    pub tracer: Vec<String>,
    /// Function to trace, glob; can be given often
    #[arg(short = 'l', long, value_name = "FUNC", help_heading = WHAT)]
    pub function: Vec<String>,
    /// Function to leave out, glob
    #[arg(short = 'n', long, value_name = "FUNC", help_heading = WHAT)]
    pub notrace: Vec<String>,
    /// Function whose calls function_graph follows
    #[arg(short = 'g', long, value_name = "FUNC", help_heading = WHAT)]
    pub graph_function: Vec<String>,
    /// How deep function_graph follows calls
    #[arg(long, value_name = "N", help_heading = WHAT)]
    pub max_graph_depth: Vec<u32>,
    /// Trace option; `no` in front switches it off
    #[arg(short = 'O', long = "option", value_name = "OPTION", help_heading = WHAT)]
    pub option: Vec<String>,
    /// A stack with every event
    #[arg(
        short = 'T',
        long = "stacks",
        num_args = 0,
        default_missing_value = "true",
        help_heading = WHAT
    )]
    pub stacks: Vec<bool>,
    /// A stack with every function
    #[arg(long = "func-stack", num_args = 0, default_missing_value = "true", help_heading = WHAT)]
    pub function_stacks: Vec<bool>,
    /// Only these processes
    #[arg(short = 'P', long = "pid", value_name = "PID,...", help_heading = WHOSE)]
    pub pid: Vec<String>,
    /// Only the machine's command (COMMAND, or its --exec)
    #[arg(
        short = 'F',
        long = "command-only",
        num_args = 0,
        default_missing_value = "true",
        help_heading = WHOSE
    )]
    pub command_only: Vec<bool>,
    /// Children of -P and -F too
    #[arg(short = 'c', long, num_args = 0, default_missing_value = "true", help_heading = WHOSE)]
    pub children: Vec<bool>,
    /// CPUs to trace, a hexadecimal mask, or `all`
    #[arg(short = 'M', long = "cpu-mask", value_name = "MASK", help_heading = WHOSE)]
    pub cpu_mask: Vec<String>,
    /// Trace clock of the host; with guests it is x86-tsc
    #[arg(short = 'C', long, value_name = "CLOCK", help_heading = RINGS)]
    pub clock: Vec<String>,
    /// Ring buffer of each CPU, in KiB
    #[arg(short = 'b', long = "buffer-size", value_name = "KB", help_heading = RINGS)]
    pub buffer_kb: Vec<u32>,
    /// Page (sub-buffer) of the ring buffers, in KiB: a power of two up to 512. Larger ones cost less CPU time and
    /// reach the file later; 64 is a good choice for heavy loads (kernel 6.8)
    #[arg(long = "subbuf-size", value_name = "KB", help_heading = RINGS)]
    pub subbuf_kb: Vec<u32>,
    /// Run this in the guest while recording, up to `\;`
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
    /// A tracefs buffer that is bound to processes
    #[arg(long, value_name = "DIR")]
    pub buffer: Vec<PathBuf>,
    /// The user to become, by number
    #[arg(long, value_name = "N", requires = "gid")]
    pub uid: Option<u32>,
    /// Its group, by number
    #[arg(long, value_name = "N", requires = "uid")]
    pub gid: Option<u32>,
    /// What to become
    #[arg(value_name = "COMMAND", trailing_var_arg = true, required = true)]
    pub command: Vec<OsString>,
}

/// `vtrace server --dom GUEST…`
#[derive(ClapArgs, Debug)]
#[command(
    override_usage = "vtrace server [OPTIONS] --dom GUEST [--devices N] [--dom GUEST...]...",
    after_help = "Start it before QEMU. Each guest's device connects to DIR/GUEST.sock:\n\n  \
        -object memory-backend-memfd,id=mem0,size=SIZE,share=on -machine q35,memory-backend=mem0\n  \
        -chardev socket,id=vtrace0,path=DIR/GUEST.sock\n  \
        -device vhost-user-test-device-pci,chardev=vtrace0,virtio-id=3,num_vqs=N,vq_size=128,config_size=12\n\n\
        with N = 2 × (CPUs + 2). QEMU 10.2 or newer.\n\n\
        A device carries 126 CPUs at most. A larger guest has several: --dom GUEST --devices 3 makes DIR/GUEST@2.sock and\n\
        DIR/GUEST@3.sock too. Give QEMU a -chardev and a -device line for each, with N = 256, and for the last one with\n\
        N = 2 × (CPUs left + 2). Which CPUs a device carries follows from its socket, in whatever order they connect."
)]
pub struct ServerArgs {
    /// A guest to serve; can be given often
    #[arg(long, value_name = "GUEST")]
    pub dom: Vec<String>,
    /// Devices of the guest before it
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=DEVICES_MAX as u64))]
    pub devices: Vec<usize>,
    /// CPUs that each device of the guest before it carries; fewer spread its pages over more threads
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=DEVICE_LANES_MAX as u64))]
    pub lanes_per_device: Vec<usize>,
    /// Where the sockets are made
    #[arg(long, value_name = "DIR", default_value = DIRECTORY)]
    pub dir: PathBuf,
    /// Socket of the one guest, instead of DIR/GUEST.sock
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    pub socket_path: Option<PathBuf>,
    /// Socket of the one guest, already open
    #[arg(long, value_name = "FDNUM")]
    pub fd: Option<i32>,
    /// Where `vtrace setup` made the guests' folders
    #[arg(long, value_name = "DIR", default_value = ROOT)]
    pub root: PathBuf,
    /// Become this user once the sockets are there (otherwise vtrace, if there is such a user)
    #[arg(long, value_name = "NAME")]
    pub user: Option<String>,
    /// Keep all rights (to look for mistakes)
    #[arg(long, conflicts_with = "user")]
    pub unconfined: bool,
    /// Print what this backend can do, as JSON, and exit
    #[arg(long)]
    pub print_capabilities: bool,
}

/// `vtrace setup --dom GUEST --cpus N`
#[derive(ClapArgs, Debug)]
#[command(
    after_help = "What it prints goes to QEMU's command line, or with --libvirt into the domain (virsh edit GUEST). Doing it\n\
                  again changes nothing; with another --transport or --cpus it replaces the setup before it. The server\n\
                  reads DIR/GUEST/guest.toml: `vtrace server --dom GUEST` is all it has to be told.\n\n\
                  vhost-user  QEMU 10.2: the server has to run before QEMU; the guest's memory is shared with it\n\
                  socket      every QEMU; in any order; after an end of the server QEMU connects again by itself\n\
                  pipe        every QEMU; in any order; FIFOs, where QEMU may not use sockets"
)]
pub struct SetupArgs {
    /// The guest's name
    #[arg(long, value_name = "GUEST")]
    pub dom: String,
    /// Its CPUs, those that may be plugged in later too
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=LANES_MAX as u64))]
    pub cpus: usize,
    /// Print words for QEMU's command line (unless --libvirt is given)
    #[arg(long, conflicts_with = "libvirt")]
    pub qemu: bool,
    /// Print elements for libvirt's domain
    #[arg(long)]
    pub libvirt: bool,
    /// How the guest's ports come to the host (otherwise vhost-user where QEMU has it, else socket)
    #[arg(long, value_enum, value_name = "HOW")]
    pub transport: Option<Transport>,
    /// The QEMU that will run the guest, such as 7.2 (otherwise the one that is found here is asked)
    #[arg(long, value_name = "VERSION")]
    pub qemu_version: Option<qemu::Version>,
    /// The guest's memory, as in QEMU's -m (vhost-user shares it)
    #[arg(long, value_name = "SIZE", default_value = "MEMORY", hide_default_value = true)]
    pub memory: String,
    /// The group that QEMU runs as (otherwise, with --libvirt, the one that libvirt uses here)
    #[arg(long, value_name = "GROUP")]
    pub group: Option<String>,
    /// Where guests' folders are made
    #[arg(long, value_name = "DIR", default_value = ROOT)]
    pub root: PathBuf,
    /// Where the server's sockets are
    #[arg(long, value_name = "DIR", default_value = DIRECTORY)]
    pub dir: PathBuf,
}

/// `vtrace agent`
#[derive(ClapArgs, Debug)]
pub struct AgentArgs {
    /// Keep a copy of every page in DIR/cpuN.raw (to verify the transfer; halves its speed)
    #[arg(long, value_name = "DIR")]
    pub tee: Option<PathBuf>,
    /// Run any command a host asks for (otherwise those that the policy names)
    #[arg(long, conflicts_with = "no_exec")]
    pub allow_exec: bool,
    /// Run no command, whatever the policy says
    #[arg(long)]
    pub no_exec: bool,
    /// Run the agent itself, not what hosts run, on these CPUs, such as 0-3,8 (otherwise wherever it may)
    #[arg(long, value_name = "LIST")]
    pub agent_cpus: Option<String>,
    /// What a host may ask: a file that must exist [default: /etc/vtrace/agent.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,
}

/// `vtrace check HOST GUEST…`
#[derive(ClapArgs, Debug)]
#[command(
    after_help = "Every event of a guest must lie between a kvm_entry and the next kvm_exit of its vCPU's thread: record\n\
                  the host with -e kvm:kvm_entry -e kvm:kvm_exit. Without them, sched:sched_switch allows a weaker check: the\n\
                  thread was on a CPU. Files of stock trace-cmd can be checked too.\n\n\
                  Exit status: 0 nothing contradicts the times (or by less than the file's own bound), 1 something does, or\n\
                  a file cannot be read, 2 usage, or nothing to check against."
)]
pub struct CheckArgs {
    /// The host's file
    #[arg(value_name = "HOST.dat")]
    pub host: PathBuf,
    /// Files of its guests
    #[arg(value_name = "GUEST.dat", required = true)]
    pub guests: Vec<PathBuf>,
    /// As JSON
    #[arg(long)]
    pub json: bool,
    /// Each vCPU, and the events that are farthest outside
    #[arg(short, long)]
    pub verbose: bool,
}

/// `vtrace restore PATH…`
#[derive(ClapArgs, Debug)]
#[command(
    after_help = "After a crash of record, server, agent, guest or host: every whole page is kept, host and guests\n\
                  still know each other. A finished file is left as it is; so is one that is being recorded.\n\n\
                  Exit status: 0 all files are valid now, 1 one is not, 2 usage, 3 pages are missing under --strict."
)]
pub struct RestoreArgs {
    /// A file, or a folder whose files are all looked at
    #[arg(value_name = "PATH", required = true)]
    pub paths: Vec<PathBuf>,
    /// Exit with status 3 if a page is missing
    #[arg(long)]
    pub strict: bool,
    /// Print what was found as JSON
    #[arg(long)]
    pub json: bool,
}

/// `vtrace completions SHELL`
#[derive(ClapArgs, Debug)]
#[command(after_help = "vtrace completions bash >/etc/bash_completion.d/vtrace\n\
                        vtrace completions zsh >/usr/local/share/zsh/site-functions/_vtrace\n\
                        vtrace completions fish >/etc/fish/completions/vtrace.fish")]
pub struct CompletionsArgs {
    /// Which shell
    #[arg(value_enum, value_name = "SHELL")]
    pub shell: clap_complete::Shell,
}

/// `vtrace man DIR`
#[derive(ClapArgs, Debug)]
#[command(after_help = "vtrace man /usr/local/share/man/man1; then: man vtrace-record")]
pub struct ManArgs {
    /// Where the pages are written: vtrace.1, vtrace-record.1, …
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
}

/// A number of bytes, as people write it.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" | "k" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err("not a size: 512M, 4G".into()),
    };
    let bytes = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes.filter(|bytes| *bytes > 0).ok_or_else(|| "not a size: 512M, 4G".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("64K"), Ok(64 << 10));
        assert_eq!(size("2T"), Ok(2 << 40));
        for wrong in ["", "0", "-1", "4X", "G", "1.5G", "99999999999G", "4é"] {
            assert!(size(wrong).is_err(), "{wrong:?}");
        }
    }
}
