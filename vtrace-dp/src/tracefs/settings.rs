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
    path::Path,
};

use vtrace_common::wire::agent::{Arm, Failure, FailureKind, Tracer};

use super::{failure, nearest, read, refused, write};

/// A process id that is never used (PID_MAX_LIMIT - 1, include/linux/threads.h), for a list without a process: an empty one
/// means all.
const NO_PROCESS: u32 = 4_194_303;

/// Applies everything but clock, sizes and events.
pub(super) fn apply(buffer: &Path, arm: &Arm) -> Result<(), Failure> {
    choose_functions(buffer, &arm.tracer)?;
    choose_tracer(buffer, &arm.tracer.name)?;
    for option in &arm.options {
        set_option(buffer, option)?;
    }
    if !arm.cpu_mask.is_empty() {
        write(&buffer.join("tracing_cpumask"), &arm.cpu_mask)?;
    }
    if arm.children {
        write(&buffer.join("options/event-fork"), "1")?;
        write(&buffer.join("options/function-fork"), "1")?;
    }
    let nobody = (arm.own_only && arm.pids.is_empty()).then_some(NO_PROCESS);
    let pids: Vec<u32> = arm.pids.iter().copied().chain(nobody).collect();
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
    add("set_event_pid").map_err(|(_, refusal)| refusal)?;
    // Function tracers alone read it; a kernel may forbid writing it.
    if !read(&buffer.join("current_tracer"))?.starts_with("function") {
        return Ok(());
    }
    match add("set_ftrace_pid") {
        // A kernel without the function tracer.
        Err((ErrorKind::NotFound, _)) => Ok(()),
        added => added.map_err(|(_, refusal)| refusal),
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
fn append(path: &Path, text: &str) -> io::Result<()> {
    OpenOptions::new().append(true).open(path).and_then(|mut file| file.write_all(format!("{text}\n").as_bytes()))
}
