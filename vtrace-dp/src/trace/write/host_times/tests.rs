//! Lanes of every kind of clock through a file and back.

use super::*;
use crate::clock::{
    math::Pair,
    ratio::{Isa, Ratio},
    table::Table,
    testing::{Change, Life, Story},
};
use proptest::prelude::*;
use vtrace_common::ids::Cpu;

const CPU: Cpu = Cpu(0);

fn scaled(thousandths: u64) -> Pair {
    let raw = u64::try_from((1u128 << 48) * u128::from(thousandths) / 1000).unwrap();
    Pair { offset: 5_000_000, ratio: Some(Ratio { raw: raw.try_into().unwrap(), fraction_bits: 48 }) }
}

fn table(life: &Life, story: &Story) -> Table {
    let mut table = Table::build(HostTsc(life.since), Isa::Vmx, story.seen.clone(), &[CPU]).unwrap();
    table.learn(CPU, story.runs.clone());
    table
}

/// Rewrites these pages, the first third of them at the end of their area, in a file; gives what is there then.
fn through_a_file(pages: &[u8], page_bytes: usize, table: &Table) -> (Rewritten, Vec<u8>) {
    let file = tempfile::tempfile().unwrap();
    let (older, newer) = pages.split_at(pages.len() / page_bytes / 3 * page_bytes);
    let at = |offset, part: &[u8]| Extent { offset, bytes: u64::try_from(part.len()).unwrap() };
    let newer_at = at(1 << 20, newer);
    let from = [at(newer_at.end() + (1 << 20), older), newer_at];
    let read = |part: &Extent| {
        let mut out = vec![0; usize::try_from(part.bytes).unwrap()];
        file.read_exact_at(&mut out, part.offset).unwrap();
        out
    };
    file.write_all_at(older, from[0].offset).unwrap();
    file.write_all_at(newer, from[1].offset).unwrap();
    let (to, page_bytes) = (from[0].end(), u32::try_from(page_bytes).unwrap());
    let (done, uncertainties) = rewrite(&file, from, to, page_bytes, table.lane(CPU).unwrap()).unwrap();
    let doubted: u64 = uncertainties.iter().map(|uncertainty| uncertainty.events).sum();
    assert_eq!(doubted, done.unsure + done.trapped);
    assert!(
        uncertainties
            .iter()
            .all(|uncertainty| uncertainty.error <= done.error_max && uncertainty.first <= uncertainty.last)
    );
    assert!(done.bytes <= room_bytes(u64::try_from(pages.len()).unwrap(), page_bytes));
    assert!(from.iter().map(read).collect::<Vec<_>>().concat() == pages, "they are only read");
    (done, read(&Extent { offset: to, bytes: done.bytes }))
}

fn events(pages: &[u8], page_bytes: usize) -> Vec<(u64, Vec<u8>)> {
    let pages = pages.chunks(page_bytes).flat_map(|page| Events::new(page).unwrap());
    pages.map(|event| event.unwrap()).map(|event| (event.time, event.data.to_vec())).collect()
}

fn lost(pages: &[u8], page_bytes: usize) -> Vec<Option<u64>> {
    pages.chunks(page_bytes).filter_map(|page| Events::new(page).ok()).map(|events| events.lost()).collect()
}

/// An event that says when it happened.
fn payload(at: HostTsc) -> Vec<u8> {
    let bytes = 8 + usize::try_from(at.0 % 7).unwrap() * 4;
    at.0.to_le_bytes().iter().copied().cycle().take(bytes).collect()
}

fn check(life: &Life, story: &Story, half: u64) -> Rewritten {
    let (done, out) = through_a_file(&story.pages, life.page_bytes, &table(life, story));
    let found = events(&out, life.page_bytes);
    assert_eq!((found.len(), done.foreign, done.pages_cut), (story.truth.len(), 0, 0));
    assert!(found.is_sorted_by_key(|(time, _)| *time));
    for ((time, data), truth) in found.iter().zip(&story.truth) {
        assert_eq!(*data, payload(*truth));
        assert!(done.trapped + done.unsure > 0 || time.abs_diff(truth.0) <= half, "{time} {truth:?}");
    }
    done
}

#[test]
fn slow_guests_get_the_extends_they_need_on_pages_of_their_own() {
    let mut added = 0;
    for (seed, page_bytes) in [(1, 4096), (2, 4096), (3, 8192), (4, 65536)] {
        let mut life = Life::new(seed * 7919, vec![Change { after: 0, pair: scaled(500) }]);
        // Gaps just too short for the guest to write a time extend, and too long for a delta in host time.
        (life.gap_max, life.run_max, life.pause_max) = (250_000_000, 400_000_000, 10);
        (life.rest, life.page_bytes) = (60_000_000_000, page_bytes);
        let story = life.live(payload);
        let done = check(&life, &story, 1);
        added += done.pages_added;
        assert_eq!(done.bytes, story.pages.len() as u64 + done.pages_added * page_bytes as u64);
    }
    assert!(added > 0, "there was something to see");
}

#[test]
fn fast_and_backward_clocks_fit_their_pages() {
    let back = |offset: i64| Pair { offset: offset.cast_unsigned(), ratio: None };
    let lives = [vec![scaled(1870)], vec![scaled(5000), scaled(350)], vec![back(9_000_000), back(0), back(-3_000_000)]];
    for pairs in lives {
        let changes = pairs.into_iter().map(|pair| Change { after: 11_000_000, pair }).collect();
        let life = Life::new(77, changes);
        let done = check(&life, &life.live(payload), 1);
        assert!(done.events > 100);
    }
}

#[test]
fn count_of_lost_events_stays_with_its_page() {
    let mut life = Life::new(5, vec![Change { after: 0, pair: scaled(500) }]);
    (life.gap_max, life.run_max, life.pause_max, life.rest) = (250_000_000, 400_000_000, 10, 10_000_000_000);
    let mut story = life.live(payload);
    for (number, page) in story.pages.chunks_mut(life.page_bytes).enumerate() {
        let data = usize::try_from(u64::from_le_bytes(page[8..16].try_into().unwrap())).unwrap() + HEADER_BYTES;
        if data + 8 <= page.len() && number % 2 == 0 {
            page[data..data + 8].copy_from_slice(&(number as u64 + 100).to_le_bytes());
            page[11] |= 0xc0;
        }
    }
    let (_, out) = through_a_file(&story.pages, life.page_bytes, &table(&life, &story));
    let (before, after) = (lost(&story.pages, life.page_bytes), lost(&out, life.page_bytes));
    let said = |list: &[Option<u64>]| list.iter().flatten().copied().collect::<Vec<_>>();
    assert!(said(&before).len() > 1);
    assert_eq!(said(&before), said(&after));
}

#[test]
fn page_that_breaks_is_cut_there_and_counted() {
    let life = Life::new(6, vec![Change { after: 0, pair: scaled(900) }]);
    let mut story = life.live(payload);
    let before = events(&story.pages, life.page_bytes).len();
    story.pages[16 + 4 * 100] = 0; // a long event, with a length that is nonsense
    story.pages[16 + 4 * 101..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
    let (done, out) = through_a_file(&story.pages, life.page_bytes, &table(&life, &story));
    assert!(done.pages_cut <= 1);
    assert!(events(&out, life.page_bytes).len() <= before && done.events > 0);
}

#[test]
fn file_that_takes_no_more_is_an_error_and_keeps_its_pages() {
    let life = Life::new(7919, vec![Change { after: 0, pair: scaled(500) }]);
    let story = life.live(payload);
    let (table, folder) = (table(&life, &story), tempfile::tempdir().unwrap());
    let path = folder.path().join("lane");
    std::fs::write(&path, &story.pages).unwrap();
    let from = Extent { offset: 0, bytes: story.pages.len() as u64 };
    let parts = [Extent::default(), from];
    let refused = rewrite(&File::open(&path).unwrap(), parts, from.bytes, 4096, table.lane(CPU).unwrap());
    assert!(matches!(refused, Err(RewriteFault { action: "write", .. })), "{refused:?}");
    assert!(std::fs::read(&path).unwrap() == story.pages);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_pages_give_pages(words in prop::collection::vec(any::<u32>(), 0..3000), length in 0u64..4200, time: u64) {
        let mut pages: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        pages.resize(3 * 4096, 0);
        for page in pages.chunks_mut(4096) {
            page[..8].copy_from_slice(&time.to_le_bytes());
            page[8..16].copy_from_slice(&length.to_le_bytes());
        }
        let life = Life::new(8, vec![Change { after: 0, pair: scaled(500) }, Change { after: 1 << 20, pair: scaled(2000) }]);
        let story = life.live(payload);
        let (done, out) = through_a_file(&pages, 4096, &table(&life, &story));
        prop_assert_eq!(events(&out, 4096).len() as u64, done.events);
    }
}
