//! What a person types and reads.
//!
//! In:    the command line
//! Out:   data on stdout, all else on stderr; exit status 0 ok, 1 failed, 2 usage, 3 data lost under `--strict`,
//!        else the recorded command's own
//! Trust: the person; names become file names only after [`crate::server::check_name`]

mod agent;
pub mod args;
mod attach;
mod background;
mod check;
mod complaint;
mod completions;
pub mod control_args;
mod doctor;
mod launch;
mod list;
mod list_machine;
mod machine_options;
mod plan;
mod plan_fault;
mod record;
mod recording;
mod restore;
mod server;
mod setup;
mod status;
mod trace_cmd_options;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::{
    CommandFactory, FromArgMatches,
    error::{ContextKind, ContextValue, ErrorKind},
};

use args::{Args, Verb};
use complaint::Complaint;

use crate::sys::signal::ignore_file_size;

/// Exit status: it did not work.
pub const FAILED: u8 = 1;
/// Exit status: the command line makes no sense. clap uses the same.
pub const USAGE: u8 = 2;
/// Exit status: something was lost, and `--strict` was given.
pub const LOST: u8 = 3;

/// Runs the program.
pub fn main() -> ExitCode {
    let matches = Args::command().try_get_matches().unwrap_or_else(|error| refuse(&error));
    let args = Args::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let verb = matches.subcommand().expect("clap asks for a verb").1;
    log_to_stderr();
    if let Err(error) = ignore_file_size() {
        log::debug!("SIGXFSZ: {error}");
    }
    let result = match args.verb {
        Verb::Record(args) => record::run(&args, verb, args.background.daemonize),
        Verb::Start(args) => record::run(&args, verb, true),
        Verb::Stop(args) => background::stop(&args),
        Verb::Status(args) => background::status(&args),
        Verb::Server(args) => server::run(&args, verb),
        Verb::Setup(args) => setup::run(&args),
        Verb::Agent(args) => agent::run(args),
        Verb::Attach(args) => attach::attach(&args),
        Verb::Detach(args) => attach::detach(&args),
        Verb::Doctor(args) => doctor::run(&args),
        Verb::List(args) => list::run(&args),
        Verb::Check(args) => check::run(&args),
        Verb::Launch(args) => launch::run(&args),
        Verb::Restore(args) => restore::run(&args),
        Verb::Completions(args) => self::completions::completions(&args),
        Verb::Man(args) => self::completions::man(&args),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(complaint) => {
            say(&complaint.to_string());
            ExitCode::from(complaint.status)
        }
    }
}

/// clap's words about a command line, and what there is for an option of trace-cmd's that we have not.
fn refuse(error: &clap::Error) -> ! {
    let unknown = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(option)) if error.kind() == ErrorKind::UnknownArgument => Some(option),
        _ => None,
    };
    let Some(instead) = unknown.and_then(|option| self::trace_cmd_options::instead(option)) else { error.exit() };
    // A closed stderr is no reason for another status.
    let _ = error.print();
    say(&format!("\n  instead: {instead} (docs/trace-cmd.md)"));
    std::process::exit(i32::from(USAGE))
}

/// One line per event that a person has to know of, or all with `VTRACE_LOG=debug`.
fn log_to_stderr() {
    let filter = env_logger::Env::new().filter_or("VTRACE_LOG", "info");
    env_logger::Builder::from_env(filter).format_target(false).init();
}

/// Text for a person. A closed stderr is no reason to fail.
fn say(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{}", text.trim_end());
}

/// Data. A reader that has gone (`| head`) is no error.
fn put(text: &str) -> Result<(), Complaint> {
    match writeln!(io::stdout().lock(), "{}", text.trim_end()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Complaint::new("cannot write to stdout", error, "free the place it leads to"))
        }
        _ => Ok(()),
    }
}
