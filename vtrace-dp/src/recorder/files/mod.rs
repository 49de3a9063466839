//! The files of a recording: opened before anything is asked of anyone, finished when every page has its place.
//!
//! In:    a plan; descriptions, reports and ledgers of all machines
//! Out:   one trace.dat each, tied together: TRACEID and GUEST, one TSC2NSEC for all, host times in the guests'
//! Trust: nothing a guest says decides where a byte goes

pub(crate) mod date;
mod finish_form;
pub mod limit;
pub(crate) mod machine_file;
pub mod output;

use std::{fs::File, io, os::unix::fs::FileExt, path::PathBuf, time::Instant};

use vtrace_common::{
    ids::Cpu,
    wire::{
        agent::{Armed, LaneReport},
        client::{Area, LaneLedger},
    },
};

use self::{
    finish_form::{PartFile, Wanted, reform},
    machine_file::MachineFile,
    output::{FileError, Output},
};
use super::{
    clocks::GuestClock,
    guests::silence,
    host::{Host, HostReport},
    instances,
    plan::{CLOCK, Plan},
    session::{GuestSession, Trouble, guest_lanes, in_use},
    state::{Common, Recording},
    summary::{ClockSummary, LaneSummary, MachineSummary, Summary},
};
use crate::{
    analysis::{host_lanes::Decoders, vcpu_runs::HostLanes},
    clock::{math::HostRange, measured::plan, vcpus::Vcpu},
    drain::{
        sink::{choice::open_direct, write_behind::Behind},
        tap::splice::End,
    },
    ftrace::fields::Formats,
    printable::chain,
    trace::{
        format::option::TraceOption,
        read::{LaneData, input::FileSource},
        restore::uncounted_pages::whole_at,
        write::Writer,
    },
    tracefs::online_cpus,
    vmm::vcpu_threads::vcpu_threads,
};

/// A marker's text: the same in all files of a session.
pub(crate) fn marker(plan: &Plan, word: &str) -> String {
    format!("vtrace: {word} {:016x}", plan.host.arm.session)
}

/// The pages of a host that has stopped.
///
/// # Errors
/// When its file cannot be opened once more.
fn host_lanes(host: &Host, file: &MachineFile, report: &HostReport) -> io::Result<HostLanes> {
    let bytes = |cpu| report.lanes.iter().find(|lane| lane.cpu == cpu).map_or(0, |lane| lane.bytes_sent);
    let areas = file.writer.areas().iter();
    let lanes = areas.map(|area| LaneData { cpu: area.cpu, offset: area.offset, bytes: bytes(area.cpu) });
    let low = host.started.map_or(report.stopped, |(_, after)| after);
    Ok(HostLanes {
        source: FileSource::new(file.writer.file().try_clone()?)?,
        lanes: lanes.collect(),
        page_bytes: host.armed.page_bytes,
        decoders: Decoders::of(&Formats::of(&host.metadata)),
        traced: HostRange { low, high: report.stopped },
    })
}

/// Opens every file of a plan, the host's first. What was there before is not touched.
pub(crate) fn open(plan: &Plan) -> Result<Vec<Output>, FileError> {
    let guests = plan.guests.iter().map(|guest| &guest.machine.output);
    let open = if plan.no_clobber { Output::open_new } else { Output::open };
    std::iter::once(&plan.host.output).chain(guests).map(|path| open(path)).collect()
}

/// Writes the heads, reserves the lanes' areas, and keeps in each file what is known already: a file whose recording
/// is killed can be restored, and its host and guests still know each other.
pub(crate) fn create(recording: &Recording, outputs: Vec<Output>) -> Result<Vec<MachineFile>, FileError> {
    let host = &recording.host;
    let armed = recording.sessions().map(|session| (&session.metadata, armed(session)));
    let machines = std::iter::once((&host.metadata, &host.armed)).chain(armed);
    let bounds = std::iter::once(recording.plan.bounds()).chain(std::iter::repeat(recording.plan.guest_bounds()));
    let made = machines.zip(outputs).zip(bounds);
    let created =
        made.map(|(((metadata, armed), output), bounds)| MachineFile::create(metadata, armed, output, bounds));
    let mut files = created.collect::<Result<Vec<_>, _>>()?;
    for file in files.iter_mut().skip(1) {
        let direct = open_direct(recording.plan.sink, file.writer.file());
        let failed = |source| FileError { path: file.output.path().into(), what: "open past the page cache", source };
        file.direct = direct.map_err(failed)?;
    }
    keep_options(recording, &mut files);
    Ok(files)
}

/// A guest with a file.
fn armed(session: &GuestSession) -> &Armed {
    session.armed.as_ref().expect("every guest is armed before its file is made")
}

/// Keeps in every file what is known now: again when clocks have been measured. A file that cannot keep it is no worse
/// if its recording ends well.
pub(crate) fn keep_options(recording: &Recording, files: &mut [MachineFile]) {
    let common = recording.common(&files[0]);
    let mut links = Vec::new();
    for ((session, file), clocks) in recording.sessions().zip(&mut files[1..]).zip(&recording.clocks) {
        let (armed, lanes) = (armed(session), session.lanes_in_use());
        let mut options = machine_options(&common, &armed.clock, guest_uname(session), file.trace_id);
        // CPUs that may come get what the others have in common, if they have that.
        let plan = |lanes: &[Cpu]| plan(&clocks.start, &clocks.end, lanes, common.host_id);
        let clock = plan(&armed.lanes).or_else(|| plan(&lanes));
        options.extend(clock.map(|clock| TraceOption::TimeShift(clock.time_shift)));
        links.push(link(session, file.trace_id, &lanes, &[]).0);
        file.keep(&options);
    }
    let mut options = machine_options(&common, &recording.host.armed.clock, &uname(), common.host_id);
    options.extend(links);
    files[0].keep(&options);
}

/// The same for a file of an instance.
pub(crate) fn keep_options_of(recording: &mut Recording, host: &MachineFile) {
    let common = recording.common(host);
    for instance in &mut recording.instances {
        let Some(file) = &mut instance.file else { continue };
        file.keep(&machine_options(&common, &instance.host.armed.clock, &uname(), file.trace_id));
    }
}

/// Writes pages behind the recording from now on.
pub(crate) fn write_behind<'a>(files: impl Iterator<Item = &'a MachineFile>) -> Behind {
    Behind::start(files.filter_map(|file| file.output.file.try_clone().ok()).collect())
}

/// The recording has begun: the files get their names and stay, whatever happens.
pub(crate) fn begin<'a>(files: impl Iterator<Item = &'a mut MachineFile>) {
    files.for_each(|file| file.output.begin());
}

/// Finishes all files: the host's last, so that it can name its guests. A file that cannot be finished is a remark of
/// its machine and does not keep the others from being finished.
pub(crate) fn finish(
    recording: &mut Recording,
    files: Vec<MachineFile>,
    report: &HostReport,
    seconds: f64,
    command_status: Option<u8>,
) -> Summary {
    let instances = instances::take(&mut recording.instances);
    let recording = &*recording;
    let mut files = files.into_iter();
    let host = files.next().expect("the host has a file");
    let common = recording.common(&host);
    // Where only the newest pages are kept, they are in no order yet.
    let lanes = recording.plan.newest_bytes.is_none().then(|| host_lanes(&recording.host, &host, report));
    let lanes = lanes.transpose().inspect_err(|error| log::warn!("{}: {error}", host.output.path().display()));
    let lanes = lanes.ok().flatten();
    let mut options = Vec::new();
    let mut machines = Vec::new();
    let sessions = recording.guests.iter().flat_map(|guests| &guests.sessions);
    for (index, (session, file)) in sessions.zip(files).enumerate() {
        let (machine, link) = finish_guest(recording, index, session, file, &common, lanes.as_ref());
        machines.push(machine);
        options.push(link);
    }
    let (mut of_host, parts) = finish_instances(recording, &common, instances);
    of_host.insert(0, finish_host(recording, host, report, options, &common, parts));
    of_host.append(&mut machines);
    let session = format!("{:016x}", recording.plan.host.arm.session);
    let Recording { ended, .. } = *recording;
    let mut summary = Summary { session, seconds, machines: of_host, ended, command_status };
    summary.machines.extend(recording.left_out.iter().map(left_out));
    summary
}

/// A guest that could not be recorded, and was left out.
fn left_out((name, trouble): &(String, Trouble)) -> MachineSummary {
    let remarks = vec![format!("left out: {trouble}")];
    MachineSummary { name: name.clone(), failed: true, remarks, ..MachineSummary::default() }
}

/// The instances' own files, finished: they become parts of the host's.
fn finish_instances(
    recording: &Recording,
    common: &Common,
    instances: Vec<(MachineFile, HostReport)>,
) -> (Vec<MachineSummary>, Vec<PartFile>) {
    let (mut machines, mut parts) = (Vec::new(), Vec::new());
    for (instance, (file, report)) in recording.instances.iter().zip(instances) {
        let mut machine = host_machine(recording, instance.title(), &file, &report);
        let clock = &instance.host.armed.clock;
        let mut options = machine_options(common, clock, &uname(), file.trace_id);
        options.extend(cpu_stats(&machine, &report.lanes));
        let path = file.output.path().to_owned();
        let handle = file.output.file.try_clone();
        let filled = filled_by(&report);
        note_old_pages(&file, &filled, &mut machine);
        write(file, &filled, &instance.host.metadata.cmdlines, &options, &mut machine);
        match handle {
            Ok(file) if machine.bytes > 0 => parts.push(PartFile { name: instance.name.clone(), path, file }),
            Ok(_) => {}
            Err(error) => log::warn!("{}: {error}", path.display()),
        }
        // Its part of the file it is going to be in.
        machine.file = Some(recording.plan.host.output.clone());
        machine.bytes = report.lanes.iter().map(|lane| lane.bytes_sent).sum();
        machines.push(machine);
    }
    (machines, parts)
}

/// What the host's top buffer, or one of its instances, recorded.
fn host_machine(recording: &Recording, name: String, file: &MachineFile, report: &HostReport) -> MachineSummary {
    MachineSummary {
        name,
        file: Some(file.output.path().into()),
        lanes: report.lanes.iter().map(LaneSummary::host).collect(),
        failed: report.ends.iter().flatten().any(|end| !is_bound(recording, end)),
        remarks: report.lanes.iter().filter_map(trouble_of).collect(),
        ..MachineSummary::default()
    }
}

fn filled_by(report: &HostReport) -> Vec<(Cpu, u64)> {
    report.lanes.iter().map(|lane| (lane.cpu, lane.bytes_sent)).collect()
}

fn finish_host(
    recording: &Recording,
    file: MachineFile,
    report: &HostReport,
    links: Vec<TraceOption>,
    common: &Common,
    parts: Vec<PartFile>,
) -> MachineSummary {
    let mut machine = host_machine(recording, "host".into(), &file, report);
    machine.remarks.extend(came_later(&recording.host.armed.lanes));
    let mut options = machine_options(common, &recording.host.armed.clock, &uname(), common.host_id);
    options.extend(cpu_stats(&machine, &report.lanes));
    options.extend(links);
    let again = Again::of(&file, Wanted { form: recording.plan.form, ..Wanted::default() }, parts);
    let filled = filled_by(report);
    note_old_pages(&file, &filled, &mut machine);
    write(file, &filled, &recording.host.metadata.cmdlines, &options, &mut machine);
    again.reform(&mut machine);
    machine
}

/// CPUs of the host that are online now and were not when the recording began: it has no lane for them.
fn came_later(lanes: &[Cpu]) -> Option<String> {
    missing_lanes(&online_cpus()?, lanes)
}

fn missing_lanes(online: &[Cpu], lanes: &[Cpu]) -> Option<String> {
    let missing: Vec<String> = online.iter().filter(|cpu| !lanes.contains(cpu)).map(ToString::to_string).collect();
    let verb = if missing.len() == 1 { "was" } else { "were" };
    (!missing.is_empty()).then(|| format!("{} came online after the start and {verb} not recorded", missing.join(", ")))
}

/// A file that may get another form when it is finished.
struct Again<'a> {
    path: PathBuf,
    file: io::Result<File>,
    wanted: Wanted<'a>,
    parts: Vec<PartFile>,
}

impl<'a> Again<'a> {
    fn of(file: &MachineFile, wanted: Wanted<'a>, parts: Vec<PartFile>) -> Self {
        Self { path: file.output.path().into(), file: file.output.file.try_clone(), wanted, parts }
    }

    /// Once the file is finished.
    fn reform(self, machine: &mut MachineSummary) {
        let Self { path, file, wanted, parts } = self;
        if machine.bytes == 0 {
            return; // it could not be finished, and that is said
        }
        let reformed = file.map_err(|error| error.to_string()).and_then(|file| reform(&path, &file, parts, wanted));
        match reformed {
            Ok(bytes) => machine.bytes = bytes.unwrap_or(machine.bytes),
            Err(why) => {
                machine.failed = true;
                machine.remarks.push(why);
            }
        }
    }
}

fn finish_guest(
    recording: &Recording,
    index: usize,
    session: &GuestSession,
    mut file: MachineFile,
    common: &Common,
    host: Option<&HostLanes>,
) -> (MachineSummary, TraceOption) {
    let armed = armed(session);
    let ledgers = match session.is_finished() {
        true => session.ledgers.clone(),
        false => found(&file.writer, &session.ledgers, armed.page_bytes),
    };
    let used = in_use(armed, &ledgers);
    let clock = GuestClock::of(recording, index, (session, used.clone()), common, host);
    let (mut lanes, mut remarks) = guest_lanes(session, &ledgers);
    remarks.extend(session.trouble.iter().map(ToString::to_string));
    let silence = session.silence.longest(Instant::now());
    remarks.extend(silence::remark(silence));
    if session.is_full {
        let bytes_max = recording.plan.guest_bytes_max.unwrap_or(0);
        remarks.push(format!("stopped before the others, near its {bytes_max} bytes (--max-guest-bytes)"));
    }
    remarks.extend(session.reports.iter().filter_map(trouble_of));
    let (link, known) = link(session, file.trace_id, &used, &clock.kvm);
    if !known {
        remarks.push("its vCPU threads are not known: start QEMU with -name GUEST,debug-threads=on".into());
    }
    let start_skew_ns = start_skew_ns(recording, common, session, &clock);
    let mut filled: Vec<(Cpu, u64)> = filled(&ledgers, armed.page_bytes);
    let written = filled.clone();
    let mut options = machine_options(common, &armed.clock, guest_uname(session), file.trace_id);
    let known = (&session.metadata.cmdlines[..], &options[..]);
    let times = clock.convert(&mut file.writer, &mut filled, &known, common);
    for lane in &mut lanes {
        lane.pages_added = times.added.iter().find(|(cpu, _)| cpu.0 == lane.cpu).map_or(0, |(_, added)| *added);
    }
    remarks.extend(times.remarks);
    let mut machine = MachineSummary {
        name: session.name.clone(),
        file: Some(file.output.path().into()),
        bytes: 0,
        lanes,
        sink: Some(if file.direct.is_some() { "direct" } else { "buffered" }),
        start_skew_ns,
        clock: times.summary,
        commands: session.outputs.commands().to_vec(),
        silence_ms_max: u64::try_from(silence.as_millis()).unwrap_or(u64::MAX),
        failed: has_failed(session, &ledgers) || times.failed,
        remarks,
    };
    options.extend(cpu_stats(&machine, &session.reports));
    options.extend(times.options);
    if recording.plan.raw_clock {
        options.retain(|option| !matches!(option, TraceOption::Date(_))); // it is the host's clock's
    }
    note_old_pages(&file, &written, &mut machine);
    let (form, instance) = (recording.plan.form, instances::of_guest(recording.plan, session));
    let again = Again::of(&file, Wanted { form, instance, anew: session.may_be_written() }, Vec::new());
    write(file, &filled, &session.metadata.cmdlines, &options, &mut machine);
    again.reform(&mut machine);
    (machine, link)
}

/// What ties a guest's file to the host's, and whether the threads of its vCPUs are known.
fn link(session: &GuestSession, trace_id: u64, lanes: &[Cpu], by_kvm: &[Vcpu]) -> (TraceOption, bool) {
    let threads = session.claimed.as_ref();
    let threads = threads.map(|claimed| vcpu_threads(claimed.vmm_pid, lanes, by_kvm));
    let known = threads.as_ref().is_none_or(|threads| threads.known);
    let vcpus = threads.map(|threads| threads.threads).unwrap_or_default();
    (TraceOption::Guest { name: session.name.clone(), trace_id, vcpus }, known)
}

fn guest_uname(session: &GuestSession) -> &str {
    session.claimed.as_ref().map(|claimed| claimed.machine.uname.as_str()).unwrap_or_default()
}

/// The lane ended where it was asked to.
fn is_bound(recording: &Recording, end: &End) -> bool {
    recording.plan.file_bytes_max.is_some() && matches!(end, End::AreaFull { .. })
}

/// What a server that has gone left in the file: what it said last, and the whole pages behind that.
fn found(writer: &Writer, said: &[LaneLedger], page_bytes: u32) -> Vec<LaneLedger> {
    let mut page = vec![0; usize::try_from(page_bytes).expect("usize is 64 bits")];
    let mut more = |area: &Area, pages: u64| {
        let begin = pages * u64::from(page_bytes);
        let mut time_at = |written: u64| {
            let read = writer.file().read_exact_at(&mut page, area.place(written));
            read.ok().and_then(|()| whole_at(&page))
        };
        let mut last = begin.checked_sub(page_bytes.into()).and_then(&mut time_at).unwrap_or(0);
        // A lane that has begun again has older pages there, and none has more than its area.
        let is_newer = |at: &u64| match time_at(begin + at * u64::from(page_bytes)) {
            Some(time) if time >= last => {
                last = time;
                true
            }
            _ => false,
        };
        let room = if area.begins_again { area.bytes_max } else { area.room(begin) };
        u64::try_from((0..room / u64::from(page_bytes)).take_while(is_newer).count()).expect("u64 counts them all")
    };
    let lanes = writer.areas().iter().map(|area| {
        let said = said.iter().find(|lane| lane.cpu == area.cpu).copied().unwrap_or_default();
        let pages_out = said.pages_out + more(area, said.pages_out);
        LaneLedger { cpu: area.cpu, pages_out, pages_in: pages_out + said.pages_refused, ..said }
    });
    lanes.collect()
}

/// Its part did not go to its end.
fn has_failed(session: &GuestSession, ledgers: &[LaneLedger]) -> bool {
    session.trouble.is_some()
        || session.reports.iter().any(|lane| !lane.trouble.is_empty())
        || ledgers.iter().any(|lane| lane.write_errno != 0)
}

fn trouble_of(report: &LaneReport) -> Option<String> {
    (!report.trouble.is_empty()).then(|| format!("{}: {}", report.cpu, report.trouble))
}

pub(crate) fn filled(ledgers: &[LaneLedger], page_bytes: u32) -> Vec<(Cpu, u64)> {
    ledgers.iter().map(|ledger| (ledger.cpu, ledger.pages_out * u64::from(page_bytes))).collect()
}

/// What is known of a machine before its trace begins.
fn machine_options(common: &Common, clock: &str, uname: &str, trace_id: u64) -> Vec<TraceOption> {
    let mut options = vec![
        TraceOption::TraceClock(clock.into()),
        TraceOption::Uname(uname.into()),
        TraceOption::Version(format!("vtrace {}", env!("CARGO_PKG_VERSION"))),
        TraceOption::TraceId(trace_id),
    ];
    // A clock that is not the TSC has nanoseconds of its own.
    if clock.contains(&format!("[{CLOCK}]")) {
        options.push(TraceOption::Tsc2Nsec { mult: common.scale.mult, shift: common.scale.shift });
    }
    options.extend(common.date.clone());
    options
}

fn cpu_stats(machine: &MachineSummary, reports: &[LaneReport]) -> impl Iterator<Item = TraceOption> {
    machine.lanes.iter().map(|lane| {
        let report = reports.iter().find(|report| report.cpu.0 == lane.cpu);
        TraceOption::CpuStat(cpu_stat(lane, report, machine.clock.as_ref()))
    })
}

/// What `trace-cmd report --stat` shows: the kernel's words, then ours.
fn cpu_stat(lane: &LaneSummary, report: Option<&LaneReport>, clock: Option<&ClockSummary>) -> String {
    let kernel = report.map(|report| report.stats_after.trim_end()).unwrap_or_default();
    let LaneSummary { cpu, pages_in, pages_out, pages_lost, pages_added, .. } = lane;
    let clock = clock.map(|clock| format!("vtrace clock: {clock}\n")).unwrap_or_default();
    format!(
        "CPU: {cpu}\n{kernel}\nvtrace pages: {pages_in} in, {pages_out} out, {pages_lost} lost, {pages_added} added\n{clock}"
    )
}

/// From the host's start to the guest's, in host time.
fn start_skew_ns(recording: &Recording, common: &Common, session: &GuestSession, clock: &GuestClock) -> Option<i64> {
    let (_, guest) = session.started?;
    let (_, host) = recording.host.started?;
    let lane = clock.first_lane()?;
    let cycles = clock.to_host(lane, guest, host)?.0.wrapping_sub(host.0).cast_signed();
    let ns = i64::try_from(common.scale.ns(cycles.unsigned_abs())).ok()?;
    Some(if cycles < 0 { -ns } else { ns })
}

/// "Linux node release machine" of this host.
fn uname() -> String {
    let Ok(names) = nix::sys::utsname::uname() else { return String::new() };
    let names = [names.sysname(), names.nodename(), names.release(), names.machine()];
    names.map(|name| name.to_string_lossy().into_owned()).join(" ")
}

fn write(
    file: MachineFile,
    filled: &[(Cpu, u64)],
    cmdlines: &[u8],
    options: &[TraceOption],
    machine: &mut MachineSummary,
) {
    let note = serde_json::to_string(machine).expect("a summary is plain data");
    let path = file.output.path();
    match file.writer.finish(filled, cmdlines, options, &note) {
        Ok(finished) => machine.bytes = finished.bytes,
        Err(source) => {
            machine.failed = true;
            machine.remarks.push(format!("{} could not be finished: {}", path.display(), chain(&source)));
        }
    }
}

/// Pages that were in the file and went when newer ones came.
fn note_old_pages(file: &MachineFile, filled: &[(Cpu, u64)], machine: &mut MachineSummary) {
    let areas = file.writer.areas().iter();
    let kept =
        |cpu: Cpu, bytes| areas.clone().find(|area| area.cpu == cpu).map(|area| file.writer.kept_bytes(area, bytes));
    for (cpu, bytes) in filled {
        let old = bytes.saturating_sub(kept(*cpu, *bytes).unwrap_or(*bytes));
        if let Some(lane) = machine.lanes.iter_mut().find(|lane| lane.cpu == cpu.0 && old > 0) {
            lane.pages_old = lane.pages_out * old / bytes;
        }
    }
    let old: u64 = machine.lanes.iter().map(|lane| lane.pages_old).sum();
    if old > 0 {
        machine.remarks.push(format!("{old} older pages went to make room for newer ones"));
    }
}
