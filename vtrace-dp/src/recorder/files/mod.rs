//! The files of a recording: opened before the first guest is claimed, finished when every page is in them.
//!
//! In:    a plan; descriptions, reports and ledgers of all machines
//! Out:   one trace.dat each, tied together: TRACEID and GUEST, one TSC2NSEC for all, host times in the guests'
//! Trust: nothing from a guest decides where a byte goes

pub(crate) mod date;
pub(crate) mod finish;
mod finish_file;
mod finish_form;
mod finish_guest;
pub mod limit;
pub(crate) mod machine_file;
pub(crate) mod options;
pub mod output;
mod unreported_pages;

use self::{
    machine_file::MachineFile,
    options::{guest_link, guest_threads, guest_uname, machine_options, uname},
    output::{FileError, OutputFile},
};
use super::{plan::Plan, session::Recording};
use crate::{
    clock::measured::plan,
    drain::sink::{choice::open_direct, writeback::Writeback},
    trace::format::option::TraceOption,
};

/// Opens every file of a plan, the host's first. What these paths name now stays as it is.
pub(crate) fn open(plan: &Plan) -> Result<Vec<OutputFile>, FileError> {
    let open = if plan.no_clobber { OutputFile::open_new } else { OutputFile::open };
    let mut files = vec![open(&plan.host.output)?];
    for guest in &plan.guests {
        files.push(open(&guest.machine.output)?);
    }
    Ok(files)
}

/// Writes the heads, reserves the lanes' areas, and stores the options that are known already, so that `restore` can
/// finish and link the files of a killed recording.
pub(crate) fn create(recording: &Recording, outputs: Vec<OutputFile>) -> Result<Vec<MachineFile>, FileError> {
    let plan = recording.plan;
    let mut outputs = outputs.into_iter();
    let host = outputs.next().expect("the host has a file");
    let bounds = plan.bounds(plan.host.newest_bytes);
    let mut files = vec![MachineFile::create(&recording.host.metadata, &recording.host.armed, host, bounds)?];
    for (session, output) in recording.sessions().zip(outputs) {
        let bounds = plan.guest_bounds(&session.name);
        let mut file = MachineFile::create(&session.metadata, session.armed(), output, bounds)?;
        file.direct = open_direct(plan.sink, file.writer.file()).map_err(|source| FileError {
            path: file.output.path().into(),
            what: "open with O_DIRECT",
            source,
        })?;
        files.push(file);
    }
    keep_options(recording, &mut files);
    Ok(files)
}

/// Stores the options that are known now in every file; called again when clocks have been measured.
pub(crate) fn keep_options(recording: &Recording, files: &mut [MachineFile]) {
    let shared = recording.shared(&files[0]);
    let mut links = Vec::new();
    for ((session, file), readings) in recording.sessions().zip(&mut files[1..]).zip(&recording.clocks) {
        let armed = session.armed();
        let lanes = session.lanes_in_use();
        let mut options = machine_options(&shared, &armed.clock, guest_uname(session), file.trace_id);
        // Spare CPUs get the offset that the others share, if they share one.
        let clock = plan(&readings.start, &readings.end, &armed.lanes, shared.host_id)
            .or_else(|| plan(&readings.start, &readings.end, &lanes, shared.host_id));
        options.extend(clock.map(|clock| TraceOption::TimeShift(clock.time_shift)));
        links.push(guest_link(session, file.trace_id, &guest_threads(session, &lanes, &[])));
        file.keep(&options);
    }
    let mut options = machine_options(&shared, &recording.host.armed.clock, &uname(), shared.host_id);
    options.extend(links);
    files[0].keep(&options);
}

/// The same for the files of the host's instances.
pub(crate) fn keep_instance_options(recording: &mut Recording, host: &MachineFile) {
    let shared = recording.shared(host);
    for instance in &mut recording.instances {
        let Some(file) = &mut instance.file else { continue };
        file.keep(&machine_options(&shared, &instance.host.armed.clock, &uname(), file.trace_id));
    }
}

/// Starts writing pages to disk in the background.
pub(crate) fn writeback<'a>(files: impl Iterator<Item = &'a MachineFile>) -> Writeback {
    Writeback::start(files.filter_map(|file| file.output.file.try_clone().ok()).collect())
}

/// The recording has begun: the files get their names and stay from now on.
pub(crate) fn begin<'a>(files: impl Iterator<Item = &'a mut MachineFile>) {
    files.for_each(|file| file.output.begin());
}
