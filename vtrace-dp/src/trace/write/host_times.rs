//! Rewrites pages with the host's times, for guests whose clock no time shift can describe.
//!
//! In:    the pages of a lane in a file that is being written; a way through the lane's clock; a free place in the file
//! Out:   the same events with host times, at that place; how many, and how sure
//! Runs:  on the caller's thread, when all pages are in the file and before its holes are collapsed
//! Full:  events that no longer fit their page continue on an added page: [`room_bytes`] are enough; a full disk is an
//!        error, and leaves the lane as it was
//! Trust: pages come from guests: one that cannot be walked is cut where it breaks, and that is counted
//!
//! A page is laid out anew: its header has the first event's time, and each event the time since the previous one, in
//! its own 27 bits where that fits, else in a time extend of 8 bytes before it. Entries that carry only time or nothing
//! (time extends, absolute stamps, discarded events) are left out, which nearly always makes room for the extends that
//! a slower guest needs more of. No time is rounded to fit. All else stays: event bytes, order, and the count of lost
//! events.
//!
//! Pages are read and written a mebibyte at a time. The guest's own pages are only read: a kill loses nothing, and the
//! lane is started again ([`mod@super::host_lanes`]).

use std::{fs::File, io, os::unix::fs::FileExt};

use vtrace_common::{
    ids::Cpu,
    page::{HEADER_BYTES, Header, MISSED_EVENTS, MISSED_STORED},
    time::{GuestTsc, HostTsc},
};

use crate::{
    clock::{
        page_times::{LaneTimes, StampedTime},
        table::{Certainty, Conversion},
    },
    ftrace::events::{Event, Events, TimeEncoding},
    trace::format::{
        areas::Extent,
        uncertainty::{Uncertainty, UncertaintyList},
    },
};

const CHUNK_BYTES: usize = 1 << 20;
/// Type of a time extend's word.
const TIME_EXTEND: u32 = 30;
const TYPE_BITS: u32 = 5;
const TYPE_MASK: u32 = (1 << TYPE_BITS) - 1;
/// Bits of time in an event's word.
const DELTA_BITS: u32 = 27;
/// Bits of time in a time extend.
const EXTEND_BITS: u32 = DELTA_BITS + 32;
const EXTEND_BYTES: usize = 8;
/// Where a page is continued because the time between two events does not fit a time extend: at most once in so many
/// cycles, so never more often in a lane than this.
const LEAPS_MAX: u64 = 1 << (64 - EXTEND_BITS);

/// Why a lane's times could not be rewritten.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} pages at {offset:#x}")]
pub struct RewriteFault {
    /// What was tried.
    action: &'static str,
    /// Offset of the pages in the file.
    offset: u64,
    /// Why it failed.
    source: io::Error,
}

/// What was done to a lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rewritten {
    /// What its pages take now: the lane's length from now on.
    pub bytes: u64,
    /// Pages that were there.
    pub pages: u64,
    /// Pages that were added because a page's events did not fit it any more.
    pub pages_added: u64,
    /// Pages that were cut where they could not be walked.
    pub pages_cut: u64,
    /// Events.
    pub events: u64,
    /// Of these: [`Certainty::Unsure`].
    pub unsure: u64,
    /// Of these: [`Certainty::Trapped`].
    pub trapped: u64,
    /// Of these: [`Certainty::Foreign`].
    pub foreign: u64,
    /// The largest error of any that is not foreign, host ticks.
    pub error_max: u64,
}

impl Rewritten {
    /// Adds what was done to another lane.
    pub fn join(&mut self, other: &Self) {
        self.bytes += other.bytes;
        self.pages += other.pages;
        self.pages_added += other.pages_added;
        self.pages_cut += other.pages_cut;
        self.events += other.events;
        self.unsure += other.unsure;
        self.trapped += other.trapped;
        self.foreign += other.foreign;
        self.error_max = self.error_max.max(other.error_max);
    }

    fn count(&mut self, conversions: &[Conversion]) {
        for conversion in conversions {
            self.events += 1;
            match conversion.certainty {
                Certainty::Exact => {}
                Certainty::Unsure => self.unsure += 1,
                Certainty::Trapped => self.trapped += 1,
                Certainty::Foreign => self.foreign += 1,
            }
            self.error_max = self.error_max.max(conversion.error());
        }
    }
}

/// Bytes that the pages of a lane of `bytes` bytes take at most, once they are rewritten.
pub fn room_bytes(bytes: u64, page_bytes: u32) -> u64 {
    // Every page can need a second one.
    bytes.saturating_mul(2).saturating_add(LEAPS_MAX * u64::from(page_bytes))
}

/// Writes the pages of `from`, first those of its first part, with host times to `to`, where [`room_bytes`] are free. Gives
/// what was done, and which times are not exact.
///
/// # Errors
/// See [`RewriteFault`]: what is at `to` is of no use then, `from` is as it was.
pub fn rewrite(
    file: &File,
    from: [Extent; 2],
    to: u64,
    page_bytes: u32,
    lane: LaneTimes<'_>,
) -> Result<(Rewritten, Vec<Uncertainty>), RewriteFault> {
    let place = StoredLane { file, parts: from, page_bytes };
    let pages = place.pages();
    let done = Rewritten { pages, ..Rewritten::default() };
    let mut lane = lane;
    if lane.is_moved() {
        place.look_ahead(pages, &mut lane)?;
    }
    let (cpu, rewriter, uncertainties) = (lane.cpu(), PageRewriter::default(), UncertaintyList::default());
    let mut pass = Pass { place, to, cpu, lane, rewriter, out: Vec::new(), done, uncertainties };
    pass.forward(pages)?;
    pass.done.pages_added = pass.done.bytes / u64::from(page_bytes) - pages;
    Ok((pass.done, pass.uncertainties.into_list()))
}

/// Where a lane lies.
struct StoredLane<'a> {
    file: &'a File,
    parts: [Extent; 2],
    page_bytes: u32,
}

struct Pass<'a> {
    place: StoredLane<'a>,
    to: u64,
    cpu: Cpu,
    lane: LaneTimes<'a>,
    rewriter: PageRewriter,
    /// Pages to be written.
    out: Vec<u8>,
    done: Rewritten,
    uncertainties: UncertaintyList,
}

impl Pass<'_> {
    fn forward(&mut self, pages: u64) -> Result<(), RewriteFault> {
        let page_bytes = usize::try_from(self.place.page_bytes).expect("u32 fits");
        let step = u64::try_from((CHUNK_BYTES / page_bytes).max(1)).expect("small");
        let mut chunk = Vec::new();
        for first in (0..pages).step_by(usize::try_from(step).expect("small")) {
            let count = step.min(pages - first);
            // Read one header more: the next page's time narrows what the last page's times can mean.
            let ahead = if first + count < pages { HEADER_BYTES } else { 0 };
            chunk.resize(usize::try_from(count).expect("small") * page_bytes + ahead, 0);
            self.place.read(&mut chunk, first)?;
            for number in 0..count {
                let at = usize::try_from(number).expect("small") * page_bytes;
                self.one(&chunk[at..], page_bytes);
            }
            self.write()?;
        }
        Ok(())
    }

    /// Rewrites the page at the start of `rest`.
    fn one(&mut self, rest: &[u8], page_bytes: usize) {
        let (page, following) = rest.split_at(page_bytes);
        let next = Header::parse(following, page_bytes).ok().filter(|header| header.data_bytes > 0);
        let next = next.map(|header| GuestTsc(header.time));
        let is_whole = self.rewriter.rewrite(page, next, &mut self.lane);
        self.done.pages_cut += u64::from(!is_whole);
        self.done.count(&self.rewriter.conversions);
        self.uncertainties.look(self.cpu, &self.rewriter.conversions);
        self.out.extend(&self.rewriter.out);
    }

    fn write(&mut self) -> Result<(), RewriteFault> {
        let offset = self.to + self.done.bytes;
        let written = self.place.file.write_all_at(&self.out, offset);
        written.map_err(|source| RewriteFault { action: "write", offset, source })?;
        self.done.bytes += u64::try_from(self.out.len()).expect("usize has at most 64 bits");
        self.out.clear();
        Ok(())
    }
}

impl StoredLane<'_> {
    fn pages(&self) -> u64 {
        self.parts.iter().map(|part| part.bytes / u64::from(self.page_bytes)).sum()
    }

    /// Shows the lane's way the first times of all its pages.
    fn look_ahead(&self, pages: u64, lane: &mut LaneTimes<'_>) -> Result<(), RewriteFault> {
        let mut failed = Ok(());
        let first_time = |number: u64| -> Result<Option<GuestTsc>, RewriteFault> {
            let mut header = [0; HEADER_BYTES];
            self.read(&mut header, number)?;
            let page_bytes = usize::try_from(self.page_bytes).expect("u32 fits");
            let header = Header::parse(&header, page_bytes).ok().filter(|header| header.data_bytes > 0);
            Ok(header.map(|header| GuestTsc(header.time)))
        };
        let times = (0..pages).rev().map_while(|number| match first_time(number) {
            Ok(time) => Some((number, time)),
            Err(fault) => {
                failed = Err(fault);
                None
            }
        });
        lane.look_ahead(times.filter_map(|(number, time)| Some((number, time?))));
        failed
    }

    /// Reads from the start of `page` on, over the end of the first part too.
    fn read(&self, buffer: &mut [u8], page: u64) -> Result<(), RewriteFault> {
        let page_bytes = u64::from(self.page_bytes);
        let [first, second] = self.parts.map(|part| part.bytes / page_bytes);
        let in_first = first.saturating_sub(page).min(second + first);
        let bytes = usize::try_from(in_first * page_bytes).map_or(buffer.len(), |bytes| bytes.min(buffer.len()));
        let (front, back) = buffer.split_at_mut(bytes);
        let at = [(front, self.parts[0], page), (back, self.parts[1], page.saturating_sub(first))];
        for (buffer, part, page) in at.into_iter().filter(|(buffer, ..)| !buffer.is_empty()) {
            let offset = part.offset + page * page_bytes;
            let read = self.file.read_exact_at(buffer, offset);
            read.map_err(|source| RewriteFault { action: "read", offset, source })?;
        }
        Ok(())
    }
}

/// Lays out one page anew. Its buffers are used again for the next.
#[derive(Debug, Default)]
struct PageRewriter {
    times: Vec<StampedTime>,
    /// From where to where each event lies.
    spans: Vec<(usize, usize)>,
    conversions: Vec<Conversion>,
    /// One page or more.
    out: Vec<u8>,
}

impl PageRewriter {
    /// Puts the page's events with host times into `out`. False if the page was cut.
    fn rewrite(&mut self, page: &[u8], next: Option<GuestTsc>, lane: &mut LaneTimes<'_>) -> bool {
        self.times.clear();
        self.spans.clear();
        let (header, lost, is_whole) = self.walk(page);
        if self.times.is_empty() {
            // Nothing but a time: it is shown nowhere, and stays in order.
            lane.page(&[(GuestTsc(header.time), TimeEncoding::Delta)], next, &mut self.conversions);
        } else {
            lane.page(&self.times, next, &mut self.conversions);
        }
        self.layout(page, header, lost);
        if self.times.is_empty() {
            self.conversions.clear();
        }
        is_whole
    }

    /// Notes the events of a page, up to where it cannot be walked.
    fn walk(&mut self, page: &[u8]) -> (Header, Option<u64>, bool) {
        let empty = Header { time: 0, data_bytes: 0, missed: false, missed_stored: false };
        let Ok(events) = Events::new(page) else { return (empty, None, false) };
        let (header, lost) = (events.header(), events.lost());
        for event in events {
            let Ok(Event { time, data, at, stamp }) = event else { return (header, lost, false) };
            let data_at = data.as_ptr().addr() - page.as_ptr().addr();
            self.times.push((GuestTsc(time), stamp));
            self.spans.push((at, (data_at + data.len()).next_multiple_of(4)));
        }
        (header, lost, true)
    }

    /// Writes the events into as many pages as they need. Hot.
    fn layout(&mut self, page: &[u8], header: Header, lost: Option<u64>) {
        let stored = if lost.is_some() { 8 } else { 0 };
        let mut builder =
            PageBuilder { out: &mut self.out, page_bytes: page.len(), begin: 0, room: page.len() - stored };
        builder.out.clear();
        let first = self.conversions.first().map_or(HostTsc(0), |conversion| conversion.at);
        builder.open(first);
        let mut before = first.0;
        for ((start, end), conversion) in self.spans.iter().zip(&self.conversions) {
            let record = &page[*start..*end];
            let delta = conversion.at.0.saturating_sub(before);
            if !builder.push(record, delta) {
                let flags = if builder.begin == 0 { flags(header, lost) } else { 0 };
                builder.close(flags, lost.filter(|_| flags != 0));
                builder.open(conversion.at);
                assert!(builder.push(record, 0), "an event of one page fits another");
            }
            before = conversion.at.0;
        }
        let flags = if builder.begin == 0 { flags(header, lost) } else { 0 };
        builder.close(flags, lost.filter(|_| flags != 0));
    }
}

/// The bits of the commit word that say that events were lost, as the kernel writes them.
fn flags(header: Header, lost: Option<u64>) -> u64 {
    let said = Header { data_bytes: 0, missed_stored: lost.is_some(), ..header };
    said.commit()
}

/// The page that is being filled, at the end of `out`.
struct PageBuilder<'a> {
    out: &'a mut Vec<u8>,
    page_bytes: usize,
    begin: usize,
    /// Bytes of a page that events may take with its header.
    room: usize,
}

impl PageBuilder<'_> {
    fn open(&mut self, time: HostTsc) {
        self.begin = self.out.len();
        self.out.extend(time.0.to_le_bytes());
        self.out.extend([0; HEADER_BYTES - 8]);
    }

    /// Appends an event; false if it does not fit. Hot.
    fn push(&mut self, record: &[u8], delta: u64) -> bool {
        let Some((word, data)) = record.split_first_chunk::<4>() else { return true };
        let is_short = delta >> DELTA_BITS == 0;
        let bytes = record.len() + if is_short { 0 } else { EXTEND_BYTES };
        if self.out.len() - self.begin + bytes > self.room || delta >> EXTEND_BITS != 0 {
            return false;
        }
        let low = u32::try_from(delta & ((1 << DELTA_BITS) - 1)).expect("masked to 27 bits") << TYPE_BITS;
        let kind = u32::from_le_bytes(*word) & TYPE_MASK;
        if is_short {
            self.out.extend((kind | low).to_le_bytes());
        } else {
            let high = u32::try_from(delta >> DELTA_BITS).expect("compared above");
            self.out.extend((TIME_EXTEND | low).to_le_bytes());
            self.out.extend(high.to_le_bytes());
            self.out.extend(kind.to_le_bytes());
        }
        self.out.extend(data);
        true
    }

    /// Says how long the data is, and what was lost before it; fills the page with zeros.
    fn close(&mut self, flags: u64, lost: Option<u64>) {
        let bytes = self.out.len() - self.begin - HEADER_BYTES;
        let commit = u64::try_from(bytes).expect("usize has at most 64 bits") | flags;
        self.out[self.begin + 8..self.begin + HEADER_BYTES].copy_from_slice(&commit.to_le_bytes());
        if let Some(lost) = lost {
            self.out.extend(lost.to_le_bytes());
        }
        self.out.resize(self.begin + self.page_bytes, 0);
        self.room = self.page_bytes;
    }
}

const _: () = assert!(MISSED_EVENTS > 1 << DELTA_BITS && MISSED_STORED > 1 << DELTA_BITS);

#[cfg(test)]
mod tests;
