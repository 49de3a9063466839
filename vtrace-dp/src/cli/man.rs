//! `vtrace man`: man pages from the definition of the command line.

use std::io;

use clap::CommandFactory;

use super::{
    args::{Args, ManArgs},
    complaint::Complaint,
};

/// Writes a page for vtrace and one for each verb.
pub(super) fn run(args: &ManArgs) -> Result<u8, Complaint> {
    let written = clap_mangen::generate_to(Args::command(), &args.folder);
    written.map_err(|error| {
        let remedy = match error.kind() {
            io::ErrorKind::NotFound => "create the directory first",
            _ => "name a directory that can be written",
        };
        Complaint::new(format!("cannot write man pages to {}", args.folder.display()), error, remedy)
    })?;
    Ok(0)
}
