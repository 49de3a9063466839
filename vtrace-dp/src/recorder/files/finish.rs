//! All files of a recording, finished when every page is in its area.
//!
//! In:    the stopped recording, its files, the host's report
//! Out:   finished files and the [`Summary`]. A file that cannot be finished is a remark of its machine; the others are
//!        finished all the same
//! Runs:  on record's thread

use std::io;

use vtrace_common::ids::Cpu;

use super::{
    finish_file::{Reform, note_old_pages, trouble_of, write},
    finish_form::{PartFile, WantedForm},
    finish_guest::finish_guest,
    machine_file::MachineFile,
    options::{cpu_stats, machine_options, recorded_clock, uname},
};
use crate::{
    analysis::{host_events::Decoders, vcpu_runs::HostPages},
    clock::math::HostRange,
    drain::tap::lane::TapEnd,
    ftrace::fields::Formats,
    recorder::{
        guests::session::Trouble,
        host::{Host, HostReport, instances},
        session::{Recording, SharedFacts},
        summary::{LaneSummary, MachineSummary, Summary, loss_hint},
    },
    trace::{
        format::option::TraceOption,
        read::{LaneData, input::FileSource},
    },
    tracefs::{TRACE_CLOCK, online_cpus},
};

/// Finishes all files: the guests' first, so that the host's can link them.
pub(crate) fn finish(
    recording: &mut Recording,
    files: Vec<MachineFile>,
    report: &HostReport,
    seconds: f64,
    command_status: Option<u8>,
) -> Summary {
    let stopped_instances = instances::take(&mut recording.instances);
    let recording = &*recording;
    let mut files = files.into_iter();
    let host = files.next().expect("the host has a file");
    let shared = recording.shared(&host);
    let lanes = host_lanes(recording, &host, report);
    let mut links = Vec::new();
    let mut guests = Vec::new();
    for (index, (session, file)) in recording.sessions().zip(files).enumerate() {
        let (machine, link) = finish_guest(recording, index, session, file, &shared, lanes.as_ref());
        guests.push(machine);
        links.push(link);
    }
    let (instances, parts) = finish_instances(recording, &shared, stopped_instances);
    let mut machines = vec![finish_host(recording, host, report, links, &shared, parts)];
    machines.extend(instances);
    machines.extend(guests);
    machines.extend(recording.left_out.iter().map(left_out));
    let session = format!("{:016x}", recording.plan.host.arm.session);
    Summary { session, seconds, machines, ended: recording.ended, command_status }
}

/// The host's pages, to look up when vCPUs ran. `None` where only the newest pages are kept, which are not in order,
/// where its clock was changed, and where the file cannot be opened again.
fn host_lanes(recording: &Recording, file: &MachineFile, report: &HostReport) -> Option<HostPages> {
    let has_other_clock = report.changes.iter().any(|change| change.setting == TRACE_CLOCK);
    if recording.plan.host.newest_bytes.is_some() || has_other_clock {
        return None;
    }
    let opened = open_host_lanes(&recording.host, file, report);
    opened.inspect_err(|error| log::warn!("{}: {error}", file.output.path().display())).ok()
}

fn open_host_lanes(host: &Host, file: &MachineFile, report: &HostReport) -> io::Result<HostPages> {
    let mut lanes = Vec::new();
    for area in file.writer.areas() {
        let bytes = report.lanes.iter().find(|lane| lane.cpu == area.cpu).map_or(0, |lane| lane.ledger.bytes_out);
        lanes.push(LaneData { cpu: area.cpu, offset: area.offset, bytes });
    }
    let low = host.started.map_or(report.stopped, |(_, after)| after);
    Ok(HostPages {
        source: FileSource::new(file.writer.file().try_clone()?)?,
        lanes,
        page_bytes: host.armed.page_bytes,
        decoders: Decoders::new(&Formats::parse(&host.metadata)),
        traced: HostRange { low, high: report.stopped },
    })
}

/// A guest that could not be recorded (`--keep-going`).
fn left_out((name, trouble): &(String, Trouble)) -> MachineSummary {
    let remarks = vec![format!("left out: {trouble}")];
    MachineSummary { name: name.clone(), failed: true, remarks, ..MachineSummary::default() }
}

/// Finishes the instances' own files: they become parts of the host's file.
fn finish_instances(
    recording: &Recording,
    shared: &SharedFacts,
    stopped: Vec<(MachineFile, HostReport)>,
) -> (Vec<MachineSummary>, Vec<PartFile>) {
    let mut machines = Vec::new();
    let mut parts = Vec::new();
    for (instance, (mut file, report)) in recording.instances.iter().zip(stopped) {
        let mut machine = host_machine(recording, instance.title(), &file, &report);
        machine.remarks.extend(loss_hint(&machine.lanes, instance.buffer_kb));
        let clock = recorded_clock(&instance.host.armed.clock, &report.changes);
        file.writer.set_clock(&clock);
        let mut options = machine_options(shared, &clock, &uname(), file.trace_id);
        options.extend(cpu_stats(&machine, &report.lanes));
        let entry = file.output.entry().clone();
        let handle = file.output.file.try_clone();
        let filled = filled_by(&report);
        note_old_pages(&file, &filled, &mut machine);
        write(file, &filled, &instance.host.metadata.cmdlines, &options, &mut machine);
        match handle {
            Ok(file) if machine.bytes > 0 => parts.push(PartFile { name: instance.name.clone(), entry, file }),
            Ok(_) => {}
            Err(error) => log::warn!("{}: {error}", entry.path().display()),
        }
        // The file that it becomes a part of, and its share.
        machine.file = Some(recording.plan.host.output.display().to_string());
        machine.bytes = report.lanes.iter().map(|lane| lane.ledger.bytes_out).sum();
        machines.push(machine);
    }
    (machines, parts)
}

/// The summary of the host's top buffer, or of one of its instances.
fn host_machine(recording: &Recording, name: String, file: &MachineFile, report: &HostReport) -> MachineSummary {
    MachineSummary {
        name,
        file: Some(file.output.path().display().to_string()),
        lanes: report.lanes.iter().map(LaneSummary::host).collect(),
        failed: report.ends.iter().flatten().any(|end| !is_size_limit(recording, end)),
        changes: report.changes.clone(),
        remarks: report.lanes.iter().filter_map(trouble_of).chain(report.remarks.iter().cloned()).collect(),
        ..MachineSummary::default()
    }
}

fn filled_by(report: &HostReport) -> Vec<(Cpu, u64)> {
    report.lanes.iter().map(|lane| (lane.cpu, lane.ledger.bytes_out)).collect()
}

fn finish_host(
    recording: &Recording,
    mut file: MachineFile,
    report: &HostReport,
    links: Vec<TraceOption>,
    shared: &SharedFacts,
    parts: Vec<PartFile>,
) -> MachineSummary {
    let mut machine = host_machine(recording, "host".into(), &file, report);
    machine.remarks.extend(loss_hint(&machine.lanes, recording.plan.host.arm.buffer_kb));
    machine.remarks.extend(online_since_start(&recording.host.armed.lanes));
    let clock = recorded_clock(&recording.host.armed.clock, &report.changes);
    file.writer.set_clock(&clock);
    let mut options = machine_options(shared, &clock, &uname(), shared.host_id);
    options.extend(cpu_stats(&machine, &report.lanes));
    options.extend(links);
    let wanted = WantedForm { form: recording.plan.form, ..WantedForm::default() };
    let reform = Reform::of(&file, wanted, parts);
    let filled = filled_by(report);
    note_old_pages(&file, &filled, &mut machine);
    write(file, &filled, &recording.host.metadata.cmdlines, &options, &mut machine);
    reform.apply(&mut machine);
    machine
}

/// A remark about CPUs of the host that came online after the start: they have no lane.
fn online_since_start(lanes: &[Cpu]) -> Option<String> {
    missing_lanes(&online_cpus()?, lanes)
}

fn missing_lanes(online: &[Cpu], lanes: &[Cpu]) -> Option<String> {
    let missing: Vec<String> = online.iter().filter(|cpu| !lanes.contains(cpu)).map(ToString::to_string).collect();
    let verb = if missing.len() == 1 { "was" } else { "were" };
    (!missing.is_empty()).then(|| format!("{} came online after the start and {verb} not recorded", missing.join(", ")))
}

/// Whether a lane ended at `--max-file`.
fn is_size_limit(recording: &Recording, end: &TapEnd) -> bool {
    recording.plan.file_bytes_max.is_some() && matches!(end, TapEnd::AreaFull { .. })
}
