//! The events of one page.
//!
//! In:    a page as the kernel's ring buffer laid it out
//! Out:   events with their time stamps, raw, in the trace clock's unit
//! Runs:  anywhere
//! Trust: nothing: pages come from guests
//!
//! Source: kernel/trace/ring_buffer.c and include/linux/ring_buffer.h (`enum ring_buffer_type`); time is counted as
//! libtraceevent's kbuffer-parse.c counts it, so that what is shown here is what stock tools show.

use std::ops::Range;

use vtrace_common::page::{self, HEADER_BYTES, Header};

const PADDING: u32 = 29;
const TIME_EXTEND: u32 = 30;
const TIME_STAMP: u32 = 31;
/// Bits of time in an event's first word.
const DELTA_BITS: u32 = 27;
/// An absolute stamp has 59 bits; the upper five come from the page's.
const STAMP_UPPER: u64 = 0xf8 << 56;

/// One event.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Event<'a> {
    /// When, in the trace clock's unit.
    pub time: u64,
    /// What: begins with the event's id (u16).
    pub data: &'a [u8],
    /// Bytes from the start of the page to its first word.
    pub at: usize,
    /// How its time was written.
    pub stamp: TimeEncoding,
}

/// How the time of an event was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TimeEncoding {
    /// As what passed since the event, or the page, before it.
    Delta,
    /// As nothing passed, in the long form for what is too long for the short one: the writer's clock had gone back
    /// (`rb_add_timestamp()`: a time extend of zero that is not the page's first word). What follows counts from here.
    Stopped,
    /// As a whole.
    Absolute,
}

/// Why a page cannot be walked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PageFault {
    /// Its header is refused.
    #[error("the header of a page is refused: {0:?}")]
    Header(page::Fault),
    /// An event reaches beyond the data.
    #[error("the event at byte {at} of a page reaches beyond its end")]
    Event {
        /// Bytes from the start of the page.
        at: usize,
    },
}

/// The events of a page, one after the other. After an error there are no more.
#[derive(Clone, Debug)]
pub struct Events<'a> {
    page: &'a [u8],
    walk: Walk,
}

/// How far a page has been walked, for those who own the page.
#[derive(Clone, Debug)]
pub struct Walk {
    header: Header,
    at: usize,
    end: usize,
    time: u64,
    /// What stood in front of the next event.
    stamp: TimeEncoding,
    /// Of the event that was found last.
    event_at: usize,
    event_stamp: TimeEncoding,
}

impl<'a> Events<'a> {
    /// The events of `page`: header and data, the whole of it or up to the end of its data.
    ///
    /// # Errors
    /// The header is refused, or claims more data than `page` has.
    pub fn new(page: &'a [u8]) -> Result<Self, PageFault> {
        Ok(Self { page, walk: Walk::new(page)? })
    }

    /// The page's header.
    pub fn header(&self) -> Header {
        self.walk.header
    }

    /// How many events were lost before this page, if its writer knew.
    pub fn lost(&self) -> Option<u64> {
        let (header, end) = (self.walk.header, self.walk.end);
        let stored = header.missed && header.missed_stored;
        let bytes = self.page.get(end..end + 8).filter(|_| stored)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    }
}

impl<'a> Iterator for Events<'a> {
    type Item = Result<Event<'a>, PageFault>;

    fn next(&mut self) -> Option<Self::Item> {
        let found = self.walk.next(self.page)?;
        let (at, stamp) = (self.walk.event_at, self.walk.event_stamp);
        Some(found.map(|(time, range)| Event { time, data: &self.page[range], at, stamp }))
    }
}

impl Walk {
    /// At the start of `page`, which is given to every step again.
    ///
    /// # Errors
    /// As [`Events::new`].
    pub fn new(page: &[u8]) -> Result<Self, PageFault> {
        let header = Header::parse(page, page.len()).map_err(PageFault::Header)?;
        let data_bytes = usize::try_from(header.data_bytes).expect("Header::parse compared it with the page");
        let (at, end) = (HEADER_BYTES, HEADER_BYTES + data_bytes);
        Ok(Self {
            header,
            at,
            end,
            time: header.time,
            event_at: at,
            event_stamp: TimeEncoding::Delta,
            stamp: TimeEncoding::Delta,
        })
    }

    /// The page's header.
    pub fn header(&self) -> Header {
        self.header
    }

    /// The next event: its time, and where its data lies in `page`. After an error there are no more.
    pub fn next(&mut self, page: &[u8]) -> Option<Result<(u64, Range<usize>), PageFault>> {
        while self.at < self.end {
            match self.step(page) {
                Ok(Some(range)) => return Some(Ok((self.time, range))),
                Ok(None) => {}
                Err(fault) => {
                    self.at = self.end;
                    return Some(Err(fault));
                }
            }
        }
        None
    }

    fn word(&self, page: &[u8], at: usize) -> Result<u32, PageFault> {
        let data = page.get(..self.end).unwrap_or_default();
        let bytes = data.get(at..at + 4).ok_or(PageFault::Event { at: self.at })?;
        Ok(u32::from_le_bytes(bytes.try_into().expect("four bytes")))
    }

    /// Takes one record; `None` for one without data.
    fn step(&mut self, page: &[u8]) -> Result<Option<Range<usize>>, PageFault> {
        let word = self.word(page, self.at)?;
        let (kind, delta) = (word & 31, u64::from(word >> (32 - DELTA_BITS)));
        let data_at = match kind {
            TIME_EXTEND | TIME_STAMP => {
                let long = (u64::from(self.word(page, self.at + 4)?) << DELTA_BITS) + delta;
                let stamp = long | (self.time & STAMP_UPPER);
                self.time = if kind == TIME_STAMP { stamp } else { self.time.wrapping_add(long) };
                self.stamp = match (kind, long) {
                    (TIME_STAMP, _) => TimeEncoding::Absolute,
                    (_, 0) if self.at > HEADER_BYTES => TimeEncoding::Stopped,
                    _ => self.stamp,
                };
                self.at += 8;
                return Ok(None);
            }
            PADDING if delta == 0 => {
                self.at = self.end; // the rest of the page was never used
                return Ok(None);
            }
            PADDING | 0 => self.at + 4,
            _ => self.at,
        };
        self.time = self.time.wrapping_add(delta);
        let (start, bytes) = match kind {
            PADDING => (data_at, self.length(page, data_at)?), // a discarded event; its length counts this word
            0 => (data_at + 4, self.length(page, data_at)?.checked_sub(4).ok_or(PageFault::Event { at: self.at })?),
            words => (data_at + 4, usize::try_from(words * 4).expect("28 words at most")),
        };
        let end = start.checked_add(bytes).filter(|end| *end <= self.end).ok_or(PageFault::Event { at: self.at })?;
        // The length that is written counts bytes, the next event begins at a word.
        self.event_at = self.at;
        self.at = end.next_multiple_of(4).max(self.event_at + 4);
        if kind == PADDING {
            return Ok(None);
        }
        self.event_stamp = std::mem::replace(&mut self.stamp, TimeEncoding::Delta);
        Ok(Some(start..end))
    }

    fn length(&self, page: &[u8], at: usize) -> Result<usize, PageFault> {
        usize::try_from(self.word(page, at)?).map_err(|_| PageFault::Event { at: self.at })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page(time: u64, words: &[u32]) -> Vec<u8> {
        let mut page = [time.to_le_bytes(), (words.len() as u64 * 4).to_le_bytes()].concat();
        words.iter().for_each(|word| page.extend(word.to_le_bytes()));
        page
    }

    fn word(kind: u32, delta: u32) -> u32 {
        kind | delta << 5
    }

    fn times(page: &[u8]) -> Vec<u64> {
        Events::new(page).unwrap().map(|event| event.unwrap().time).collect()
    }

    #[test]
    fn deltas_extends_and_stamps_add_up() {
        let upper = 0x10 << 56;
        let words = [
            word(1, 0),
            7, // first event of the page
            word(TIME_EXTEND, 5),
            2, // 2 << 27 | 5
            word(2, 1),
            8,
            9,
            word(TIME_STAMP, 3),
            1, // absolute
            word(0, 4),
            8,
            10, // a long one: its length counts this word
        ];
        let page = page(upper + 1000, &words);
        let events: Vec<_> = Events::new(&page).unwrap().map(|event| event.unwrap()).collect();
        let second = upper + 1000 + (2 << 27) + 5 + 1;
        let third = upper + (1 << 27) + 3 + 4;
        assert_eq!(events.iter().map(|event| event.time).collect::<Vec<_>>(), [upper + 1000, second, third]);
        assert_eq!(events[1].data, [8, 0, 0, 0, 9, 0, 0, 0]);
        assert_eq!(events[2].data, [10, 0, 0, 0]);
    }

    #[test]
    fn event_at_which_the_clock_went_back_is_seen() {
        let extend = |long: u32| [word(TIME_EXTEND, 0), long];
        let event = [word(1, 4), 7];
        let words =
            [extend(0), event, extend(1), event, extend(0), event, event, [word(TIME_STAMP, 3), 1], event, event];
        let page = page(9, &words.concat());
        let stamps: Vec<_> = Events::new(&page).unwrap().map(|event| event.unwrap().stamp).collect();
        use TimeEncoding::{Absolute, Delta, Stopped};
        assert_eq!(stamps, [Delta, Delta, Stopped, Delta, Absolute, Delta], "the first word of a page may say zero");
    }

    #[test]
    fn discarded_event_is_passed_over_and_its_time_counts() {
        let page = page(0, &[word(PADDING, 3), 8, 0, word(1, 1), 7]);
        assert_eq!(times(&page), [4]);
    }

    #[test]
    fn nothing_follows_padding_without_time() {
        assert_eq!(times(&page(0, &[word(1, 1), 7, word(PADDING, 0), 0xffff_ffff, 1, 1])), [1]);
    }

    #[test]
    fn event_longer_than_its_page_is_refused() {
        let page = page(0, &[word(1, 0), 7, word(0, 0), 400, 1]);
        let events: Vec<_> = Events::new(&page).unwrap().collect();
        assert_eq!(events.len(), 2);
        assert_eq!(events[1], Err(PageFault::Event { at: 24 }));
    }

    #[test]
    fn lost_events_are_counted_where_the_count_is_stored() {
        let mut bytes = page(0, &[word(1, 0), 7]);
        bytes[8..16].copy_from_slice(&(8u64 | page::MISSED_EVENTS | page::MISSED_STORED).to_le_bytes());
        bytes.extend(12_345u64.to_le_bytes());
        assert_eq!(Events::new(&bytes).unwrap().lost(), Some(12_345));
        assert_eq!(Events::new(&bytes[..26]).unwrap().lost(), None);
    }

    proptest! {
        #[test]
        fn any_page_ends(time: u64, words in prop::collection::vec(any::<u32>(), 0..64)) {
            let page = page(time, &words);
            prop_assert!(Events::new(&page).unwrap().count() <= words.len());
        }

        #[test]
        fn any_bytes_give_an_answer(bytes: Vec<u8>) {
            let _ = Events::new(&bytes).map(Iterator::count);
        }
    }
}
