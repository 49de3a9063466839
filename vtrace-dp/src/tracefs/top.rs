//! The top buffer, for what an instance does not have: some tracers, and function lists that the kernel has only once.
//!
//! In:    the root of tracefs, an [`Arm`]
//! Out:   whether the top buffer is needed; a [`Borrowed`] one, which is restored in the end
//! Runs:  on the caller's thread
//! Full:  one borrower at a time; while anyone traces into the top buffer it is refused
//! Trust: the kernel. A borrower that is killed leaves an instance whose name says so ([`MARK`]); the next start cleans up

use std::path::{Path, PathBuf};

use vtrace_common::wire::agent::{Arm, Failure, FailureKind};

use super::{expressions::Undo, failure, online_cpus, possible_cpus, read, write};

/// Suffix of the name of an instance whose owner has borrowed the top buffer.
pub(super) const MARK: &str = "-top";

/// Files whose contents are restored.
const KEPT: [&str; 5] = ["trace_clock", "buffer_percent", "buffer_subbuf_size_kb", "buffer_size_kb", "tracing_cpumask"];
/// The event that the kernel itself enables when a BPF program that can print is loaded, and never disables
/// (`__set_printk_clr_event()`, kernel/trace/bpf_trace.c).
const PRINTK: &str = "bpf_trace:bpf_trace_printk";
/// Lists that are empty while nothing is traced.
const LISTS: [&str; 6] = [
    "set_ftrace_filter",
    "set_ftrace_notrace",
    "set_graph_function",
    "set_event_pid",
    "set_ftrace_pid",
    "set_graph_notrace",
];

/// Whether `arm` asks for something that `instance` does not have and the top buffer does.
pub(super) fn is_needed(root: &Path, instance: &Path, arm: &Arm) -> bool {
    let has = |directory: &Path, tracer: &str| {
        read(&directory.join("available_tracers")).is_ok_and(|text| text.split_whitespace().any(|name| name == tracer))
    };
    let (tracer, functions) = (&arm.tracer.name, &arm.tracer.graph_functions);
    let by_tracer = !tracer.is_empty() && !has(instance, tracer) && has(root, tracer);
    by_tracer || !functions.is_empty() || arm.tracer.graph_depth_max > 0
}

/// The top buffer, and how it was.
#[derive(Debug)]
pub(super) struct Borrowed {
    root: PathBuf,
    kept: Vec<(&'static str, String)>,
    options: String,
    was_on: bool,
    /// [`PRINTK`] was on.
    prints: bool,
    /// Filters and triggers, which the end of an event does not end.
    pub(super) undo: Vec<Undo>,
}

impl Borrowed {
    /// Takes the top buffer if it is not in use.
    ///
    /// # Errors
    /// `State` when it is in use; `Kernel`.
    pub(super) fn take(root: &Path) -> Result<Self, Failure> {
        let tracer = read(&root.join("current_tracer"))?;
        let events = read(&root.join("set_event"))?;
        let prints = events.contains(PRINTK);
        let events = foreign_events(&events);
        if tracer.trim() != "nop" || !events.is_empty() {
            let detail = match events.len() {
                0 => format!("in use with the tracer {}", tracer.trim()),
                count => format!("in use: {count} events are on"),
            };
            return Err(failure(FailureKind::State, &root.to_string_lossy(), &detail));
        }
        let kept = KEPT.into_iter().filter_map(|file| Some((file, kept(file, &read(&root.join(file)).ok()?))));
        let (kept, options) = (kept.collect(), read(&root.join("trace_options"))?);
        let was_on = read(&root.join("tracing_on"))?.trim() == "1";
        write(&root.join("tracing_on"), "0")?;
        let borrowed = Self { root: root.into(), kept, options, was_on, prints, undo: Vec::new() };
        borrowed.empty();
        Ok(borrowed)
    }

    /// Restores it; what cannot be restored is logged.
    pub(super) fn give_back(&self) {
        for (path, text) in self.undo.iter().rev() {
            // A trigger whose count has run out is gone already.
            let _ = write(path, text);
        }
        reset(&self.root);
        for (file, text) in &self.kept {
            self.put(file, text);
        }
        let now = read(&self.root.join("trace_options")).unwrap_or_default();
        for option in self.options.lines().filter(|option| !now.lines().any(|line| line == *option)) {
            // Options of a tracer that is no longer set are refused.
            let _ = write(&self.root.join("trace_options"), option);
        }
        if self.prints {
            self.put("events/bpf_trace/bpf_trace_printk/enable", "1");
        }
        self.empty();
        self.put("tracing_on", if self.was_on { "1" } else { "0" });
    }

    fn put(&self, file: &str, text: &str) {
        if let Err(refusal) = write(&self.root.join(file), text) {
            log::warn!("cannot restore {}: {}", refusal.object, refusal.detail);
        }
    }

    /// Discards its contents. The kernel does that for the CPUs that are online; the others have to be emptied one by one.
    fn empty(&self) {
        let online = online_cpus().unwrap_or_default();
        let all = possible_cpus().unwrap_or_default().into_iter().filter(|cpu| !online.contains(cpu));
        let each = all.map(|cpu| self.root.join(format!("per_cpu/{cpu}/trace")));
        for file in std::iter::once(self.root.join("trace")).chain(each) {
            if let Err(error) = std::fs::OpenOptions::new().write(true).truncate(true).open(&file) {
                log::debug!("cannot empty {}: {error}", file.display());
            }
        }
    }
}

/// Ends all tracing into the top buffer: events, tracer, lists. Files that the kernel does not have are ignored.
pub(super) fn reset(root: &Path) {
    let _ = write(&root.join("tracing_on"), "0");
    let _ = write(&root.join("events/enable"), "0");
    let _ = write(&root.join("current_tracer"), "nop");
    let _ = write(&root.join("max_graph_depth"), "0");
    for list in LISTS {
        let _ = std::fs::OpenOptions::new().write(true).truncate(true).open(root.join(list));
    }
}

/// The events in `set_event` but for [`PRINTK`].
fn foreign_events(set_event: &str) -> Vec<String> {
    let events = set_event.lines().map(str::trim).filter(|line| !line.is_empty());
    events.filter(|event| *event != PRINTK).map(Into::into).collect()
}

/// The text to write so that a file has its present contents again.
fn kept(file: &str, text: &str) -> String {
    let text = text.trim();
    let inside = text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map(|(chosen, _)| chosen);
    match (file, inside) {
        ("trace_clock", Some(chosen)) => chosen.into(),
        // "7 (expanded: 1408)": not used yet.
        _ => text.split_whitespace().next().unwrap_or_default().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_that_the_kernel_enables_itself_does_not_count() {
        assert_eq!(foreign_events("bpf_trace:bpf_trace_printk\n"), Vec::<String>::new());
        assert_eq!(foreign_events("bpf_trace:bpf_trace_printk\nirq:softirq_exit\n"), ["irq:softirq_exit"]);
    }

    #[test]
    fn contents_of_a_file_become_the_text_that_restores_them() {
        assert_eq!(kept("trace_clock", "local [global] x86-tsc\n"), "global");
        assert_eq!(kept("buffer_size_kb", "7 (expanded: 1408)\n"), "7");
        assert_eq!(kept("tracing_cpumask", "ff\n"), "ff");
    }
}
