//! The command line of the verbs that control what runs: attach and detach, recordings in the background.

use std::path::PathBuf;

use clap::{Args as ClapArgs, builder::RangedU64ValueParser};
use vtrace_common::limits::LANES_MAX;

use crate::server::DIRECTORY;

/// The heading of options about the whole recording.
pub(super) const SESSION: &str = "Session";

/// `vtrace attach GUEST --qmp SOCKET`
#[derive(ClapArgs, Debug)]
#[command(
    after_help = "The server must run and know the guest. QEMU must be 10.2 or newer and have been started with shared\n\
                  memory, a QMP socket that nobody else uses, and a free slot for each device (126 CPUs):\n\n  \
        -object memory-backend-memfd,id=mem0,size=SIZE,share=on -machine q35,memory-backend=mem0\n  \
        -qmp unix:SOCKET,server=on,wait=off -device pcie-root-port,id=rp0,chassis=1,slot=1\n\n\
                  Detach before the server is stopped, and attach again when the next one runs: the guest goes on,\n\
                  and its agent finds the new ports by itself."
)]
pub struct AttachArgs {
    /// The guest's name at the server
    #[arg(value_name = "GUEST")]
    pub guest: String,
    /// QEMU's QMP socket
    #[arg(long, value_name = "SOCKET")]
    pub qmp: PathBuf,
    /// Ports for so many CPUs, where the guest is to have more than now
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=LANES_MAX as u64))]
    pub cpus: Option<usize>,
    /// Plug it in there, one for each device, instead of free slots that are found
    #[arg(long, value_name = "BUS")]
    pub bus: Vec<String>,
    /// Where the server's sockets are
    #[arg(long, value_name = "DIR", default_value = DIRECTORY)]
    pub dir: PathBuf,
}

/// `vtrace detach GUEST --qmp SOCKET`
#[derive(ClapArgs, Debug)]
#[command(
    after_help = "The server need not run any more. A device without its server holds up whoever opens or closes\n\
                  one of its ports in the guest, so detach soon after a server was killed."
)]
pub struct DetachArgs {
    /// The guest's name at the server
    #[arg(value_name = "GUEST")]
    pub guest: String,
    /// QEMU's QMP socket
    #[arg(long, value_name = "SOCKET")]
    pub qmp: PathBuf,
    /// Even while it is recorded: the recording keeps what has come
    #[arg(long)]
    pub force: bool,
    /// Where the server's sockets are
    #[arg(long, value_name = "DIR", default_value = DIRECTORY)]
    pub dir: PathBuf,
}

/// `vtrace list`
#[derive(ClapArgs, Debug)]
#[command(
    after_help = "Without --dom and --host: a line for each guest of the server. A guest that is being recorded\n\
                  tells nothing of its events meanwhile. What its owner allows (/etc/vtrace/agent.toml) may be\n\
                  less than what is listed."
)]
pub struct ListArgs {
    /// What this guest offers: clocks, tracers, events; can be given often
    #[arg(short = 'A', long, value_name = "GUEST")]
    pub dom: Vec<String>,
    /// What the host offers
    #[arg(long)]
    pub host: bool,
    /// All events, or those with TEXT in SYSTEM:EVENT, as -e of record takes them
    #[arg(short, long, value_name = "TEXT", num_args = 0..=1, default_missing_value = "")]
    pub events: Option<String>,
    /// Where the server's sockets are
    #[arg(long, value_name = "DIR", default_value = DIRECTORY)]
    pub dir: PathBuf,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// What `vtrace record` needs to know of the background.
#[derive(ClapArgs, Debug)]
pub struct BackgroundArgs {
    /// Go on in the background once the recording has begun (`vtrace start` does); `vtrace stop` ends it
    #[arg(long, help_heading = SESSION)]
    pub daemonize: bool,
    /// What `status` and `stop` call it, where that is not its first guest's name, or `host`
    #[arg(long, value_name = "NAME", help_heading = SESSION)]
    pub session: Option<String>,
}

/// `vtrace stop [SESSION]`
#[derive(ClapArgs, Debug)]
#[command(after_help = "Waits until its files are finished. Exit status: that of the recording.")]
pub struct StopArgs {
    /// Which one, where several run: `vtrace status` lists them
    #[arg(value_name = "SESSION")]
    pub session: Option<String>,
    /// Where the server's sockets and the pid files are
    #[arg(long, value_name = "DIR", default_value = DIRECTORY)]
    pub dir: PathBuf,
    /// The closing table as JSON
    #[arg(long)]
    pub json: bool,
}

/// `vtrace status`
#[derive(ClapArgs, Debug)]
pub struct StatusArgs {
    /// Again every second, until nothing is recorded any more
    #[arg(short, long)]
    pub watch: bool,
    /// Where the server's sockets and the pid files are
    #[arg(long, value_name = "DIR", default_value = DIRECTORY)]
    pub dir: PathBuf,
    /// As JSON; with --watch a line every second
    #[arg(long)]
    pub json: bool,
}

/// `vtrace doctor`
#[derive(ClapArgs, Debug)]
#[command(after_help = "Each line is ok, warn (a recording is possible, something about it is worse) or FAIL (it is\n\
                  not), with what to do about it. Exit status: 0 nothing failed, 1 something did, 2 usage.")]
pub struct DoctorArgs {
    /// Only this guest; can be given often. Otherwise all that the server has
    #[arg(short = 'A', long, value_name = "GUEST")]
    pub dom: Vec<String>,
    /// Where files are to go: a file is written there for a second, and is gone again
    #[arg(short, long, value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// What is expected to come, in MB a second
    #[arg(long, value_name = "MB", default_value_t = 100)]
    pub rate: u32,
    /// Another QEMU than the one in PATH
    #[arg(long, value_name = "FILE")]
    pub qemu: Option<PathBuf>,
    /// Ask the QEMU of this guest, as it runs, over its QMP socket
    #[arg(long, value_name = "SOCKET", requires = "dom")]
    pub qmp: Option<PathBuf>,
    /// Where the server's sockets are
    #[arg(long, value_name = "DIR", default_value = DIRECTORY)]
    pub dir: PathBuf,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}
