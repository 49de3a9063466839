//! The settings of an [`Arm`] other than events: functions, tracer, options, CPUs, processes.
//!
//! In:    the buffer's directory, an [`Arm`]
//! Out:   files of tracefs written; or a [`Failure`] that names what was refused and similar names that exist
//! Runs:  on the caller's thread, while tracing is off
//! Trust: nothing of the request; the kernel for what exists
//!
//! Order: functions before the tracer, which would start with all of them; options after it, since a tracer adds its own.

use std::{
    fs::OpenOptions,
    io::{self, ErrorKind, Write},
    path::{Path, PathBuf},
};

use vtrace_common::wire::agent::{Arm, Failure, FailureKind, Tracer};

use super::{expressions::Undo, failure, nearest, read, refused, write};

/// A process id that is never used (PID_MAX_LIMIT - 1, include/linux/threads.h), for a list without a process: an empty one
/// means all.
const NO_PROCESS: u32 = 4_194_303;

/// The PID namespace of process 1 (`PROC_PID_INIT_INO`, include/linux/proc_ns.h).
const INITIAL_NAMESPACE: &str = "pid:[4026531836]";

/// Tracers that trace functions, and so look at `set_ftrace_pid` (kernel/trace/trace_irqsoff.c, trace_sched_wakeup.c).
const FUNCTION_TRACERS: [&str; 8] =
    ["function", "function_graph", "irqsoff", "preemptoff", "preemptirqsoff", "wakeup", "wakeup_rt", "wakeup_dl"];

/// The writes that remove the function commands of `arm` (`FUNC:traceoff`), which clearing the list does not.
pub(super) fn undo(buffer: &Path, arm: &Arm) -> Vec<Undo> {
    let commands = arm.tracer.functions.iter().filter(|text| text.contains(':') && !text.contains(":mod:"));
    commands.map(|text| (buffer.join("set_ftrace_filter"), format!("!{text}\n"))).collect()
}

/// Task names that the kernel keeps at least, and at most on our request: 20 bytes each.
const SAVED_NAMES_MIN: u64 = 16 << 10;
const SAVED_NAMES_MAX: u64 = 64 << 10;
/// Names for each thread that runs: tasks that end during the recording have to be among them.
const NAMES_PER_THREAD: u64 = 8;

/// Lets the kernel keep the names of more tasks (saved_cmdlines_size, 128 by default), by the number of threads. The size
/// stays: a smaller one would discard names that others need.
pub(super) fn grow_saved_names(root: &Path) {
    let path = root.join("saved_cmdlines_size");
    let size: Option<u64> = read(&path).ok().and_then(|text| text.trim().parse().ok());
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let threads: Option<u64> = load.split([' ', '/']).nth(4).and_then(|count| count.parse().ok());
    let wanted = threads.unwrap_or(0).saturating_mul(NAMES_PER_THREAD).clamp(SAVED_NAMES_MIN, SAVED_NAMES_MAX);
    if size.is_some_and(|size| size < wanted)
        && let Err(refusal) = write(&path, &wanted.to_string())
    {
        log::debug!("{}: {}", refusal.object, refusal.detail);
    }
}

/// The option of an instance that makes the kernel copy markers of applications to it.
pub(super) const COPY_MARKERS: &str = "copy_trace_marker";

/// The file of [`COPY_MARKERS`], which older kernels do not have.
pub(super) fn copy_option(buffer: &Path) -> PathBuf {
    buffer.join("options").join(COPY_MARKERS)
}

/// Whether `arm` asks for markers that only the top buffer has.
pub(super) fn need_top_for_markers(instance: &Path, arm: &Arm) -> bool {
    arm.options.iter().any(|option| option == COPY_MARKERS) && !copy_option(instance).exists()
}

/// Applies everything but clock, sizes and events.
pub(super) fn apply(buffer: &Path, arm: &Arm) -> Result<(), Failure> {
    choose_functions(buffer, &arm.tracer)?;
    choose_tracer(buffer, &arm.tracer.name)?;
    // The top buffer has the markers itself.
    let is_needless = |option: &str| option == COPY_MARKERS && !copy_option(buffer).exists();
    for option in arm.options.iter().filter(|option| !is_needless(option)) {
        set_option(buffer, option)?;
    }
    if !arm.cpu_mask.is_empty() {
        write(&buffer.join("tracing_cpumask"), &arm.cpu_mask)?;
    }
    if arm.children {
        write(&buffer.join("options/event-fork"), "1")?;
        write(&buffer.join("options/function-fork"), "1")?;
    }
    let no_process = (arm.own_only && arm.pids.is_empty()).then_some(NO_PROCESS);
    let pids: Vec<u32> = arm.pids.iter().copied().chain(no_process).collect();
    if pids.is_empty() { Ok(()) } else { add_processes(buffer, &pids) }
}

/// Traces this process too, in a buffer that is bound to processes.
pub(super) fn add_process(buffer: &Path, pid: u32) -> Result<(), Failure> {
    add_processes(buffer, &[pid])
}

/// Traces these processes too. One write for all: the kernel waits for all CPUs (RCU) after each.
fn add_processes(buffer: &Path, pids: &[u32]) -> Result<(), Failure> {
    let list = pids.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
    let add = |file: &str| {
        let path = buffer.join(file);
        append(&path, &list).map_err(|error| (error.kind(), refused(&path, &error)))
    };
    in_initial_namespace()?;
    add("set_event_pid").map_err(|(_, refusal)| refusal)?;
    let tracer = read(&buffer.join("current_tracer"))?;
    if !FUNCTION_TRACERS.contains(&tracer.trim()) {
        return Ok(());
    }
    match add("set_ftrace_pid") {
        // A kernel without the function tracer.
        Err((ErrorKind::NotFound, _)) => Ok(()),
        added => added.map_err(|(_, refusal)| refusal),
    }
}

/// The kernel takes the numbers in its lists for those of the initial PID namespace.
fn in_initial_namespace() -> Result<(), Failure> {
    match std::fs::read_link("/proc/self/ns/pid") {
        Ok(namespace) if namespace.as_os_str() != INITIAL_NAMESPACE => Err(failure(
            FailureKind::Kernel,
            "set_event_pid",
            "this process runs in a PID namespace (a container), whose process ids the kernel does not know",
        )),
        _ => Ok(()),
    }
}

fn choose_functions(buffer: &Path, tracer: &Tracer) -> Result<(), Failure> {
    let lists = [
        ("set_ftrace_filter", &tracer.functions),
        ("set_ftrace_notrace", &tracer.functions_excluded),
        ("set_graph_function", &tracer.graph_functions),
    ];
    for (file, functions) in lists {
        for function in functions {
            let path = buffer.join(file);
            append(&path, function).map_err(|error| match error.kind() {
                ErrorKind::InvalidInput => {
                    failure(FailureKind::NoSuchFunction, function, "no traceable function matches")
                }
                _ => refused(&path, &error),
            })?;
        }
    }
    if tracer.graph_depth_max > 0 {
        write(&buffer.join("max_graph_depth"), &tracer.graph_depth_max.to_string())?;
    }
    Ok(())
}

fn choose_tracer(buffer: &Path, name: &str) -> Result<(), Failure> {
    if name.is_empty() {
        return Ok(());
    }
    let text = read(&buffer.join("available_tracers"))?;
    let available: Vec<&str> = text.split_whitespace().collect();
    if !available.contains(&name) {
        let near = nearest(name, available.iter().copied(), usize::MAX);
        let detail = format!("this kernel has {}", available.join(", "));
        return Err(Failure { near, ..failure(FailureKind::NoSuchTracer, name, &detail) });
    }
    let switch = Path::new("/proc/sys/kernel/ftrace_enabled");
    if FUNCTION_TRACERS.contains(&name) && read(switch).is_ok_and(|text| text.trim() == "0") {
        return Err(failure(FailureKind::Kernel, "kernel.ftrace_enabled", "0: the kernel traces no functions"));
    }
    write(&buffer.join("current_tracer"), name)
}

fn set_option(buffer: &Path, option: &str) -> Result<(), Failure> {
    write(&buffer.join("trace_options"), option).map_err(|refusal| {
        let there = read(&buffer.join("trace_options")).unwrap_or_default();
        let names: Vec<&str> = there.lines().map(|line| line.strip_prefix("no").unwrap_or(line)).collect();
        let wanted = option.strip_prefix("no").unwrap_or(option);
        if names.contains(&wanted) {
            return refusal;
        }
        let near = nearest(wanted, names.into_iter(), (wanted.len() / 2).max(2));
        Failure { near, ..failure(FailureKind::NoSuchOption, option, "this kernel has no such trace option") }
    })
}

/// Adds a line to a list, which truncation would clear. Without the newline the kernel parses the text when the file is
/// closed, and its error is lost (kernel/trace/ftrace.c, `ftrace_regex_release()`).
pub(super) fn append(path: &Path, text: &str) -> io::Result<()> {
    OpenOptions::new().append(true).open(path).and_then(|mut file| file.write_all(format!("{text}\n").as_bytes()))
}
