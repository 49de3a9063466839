//! The command line of the verbs that inspect and control guests and recordings.

use std::path::PathBuf;

use clap::{Args as ClapArgs, builder::RangedU64ValueParser};
use vtrace_common::limits::LANES_MAX;

use crate::server::DIRECTORY;

/// The heading of options for the whole recording.
pub(super) const SESSION: &str = "Session";

/// `vtrace attach GUEST --qmp SOCKET`
#[derive(ClapArgs, Debug)]
#[command(
    after_help = "The server must run and know the guest. QEMU must be 10.2 or newer, and have been started with shared \
        memory, a QMP socket that no other client uses, and a free hot-plug slot for each device (126 CPUs). vtrace setup \
        prints these options.\n\n\
        Detach before the server is stopped, and attach again when it runs: the guest keeps running, and its agent finds \
        the new ports by itself.\n\n\
        Examples:\n  \
        vtrace attach guest1 --qmp /run/guest1.qmp"
)]
pub struct AttachArgs {
    /// Name of the guest
    #[arg(value_name = "GUEST")]
    pub guest: String,
    /// QEMU's QMP socket
    #[arg(long, value_name = "SOCKET")]
    pub qmp: PathBuf,
    /// Number of CPUs to create ports for (default: those that the guest has now)
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=LANES_MAX as u64))]
    pub cpus: Option<usize>,
    /// Bus to plug the device into, one for each device (default: free hot-plug slots)
    #[arg(long, value_name = "BUS")]
    pub bus: Vec<String>,
    /// Directory of the server's sockets
    #[arg(long, value_name = "DIR", default_value = DIRECTORY)]
    pub dir: PathBuf,
}

/// `vtrace detach GUEST --qmp SOCKET`
#[derive(ClapArgs, Debug)]
#[command(
    after_help = "The server need not run. While a device has no server, programs that open or close one of its ports in the \
        guest block: detach soon after the server was killed.\n\n\
        Detach also before the guest is migrated, saved or snapshotted.\n\n\
        Examples:\n  \
        vtrace detach guest1 --qmp /run/guest1.qmp"
)]
pub struct DetachArgs {
    /// Name of the guest
    #[arg(value_name = "GUEST")]
    pub guest: String,
    /// QEMU's QMP socket
    #[arg(long, value_name = "SOCKET")]
    pub qmp: PathBuf,
    /// Detach even while the guest is being recorded; the recording keeps what it has
    #[arg(long)]
    pub force: bool,
    /// Directory of the server's sockets
    #[arg(long, value_name = "DIR", default_value = DIRECTORY)]
    pub dir: PathBuf,
}

/// `vtrace list`
#[derive(ClapArgs, Debug)]
#[command(
    after_help = "Without --dom and --host, prints a line for each guest of the server. The events of a guest cannot be \
        listed while it is being recorded. The guest's policy (/etc/vtrace/agent.toml) may forbid some of what is listed.\n\n\
        Examples:\n  \
        vtrace list\n  \
        vtrace list --dom guest1 -e sched\n  \
        vtrace list --host -e kvm"
)]
pub struct ListArgs {
    /// List clocks, tracers and events of this guest; can be repeated
    #[arg(short = 'A', long, value_name = "GUEST")]
    pub dom: Vec<String>,
    /// List clocks, tracers and events of the host
    #[arg(long)]
    pub host: bool,
    /// List all events, or those whose SYSTEM:EVENT contains TEXT
    #[arg(short, long, value_name = "TEXT", num_args = 0..=1, default_missing_value = "")]
    pub events: Option<String>,
    /// Directory of the server's sockets
    #[arg(long, value_name = "DIR", default_value = DIRECTORY)]
    pub dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `vtrace record` for recordings in the background.
#[derive(ClapArgs, Debug)]
pub struct BackgroundArgs {
    /// Continue in the background once recording has begun, as `vtrace start` does; `vtrace stop` ends it
    #[arg(long, help_heading = SESSION)]
    pub daemonize: bool,
    /// Name for `status` and `stop` (default: the first guest's name, or `host`)
    #[arg(long, value_name = "NAME", help_heading = SESSION)]
    pub session: Option<String>,
}

/// `vtrace stop [SESSION]`
#[derive(ClapArgs, Debug)]
#[command(after_help = "Waits until the files are finished.\n\n\
        Exit status: that of the recording.\n\n\
        Examples:\n  \
        vtrace stop\n  \
        vtrace stop guest1 --json")]
pub struct StopArgs {
    /// Recording to stop, if several run (see vtrace status)
    #[arg(value_name = "SESSION")]
    pub session: Option<String>,
    /// Directory of the server's sockets and of pid files
    #[arg(long, value_name = "DIR", default_value = DIRECTORY)]
    pub dir: PathBuf,
    /// Print the summary as JSON
    #[arg(long)]
    pub json: bool,
}

/// `vtrace status`
#[derive(ClapArgs, Debug)]
#[command(after_help = "Examples:\n  vtrace status\n  vtrace status --watch")]
pub struct StatusArgs {
    /// Repeat every second until no recording runs
    #[arg(short, long)]
    pub watch: bool,
    /// Directory of the server's sockets and of pid files
    #[arg(long, value_name = "DIR", default_value = DIRECTORY)]
    pub dir: PathBuf,
    /// Print JSON; with --watch one line every second
    #[arg(long)]
    pub json: bool,
}

/// `vtrace doctor`
#[derive(ClapArgs, Debug)]
#[command(
    after_help = "Each line is ok, warn (recording is possible with a limitation) or FAIL (it is not), with advice.\n\n\
        Exit status: 0 nothing failed, 1 a check failed, 2 usage.\n\n\
        Examples:\n  \
        vtrace doctor\n  \
        vtrace doctor --dom guest1 --qmp /run/guest1.qmp\n  \
        vtrace doctor --output /var/tmp --rate 500"
)]
pub struct DoctorArgs {
    /// Check only this guest; can be repeated (default: all guests of the server)
    #[arg(short = 'A', long, value_name = "GUEST")]
    pub dom: Vec<String>,
    /// Directory for trace files; its speed is measured with a temporary file, for a second
    #[arg(short, long, value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// Expected data rate, in MB/s
    #[arg(long, value_name = "MB", default_value_t = 100)]
    pub rate: u32,
    /// QEMU program to check (default: the one in PATH)
    #[arg(long, value_name = "FILE")]
    pub qemu: Option<PathBuf>,
    /// Check the guest's running QEMU through its QMP socket
    #[arg(long, value_name = "SOCKET", requires = "dom")]
    pub qmp: Option<PathBuf>,
    /// Directory of the server's sockets
    #[arg(long, value_name = "DIR", default_value = DIRECTORY)]
    pub dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
