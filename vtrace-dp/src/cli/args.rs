//! The command line. This one definition gives parser, help, man pages and completions.
//!
//! `after_help` has no line breaks inside a paragraph: clap wraps it. Its last paragraphs may begin with `Exit status:` and
//! `Examples:`, which become sections of the man page.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, builder::RangedU64ValueParser};
use vtrace_common::limits::{DEVICE_LANES_MAX, DEVICES_MAX, LANES_MAX};

use super::{
    control_args::{AttachArgs, DetachArgs, DoctorArgs, ListArgs, StatusArgs, StopArgs},
    record_args::{LaunchArgs, RecordArgs},
};
use crate::{
    server::DIRECTORY,
    vmm::{
        qemu::{MachineType, QemuVersion},
        setup::{ROOT, Transport},
    },
};

/// Default memory of a guest that is set up.
pub(super) const MEMORY: &str = "4G";

/// Record the host and its guests together.
#[derive(Parser, Debug)]
#[command(name = "vtrace", version, max_term_width = 100, disable_help_subcommand = true)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// The verbs of `vtrace`.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Record the host and guests, one file each
    Record(Box<RecordArgs>),
    /// Start recording in the background, with the options of record
    #[command(override_usage = "vtrace start [OPTIONS OF RECORD]... [--] [COMMAND]...")]
    Start(Box<RecordArgs>),
    /// Stop a recording in the background and print its summary
    Stop(StopArgs),
    /// Show the recordings that run now
    Status(StatusArgs),
    /// Serve guests: the host's daemon, one for all guests
    Server(ServerArgs),
    /// Prepare a guest on the host, and print what to add to its virtual machine
    Setup(SetupArgs),
    /// Run the agent (inside a guest)
    Agent(AgentArgs),
    /// List the server's guests and their state
    List(ListArgs),
    /// Plug a guest's device into a running QEMU
    Attach(AttachArgs),
    /// Unplug a guest's device from its QEMU, before the server stops or after it was killed
    Detach(DetachArgs),
    /// Check everything that recording needs, and report what is missing
    Doctor(DoctorArgs),
    /// Check guest timestamps against the host's record of when each vCPU ran
    Check(CheckArgs),
    /// Execute a command that is traced from its first instruction (used by record and agent for -F)
    #[command(hide = true)]
    Launch(LaunchArgs),
    /// Repair the files of a recording that was killed
    Restore(RestoreArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
    /// Write the man pages
    Man(ManArgs),
}

/// `vtrace server --dom GUEST…`
#[derive(ClapArgs, Debug)]
#[command(
    override_usage = "vtrace server [OPTIONS] --dom GUEST [--devices N] [--dom GUEST...]...",
    after_help = "Start the server before QEMU. Each guest's device connects to DIR/GUEST.sock; vtrace setup prints the \
        options for QEMU 10.2 or newer, and for older ones.\n\n\
        One device carries at most 126 CPUs. A larger guest needs several: --dom GUEST --devices 3 also creates \
        DIR/GUEST@2.sock and DIR/GUEST@3.sock. Each device's socket determines its CPUs, in any order of connection.\n\n\
        Examples:\n  \
        vtrace server --dom guest1 --dom guest2\n  \
        vtrace server --dom large --devices 3 --user vtrace"
)]
pub struct ServerArgs {
    /// Guest to serve; can be repeated
    #[arg(long, value_name = "GUEST")]
    pub dom: Vec<String>,
    /// Number of devices of the preceding guest
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=DEVICES_MAX as u64))]
    pub devices: Vec<usize>,
    /// CPUs per device of the preceding guest; fewer spread the load over more threads
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=DEVICE_LANES_MAX as u64))]
    pub lanes_per_device: Vec<usize>,
    /// Directory of the server's sockets
    #[arg(long, value_name = "DIR", default_value = DIRECTORY)]
    pub dir: PathBuf,
    /// Socket of the only guest, instead of DIR/GUEST.sock
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    pub socket_path: Option<PathBuf>,
    /// Open file descriptor of the only guest's socket
    #[arg(long, value_name = "FDNUM")]
    pub fd: Option<i32>,
    /// Directory of the guests' folders (vtrace setup)
    #[arg(long, value_name = "DIR", default_value = ROOT)]
    pub root: PathBuf,
    /// Change to this user once the sockets exist (default: vtrace, if that user exists)
    #[arg(long, value_name = "NAME")]
    pub user: Option<String>,
    /// Keep all privileges (for debugging)
    #[arg(long, conflicts_with = "user")]
    pub unconfined: bool,
    /// Print the capabilities of this vhost-user backend as JSON
    #[arg(long)]
    pub print_capabilities: bool,
}

/// `vtrace setup --dom GUEST --cpus N`
#[derive(ClapArgs, Debug)]
#[command(
    after_help = "Add the output to QEMU's command line, or with --libvirt to the domain (virsh edit GUEST). Running setup \
        again changes nothing; another --transport or --cpus replaces the previous setup. The server reads \
        ROOT/GUEST/guest.toml, so vtrace server --dom GUEST needs no more options.\n\n\
        Transports:\n  \
        vhost-user  QEMU 10.2 or newer; start the server before QEMU; guest memory is\n              \
                    shared with the server; no migration or snapshot while attached\n  \
        socket      any QEMU; any order of start; QEMU reconnects by itself\n  \
        pipe        any QEMU; any order of start; FIFOs, if QEMU may not use sockets\n\n\
        Examples:\n  \
        vtrace setup --dom guest1 --cpus 4 --memory 8G\n  \
        vtrace setup --dom guest1 --cpus 4 --qemu-version 7.2\n  \
        vtrace setup --dom guest1 --cpus 4 --libvirt"
)]
pub struct SetupArgs {
    /// Name of the guest
    #[arg(long, value_name = "GUEST")]
    pub dom: String,
    /// Number of CPUs, including those that may be plugged in later
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=LANES_MAX as u64))]
    pub cpus: usize,
    /// QEMU program whose version counts (default: the installed one). Without FILE: print options for QEMU's command
    /// line, which is the default
    #[arg(long, value_name = "FILE", num_args = 0..=1, conflicts_with = "qemu_version")]
    pub qemu: Option<Option<PathBuf>>,
    /// Print elements for a libvirt domain
    #[arg(long)]
    pub libvirt: bool,
    /// How trace data leaves the guest (default: vhost-user if QEMU supports it, else socket)
    #[arg(long, value_enum, value_name = "HOW")]
    pub transport: Option<Transport>,
    /// Version of the QEMU that runs the guest, such as 7.2 (default: that of the installed one)
    #[arg(long, value_name = "VERSION")]
    pub qemu_version: Option<QemuVersion>,
    /// Memory of the guest, as in QEMU's -m, which it replaces (for vhost-user)
    #[arg(long, value_name = "SIZE", default_value = MEMORY)]
    pub memory: String,
    /// Type of the guest's machine (for vhost-user)
    #[arg(long, value_enum, value_name = "TYPE", default_value = "q35")]
    pub machine: MachineType,
    /// Group that QEMU runs as (default with --libvirt: libvirt's)
    #[arg(long, value_name = "GROUP")]
    pub group: Option<String>,
    /// Directory of the guests' folders
    #[arg(long, value_name = "DIR", default_value = ROOT)]
    pub root: PathBuf,
    /// Directory of the server's sockets
    #[arg(long, value_name = "DIR", default_value = DIRECTORY)]
    pub dir: PathBuf,
}

/// `vtrace agent`
#[derive(ClapArgs, Debug)]
#[command(after_help = "Examples:\n  vtrace agent\n  vtrace agent --allow-exec --agent-cpus 0-1")]
pub struct AgentArgs {
    /// Also copy every page to DIR/cpuN.raw (for tests; halves the throughput)
    #[arg(long, value_name = "DIR")]
    pub tee: Option<PathBuf>,
    /// Run any command that the host requests (default: only those that the policy allows)
    #[arg(long, conflicts_with = "no_exec")]
    pub allow_exec: bool,
    /// Run no commands, whatever the policy allows
    #[arg(long)]
    pub no_exec: bool,
    /// CPUs for the agent itself, such as 0-3,8; commands are not restricted (default: all CPUs)
    #[arg(long, value_name = "LIST")]
    pub agent_cpus: Option<String>,
    /// File with what a host may request; it must exist [default: /etc/vtrace/agent.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,
}

/// `vtrace check HOST GUEST…`
#[derive(ClapArgs, Debug)]
#[command(
    after_help = "Every guest event must lie between a kvm_entry and the next kvm_exit of its vCPU's thread: record the host \
        with -e kvm:kvm_entry -e kvm:kvm_exit. Without them, sched:sched_switch allows a weaker check: the thread was on a \
        CPU. Files of stock trace-cmd can be checked too.\n\n\
        Exit status: 0 nothing contradicts the times (or by less than the file's own bound), 1 something does, or a file \
        cannot be read, 2 usage, or nothing to check against.\n\n\
        Examples:\n  \
        vtrace record -e kvm --dom guest1 -e sched -- sleep 5\n  \
        vtrace check trace.dat trace-guest1.dat"
)]
pub struct CheckArgs {
    /// The host's file
    #[arg(value_name = "HOST.dat")]
    pub host: PathBuf,
    /// The guests' files
    #[arg(value_name = "GUEST.dat", required = true)]
    pub guests: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Show each vCPU, and the events farthest outside
    #[arg(short, long)]
    pub verbose: bool,
}

/// `vtrace restore PATH…`
#[derive(ClapArgs, Debug)]
#[command(
    after_help = "After a crash of record, server, agent, guest or host, every complete page is kept, and the files of host \
        and guests still refer to each other. A finished file is not changed, nor is one that is being recorded.\n\n\
        Exit status: 0 all files are valid now, 1 a file is not, 2 usage, 3 pages are missing under --strict.\n\n\
        Examples:\n  \
        vtrace restore trace.dat trace-guest1.dat\n  \
        vtrace restore /var/tmp/traces"
)]
pub struct RestoreArgs {
    /// File, or directory in which all files are examined
    #[arg(value_name = "PATH", required = true)]
    pub paths: Vec<PathBuf>,
    /// Exit with status 3 if a page is missing
    #[arg(long)]
    pub strict: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `vtrace completions SHELL`
#[derive(ClapArgs, Debug)]
#[command(after_help = "Examples:\n  \
        vtrace completions bash >/etc/bash_completion.d/vtrace\n  \
        vtrace completions zsh >/usr/local/share/zsh/site-functions/_vtrace\n  \
        vtrace completions fish >/etc/fish/completions/vtrace.fish")]
pub struct CompletionsArgs {
    /// Shell
    #[arg(value_enum, value_name = "SHELL")]
    pub shell: clap_complete::Shell,
}

/// `vtrace man DIR`
#[derive(ClapArgs, Debug)]
#[command(after_help = "Examples:\n  vtrace man /usr/local/share/man/man1\n  man vtrace-record")]
pub struct ManArgs {
    /// Directory for vtrace.1, vtrace-record.1 and the others
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    /// Text of `--help` is wrapped by clap alone: a line is a paragraph or, indented, fits every terminal.
    #[test]
    fn help_is_wrapped_once() {
        const COLUMNS: usize = 80;
        for verb in Args::command().get_subcommands() {
            let Some(help) = verb.get_after_help().map(ToString::to_string) else { continue };
            let lines: Vec<&str> = help.lines().collect();
            for (index, line) in lines.iter().enumerate() {
                let is_last = lines.get(index + 1).is_none_or(|next| next.is_empty() || next.starts_with("  "));
                let fits =
                    if line.starts_with("  ") { line.chars().count() < COLUMNS } else { is_last || line.is_empty() };
                assert!(fits, "{}: {line}", verb.get_name());
            }
        }
    }

    #[test]
    fn every_verb_that_people_type_has_examples() {
        for verb in Args::command().get_subcommands().filter(|verb| !verb.is_hide_set()) {
            let help = verb.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Examples:\n  vtrace "), "{}", verb.get_name());
        }
    }
}
