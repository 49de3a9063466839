//! The files of a recording: opened before anything is asked of anyone, finished when every page has its place.
//!
//! In:    a plan; descriptions, reports and ledgers of all machines
//! Out:   one trace.dat each, tied together: TRACEID and GUEST, one TSC2NSEC for all, TIME_SHIFT in the guests'
//! Trust: nothing a guest says decides where a byte goes

use std::{
    fs::{File, OpenOptions, TryLockError},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use nix::errno::Errno;
use vtrace_common::{
    ids::Cpu,
    page::{HEADER_BYTES, Header},
    wire::{agent::LaneReport, client::LaneLedger},
};

use super::{
    clocks::GuestClock,
    guest::vcpu_threads,
    host::HostReport,
    run::Recording,
    session::GuestSession,
    sink::open_direct,
    summary::{ClockSummary, LaneSummary, MachineSummary, Summary},
    tsc::Scale,
};
use crate::{
    cli::plan::{CLOCK, Plan},
    clock::plan::ClockPlan,
    sys::random,
    trace::{metadata::Metadata, option::TraceOption, writer::Writer},
};

/// What was being done to a file.
#[derive(Debug, thiserror::Error)]
#[error("{}: {what}: {source}", .path.display())]
pub struct FileError {
    /// Which file.
    pub path: PathBuf,
    /// open, write, finish.
    pub what: &'static str,
    /// Why not.
    pub source: io::Error,
}

/// A file that is open and not yet touched.
#[derive(Debug)]
pub(super) struct Output {
    path: PathBuf,
    file: File,
    /// This run made it: it goes again if the recording does not begin.
    made: bool,
}

/// A file that pages are being written to.
#[derive(Debug)]
pub(super) struct MachineFile {
    output: Output,
    trace_id: u64,
    pub(super) writer: Writer,
    /// A guest's file once more, past the page cache, if it is written so.
    pub(super) direct: Option<File>,
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.made {
            // Best effort: an empty file that stays is not worth a second error.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// A marker's text: the same in all files of a session.
pub(super) fn marker(plan: &Plan, word: &str) -> String {
    format!("vtrace: {word} {:016x}", plan.host.arm.session)
}

/// Opens every file of a plan, the host's first. Nothing is truncated yet.
pub(super) fn open(plan: &Plan) -> Result<Vec<Output>, FileError> {
    let guests = plan.guests.iter().map(|guest| &guest.machine.output);
    std::iter::once(&plan.host.output).chain(guests).map(|path| open_one(path)).collect()
}

fn open_one(path: &Path) -> Result<Output, FileError> {
    let failed = |source| FileError { path: path.into(), what: "open", source };
    let mut options = OpenOptions::new();
    let (file, made) = match options.read(true).write(true).create_new(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            (options.create_new(false).open(path).map_err(failed)?, false)
        }
        file => (file.map_err(failed)?, true),
    };
    file.try_lock().map_err(|error| {
        let taken = || io::Error::new(io::ErrorKind::ResourceBusy, "another recording writes to it");
        failed(if matches!(error, TryLockError::WouldBlock) { taken() } else { error.into() })
    })?;
    Ok(Output { path: path.into(), file, made })
}

/// Writes the heads and reserves the lanes' areas.
pub(super) fn create(recording: &Recording, outputs: Vec<Output>) -> Result<Vec<MachineFile>, FileError> {
    let host = &recording.host;
    let sessions = recording.guests.iter().flat_map(|guests| &guests.sessions);
    let guests = sessions.map(|session| {
        let armed = session.armed.as_ref().expect("every guest is armed before its file is made");
        (&session.metadata, armed)
    });
    let machines = std::iter::once((&host.metadata, &host.armed)).chain(guests);
    let made = machines.zip(outputs).map(|((metadata, armed), output)| create_one(metadata, armed, output));
    let mut files = made.collect::<Result<Vec<_>, _>>()?;
    for file in files.iter_mut().skip(1) {
        let direct = open_direct(recording.plan.sink, file.writer.file());
        let failed = |source| FileError { path: file.output.path.clone(), what: "open past the page cache", source };
        file.direct = direct.map_err(failed)?;
    }
    Ok(files)
}

fn create_one(
    metadata: &Metadata,
    armed: &vtrace_common::wire::agent::Armed,
    output: Output,
) -> Result<MachineFile, FileError> {
    let failed = |source| FileError { path: output.path.clone(), what: "write", source };
    let file = output.file.try_clone().and_then(|file| file.set_len(0).map(|()| file)).map_err(failed)?;
    let writer = Writer::create(file, metadata, &armed.clock, armed.page_bytes, &armed.lanes);
    let writer = writer.map_err(|fault| failed(fault.into()))?;
    Ok(MachineFile { output, trace_id: random() | 1, writer, direct: None })
}

/// The recording has begun: the files stay, whatever happens.
pub(super) fn keep(files: &mut [MachineFile]) {
    files.iter_mut().for_each(|file| file.output.made = false);
}

/// What is the same in all files of a session.
pub(super) struct Common {
    pub(super) host_id: u64,
    pub(super) scale: Scale,
}

/// Finishes all files: the host's last, so that it can name its guests. A file that cannot be finished is a remark of
/// its machine and does not keep the others from being finished.
pub(super) fn finish(
    recording: &Recording,
    files: Vec<MachineFile>,
    report: &HostReport,
    seconds: f64,
    command_status: Option<u8>,
) -> Summary {
    let mut files = files.into_iter();
    let host = files.next().expect("the host has a file");
    let common = Common { host_id: host.trace_id, scale: recording.calibration.scale() };
    let mut options = Vec::new();
    let mut machines = Vec::new();
    let sessions = recording.guests.iter().flat_map(|guests| &guests.sessions);
    for (index, (session, file)) in sessions.zip(files).enumerate() {
        let (machine, link) = finish_guest(recording, index, session, file, &common);
        machines.push(machine);
        options.push(link);
    }
    machines.insert(0, finish_host(recording, host, report, options, &common));
    let session = format!("{:016x}", recording.plan.host.arm.session);
    Summary { session, seconds, machines, command_status }
}

fn finish_host(
    recording: &Recording,
    file: MachineFile,
    report: &HostReport,
    links: Vec<TraceOption>,
    common: &Common,
) -> MachineSummary {
    let lanes: Vec<LaneSummary> = report.lanes.iter().map(LaneSummary::host).collect();
    let mut machine = MachineSummary {
        name: "host".into(),
        file: Some(file.output.path.clone()),
        bytes: 0,
        lanes,
        sink: None,
        clock: None,
        start_skew_ns: None,
        commands: Vec::new(),
        failed: report.lanes.iter().any(|lane| !lane.trouble.is_empty()),
        remarks: report.lanes.iter().filter_map(trouble_of).collect(),
    };
    let mut options = options(common, &machine, &report.lanes, &recording.host.armed.clock, &uname());
    options.push(TraceOption::TraceId(common.host_id));
    options.extend(links);
    let filled: Vec<(Cpu, u64)> = report.lanes.iter().map(|lane| (lane.cpu, lane.bytes_sent)).collect();
    write(file, &filled, &recording.host.metadata.cmdlines, &options, &mut machine);
    machine
}

fn finish_guest(
    recording: &Recording,
    index: usize,
    session: &GuestSession,
    file: MachineFile,
    common: &Common,
) -> (MachineSummary, TraceOption) {
    let armed = session.armed.as_ref().expect("a guest with a file was armed");
    let clock = GuestClock::of(recording, index, session, common);
    let ledgers = if session.is_finished() { session.ledgers.clone() } else { found(&file.writer, armed.page_bytes) };
    let (lanes, mut remarks) = guest_lanes(session, &ledgers);
    remarks.extend(session.trouble.iter().map(ToString::to_string));
    remarks.extend(session.reports.iter().filter_map(trouble_of));
    let kvm = clock.kvm();
    let threads = session.claimed.as_ref().map(|claimed| vcpu_threads(claimed.vmm_pid, &armed.lanes, kvm));
    if threads.as_ref().is_some_and(|threads| !threads.known) {
        remarks.push("its vCPU threads are not known: start QEMU with -name GUEST,debug-threads=on".into());
    }
    if clock.plan.is_none() {
        remarks.push("its clock could not be measured: its times stay its own".into());
    }
    let mut machine = MachineSummary {
        name: session.name.clone(),
        file: Some(file.output.path.clone()),
        bytes: 0,
        lanes,
        sink: Some(if file.direct.is_some() { "direct" } else { "buffered" }),
        start_skew_ns: clock.plan.as_ref().and_then(|plan| start_skew_ns(recording, common, session, plan)),
        clock: clock.summary,
        commands: session.outputs.commands().to_vec(),
        failed: has_failed(session, &ledgers),
        remarks,
    };
    let uname = session.claimed.as_ref().map(|claimed| claimed.machine.uname.as_str()).unwrap_or_default();
    let mut options = options(common, &machine, &session.reports, &armed.clock, uname);
    options.push(TraceOption::TraceId(file.trace_id));
    options.extend(clock.plan.map(|plan| TraceOption::TimeShift(plan.time_shift)));
    let vcpus = threads.map(|threads| threads.threads).unwrap_or_default();
    let link = TraceOption::Guest { name: session.name.clone(), trace_id: file.trace_id, vcpus };
    let filled: Vec<(Cpu, u64)> = filled(&ledgers, armed.page_bytes);
    write(file, &filled, &session.metadata.cmdlines, &options, &mut machine);
    (machine, link)
}

/// What a server that has gone left in the file: pages up to the first that was never written.
fn found(writer: &Writer, page_bytes: u32) -> Vec<LaneLedger> {
    let lanes = writer.areas().iter().map(|area| {
        let is_written = |page: &u64| {
            let mut header = [0; HEADER_BYTES];
            let read = writer.file().read_exact_at(&mut header, area.offset + page * u64::from(page_bytes));
            // No page of a trace clock has time stamp 0; a hole reads as zeros.
            read.is_ok() && Header::parse(&header, usize::MAX).is_ok_and(|header| header.time > 0)
        };
        let pages = (0..area.bytes_max / u64::from(page_bytes)).take_while(is_written).count();
        let pages = u64::try_from(pages).expect("u64 counts them all");
        LaneLedger { cpu: area.cpu, pages_in: pages, pages_out: pages, ..LaneLedger::default() }
    });
    lanes.collect()
}

/// Its part did not go to its end.
fn has_failed(session: &GuestSession, ledgers: &[LaneLedger]) -> bool {
    session.trouble.is_some()
        || session.reports.iter().any(|lane| !lane.trouble.is_empty())
        || ledgers.iter().any(|lane| lane.write_errno != 0)
}

fn guest_lanes(session: &GuestSession, ledgers: &[LaneLedger]) -> (Vec<LaneSummary>, Vec<String>) {
    let report = |cpu: Cpu| session.reports.iter().find(|report| report.cpu == cpu);
    let summed = ledgers.iter().map(|ledger| LaneSummary::guest(report(ledger.cpu), ledger));
    let (lanes, balanced): (Vec<_>, Vec<_>) = summed.unzip();
    let mut remarks = Vec::new();
    for ledger in ledgers.iter().filter(|ledger| ledger.write_errno != 0) {
        let (cpu, why) = (ledger.cpu, Errno::from_raw(ledger.write_errno).desc());
        remarks.push(format!("{cpu}: {} pages could not be written: {why}", ledger.pages_refused));
    }
    if session.reports.len() < ledgers.len() {
        remarks.push("its own page counts are missing: what was lost inside it is not known".into());
    }
    if balanced.contains(&false) {
        remarks.push("its agent's page counts do not fit what arrived".into());
    }
    (lanes, remarks)
}

fn trouble_of(report: &LaneReport) -> Option<String> {
    (!report.trouble.is_empty()).then(|| format!("{}: {}", report.cpu, report.trouble))
}

fn filled(ledgers: &[LaneLedger], page_bytes: u32) -> Vec<(Cpu, u64)> {
    ledgers.iter().map(|ledger| (ledger.cpu, ledger.pages_out * u64::from(page_bytes))).collect()
}

fn options(
    common: &Common,
    machine: &MachineSummary,
    reports: &[LaneReport],
    clock: &str,
    uname: &str,
) -> Vec<TraceOption> {
    let cpus = machine.lanes.iter().map(|lane| lane.cpu + 1).max().unwrap_or(0);
    let mut options = vec![
        TraceOption::CpuCount(cpus),
        TraceOption::TraceClock(clock.into()),
        TraceOption::Uname(uname.into()),
        TraceOption::Version(format!("vtrace {}", env!("CARGO_PKG_VERSION"))),
    ];
    // A clock that is not the TSC has nanoseconds of its own.
    if clock.contains(&format!("[{CLOCK}]")) {
        options.push(TraceOption::Tsc2Nsec { mult: common.scale.mult, shift: common.scale.shift });
    }
    options.extend(machine.lanes.iter().map(|lane| {
        let report = reports.iter().find(|report| report.cpu.0 == lane.cpu);
        TraceOption::CpuStat(cpu_stat(lane, report, machine.clock.as_ref()))
    }));
    options
}

/// What `trace-cmd report --stat` shows: the kernel's words, then ours.
fn cpu_stat(lane: &LaneSummary, report: Option<&LaneReport>, clock: Option<&ClockSummary>) -> String {
    let kernel = report.map(|report| report.stats_after.trim_end()).unwrap_or_default();
    let LaneSummary { cpu, pages_in, pages_out, pages_lost, .. } = lane;
    let clock = clock.map(|clock| format!("vtrace clock: {clock}\n")).unwrap_or_default();
    format!("CPU: {cpu}\n{kernel}\nvtrace pages: {pages_in} in, {pages_out} out, {pages_lost} lost\n{clock}")
}

/// From the host's start to the guest's, in host time.
fn start_skew_ns(recording: &Recording, common: &Common, session: &GuestSession, clock: &ClockPlan) -> Option<i64> {
    let (_, guest) = session.started?;
    let (_, host) = recording.host.started?;
    let cycles =
        clock.to_host(session.armed.as_ref()?.lanes.first().copied()?, guest).0.wrapping_sub(host.0).cast_signed();
    let ns = i64::try_from(common.scale.ns(cycles.unsigned_abs())).ok()?;
    Some(if cycles < 0 { -ns } else { ns })
}

/// "Linux node release machine" of this host.
fn uname() -> String {
    let Ok(names) = nix::sys::utsname::uname() else { return String::new() };
    let names = [names.sysname(), names.nodename(), names.release(), names.machine()];
    names.map(|name| name.to_string_lossy().into_owned()).join(" ")
}

/// An error with all its sources, one behind the other.
pub fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(Some(error), |error| error.source());
    sources.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn write(
    file: MachineFile,
    filled: &[(Cpu, u64)],
    cmdlines: &[u8],
    options: &[TraceOption],
    machine: &mut MachineSummary,
) {
    let note = serde_json::to_string(machine).expect("a summary is plain data");
    let path = &file.output.path;
    match file.writer.finish(filled, cmdlines, options, &note) {
        Ok(finished) => machine.bytes = finished.bytes,
        Err(source) => {
            machine.failed = true;
            machine.remarks.push(format!("{} could not be finished: {}", path.display(), chain(&source)));
        }
    }
}
