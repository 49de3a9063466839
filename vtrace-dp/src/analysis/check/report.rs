//! What was found, for a program and for a person.
//!
//! In:    counts
//! Out:   [`Report`]: JSON by serde, text by Display
//! Runs:  pure

use std::fmt;

use serde::Serialize;

use crate::{
    analysis::{Against, pairs::Pairs, windows::Coverage},
    printable::Nanoseconds,
};

/// All guests.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Report {
    /// In the order they were given.
    pub guests: Vec<GuestReport>,
}

/// One guest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct GuestReport {
    /// Its name in the host's file, else that of its own file.
    pub name: String,
    /// Its file.
    pub file: String,
    /// The result.
    pub verdict: ClockVerdict,
    /// What its events were held against.
    pub against: Against,
    /// Unit of all times and distances.
    pub unit: Unit,
    /// How wrong the file says its times can be, in nanoseconds, if it says so.
    #[serde(rename = "bound_ns")]
    pub bound: Option<u64>,
    /// Of all vCPUs.
    #[serde(flatten)]
    pub counts: EventCounts,
    /// One by one.
    pub vcpus: Vec<VcpuReport>,
    /// Cause and effect, each rule that has pairs.
    pub pairs: Vec<Pairs>,
    /// Events outside, farthest first.
    pub farthest: Vec<Stray>,
    /// What a person has to know.
    pub notes: Vec<String>,
}

/// One vCPU.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct VcpuReport {
    /// The guest's CPU.
    pub cpu: u32,
    /// The host's thread.
    pub thread: Option<u32>,
    /// How many windows it has.
    pub windows: u64,
    /// Its events.
    #[serde(flatten)]
    pub counts: EventCounts,
}

/// Events by where they lie. `events == inside + within_bound + outside + uncovered`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct EventCounts {
    /// All.
    pub events: u64,
    /// In a window.
    pub inside: u64,
    /// Outside, by no more than the file says of that event, or of all where it does not say it of each.
    pub within_bound: u64,
    /// Outside by more.
    pub outside: u64,
    /// Nothing is known of their time.
    pub uncovered: u64,
    /// The farthest outside: how far, in the report's unit.
    pub worst: u64,
}

/// An event outside all windows.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Stray {
    /// The guest's CPU.
    pub cpu: u32,
    /// When, as stock readers show it.
    pub time: u64,
    /// From the nearest window.
    pub distance: u64,
    /// SYSTEM:EVENT
    pub event: String,
    /// The guest's task.
    pub pid: Option<u32>,
}

/// What times are counted in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Nanoseconds.
    Ns,
    /// Cycles of the TSC: the file does not say how long one is.
    Cycles,
}

/// The result for one guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ClockVerdict {
    /// No event lies outside, no timer setting out of order.
    Exact,
    /// Some do, by no more than the file's own bound.
    WithinBound,
    /// Some do.
    Wrong,
    /// Not one event is covered.
    Unchecked,
}

impl ClockVerdict {
    pub(super) fn new(counts: &EventCounts, pairs: &[Pairs]) -> Self {
        let exact = || pairs.iter().filter(|pairs| pairs.exact);
        if counts.outside > 0 || exact().any(|pairs| pairs.out_of_order > 0) {
            Self::Wrong
        } else if counts.within_bound > 0 || exact().any(|pairs| pairs.within_bound > 0) {
            Self::WithinBound
        } else if counts.covered() == 0 {
            Self::Unchecked
        } else {
            Self::Exact
        }
    }
}

impl EventCounts {
    /// Events of which it can be said where they lie.
    pub fn covered(&self) -> u64 {
        self.events - self.uncovered
    }

    pub(super) fn add(&mut self, place: Coverage, bound: u64) {
        self.events += 1;
        match place {
            Coverage::Inside => self.inside += 1,
            Coverage::Uncovered => self.uncovered += 1,
            Coverage::Outside(distance) => {
                self.worst = self.worst.max(distance);
                *(if distance <= bound { &mut self.within_bound } else { &mut self.outside }) += 1;
            }
        }
    }

    pub(super) fn join(&mut self, other: &Self) {
        self.events += other.events;
        self.inside += other.inside;
        self.within_bound += other.within_bound;
        self.outside += other.outside;
        self.uncovered += other.uncovered;
        self.worst = self.worst.max(other.worst);
    }
}

impl Report {
    /// The worst verdict of all guests; `Unchecked` if there are none.
    pub fn verdict(&self) -> ClockVerdict {
        let has = |verdict| self.guests.iter().any(|guest| guest.verdict == verdict);
        let worst = [ClockVerdict::Wrong, ClockVerdict::Unchecked, ClockVerdict::WithinBound, ClockVerdict::Exact];
        worst.into_iter().find(|verdict| has(*verdict)).unwrap_or(ClockVerdict::Unchecked)
    }

    /// A line for each guest and one for each kind of pairs; with `verbose` vCPUs, events outside, and notes too.
    pub fn text(&self, verbose: bool) -> String {
        self.guests.iter().map(|guest| guest.text(verbose)).collect()
    }
}

impl GuestReport {
    fn text(&self, verbose: bool) -> String {
        let mut lines = vec![self.line()];
        lines.extend(self.pairs.iter().map(|pairs| self.pairs_line(pairs)));
        let notes_matter = verbose || self.verdict != ClockVerdict::Exact;
        if verbose {
            lines.extend(self.vcpus.iter().map(|vcpu| self.vcpu_line(vcpu)));
            lines.extend(self.farthest.iter().map(|stray| self.stray_line(stray)));
        }
        if notes_matter {
            lines.extend(self.notes.iter().map(|note| format!("note {}: {note}", self.name)));
        }
        lines.iter().map(|line| format!("{line}\n")).collect()
    }

    /// The line that a person understands.
    fn line(&self) -> String {
        let Self { name, counts, .. } = self;
        let where_ = match self.against {
            Against::Runs => "inside their vCPU's run windows",
            Against::OnCpu => "while their vCPU's thread was on a CPU",
            Against::Nothing => {
                return format!(
                    "{name}: nothing to check against: the host's file has neither kvm_entry nor sched_switch of its vCPUs' threads"
                );
            }
        };
        if counts.covered() == 0 {
            return format!(
                "{name}: nothing to check: none of {} events is covered by the host's file",
                Grouped(counts.events)
            );
        }
        let (inside, covered) = (Grouped(counts.inside), Grouped(counts.covered()));
        let share = Percent(counts.covered(), counts.events);
        let mut line = format!("{name}: {inside} of {covered} events {where_} (covered {share})");
        if counts.within_bound > 0 {
            line += &format!(", {} outside by no more than the file says of them", Grouped(counts.within_bound));
        }
        if counts.outside > 0 {
            line += &format!(", {} outside", Grouped(counts.outside));
        }
        line += &format!(", worst {}: {}", self.distance(counts.worst), self.words());
        line
    }

    fn words(&self) -> String {
        let bound = self.bound.filter(|bound| *bound > 0).map(|bound| format!(" of ±{}", Nanoseconds(bound)));
        let bound = bound.unwrap_or_default();
        let weaker =
            if self.against == Against::OnCpu { " (no kvm_entry in the host's file: a weaker check)" } else { "" };
        let words = match (self.verdict, self.against) {
            (ClockVerdict::Exact, Against::Runs) => "clock exact".to_owned(),
            (ClockVerdict::Exact, _) => "no contradiction".to_owned(),
            (ClockVerdict::WithinBound, _) => format!("clock within its bound{bound}"),
            (ClockVerdict::Wrong, _) => format!(
                "clock wrong{}",
                if bound.is_empty() { bound } else { format!(" by more than its bound{bound}") }
            ),
            (ClockVerdict::Unchecked, _) => "not checked".to_owned(),
        };
        words + weaker
    }

    fn pairs_line(&self, pairs: &Pairs) -> String {
        let count = Grouped(pairs.in_order + pairs.within_bound + pairs.out_of_order);
        let late = match (pairs.within_bound, pairs.out_of_order) {
            (0, 0) => String::new(),
            (within, 0) => format!(", {} out of order within the bound", Grouped(within)),
            (_, wrong) => format!(", {} out of order", Grouped(wrong)),
        };
        let worst = if late.is_empty() { late } else { format!("{late}, worst {}", self.distance(pairs.worst)) };
        let (name, what, apart) = (&self.name, pairs.rule.name(), self.distance(pairs.distance_median));
        let in_order = Grouped(pairs.in_order);
        format!("{name}: {in_order} of {count} {what} seen on both sides in order{worst}, {apart} apart in the median")
    }

    fn vcpu_line(&self, vcpu: &VcpuReport) -> String {
        let EventCounts { inside, events, outside, within_bound, uncovered, worst } = vcpu.counts;
        let thread = vcpu.thread.map_or("no thread known".into(), |thread| format!("thread {thread}"));
        format!(
            "{} CPU {} ({thread}, {} windows): {} events, {} inside, {} within the bound, {} outside, {} not covered, worst {}",
            self.name,
            vcpu.cpu,
            Grouped(vcpu.windows),
            Grouped(events),
            Grouped(inside),
            Grouped(within_bound),
            Grouped(outside),
            Grouped(uncovered),
            self.distance(worst)
        )
    }

    fn stray_line(&self, stray: &Stray) -> String {
        let Stray { cpu, time, distance, event, pid } = stray;
        let pid = pid.map_or(String::new(), |pid| format!(" of task {pid}"));
        format!("{} CPU {cpu} at {time}: {event}{pid} is {} outside", self.name, self.distance(*distance))
    }

    fn distance(&self, distance: u64) -> String {
        match self.unit {
            Unit::Ns => Nanoseconds(distance).to_string(),
            Unit::Cycles => format!("{} cycles", Grouped(distance)),
        }
    }
}

/// Thousands apart.
struct Grouped(u64);

impl fmt::Display for Grouped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        for (at, digit) in digits.chars().enumerate() {
            if at > 0 && (digits.len() - at).is_multiple_of(3) {
                write!(f, " ")?;
            }
            write!(f, "{digit}")?;
        }
        Ok(())
    }
}

/// A share, cut after one decimal: 100 % is all.
struct Percent(u64, u64);

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let thousandths = u128::from(self.0) * 1000 / u128::from(self.1.max(1));
        match thousandths {
            1000 => write!(f, "100 %"),
            _ => write!(f, "{}.{} %", thousandths / 10, thousandths % 10),
        }
    }
}
