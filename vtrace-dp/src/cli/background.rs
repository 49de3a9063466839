//! Recordings as `vtrace start`, `stop` and `status` know them.

use std::{path::PathBuf, time::Duration};

use serde_json::Value;

use super::{complaint::Complaint, status_line::RateLine};
use crate::{
    recorder::{
        background::{BackgroundFault, PublishedState, RecordingState},
        plan::Plan,
        run::{News, Progress},
    },
    server::check_name,
};

/// Default name of a recording without guests.
const HOST: &str = "host";

/// State of a recording that has not begun.
pub(super) fn state(plan: &Plan, name: Option<&str>) -> RecordingState {
    let guests: Vec<String> = plan.guests.iter().map(|guest| guest.name.clone()).collect();
    let name = name.or(guests.first().map(String::as_str)).unwrap_or(HOST).to_owned();
    let outputs = std::iter::once(&plan.host.output).chain(plan.guests.iter().map(|guest| &guest.machine.output));
    let files = outputs
        .map(|output| std::path::absolute(output).unwrap_or_else(|_| output.clone()).display().to_string())
        .collect();
    RecordingState { name, guests, files, ..RecordingState::default() }
}

/// A recording in the foreground, as `vtrace status` shows it.
pub(super) struct Foreground {
    state: RecordingState,
    dir: PathBuf,
    shown: Option<PublishedState>,
    rate: RateLine,
}

impl Foreground {
    pub(super) fn new(plan: &Plan, name: Option<&str>) -> Result<Self, Complaint> {
        check_session(name)?;
        Ok(Self { state: state(plan, name), dir: plan.dir.clone(), shown: None, rate: RateLine::default() })
    }

    /// Publishes the recording once it has begun. Recording goes on if the run directory cannot be written.
    pub(super) fn update(&mut self, news: &News) {
        match news {
            News::Begun => {
                let shown = PublishedState::in_foreground(&self.dir, std::mem::take(&mut self.state));
                let shown = shown.inspect_err(|fault| log::debug!("vtrace status cannot show this recording: {fault}"));
                self.shown = shown.ok();
                self.publish(&Progress { elapsed: Duration::ZERO, machines: Vec::new() });
            }
            News::Progress(progress) => self.publish(progress),
            News::LeftOut { .. } | News::Output { .. } => {}
        }
    }

    fn publish(&mut self, progress: &Progress) {
        let Some(shown) = &mut self.shown else { return };
        shown.publish(self.rate.next(progress), json(progress));
    }
}

/// Progress as JSON.
pub(super) fn json(progress: &Progress) -> Value {
    serde_json::to_value(progress).expect("progress is plain data")
}

/// Checks the name of a session.
pub(super) fn check_session(name: Option<&str>) -> Result<(), Complaint> {
    let Some(name) = name else { return Ok(()) };
    check_name(name).map_err(|fault| Complaint::usage("cannot record", fault, "--session first"))
}

/// The files of a recording, as arguments.
pub(super) fn paths(state: &RecordingState) -> String {
    state.files.join(" ")
}

/// A recording in the background that cannot be started or stopped.
pub(super) fn complaint(cannot: &str, fault: &BackgroundFault) -> Complaint {
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

    #[test]
    fn complaints_name_the_recording_and_give_advice() {
        let files = vec!["/t/trace.dat".into(), "/t/trace-guest1.dat".into()];
        let state = RecordingState { name: "guest1".into(), pid: 77, uid: 5, files, ..RecordingState::default() };
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
