//! `vtrace completions`: completion scripts from the definition of the command line.

use clap::{Command, CommandFactory};

use super::{
    args::{Args, CompletionsArgs},
    complaint::Complaint,
    output::put,
};

/// Prints the completion script of a shell.
pub(super) fn run(args: &CompletionsArgs) -> Result<u8, Complaint> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut visible(), "vtrace", &mut script);
    put(&String::from_utf8_lossy(&script))?;
    Ok(0)
}

/// The command line without hidden verbs: clap_complete would offer them.
fn visible() -> Command {
    let whole = Args::command();
    let verbs = whole.get_subcommands().filter(|verb| !verb.is_hide_set()).cloned();
    Command::new("vtrace")
        .version(env!("CARGO_PKG_VERSION"))
        .disable_help_subcommand(true)
        .args(whole.get_arguments().cloned())
        .subcommands(verbs)
}
