//! `vtrace completions` and `vtrace man`: what shells and man(1) know of the command line, from its one definition.

use std::io;

use clap::{Command, CommandFactory};

use super::{
    args::{Args, CompletionsArgs, ManArgs},
    complaint::Complaint,
    put,
};

/// Prints what a shell reads to complete words of ours.
pub(super) fn completions(args: &CompletionsArgs) -> Result<u8, Complaint> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut shown(), "vtrace", &mut script);
    put(&String::from_utf8_lossy(&script))?;
    Ok(0)
}

/// The command line without verbs that only programs use: completions do not know that they are hidden.
fn shown() -> Command {
    let whole = Args::command();
    let verbs = whole.get_subcommands().filter(|verb| !verb.is_hide_set()).cloned();
    let shown = Command::new("vtrace").version(env!("CARGO_PKG_VERSION")).disable_help_subcommand(true);
    shown.args(whole.get_arguments().cloned()).subcommands(verbs)
}

/// Writes a page for vtrace and one for each verb.
pub(super) fn man(args: &ManArgs) -> Result<u8, Complaint> {
    let written = clap_mangen::generate_to(Args::command(), &args.folder);
    written.map_err(|error| {
        let remedy = match error.kind() {
            io::ErrorKind::NotFound => "make the folder first",
            _ => "a folder that can be written",
        };
        Complaint::new(format!("cannot write man pages to {}", args.folder.display()), error, remedy)
    })?;
    Ok(0)
}
