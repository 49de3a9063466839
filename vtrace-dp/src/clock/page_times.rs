//! Host times of the events of one lane, page by page, in order.
//!
//! In:    the guest times of a page's events and how each is encoded; the first time of the next page
//! Out:   a [`Conversion`] for each event; the shown times never decrease
//! Runs:  on the thread that reads the lane
//! Trust: nothing: pages come from guests, and any times are converted to something
//!
//! After a guest's clock stepped back, the same guest times occur twice, so a page alone can fit in two segments. The pages
//! after it have to fit too, in order: [`LaneTimes::look_ahead`] goes through all pages before the first is converted.
//!
//! [`super::table`] describes how the segment of a time is chosen, [`super::stalled_times`] what happens to times that were
//! written while the clock stepped back.

use std::collections::HashMap;

use vtrace_common::{
    ids::Cpu,
    time::{GuestTsc, HostTsc},
};

use super::{
    math::HostRange,
    stalled_times,
    table::{Certainty, Conversion, Table, Vcpu, distance},
};
use crate::ftrace::events::TimeEncoding;

/// Most positions of later pages that are kept. Without them only the next page narrows the choice.
const AHEAD_MAX: usize = 1 << 20;
/// With more segments than this there is no look-ahead: its cost grows with their number.
const AHEAD_SEGMENTS_MAX: usize = 1 << 12;

/// Converts the pages of one lane, from the first to the last.
#[derive(Debug)]
pub struct LaneTimes<'a> {
    vcpu: &'a Vcpu,
    /// After the last converted event.
    position: Position,
    shown: HostTsc,
    candidates: Vec<Candidate>,
    /// For each event: the index of its first candidate.
    begins: Vec<usize>,
    /// The number of the next page.
    number: u64,
    /// Segments and host times at which a page can begin, for pages that the look-ahead narrowed.
    ahead: HashMap<u64, Vec<(usize, HostRange)>>,
}

/// The position after an event: its segment, and the earliest host time that it can have had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Position {
    segment: usize,
    low: HostTsc,
}

/// One segment in which one event can lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Candidate {
    segment: usize,
    range: HostRange,
    in_run: bool,
    /// An ordered path leads from the previous page to it.
    reached: bool,
    /// An ordered path leads from it to the end of the page.
    usable: bool,
}

/// An event's guest time, and how it is encoded in its page.
pub type StampedTime = (GuestTsc, TimeEncoding);

impl Table {
    /// Starts the conversion of a lane. `None` if nothing is known of its vCPU.
    pub fn lane(&self, cpu: Cpu) -> Option<LaneTimes<'_>> {
        self.vcpu(cpu).map(|vcpu| LaneTimes::new(vcpu, self.since()))
    }
}

impl<'a> LaneTimes<'a> {
    fn new(vcpu: &'a Vcpu, since: HostTsc) -> Self {
        let position = Position { segment: 0, low: since };
        let (candidates, begins, ahead) = (Vec::new(), Vec::new(), HashMap::new());
        Self { vcpu, position, shown: since, candidates, begins, number: 0, ahead }
    }

    /// The CPU of the lane.
    pub fn cpu(&self) -> Cpu {
        self.vcpu.history.cpu()
    }

    /// Whether [`LaneTimes::look_ahead`] can help: the clock changed, and not too often.
    pub fn is_moved(&self) -> bool {
        (2..=AHEAD_SEGMENTS_MAX).contains(&self.vcpu.segments().len())
    }

    /// Takes the numbers and first times of all pages, the last page first, before the first page is converted.
    pub fn look_ahead(&mut self, pages: impl Iterator<Item = (u64, GuestTsc)>) {
        let (mut following, mut remembered): (Option<Vec<(usize, HostRange)>>, usize) = (None, 0);
        for (number, guest) in pages {
            let all = self.places(0, guest, self.position.low);
            let leads = |(segment, range): &(usize, HostRange)| {
                let follows = |(next, place): &(usize, HostRange)| next >= segment && place.high.0 >= range.low.0;
                following.as_ref().is_none_or(|following| following.iter().any(follows))
            };
            let usable: Vec<_> = all.iter().copied().filter(leads).collect();
            if usable.is_empty() {
                continue;
            }
            if usable.len() < all.len() && remembered < AHEAD_MAX {
                remembered += usable.len();
                self.ahead.insert(number, usable.clone());
            }
            following = Some(usable);
        }
    }

    /// The segments from `from` on, and their host times, at which `guest` can lie.
    fn places(&self, from: usize, guest: GuestTsc, near: HostTsc) -> Vec<(usize, HostRange)> {
        let mut places = Vec::new();
        for segment in from..self.vcpu.segments().len() {
            places.extend(self.vcpu.place(segment, guest, near).map(|range| (segment, range)));
            if self.vcpu.is_below_later(segment, guest) {
                break;
            }
        }
        places
    }

    /// Converts the events of the next page into `out`, which is cleared first. `next` is the first time of the page after
    /// it, if there is one.
    pub fn page(&mut self, events: &[StampedTime], next: Option<GuestTsc>, out: &mut Vec<Conversion>) {
        out.clear();
        self.number += 1;
        if !self.is_quiet(events, out) {
            out.clear();
            self.choose(events, next, out);
        }
        for conversion in out {
            self.shown = self.shown.max(conversion.at);
            conversion.at = self.shown;
        }
    }

    /// Converts a page all of whose events lie in the current segment and could lie in no other: nearly every page. Hot.
    fn is_quiet(&mut self, events: &[StampedTime], out: &mut Vec<Conversion>) -> bool {
        let Some((last, _)) = events.last() else { return true };
        let Position { segment, mut low } = self.position;
        let current = self.vcpu.segments()[segment];
        if !self.vcpu.is_below_later(segment, *last) {
            return false;
        }
        let until = self.vcpu.until(segment).low;
        let mut before = events[0].0;
        for (guest, stamp) in events {
            let Some(possible) = current.pair.to_host(*guest, low) else { return false };
            let in_order = distance(*guest, before) >= 0 && possible.high >= low;
            let inside = possible.low >= current.from.high && possible.high < until;
            if !in_order || !inside || *stamp == TimeEncoding::Stopped {
                return false;
            }
            (before, low) = (*guest, possible.low);
            out.push(Conversion { at: possible.middle(), possible, certainty: Certainty::Exact });
        }
        self.position.low = low;
        true
    }

    /// Converts a page near a change: considers all segments for every event.
    fn choose(&mut self, events: &[StampedTime], next: Option<GuestTsc>, out: &mut Vec<Conversion>) {
        let stopped = stopped(events);
        let anchors = events.iter().zip(&stopped).filter(|(_, stopped)| !**stopped).map(|((guest, _), _)| *guest);
        self.gather(anchors, next);
        if !self.solve(true) {
            self.solve(false);
        }
        let (mut at, mut anchor) = (0, 0);
        while at < events.len() {
            let length = stopped[at..].iter().take_while(|stopped| **stopped).count();
            if length == 0 {
                out.push(self.convert(events[at].0, anchor));
                anchor += 1;
                at += 1;
            } else {
                // A second step back starts a second group.
                let again = events[at + 1..at + length].iter().position(|(_, stamp)| *stamp == TimeEncoding::Stopped);
                let length = again.map_or(length, |again| again + 1);
                self.release(&events[at..at + length], anchor, out);
                at += length;
            }
        }
    }

    /// Collects the candidates of each of these times, and of the first time of the next page.
    fn gather(&mut self, times: impl Iterator<Item = GuestTsc>, next: Option<GuestTsc>) {
        self.candidates.clear();
        self.begins.clear();
        let Position { segment, low } = self.position;
        for guest in times {
            self.note(self.places(segment, guest, low));
        }
        if let Some(guest) = next {
            let mut places = self.places(segment, guest, low);
            if let Some(ahead) = self.ahead.get(&self.number) {
                let (all, is_ahead) = (places.clone(), |place: &(usize, HostRange)| ahead.contains(place));
                places.retain(is_ahead);
                // Contradictory positions are ignored.
                places = if places.is_empty() { all } else { places };
            }
            self.note(places);
        }
        self.begins.push(self.candidates.len());
    }

    fn note(&mut self, places: Vec<(usize, HostRange)>) {
        self.begins.push(self.candidates.len());
        for (segment, range) in places {
            let in_run = self.vcpu.allows(range);
            self.candidates.push(Candidate { segment, range, in_run, reached: false, usable: false });
        }
    }

    fn count(&self) -> usize {
        self.begins.len() - 1
    }

    fn candidates_of(&self, event: usize) -> std::ops::Range<usize> {
        self.begins[event]..self.begins[event + 1]
    }

    /// Marks the candidates that an ordered path goes through. With `in_runs`, only candidates in runs of the vCPU count
    /// where an event has any; returns false if no path is left. Without, events that no path reaches are skipped.
    fn solve(&mut self, in_runs: bool) -> bool {
        let mut before = vec![(self.position.segment, self.position.low)];
        for event in 0..self.count() {
            let range = self.candidates_of(event);
            let filter = in_runs && self.candidates[range.clone()].iter().any(|candidate| candidate.in_run);
            let mut reached = Vec::new();
            for candidate in &mut self.candidates[range] {
                let follows =
                    |(segment, low): &(usize, HostTsc)| *segment <= candidate.segment && *low <= candidate.range.high;
                candidate.usable = false;
                candidate.reached = (!filter || candidate.in_run) && before.iter().any(follows);
                if candidate.reached {
                    reached.push((candidate.segment, candidate.range.low));
                }
            }
            match (reached.is_empty(), in_runs) {
                (true, true) => return false,
                (true, false) => {}
                (false, _) => before = reached,
            }
        }
        self.go_back();
        true
    }

    /// Marks, from the last event to the first, the candidates that lead to the end.
    fn go_back(&mut self) {
        let mut following: Option<Vec<(usize, HostTsc)>> = None;
        for event in (0..self.count()).rev() {
            let mut usable = Vec::new();
            let range = self.candidates_of(event);
            for candidate in self.candidates[range].iter_mut().filter(|candidate| candidate.reached) {
                let leads =
                    |(segment, high): &(usize, HostTsc)| *segment >= candidate.segment && *high >= candidate.range.low;
                candidate.usable = following.as_ref().is_none_or(|following| following.iter().any(leads));
                if candidate.usable {
                    usable.push((candidate.segment, candidate.range.high));
                }
            }
            if !usable.is_empty() {
                following = Some(usable);
            }
        }
    }

    /// The usable candidates of an event that do not lie before the current position.
    fn usable(&self, event: usize) -> impl Iterator<Item = &Candidate> {
        let Position { segment, low } = self.position;
        let range = if event < self.count() { self.candidates_of(event) } else { 0..0 };
        let ahead = move |candidate: &&Candidate| candidate.segment >= segment && candidate.range.high >= low;
        self.candidates[range].iter().filter(|candidate| candidate.usable).filter(ahead)
    }

    fn convert(&mut self, guest: GuestTsc, event: usize) -> Conversion {
        let Some(first) = self.usable(event).next().copied() else { return self.foreign(guest) };
        let low = self.usable(event).map(|candidate| candidate.range.low).min().unwrap_or(first.range.low);
        let high = self.usable(event).map(|candidate| candidate.range.high).max().unwrap_or(first.range.high);
        let possible = HostRange { low, high };
        let certainty = if possible == first.range { Certainty::Exact } else { Certainty::Unsure };
        self.position = Position { segment: first.segment, low: first.range.low.max(self.position.low) };
        Conversion { at: first.range.middle(), possible, certainty }
    }

    /// Converts a time that fits no segment: by the current segment, clamped to its end and to the last event.
    fn foreign(&self, guest: GuestTsc) -> Conversion {
        let Position { segment, low } = self.position;
        let place = self.vcpu.segments()[segment].pair.to_host_or_next(guest, low).middle();
        let at = place.min(self.vcpu.until(segment).high).max(low);
        Conversion { at, possible: HostRange::at(at), certainty: Certainty::Foreign }
    }

    /// Converts events that were written while the clock stepped back: they lie between the last event before and the first
    /// event after them.
    fn release(&mut self, events: &[StampedTime], anchor: usize, out: &mut Vec<Conversion>) {
        let first = events[0].0;
        let until = self.usable(anchor).map(|candidate| candidate.segment).max();
        let until = until.unwrap_or(self.vcpu.segments().len() - 1);
        let end = self.usable(anchor).map(|candidate| candidate.range.high).max().unwrap_or(HostTsc(u64::MAX));
        let steps = |segment: &usize| {
            let begun = self.vcpu.segments()[*segment];
            distance(begun.pair.to_guest(begun.from.low), first) < 0
        };
        let Some(segment) = (self.position.segment + 1..=until).find(steps) else {
            // No step back: an interrupt came in between, and the kernel did not know how much time had passed.
            events.iter().for_each(|(guest, _)| out.push(self.plain(*guest)));
            return;
        };
        let low = self.position.low.max(self.vcpu.segments()[segment].from.low);
        if segment == self.position.segment + 1 && until == segment {
            self.fit(events, segment, HostRange { low, high: end }, out);
        } else {
            self.bound(events, segment..until + 1, HostRange { low, high: end }, out);
        }
        self.position.segment = segment;
    }

    /// For one change: the distances between the events are right, and the vCPU's runs show when they happened.
    fn fit(&mut self, events: &[StampedTime], segment: usize, between: HostRange, out: &mut Vec<Conversion>) {
        let (pair, first) = (self.vcpu.segments()[segment].pair, events[0].0);
        // The distance of two guest times is exact to one guest tick in either direction.
        let tick = pair.ratio.map_or(0, |_| pair.resolution());
        let passed = |guest: &GuestTsc| pair.host_ticks(guest.0.wrapping_sub(first.0));
        let after: Vec<u64> = events.iter().map(|(guest, _)| passed(guest).saturating_sub(tick)).collect();
        let span = after.last().copied().unwrap_or(0);
        let late = pair.to_host_or_next(first, between.low).high.0;
        let high = HostTsc(late.min(between.high.0.saturating_sub(span)).max(between.low.0));
        let fit = stalled_times::fit(&after, 2 * tick, HostRange { low: between.low, high }, self.vcpu.runs.as_ref());
        for after in after {
            let later = |host: HostTsc, more: u64| HostTsc(host.0.saturating_add(after).saturating_add(more));
            let possible = HostRange { low: later(fit.possible.low, 0), high: later(fit.possible.high, 2 * tick) };
            out.push(Conversion { at: later(fit.at, tick), possible, certainty: Certainty::Trapped });
            self.position.low = self.position.low.max(possible.low);
        }
    }

    /// For several changes: the events lie between their neighbours, and no later than in any of the segments.
    fn bound(
        &mut self,
        events: &[StampedTime],
        segments: std::ops::Range<usize>,
        between: HostRange,
        out: &mut Vec<Conversion>,
    ) {
        let pairs = || self.vcpu.segments()[segments.clone()].iter().map(|segment| segment.pair);
        let first = events[0].0;
        let late = pairs().map(|pair| pair.to_host_or_next(first, between.low).high.0).max().unwrap_or(0);
        for (guest, _) in events {
            let after = pairs()
                .map(|pair| pair.host_ticks(guest.0.wrapping_sub(first.0)).saturating_add(pair.resolution()))
                .max();
            let high = late.saturating_add(after.unwrap_or(0)).min(between.high.0).max(between.low.0);
            let possible = HostRange { low: between.low, high: HostTsc(high) };
            out.push(Conversion { at: possible.middle(), possible, certainty: Certainty::Trapped });
        }
        self.position.low = between.low;
    }

    /// Converts by the first segment from the current one on that contains the time.
    fn plain(&mut self, guest: GuestTsc) -> Conversion {
        let Position { segment, low } = self.position;
        let all = segment..self.vcpu.segments().len();
        let found = all.filter_map(|at| self.vcpu.place(at, guest, low).map(|range| (at, range)));
        let Some((segment, possible)) = found.into_iter().find(|(_, range)| range.high >= low) else {
            return self.foreign(guest);
        };
        self.position = Position { segment, low: low.max(possible.low) };
        Conversion { at: possible.middle(), possible, certainty: Certainty::Exact }
    }
}

/// For each event, whether the clock had stepped back: from a stopped time until the next absolute one.
fn stopped(events: &[StampedTime]) -> Vec<bool> {
    let mut stopped = false;
    let all = events.iter().map(|(_, stamp)| {
        stopped = match stamp {
            TimeEncoding::Stopped => true,
            TimeEncoding::Absolute => false,
            TimeEncoding::Delta => stopped,
        };
        stopped
    });
    all.collect()
}
