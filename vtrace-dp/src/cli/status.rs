//! `vtrace status`: the recordings that run now.

use std::{
    io::{self, IsTerminal, Write},
    path::Path,
    time::Duration,
};

use super::{background::paths, complaint::Complaint, control_args::StatusArgs, output::put};
use crate::{
    recorder::background::{self, FoundRecording, RecordingState},
    server::DIRECTORY,
};

/// Interval of `--watch`.
const REPEAT_EVERY: Duration = Duration::from_secs(1);

/// Prints the recordings that run now.
pub(super) fn run(args: &StatusArgs) -> Result<u8, Complaint> {
    // The default directory is created by the first server or recording.
    if args.dir != Path::new(DIRECTORY) && !args.dir.is_dir() {
        let why = format!("{} does not exist", args.dir.display());
        return Err(Complaint::new("cannot show recordings", why, "--dir DIR, as for the server and the recording"));
    }
    loop {
        let found = background::list(&args.dir);
        let over = !args.watch || found.iter().all(|found| !found.is_running || found.is_hidden);
        if args.json {
            put(&serde_json::to_string(&found).expect("a state is plain data"))?;
        } else if args.watch && !over && io::stdout().is_terminal() {
            let text = found.iter().map(text).collect::<Vec<_>>().join("; ");
            let mut stdout = io::stdout().lock();
            // A closed terminal is noticed at the next write.
            let _ = write!(stdout, "\r\x1b[K{text}").and_then(|()| stdout.flush());
        } else if found.is_empty() {
            put("nothing is being recorded")?;
        } else {
            put(&found.iter().map(text).collect::<Vec<_>>().join("\n"))?;
        }
        if over {
            return Ok(0);
        }
        std::thread::sleep(REPEAT_EVERY);
    }
}

/// One line about a recording.
fn text(found: &FoundRecording) -> String {
    let FoundRecording { state, is_running, is_hidden } = found;
    let RecordingState { name, pid, uid, .. } = state;
    if *is_hidden {
        let name = if name.is_empty() { "another recording" } else { name };
        return format!("{name}: belongs to user {uid}, who alone may see it");
    }
    let foreground = if state.is_foreground { ", in the foreground" } else { "" };
    match &state.outcome {
        Some(outcome) => {
            format!(
                "{}: ended with status {}: vtrace stop {} prints its summary",
                state.name, outcome.status, state.name
            )
        }
        None if *is_running && state.line.is_empty() => {
            format!("{name}: starting (pid {pid} of user {uid}{foreground})")
        }
        None if *is_running => format!("{name}: {} (pid {pid} of user {uid}{foreground})", state.line),
        None => format!("{}: killed (pid {}): vtrace restore {}", state.name, state.pid, paths(state)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::background::RecordingOutcome;

    fn found(is_running: bool, line: &str, outcome: Option<RecordingOutcome>) -> FoundRecording {
        let files = vec!["/t/trace.dat".into(), "/t/trace-guest1.dat".into()];
        let state = RecordingState {
            name: "guest1".into(),
            pid: 77,
            uid: 5,
            files,
            line: line.into(),
            outcome,
            ..RecordingState::default()
        };
        FoundRecording { state, is_running, is_hidden: false }
    }

    #[test]
    fn each_state_of_a_recording_has_its_line() {
        let ended = RecordingOutcome { status: 3, ..RecordingOutcome::default() };
        let in_foreground = found(true, "recording 4 s", None);
        let state = RecordingState { is_foreground: true, ..in_foreground.state.clone() };
        let in_foreground = FoundRecording { state, ..in_foreground };
        let texts = [
            text(&found(true, "", None)),
            text(&found(true, "recording 3 s  host 12 pages", None)),
            text(&found(false, "x", None)),
            text(&found(false, "x", Some(ended))),
            text(&in_foreground),
            text(&FoundRecording { is_hidden: true, ..in_foreground.clone() }),
            text(&FoundRecording {
                state: RecordingState { uid: 5, ..RecordingState::default() },
                is_running: true,
                is_hidden: true,
            }),
        ];
        let expected = [
            "guest1: starting (pid 77 of user 5)",
            "guest1: recording 3 s  host 12 pages (pid 77 of user 5)",
            "guest1: killed (pid 77): vtrace restore /t/trace.dat /t/trace-guest1.dat",
            "guest1: ended with status 3: vtrace stop guest1 prints its summary",
            "guest1: recording 4 s (pid 77 of user 5, in the foreground)",
            "guest1: belongs to user 5, who alone may see it",
            "another recording: belongs to user 5, who alone may see it",
        ];
        assert_eq!(texts, expected);
    }
}
