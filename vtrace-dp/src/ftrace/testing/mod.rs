//! Pages as a kernel's ring buffer makes them, for tests and measurements.
//!
//! In:    events of one CPU, in the order in which they happen, with what the trace clock said
//! Out:   whole pages
//! Runs:  anywhere
//! Full:  does not apply: pages are kept
//! Trust: its caller
//!
//! After `__rb_reserve_next()` and `rb_add_timestamp()` of kernel/trace/ring_buffer.c (the same before and after 6.8): the first
//! event of a page has the page's time, a later one what passed since, a long time goes into a time extend, and a clock that
//! went back into a time extend of zero.

use vtrace_common::page::HEADER_BYTES;

const TIME_EXTEND: u32 = 30;
const TIME_STAMP: u32 = 31;
const DELTA_BITS: u32 = 27;
/// What is longer, the kernel takes for a clock that went back.
const DELTA_MAX: u64 = 1 << 59;

/// One CPU's ring buffer, as large as it has to be.
#[derive(Clone, Debug)]
pub struct RingBuffer {
    page_bytes: usize,
    pages: Vec<u8>,
    page: Vec<u8>,
    write_stamp: u64,
}

impl RingBuffer {
    /// An empty one.
    pub fn new(page_bytes: usize) -> Self {
        Self { page_bytes, pages: Vec::new(), page: Vec::new(), write_stamp: 0 }
    }

    /// An event, when the clock says `time`. True if the clock had gone back within the page, so that the time is lost.
    pub fn push(&mut self, time: u64, data: &[u8]) -> bool {
        let delta = time.wrapping_sub(self.write_stamp);
        let stamp = if self.page.is_empty() || delta >> DELTA_BITS == 0 { 0 } else { 8 };
        let event = event_bytes(data.len());
        if !self.page.is_empty() && self.page.len() + stamp + event > self.page_bytes {
            self.next_page();
            return self.push(time, data);
        }
        let is_first = self.page.is_empty();
        if is_first {
            self.page.extend(time.to_le_bytes());
            self.page.extend([0; HEADER_BYTES - 8]);
        }
        let went_back = !is_first && delta > DELTA_MAX;
        let delta = if is_first || went_back { 0 } else { delta };
        self.write_stamp = time;
        if stamp > 0 {
            self.long(TIME_EXTEND, delta);
            self.event(0, data);
        } else {
            self.event(delta, data);
        }
        went_back
    }

    /// An event that interrupted another one's reservation: its time is written as a whole.
    pub fn push_absolute(&mut self, time: u64, data: &[u8]) {
        if self.page.is_empty() || self.page.len() + 8 + event_bytes(data.len()) > self.page_bytes {
            self.push(time, data);
            return;
        }
        self.write_stamp = time;
        self.long(TIME_STAMP, time & (DELTA_MAX - 1));
        self.event(0, data);
    }

    /// Ends the page, as a reader does.
    pub fn next_page(&mut self) {
        if self.page.is_empty() {
            return;
        }
        let bytes = self.page.len() - HEADER_BYTES;
        self.page[8..HEADER_BYTES].copy_from_slice(&u64::try_from(bytes).expect("small").to_le_bytes());
        self.page.resize(self.page_bytes, 0);
        self.pages.append(&mut self.page);
    }

    /// All pages.
    pub fn pages(mut self) -> Vec<u8> {
        self.next_page();
        self.pages
    }

    fn long(&mut self, kind: u32, time: u64) {
        let low = u32::try_from(time & ((1 << DELTA_BITS) - 1)).expect("masked");
        let high = u32::try_from(time >> DELTA_BITS).expect("59 bits at most");
        self.page.extend((kind | low << 5).to_le_bytes());
        self.page.extend(high.to_le_bytes());
    }

    fn event(&mut self, delta: u64, data: &[u8]) {
        let delta = u32::try_from(delta).expect("27 bits") << 5;
        let (words, rest) = (data.len().div_ceil(4), data.len().next_multiple_of(4) - data.len());
        match u32::try_from(words) {
            Ok(words @ 1..=28) => self.page.extend((words | delta).to_le_bytes()),
            _ => {
                self.page.extend(delta.to_le_bytes());
                self.page.extend(u32::try_from(words * 4 + 4).expect("less than a page").to_le_bytes());
            }
        }
        self.page.extend(data);
        self.page.extend(std::iter::repeat_n(0, rest));
    }
}

/// What an event takes without its time.
fn event_bytes(data: usize) -> usize {
    let words = data.div_ceil(4);
    4 + 4 * words + if (1..=28).contains(&words) { 0 } else { 4 }
}
