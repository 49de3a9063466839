//! The description of a machine: the texts that a reader of its trace.dat needs.
//!
//! In:    files of tracefs and procfs
//! Out:   pieces of at most `PIECE_BYTES_MAX`, the parts in the order of a trace.dat
//! Runs:  on the caller's thread; a piece is read when the one before has been taken
//! Full:  at most one piece is held; command lines end at `CMDLINES_BYTES_MAX`
//! Trust: the kernel; a process may give itself any name

use std::{
    collections::BTreeMap,
    fs,
    io::{self, ErrorKind},
    path::Path,
};

use vtrace_common::{
    limits::CMDLINES_BYTES_MAX,
    wire::agent::{Failure, Part, Piece},
};

use super::{
    events::Events,
    pieces::{send, send_file},
    refused,
    symbols::send_symbols,
};

/// Header page, header event, ftrace's formats, formats of the events that are on, printk formats, kernel symbols.
pub(super) fn before(
    tracefs: &Path,
    instance: &Path,
    on: &Events,
    kallsyms: bool,
    each: &mut dyn FnMut(Piece),
) -> Result<(), Failure> {
    let events = instance.join("events");
    send_file(Part::HeaderPage, "", &events.join("header_page"), each)?;
    send_file(Part::HeaderEvent, "", &events.join("header_event"), each)?;
    for name in names(&events.join("ftrace"))? {
        send_file(Part::FtraceFormat, "", &events.join("ftrace").join(name).join("format"), each)?;
    }
    for (system, event) in on.each() {
        send_file(Part::EventFormat, system, &events.join(system).join(event).join("format"), each)?;
    }
    send_file(Part::PrintkFormats, "", &tracefs.join("printk_formats"), each)?;
    if kallsyms {
        send_symbols(each)?;
    }
    Ok(())
}

/// Command lines: those that the kernel has saved, and those of all other threads that run now.
pub(super) fn after(tracefs: &Path, each: &mut dyn FnMut(Piece)) -> Result<(), Failure> {
    let path = tracefs.join("saved_cmdlines");
    let saved = fs::read(&path).or_else(absent_is_empty).map_err(|error| refused(&path, &error))?;
    let mut commands = parse_commands(&String::from_utf8_lossy(&saved));
    for (task, command) in running() {
        commands.entry(task).or_insert(command);
    }
    send(Part::Cmdlines, "", &mut command_lines(&commands).as_bytes(), each).map_err(|error| refused(&path, &error))
}

fn absent_is_empty(error: io::Error) -> io::Result<Vec<u8>> {
    if error.kind() == ErrorKind::NotFound { Ok(Vec::new()) } else { Err(error) }
}

/// Parses lines of `pid comm`; a name may hold blanks.
pub(super) fn parse_commands(text: &str) -> BTreeMap<u32, String> {
    let parse = |line: &str| {
        let (task, command) = line.trim_start().split_once(' ')?;
        Some((task.parse().ok()?, command.to_owned()))
    };
    text.lines().filter_map(parse).collect()
}

/// Every thread that runs now. The trace's pid is the kernel's: a thread's, not a process's.
fn running() -> impl Iterator<Item = (u32, String)> {
    let tasks = |process: fs::DirEntry| {
        let is_process = process.file_name().to_str().is_some_and(|name| name.parse::<u32>().is_ok());
        let directory = is_process.then(|| fs::read_dir(process.path().join("task")));
        directory.into_iter().flatten().flatten().flatten()
    };
    let command = |task: fs::DirEntry| {
        let number = task.file_name().to_str()?.parse().ok()?;
        let command = fs::read(task.path().join("comm")).ok()?; // it may have ended since
        Some((number, String::from_utf8_lossy(&command).trim_end_matches('\n').replace('\n', "?")))
    };
    fs::read_dir("/proc").into_iter().flatten().flatten().flat_map(tasks).filter_map(command)
}

/// `pid comm` a line, whole lines, at most [`CMDLINES_BYTES_MAX`].
fn command_lines(commands: &BTreeMap<u32, String>) -> String {
    let mut text = String::new();
    for (task, command) in commands {
        let line = format!("{task} {command}\n");
        if text.len() + line.len() > CMDLINES_BYTES_MAX {
            log::warn!(
                "command lines are cut at {CMDLINES_BYTES_MAX} bytes: some of {} tasks have no name in the file",
                commands.len()
            );
            break;
        }
        text.push_str(&line);
    }
    text
}

/// Names in a directory, in order.
fn names(path: &Path) -> Result<Vec<std::ffi::OsString>, Failure> {
    let entries = fs::read_dir(path).map_err(|error| refused(path, &error))?;
    let mut names: Vec<_> = entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.file_name())
        .collect();
    names.sort_unstable();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn commands_with_blanks_keep_them() {
        let commands = parse_commands("1 systemd\n22 CPU 0/KVM\nnonsense\n-1 x\n3 \n");
        assert_eq!(command_lines(&commands), "1 systemd\n3 \n22 CPU 0/KVM\n");
    }

    #[test]
    fn own_thread_is_among_those_that_run() {
        let own = u32::try_from(nix::unistd::gettid().as_raw()).unwrap();
        assert!(running().any(|(task, command)| task == own && !command.is_empty()));
    }

    #[test]
    fn command_lines_end_with_a_whole_line_below_the_bound() {
        let commands: BTreeMap<u32, String> = (0..100_000).map(|task| (task, "a command line".into())).collect();
        let text = command_lines(&commands);
        assert!(text.len() <= CMDLINES_BYTES_MAX && text.len() > CMDLINES_BYTES_MAX - 32 && text.ends_with("line\n"));
    }

    proptest! {
        #[test]
        fn any_text_gives_an_answer(text: String) {
            let _ = command_lines(&parse_commands(&text));
        }
    }
}
