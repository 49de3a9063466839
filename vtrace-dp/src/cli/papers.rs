//! `vtrace completions` and `vtrace man`: what shells and man(1) know of the command line, from its one definition.

use std::io;

use clap::CommandFactory;

use super::{
    args::{Args, CompletionsArgs, ManArgs},
    complaint::Complaint,
    put,
};

/// Prints what a shell reads to complete words of ours.
pub(super) fn completions(args: &CompletionsArgs) -> Result<u8, Complaint> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Args::command(), "vtrace", &mut script);
    put(&String::from_utf8_lossy(&script))?;
    Ok(0)
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
