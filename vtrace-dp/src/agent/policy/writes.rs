//! What a request may make the agent write to tracefs, and the kernel memory that its triggers take.
//!
//! In:    the texts of an [`Arm`]; what the guest's owner restricts
//! Out:   a [`Demand`] of memory; or a [`Failure`] (`NotAllowed`) that names the text and the rule
//! Trust: nothing of the request. Event patterns, clock and tracer are not here: they are looked up among the kernel's own
//!        names and are never written as they came
//!
//! | text | file | allowed |
//! |---|---|---|
//! | filter | `events/…/filter` | one line |
//! | trigger | `events/…/trigger` | one line; the commands of [`TRIGGERS`] |
//! | function | `set_ftrace_filter` | a name or glob, `:mod:MODULE`, the commands of [`FUNCTION_COMMANDS`] |
//! | function | `set_ftrace_notrace`, `set_graph_function` | a name or glob, `:mod:MODULE` |
//! | option | `trace_options` | a name |
//! | CPU mask | `tracing_cpumask` | hexadecimal digits and commas |
//!
//! Sources: kernel/trace/trace_events_trigger.c (`register_trigger_cmds()`), trace_events_hist.c, trace_functions.c
//! (`init_func_cmd_traceon()`), trace_events.c (`register_event_cmds()`), tracing_map.c.

use vtrace_common::wire::agent::{Arm, EventRequest, Failure};

use super::not_allowed;

/// Commands of triggers (Documentation/trace/events.rst, 6.2).
const TRIGGERS: [&str; 9] = [
    "traceon",
    "traceoff",
    "stacktrace",
    "snapshot",
    "hist",
    "enable_event",
    "disable_event",
    "enable_hist",
    "disable_hist",
];
/// Commands of functions. `dump` and `cpudump`, which print the ring buffers to the console, are not among them.
const FUNCTION_COMMANDS: [&str; 7] =
    ["mod", "traceon", "traceoff", "stacktrace", "snapshot", "enable_event", "disable_event"];
/// Commands that switch other events on or off.
const SWITCHING: [&str; 4] = ["enable_event", "disable_event", "enable_hist", "disable_hist"];
/// Options that bring the output of others into the ring buffer, events that the owner may have denied.
const REDIRECTING: [&str; 3] = ["trace_printk_dest", "copy_trace_marker", "branch"];
/// Tracers without which functions are not traced.
const FUNCTION_TRACERS: [&str; 2] = ["function", "function_graph"];

/// Entries of a hist trigger that does not say (`TRACING_MAP_BITS_DEFAULT`), and the most that the kernel takes.
const HIST_ENTRIES: u64 = 2048;
const HIST_ENTRIES_MAX: u64 = 131_072;
/// Bytes of one entry at most: map slot, element, key; and what each further key, value or variable adds (a variable may
/// hold a string of 256 bytes).
const HIST_ENTRY_BYTES: u64 = 512;
const HIST_FIELD_BYTES: u64 = 256;

/// What the guest's owner restricts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Restrictions<'a> {
    /// Some events are denied.
    pub(super) denies_events: bool,
    /// The tracers that may be used; all if `None`.
    pub(super) tracers: Option<&'a [String]>,
}

impl Restrictions<'_> {
    /// The rule that keeps functions from being traced, if there is one.
    fn against_functions(&self) -> Option<String> {
        let allowed = self.tracers?;
        let is_allowed = allowed.iter().any(|name| FUNCTION_TRACERS.contains(&name.as_str()));
        (!is_allowed).then(|| format!("tracers allowed are: {}", allowed.join(", ")))
    }
}

/// Kernel memory that triggers and function commands allocate beside the ring buffers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Demand {
    /// A snapshot: as much again as the ring buffers.
    pub(super) has_snapshot: bool,
    /// Tables of hist triggers, KiB at most.
    pub(super) hist_kb: u64,
}

/// Checks every text of `arm` that is written as it came. `meant` says how many events a request means.
pub(super) fn check(
    arm: &Arm,
    restrictions: Restrictions<'_>,
    meant: &mut dyn FnMut(&EventRequest) -> Result<u64, Failure>,
) -> Result<Demand, Failure> {
    let mut demand = Demand::default();
    for event in arm.events.iter().filter(|event| !event.excluded) {
        check_line(&event.filter)?;
        for trigger in &event.triggers {
            check_trigger(trigger, restrictions, &mut demand)?;
        }
        let tables_kb: u64 = event.triggers.iter().map(|trigger| hist_kb(trigger)).fold(0, u64::saturating_add);
        if tables_kb > 0 {
            demand.hist_kb = demand.hist_kb.saturating_add(tables_kb.saturating_mul(meant(event)?));
        }
    }
    for function in &arm.tracer.functions {
        check_function(function, restrictions, &mut demand)?;
    }
    for function in &arm.tracer.functions_excluded {
        check_function_name(function)?;
    }
    if let Some(rule) = restrictions.against_functions()
        && (arm.tracer.graph_depth_max > 0 || !arm.tracer.graph_functions.is_empty())
    {
        return Err(not_allowed("function graph", &rule));
    }
    for function in &arm.tracer.graph_functions {
        check_function_name(function)?;
    }
    for option in &arm.options {
        check_option(option, restrictions)?;
    }
    if arm.cpu_mask.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b',') {
        Ok(demand)
    } else {
        Err(not_allowed(&arm.cpu_mask, "not a hexadecimal mask of CPUs"))
    }
}

/// A text for a file that takes one expression: a second line would be a second one.
fn check_line(text: &str) -> Result<(), Failure> {
    if text.chars().any(char::is_control) {
        return Err(not_allowed(text, "control characters are not allowed in it"));
    }
    Ok(())
}

fn check_trigger(trigger: &str, restrictions: Restrictions<'_>, demand: &mut Demand) -> Result<(), Failure> {
    check_line(trigger)?;
    let command = trigger.split([':', ' ']).next().unwrap_or_default();
    if !TRIGGERS.contains(&command) {
        return Err(not_allowed(trigger, &format!("triggers allowed are: {}", TRIGGERS.join(", "))));
    }
    if restrictions.denies_events && SWITCHING.contains(&command) {
        return Err(not_allowed(trigger, "a trigger may not switch events while some are denied"));
    }
    // The kernel attaches a hist trigger to the event that is named there, too.
    if restrictions.denies_events && command == "hist" && trigger.contains("onmatch") {
        return Err(not_allowed(trigger, "a trigger may not match other events while some are denied"));
    }
    demand.has_snapshot |= command == "snapshot" || command == "hist" && trigger.contains("snapshot(");
    Ok(())
}

fn check_function(text: &str, restrictions: Restrictions<'_>, demand: &mut Demand) -> Result<(), Failure> {
    let Some((name, rest)) = text.split_once(':') else { return check_function_name(text) };
    let (command, arguments) = rest.split_once(':').unwrap_or((rest, ""));
    if !FUNCTION_COMMANDS.contains(&command) {
        let detail = format!("function commands allowed are: {}", FUNCTION_COMMANDS.join(", "));
        return Err(not_allowed(text, &detail));
    }
    if command == "mod" {
        return check_function_name(text);
    }
    if let Some(rule) = restrictions.against_functions() {
        return Err(not_allowed(text, &rule));
    }
    if restrictions.denies_events && SWITCHING.contains(&command) {
        return Err(not_allowed(text, "a function command may not switch events while some are denied"));
    }
    let is_plain =
        |argument: &str| argument.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.*".contains(&byte));
    if !is_function_name(name) || !arguments.split(':').all(is_plain) {
        return Err(not_allowed(text, "not a function and a command"));
    }
    demand.has_snapshot |= command == "snapshot";
    Ok(())
}

/// A function, a glob, or all functions of a module that such a name means. The kernel splits the text at blanks.
fn check_function_name(text: &str) -> Result<(), Failure> {
    let (name, module) = text.split_once(":mod:").unwrap_or((text, "any"));
    let is_module =
        !module.is_empty() && module.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-*?!".contains(&byte));
    if is_function_name(name) && is_module { Ok(()) } else { Err(not_allowed(text, "not the name of a function")) }
}

/// `!` in front would remove what others have set, `#` is a comment.
fn is_function_name(name: &str) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || b"_.$*?[]^!-".contains(&byte);
    !name.is_empty() && !name.starts_with('!') && name.bytes().all(is_letter)
}

fn check_option(option: &str, restrictions: Restrictions<'_>) -> Result<(), Failure> {
    if !option.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-') {
        return Err(not_allowed(option, "not the name of a trace option"));
    }
    let is_restricted = restrictions.denies_events || restrictions.tracers.is_some();
    if is_restricted && REDIRECTING.contains(&option) {
        return Err(not_allowed(option, "not allowed while events or tracers are restricted"));
    }
    Ok(())
}

/// KiB that a hist trigger's table takes at most; 0 for another trigger.
fn hist_kb(trigger: &str) -> u64 {
    let (attributes, _) = trigger.split_once(" if ").unwrap_or((trigger, ""));
    let Some(attributes) = attributes.strip_prefix("hist") else { return 0 };
    let sizes = attributes.split(':').filter_map(|attribute| attribute.trim().strip_prefix("size="));
    // The kernel reads other bases, too: what is not decimal counts as the largest.
    let sizes = sizes.map(|size| size.parse::<u64>().unwrap_or(HIST_ENTRIES_MAX));
    let entries = sizes.max().unwrap_or(HIST_ENTRIES).min(HIST_ENTRIES_MAX).next_power_of_two();
    let fields = attributes.bytes().filter(|byte| b",=".contains(byte)).count();
    let fields = u64::try_from(fields).unwrap_or(u64::MAX);
    let entry_bytes = HIST_ENTRY_BYTES.saturating_add(fields.saturating_mul(HIST_FIELD_BYTES));
    entries.saturating_mul(entry_bytes).div_ceil(1024)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vtrace_common::wire::agent::{FailureKind, Tracer};

    use super::*;

    const FREE: Restrictions<'_> = Restrictions { denies_events: false, tracers: None };
    const EVENTS_DENIED: Restrictions<'_> = Restrictions { denies_events: true, tracers: None };

    fn demand(arm: &Arm, restrictions: Restrictions<'_>) -> Result<Demand, Failure> {
        check(arm, restrictions, &mut |_| Ok(3))
    }

    fn trigger(text: &str) -> Arm {
        let event = EventRequest { triggers: vec![text.into()], ..EventRequest::from("sched") };
        Arm { events: vec![event], ..Arm::default() }
    }

    fn function(text: &str) -> Arm {
        Arm { tracer: Tracer { functions: vec![text.into()], ..Tracer::default() }, ..Arm::default() }
    }

    fn is_refused(arm: &Arm, restrictions: Restrictions<'_>) -> bool {
        demand(arm, restrictions).is_err_and(|failure| failure.kind == FailureKind::NotAllowed)
    }

    #[test]
    fn function_command_that_switches_an_event_is_refused_while_events_are_denied() {
        for text in ["schedule:enable_event:sched:sched_switch", "do_idle:disable_event:irq:softirq_raise:5"] {
            assert!(is_refused(&function(text), EVENTS_DENIED), "{text}");
            assert_eq!(demand(&function(text), FREE), Ok(Demand::default()), "{text}");
        }
    }

    #[test]
    fn function_commands_need_a_function_tracer_that_is_allowed() {
        let nop = ["nop".to_owned()];
        let function_too = ["nop".to_owned(), "function".to_owned()];
        for command in ["stacktrace", "traceoff", "traceon:3", "snapshot:1", "enable_event:a:b"] {
            let arm = function(&format!("schedule:{command}"));
            assert!(is_refused(&arm, Restrictions { tracers: Some(&nop), ..FREE }), "{command}");
            assert!(demand(&arm, Restrictions { tracers: Some(&function_too), ..FREE }).is_ok(), "{command}");
        }
        let graph = Tracer { graph_functions: vec!["vfs_read".into()], ..Tracer::default() };
        let graph = Arm { tracer: graph, ..Arm::default() };
        assert!(is_refused(&graph, Restrictions { tracers: Some(&nop), ..FREE }));
    }

    #[test]
    fn command_that_prints_the_ring_buffer_or_is_not_known_is_refused() {
        for text in ["schedule:dump", "schedule:cpudump:1", "schedule:new_command", "schedule:"] {
            assert!(is_refused(&function(text), FREE), "{text}");
        }
        for text in ["new_command", "", "!traceoff", "hist_but_not", " hist:keys=pid"] {
            assert!(is_refused(&trigger(text), FREE), "{text}");
        }
    }

    #[test]
    fn text_that_the_kernel_would_split_in_two_is_refused() {
        for text in ["vfs_read\nschedule:traceoff", "a b", "a\tb", "a\0b", "!vfs_read", "vfs_read:mod:a:traceoff", ""] {
            assert!(is_refused(&function(text), FREE), "{text:?}");
            let excluded = Tracer { functions_excluded: vec![text.into()], ..Tracer::default() };
            assert!(is_refused(&Arm { tracer: excluded, ..Arm::default() }, FREE), "{text:?}");
            let graph = Tracer { graph_functions: vec![text.into()], ..Tracer::default() };
            assert!(is_refused(&Arm { tracer: graph, ..Arm::default() }, FREE), "{text:?}");
        }
        assert!(is_refused(&trigger("traceoff\nenable_event:irq:x"), FREE));
        let filtered = EventRequest { filter: "a == 1\nb == 2".into(), ..EventRequest::from("sched") };
        assert!(is_refused(&Arm { events: vec![filtered], ..Arm::default() }, FREE));
        assert!(is_refused(&Arm { options: vec!["stacktrace\nbranch".into()], ..Arm::default() }, FREE));
        assert!(is_refused(&Arm { cpu_mask: "f\n1".into(), ..Arm::default() }, FREE));
    }

    #[test]
    fn what_trace_cmd_users_write_is_allowed() {
        for text in ["vfs_read", "vfs_*", "*", "sys_[a-m]*", "*:mod:kvm", "schedule:traceoff:1", "schedule:mod:kvm"] {
            assert_eq!(demand(&function(text), EVENTS_DENIED), Ok(Demand::default()), "{text}");
        }
        for text in ["traceoff if prev_pid == 1", "stacktrace:5", "enable_event:kvm:kvm_exit if a == 1"] {
            assert_eq!(demand(&trigger(text), FREE), Ok(Demand::default()), "{text}");
        }
        let options = ["stacktrace", "nooverwrite", "func-no-repeats", "copy_trace_marker"].map(String::from).into();
        assert!(demand(&Arm { options, cpu_mask: "3,ffffffff".into(), ..Arm::default() }, FREE).is_ok());
    }

    #[test]
    fn hist_trigger_that_reads_a_denied_event_is_refused() {
        let text = "hist:keys=next_pid:onmatch(kvm.kvm_exit).trace(seen,exit_reason)";
        assert!(is_refused(&trigger(text), EVENTS_DENIED));
        assert!(demand(&trigger(text), FREE).is_ok());
    }

    #[test]
    fn table_of_a_hist_trigger_is_counted_for_each_event_of_the_pattern() {
        let largest = demand(&trigger("hist:keys=common_pid:size=131072"), FREE).unwrap().hist_kb;
        assert_eq!(largest, 3 * 128 * 1024);
        assert_eq!(demand(&trigger("hist:keys=common_pid:size=0x20000"), FREE).unwrap().hist_kb, largest);
        assert_eq!(demand(&trigger("hist:size=99:keys=common_pid:size=131072"), FREE).unwrap().hist_kb, 3 * 160 * 1024);
        assert_eq!(demand(&trigger("hist:keys=pid if a == \"size=131072\""), FREE).unwrap().hist_kb, 3 * 1536);
    }

    #[test]
    fn snapshot_is_seen_in_triggers_actions_and_commands() {
        for arm in [
            trigger("snapshot:1"),
            trigger("hist:keys=pid:lat=a:onmax($lat).snapshot()"),
            function("schedule:snapshot"),
        ] {
            assert!(demand(&arm, FREE).unwrap().has_snapshot);
        }
    }

    proptest! {
        #[test]
        fn any_text_is_taken_or_refused(text: String) {
            for arm in [trigger(&text), function(&text)] {
                let taken = demand(&arm, FREE).is_ok();
                prop_assert!(!(taken && text.chars().any(char::is_control)));
            }
        }
    }
}
