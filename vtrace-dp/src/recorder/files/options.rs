//! Options of the files: what ties the files of a session together, and what a reader has to know of each machine.
//!
//! Trust: texts of a guest are bounded by `wire` and contain no control characters

use vtrace_common::{
    ids::Cpu,
    ledger::Ledger,
    wire::agent::{LaneReport, SettingChange},
};

use crate::{
    clock::vcpus::Vcpu,
    recorder::{
        guests::session::GuestSession,
        plan::{CLOCK, Plan},
        session::SharedFacts,
        summary::{ClockSummary, LaneSummary, MachineSummary},
    },
    trace::format::option::TraceOption,
    tracefs::TRACE_CLOCK,
    vmm::vcpu_threads::{VcpuThreads, vcpu_threads},
};

/// The text of a marker: the same in all files of a session.
pub(crate) fn marker(plan: &Plan, word: &str) -> String {
    format!("vtrace: {word} {:016x}", plan.host.arm.session)
}

/// The clock of a machine's file: the one that was armed, or the one it was changed to while it was recorded.
pub(super) fn recorded_clock(armed: &str, changes: &[SettingChange]) -> String {
    match changes.iter().find(|change| change.setting == TRACE_CLOCK && !change.found.is_empty()) {
        Some(change) => format!("[{}]", change.found),
        None => armed.into(),
    }
}

/// The options of a machine that are known before its trace begins.
pub(crate) fn machine_options(shared: &SharedFacts, clock: &str, uname: &str, trace_id: u64) -> Vec<TraceOption> {
    let mut options = vec![
        TraceOption::TraceClock(clock.into()),
        TraceOption::Uname(uname.into()),
        TraceOption::Version(format!("vtrace {}", env!("CARGO_PKG_VERSION"))),
        TraceOption::TraceId(trace_id),
    ];
    // Clocks other than the TSC count nanoseconds already.
    if clock.contains(&format!("[{CLOCK}]")) {
        options.push(TraceOption::Tsc2Nsec { mult: shared.scale.mult, shift: shared.scale.shift });
    }
    options.extend(shared.date.clone());
    options
}

/// The host threads of a guest's vCPUs; none for a guest that was not claimed.
pub(super) fn guest_threads(session: &GuestSession, lanes: &[Cpu], kvm_vcpus: &[Vcpu]) -> VcpuThreads {
    match &session.claimed {
        Some(claimed) => vcpu_threads(claimed.vmm_pid, lanes, kvm_vcpus),
        None => VcpuThreads { vmm_pid: 0, threads: Vec::new(), known: true },
    }
}

/// The option that links a guest's file from the host's.
pub(super) fn guest_link(session: &GuestSession, trace_id: u64, threads: &VcpuThreads) -> TraceOption {
    TraceOption::Guest { name: session.name.clone(), trace_id, vcpus: threads.threads.clone() }
}

/// The guest's `uname`, as its agent reported it.
pub(super) fn guest_uname(session: &GuestSession) -> &str {
    session.claimed.as_ref().map(|claimed| claimed.machine.uname.as_str()).unwrap_or_default()
}

/// "Linux node release machine" of this host.
pub(super) fn uname() -> String {
    let Ok(names) = nix::sys::utsname::uname() else { return String::new() };
    let names = [names.sysname(), names.nodename(), names.release(), names.machine()];
    names.map(|name| name.to_string_lossy().into_owned()).join(" ")
}

/// One CPUSTAT option per lane: what `trace-cmd report --stat` shows.
pub(super) fn cpu_stats(machine: &MachineSummary, reports: &[LaneReport]) -> impl Iterator<Item = TraceOption> {
    machine.lanes.iter().map(|lane| {
        let report = reports.iter().find(|report| report.cpu.0 == lane.cpu);
        TraceOption::CpuStat(cpu_stat(lane, report, machine.clock.as_ref()))
    })
}

/// The kernel's statistics of a CPU, then the lane's ledger and the guest's clock.
fn cpu_stat(lane: &LaneSummary, report: Option<&LaneReport>, clock: Option<&ClockSummary>) -> String {
    let kernel = report.map(|report| report.stats_after.trim_end()).unwrap_or_default();
    let LaneSummary { cpu, ledger, pages_added, .. } = lane;
    let Ledger { pages_in, pages_out, pages_lost, .. } = ledger;
    let clock = clock.map(|clock| format!("vtrace clock: {clock}\n")).unwrap_or_default();
    format!(
        "CPU: {cpu}\n{kernel}\nvtrace pages: {pages_in} in, {pages_out} out, {pages_lost} lost, {pages_added} added\n{clock}"
    )
}
