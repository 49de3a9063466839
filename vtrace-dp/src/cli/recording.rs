//! A recording from its plan to its summary and exit status, in the foreground or in the background.

use super::{
    complaint::Complaint,
    exit_status::{FAILED, LOST},
    output::{put_json, say},
};
use crate::{
    recorder::{
        plan::Plan,
        run::{self, Tell},
        summary::Summary,
    },
    sys::signal::Signals,
};

/// Records; the second value is the exit status.
pub(super) fn record(plan: &Plan, tell: Tell<'_>) -> Result<(Summary, u8), Complaint> {
    let signals = Signals::open().map_err(|error| Complaint::system("signalfd", error))?;
    let summary = run::record(plan, &signals, tell).map_err(|error| Complaint::recording(error, plan))?;
    let status = exit_status(plan, &summary);
    Ok((summary, status))
}

/// Prints the summary, unless `--quiet` was given and nothing failed.
pub(super) fn print(plan: &Plan, summary: &Summary) -> Result<(), Complaint> {
    if plan.json {
        return put_json(summary);
    }
    if !plan.quiet || summary.failed() || summary.was_changed() {
        say(&summary.to_string());
    } else {
        summary.cut_outputs().iter().for_each(|line| say(&format!("vtrace: {line}")));
    }
    Ok(())
}

fn exit_status(plan: &Plan, summary: &Summary) -> u8 {
    match summary.command_status {
        _ if summary.failed() => FAILED,
        _ if plan.strict && (summary.lost_anything() || summary.was_changed()) => LOST,
        Some(status) => status,
        None => 0,
    }
}
