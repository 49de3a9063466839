//! The top buffer, for what an instance does not have: some tracers, and function lists that the kernel has only once.
//!
//! In:    the root of tracefs, an [`Arm`]
//! Out:   whether the top buffer is needed; a [`Borrowed`] one, which is restored in the end
//! Runs:  on the caller's thread
//! Full:  one borrower at a time; while anyone traces into the top buffer it is refused
//! Trust: the kernel. A borrower that is killed leaves an instance whose name says so ([`MARK`]); the next start cleans up

use std::path::{Path, PathBuf};

use vtrace_common::wire::agent::{Arm, Failure, FailureKind};

use super::{
    failure, online_cpus, possible_cpus, read,
    settings::{append, need_top_for_markers},
    stats::Stats,
    write,
};

/// Suffix of the name of an instance whose owner has borrowed the top buffer.
pub(super) const MARK: &str = "-top";

/// Files whose contents are restored.
const KEPT: [&str; 6] =
    ["trace_clock", "buffer_percent", "buffer_subbuf_size_kb", "buffer_size_kb", "tracing_cpumask", "max_graph_depth"];
/// The event that the kernel itself enables when a BPF program that can print is loaded, and never disables
/// (`__set_printk_clr_event()`, kernel/trace/bpf_trace.c).
const PRINTK: &str = "bpf_trace:bpf_trace_printk";
/// Lists of functions and processes, whose entries are restored.
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
    let by_markers = need_top_for_markers(instance, arm);
    by_tracer || by_markers || !functions.is_empty() || arm.tracer.graph_depth_max > 0
}

/// The top buffer, and how it was.
#[derive(Debug)]
pub(super) struct Borrowed {
    root: PathBuf,
    kept: Vec<(&'static str, String)>,
    lists: Vec<(&'static str, Vec<String>)>,
    options: String,
    was_on: bool,
    /// [`PRINTK`] was on.
    prints: bool,
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
        let was_on = read(&root.join("tracing_on"))?.trim() == "1";
        let in_use = |detail: &str| Err(failure(FailureKind::State, &root.to_string_lossy(), detail));
        if tracer.trim() != "nop" {
            return in_use(&format!("in use with the tracer {}", tracer.trim()));
        }
        if !events.is_empty() {
            return in_use(&format!("in use: {} events are on", events.len()));
        }
        if !was_on && holds_events(root) {
            return in_use("stopped with events in it, which a recording would discard: empty it first (echo > trace)");
        }
        let kept =
            KEPT.into_iter().filter_map(|file| Some((file, kept(file, &read(&root.join(file)).ok()?)))).collect();
        let lists = LISTS.into_iter().filter_map(|file| Some((file, entries(&read(&root.join(file)).ok()?)))).collect();
        let options = read(&root.join("trace_options"))?;
        write(&root.join("tracing_on"), "0")?;
        let borrowed = Self { root: root.into(), kept, lists, options, was_on, prints };
        borrowed.empty();
        clear_lists(root);
        let _ = write(&root.join("max_graph_depth"), "0"); // only there with the function graph tracer
        Ok(borrowed)
    }

    /// Restores it; what cannot be restored is logged.
    pub(super) fn give_back(&self) {
        reset(&self.root);
        for (file, text) in &self.kept {
            self.put(file, text);
        }
        for (file, entries) in self.lists.iter().filter(|(_, entries)| !entries.is_empty()) {
            if let Err(error) = append(&self.root.join(file), &entries.join("\n")) {
                log::warn!("cannot restore {file}: {error}");
            }
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
    clear_lists(root);
}

fn clear_lists(root: &Path) {
    for list in LISTS {
        let _ = std::fs::OpenOptions::new().write(true).truncate(true).open(root.join(list));
    }
}

/// Whether no event and no tracer is on in the top buffer.
pub(super) fn is_idle(root: &Path) -> bool {
    let tracer = read(&root.join("current_tracer")).unwrap_or_default();
    let events = read(&root.join("set_event")).unwrap_or_default();
    tracer.trim() == "nop" && foreign_events(&events).is_empty()
}

/// Whether the top buffer has events.
fn holds_events(root: &Path) -> bool {
    let counts = online_cpus().unwrap_or_default().into_iter().map(|cpu| root.join(format!("per_cpu/{cpu}/stats")));
    counts.filter_map(|path| Stats::parse(&read(&path).ok()?).ok()).any(|stats| stats.entries > 0)
}

/// The entries of a list. Comments (`#### all functions enabled ####`), `no pid`, and function commands, which stay when the
/// list is cleared, are none.
fn entries(text: &str) -> Vec<String> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.filter(|line| *line != "no pid" && !line.contains(':')).map(|line| line.replace(" (M)", "")).collect()
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
    fn entries_of_a_list_are_functions_and_processes() {
        assert_eq!(entries("#### all functions enabled ####\nschedule:traceoff:unlimited\n"), Vec::<String>::new());
        assert_eq!(entries("vfs_read\nvfs_write\n"), ["vfs_read", "vfs_write"]);
        assert_eq!((entries("no pid\n"), entries("42\n")), (vec![], vec!["42".to_owned()]));
    }

    #[test]
    fn contents_of_a_file_become_the_text_that_restores_them() {
        assert_eq!(kept("trace_clock", "local [global] x86-tsc\n"), "global");
        assert_eq!(kept("buffer_size_kb", "7 (expanded: 1408)\n"), "7");
        assert_eq!(kept("tracing_cpumask", "ff\n"), "ff");
    }
}
