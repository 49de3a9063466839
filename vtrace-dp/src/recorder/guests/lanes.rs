//! A guest's lanes at the end: the agent's reports against the server's ledgers.
//!
//! Trust: reports are the agent's own; a sum that does not fit the server's ledger becomes a remark

use nix::errno::Errno;
use vtrace_common::{
    ids::Cpu,
    ledger::Ledger,
    wire::{agent::LaneReport, client::LaneLedger},
};

use super::session::GuestSession;
use crate::recorder::summary::LaneSummary;

/// One summary per lane that was used, and remarks about them for the closing table.
pub(crate) fn guest_lanes(session: &GuestSession, ledgers: &[LaneLedger]) -> (Vec<LaneSummary>, Vec<String>) {
    let mut lanes = Vec::new();
    let mut late: Vec<&LaneReport> = Vec::new();
    let mut all_balanced = true;
    for ledger in ledgers {
        let report = report_of(session, ledger.cpu);
        if is_idle_spare(session, ledger, report) {
            late.extend(report);
            continue;
        }
        let (lane, is_balanced) = LaneSummary::guest(report, ledger);
        all_balanced &= is_balanced;
        lanes.push(lane);
    }
    late.extend(&session.late);

    let mut remarks = Vec::new();
    for lane in late.into_iter().map(LaneSummary::late) {
        let LaneSummary { cpu, ledger: Ledger { events_lost, .. }, .. } = lane;
        let Some(events_lost) = events_lost.filter(|events| *events > 0) else { continue };
        remarks.push(format!("{} came online after the start: its {events_lost} events are in no file", Cpu(cpu)));
        lanes.push(lane);
    }
    for ledger in ledgers.iter().filter(|ledger| ledger.write_errno != 0) {
        let (cpu, why) = (ledger.cpu, Errno::from_raw(ledger.write_errno).desc());
        remarks.push(format!("{cpu}: {} pages could not be written: {why}", ledger.ledger.pages_lost));
    }
    if session.reports.len() < ledgers.len() {
        remarks.push("its agent's page counts are missing: losses inside the guest are not known".into());
    }
    if !all_balanced {
        remarks.push("its agent's page counts do not match the pages that arrived".into());
    }
    (lanes, remarks)
}

fn report_of(session: &GuestSession, cpu: Cpu) -> Option<&LaneReport> {
    session.reports.iter().find(|report| report.cpu == cpu)
}

/// The lane of a CPU that was offline when the guest was armed and of which no page was taken.
fn is_idle_spare(session: &GuestSession, ledger: &LaneLedger, report: Option<&LaneReport>) -> bool {
    let is_spare = session.armed.as_ref().is_some_and(|armed| armed.spare.contains(&ledger.cpu));
    is_spare && ledger.ledger.pages_in == 0 && report.is_none_or(|report| report.ledger.pages_in == 0)
}
