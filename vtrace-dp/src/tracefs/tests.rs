//! Against this machine's kernel. Without privilege or tracefs they are skipped, which is printed.

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use vtrace_common::{
    limits::PIECE_BYTES_MAX,
    wire::agent::{Arm, EventRequest, FailureKind, Part, Piece, Tracer},
};

use super::{stats::Stats, *};

fn tracefs() -> Option<Tracefs> {
    let found = Tracefs::find_or_mount().ok().filter(|_| nix::unistd::geteuid().is_root());
    if found.is_none() {
        println!("skipped: tracefs is not writable here");
    }
    found
}

fn arm(events: &[&str]) -> Arm {
    let events = events.iter().map(|pattern| EventRequest::from(*pattern)).collect();
    Arm { session: 1, clock: "x86-tsc".into(), events, buffer_kb: 512, kallsyms: true, ..Arm::default() }
}

fn name(suffix: &str) -> String {
    format!("{INSTANCE_PREFIX}{}-{suffix}", std::process::id())
}

#[test]
fn armed_instance_is_as_asked_and_gone_when_dropped() {
    let Some(tracefs) = tracefs() else { return };
    let instance = tracefs.arm(&name("armed"), &arm(&["sched", "irq:softirq_entry"])).unwrap();
    let path = instance.path().to_owned();
    let text = |file: &str| fs::read_to_string(path.join(file)).unwrap().trim().to_owned();
    assert_eq!(text("tracing_on"), "0");
    assert_eq!(text("buffer_percent"), BUFFER_PERCENT.to_string());
    assert!((512..528).contains(&text("buffer_size_kb").parse().unwrap()), "whole pages, at least what was asked for");
    assert!(instance.clock().contains("[x86-tsc]"));
    assert_eq!(text("events/sched/enable"), "1");
    assert_eq!(text("events/irq/enable"), "X");
    assert_eq!(usize::try_from(instance.events()).unwrap(), text("set_event").lines().count());
    assert!(!instance.cpus().is_empty());
    drop(instance);
    assert!(!path.exists());
}

#[test]
fn arming_reports_the_number_of_events_after_each_system_but_the_last() {
    let Some(tracefs) = tracefs() else { return };
    let mut told = Vec::new();
    let instance =
        tracefs.arm_with_markers(&name("telling"), &arm(&["sched", "irq", "timer"]), &mut |events| told.push(events));
    let all = usize::try_from(instance.unwrap().events()).unwrap();
    assert!(told.len() == 2 && 0 < told[0] && told[0] < told[1] && told[1] < all, "{told:?} of {all}");
}

#[test]
fn markers_of_applications_are_among_the_events_of_the_recording() {
    let Some(tracefs) = tracefs() else { return };
    let instance = tracefs.arm_with_markers(&name("markers"), &arm(&["sched:sched_switch"]), &mut |_| {}).unwrap();
    instance.set_tracing(true).unwrap();
    write(&tracefs.root().join("trace_marker"), "of an application").unwrap();
    write(&tracefs.root().join("trace_marker_raw"), "\u{1}\u{0}\u{0}\u{0}raw").unwrap();
    instance.set_tracing(false).unwrap();
    let remarks = instance.remarks();
    let text = fs::read_to_string(instance.path().join("trace")).unwrap();
    if !instance.path().join("options/copy_trace_marker").exists() {
        assert!(remarks.iter().any(|text| text.contains("are not recorded")), "{remarks:?}");
        return;
    }
    assert!(text.contains("tracing_mark_write: of an application") && text.contains("# 1 buf: 72 61 77"), "{text}");
    assert!(remarks.iter().any(|text| text.ends_with(" markers of applications")), "{remarks:?}");
}

#[test]
fn events_that_a_filter_does_not_fit_are_in_the_remarks() {
    let Some(tracefs) = tracefs() else { return };
    let mut asked = arm(&["sched:sched_switch"]);
    asked.events[0].filter = "prev_pid == 1".into();
    let fits = tracefs.arm(&name("fits"), &asked).unwrap();
    assert_eq!(fits.remarks(), Vec::<String>::new());
    asked.events[0].pattern = "sched:sched_s*".into();
    let partly = tracefs.arm(&name("partly"), &asked).unwrap().remarks();
    assert_eq!(partly.len(), 1, "{partly:?}");
    assert!(
        partly[0].starts_with("filter \"prev_pid == 1\" fits 1 of ") && partly[0].contains("sched:sched_stat_"),
        "{partly:?}"
    );
}

#[test]
fn mark_while_tracing_or_markers_are_off_is_no_failure() {
    let Some(tracefs) = tracefs() else { return };
    let instance = tracefs.arm(&name("off"), &arm(&[])).unwrap();
    instance.set_tracing(true).unwrap();
    write(&instance.path().join("tracing_on"), "0").unwrap();
    assert_eq!(instance.mark("too late"), Ok(()));
    let silent = tracefs.arm(&name("nomarkers"), &Arm { options: vec!["nomarkers".into()], ..arm(&[]) }).unwrap();
    silent.set_tracing(true).unwrap();
    assert_eq!(silent.mark("not wanted"), Ok(()));
}

#[test]
fn processes_are_bound_without_the_function_tracers_list() {
    let Some(tracefs) = tracefs() else { return };
    let asked = Arm { pids: vec![1], ..arm(&["sched:sched_switch"]) };
    let instance = tracefs.arm(&name("pids"), &asked).unwrap();
    assert_eq!(fs::read_to_string(instance.path().join("set_event_pid")).unwrap(), "1\n");
    let functions = fs::read_to_string(instance.path().join("set_ftrace_pid"));
    assert!(functions.is_err() || functions.unwrap() == "no pid\n");
}

#[test]
fn kernel_keeps_the_names_of_many_tasks_once_a_recording_is_armed() {
    let Some(tracefs) = tracefs() else { return };
    let _instance = tracefs.arm(&name("names"), &arm(&[])).unwrap();
    let size: u64 = fs::read_to_string(tracefs.root().join("saved_cmdlines_size")).unwrap().trim().parse().unwrap();
    assert!(size >= 16 << 10, "{size}");
}

#[test]
fn tap_that_is_open_keeps_the_instance_and_is_reported() {
    let Some(tracefs) = tracefs() else { return };
    let instance = tracefs.arm(&name("busy"), &arm(&[])).unwrap();
    let path = instance.path().to_owned();
    let tap = instance.tap(instance.cpus()[0]).unwrap();
    let refusal = instance.remove().unwrap_err();
    assert_eq!(refusal.kind, FailureKind::Kernel);
    assert!(path.exists());
    drop(tap);
    instance::remove_directory(&path).unwrap();
}

#[test]
fn failed_arm_leaves_nothing_and_names_the_object() {
    let Some(tracefs) = tracefs() else { return };
    let name = name("failed");
    let no_clock = Arm { clock: "x86-tcs".into(), ..arm(&[]) };
    let failure = tracefs.arm(&name, &no_clock).unwrap_err();
    assert_eq!((failure.kind, failure.object.as_str()), (FailureKind::NoSuchClock, "x86-tcs"));
    assert_eq!(failure.near[0], "x86-tsc");
    let failure = tracefs.arm(&name, &arm(&["sched:sched_swich"])).unwrap_err();
    assert_eq!((failure.kind, failure.near[0].as_str()), (FailureKind::NoSuchEvent, "sched:sched_switch"));
    let failure = tracefs.arm(&name, &Arm { buffer_kb: u32::MAX, ..arm(&[]) }).unwrap_err();
    assert_eq!(failure.kind, FailureKind::Memory, "{failure:?}");
    assert!(!tracefs.root().join("instances").join(&name).exists());
}

#[test]
fn page_has_the_size_asked_for_or_the_refusal_says_why() {
    let Some(tracefs) = tracefs() else { return };
    let with = |subbuf_kb| tracefs.arm(&name("pages"), &Arm { subbuf_kb, ..arm(&[]) });
    for odd in [1, 3, 48, 1024, u32::MAX] {
        let failure = with(odd).unwrap_err();
        assert_eq!((failure.kind, failure.object), (FailureKind::NoSuchPageSize, format!("--subbuf-size {odd}")));
    }
    match with(16) {
        Err(failure) => {
            assert_eq!(failure.kind, FailureKind::NoSuchPageSize);
            println!("{}: {}", failure.object, failure.detail);
        }
        Ok(instance) => {
            let size = fs::read_to_string(instance.path().join("buffer_size_kb")).unwrap();
            assert_eq!(instance.page_bytes(), 16 << 10);
            assert!(size.trim().parse::<u32>().unwrap() >= 512, "the buffer is as large as asked for: {size}");
        }
    }
}

#[test]
fn marker_is_in_the_trace_only_while_tracing_is_on() {
    let Some(tracefs) = tracefs() else { return };
    let instance = tracefs.arm(&name("mark"), &arm(&[])).unwrap();
    assert_eq!(instance.mark("too early"), Ok(()), "it is only logged");
    instance.set_tracing(true).unwrap();
    instance.mark("in time").unwrap();
    instance.set_tracing(false).unwrap();
    let trace = fs::read_to_string(instance.path().join("trace")).unwrap();
    assert!(trace.contains("in time") && !trace.contains("too early"));
    let entries = instance.cpus().iter().map(|cpu| Stats::parse(&instance.stats(*cpu)).unwrap().entries);
    assert_eq!(entries.sum::<u64>(), 1);
}

#[test]
fn instance_of_a_dead_owner_is_stale_and_ours_is_not() {
    let Some(tracefs) = tracefs() else { return };
    let instance = tracefs.arm(&name("alive"), &arm(&[])).unwrap();
    let dead = tracefs.root().join("instances").join(format!("{INSTANCE_PREFIX}{}-dead", u32::MAX));
    fs::create_dir(&dead).unwrap();
    assert!(tracefs.remove_stale() >= 1);
    assert!(!dead.exists());
    assert!(instance.path().exists());
}

#[test]
fn lockdown_is_the_mode_in_brackets() {
    assert_eq!(locked_down("none integrity [confidentiality]\n").as_deref(), Some("confidentiality"));
    assert_eq!((locked_down("[none] integrity confidentiality\n"), locked_down("")), (None, None));
}

#[test]
fn owner_is_the_number_after_the_prefix() {
    assert_eq!(owner("12-x"), Some(12));
    assert_eq!(owner("12"), Some(12));
    assert_eq!(owner("x-12"), None);
    assert_eq!(owner("99999999999"), None);
}

#[test]
fn description_has_every_part_in_order_and_the_formats_of_what_is_on() {
    let Some(tracefs) = tracefs() else { return };
    let instance = tracefs.arm(&name("describe"), &arm(&["sched:sched_switch"])).unwrap();
    let mut pieces: Vec<Piece> = Vec::new();
    instance.describe(true, &mut |piece| pieces.push(piece)).unwrap();
    instance.describe_end(&mut |piece| pieces.push(piece)).unwrap();
    assert!(pieces.iter().all(|piece| piece.bytes.len() <= PIECE_BYTES_MAX));
    assert!(pieces.is_sorted_by_key(|piece| piece.part));
    let text = |part: Part| {
        let bytes: Vec<u8> = pieces.iter().filter(|piece| piece.part == part).flat_map(|p| p.bytes.clone()).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    assert!(text(Part::HeaderPage).contains("char data"));
    assert!(text(Part::HeaderEvent).contains("type_len"));
    assert!(text(Part::FtraceFormat).contains("name: print\n"));
    assert!(text(Part::EventFormat).starts_with("name: sched_switch\n"));
    assert_eq!(text(Part::EventFormat).matches("name: ").count(), 1);
    assert_eq!(text(Part::Kallsyms), fs::read_to_string("/proc/kallsyms").unwrap());
    assert!(text(Part::Cmdlines).lines().any(|line| line.starts_with(&format!("{} ", std::process::id()))));
}

#[test]
fn tracer_functions_options_and_processes_are_as_asked() {
    let Some(tracefs) = tracefs() else { return };
    let tracer = Tracer { name: "function".into(), functions: vec!["vfs_read".into()], ..Tracer::default() };
    let options = vec!["stacktrace".into(), "nooverwrite".into()];
    let asked = Arm { tracer, options, pids: vec![1], children: true, cpu_mask: "1".into(), ..arm(&["sched"]) };
    let instance = match tracefs.arm(&name("settings"), &asked) {
        Err(refusal) if refusal.detail.contains("not permitted") => {
            return println!("skipped: functions cannot be chosen here: {}: {}", refusal.object, refusal.detail);
        }
        armed => armed.unwrap(),
    };
    let text = |file: &str| fs::read_to_string(instance.path().join(file)).unwrap().trim().to_owned();
    assert_eq!(text("current_tracer"), "function");
    assert!(text("set_ftrace_filter").starts_with("vfs_read"));
    assert_eq!((text("options/stacktrace"), text("options/overwrite")), ("1".into(), "0".into()));
    assert_eq!((text("set_event_pid"), text("set_ftrace_pid")), ("1".into(), "1".into()));
    assert_eq!((text("tracing_cpumask"), text("options/event-fork")), ("1".into(), "1".into()));
}

#[test]
fn names_that_the_kernel_does_not_know_are_refused_with_similar_ones() {
    let Some(tracefs) = tracefs() else { return };
    let failure = |arm: &Arm| tracefs.arm(&name("words"), arm).unwrap_err();
    let tracer = |name: &str, function: &str| {
        let functions = Some(function.into()).into_iter().filter(|name: &String| !name.is_empty()).collect();
        Arm { tracer: Tracer { name: name.into(), functions, ..Tracer::default() }, ..arm(&[]) }
    };
    let no_tracer = failure(&tracer("functoin", ""));
    assert_eq!((no_tracer.kind, no_tracer.near[0].as_str()), (FailureKind::NoSuchTracer, "function"));
    let no_function = failure(&tracer("function", "no_function_is_called_this"));
    assert!(no_function.kind == FailureKind::NoSuchFunction || no_function.detail.contains("not permitted"));
    let no_option = failure(&Arm { options: vec!["stakctrace".into()], ..arm(&[]) });
    assert_eq!((no_option.kind, no_option.near[0].as_str()), (FailureKind::NoSuchOption, "stacktrace"));
}

#[test]
fn filter_is_kept_for_the_events_that_it_fits_and_refused_with_the_kernels_error() {
    let Some(tracefs) = tracefs() else { return };
    let filtered = |pattern: &str, filter: &str| {
        let event = EventRequest { filter: filter.into(), ..pattern.into() };
        tracefs.arm(&name("filter"), &Arm { events: vec![event], ..arm(&[]) })
    };
    let instance = filtered("sched", "prev_pid == 1").unwrap();
    let text = |file: &str| fs::read_to_string(instance.path().join(file)).unwrap().trim().to_owned();
    assert_eq!(text("events/sched/sched_switch/filter"), "prev_pid == 1");
    assert_eq!(text("events/sched/sched_waking/filter"), "none");
    drop(instance);
    let refusal = filtered("sched:sched_switch", "no_such_field == 1").unwrap_err();
    assert_eq!(refusal.kind, FailureKind::Expression);
    assert!(refusal.detail.contains("ield not found"), "{}", refusal.detail);
}

#[test]
fn borrowed_top_buffer_is_restored() {
    let Some(tracefs) = tracefs() else { return };
    let say = |file: &str| fs::read_to_string(tracefs.root().join(file)).unwrap().trim().to_owned();
    let state = || ["current_tracer", "trace_clock", "set_event", "trace_options", "tracing_on"].map(say);
    let before = state();
    let extra = available_extra(&tracefs);
    let Some(extra) = extra else { return println!("skipped: every tracer here works in an instance") };
    let asked = Arm { tracer: Tracer { name: extra.clone(), ..Tracer::default() }, ..arm(&["sched:sched_switch"]) };
    let instance = tracefs.arm(&name("borrow"), &asked).unwrap();
    assert_eq!((instance.path(), say("current_tracer")), (tracefs.root(), extra));
    let refusal = tracefs.arm(&name("second"), &asked).unwrap_err();
    assert_eq!(refusal.kind, FailureKind::State);
    drop(instance);
    assert_eq!(state(), before);
}

/// A tracer that the top buffer has and an instance has not.
fn available_extra(tracefs: &Tracefs) -> Option<String> {
    let instance = tracefs.arm(&name("extra"), &arm(&[])).unwrap();
    let tracers = |path: &Path| fs::read_to_string(path.join("available_tracers")).unwrap();
    let (all, some) = (tracers(tracefs.root()), tracers(instance.path()));
    all.split_whitespace().find(|tracer| !some.split_whitespace().any(|other| other == *tracer)).map(Into::into)
}

#[test]
fn mark_is_written_on_a_cpu_that_is_traced_and_the_thread_stays_where_it_was() {
    let Some(tracefs) = tracefs() else { return };
    let home = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let cpus = online_cpus().unwrap();
    for (at, cpu) in cpus.iter().enumerate().filter(|(_, cpu)| cpu.0 < 32) {
        let asked = Arm { cpu_mask: format!("{:x}", 1u32 << cpu.0), ..arm(&[]) };
        let instance = tracefs.arm(&name(&format!("mask{at}")), &asked).unwrap();
        let mut elsewhere = CpuSet::new();
        elsewhere.set(usize::try_from(cpus[(at + 1) % cpus.len()].0).unwrap()).unwrap();
        sched_setaffinity(Pid::from_raw(0), &elsewhere).unwrap();
        instance.set_tracing(true).unwrap();
        instance.mark("here").unwrap();
        assert_eq!(sched_getaffinity(Pid::from_raw(0)), Ok(elsewhere));
        sched_setaffinity(Pid::from_raw(0), &home).unwrap();
        let counts = cpus.iter().map(|cpu| Stats::parse(&instance.stats(*cpu)).unwrap().recorded());
        let wanted = (0..).take(cpus.len()).map(|other| u64::from(other == at));
        assert!(counts.eq(wanted), "the mark is on {cpu} and nowhere else");
        instance.remove().unwrap();
    }
}
