//! Filters and triggers of events.
//!
//! In:    the buffer's directory, the events that each request means
//! Out:   `filter` and `trigger` files written; or a [`Failure`] with the kernel's error text
//! Runs:  on the caller's thread, before the events are switched on
//! Trust: nothing of the expressions: the kernel parses them

use std::{
    fs,
    path::{Path, PathBuf},
};

use vtrace_common::wire::agent::{EventRequest, Failure, FailureKind};

use super::{events::Events, failure, read, write};

/// Events that a remark names.
const UNFIT_NAMED: usize = 8;

/// Writes the filters and triggers of all requests. An expression that fits some of the events of a pattern is kept for
/// those, as trace-cmd does; one that fits none is refused. For every write, `undo` gets the one that reverts it. Gives a
/// remark for each expression that does not fit all events of its pattern.
pub(super) fn apply(
    buffer: &Path,
    available: &Events,
    requests: &[EventRequest],
    undo: &mut Vec<Undo>,
) -> Result<Vec<String>, Failure> {
    let mut remarks = Vec::new();
    for request in requests.iter().filter(|request| !request.excluded) {
        if !request.filter.is_empty() {
            remarks.extend(write_for(buffer, available, request, Expression::Filter(&request.filter), undo)?);
        }
        for trigger in &request.triggers {
            remarks.extend(write_for(buffer, available, request, Expression::Trigger(trigger), undo)?);
        }
    }
    Ok(remarks)
}

/// A file, and the text that removes an expression from it.
pub(super) type Undo = (PathBuf, String);

/// A filter or a trigger.
#[derive(Clone, Copy, Debug)]
enum Expression<'a> {
    Filter(&'a str),
    Trigger(&'a str),
}

impl<'a> Expression<'a> {
    fn file(self) -> &'static str {
        match self {
            Self::Filter(_) => "filter",
            Self::Trigger(_) => "trigger",
        }
    }

    fn text(self) -> &'a str {
        match self {
            Self::Filter(text) | Self::Trigger(text) => text,
        }
    }

    /// The text that removes it (Documentation/trace/events.rst, 5.3 and 6).
    fn undo(self) -> String {
        match self {
            Self::Filter(_) => "0".into(),
            Self::Trigger(text) => format!("!{text}"),
        }
    }
}

/// Removes all hist triggers of a buffer, whoever made them. One whose variables another one uses goes after that.
pub(super) fn clear_hist_triggers(buffer: &Path) {
    for _ in 0..2 {
        for path in event_directories(buffer).map(|event| event.join("trigger")) {
            if read(&path).is_ok_and(|text| !trigger_lines(&text).is_empty()) {
                // Truncation removes them (kernel/trace/trace_events_trigger.c, `event_trigger_regex_open()`).
                let _ = fs::OpenOptions::new().write(true).truncate(true).open(&path);
            }
        }
    }
}

/// Removes all filters and triggers of a buffer whose borrower has died.
pub(super) fn clear(buffer: &Path) {
    clear_hist_triggers(buffer);
    for event in event_directories(buffer) {
        let trigger = event.join("trigger");
        for line in trigger_lines(&read(&trigger).unwrap_or_default()) {
            let _ = write(&trigger, &format!("!{line}"));
        }
        let filter = event.join("filter");
        if read(&filter).is_ok_and(|text| text.trim() != "none") {
            let _ = write(&filter, "0");
        }
    }
}

fn event_directories(buffer: &Path) -> impl Iterator<Item = PathBuf> {
    let systems = fs::read_dir(buffer.join("events")).into_iter().flatten().flatten();
    let events = systems.flat_map(|system| fs::read_dir(system.path()).into_iter().flatten().flatten());
    events.map(|event| event.path())
}

/// The triggers in a `trigger` file, as they are written: `traceoff:unlimited` is `traceoff`.
fn trigger_lines(text: &str) -> Vec<String> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(|line| line.replace(":unlimited", "").replace(" [active]", "")).collect()
}

fn write_for(
    buffer: &Path,
    available: &Events,
    request: &EventRequest,
    expression: Expression<'_>,
    undo: &mut Vec<Undo>,
) -> Result<Option<String>, Failure> {
    let chosen = available.choose(std::slice::from_ref(request))?;
    let (file, text) = (expression.file(), expression.text());
    let mut taken = 0;
    let mut refusal = None;
    let mut unfit = Vec::new();
    for (system, event) in chosen.each() {
        let path = buffer.join("events").join(system).join(event).join(file);
        match write(&path, text) {
            Ok(()) => {
                taken += 1;
                undo.push((path, expression.undo()));
            }
            Err(error) => {
                refusal.get_or_insert_with(|| (format!("{system}:{event} {file}"), error_text(buffer, &error)));
                unfit.push(format!("{system}:{event}"));
                // After a refused filter the file holds an error text; it filters nothing.
                let _ = write(&path, "0");
            }
        }
    }
    match refusal {
        Some((object, detail)) if taken == 0 => {
            Err(failure(FailureKind::Expression, &object, &format!("{text:?}: {detail}")))
        }
        Some(_) => Ok(Some(partly_fits(expression, &request.pattern, taken, &unfit))),
        None => Ok(None),
    }
}

/// The remark about an expression that does not fit `unfit`, of a pattern's events.
fn partly_fits(expression: Expression<'_>, pattern: &str, taken: usize, unfit: &[String]) -> String {
    let (file, text) = (expression.file(), expression.text());
    let named = unfit.iter().take(UNFIT_NAMED).cloned().collect::<Vec<_>>().join(", ");
    let more = match unfit.len().saturating_sub(UNFIT_NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let effect = match expression {
        Expression::Filter(_) => "recorded without a filter",
        Expression::Trigger(_) => "without the trigger",
    };
    let events = taken + unfit.len();
    format!("{file} {text:?} fits {taken} of {events} events of {pattern}; {effect}: {named}{more}")
}

/// The last error in error_log, in one line; without one, the errno.
fn error_text(buffer: &Path, error: &Failure) -> String {
    let log = read(&buffer.join("error_log")).unwrap_or_default();
    last_error(&log).unwrap_or_else(|| error.detail.clone())
}

/// The text of the last `[time] location: error: text` of an error_log.
fn last_error(log: &str) -> Option<String> {
    let line = log.lines().rev().find(|line| line.contains(": error: "))?;
    Some(line.split_once(": error: ")?.1.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn triggers_are_removed_by_the_text_that_sets_them() {
        let text = "# Available triggers:\n# traceon traceoff\ntraceoff:unlimited if a == 1\nstacktrace:count=3\n";
        assert_eq!(trigger_lines(text), ["traceoff if a == 1", "stacktrace:count=3"]);
        assert_eq!(trigger_lines("# none\n"), Vec::<String>::new());
    }

    #[test]
    fn remark_names_the_events_that_an_expression_does_not_fit() {
        let unfit = |count: usize| (0..count).map(|at| format!("sched:e{at}")).collect::<Vec<_>>();
        let filter = Expression::Filter("pid == 1");
        let expected = "filter \"pid == 1\" fits 3 of 5 events of sched; recorded without a filter: sched:e0, sched:e1";
        assert_eq!(partly_fits(filter, "sched", 3, &unfit(2)), expected);
        let many = partly_fits(Expression::Trigger("traceoff if x"), "sched", 1, &unfit(10));
        assert!(many.ends_with("without the trigger: sched:e0, sched:e1, sched:e2, sched:e3, sched:e4, sched:e5, sched:e6, sched:e7 and 2 more"), "{many}");
    }

    #[test]
    fn last_error_of_the_kernel_is_found() {
        let log = "[   3.14] event filter parse error: error: Field not found\n  Command: a == 1\n           ^\n\
                   [  99.10] hist:sched:sched_switch: error: Couldn't find field\n  Command: keys=x\n           ^\n";
        assert_eq!(last_error(log).as_deref(), Some("Couldn't find field"));
        assert_eq!(last_error(""), None);
    }
}
