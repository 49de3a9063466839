//! Cause and effect on both sides: what the host saw of something the guest did.
//!
//! In:    the host's events of vCPU threads, then the guest's events
//! Out:   pairs, their order and distance
//! Runs:  pure
//! Full:  the first [`CAUSES_MAX`] events of the host are held
//! Trust: nothing
//!
//! | rule | host | guest | order |
//! |---|---|---|---|
//! | timer | `kvm_msr`: this vCPU wrote this deadline | `write_msr`: the same deadline | host first: Linux traces the write when it is done |
//! | interrupt | `kvm_inj_virq`: this vector is injected | `irq_vectors:*_entry` of this vector | host first |
//! | IPI | `kvm_apic_ipi`: this vCPU sent one | `ipi_send_cpu` | guest first: Linux traces it before it is sent |
//!
//! Two events are a pair if each is the nearest one of its kind to the other. A deadline of the TSC is a number that
//! no other write has, so the order of such a pair is a fact; the others are found by time alone and are shown, but
//! decide nothing.

use std::collections::HashMap;

use serde::Serialize;

use crate::ftrace::fields::{EventFormat, Field};

/// Host events held for pairs.
pub const CAUSES_MAX: usize = 1 << 20;
/// Farther apart than this, in the file's unit, two events without a value of their own are no pair.
const APART_MAX: u64 = 1_000_000;

/// Which kind of pair.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// A vCPU's TSC deadline timer is set.
    Timer,
    /// An interrupt's vector.
    Interrupt,
    /// A CPU tells another one.
    Ipi,
}

impl Rule {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Timer, Self::Interrupt, Self::Ipi];

    /// What a person calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Timer => "timer settings",
            Self::Interrupt => "interrupts",
            Self::Ipi => "IPIs",
        }
    }

    /// Its pairs are known by more than their times.
    pub fn is_exact(self) -> bool {
        self == Self::Timer
    }

    fn host_first(self) -> bool {
        self != Self::Ipi
    }
}

/// `MSR_IA32_TSC_DEADLINE` of arch/x86/include/asm/msr-index.h.
const TSC_DEADLINE: u64 = 0x6e0;

/// What makes two events of one rule the same thing.
pub type Key = [u64; 2];

/// How an event's key is read.
#[derive(Clone, Debug)]
pub struct Reading {
    rule: Rule,
    key: [Option<Field>; 2],
    /// This field is not zero.
    only: Option<Field>,
}

impl Reading {
    /// How a host's event of this kind is read.
    pub fn of_host(format: &EventFormat) -> Option<Self> {
        match (format.system.as_str(), format.name.as_str()) {
            ("kvm", "kvm_msr") => Self::new(Rule::Timer, format, &["ecx", "data"], Some("write")),
            ("kvm", "kvm_inj_virq") => {
                let vector = if format.field("vector").is_some() { "vector" } else { "irq" };
                Self::new(Rule::Interrupt, format, &[vector], None)
            }
            ("kvm", "kvm_apic_ipi") => Self::new(Rule::Ipi, format, &[], None),
            _ => None,
        }
    }

    /// How a guest's event of this kind is read.
    pub fn of_guest(format: &EventFormat) -> Option<Self> {
        match (format.system.as_str(), format.name.as_str()) {
            ("msr", "write_msr") => Self::new(Rule::Timer, format, &["msr", "val"], None),
            ("irq_vectors", name) if name.ends_with("_entry") => Self::new(Rule::Interrupt, format, &["vector"], None),
            ("ipi", "ipi_send_cpu") => Self::new(Rule::Ipi, format, &[], None),
            _ => None,
        }
    }

    fn new(rule: Rule, format: &EventFormat, key: &[&str], only: Option<&str>) -> Option<Self> {
        let mut fields = [None, None];
        for (slot, name) in fields.iter_mut().zip(key) {
            *slot = Some(format.field(name)?.clone());
        }
        let only = match only {
            Some(name) => Some(format.field(name)?.clone()),
            None => None,
        };
        Some(Self { rule, key: fields, only })
    }

    /// The rule and key of an event, if it is one that counts.
    pub fn read(&self, event: &[u8]) -> Option<(Rule, Key)> {
        if let Some(only) = &self.only {
            only.number(event).filter(|value| *value != 0)?;
        }
        let mut key = [0; 2];
        for (value, field) in key.iter_mut().zip(&self.key) {
            *value = field.as_ref().map_or(Some(0), |field| field.number(event))?;
        }
        let is_one = self.rule != Rule::Timer || (key[0] == TSC_DEADLINE && key[1] != 0); // 0 switches it off
        is_one.then_some((self.rule, key))
    }
}

/// The host's side: what each thread caused or saw.
#[derive(Clone, Debug, Default)]
pub struct Causes {
    by_key: HashMap<(u32, Rule, Key), Vec<Cause>>,
    held: usize,
}

#[derive(Clone, Copy, Debug)]
struct Cause {
    time: u64,
    /// The guest's event that is nearest: how much later it is.
    nearest: Option<i64>,
}

/// The pairs of one rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Pairs {
    /// The rule that pairs them.
    pub rule: Rule,
    /// Their order is a fact.
    pub exact: bool,
    /// Cause before effect.
    pub in_order: u64,
    /// Out of order by no more than the clock's bound.
    pub within_bound: u64,
    /// Out of order by more.
    pub out_of_order: u64,
    /// From one event to the other, in the file's unit.
    pub distance_median: u64,
    /// Of those out of order the farthest, else 0.
    pub worst: u64,
}

impl Causes {
    /// Takes a host event of `thread`, not before the last one.
    pub fn push(&mut self, thread: u32, (rule, key): (Rule, Key), time: u64) {
        if self.held < CAUSES_MAX {
            self.held += 1;
            self.by_key.entry((thread, rule, key)).or_default().push(Cause { time, nearest: None });
        }
    }

    /// Takes a guest event of the vCPU whose thread is `thread`.
    pub fn pair(&mut self, thread: u32, (rule, key): (Rule, Key), time: u64) {
        let Some(causes) = self.by_key.get_mut(&(thread, rule, key)) else { return };
        let above = causes.partition_point(|cause| cause.time <= time);
        let around = above.saturating_sub(1)..(above + 1).min(causes.len());
        let nearest = causes[around].iter_mut().min_by_key(|cause| cause.time.abs_diff(time));
        let Some(cause) = nearest else { return };
        let distance = time.wrapping_sub(cause.time).cast_signed();
        let is_near = rule.is_exact() || distance.unsigned_abs() <= APART_MAX;
        let is_nearest = cause.nearest.is_none_or(|other| distance.unsigned_abs() < other.unsigned_abs());
        if is_near && is_nearest {
            cause.nearest = Some(distance);
        }
    }

    /// What became of the causes of these threads, for each rule that has pairs.
    pub fn pairs(&self, threads: &[u32], bound: u64) -> Vec<Pairs> {
        let pairs = Rule::ALL.map(|rule| {
            let of_rule = self.by_key.iter().filter(|((thread, of, _), _)| *of == rule && threads.contains(thread));
            let mut distances: Vec<i64> =
                of_rule.flat_map(|(_, causes)| causes.iter().filter_map(|cause| cause.nearest)).collect();
            if !rule.host_first() {
                distances.iter_mut().for_each(|distance| *distance = distance.saturating_neg());
            }
            judge(rule, &mut distances, bound)
        });
        pairs.into_iter().flatten().collect()
    }
}

/// `distances`: how much later the effect is than its cause.
fn judge(rule: Rule, distances: &mut [i64], bound: u64) -> Option<Pairs> {
    distances.sort_unstable_by_key(|distance| distance.unsigned_abs());
    let distance_median = distances.get(distances.len() / 2)?.unsigned_abs();
    let late = |distance: &&i64| **distance < 0;
    let count = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
    let within = distances.iter().filter(late).filter(|distance| distance.unsigned_abs() <= bound).count();
    let wrong = distances.iter().filter(late).count();
    Some(Pairs {
        rule,
        exact: rule.is_exact(),
        in_order: count(distances.len() - wrong),
        within_bound: count(within),
        out_of_order: count(wrong - within),
        distance_median,
        worst: distances.iter().filter(late).map(|distance| distance.unsigned_abs()).max().unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: (Rule, Key) = (Rule::Timer, [0x6e0, 77]);
    const IPI: (Rule, Key) = (Rule::Ipi, [0; 2]);

    #[test]
    fn each_cause_has_the_effect_nearest_to_it() {
        let mut causes = Causes::default();
        [100, 200, 300].iter().for_each(|time| causes.push(7, (Rule::Interrupt, [236, 0]), *time));
        [103, 190, 205, 2_000_000].iter().for_each(|time| causes.pair(7, (Rule::Interrupt, [236, 0]), *time));
        causes.pair(8, (Rule::Interrupt, [236, 0]), 300);
        causes.pair(7, (Rule::Interrupt, [235, 0]), 300);
        let pairs = causes.pairs(&[7], 0);
        assert_eq!(pairs.len(), 1);
        assert_eq!((pairs[0].in_order, pairs[0].out_of_order, pairs[0].distance_median), (2, 0, 5));
    }

    #[test]
    fn effect_before_its_cause_is_out_of_order_beyond_the_bound() {
        let mut causes = Causes::default();
        causes.push(7, DEADLINE, 5_000_000);
        causes.pair(7, DEADLINE, 1_000_000);
        let pairs = |bound| causes.pairs(&[7], bound)[0];
        assert_eq!((pairs(0).out_of_order, pairs(0).worst, pairs(0).exact), (1, 4_000_000, true));
        assert_eq!((pairs(4_000_000).out_of_order, pairs(4_000_000).within_bound), (0, 1));
    }

    #[test]
    fn guest_that_sends_an_ipi_comes_first() {
        let mut causes = Causes::default();
        causes.push(7, IPI, 100);
        causes.pair(7, IPI, 98);
        assert_eq!(causes.pairs(&[7], 0)[0].in_order, 1);
        let mut causes = Causes::default();
        causes.push(7, IPI, 100);
        causes.pair(7, IPI, 102);
        assert_eq!(causes.pairs(&[7], 0)[0].out_of_order, 1);
    }

    #[test]
    fn key_is_read_where_the_format_says() {
        let text = "name: kvm_msr\nID: 9\n\tfield:unsigned write;\toffset:8;\tsize:4;\tsigned:0;\n\
            \tfield:u32 ecx;\toffset:12;\tsize:4;\tsigned:0;\n\tfield:u64 data;\toffset:16;\tsize:8;\tsigned:0;\n";
        let reading = Reading::of_host(&EventFormat::parse("kvm", text.as_bytes()).unwrap()).unwrap();
        let event =
            |write: u32| [&[0; 8][..], &write.to_le_bytes(), &0x6e0u32.to_le_bytes(), &77u64.to_le_bytes()].concat();
        assert_eq!(reading.read(&event(1)), Some(DEADLINE));
        assert_eq!(reading.read(&event(0)), None, "a read");
        assert_eq!(reading.read(&event(1)[..20]), None);
    }
}
