//! `vtrace start`, `stop` and `status`: recordings in the background, and what is seen of all.

use std::{
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use super::{
    complaint::Complaint,
    control_args::{StatusArgs, StopArgs},
    put, recording, say,
    status::Lines,
};
use crate::{
    recorder::{
        background::{
            self, Background, BackgroundFault, FoundRecording, PublishedState, RecordingOutcome, RecordingState,
        },
        plan::Plan,
        run::{News, Progress},
        summary::Summary,
    },
    server::{DIRECTORY, check_name},
    sys::daemon::{Ready, Side, Started, split},
};

/// What a recording without guests is called.
const HOST: &str = "host";
/// How often `status --watch` looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What is known of a plan before it runs.
fn state(plan: &Plan, name: Option<&str>) -> RecordingState {
    let guests: Vec<String> = plan.guests.iter().map(|guest| guest.name.clone()).collect();
    let name = name.map_or_else(|| guests.first().cloned().unwrap_or_else(|| HOST.into()), Into::into);
    let machines = std::iter::once(&plan.host).chain(plan.guests.iter().map(|guest| &guest.machine));
    let files = machines.map(|machine| {
        std::path::absolute(&machine.output).unwrap_or_else(|_| machine.output.clone()).display().to_string()
    });
    RecordingState { name, guests, files: files.collect(), ..RecordingState::default() }
}

/// A recording in the foreground, as `status` shows it.
pub(super) struct Foreground {
    state: RecordingState,
    dir: PathBuf,
    shown: Option<PublishedState>,
    lines: Lines,
}

impl Foreground {
    pub(super) fn new(plan: &Plan, name: Option<&str>) -> Result<Self, Complaint> {
        check_session(name)?;
        Ok(Self { state: state(plan, name), dir: plan.dir.clone(), shown: None, lines: Lines::default() })
    }

    /// PublishedState once it has begun. A run directory that takes no file is no reason not to record.
    pub(super) fn hear(&mut self, news: &News) {
        match news {
            News::Begun => {
                let shown = PublishedState::in_foreground(&self.dir, std::mem::take(&mut self.state));
                let shown = shown.inspect_err(|fault| log::debug!("status does not show this: {fault}"));
                self.shown = shown.ok();
                self.publish(&Progress { elapsed: Duration::ZERO, machines: Vec::new() });
            }
            News::Progress(progress) => self.publish(progress),
            News::LeftOut { .. } | News::Output { .. } => {}
        }
    }

    fn publish(&mut self, progress: &Progress) {
        let Some(shown) = &mut self.shown else { return };
        shown.publish(self.lines.next(progress), json(progress));
    }
}

fn json(progress: &Progress) -> Value {
    serde_json::to_value(progress).expect("progress is plain data")
}

/// What a name may be.
fn check_session(name: Option<&str>) -> Result<(), Complaint> {
    let Some(name) = name else { return Ok(()) };
    check_name(name).map_err(|fault| Complaint::usage("cannot record", fault, "--session first"))
}

/// Records in another process; this one returns when that has begun, or with what went wrong.
pub(super) fn start(plan: &Plan, name: Option<&str>) -> Result<u8, Complaint> {
    check_session(name)?;
    let state = state(plan, name);
    let name = state.name.clone();
    match split().map_err(|error| Complaint::system("fork", error))? {
        Side::Before(waiting) => match waiting.wait().map_err(|error| Complaint::system("wait", error))? {
            Started::Going(pid) => {
                let dir = &plan.dir;
                let elsewhere =
                    if dir == Path::new(DIRECTORY) { String::new() } else { format!(" --dir {}", dir.display()) };
                put(&format!("{name}: recording in the background, pid {pid}; vtrace stop {name}{elsewhere} ends it"))?;
                Ok(0)
            }
            Started::Ended(status) => Ok(status),
        },
        Side::Behind(ready) => {
            let background = Background::take(&plan.dir, state).map_err(|fault| complaint("cannot record", &fault))?;
            behind(plan, Recorder { background, ready: Some(ready), lines: Lines::default() })
        }
    }
}

/// The process behind.
struct Recorder {
    background: Background,
    ready: Option<Ready>,
    lines: Lines,
}

fn behind(plan: &Plan, mut recorder: Recorder) -> Result<u8, Complaint> {
    match recording::record(plan, &mut |news| recorder.hear(news)) {
        Ok((summary, status)) => {
            // A command that was over at once has ended before anybody was told that it began.
            recorder.go();
            recording::print(plan, &summary)?;
            recorder.background.end(outcome(&summary, status));
            Ok(status)
        }
        Err(complaint) => {
            let outcome =
                RecordingOutcome { status: complaint.status, text: complaint.to_string(), summary: Value::Null };
            recorder.background.end(outcome);
            Err(complaint)
        }
    }
}

fn outcome(summary: &Summary, status: u8) -> RecordingOutcome {
    let json = serde_json::to_value(summary).expect("a summary is plain data");
    RecordingOutcome { status, text: summary.to_string(), summary: json }
}

impl Recorder {
    fn hear(&mut self, news: &News) {
        match news {
            News::Begun => self.go(),
            News::Progress(progress) => self.publish(progress),
            News::LeftOut { guest, trouble } => say(&Complaint::left_out(guest, trouble).to_string()),
            News::Output { guest, line } => say(&format!("{guest}: {}", line.text)),
        }
    }

    /// The terminal is left once the recording has begun: what goes wrong before that is said there.
    fn go(&mut self) {
        let Some(ready) = self.ready.take() else { return };
        self.background.begin();
        self.publish(&Progress { elapsed: Duration::ZERO, machines: Vec::new() });
        if let Err(error) = ready.release(self.background.log()) {
            log::warn!("the terminal is not left: {error}");
        }
    }

    fn publish(&mut self, progress: &Progress) {
        self.background.publish(self.lines.next(progress), json(progress));
    }
}

/// Ends a recording in order, prints its closing table, exits as `record` would have.
pub(super) fn stop(args: &StopArgs) -> Result<u8, Complaint> {
    let failed = |fault| complaint("cannot stop", &fault);
    let FoundRecording { state, is_running, .. } =
        background::choose(&args.dir, args.session.as_deref()).map_err(failed)?;
    if is_running {
        ask(&state)?;
    } else if state.outcome.is_some() {
        say(&format!("{} had ended by itself", state.name));
    }
    let outcome = background::await_end(&args.dir, &state.name).map_err(failed)?;
    if args.json {
        put(&serde_json::to_string_pretty(&outcome.summary).expect("a summary is plain data"))?;
    } else {
        say(&outcome.text);
    }
    Ok(outcome.status)
}

fn ask(state: &RecordingState) -> Result<(), Complaint> {
    let pid = i32::try_from(state.pid).ok().filter(|pid| *pid > 1).map(Pid::from_raw);
    let why = match pid.map(|pid| kill(pid, Signal::SIGTERM)) {
        Some(Ok(()) | Err(Errno::ESRCH)) => return Ok(()),
        Some(Err(errno)) => format!("pid {}: {errno}", state.pid),
        None => "its pid file says no process id".into(),
    };
    Err(Complaint::new(format!("cannot stop {}", state.name), why, "be root"))
}

/// Shows what is recorded now.
pub(super) fn status(args: &StatusArgs) -> Result<u8, Complaint> {
    // The usual one is made by the first who needs it.
    if args.dir != Path::new(DIRECTORY) && !args.dir.is_dir() {
        let why = format!("{} is no run directory", args.dir.display());
        return Err(Complaint::new(
            "cannot show what is recorded",
            why,
            "--dir DIR, as the server and the recording have it",
        ));
    }
    loop {
        let found = background::list(&args.dir);
        let over = !args.watch || found.iter().all(|found| !found.is_running || found.is_hidden);
        if args.json {
            put(&serde_json::to_string(&found).expect("a state is plain data"))?;
        } else if args.watch && !over && io::stdout().is_terminal() {
            let text = found.iter().map(text).collect::<Vec<_>>().join("; ");
            let mut stdout = io::stdout().lock();
            // A terminal that has gone is seen at the next write.
            let _ = write!(stdout, "\r\x1b[K{text}").and_then(|()| stdout.flush());
        } else if found.is_empty() {
            put("nothing is recorded")?;
        } else {
            put(&found.iter().map(text).collect::<Vec<_>>().join("\n"))?;
        }
        if over {
            return Ok(0);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn text(found: &FoundRecording) -> String {
    let FoundRecording { state, is_running, is_hidden } = found;
    let RecordingState { name, pid, uid, .. } = state;
    if *is_hidden {
        let name = if name.is_empty() { "another recording" } else { name };
        return format!("{name}: user {uid}'s, and shown to nobody else");
    }
    let place = if state.is_foreground { ", in the foreground" } else { "" };
    match &state.outcome {
        Some(outcome) => {
            format!("{}: ended with status {}: vtrace stop {} shows its table", state.name, outcome.status, state.name)
        }
        None if *is_running && state.line.is_empty() => {
            format!("{name}: about to begin (pid {pid} of user {uid}{place})")
        }
        None if *is_running => format!("{name}: {} (pid {pid} of user {uid}{place})", state.line),
        None => format!("{}: killed (pid {}): vtrace restore {}", state.name, state.pid, paths(state)),
    }
}

fn paths(state: &RecordingState) -> String {
    state.files.join(" ")
}

fn complaint(cannot: &str, fault: &BackgroundFault) -> Complaint {
    match fault {
        BackgroundFault::Running(state) => {
            let why = format!("{fault}, to {}", paths(state));
            let remedy = format!("vtrace stop {}, or another --session NAME", state.name);
            Complaint::new(format!("{cannot} as {}", state.name), why, remedy)
        }
        BackgroundFault::NoSuch { known } if known.is_empty() => {
            Complaint::new(cannot, "nothing is recorded in the background", "vtrace start -e sched")
        }
        BackgroundFault::NoSuch { known } | BackgroundFault::Several(known) => {
            Complaint::new(cannot, fault, format!("vtrace stop NAME: {}", known.join(", ")))
        }
        BackgroundFault::Foreground(state) => {
            let remedy = format!("Ctrl-C where it runs, or kill -INT {}", state.pid);
            Complaint::new(cannot, fault, remedy)
        }
        BackgroundFault::Killed(state) => {
            let remedy = format!("vtrace restore {}", paths(state));
            Complaint::new(format!("{cannot} {}", state.name), fault, remedy)
        }
        BackgroundFault::File { path, source } => {
            Complaint::new(cannot, format!("{}: {source}", path.display()), "--dir DIR, where root may write")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn each_way_to_be_found_has_its_line() {
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
            "guest1: about to begin (pid 77 of user 5)",
            "guest1: recording 3 s  host 12 pages (pid 77 of user 5)",
            "guest1: killed (pid 77): vtrace restore /t/trace.dat /t/trace-guest1.dat",
            "guest1: ended with status 3: vtrace stop guest1 shows its table",
            "guest1: recording 4 s (pid 77 of user 5, in the foreground)",
            "guest1: user 5's, and shown to nobody else",
            "another recording: user 5's, and shown to nobody else",
        ];
        assert_eq!(texts, expected);
    }

    #[test]
    fn complaints_name_who_holds_what_and_what_to_do() {
        let state = found(true, "", None).state;
        let text = complaint("cannot record", &BackgroundFault::Running(Box::new(state.clone()))).to_string();
        assert_eq!(
            text,
            "vtrace: cannot record as guest1: a recording of this name runs already: pid 77, to /t/trace.dat \
             /t/trace-guest1.dat\n  try: vtrace stop guest1, or another --session NAME"
        );
        let text = complaint("cannot stop", &BackgroundFault::Several(vec!["a".into(), "b".into()])).to_string();
        assert_eq!(text, "vtrace: cannot stop: 2 recordings are in the background\n  try: vtrace stop NAME: a, b");
        let text = complaint("cannot stop", &BackgroundFault::Killed(Box::new(state))).to_string();
        assert!(text.contains("try: vtrace restore /t/trace.dat"), "{text}");
    }
}
