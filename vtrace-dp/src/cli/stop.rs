//! `vtrace stop`: ends a recording in the background.

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    background::complaint,
    complaint::Complaint,
    control_args::StopArgs,
    output::{put_json, say},
};
use crate::recorder::background::{self, FoundRecording, RecordingState};

/// Stops a recording, prints its summary, returns its exit status.
pub(super) fn run(args: &StopArgs) -> Result<u8, Complaint> {
    let failed = |fault| complaint("cannot stop", &fault);
    let FoundRecording { state, is_running, .. } =
        background::choose(&args.dir, args.session.as_deref()).map_err(failed)?;
    if is_running {
        terminate(&state)?;
    } else if state.outcome.is_some() {
        say(&format!("{} had already ended", state.name));
    }
    let outcome = background::await_end(&args.dir, &state.name).map_err(failed)?;
    if args.json {
        put_json(&outcome.summary)?;
    } else {
        say(&outcome.text);
    }
    Ok(outcome.status)
}

/// Sends SIGTERM to the recording.
fn terminate(state: &RecordingState) -> Result<(), Complaint> {
    let pid = i32::try_from(state.pid).ok().filter(|pid| *pid > 1).map(Pid::from_raw);
    let why = match pid.map(|pid| kill(pid, Signal::SIGTERM)) {
        Some(Ok(()) | Err(Errno::ESRCH)) => return Ok(()),
        Some(Err(errno)) => format!("pid {}: {errno}", state.pid),
        None => "its pid file contains no process id".into(),
    };
    Err(Complaint::new(format!("cannot stop {}", state.name), why, "run as root"))
}
