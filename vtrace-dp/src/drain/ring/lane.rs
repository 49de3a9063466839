//! One CPU's pages: bytes of a ring become whole pages at their final place.
//!
//! In:    spans of guest memory, in the order of the byte stream; a page may begin and end anywhere in them
//! Out:   batches for a sink, counts
//! Runs:  on the worker's thread
//! Full:  pages past the end of the area (unless it begins again there) and all pages after a failed write are refused
//!        and counted; only the time of a write ever blocks the guest
//! Trust: the guest with nothing: headers are copied, then checked; what the file gets comes from guest memory later and
//!        may differ, so readers check again. Pages are framed by their size alone: a refused page does not shift the next.

use std::{collections::VecDeque, sync::Arc};

use vtrace_common::{
    page::{HEADER_BYTES, Header},
    wire::client::{Area, LaneLedger},
};

use crate::{
    drain::{ledger::Counters, sink::Sink},
    sys::write_all::Written,
    virtq::memory::{Batch, Mark, Outside, Span},
};

/// Queued writes of one lane: those under way, and those that follow one under way. Consecutive finished writes count
/// as one.
const FLIGHTS_MAX: usize = 2 * crate::drain::sink::direct::WRITES_MAX + 2;
/// Bits of a tag that count a lane's writes; the bits above are the lane's.
const NUMBER_BITS: u32 = 32;

/// A lane: its area, the page it is in the middle of, its counts.
#[derive(Debug)]
pub struct RingLane {
    area: Area,
    page_bytes: u32,
    counters: Arc<Counters>,
    counts: LaneLedger,
    /// Bytes received.
    bytes_in: u64,
    /// Pages whose bytes are all in the file or in the batch.
    pages_kept: u64,
    /// Bytes of the current page that have come.
    page_have: u32,
    verdict: Verdict,
    header: [u8; HEADER_BYTES],
    /// Where the current page begins in the batch.
    mark: Mark,
    /// Pages were refused since the last one that was kept: the next one says so.
    gap: bool,
    /// Bytes given to the sink since the lane's first; the batch follows them.
    submitted: u64,
    /// End of what was ever written.
    written_end: u64,
    /// Writes that are under way, and those that follow one under way; in order.
    flights: VecDeque<Flight>,
    /// Tag of the next write.
    tag: u64,
    /// Chains whose bytes are all in the batch, or refused.
    chains_held: usize,
    /// Chains to be given back: all their bytes, and all before them, are in the file or refused.
    chains_done: usize,
}

/// A write that was given to the sink.
#[derive(Debug)]
struct Flight {
    tag: u64,
    start: u64,
    bytes: u64,
    /// Chains that end with it.
    chains: usize,
    /// How far it came, when that is known.
    written: Option<Written>,
}

/// What is known of the current page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    /// Its header has not come as a whole.
    Open,
    /// It goes to the file.
    Keep,
    /// It does not.
    Refuse,
}

impl RingLane {
    /// A lane that has received nothing. `page_bytes` is at least a header.
    pub fn new(area: Area, page_bytes: u32, counters: Arc<Counters>) -> Self {
        Self {
            area,
            page_bytes,
            counters,
            counts: LaneLedger { cpu: area.cpu, ..LaneLedger::default() },
            bytes_in: 0,
            pages_kept: 0,
            page_have: 0,
            verdict: Verdict::Open,
            header: [0; HEADER_BYTES],
            mark: Mark::default(),
            gap: false,
            submitted: 0,
            written_end: 0,
            flights: VecDeque::with_capacity(FLIGHTS_MAX),
            tag: 0,
            chains_held: 0,
            chains_done: 0,
        }
    }

    /// Tells this lane's writes from those of other lanes of its sink.
    pub(super) fn number(&mut self, number: usize) {
        self.tag = u64::try_from(number).expect("lanes are few") << NUMBER_BITS;
    }

    /// Whose write it was: what [`RingLane::number`] was given.
    pub(super) fn numbered(tag: u64) -> usize {
        usize::try_from(tag >> NUMBER_BITS).expect("a lane's number")
    }

    /// Takes the next bytes of the stream. They are in the file, or refused, once [`RingLane::write`] was called. `batch` is
    /// this lane's own; it is written when it is full. Hot.
    pub fn accept(&mut self, mut span: Span, batch: &mut Batch, sink: &mut dyn Sink) -> Result<(), Outside> {
        self.bytes_in += u64::from(span.bytes);
        while span.bytes > 0 {
            let piece = Span { gpa: span.gpa, bytes: span.bytes.min(self.page_bytes - self.page_have) };
            self.piece(piece, batch, sink)?;
            span = Span { gpa: span.gpa + u64::from(piece.bytes), bytes: span.bytes - piece.bytes };
        }
        Ok(())
    }

    /// Takes bytes of one page.
    fn piece(&mut self, mut piece: Span, batch: &mut Batch, sink: &mut dyn Sink) -> Result<(), Outside> {
        let bytes = piece.bytes;
        if self.page_have == 0 {
            self.mark = batch.mark();
            self.verdict = if self.room() { Verdict::Open } else { Verdict::Refuse };
        }
        if self.verdict == Verdict::Open {
            let own = self.examine(piece, batch, sink)?;
            piece = Span { gpa: piece.gpa + u64::from(own), bytes: piece.bytes - own };
        }
        while self.verdict != Verdict::Refuse && piece.bytes > 0 && !batch.push(piece)? {
            self.write(batch, sink);
        }
        self.page_have += bytes;
        if self.page_have == self.page_bytes {
            self.end_page();
            // What comes next has its place at the start of the area: no write goes across the end.
            if self.area.is_at_start(self.kept_bytes()) {
                self.write(batch, sink);
            }
        }
        Ok(())
    }

    fn room(&self) -> bool {
        self.counts.write_errno == 0 && self.area.room(self.kept_bytes()) >= u64::from(self.page_bytes)
    }

    /// Copies what `piece` has of the header; decides once all of it is there. Gives how many bytes of the piece are not
    /// to be taken from the guest.
    fn examine(&mut self, piece: Span, batch: &mut Batch, sink: &mut dyn Sink) -> Result<u32, Outside> {
        let have = usize::try_from(self.page_have).expect("less than a header");
        let copied = batch.memory().copy_out(piece, &mut self.header[have..])?;
        if have + copied < HEADER_BYTES {
            return Ok(0);
        }
        let page_bytes = usize::try_from(self.page_bytes).expect("PAGE_BYTES_MAX fits");
        let Ok(header) = Header::parse(&self.header, page_bytes) else {
            batch.rewind(self.mark);
            self.submitted = self.submitted.min(self.kept_bytes());
            self.verdict = Verdict::Refuse;
            return Ok(0);
        };
        self.verdict = Verdict::Keep;
        // Where the file has the beginning of its header already, the next page bears the mark.
        if !self.gap || self.submitted > self.kept_bytes() {
            return Ok(0);
        }
        self.gap = false;
        if header.missed {
            return Ok(0);
        }
        self.mark_gap(header, batch, sink);
        Ok(u32::try_from(copied).expect("at most a header"))
    }

    /// Puts a header that says that events were lost into the place of the guest's. Rare.
    fn mark_gap(&mut self, header: Header, batch: &mut Batch, sink: &mut dyn Sink) {
        let commit = Header { missed: true, missed_stored: false, ..header }.commit();
        self.header[HEADER_BYTES - 8..].copy_from_slice(&commit.to_le_bytes());
        batch.rewind(self.mark);
        if !batch.push_own(&self.header) {
            self.write(batch, sink);
            assert!(batch.push_own(&self.header), "an empty batch has room for a header");
        }
    }

    fn end_page(&mut self) {
        self.counts.ledger.pages_in += 1;
        match self.verdict {
            Verdict::Refuse => {
                self.counts.ledger.pages_lost += 1;
                self.gap = true;
            }
            Verdict::Open | Verdict::Keep => self.pages_kept += 1,
        }
        self.page_have = 0;
    }

    /// Bytes of the pages before the current one, from the lane's first on.
    fn kept_bytes(&self) -> u64 {
        self.pages_kept * u64::from(self.page_bytes)
    }

    /// Bytes were lost on the way: the next page says so.
    pub(super) fn lost(&mut self) {
        self.gap = true;
    }

    /// A chain has ended: all its bytes were accepted. Hot.
    pub(super) fn chain_ended(&mut self) {
        self.chains_held += 1;
    }

    /// Chains that may be given back, in their order; they are counted once. Hot.
    pub(super) fn chains_done(&mut self) -> usize {
        std::mem::take(&mut self.chains_done)
    }

    /// Gives no chain back: their ring is gone.
    pub(super) fn forget_chains(&mut self) {
        self.flights.iter_mut().for_each(|flight| flight.chains = 0);
        (self.chains_held, self.chains_done) = (0, 0);
    }

    /// Gives what is held to the sink, the beginning of a page too. What the batch holds of the guest's memory is needed
    /// until [`RingLane::chains_done`] says otherwise. Hot.
    pub fn write(&mut self, batch: &mut Batch, sink: &mut dyn Sink) {
        if self.counts.write_errno != 0 {
            batch.clear();
            self.mark = Mark::default();
        }
        let (start, bytes, tag) = (self.submitted, batch.bytes(), self.tag);
        let chains = std::mem::take(&mut self.chains_held);
        let mut written = Some(Written { bytes: 0, fault: None });
        if bytes > 0 {
            written = sink.submit(batch, self.area.place(start), tag);
            self.tag += 1;
            self.submitted = start + bytes;
            batch.clear();
            self.mark = Mark::default();
        }
        self.depart(Flight { tag, start, bytes, chains, written });
        self.arrive();
    }

    /// Queues a write. One that is over is counted with the one before it, if that is over too. Hot.
    fn depart(&mut self, flight: Flight) {
        if let Some(written) = flight.written.as_ref().filter(|written| written.bytes > 0) {
            self.written_end = self.written_end.max(flight.start + written.bytes);
        }
        match self.flights.back_mut() {
            Some(last) if flight.bytes == 0 => last.chains += flight.chains,
            Some(Flight { start, bytes, chains, written: Some(written), .. }) if flight.written.is_some() => {
                *chains += flight.chains;
                // After a fault nothing counts.
                if written.fault.is_none() {
                    (*start, *bytes) = (flight.start, flight.bytes);
                    *written = flight.written.expect("it is over");
                }
            }
            _ => self.flights.push_back(flight),
        }
    }

    /// A write that was under way has ended. Hot.
    pub(super) fn landed(&mut self, tag: u64, written: Written) {
        if let Some(flight) = self.flights.iter_mut().find(|flight| flight.tag == tag) {
            flight.written = Some(written);
        }
        self.arrive();
    }

    /// Counts finished writes, up to the first that is still under way. Hot.
    fn arrive(&mut self) {
        while let Some(Flight { start, bytes, chains, written: Some(written), .. }) =
            self.flights.pop_front_if(|flight| flight.written.is_some())
        {
            self.chains_done += chains;
            if written.bytes > 0 {
                self.written_end = self.written_end.max(start + written.bytes);
            }
            if bytes == 0 || self.counts.write_errno != 0 {
                continue;
            }
            match written.fault {
                None => self.count_out(start + bytes),
                Some(fault) => self.fail(start + written.bytes, fault.errno as i32),
            }
        }
        self.counters.publish(&self.counts);
    }

    /// The file has the pages in front of `end`, counted from the lane's first byte. Hot.
    fn count_out(&mut self, end: u64) {
        let page_bytes = u64::from(self.page_bytes);
        self.counts.ledger.set_out(end / page_bytes, page_bytes);
    }

    /// The lane ends at `end`. Everything after it is refused, including what the batch holds.
    fn fail(&mut self, end: u64, errno: i32) {
        self.count_out(end);
        let ledger = &mut self.counts.ledger;
        ledger.pages_lost += self.pages_kept - ledger.pages_out;
        self.pages_kept = ledger.pages_out;
        self.counts.write_errno = errno;
        self.verdict = Verdict::Refuse;
    }

    /// Bytes that have come.
    pub fn bytes_in(&self) -> u64 {
        self.bytes_in
    }

    /// Gives the whole pages that are held to the sink, and lets go of a page that is not whole.
    pub(super) fn end(&mut self, batch: &mut Batch, sink: &mut dyn Sink) {
        if self.verdict != Verdict::Refuse && self.page_have > 0 {
            batch.rewind(self.mark);
        }
        self.counts.bytes_torn += u64::from(std::mem::take(&mut self.page_have));
        self.write(batch, sink);
    }

    /// Writes the whole pages that are held, removes what the file has of a page that is not whole, and counts the rest:
    /// `bytes_sent` is what the agent says it sent, if it said anything. No write is under way, nor begins one that does
    /// not end at once.
    pub fn close(mut self, batch: &mut Batch, sink: &mut dyn Sink, bytes_sent: Option<u64>) -> LaneLedger {
        self.counts.bytes_missing = bytes_sent.map(|sent| sent.saturating_sub(self.bytes_in));
        self.end(batch, sink);
        let end = self.kept_bytes();
        // What a failed write left after the last page may be long. One page of it is erased; the rest is unused, like the
        // rest of the area.
        let torn = self.written_end.saturating_sub(end).min(u64::from(self.page_bytes));
        if torn > 0 {
            // If even that fails, readers find the end by the count of pages.
            let _ = sink.erase(self.area.place(end), torn);
        }
        assert!(self.flights.is_empty(), "a lane is closed when its writes have landed");
        assert!(self.counts.ledger.is_balanced(), "every page is in the file or lost: {:?}", self.counts);
        self.counts
    }
}

#[cfg(test)]
mod tests;
