//! What a machine is asked to record: one per machine, host and guests alike.
//!
//! The words are those of tracefs (Documentation/trace/ftrace.rst) and the meaning of an option is `trace-cmd record`'s.

use alloc::{string::String, vec::Vec};

use serde::{Deserialize, Serialize};

use super::{Fault, bounded, text};
use crate::limits::{COMMANDS_MAX, EVENTS_MAX, FUNCTIONS_MAX, OPTIONS_MAX, PIDS_MAX, TRIGGERS_MAX, WORDS_MAX};

extern crate alloc;

/// What to record on one machine.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Arm {
    /// Chosen by record, shown in the agent's log.
    pub session: u64,
    /// Trace clock (`x86-tsc`).
    pub clock: String,
    /// Events in the order given.
    pub events: Vec<EventRequest>,
    /// Ring buffer per CPU; 0 leaves the kernel's default.
    pub buffer_kb: u32,
    /// One page (sub-buffer); 0 leaves the kernel's own, 4 KiB on x86.
    pub subbuf_kb: u32,
    /// Whether kernel symbols are wanted.
    pub kallsyms: bool,
    /// Tracer and functions.
    pub tracer: Tracer,
    /// Trace options by name; `no` in front switches one off.
    pub options: Vec<String>,
    /// Whose events and functions: these processes' only; empty for all.
    pub pids: Vec<u32>,
    /// Only those of the commands that run for the recording.
    pub own_only: bool,
    /// Children of those processes too.
    pub children: bool,
    /// Which CPUs are traced, as `tracing_cpumask` takes it (hexadecimal); empty for all.
    pub cpu_mask: String,
    /// What to run there once tracing is on.
    pub commands: Vec<CommandRequest>,
}

/// One `-e`: `system`, `system:event`, globs in either part, or `all`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct EventRequest {
    /// As the person wrote it.
    pub pattern: String,
    /// Only events for which this holds; empty for all.
    pub filter: String,
    /// What else the kernel does when such an event comes.
    pub triggers: Vec<String>,
    /// These events are left out of what is asked for otherwise.
    pub excluded: bool,
}

impl From<&str> for EventRequest {
    /// These events, all of them.
    fn from(pattern: &str) -> Self {
        Self { pattern: pattern.into(), ..Self::default() }
    }
}

/// A tracer and what it traces.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Tracer {
    /// Its name in `available_tracers`; empty for none.
    pub name: String,
    /// Functions it traces, globs; empty for all (`set_ftrace_filter`).
    pub functions: Vec<String>,
    /// Functions it leaves out (`set_ftrace_notrace`).
    pub functions_excluded: Vec<String>,
    /// Functions whose calls it follows (`set_graph_function`).
    pub graph_functions: Vec<String>,
    /// How deep it follows them; 0 for no bound (`max_graph_depth`).
    pub graph_depth_max: u32,
}

/// A program and its arguments.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct CommandRequest {
    /// Program first; never empty.
    pub words: Vec<String>,
}

impl Arm {
    /// The counts and lengths of a request from outside.
    pub(super) fn check(&self) -> Result<(), Fault> {
        let each = |texts: &[String], count_max| {
            bounded(texts.len(), count_max)?;
            texts.iter().try_for_each(|word| text(word))
        };
        bounded(self.events.len(), EVENTS_MAX)?;
        for event in &self.events {
            text(&event.pattern)?;
            text(&event.filter)?;
            each(&event.triggers, TRIGGERS_MAX)?;
        }
        let Tracer { name, functions, functions_excluded, graph_functions, graph_depth_max: _ } = &self.tracer;
        text(&self.clock)?;
        text(name)?;
        text(&self.cpu_mask)?;
        for functions in [functions, functions_excluded, graph_functions] {
            each(functions, FUNCTIONS_MAX)?;
        }
        each(&self.options, OPTIONS_MAX)?;
        bounded(self.pids.len(), PIDS_MAX)?;
        bounded(self.commands.len(), COMMANDS_MAX)?;
        self.commands.iter().try_for_each(|command| {
            each(&command.words, WORDS_MAX)?;
            if command.words.is_empty() { Err(Fault::Payload) } else { Ok(()) }
        })
    }
}
