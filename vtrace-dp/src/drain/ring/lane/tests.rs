//! Streams cut anywhere, files that fail anywhere.

#![expect(clippy::cast_possible_truncation, reason = "the numbers of these tests are small")]

use std::{fs::File, os::unix::fs::FileExt, sync::Arc};

use proptest::prelude::*;
use vtrace_common::{ids::Cpu, ledger::Ledger};

use super::*;
use crate::{
    drain::sink::FileSink,
    virtq::{
        memory::Memory,
        testing::{guest_memory, memory_file, sealed_file},
    },
};

const PAGE: usize = 4096;
const START: u64 = 2 * PAGE as u64;

fn page(number: u8, good: bool) -> Vec<u8> {
    let mut page = vec![number; PAGE];
    page[..8].copy_from_slice(&u64::from(number).to_le_bytes());
    let commit: u64 = if good { 4080 } else { 4081 };
    page[8..16].copy_from_slice(&commit.to_le_bytes());
    page
}

/// The page as it is in the file if pages before it were refused.
fn marked(mut page: Vec<u8>) -> Vec<u8> {
    let header = Header::parse(&page, PAGE).unwrap();
    page[8..16].copy_from_slice(&Header { missed: true, ..header }.commit().to_le_bytes());
    page
}

struct LaneBench {
    memory: Arc<Memory>,
    lane: RingLane,
    batch: Batch,
    sink: FileSink,
    file: File,
    next: u64,
}

impl LaneBench {
    fn new(file: File, pages_max: u64) -> Self {
        let area = Area { cpu: Cpu(3), offset: START, bytes_max: pages_max * PAGE as u64, begins_again: false };
        Self::in_area(file, area)
    }

    fn in_area(file: File, area: Area) -> Self {
        let memory = guest_memory(&[(0, 1 << 20)]);
        let lane = RingLane::new(area, PAGE as u32, Arc::new(Counters::new(Cpu(3))));
        let sink = FileSink::new(file.try_clone().unwrap()).unwrap();
        Self { batch: Batch::new(Arc::clone(&memory)), memory, lane, sink, file, next: 0 }
    }

    /// Bytes come, in memory of their own, never next to those before.
    /// Comes in pieces of so many bytes, then the rest; after some of them what is there is written.
    fn come_cut(&mut self, mut stream: &[u8], cuts: Vec<(usize, bool)>) {
        for (bytes, write) in cuts {
            let (piece, rest) = stream.split_at(bytes.min(stream.len()));
            self.come(piece);
            if write {
                self.write();
            }
            stream = rest;
        }
        self.come(stream);
    }

    fn come(&mut self, bytes: &[u8]) {
        let span = Span { gpa: self.next, bytes: bytes.len() as u32 };
        self.memory.copy_in(span, bytes).unwrap();
        self.next += bytes.len() as u64 + 1;
        self.lane.accept(span, &mut self.batch, &mut self.sink).unwrap();
    }

    fn write(&mut self) {
        self.lane.write(&mut self.batch, &mut self.sink);
    }

    /// The ledger, and what the area holds.
    fn close(mut self, sent: Option<u64>) -> (LaneLedger, Vec<u8>) {
        let counts = self.lane.close(&mut self.batch, &mut self.sink, sent);
        let bytes = self.file.metadata().unwrap().len().saturating_sub(START);
        let mut area = vec![0; bytes as usize];
        self.file.read_exact_at(&mut area, START).unwrap();
        (counts, area)
    }
}

fn bench() -> LaneBench {
    LaneBench::new(memory_file(0).unwrap(), 1000)
}

#[test]
fn page_lies_at_its_place_byte_for_byte() {
    let mut bench = bench();
    let pages = [page(1, true), page(2, true)].concat();
    bench.come(&pages);
    let (counts, area) = bench.close(Some(pages.len() as u64));
    assert_eq!(area, pages);
    let ledger = Ledger { pages_in: 2, pages_out: 2, bytes_out: pages.len() as u64, ..Ledger::default() };
    assert_eq!((counts.ledger, counts.bytes_torn, counts.bytes_missing), (ledger, 0, Some(0)));
}

#[test]
fn page_with_a_bad_header_is_refused_and_the_next_takes_its_place() {
    let mut bench = bench();
    bench.come(&[page(1, true), page(2, false), page(3, true)].concat());
    let (counts, area) = bench.close(None);
    assert_eq!(area, [page(1, true), marked(page(3, true))].concat());
    assert_eq!((counts.ledger.pages_in, counts.ledger.pages_out, counts.ledger.pages_lost), (3, 2, 1));
}

#[test]
fn gap_is_marked_once_and_guest_memory_stays_as_it_was() {
    let mut bench = bench();
    bench.come(&[page(1, false), page(2, false)].concat());
    let after = page(3, true);
    // The header comes in three pieces.
    [&after[..5], &after[5..12], &after[12..]].into_iter().for_each(|piece| bench.come(piece));
    bench.come(&page(4, true));
    let memory = Arc::clone(&bench.memory);
    let (counts, area) = bench.close(None);
    assert_eq!(area, [marked(after), page(4, true)].concat());
    assert_eq!((counts.ledger.pages_out, counts.ledger.pages_lost), (2, 2));
    let mut last = vec![0; PAGE];
    let span = Span { gpa: 2 * PAGE as u64 + 1 + PAGE as u64 + 3, bytes: PAGE as u32 };
    memory.copy_out(span, &mut last).unwrap();
    assert!(last == page(4, true), "what the guest holds is not ours to change");
}

#[test]
fn page_whose_header_was_cut_by_a_write_leaves_the_mark_to_the_next() {
    let mut bench = bench();
    bench.come(&page(1, false));
    let cut = page(2, true);
    bench.come(&cut[..9]);
    bench.write();
    bench.come(&cut[9..]);
    bench.come(&page(3, true));
    let (_, area) = bench.close(None);
    assert_eq!(area, [cut, marked(page(3, true))].concat());
}

#[test]
fn page_that_the_kernel_marked_itself_is_left_alone() {
    let mut bench = bench();
    let mut own = marked(page(2, true));
    own[8..16].copy_from_slice(&0xffff_ffff_c000_0fc0u64.to_le_bytes());
    bench.come(&[page(1, false), own.clone(), page(3, true)].concat());
    let (_, area) = bench.close(None);
    assert_eq!(area, [own, page(3, true)].concat());
}

#[test]
fn more_marks_than_a_batch_has_room_for_are_written_all() {
    let mut bench = LaneBench::new(memory_file(0).unwrap(), 1000);
    for number in 0..300u16 {
        // Two pages in the same place again and again: what is written was checked before.
        bench.next = u64::from(number % 16) * 2 * PAGE as u64;
        if number % 16 == 0 {
            bench.write();
        }
        bench.come(&[page(1, false), page(2, true)].concat());
    }
    let (counts, area) = bench.close(None);
    assert_eq!((counts.ledger.pages_out, counts.ledger.pages_lost), (300, 300));
    assert!(area == marked(page(2, true)).repeat(300));
}

#[test]
fn header_cut_by_a_write_is_still_checked() {
    let mut bench = bench();
    let bad = page(1, false);
    bench.come(&bad[..9]);
    bench.write();
    bench.come(&bad[9..]);
    bench.come(&page(2, true));
    let (counts, area) = bench.close(None);
    assert_eq!(area, marked(page(2, true)));
    assert_eq!((counts.ledger.pages_in, counts.ledger.pages_lost), (2, 1));
}

#[test]
fn torn_tail_is_counted_and_leaves_nothing_in_the_file() {
    for written_before in [false, true] {
        let mut bench = bench();
        bench.come(&page(1, true));
        bench.come(&page(2, true)[..100]);
        if written_before {
            bench.write();
        }
        let (counts, area) = bench.close(Some(2 * PAGE as u64));
        assert_eq!(area[..PAGE], page(1, true));
        assert!(area[PAGE..].iter().all(|&byte| byte == 0));
        assert_eq!((counts.ledger.pages_in, counts.bytes_torn), (1, 100));
        assert_eq!(counts.bytes_missing, Some(PAGE as u64 - 100));
    }
}

#[test]
fn pages_past_the_end_of_the_area_are_refused() {
    let mut bench = LaneBench::new(memory_file(0).unwrap(), 2);
    for number in 0..5 {
        bench.come(&page(number, true));
        bench.write();
    }
    let (counts, area) = bench.close(None);
    assert_eq!(area, [page(0, true), page(1, true)].concat());
    assert_eq!((counts.ledger.pages_in, counts.ledger.pages_out, counts.ledger.pages_lost), (5, 2, 3));
}

#[test]
fn pages_that_do_not_fit_the_disk_are_counted_with_the_reason() {
    // Nothing past the end of this file can be written: it takes two pages.
    let mut bench = LaneBench::new(sealed_file(START + 2 * PAGE as u64).unwrap(), 1000);
    for number in 0..4 {
        bench.come(&page(number, true));
    }
    bench.come(&page(4, true)[..50]);
    bench.write();
    bench.come(&page(4, true)[50..]);
    bench.come(&page(5, true));
    let (counts, area) = bench.close(None);
    assert_eq!(area, [page(0, true), page(1, true)].concat());
    assert_eq!((counts.ledger.pages_in, counts.ledger.pages_out, counts.ledger.pages_lost), (6, 2, 4));
    assert_eq!(counts.write_errno, libc::EPERM);
}

#[test]
fn batch_that_is_full_is_written_in_the_middle_of_a_page() {
    let mut bench = bench();
    let page = page(9, true);
    page.chunks(2).for_each(|two| bench.come(two));
    assert!(bench.batch.bytes() < PAGE as u64, "2048 spans are more than a batch takes");
    let (counts, area) = bench.close(None);
    assert_eq!((area, counts.ledger.pages_out), (page, 1));
}

proptest! {
    #[test]
    fn lane_that_begins_again_has_its_last_pages_wherever_it_is_cut(
        good in prop::collection::vec(any::<bool>(), 0..40), torn in 0..PAGE, area_pages in 1usize..6,
        cuts in prop::collection::vec((1usize..9000, any::<bool>()), 0..60),
    ) {
        let pages: Vec<_> = good.iter().enumerate().map(|(n, &good)| page(n as u8, good)).collect();
        let mut stream = pages.concat();
        stream.extend(&page(99, true)[..torn]);
        let bytes_max = (area_pages * PAGE) as u64;
        let area = Area { cpu: Cpu(3), offset: START, bytes_max, begins_again: true };
        let mut bench = LaneBench::in_area(memory_file(0).unwrap(), area);
        bench.come_cut(&stream, cuts);
        let (counts, area) = bench.close(None);
        let kept: Vec<_> = pages.iter().zip(&good).filter(|(_, good)| **good).map(|(page, _)| page).collect();
        prop_assert_eq!((counts.ledger.pages_out, counts.ledger.pages_lost), (kept.len() as u64, (pages.len() - kept.len()) as u64));
        prop_assert!(area.len() <= area_pages * PAGE, "nothing is written past the area");
        // The oldest may have been touched by a page that never became whole.
        for (index, page) in kept.iter().enumerate().rev().take(area_pages - 1) {
            let found = &area[index % area_pages * PAGE..][..PAGE];
            prop_assert_eq!(&found[..11], &page[..11]);
            prop_assert_eq!(&found[16..], &page[16..]);
        }
    }

    #[test]
    fn pages_of_another_size_than_was_said_are_counted_and_stay_in_the_area(
        said in 12u32..=19, sent in 12u32..=16, count in 0usize..12, again: bool,
    ) {
        let (said, sent) = (1usize << said, 1usize << sent);
        let area = Area { cpu: Cpu(3), offset: START, bytes_max: 2 * said as u64, begins_again: again };
        let file = memory_file(0).unwrap();
        let mut bench = LaneBench::in_area(file.try_clone().unwrap(), area);
        bench.lane = RingLane::new(area, said as u32, Arc::new(Counters::new(Cpu(3))));
        for number in 0..count {
            let mut page = vec![number as u8; sent];
            page[8..16].copy_from_slice(&(sent as u64 - 16).to_le_bytes());
            bench.come(&page);
        }
        let (counts, area) = bench.close(Some((count * sent) as u64));
        prop_assert_eq!(counts.ledger.pages_in, (count * sent / said) as u64);
        prop_assert_eq!((counts.bytes_torn, counts.bytes_missing), ((count * sent % said) as u64, Some(0)));
        prop_assert!(counts.ledger.is_balanced() && area.len() <= 2 * said);
    }

    #[test]
    fn any_cutting_gives_the_good_pages_in_order(
        good in prop::collection::vec(any::<bool>(), 0..12), torn in 0..PAGE, pages_max in 0u64..14,
        cuts in prop::collection::vec((1usize..9000, any::<bool>()), 0..60),
    ) {
        let pages: Vec<_> = good.iter().enumerate().map(|(n, &good)| page(n as u8, good)).collect();
        let mut stream = pages.concat();
        stream.extend(&page(99, true)[..torn]);
        let mut bench = LaneBench::new(memory_file(0).unwrap(), pages_max);
        let any_write = cuts.iter().any(|(_, write)| *write);
        bench.come_cut(&stream, cuts);
        let (counts, area) = bench.close(Some(stream.len() as u64 + 5));
        let kept: Vec<_> = pages.iter().zip(&good).filter(|(_, good)| **good).map(|(page, _)| page.clone())
            .take(pages_max as usize).collect();
        let expected = kept.concat();
        let mut unmarked = area[..expected.len()].to_vec();
        unmarked.chunks_exact_mut(PAGE).zip(&kept).for_each(|(page, kept)| page[11..16].copy_from_slice(&kept[11..16]));
        prop_assert_eq!(&unmarked, &expected);
        // Without a header cut by a write the marks are where the gaps are, and nowhere else.
        let marks = area[..expected.len()].chunks_exact(PAGE).map(|page| page[15] == 0xff).collect::<Vec<_>>();
        let gaps: Vec<bool> = (0..good.len()).filter(|n| good[*n]).map(|n| n > 0 && !good[n - 1]).collect();
        let count = |flags: &[bool]| flags.iter().filter(|flag| **flag).count();
        prop_assert!(count(&marks) <= count(&gaps[..marks.len()]));
        if !any_write {
            prop_assert_eq!(&marks[..], &gaps[..marks.len()]);
        }
        prop_assert!(area[expected.len()..].iter().all(|&byte| byte == 0));
        prop_assert_eq!((counts.ledger.pages_in, counts.ledger.pages_out), (pages.len() as u64, kept.len() as u64));
        prop_assert_eq!((counts.bytes_torn, counts.bytes_missing), (torn as u64, Some(5)));
        prop_assert!(counts.ledger.is_balanced());
    }
}
