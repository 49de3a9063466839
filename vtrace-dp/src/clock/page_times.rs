//! The times of one lane, page by page, in order.
//!
//! In:    the guest times of a page's events and how they were written; the first time of the next page
//! Out:   a [`Conversion`] for each, in order; what is shown never goes back
//! Runs:  on the thread that reads the lane
//! Full:  does not apply
//! Trust: pages come from guests: any times have an answer
//!
//! A page alone can look right in two places: that of a guest whose clock went back by a second looks the same a second
//! later, if it ran then. All pages behind it have to find a place too: [`LaneTimes::look_ahead`] goes through them before.
//!
//! [`super::table`] says which segment a time belongs to, [`super::stalled_times`] what becomes of times that stood still.

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

/// Places of pages to come that are remembered; beyond these only the next page is looked at.
const AHEAD_MAX: usize = 1 << 20;
/// A clock of more segments is not looked ahead for: the work grows with their number.
const AHEAD_SEGMENTS_MAX: usize = 1 << 12;

/// A way through one lane.
#[derive(Debug)]
pub struct LaneTimes<'a> {
    vcpu: &'a Vcpu,
    /// Behind the last event: the segment it was in, the earliest time it can have had, what was shown.
    position: Position,
    shown: HostTsc,
    candidates: Vec<Candidate>,
    /// For each event that is looked at: where its candidates begin.
    begins: Vec<usize>,
    /// The number of the page that comes next.
    number: u64,
    /// Where a page can begin, if that is less than its first time says.
    ahead: HashMap<u64, Vec<(usize, HostRange)>>,
}

/// Where the way has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Position {
    segment: usize,
    low: HostTsc,
}

/// One segment in which one event can be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Candidate {
    segment: usize,
    range: HostRange,
    in_run: bool,
    /// Some path in order leads from the page before to it.
    reached: bool,
    /// And from it to the end.
    usable: bool,
}

/// An event's guest time, and how it was written.
pub type StampedTime = (GuestTsc, TimeEncoding);

impl Table {
    /// Goes through a lane, from its first page on. `None`: nothing is known of its vCPU.
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

    /// Whose it is.
    pub fn cpu(&self) -> Cpu {
        self.vcpu.history.cpu()
    }

    /// Whether it is of use to look ahead.
    pub fn is_moved(&self) -> bool {
        (2..=AHEAD_SEGMENTS_MAX).contains(&self.vcpu.segments().len())
    }

    /// Goes through the numbers and first times of all pages, the last page first, before the way begins.
    pub fn look_ahead(&mut self, pages: impl Iterator<Item = (u64, GuestTsc)>) {
        let (mut behind, mut remembered): (Option<Vec<(usize, HostRange)>>, usize) = (None, 0);
        for (number, guest) in pages {
            let all = self.places(0, guest, self.position.low);
            let leads = |(segment, range): &(usize, HostRange)| {
                let follows = |(next, place): &(usize, HostRange)| next >= segment && place.high.0 >= range.low.0;
                behind.as_ref().is_none_or(|behind| behind.iter().any(follows))
            };
            let usable: Vec<_> = all.iter().copied().filter(leads).collect();
            if usable.is_empty() {
                continue;
            }
            if usable.len() < all.len() && remembered < AHEAD_MAX {
                remembered += usable.len();
                self.ahead.insert(number, usable.clone());
            }
            behind = Some(usable);
        }
    }

    /// Where a guest time can be, in this segment and behind it.
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

    /// Converts the events of the next page into `out`, which is emptied first. `next`: the time with which the page
    /// behind it begins, if there is one.
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

    /// All events lie in the segment of the last one, and could not lie in another: true for nearly every page. Hot.
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

    /// Weighs all segments for every event.
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
                // A clock that went back twice begins a second group.
                let again = events[at + 1..at + length].iter().position(|(_, stamp)| *stamp == TimeEncoding::Stopped);
                let length = again.map_or(length, |again| again + 1);
                self.release(&events[at..at + length], anchor, out);
                at += length;
            }
        }
    }

    /// Notes where each of these times can be, and the first one of the page behind them.
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
                // What does not fit together says nothing.
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

    /// Finds the candidates that a path in order goes through. With `in_runs`, false if no path has all events in runs
    /// that can be in one. Without, events that no path reaches are passed over.
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

    /// From the last event to the first: which candidates lead to the end.
    fn go_back(&mut self) {
        let mut behind: Option<Vec<(usize, HostTsc)>> = None;
        for event in (0..self.count()).rev() {
            let mut usable = Vec::new();
            let range = self.candidates_of(event);
            for candidate in self.candidates[range].iter_mut().filter(|candidate| candidate.reached) {
                let leads =
                    |(segment, high): &(usize, HostTsc)| *segment >= candidate.segment && *high >= candidate.range.low;
                candidate.usable = behind.as_ref().is_none_or(|behind| behind.iter().any(leads));
                if candidate.usable {
                    usable.push((candidate.segment, candidate.range.high));
                }
            }
            if !usable.is_empty() {
                behind = Some(usable);
            }
        }
    }

    /// What can be used of an event's candidates, from where the way has come.
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

    /// A time that fits nowhere: by the last segment, but not before the last event and not behind that segment.
    fn foreign(&self, guest: GuestTsc) -> Conversion {
        let Position { segment, low } = self.position;
        let place = self.vcpu.segments()[segment].pair.to_host_or_next(guest, low).middle();
        let at = place.min(self.vcpu.until(segment).high).max(low);
        Conversion { at, possible: HostRange::at(at), certainty: Certainty::Foreign }
    }

    /// Places events whose clock had gone back: between the last event before them and the first behind.
    fn release(&mut self, events: &[StampedTime], anchor: usize, out: &mut Vec<Conversion>) {
        let first = events[0].0;
        let until = self.usable(anchor).map(|behind| behind.segment).max();
        let until = until.unwrap_or(self.vcpu.segments().len() - 1);
        let end = self.usable(anchor).map(|behind| behind.range.high).max().unwrap_or(HostTsc(u64::MAX));
        let steps = |segment: &usize| {
            let begun = self.vcpu.segments()[*segment];
            distance(begun.pair.to_guest(begun.from.low), first) < 0
        };
        let Some(segment) = (self.position.segment + 1..=until).find(steps) else {
            // The clock never went back: an interrupt came between, and the kernel did not know what had passed.
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

    /// One change: what is written of the events is right among themselves, and their runs say when they happened.
    fn fit(&mut self, events: &[StampedTime], segment: usize, between: HostRange, out: &mut Vec<Conversion>) {
        let (pair, first) = (self.vcpu.segments()[segment].pair, events[0].0);
        // Two guest times say how far apart they are up to one tick of theirs on either side.
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

    /// Several changes: they happened between the events around them, and no later than any of the segments has them.
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

    /// By the first segment from here on that has it.
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

/// Of which events the clock had gone back: from where it is written until the next absolute stamp.
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
