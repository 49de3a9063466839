//! One CPU's pages out of a stream: bytes that the kernel has put into the file become whole pages, or are removed.
//!
//! In:    how many bytes were spliced after the lane's last page, or thrown away; the file
//! Out:   where the next bytes belong and how many; counts
//! Runs:  on the worker's thread; reads 16 bytes of each page back, writes only what has to be changed
//! Full:  pages past the end of the area (unless it begins again there) and all pages after a failed write are refused
//!        and counted
//! Trust: the guest with nothing: pages are framed by their size alone, and a page with an invalid header is overwritten
//!        by the next one. A page's bytes are the guest's; nothing changes them after its header was checked
//!
//! The bytes never pass through this process, so they are looked at where they are: in the file's cached pages. A page
//! counts as kept when its header has been read; a crash before that leaves a page that readers check again.
//!
//! Nothing is put across the end of an area that begins again, so what is not looked at yet lies in one piece. What it
//! goes over there is far too old: such an area has tens of MiB more than the pages that are to stay.

use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

use vtrace_common::{
    page::{HEADER_BYTES, Header},
    wire::client::{Area, LaneLedger},
};

use crate::{drain::ledger::Counters, sys::write_all::erase};

/// Bytes moved at a time where a page has to go.
const PIECE_BYTES: usize = 64 << 10;
/// Where a page's commit word is.
const COMMIT_AT: u64 = 8;

/// A lane: its area and how far it is filled.
#[derive(Debug)]
pub(crate) struct StreamLane {
    area: Area,
    page_bytes: u64,
    counters: Arc<Counters>,
    counts: LaneLedger,
    /// Bytes received.
    bytes_in: u64,
    /// Bytes of the pages that were kept, from the lane's first on.
    kept: u64,
    /// Bytes after them: the beginning of the current page, kept or refused.
    have: u64,
    /// End of what was ever written, counted as they are.
    written_end: u64,
    /// Pages were refused since the last one that was kept: the next one says so.
    gap: bool,
    /// Nothing goes to the file any more.
    refuses: bool,
    /// The stream has ended: what a new one brings belongs to no page of this lane.
    cut: bool,
}

impl StreamLane {
    /// A lane that has received nothing. `page_bytes` is at least a header.
    pub(crate) fn new(area: Area, page_bytes: u32, counters: Arc<Counters>) -> Self {
        Self {
            area,
            page_bytes: u64::from(page_bytes),
            counters,
            counts: LaneLedger { cpu: area.cpu, ..LaneLedger::default() },
            bytes_in: 0,
            kept: 0,
            have: 0,
            written_end: 0,
            gap: false,
            refuses: false,
            cut: false,
        }
    }

    /// Where in the file the next bytes belong. Hot.
    pub(crate) fn offset(&self) -> u64 {
        self.area.place(self.kept + self.have)
    }

    /// How many bytes may be put there: none if the rest has to be thrown away. Hot.
    pub(crate) fn room(&self) -> u64 {
        let filled = self.kept + self.have;
        match self.area.begins_again {
            _ if self.refuses => 0,
            true => self.area.room(filled),
            false => self.whole_pages(self.area.bytes_max) - filled,
        }
    }

    /// Bytes that have come.
    pub(crate) fn bytes_in(&self) -> u64 {
        self.bytes_in
    }

    /// So many bytes were put into the file, no more than there was room for. Hot.
    pub(crate) fn landed(&mut self, bytes: u64, file: &File) {
        self.bytes_in += bytes;
        self.have += bytes;
        self.written_end = self.written_end.max(self.kept + self.have);
        while self.have >= self.page_bytes && !self.refuses {
            if let Err(error) = self.look(file) {
                self.fail(&error);
            }
        }
    }

    /// So many bytes were thrown away, because there was no room.
    pub(crate) fn refused(&mut self, bytes: u64) {
        self.refuses = true;
        self.bytes_in += bytes;
        let phase = self.have + bytes;
        let pages = phase / self.page_bytes;
        self.counts.ledger.pages_in += pages;
        self.counts.ledger.pages_lost += pages;
        self.have = phase % self.page_bytes;
    }

    /// The file takes no more: what comes from now on is refused, the current page with it.
    pub(crate) fn fail(&mut self, error: &io::Error) {
        if self.counts.write_errno == 0 {
            self.counts.write_errno = error.raw_os_error().unwrap_or(libc::EIO);
        }
        self.refused(0);
    }

    /// The stream has ended, in the middle of a page if there is one.
    pub(crate) fn cut(&mut self) {
        self.cut = true;
        self.counts.bytes_torn += self.have;
        (self.have, self.refuses) = (0, true);
    }

    /// Whether the stream that brought this lane its bytes has ended: those of another one are none of its.
    pub(crate) fn is_cut(&self) -> bool {
        self.cut
    }

    /// Lets others see the counts. Hot.
    pub(crate) fn publish(&self) {
        self.counters.publish(&self.counts);
    }

    /// Removes what the file has after the last page, and counts what is missing: `bytes_sent` is what the agent says
    /// it sent, if it said anything.
    pub(crate) fn close(mut self, file: &File, bytes_sent: Option<u64>) -> LaneLedger {
        self.counts.bytes_torn += std::mem::take(&mut self.have);
        self.counts.bytes_missing = bytes_sent.map(|sent| sent.saturating_sub(self.bytes_in));
        if let Some(surplus) = bytes_sent.and_then(|sent| self.bytes_in.checked_sub(sent)).filter(|more| *more > 0) {
            log::warn!("{}: {surplus} bytes more came than its agent says it sent", self.counters.cpu());
        }
        // If it fails, readers find the end by the count of pages.
        let _ = erase(file, self.area.place(self.kept), self.written_end.saturating_sub(self.kept));
        assert!(self.counts.ledger.is_balanced(), "every page is in the file or lost: {:?}", self.counts);
        self.publish();
        self.counts
    }

    /// Keeps the page after the last one if its header is valid; otherwise moves what follows into its place.
    fn look(&mut self, file: &File) -> io::Result<()> {
        let at = self.area.place(self.kept);
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, at)?;
        let size = usize::try_from(self.page_bytes).expect("PAGE_BYTES_MAX fits");
        let Ok(header) = Header::parse(&header, size) else {
            let rest = self.have - self.page_bytes;
            self.gap = true;
            self.counts.ledger.pages_in += 1;
            self.counts.ledger.pages_lost += 1;
            self.have = rest;
            return shift(file, at + self.page_bytes, at, rest);
        };
        if std::mem::take(&mut self.gap) && !header.missed {
            let commit = Header { missed: true, missed_stored: false, ..header }.commit();
            file.write_all_at(&commit.to_le_bytes(), at + COMMIT_AT)?;
        }
        self.counts.ledger.pages_in += 1;
        self.kept += self.page_bytes;
        self.counts.ledger.set_out(self.kept / self.page_bytes, self.page_bytes);
        self.have -= self.page_bytes;
        Ok(())
    }

    fn whole_pages(&self, bytes: u64) -> u64 {
        bytes - bytes % self.page_bytes
    }
}

/// Moves bytes of a file to a place before them. Rare.
fn shift(file: &File, mut from: u64, mut to: u64, mut bytes: u64) -> io::Result<()> {
    let mut piece = vec![0; PIECE_BYTES];
    while bytes > 0 {
        let step = usize::try_from(bytes).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
        file.read_exact_at(&mut piece[..step], from)?;
        file.write_all_at(&piece[..step], to)?;
        let moved = u64::try_from(step).expect("at most PIECE_BYTES");
        (from, to, bytes) = (from + moved, to + moved, bytes - moved);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vtrace_common::ids::Cpu;

    use super::*;

    const PAGE: u64 = 4096;
    const AT: u64 = 8192;

    fn lane(pages: u64) -> (StreamLane, File, Arc<Counters>) {
        let counters = Arc::new(Counters::new(Cpu(3)));
        let area = Area { cpu: Cpu(3), offset: AT, bytes_max: pages * PAGE + 100, begins_again: false };
        (StreamLane::new(area, 4096, Arc::clone(&counters)), tempfile::tempfile().unwrap(), counters)
    }

    /// A lane that begins again after so many pages.
    fn lane_again(pages: u64) -> (StreamLane, File) {
        let area = Area { cpu: Cpu(3), offset: AT, bytes_max: pages * PAGE, begins_again: true };
        (StreamLane::new(area, 4096, Arc::new(Counters::new(Cpu(3)))), tempfile::tempfile().unwrap())
    }

    /// A page whose header says `commit`.
    fn page(time: u64, commit: u64) -> Vec<u8> {
        let mut page = vec![u8::try_from(time).unwrap(); 4096];
        page[..8].copy_from_slice(&time.to_le_bytes());
        page[8..16].copy_from_slice(&commit.to_le_bytes());
        page
    }

    /// Gives a lane bytes as the worker does.
    fn feed(lane: &mut StreamLane, file: &File, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let step = usize::try_from(lane.room()).unwrap().min(bytes.len());
            if step == 0 {
                return lane.refused(u64::try_from(bytes.len()).unwrap());
            }
            file.write_all_at(&bytes[..step], lane.offset()).unwrap();
            lane.landed(u64::try_from(step).unwrap(), file);
            bytes = &bytes[step..];
        }
    }

    fn content(file: &File) -> Vec<u8> {
        let mut content = vec![0; usize::try_from(file.metadata().unwrap().len() - AT).unwrap()];
        file.read_exact_at(&mut content, AT).unwrap();
        content
    }

    #[test]
    fn pages_lie_one_after_the_other_and_a_torn_one_is_erased() {
        let (mut lane, file, counters) = lane(8);
        let pages = [page(1, 100), page(2, 200)].concat();
        feed(&mut lane, &file, &pages[..5000]);
        feed(&mut lane, &file, &pages[5000..]);
        feed(&mut lane, &file, &pages[..70]);
        let counts = lane.close(&file, Some(9000));
        assert_eq!(
            (counts.ledger.pages_in, counts.ledger.pages_out, counts.bytes_torn, counts.bytes_missing),
            (2, 2, 70, Some(738))
        );
        assert_eq!(content(&file)[..8192], pages);
        assert!(content(&file)[8192..].iter().all(|byte| *byte == 0));
        assert_eq!(counters.read().bytes_torn, 70);
    }

    #[test]
    fn page_with_an_invalid_header_makes_room_for_the_next_which_says_so() {
        let (mut lane, file, _) = lane(8);
        let bytes = [page(1, 100), page(2, u64::from(u32::MAX)), page(3, 300), page(4, 400), vec![9; 10]].concat();
        feed(&mut lane, &file, &bytes);
        let counts = lane.close(&file, None);
        assert_eq!((counts.ledger.pages_in, counts.ledger.pages_out, counts.ledger.pages_lost), (4, 3, 1));
        let kept = content(&file);
        assert_eq!((&kept[..4096], &kept[8192..12288]), (&page(1, 100)[..], &page(4, 400)[..]));
        let third = Header::parse(&kept[4096..], 4096).unwrap();
        assert_eq!((third.time, third.data_bytes, third.missed), (3, 300, true));
        assert!(kept[12288..].iter().all(|byte| *byte == 0), "nothing of the refused page is left after the last");
    }

    #[test]
    fn page_past_the_areas_end_is_refused_and_the_next_area_is_untouched() {
        let (mut lane, file, _) = lane(2);
        feed(&mut lane, &file, &[page(1, 1), page(2, 2), page(3, 3)].concat());
        feed(&mut lane, &file, &page(4, 4)[..50]);
        let counts = lane.close(&file, None);
        assert_eq!(
            (counts.ledger.pages_in, counts.ledger.pages_out, counts.ledger.pages_lost, counts.bytes_torn),
            (3, 2, 1, 50)
        );
        assert_eq!(content(&file).len(), 8192);
    }

    #[test]
    fn lane_that_begins_again_goes_over_its_oldest_pages_and_nothing_past_its_area() {
        let (mut lane, file) = lane_again(3);
        let none = page(3, u64::from(u32::MAX));
        let bytes = [page(1, 1), page(2, 2), none, page(4, 4), page(5, 5), page(6, 6), page(7, 7)].concat();
        for piece in bytes.chunks(2 * 4096 + 900) {
            feed(&mut lane, &file, piece);
        }
        feed(&mut lane, &file, &page(8, 8)[..70]);
        let counts = lane.close(&file, None);
        assert_eq!(
            (counts.ledger.pages_in, counts.ledger.pages_out, counts.ledger.pages_lost, counts.bytes_torn),
            (7, 6, 1, 70)
        );
        let kept = content(&file);
        let times: Vec<u64> = kept.chunks(4096).map(|page| Header::parse(page, 4096).unwrap().time).collect();
        assert_eq!(times, [0, 6, 7], "1, 2 and 4 went, 5 is where the torn one began");
        assert_eq!(kept[4096..8192], page(6, 6), "no page is in two pieces");
    }

    #[test]
    fn write_that_fails_mid_page_refuses_that_page_and_all_after_it() {
        let (mut lane, file, _) = lane(8);
        feed(&mut lane, &file, &[page(1, 1), page(2, 2)].concat()[..5000]);
        lane.fail(&io::Error::from_raw_os_error(libc::ENOSPC));
        assert_eq!(lane.room(), 0);
        lane.refused(2 * 4096 - 5000 + 4096);
        let counts = lane.close(&file, None);
        assert_eq!((counts.ledger.pages_in, counts.ledger.pages_out, counts.ledger.pages_lost), (3, 1, 2));
        assert_eq!((counts.write_errno, counts.bytes_torn), (libc::ENOSPC, 0));
    }

    #[test]
    fn stream_that_is_cut_leaves_whole_pages_and_takes_no_more() {
        let (mut lane, file, _) = lane(8);
        feed(&mut lane, &file, &page(1, 1));
        feed(&mut lane, &file, &page(2, 2)[..1000]);
        lane.cut();
        assert!(lane.is_cut() && lane.room() == 0);
        let counts = lane.close(&file, Some(3 * 4096));
        assert_eq!((counts.ledger.pages_in, counts.ledger.pages_out, counts.bytes_torn), (1, 1, 1000));
        assert_eq!(counts.bytes_missing, Some(3 * 4096 - 5096));
        assert!(content(&file)[4096..].iter().all(|byte| *byte == 0));
    }

    proptest! {
        #[test]
        fn whatever_comes_every_page_is_counted_and_the_file_has_whole_ones(
            pages in proptest::collection::vec((0u8..=200, any::<bool>()), 0..12),
            tail in 0usize..4096,
            cuts in proptest::collection::vec(1usize..9000, 1..40),
        ) {
            let (mut lane, file, _) = lane(6);
            let commit = |good: bool| if good { 64 } else { 1 << 40 };
            let mut bytes: Vec<u8> = pages.iter().flat_map(|(time, good)| page((*time).into(), commit(*good))).collect();
            bytes.extend(vec![7; tail]);
            let (mut rest, mut cuts) = (&bytes[..], cuts.iter().cycle());
            while !rest.is_empty() {
                let step = rest.len().min(*cuts.next().unwrap());
                feed(&mut lane, &file, &rest[..step]);
                rest = &rest[step..];
            }
            let counts = lane.close(&file, None);
            prop_assert_eq!(counts.ledger.pages_in, u64::try_from(pages.len()).unwrap());
            prop_assert!(counts.ledger.is_balanced());
            prop_assert_eq!(counts.bytes_torn, u64::try_from(tail).unwrap());
            let kept: Vec<u64> = if file.metadata().unwrap().len() == 0 { vec![] } else {
                let kept = content(&file);
                let pages = kept.chunks(4096).take(usize::try_from(counts.ledger.pages_out).unwrap());
                pages.map(|page| Header::parse(page, 4096).unwrap().time).collect()
            };
            let good: Vec<u64> = pages.iter().filter(|(_, good)| *good).map(|(time, _)| (*time).into()).collect();
            prop_assert!(good.starts_with(&kept) && (kept.len() == good.len() || kept.len() <= 6), "{kept:?} of {good:?}");
        }

        #[test]
        fn lane_that_begins_again_has_its_last_pages_whatever_came_before(
            pages in proptest::collection::vec((0u8..=200, prop::bool::weighted(0.8)), 0..40),
            cuts in proptest::collection::vec(1usize..20_000, 1..40),
        ) {
            let (mut lane, file) = lane_again(8);
            let commit = |good: bool| if good { 64 } else { 1 << 40 };
            let bytes: Vec<u8> = pages.iter().flat_map(|(time, good)| page((*time).into(), commit(*good))).collect();
            let (mut rest, mut cuts) = (&bytes[..], cuts.iter().cycle());
            while !rest.is_empty() {
                let step = rest.len().min(*cuts.next().unwrap());
                feed(&mut lane, &file, &rest[..step]);
                rest = &rest[step..];
            }
            let area = lane.area;
            let counts = lane.close(&file, None);
            prop_assert!(counts.ledger.is_balanced());
            prop_assert!(file.metadata().unwrap().len() <= AT + 8 * PAGE, "nothing past the area");
            let good: Vec<u64> = pages.iter().filter(|(_, good)| *good).map(|(time, _)| (*time).into()).collect();
            prop_assert_eq!(counts.ledger.pages_out, u64::try_from(good.len()).unwrap());
            // As many as no step of 20 000 bytes can have gone over.
            let last = good.len().saturating_sub(2);
            for (at, time) in good.iter().enumerate().skip(last) {
                let mut header = [0; HEADER_BYTES];
                file.read_exact_at(&mut header, area.place(u64::try_from(at).unwrap() * PAGE)).unwrap();
                prop_assert_eq!(Header::parse(&header, 4096).unwrap().time, *time);
            }
        }
    }
}
