//! What the host's kernel says of each vCPU: when it was in its guest, and by how much the guest's TSC differed.
//!
//! In:    events of the host in the order of time. Out: [`Runs`] and [`Offsets`] by vCPU id. Runs: pure.
//! Full:  does not apply. Trust: the host's kernel.

use super::report::Event;
use std::collections::{BTreeMap, BTreeSet};

/// Of a ratio: arch/x86/kvm/vmx/vmx.c `hardware_setup`.
const VMX_FRACTION_BITS: u32 = 48;

/// When a vCPU was in its guest: from kvm_entry to kvm_exit, in order and apart from each other.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Runs {
    runs: Vec<(u64, u64)>,
    /// Entries without exit and exits without entry, but for those that the trace's ends cut.
    pub(super) unpaired: usize,
}

impl Runs {
    pub(super) fn len(&self) -> usize {
        self.runs.len()
    }

    /// The last exit up to `time`.
    fn last_exit(&self, time: u64) -> Option<u64> {
        let after = self.runs.partition_point(|(entry, _)| *entry <= time);
        self.runs[..after].iter().rev().map(|(_, exit)| *exit).find(|exit| *exit <= time)
    }

    /// From `time` to the nearest run; 0 inside.
    pub(super) fn distance(&self, time: u64) -> u64 {
        let after = self.runs.partition_point(|(entry, _)| *entry <= time);
        let left = after.checked_sub(1).map_or(u64::MAX, |at| time.saturating_sub(self.runs[at].1));
        let right = self.runs.get(after).map_or(u64::MAX, |(entry, _)| entry - time);
        left.min(right)
    }
}

/// The runs of every vCPU.
pub(super) fn runs(events: &[Event]) -> BTreeMap<u32, Runs> {
    let mut all: BTreeMap<u32, Runs> = BTreeMap::new();
    // What each thread does: its vCPU, and when it entered if it is inside.
    let mut threads: BTreeMap<u32, (u32, Option<u64>)> = BTreeMap::new();
    let mut unknown: BTreeMap<u32, u64> = BTreeMap::new();
    for event in events {
        match (event.name, threads.get(&event.pid).copied()) {
            ("kvm_entry", before) => {
                let Some(vcpu) = vcpu_of(event.text) else { continue };
                let runs = all.entry(vcpu).or_default();
                match (before, unknown.remove(&event.pid)) {
                    (Some((_, Some(_))), _) => runs.unpaired += 1,
                    (None, Some(exit)) => runs.runs.push((0, exit)),
                    _ => {}
                }
                threads.insert(event.pid, (vcpu, Some(event.time)));
            }
            ("kvm_exit", Some((vcpu, Some(entry)))) => {
                all.entry(vcpu).or_default().runs.push((entry, event.time));
                threads.insert(event.pid, (vcpu, None));
            }
            ("kvm_exit", Some((vcpu, None))) => all.entry(vcpu).or_default().unpaired += 1,
            ("kvm_exit", None) => {
                unknown.insert(event.pid, event.time);
            }
            _ => {}
        }
    }
    for (vcpu, entry) in threads.into_values() {
        all.entry(vcpu).or_default().runs.extend(entry.map(|entry| (entry, u64::MAX)));
    }
    all
}

/// `vcpu 0, rip 0x…`; older kernels and trace-cmd's plugin leave the comma out.
fn vcpu_of(text: &str) -> Option<u32> {
    text.strip_prefix("vcpu ")?.split([' ', ',']).next()?.parse().ok()
}

/// guest − host, in cycles, modulo 2⁶⁴: which held from when.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Offsets {
    /// The first from the beginning of time.
    parts: Vec<(u64, u64)>,
}

impl Offsets {
    /// What held when the trace began.
    pub(super) fn first(&self) -> u64 {
        self.parts[0].1
    }

    /// What held when the host's TSC was `host`.
    pub(super) fn at(&self, host: u64) -> u64 {
        self.parts[self.parts.partition_point(|(from, _)| *from <= host) - 1].1
    }

    /// Whether the guest's TSC fell where this part begins.
    fn is_backward(&self, part: usize) -> bool {
        self.parts[part].1.wrapping_sub(self.parts[part - 1].1).cast_signed() < 0
    }

    /// By how much each part differs from the one before.
    pub(super) fn steps(&self) -> Vec<i64> {
        self.parts.windows(2).map(|pair| pair[1].1.wrapping_sub(pair[0].1).cast_signed()).collect()
    }
}

/// The offsets of every vCPU that KVM wrote one for.
pub(super) fn offsets(events: &[Event]) -> BTreeMap<u32, Offsets> {
    let mut all: BTreeMap<u32, Offsets> = BTreeMap::new();
    for event in events.iter().filter(|event| event.name == "kvm_write_tsc_offset") {
        let Some([vcpu, previous, next]) = offset_of(event.text) else { continue };
        let Ok(vcpu) = u32::try_from(vcpu) else { continue };
        let offsets = all.entry(vcpu).or_insert_with(|| Offsets { parts: vec![(0, previous)] });
        if offsets.parts.last().is_some_and(|(_, last)| *last != next) {
            offsets.parts.push((event.time, next));
        }
    }
    all
}

/// `vcpu=0 prev=1 next=2`
fn offset_of(text: &str) -> Option<[u64; 3]> {
    let mut words = text.split_whitespace();
    let mut value = |name: &str| words.next()?.strip_prefix(name)?.strip_prefix('=')?.parse().ok();
    Some([value("vcpu")?, value("prev")?, value("next")?])
}

/// Offset and ratio of one vCPU: which held from when.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Pairs {
    /// Since when, offset, ratio.
    parts: Vec<(u64, u64, u64)>,
}

impl Pairs {
    /// What the guest's TSC was when the host's was `host`, and what the offset alone that held at the start makes of it:
    /// trace-cmd's rule of one sample.
    pub(super) fn one_offset(&self, host: u64) -> u64 {
        let part = self.parts.partition_point(|(from, ..)| *from <= host).max(1) - 1;
        let (_, offset, ratio) = self.parts[part];
        let scaled = (u128::from(host) * u128::from(ratio)) >> VMX_FRACTION_BITS;
        let guest = offset.wrapping_add(u64::try_from(scaled & u128::from(u64::MAX)).expect("it is 64 bits"));
        guest.wrapping_sub(self.parts[0].1)
    }

    /// How many ratios there were.
    pub(super) fn ratios(&self) -> usize {
        self.parts.iter().map(|(.., ratio)| ratio).collect::<BTreeSet<_>>().len()
    }
}

/// Offset and ratio of every vCPU, where they stand in the host's trace.
pub(super) fn pairs(events: &[Event]) -> BTreeMap<u32, Pairs> {
    let mut all: BTreeMap<u32, Pairs> = BTreeMap::new();
    for event in events.iter().filter(|event| event.name == "bpf_trace_printk") {
        if let Some((vcpu, offset, ratio)) = pair_of(event.text) {
            all.entry(vcpu).or_default().parts.push((event.time, offset, ratio));
        }
    }
    all
}

/// `vtrace tsc: vcpu 0 offset -1 ratio 1000000000000`, the ratio in hexadecimal.
fn pair_of(text: &str) -> Option<(u32, u64, u64)> {
    let mut words = text.strip_prefix("vtrace tsc: ")?.split_whitespace();
    let mut value = |name: &str| words.next().filter(|word| *word == name).and_then(|_| words.next());
    let (vcpu, offset) = (value("vcpu")?.parse().ok()?, value("offset")?.parse::<i64>().ok()?);
    Some((vcpu, offset.cast_unsigned(), u64::from_str_radix(value("ratio")?, 16).ok()?))
}

/// Where an event belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HostPlace {
    /// The host's TSC.
    pub(super) host: u64,
    /// The guest stepped back, and the page that it was writing then goes on as if it had not: this event is late, by
    /// as much as the step at most.
    pub(super) is_late: bool,
}

/// What the host's TSC was at each event of one vCPU, from the guest's, in the order in which it wrote them. After a step
/// back the same guest time comes twice: the earliest part that leaves the events in their order, and in a run if one
/// does, is it.
pub(super) fn places(guest: &[u64], offsets: &Offsets, runs: &Runs) -> Vec<HostPlace> {
    let parts = &offsets.parts;
    let end = |part: usize| parts.get(part + 1).map_or(u64::MAX, |(from, _)| *from);
    let (mut part, mut latest) = (0, 0);
    let mut places: Vec<HostPlace> = Vec::with_capacity(guest.len());
    let mut fallen = 0;
    for (index, &time) in guest.iter().enumerate() {
        if let Some(before) = index.checked_sub(1).filter(|before| guest[*before] > time) {
            // The page with the late events is full. What came after the last exit before the step was late.
            // A step need not show, and another can fit by chance: a page is soon full, so the nearest it is.
            let since = |step: usize| time.wrapping_sub(parts[step].1).wrapping_sub(parts[step].0);
            let steps = (fallen + 1..parts.len()).filter(|&step| offsets.is_backward(step));
            let step = steps.filter(|&step| since(step) < end(step) - parts[step].0).min_by_key(|&step| since(step));
            if let Some((step, exit)) = step.and_then(|step| Some((step, runs.last_exit(parts[step].0)?))) {
                let last = exit.wrapping_add(parts[step - 1].1);
                let late = guest[..=before].iter().rev().take_while(|late| **late > last).count();
                places[index - late..].iter_mut().for_each(|place| place.is_late = true);
                (fallen, part, latest) = (step, step, 0);
            }
        }
        let fits = (part..parts.len()).filter_map(|part| {
            let host = time.wrapping_sub(parts[part].1);
            (parts[part].0 <= host && host < end(part) && host >= latest).then_some((part, host))
        });
        let fits: Vec<(usize, u64)> = fits.collect();
        let inside = fits.iter().find(|(_, host)| runs.distance(*host) == 0);
        let unfit = (part, time.wrapping_sub(parts[part].1)); // it will be outside, and that is what the judge is for
        let (found, host) = inside.or_else(|| fits.first()).copied().unwrap_or(unfit);
        (part, latest) = (found, latest.max(host));
        places.push(HostPlace { host, is_late: false });
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(pid: u32, time: u64, name: &'static str, text: &'static str) -> Event<'static> {
        Event { cpu: 0, pid, time, name, text }
    }

    #[test]
    fn runs_belong_to_the_vcpu_that_their_thread_entered() {
        let events = [
            event(1, 5, "kvm_exit", "reason x"),
            event(1, 10, "kvm_entry", "vcpu 0, rip 0x1"),
            event(2, 11, "kvm_entry", "vcpu 1 rip 0x1"),
            event(1, 20, "kvm_exit", "reason x"),
            event(1, 25, "kvm_exit", "reason x"),
            event(2, 26, "kvm_entry", "vcpu 1 rip 0x1"),
        ];
        let runs = runs(&events);
        assert_eq!(runs[&0], Runs { runs: vec![(0, 5), (10, 20)], unpaired: 1 });
        assert_eq!(runs[&1], Runs { runs: vec![(26, u64::MAX)], unpaired: 1 });
    }

    #[test]
    fn one_offset_makes_of_a_scaled_guest_what_it_should_not() {
        let events = [
            event(1, 1000, "bpf_trace_printk", "vtrace tsc: vcpu 0 offset -100 ratio 800000000000"),
            event(1, 1500, "bpf_trace_printk", "of someone else"),
            event(1, 2000, "bpf_trace_printk", "vtrace tsc: vcpu 0 offset 50 ratio 2000000000000"),
        ];
        let pairs = &pairs(&events)[&0];
        assert_eq!(pairs.parts, [(1000, 100_u64.wrapping_neg(), 1 << 47), (2000, 50, 1 << 49)]);
        // Half of 1500; twice 3000, and the offset moved by 150.
        assert_eq!([900, 1500, 3000].map(|host| pairs.one_offset(host)), [450, 750, 6150]);
        assert_eq!(pairs.ratios(), 2);
    }

    #[test]
    fn distance_is_to_the_nearest_edge() {
        let runs = Runs { runs: vec![(10, 20), (40, 50)], unpaired: 0 };
        let distances = [0, 10, 20, 23, 38, 45, 60].map(|time| runs.distance(time));
        assert_eq!(distances, [10, 0, 0, 3, 2, 0, 10]);
        assert_eq!(Runs::default().distance(7), u64::MAX);
    }

    fn moved() -> Offsets {
        let events = [
            event(1, 1000, "kvm_write_tsc_offset", "vcpu=0 prev=100 next=300"),
            event(1, 1500, "kvm_write_tsc_offset", "vcpu=0 prev=300 next=300"),
            event(1, 2000, "kvm_write_tsc_offset", "vcpu=0 prev=300 next=18446744073709551606"),
        ];
        offsets(&events).remove(&0).unwrap()
    }

    #[test]
    fn offsets_hold_from_where_they_were_written() {
        let offsets = moved();
        assert_eq!(offsets.steps(), [200, -310]);
        assert_eq!((offsets.first(), offsets.at(999), offsets.at(1000)), (100, 100, 300));
        assert_eq!(offsets.at(u64::MAX), u64::MAX - 9);
    }

    #[test]
    fn host_times_are_found_across_steps_in_both_directions() {
        let offsets = moved();
        let runs = Runs { runs: vec![(900, 990), (1010, 1990), (2005, 2500)], unpaired: 0 };
        let truth = [900, 980, 1020, 1400, 1980, 2010, 2200];
        let guest = truth.map(|host: u64| host.wrapping_add(offsets.at(host)));
        assert_eq!(places(&guest, &offsets, &runs), truth.map(|host| HostPlace { host, is_late: false }));
    }

    #[test]
    fn events_between_a_step_back_and_the_next_page_are_late() {
        let offsets = moved();
        let runs = Runs { runs: vec![(900, 990), (1010, 1990), (2005, 2500)], unpaired: 0 };
        // At 1990 + 300 the guest is left, stepped back by 310, and its page goes on: 2291 instead of 1996.
        let found = places(&[2280, 2291, 2295, 2010, 2200, 2400], &offsets, &runs);
        let late: Vec<bool> = found.iter().map(|place| place.is_late).collect();
        assert_eq!(late, [false, true, true, false, false, false]);
        assert_eq!([0, 3, 4, 5].map(|at: usize| found[at].host), [1980, 2020, 2210, 2410]);
    }

    #[test]
    fn step_back_that_no_event_noticed_makes_none_late() {
        let offsets = moved();
        let runs = Runs { runs: vec![(1010, 1990), (2005, 9000)], unpaired: 0 };
        // Nothing was written for longer than the step.
        let found = places(&[2000, 2190, 2300, 8000], &offsets, &runs);
        assert_eq!(found, [1700, 1890, 2310, 8010].map(|host| HostPlace { host, is_late: false }));
    }
}
