//! `cargo xtask boot`: try something in a guest by hand.
//!
//! In: a kernel, commands, more words for QEMU. Out: what the commands print. Runs: until the last command ended.
//! Full: does not apply. Trust: the person at the terminal.

use crate::kernel::Kernel;
use crate::machine::{Machine, turn};
use crate::qemu::Release;
use anyhow::{Result, ensure};
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

/// No command of a person is cut off sooner.
const COMMAND_WAIT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// What to boot and what to run there.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The kernel: 5.10, 6.1, 6.12 or newest
    #[arg(long, value_enum, default_value = "6.12")]
    kernel: Kernel,
    /// Which QEMU: newest (11.1), middle (10.0) or oldest (7.2)
    #[arg(long, value_enum, default_value = "newest")]
    qemu: Release,
    /// Number of vCPUs
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Attach vtrace's device to the server that listens on this socket
    #[arg(long, value_name = "SOCKET")]
    vhost_user: Option<PathBuf>,
    /// A file for the guest, as GUEST_PATH=HOST_PATH
    #[arg(long, value_name = "GUEST=HOST", value_parser = pair)]
    file: Vec<(String, PathBuf)>,
    /// Show the guest's console at the end
    #[arg(long)]
    console: bool,
    /// One more word for QEMU's command line
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    qemu_argument: Vec<String>,
    /// What to run in the guest, one shell each
    #[arg(value_name = "COMMAND", required = true)]
    commands: Vec<String>,
}

fn pair(text: &str) -> Result<(String, PathBuf), String> {
    let (guest, host) = text.split_once('=').ok_or("not of the form GUEST=HOST")?;
    Ok((guest.to_owned(), PathBuf::from(host)))
}

/// Boots, runs the commands, powers off.
///
/// # Errors
/// When the guest does not boot or a command fails.
pub fn run(arguments: &Arguments) -> Result<()> {
    let turn = turn()?;
    let words: Vec<&str> = arguments.qemu_argument.iter().map(String::as_str).collect();
    let builder = Machine::builder(&turn, arguments.kernel).qemu(arguments.qemu).cpus(arguments.cpus).arguments(&words);
    let builder = arguments.file.iter().fold(builder, |builder, (guest, host)| builder.file(guest, host));
    let builder = arguments.vhost_user.iter().fold(builder, |builder, socket| builder.vhost_user(socket));
    let machine = builder.boot()?;
    let result = run_all(&machine, &arguments.commands);
    if arguments.console {
        print!("{}", machine.console());
    }
    result
}

fn run_all(machine: &Machine, commands: &[String]) -> Result<()> {
    for command in commands {
        let output = machine.shell_within(command, COMMAND_WAIT_MAX)?;
        std::io::stdout().write_all(&output.bytes)?;
        ensure!(output.status == 0, "{command} ended with status {}", output.status);
    }
    Ok(())
}
