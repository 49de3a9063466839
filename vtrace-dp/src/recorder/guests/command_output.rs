//! Output of a guest's commands (`--exec`), as whole lines.
//!
//! In:    pieces of output as they arrive, exit statuses
//! Out:   lines; the state of each command
//! Full:  a line longer than [`LINE_BYTES_MAX`] is split; memory is bounded by that and by the messages taken at a time
//! Trust: nothing: control characters are replaced

use serde::Serialize;
use vtrace_common::wire::agent::{CommandRequest, Output};

use crate::printable::printable_bytes;

/// Longest line.
const LINE_BYTES_MAX: usize = 4096;

/// One line of a command's output.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OutputLine {
    /// Written to standard error.
    pub is_error: bool,
    /// Without the newline and without control characters.
    pub text: String,
}

/// One command of a guest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct CommandSummary {
    /// As it was typed.
    pub command: String,
    /// Its exit code, or 128 + signal; empty if it had not ended when recording did.
    pub status: Option<u8>,
    /// Bytes of its output that the agent discarded.
    pub output_dropped_bytes: u64,
}

/// The commands of one guest.
#[derive(Debug)]
pub struct CommandOutputs {
    commands: Vec<CommandSummary>,
    /// The unfinished lines of each command: standard output, standard error.
    partial: Vec<[Vec<u8>; 2]>,
    lines: Vec<OutputLine>,
}

impl CommandOutputs {
    /// The commands of a request, before they run.
    pub fn new(requests: &[CommandRequest]) -> Self {
        let summary = |request: &CommandRequest| CommandSummary {
            command: request.words.join(" "),
            status: None,
            output_dropped_bytes: 0,
        };
        let partial = requests.iter().map(|_| Default::default()).collect();
        Self { commands: requests.iter().map(summary).collect(), partial, lines: Vec::new() }
    }

    /// Takes a piece of output. Pieces of unknown commands are ignored.
    pub fn take(&mut self, output: &Output) {
        let place = usize::try_from(output.command).ok().and_then(|index| self.partial.get_mut(index));
        let Some(partial) = place.map(|both| &mut both[usize::from(output.is_error)]) else { return };
        for byte in &output.bytes {
            if *byte != b'\n' {
                partial.push(*byte);
            }
            if *byte == b'\n' || partial.len() >= LINE_BYTES_MAX {
                self.lines.push(OutputLine { is_error: output.is_error, text: shown(partial) });
                partial.clear();
            }
        }
    }

    /// A command has ended.
    pub fn end(&mut self, command: u32, status: u8, output_dropped_bytes: u64) {
        let Some(index) = usize::try_from(command).ok().filter(|index| *index < self.commands.len()) else { return };
        for (is_error, partial) in [false, true].into_iter().zip(&mut self.partial[index]) {
            if !partial.is_empty() {
                self.lines.push(OutputLine { is_error, text: shown(partial) });
                partial.clear();
            }
        }
        let summary = &mut self.commands[index];
        summary.status.get_or_insert(status);
        summary.output_dropped_bytes = output_dropped_bytes;
    }

    /// Whole lines since the last call.
    pub fn lines(&mut self) -> Vec<OutputLine> {
        std::mem::take(&mut self.lines)
    }

    /// Whether there are commands and all have ended.
    pub fn all_ended(&self) -> bool {
        !self.commands.is_empty() && self.commands.iter().all(|command| command.status.is_some())
    }

    /// The state of each command.
    pub fn commands(&self) -> &[CommandSummary] {
        &self.commands
    }
}

/// A line without a trailing carriage return, printable.
fn shown(line: &[u8]) -> String {
    printable_bytes(line.strip_suffix(b"\r").unwrap_or(line))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn outputs() -> CommandOutputs {
        CommandOutputs::new(&[CommandRequest { words: vec!["app".into(), "foo".into()] }])
    }

    fn piece(is_error: bool, bytes: &[u8]) -> Output {
        Output { command: 0, is_error, bytes: bytes.to_vec() }
    }

    #[test]
    fn lines_are_whole_whatever_the_pieces_and_the_last_one_comes_with_the_end() {
        let mut outputs = outputs();
        for (is_error, bytes) in [(false, &b"on"[..]), (true, b"bad\n"), (false, b"e\ntw"), (false, b"o")] {
            outputs.take(&piece(is_error, bytes));
        }
        outputs.end(0, 7, 5);
        let texts: Vec<_> = outputs.lines().into_iter().map(|line| (line.is_error, line.text)).collect();
        assert_eq!(texts, [(true, "bad".into()), (false, "one".into()), (false, "two".into())]);
        assert!(outputs.all_ended());
        let summary = CommandSummary { command: "app foo".into(), status: Some(7), output_dropped_bytes: 5 };
        assert_eq!(outputs.commands(), [summary]);
    }

    #[test]
    fn escape_sequences_do_not_reach_the_terminal() {
        let mut outputs = outputs();
        outputs.take(&piece(false, b"\x1b[2Jgone\r\n"));
        assert_eq!(outputs.lines()[0].text, "?[2Jgone");
    }

    proptest! {
        #[test]
        fn no_line_is_longer_than_its_bound(pieces in proptest::collection::vec((any::<bool>(), any::<Vec<u8>>(), 0u32..3), 0..20)) {
            let mut outputs = outputs();
            for (is_error, bytes, command) in pieces {
                outputs.take(&Output { command, is_error, bytes });
            }
            outputs.end(9, 1, 0);
            prop_assert!(outputs.lines().iter().all(|line| line.text.chars().count() <= LINE_BYTES_MAX));
        }
    }
}
