//! The events of a kernel: which exist, which of them match a request, which files switch them on.
//!
//! In:    `available_events` or `set_event` (lines `system:event`), requests
//! Out:   the files to write 1 to, one for a whole system; or a [`Failure`] with names that exist
//! Runs:  on the caller's thread
//! Trust: the kernel for names; nothing for requests

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use vtrace_common::wire::agent::{EventRequest, Failure, FailureKind};

use super::{failure, nearest, pattern::Pattern, read, write};

/// Events by system.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Events {
    systems: BTreeMap<String, BTreeSet<String>>,
}

impl Events {
    /// Parses lines of `system:event`. Other lines (`:mod:name`, events of a module to come) are ignored.
    pub(super) fn parse(text: &str) -> Self {
        let mut systems: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let names = text.lines().filter_map(|line| line.trim().split_once(':'));
        for (system, event) in names.filter(|(system, event)| is_name(system) && is_name(event)) {
            systems.entry(system.into()).or_default().insert(event.into());
        }
        Self { systems }
    }

    pub(super) fn count(&self) -> usize {
        self.systems.values().map(BTreeSet::len).sum()
    }

    pub(super) fn each(&self) -> impl Iterator<Item = (&str, &str)> {
        let of = |(system, events)| {
            let system: &String = system;
            let events: &BTreeSet<String> = events;
            events.iter().map(move |event| (system.as_str(), event.as_str()))
        };
        self.systems.iter().flat_map(of)
    }

    fn contains(&self, system: &str, event: &str) -> bool {
        self.systems.get(system).is_some_and(|events| events.contains(event))
    }

    /// The events that match `requests`, without the excluded ones.
    ///
    /// # Errors
    /// `NoSuchEvent` for the first request that matches none.
    pub(super) fn choose(&self, requests: &[EventRequest]) -> Result<Self, Failure> {
        let mut chosen = Self::default();
        let mut left_out = Self::default();
        for request in requests {
            let chosen = if request.excluded { &mut left_out } else { &mut chosen };
            let pattern = Pattern::parse(&request.pattern);
            let before = chosen.count();
            let mut found = false;
            for (system, event) in self.each().filter(|(system, event)| pattern.matches(system, event)) {
                found = true;
                chosen.systems.entry(system.into()).or_default().insert(event.into());
            }
            if !found {
                return Err(self.no_such(&request.pattern));
            }
            log::debug!("{} matches {} more events", request.pattern, chosen.count() - before);
        }
        for (system, events) in left_out.systems {
            if let Some(among) = chosen.systems.get_mut(&system) {
                among.retain(|event| !events.contains(event));
            }
        }
        chosen.systems.retain(|_, events| !events.is_empty());
        Ok(chosen)
    }

    fn no_such(&self, pattern: &str) -> Failure {
        let wanted = pattern.replace(['*', '?'], "");
        let distance_max = (wanted.len() / 3).max(2);
        let both: Vec<String> = self.each().map(|(system, event)| format!("{system}:{event}")).collect();
        let mut near = nearest(&wanted, both.iter().map(String::as_str), distance_max);
        if !wanted.contains(':') {
            let words = self.systems.keys().map(String::as_str).chain(self.each().map(|(_, event)| event));
            near = nearest(&wanted, words, distance_max);
        }
        let detail = format!("none of {} events matches", both.len());
        Failure { near, ..failure(FailureKind::NoSuchEvent, pattern, &detail) }
    }

    /// The `enable` files under `events/` that switch on `chosen` and nothing else, and how many events each does. The
    /// one for all events is not used: the kernel patches its code for each event, half a minute or more on a slow machine,
    /// without progress to report.
    fn switches(&self, chosen: &Self) -> Vec<(PathBuf, usize)> {
        let mut switches = Vec::new();
        for (system, events) in &chosen.systems {
            if self.systems.get(system) == Some(events) {
                switches.push((Path::new(system).join("enable"), events.len()));
            } else {
                switches.extend(events.iter().map(|event| (Path::new(system).join(event).join("enable"), 1)));
            }
        }
        switches
    }
}

/// Excludes the events that match `denied` patterns from `requests`.
///
/// # Errors
/// `NotAllowed` for a request that matches denied events only.
pub(super) fn leave_out(
    available: &Events,
    requests: &mut Vec<EventRequest>,
    denied: &[String],
) -> Result<(), Failure> {
    let denied: Vec<Pattern<'_>> = denied.iter().map(|pattern| Pattern::parse(pattern)).collect();
    let is_denied = |system: &str, event: &str| denied.iter().any(|pattern| pattern.matches(system, event));
    for request in requests.iter().filter(|request| !request.excluded) {
        let pattern = Pattern::parse(&request.pattern);
        let mut meant = available.each().filter(|(system, event)| pattern.matches(system, event)).peekable();
        if meant.peek().is_some() && meant.all(|(system, event)| is_denied(system, event)) {
            return Err(failure(FailureKind::NotAllowed, &request.pattern, "the guest's owner denies these events"));
        }
    }
    let out = available.each().filter(|(system, event)| is_denied(system, event));
    let out = out.map(|(system, event)| EventRequest { excluded: true, ..format!("{system}:{event}").as_str().into() });
    let out: Vec<EventRequest> = out.collect();
    requests.extend(out);
    Ok(())
}

fn is_name(part: &str) -> bool {
    !part.is_empty() && !part.contains([':', '/', ' ']) && part != "." && part != ".."
}

/// Switches on in `instance` what `requests` mean, out of what `available` lists. Returns the events that are on; `each`
/// hears after each step but the last how many are.
///
/// A whole system whose file is refused may still be on in part: the kernel tries every event and reports the
/// first error. So what is on is read back; an event asked for by its full name has to be among it.
///
/// # Errors
/// `NoSuchEvent` when a request means nothing; `Kernel` when an event asked for by its full name, or every event,
/// was refused.
pub(super) fn switch_on(
    instance: &Path,
    available: &Events,
    requests: &[EventRequest],
    each: &mut dyn FnMut(usize),
) -> Result<Events, Failure> {
    let chosen = available.choose(requests)?;
    let directory = instance.join("events");
    let (mut refusals, mut count) = (Vec::new(), 0);
    for (switch, events) in available.switches(&chosen) {
        if let Err(refusal) = write(&directory.join(&switch), "1") {
            log::warn!("{}: {}", refusal.object, refusal.detail);
            refusals.push((switch, refusal));
        }
        count += events;
        if count < chosen.count() {
            each(count);
        }
    }
    let on = Events::parse(&read(&instance.join("set_event"))?);
    let missing = |request: &EventRequest| {
        let pattern = Pattern::parse(if request.excluded { "" } else { &request.pattern });
        let of_it = chosen.each().find(|(system, event)| pattern.matches(system, event));
        of_it.filter(|(system, event)| pattern.is_exact() && !on.contains(system, event))
    };
    let named = requests.iter().find_map(missing);
    if named.is_none() && (on.count() > 0 || chosen.count() == 0) {
        return Ok(on);
    }
    let covers = |switch: &Path| named.is_none_or(|(system, event)| covers(switch, system, event));
    let refusal = refusals.into_iter().find(|(switch, _)| covers(switch)).map(|(_, refusal)| refusal);
    let (system, event) = named.unwrap_or(("events", "enable"));
    Err(refusal.unwrap_or_else(|| failure(FailureKind::Kernel, &format!("{system}:{event}"), "it stayed off")))
}

/// Whether an `enable` file switches this event.
fn covers(switch: &Path, system: &str, event: &str) -> bool {
    let directory = switch.parent().unwrap_or(Path::new(""));
    Path::new(system).join(event).starts_with(directory)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const AVAILABLE: &str = "sched:sched_switch\nsched:sched_waking\nsched:sched_wakeup\nirq:softirq_entry\n\
                             irq:softirq_exit\nkvm:kvm_entry\nkvm:kvm_exit\nkvm:kvm_pio\n";

    fn requests(patterns: &[&str]) -> Vec<EventRequest> {
        patterns.iter().map(|pattern| EventRequest::from(*pattern)).collect()
    }

    fn switches(patterns: &[&str]) -> Vec<String> {
        let available = Events::parse(AVAILABLE);
        let chosen = available.choose(&requests(patterns)).unwrap();
        let switches = available.switches(&chosen);
        assert_eq!(switches.iter().map(|(_, events)| events).sum::<usize>(), chosen.count());
        switches.iter().map(|(path, _)| path.to_str().unwrap().into()).collect()
    }

    #[test]
    fn whole_system_is_one_write() {
        assert_eq!(switches(&["sched"]), ["sched/enable"]);
        assert_eq!(switches(&["kvm:kvm_*"]), ["kvm/enable"]);
        assert_eq!(switches(&["softirq_entry", "irq:softirq_exit"]), ["irq/enable"]);
    }

    #[test]
    fn everything_is_a_write_for_each_system() {
        assert_eq!(switches(&["all"]), ["irq/enable", "kvm/enable", "sched/enable"]);
        assert_eq!(switches(&["kvm", "irq", "sched"]), switches(&["all"]));
    }

    #[test]
    fn part_of_a_system_is_a_write_per_event() {
        assert_eq!(switches(&["kvm:kvm_e*"]), ["kvm/kvm_entry/enable", "kvm/kvm_exit/enable"]);
        assert_eq!(switches(&["sched_switch"]), ["sched/sched_switch/enable"]);
    }

    #[test]
    fn events_asked_for_twice_count_once() {
        let available = Events::parse(AVAILABLE);
        assert_eq!(available.choose(&requests(&["sched", "sched_switch", "sched:*"])).unwrap().count(), 3);
    }

    #[test]
    fn events_left_out_are_not_among_the_chosen_whatever_the_order() {
        let available = Events::parse(AVAILABLE);
        let out = |pattern: &str| EventRequest { excluded: true, ..pattern.into() };
        let chosen = available.choose(&["all".into(), out("kvm"), out("sched_wak*")]).unwrap();
        let names: Vec<_> = chosen.each().map(|(_, event)| event).collect();
        assert_eq!(names, ["softirq_entry", "softirq_exit", "sched_switch"]);
        assert_eq!(available.choose(&[out("kvm"), "kvm".into()]).unwrap().count(), 0);
        assert!(available.choose(&["all".into(), out("kmv")]).is_err());
    }

    #[test]
    fn denied_events_are_left_out_of_all_and_refused_by_name() {
        let available = Events::parse(AVAILABLE);
        let left = |pattern: &str, denied: &[&str]| {
            let mut requests = vec![EventRequest::from(pattern)];
            let denied: Vec<String> = denied.iter().map(|pattern| (*pattern).into()).collect();
            leave_out(&available, &mut requests, &denied)?;
            available.choose(&requests).map(|chosen| chosen.count())
        };
        assert_eq!(left("all", &["kvm", "irq:softirq_exit"]), Ok(4));
        assert_eq!(left("sched", &["nothing_like_it"]), Ok(3));
        assert_eq!(left("kvm:kvm_exit", &["kvm"]).unwrap_err().kind, FailureKind::NotAllowed);
        assert_eq!(left("kvm_*", &["*:kvm*"]).unwrap_err().kind, FailureKind::NotAllowed);
    }

    #[test]
    fn misspelled_event_names_its_neighbours() {
        let available = Events::parse(AVAILABLE);
        let fault = available.choose(&requests(&["irq", "sched:sched_swich"])).unwrap_err();
        assert_eq!(fault.kind, FailureKind::NoSuchEvent);
        assert_eq!(fault.object, "sched:sched_swich");
        assert_eq!(fault.near[0], "sched:sched_switch");
        let near = |pattern| available.choose(&requests(&[pattern])).unwrap_err().near;
        assert_eq!(near("shced"), ["sched"]);
        assert_eq!(near("kvm_exti")[0], "kvm_exit");
        assert_eq!(near("no_event_looks_like_this"), Vec::<String>::new());
    }

    #[test]
    fn lines_that_name_no_event_are_passed_over() {
        let events = Events::parse("sched:sched_switch\n:mod:kvm\nkvm:kvm_exit:mod:kvm\n\nno\na/b:c\n..:x\n");
        assert_eq!(events.each().collect::<Vec<_>>(), [("sched", "sched_switch")]);
    }

    #[test]
    fn refused_file_is_found_for_the_event_it_switches() {
        assert!(covers(Path::new("enable"), "irq", "softirq_exit"));
        assert!(covers(Path::new("irq/enable"), "irq", "softirq_exit"));
        assert!(covers(Path::new("irq/softirq_exit/enable"), "irq", "softirq_exit"));
        assert!(!covers(Path::new("irq/softirq/enable"), "irq", "softirq_exit"));
    }

    proptest! {
        #[test]
        fn switches_cover_what_was_chosen_and_nothing_else(picked in proptest::collection::vec(0usize..8, 1..8)) {
            let available = Events::parse(AVAILABLE);
            let lines: Vec<&str> = AVAILABLE.lines().collect();
            let patterns: Vec<&str> = picked.iter().map(|index| lines[*index]).collect();
            let chosen = available.choose(&requests(&patterns)).unwrap();
            let switches = available.switches(&chosen);
            for (system, event) in available.each() {
                let is_on = switches.iter().filter(|(switch, _)| covers(switch, system, event)).count();
                prop_assert_eq!(is_on, usize::from(chosen.contains(system, event)));
            }
        }

        #[test]
        fn any_text_gives_names_that_are_safe_in_a_path(text in "[a-z:./ \n]{0,64}") {
            for (system, event) in Events::parse(&text).each() {
                prop_assert!(is_name(system) && is_name(event));
            }
        }
    }
}
