//! `vtrace start`: a recording in the background.

use std::{path::Path, time::Duration};

use serde_json::Value;

use super::{
    background::{check_session, complaint, json, state},
    complaint::Complaint,
    output::{put, say},
    recording,
    status_line::RateLine,
};
use crate::{
    recorder::{
        background::{Background, RecordingOutcome},
        plan::Plan,
        run::{News, Progress},
        summary::Summary,
    },
    server::DIRECTORY,
    sys::daemon::{Ready, Side, Started, split},
};

/// Records in another process; returns when recording has begun or failed.
pub(super) fn run(plan: &Plan, name: Option<&str>) -> Result<u8, Complaint> {
    check_session(name)?;
    let state = state(plan, name);
    let name = state.name.clone();
    match split().map_err(|error| Complaint::system("fork", error))? {
        Side::Parent(waiting) => match waiting.wait().map_err(|error| Complaint::system("wait", error))? {
            Started::Going(pid) => {
                let dir = &plan.dir;
                let dir_option =
                    if dir == Path::new(DIRECTORY) { String::new() } else { format!(" --dir {}", dir.display()) };
                put(&format!(
                    "{name}: recording in the background, pid {pid}; vtrace stop {name}{dir_option} ends it"
                ))?;
                Ok(0)
            }
            Started::Ended(status) => Ok(status),
        },
        Side::Child(ready) => {
            let background = Background::take(&plan.dir, state).map_err(|fault| complaint("cannot record", &fault))?;
            record_in_background(plan, Recorder { background, ready: Some(ready), rate: RateLine::default() })
        }
    }
}

/// The process in the background.
struct Recorder {
    background: Background,
    ready: Option<Ready>,
    rate: RateLine,
}

fn record_in_background(plan: &Plan, mut recorder: Recorder) -> Result<u8, Complaint> {
    match recording::record(plan, &mut |news| recorder.update(news)) {
        Ok((summary, status)) => {
            // A short command may end before the first progress.
            recorder.detach();
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
    fn update(&mut self, news: &News) {
        match news {
            News::Begun => self.detach(),
            News::Progress(progress) => self.publish(progress),
            News::LeftOut { guest, trouble } => say(&Complaint::left_out(guest, trouble).to_string()),
            News::Output { guest, line } => say(&format!("{guest}: {}", line.text)),
        }
    }

    /// Leaves the terminal once recording has begun: earlier errors are printed there.
    fn detach(&mut self) {
        let Some(ready) = self.ready.take() else { return };
        self.background.begin();
        self.publish(&Progress { elapsed: Duration::ZERO, machines: Vec::new() });
        if let Err(error) = ready.release(self.background.log()) {
            log::warn!("cannot leave the terminal: {error}");
        }
    }

    fn publish(&mut self, progress: &Progress) {
        self.background.publish(self.rate.next(progress), json(progress));
    }
}
