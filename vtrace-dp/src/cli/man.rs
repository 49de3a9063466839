//! `vtrace man`: man pages from the definition of the command line.

use std::{
    fs::File,
    io::{self, Write},
    path::Path,
};

use clap::{Command, CommandFactory};
use clap_mangen::{
    Man,
    roff::{Roff, roman},
};

use super::{
    args::{Args, ManArgs},
    complaint::Complaint,
};

/// Writes a page for vtrace and one for each verb.
pub(super) fn run(args: &ManArgs) -> Result<u8, Complaint> {
    let mut command = Args::command();
    command.build();
    let written = std::iter::once(&command)
        .chain(command.get_subcommands().filter(|verb| !verb.is_hide_set()))
        .try_for_each(|command| write(command, &args.folder));
    written.map_err(|error| {
        let remedy = match error.kind() {
            io::ErrorKind::NotFound => "create the directory first",
            _ => "name a directory that can be written",
        };
        Complaint::new(format!("cannot write man pages to {}", args.folder.display()), error, remedy)
    })?;
    Ok(0)
}

/// Writes the page of a command. clap_mangen would put all of `after_help` into a section EXTRA.
fn write(command: &Command, folder: &Path) -> io::Result<()> {
    let page = Man::new(command.clone());
    let mut text = Vec::new();
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    page.render_description_section(&mut text)?;
    page.render_options_section(&mut text)?;
    if command.has_subcommands() {
        page.render_subcommands_section(&mut text)?;
    }
    sections(&command.get_after_help().map(ToString::to_string).unwrap_or_default()).to_writer(&mut text)?;
    if command.get_version().is_some() {
        page.render_version_section(&mut text)?;
    }
    File::create(folder.join(page.get_filename()))?.write_all(&text)
}

/// The sections that the paragraphs of `after_help` make: NOTES, EXIT STATUS, EXAMPLES.
fn sections(help: &str) -> Roff {
    let mut roff = Roff::new();
    let mut section = "";
    for paragraph in help.split("\n\n").filter(|paragraph| !paragraph.is_empty()) {
        let (heading, text) = match paragraph.split_once(':') {
            Some(("Exit status", text)) => ("EXIT STATUS", text),
            Some(("Examples", text)) => ("EXAMPLES", text),
            _ => ("NOTES", paragraph),
        };
        if heading == section {
            roff.control("PP", []);
        } else {
            roff.control("SH", [heading]);
            section = heading;
        }
        // Indented lines are printed as they are.
        let (prose, lines) = match text.find("\n  ") {
            Some(at) => text.split_at(at),
            None => (text, ""),
        };
        if !prose.is_empty() {
            roff.text([roman(prose.trim())]);
        }
        if !lines.is_empty() {
            roff.control("nf", []);
            for line in lines.trim_matches('\n').lines() {
                roff.text([roman(line)]);
            }
            roff.control("fi", []);
        }
    }
    roff
}
