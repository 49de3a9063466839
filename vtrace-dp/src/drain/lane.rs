//! One CPU's pages: bytes of a ring become whole pages at their final place.
//!
//! In:    spans of guest memory, in the order of the byte stream; a page may begin and end anywhere in them
//! Out:   batches for a sink, counts
//! Runs:  on the worker's thread
//! Full:  pages behind the end of the area, and all pages after a write that failed, are refused and counted; nothing
//!        ever blocks the guest but the time a write takes
//! Trust: the guest with nothing: headers are copied, then checked; what the file gets comes from guest memory later and
//!        may differ, so readers check again. Pages are framed by their size alone: a refused page does not shift the next.

use std::sync::Arc;

use vtrace_common::{
    page::{HEADER_BYTES, Header},
    wire::client::Area,
};

use super::{
    ledger::{Counters, Ledger},
    sink::Sink,
};
use crate::device::memory::{Batch, Mark, Outside, Span};

/// A lane: its area, the page it is in the middle of, its counts.
#[derive(Debug)]
pub struct Lane {
    area: Area,
    page_bytes: u32,
    counters: Arc<Counters>,
    ledger: Ledger,
    /// Pages whose bytes are all in the file or in the batch.
    pages_kept: u64,
    /// Bytes of the current page that have come.
    page_have: u32,
    verdict: Verdict,
    header: [u8; HEADER_BYTES],
    /// Where the current page begins in the batch.
    mark: Mark,
    /// End of what was ever written to the area, from its beginning.
    written_end: u64,
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

impl Lane {
    /// A lane that has received nothing. `page_bytes` is at least a header.
    pub fn new(area: Area, page_bytes: u32, counters: Arc<Counters>) -> Self {
        let (ledger, pages_kept, page_have, written_end) = (Ledger::default(), 0, 0, 0);
        let (verdict, header, mark) = (Verdict::Open, [0; HEADER_BYTES], Mark::default());
        Self { area, page_bytes, counters, ledger, pages_kept, page_have, verdict, header, mark, written_end }
    }

    /// Takes the next bytes of the stream. They are in the file, or refused, once [`Lane::write`] was called. `batch` is
    /// this lane's own; it is written when it is full. Hot.
    pub fn accept(&mut self, mut span: Span, batch: &mut Batch, sink: &mut dyn Sink) -> Result<(), Outside> {
        self.ledger.bytes_in += u64::from(span.bytes);
        while span.bytes > 0 {
            let piece = Span { gpa: span.gpa, bytes: span.bytes.min(self.page_bytes - self.page_have) };
            self.piece(piece, batch, sink)?;
            span = Span { gpa: span.gpa + u64::from(piece.bytes), bytes: span.bytes - piece.bytes };
        }
        Ok(())
    }

    /// Takes bytes of one page.
    fn piece(&mut self, piece: Span, batch: &mut Batch, sink: &mut dyn Sink) -> Result<(), Outside> {
        if self.page_have == 0 {
            self.mark = batch.mark();
            self.verdict = if self.room() { Verdict::Open } else { Verdict::Refuse };
        }
        if self.verdict == Verdict::Open {
            self.examine(piece, batch)?;
        }
        while self.verdict != Verdict::Refuse && !batch.push(piece)? {
            self.write(batch, sink);
        }
        self.page_have += piece.bytes;
        if self.page_have == self.page_bytes {
            self.end_page();
        }
        Ok(())
    }

    fn room(&self) -> bool {
        let end = (self.pages_kept + 1).checked_mul(u64::from(self.page_bytes));
        self.ledger.write_errno == 0 && end.is_some_and(|end| end <= self.area.bytes_max)
    }

    /// Copies what `piece` has of the header; decides once all of it is there.
    fn examine(&mut self, piece: Span, batch: &mut Batch) -> Result<(), Outside> {
        let have = usize::try_from(self.page_have).expect("less than a header");
        let copied = batch.memory().copy_out(piece, &mut self.header[have..])?;
        if have + copied < HEADER_BYTES {
            return Ok(());
        }
        let page_bytes = usize::try_from(self.page_bytes).expect("PAGE_BYTES_MAX fits");
        self.verdict = match Header::parse(&self.header, page_bytes) {
            Ok(_) => Verdict::Keep,
            Err(_) => {
                batch.rewind(self.mark);
                Verdict::Refuse
            }
        };
        Ok(())
    }

    fn end_page(&mut self) {
        self.ledger.pages_in += 1;
        match self.verdict {
            Verdict::Refuse => self.ledger.pages_refused += 1,
            Verdict::Open | Verdict::Keep => self.pages_kept += 1,
        }
        self.page_have = 0;
    }

    /// Where the batch ends, from the beginning of the area.
    fn batch_end(&self) -> u64 {
        let partial = if self.verdict == Verdict::Refuse { 0 } else { u64::from(self.page_have) };
        self.pages_kept * u64::from(self.page_bytes) + partial
    }

    /// Writes what is held, the beginning of a page too: then nothing of the guest's memory is needed any more. Hot.
    pub fn write(&mut self, batch: &mut Batch, sink: &mut dyn Sink) {
        if batch.bytes() > 0 {
            let start = self.batch_end() - batch.bytes();
            let written = sink.write(batch, self.area.offset + start);
            self.written_end = self.written_end.max(start + written.bytes);
            match written.fault {
                None => self.ledger.pages_out = self.pages_kept,
                Some(fault) => self.fail(start + written.bytes, fault.raw_os_error().unwrap_or(libc::EIO)),
            }
            batch.clear();
            self.mark = Mark::default();
        }
        self.counters.publish(&self.ledger);
    }

    /// The area ends at `end`; what was to come behind is refused, from now on.
    fn fail(&mut self, end: u64, errno: i32) {
        self.ledger.pages_out = end / u64::from(self.page_bytes);
        self.ledger.pages_refused += self.pages_kept - self.ledger.pages_out;
        self.pages_kept = self.ledger.pages_out;
        self.ledger.write_errno = errno;
        self.verdict = Verdict::Refuse;
    }

    /// Bytes that have come.
    pub fn bytes_in(&self) -> u64 {
        self.ledger.bytes_in
    }

    /// Writes the whole pages that are held, removes what the file has of a page that is not whole, and counts the rest:
    /// `bytes_sent` is what the agent says it sent, if it said anything.
    pub fn close(mut self, batch: &mut Batch, sink: &mut dyn Sink, bytes_sent: Option<u64>) -> Ledger {
        if self.verdict != Verdict::Refuse && self.page_have > 0 {
            batch.rewind(self.mark);
        }
        self.ledger.bytes_torn = u64::from(std::mem::take(&mut self.page_have));
        self.ledger.bytes_missing = bytes_sent.map_or(0, |sent| sent.saturating_sub(self.ledger.bytes_in));
        self.write(batch, sink);
        let end = self.pages_kept * u64::from(self.page_bytes);
        if self.written_end > end {
            // If even that fails, readers find the end by the count of pages.
            let _ = sink.erase(self.area.offset + end, self.written_end - end);
        }
        assert!(self.ledger.balanced(), "a page is in the file or refused: {:?}", self.ledger);
        self.ledger
    }
}

#[cfg(test)]
mod tests;
