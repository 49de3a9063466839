//! What a machine tells about itself: the texts a trace.dat needs to be read elsewhere.
//!
//! In:    files of tracefs and procfs
//! Out:   pieces of at most `PIECE_BYTES_MAX`, the parts in the order of a trace.dat
//! Runs:  on the caller's thread; a piece is read when the one before has been taken
//! Full:  at most one piece is held; command lines end at `CMDLINES_BYTES_MAX`
//! Trust: the kernel; names of commands are whatever processes call themselves

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, ErrorKind, Read},
    path::Path,
};

use vtrace_common::{
    limits::{CMDLINES_BYTES_MAX, PIECE_BYTES_MAX},
    wire::agent::{Failure, Part, Piece},
};

use super::{events::Events, refused, symbols::send_symbols};

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

/// Command lines: those the kernel saved while tracing, and of everything that runs now and is not among them.
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

/// Lines of `pid comm`; a command may hold blanks, and stands as the kernel wrote it.
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
            log::warn!("command lines end at {CMDLINES_BYTES_MAX} bytes, {} tasks have none", commands.len());
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

/// Sends a file; one that this kernel does not have is sent as an empty text.
pub(super) fn send_file(part: Part, name: &str, path: &Path, each: &mut dyn FnMut(Piece)) -> Result<(), Failure> {
    let sent = match File::open(path) {
        Ok(mut file) => send(part, name, &mut file, each),
        Err(error) if error.kind() == ErrorKind::NotFound => send(part, name, &mut io::empty(), each),
        Err(error) => Err(error),
    };
    sent.map_err(|error| refused(path, &error))
}

/// Sends a text in pieces; the last one is shorter than the others and may be empty.
pub(super) fn send(part: Part, name: &str, text: &mut dyn Read, each: &mut dyn FnMut(Piece)) -> io::Result<()> {
    let mut block = vec![0; PIECE_BYTES_MAX];
    loop {
        let filled = fill(&mut block, text)?;
        let last = filled < PIECE_BYTES_MAX;
        each(Piece { part, name: name.into(), bytes: block[..filled].to_vec(), last });
        if last {
            return Ok(());
        }
    }
}

/// Reads until `block` is full or the text ends, asking for all that is left: see [`super::read`] for why.
fn fill(block: &mut [u8], text: &mut dyn Read) -> io::Result<usize> {
    let mut filled = 0;
    while filled < block.len() {
        match text.read(&mut block[filled..]) {
            Ok(0) => break,
            Ok(bytes) => filled += bytes,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(text: &[u8]) -> Vec<Piece> {
        let mut pieces = Vec::new();
        send(Part::Kallsyms, "name", &mut &text[..], &mut |piece| pieces.push(piece)).unwrap();
        pieces
    }

    #[test]
    fn empty_text_is_one_last_piece() {
        let pieces = pieces(b"");
        assert_eq!(pieces.len(), 1);
        assert!(pieces[0].last && pieces[0].bytes.is_empty());
    }

    #[test]
    fn absent_file_is_an_empty_text() {
        let mut pieces = Vec::new();
        let path = Path::new("/proc/self/no such file");
        send_file(Part::PrintkFormats, "", path, &mut |piece| pieces.push(piece)).unwrap();
        assert_eq!(pieces.len(), 1);
    }

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
        fn pieces_put_together_are_the_text(length in 0usize..3 * PIECE_BYTES_MAX + 2, whole: bool) {
            let length = if whole { length / PIECE_BYTES_MAX * PIECE_BYTES_MAX } else { length };
            let text: Vec<u8> = (0..=250).cycle().take(length).collect();
            let pieces = pieces(&text);
            prop_assert!(pieces.iter().all(|piece| piece.bytes.len() <= PIECE_BYTES_MAX));
            prop_assert_eq!(pieces.iter().filter(|piece| piece.last).count(), 1);
            prop_assert!(pieces.last().unwrap().last);
            prop_assert_eq!(pieces.into_iter().flat_map(|piece| piece.bytes).collect::<Vec<_>>(), text);
        }

        #[test]
        fn any_text_gives_an_answer(text: String) {
            let _ = command_lines(&parse_commands(&text));
        }
    }
}
