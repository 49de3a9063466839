//! The command line interface: one file for each verb, its arguments, and what people read.
//!
//! In:    the command line
//! Out:   data on stdout, everything else on stderr; exit status 0 ok, 1 failed, 2 usage, 3 data lost under `--strict`,
//!        else that of the recorded command
//! Trust: the user; names become file names only after [`crate::server::check_name`]

mod agent;
pub mod args;
mod attach;
mod background;
mod check;
mod complaint;
mod completions;
pub mod control_args;
mod detach;
mod doctor;
mod exit_status;
mod input;
mod launch;
mod list;
mod list_machine;
mod machine_options;
mod man;
mod output;
mod plan;
mod plan_fault;
mod record;
pub mod record_args;
mod recording;
mod restore;
mod server;
mod setup;
mod start;
mod status;
mod status_line;
mod stop;
mod trace_cmd_options;

use std::process::ExitCode;

use clap::{
    CommandFactory, FromArgMatches,
    error::{ContextKind, ContextValue, ErrorKind},
};

use args::{Args, Verb};
use exit_status::USAGE;
use output::say;

use crate::sys::signal::ignore_file_size;

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
        Verb::Stop(args) => stop::run(&args),
        Verb::Status(args) => status::run(&args),
        Verb::Server(args) => server::run(&args, verb),
        Verb::Setup(args) => setup::run(&args),
        Verb::Agent(args) => agent::run(args),
        Verb::Attach(args) => attach::run(&args),
        Verb::Detach(args) => detach::run(&args),
        Verb::Doctor(args) => doctor::run(&args),
        Verb::List(args) => list::run(&args),
        Verb::Check(args) => check::run(&args),
        Verb::Launch(args) => launch::run(&args),
        Verb::Restore(args) => restore::run(&args),
        Verb::Completions(args) => completions::run(&args),
        Verb::Man(args) => man::run(&args),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(complaint) => {
            say(&complaint.to_string());
            ExitCode::from(complaint.status)
        }
    }
}

/// Prints clap's error, and the replacement for an option of trace-cmd that vtrace does not have.
fn refuse(error: &clap::Error) -> ! {
    let unknown = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(option)) if error.kind() == ErrorKind::UnknownArgument => Some(option),
        _ => None,
    };
    let Some(instead) = unknown.and_then(|option| trace_cmd_options::instead(option)) else { error.exit() };
    // A closed stderr does not change the status.
    let _ = error.print();
    say(&format!("\n  instead: {instead} (docs/trace-cmd.md)"));
    std::process::exit(i32::from(USAGE))
}

/// Logs to stderr: level info, or that of the environment variable `VTRACE_LOG`.
fn log_to_stderr() {
    let filter = env_logger::Env::new().filter_or("VTRACE_LOG", "info");
    env_logger::Builder::from_env(filter).format_target(false).init();
}
