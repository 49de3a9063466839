//! A guest's file when every page is in it: its times become host times, its ledger and remarks are stored with it.
//!
//! In:    the guest's session, its file, the host's pages
//! Out:   a finished trace.dat, a [`MachineSummary`], the option that links it from the host's file
//! Runs:  on record's thread, after all machines have stopped
//! Trust: nothing from a guest decides where a byte goes

use std::time::Instant;

use vtrace_common::{
    ids::Cpu,
    wire::{agent::Armed, client::LaneLedger},
};

use super::{
    finish_file::{Reform, note_old_pages, trouble_of, write},
    finish_form::WantedForm,
    machine_file::{MachineFile, filled},
    options::{cpu_stats, guest_link, guest_threads, guest_uname, machine_options, recorded_clock},
    unreported_pages,
};
use crate::{
    analysis::vcpu_runs::HostPages,
    recorder::{
        clocks::{ConvertedTimes, FilePages, GuestClock},
        guests::{
            lanes::guest_lanes,
            session::{GuestSession, lanes_in_use},
            silence,
        },
        host::instances,
        session::{Recording, SharedFacts},
        summary::{MachineSummary, loss_hint},
    },
    trace::{format::option::TraceOption, write::Writer},
};

/// Finishes the file of guest `index`.
pub(super) fn finish_guest(
    recording: &Recording,
    index: usize,
    session: &GuestSession,
    mut file: MachineFile,
    shared: &SharedFacts,
    host: Option<&HostPages>,
) -> (MachineSummary, TraceOption) {
    let armed = session.armed();
    let ledgers = final_ledgers(session, &file.writer, armed);
    let lanes = lanes_in_use(armed, &ledgers);
    let clock = GuestClock::of(recording, index, (session, lanes.clone()), shared, host);
    let threads = guest_threads(session, &lanes, &clock.kvm);
    let link = guest_link(session, file.trace_id, &threads);
    let start_skew_ns = start_skew_ns(recording, shared, session, &clock);

    let written = filled(&ledgers);
    let mut in_file = written.clone();
    let recorded_clock = recorded_clock(&armed.clock, &session.changes);
    file.writer.set_clock(&recorded_clock);
    let mut options = machine_options(shared, &recorded_clock, guest_uname(session), file.trace_id);
    let cmdlines = &session.metadata.cmdlines;
    let pages = FilePages { writer: &mut file.writer, filled: &mut in_file, cmdlines, options: &options };
    let mut times = clock.convert(pages, shared);
    options.append(&mut times.options);

    let mut machine = guest_summary(recording, session, &file, &ledgers, times);
    machine.start_skew_ns = start_skew_ns;
    machine.vcpus = threads.on_host_cpus();
    if !threads.known {
        machine.remarks.push("its vCPU threads are not known: start QEMU with -name GUEST,debug-threads=on".into());
    }
    options.extend(cpu_stats(&machine, &session.reports));
    if recording.plan.raw_clock {
        options.retain(|option| !matches!(option, TraceOption::Date(_))); // it belongs to the host's clock
    }
    note_old_pages(&file, &written, &mut machine);
    let instance = instances::of_guest(recording.plan, session);
    let wanted = WantedForm { form: recording.plan.form, instance, anew: session.may_be_written() };
    let reform = Reform::of(&file, wanted, Vec::new());
    write(file, &in_file, cmdlines, &options, &mut machine);
    reform.apply(&mut machine);
    (machine, link)
}

/// The server's final ledgers, or what its last ones and the file show if it went away.
fn final_ledgers(session: &GuestSession, writer: &Writer, armed: &Armed) -> Vec<LaneLedger> {
    if session.is_finished() {
        session.ledgers.clone()
    } else {
        unreported_pages::count(writer, &session.ledgers, armed.page_bytes)
    }
}

fn guest_summary(
    recording: &Recording,
    session: &GuestSession,
    file: &MachineFile,
    ledgers: &[LaneLedger],
    times: ConvertedTimes,
) -> MachineSummary {
    let (mut lanes, mut remarks) = guest_lanes(session, ledgers);
    for lane in &mut lanes {
        lane.pages_added = times.added.iter().find(|(cpu, _)| cpu.0 == lane.cpu).map_or(0, |(_, added)| *added);
    }
    let longest_silence = session.silence.longest(Instant::now());
    remarks.extend(session.trouble.iter().map(ToString::to_string));
    remarks.extend(session.remarks.iter().cloned());
    remarks.extend(silence::remark(longest_silence));
    if session.is_full {
        let bytes_max = recording.plan.guest_bytes_max.unwrap_or(0);
        remarks.push(format!("stopped before the others, near its {bytes_max} bytes (--max-guest-bytes)"));
    }
    remarks.extend(session.reports.iter().filter_map(trouble_of));
    remarks.extend(loss_hint(&lanes, session.buffer_kb()));
    remarks.extend(times.remarks);
    MachineSummary {
        name: session.name.clone(),
        file: Some(file.output.path().display().to_string()),
        lanes,
        sink: Some(if file.direct.is_some() { "direct" } else { "buffered" }),
        clock: times.summary,
        commands: session.outputs.commands().to_vec(),
        changes: session.changes.clone(),
        silence_ms_max: u64::try_from(longest_silence.as_millis()).unwrap_or(u64::MAX),
        failed: has_failed(session, ledgers) || times.failed,
        remarks,
        ..MachineSummary::default()
    }
}

/// Whether its part ended early.
fn has_failed(session: &GuestSession, ledgers: &[LaneLedger]) -> bool {
    session.trouble.is_some()
        || session.reports.iter().any(|lane| !lane.trouble.is_empty())
        || ledgers.iter().any(|lane| lane.write_errno != 0)
}

/// From the host's start to the guest's, nanoseconds of host time.
fn start_skew_ns(
    recording: &Recording,
    shared: &SharedFacts,
    session: &GuestSession,
    clock: &GuestClock,
) -> Option<i64> {
    let (_, guest) = session.started?;
    let (_, host) = recording.host.started?;
    let lane: Cpu = clock.first_lane()?;
    let cycles = clock.to_host(lane, guest, host)?.0.wrapping_sub(host.0).cast_signed();
    let ns = i64::try_from(shared.scale.ns(cycles.unsigned_abs())).ok()?;
    Some(if cycles < 0 { -ns } else { ns })
}
