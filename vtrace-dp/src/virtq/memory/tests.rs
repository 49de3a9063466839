//! Memory tables of all shapes, spans and batches over them.

use std::{io::Read, os::fd::AsFd};

use proptest::prelude::*;

use super::*;
use crate::virtq::testing::{VMM_BASE, guest_memory, memory_file, region, sealed_file};

const PAGE: u64 = 4096;

fn map(regions: &[VhostUserMemoryRegion]) -> Result<Arc<Memory>, MemoryFault> {
    let files = regions.iter().map(|_| memory_file(8 * PAGE).unwrap()).collect();
    Memory::map(regions, files)
}

#[test]
fn regions_that_overlap_in_the_guest_or_in_the_vmm_are_refused() {
    assert!(matches!(map(&[region(0, 2 * PAGE), region(PAGE, PAGE)]), Err(MemoryFault::Overlap { gpa: PAGE })));
    let same_vmm = VhostUserMemoryRegion::new(16 * PAGE, PAGE, VMM_BASE, 0);
    assert!(matches!(map(&[region(0, PAGE), same_vmm]), Err(MemoryFault::Overlap { .. })));
    assert!(map(&[region(0, PAGE), region(PAGE, PAGE)]).is_ok());
}

#[test]
fn empty_unaligned_and_wrapping_regions_are_refused() {
    let wraps = VhostUserMemoryRegion::new(u64::MAX - PAGE + 1, 2 * PAGE, 0, 0);
    let vmm_wraps = VhostUserMemoryRegion::new(0, 2 * PAGE, u64::MAX - PAGE + 1, 0);
    let unaligned = VhostUserMemoryRegion::new(8, PAGE, VMM_BASE, 0);
    let file_wraps = VhostUserMemoryRegion::new(0, PAGE, VMM_BASE, u64::MAX - PAGE + 1);
    for shape in [region(0, 0), wraps, vmm_wraps, unaligned, file_wraps] {
        assert!(matches!(map(&[shape]), Err(MemoryFault::Shape { .. })));
    }
}

#[test]
fn region_beyond_the_end_of_its_file_is_refused() {
    let beyond = VhostUserMemoryRegion::new(0, PAGE, VMM_BASE, 8 * PAGE);
    assert!(matches!(map(&[beyond]), Err(MemoryFault::Short { .. })));
}

#[test]
fn one_region_more_than_the_limit_is_refused() {
    let many: Vec<_> = (0..=MEMORY_REGIONS_MAX).map(|n| region(n as u64 * PAGE, PAGE)).collect();
    assert!(matches!(map(&many), Err(MemoryFault::TooMany { .. })));
    let full = map(&many[1..]).unwrap();
    let file = memory_file(PAGE).unwrap();
    assert!(matches!(full.with_region(&many[0], file), Err(MemoryFault::TooMany { .. })));
}

#[test]
fn table_without_its_descriptors_is_refused() {
    let unpaired = Memory::map(&[region(0, PAGE)], Vec::new());
    assert!(matches!(unpaired, Err(MemoryFault::Unpaired { regions: 1, files: 0 })));
}

#[test]
fn span_ends_where_its_region_ends() {
    let memory = guest_memory(&[(0, PAGE), (PAGE, PAGE), (4 * PAGE, PAGE)]);
    assert_eq!(memory.span(PAGE - 8, 16), Ok(Span { gpa: PAGE - 8, bytes: 8 }));
    assert_eq!(memory.span(PAGE, 8), Ok(Span { gpa: PAGE, bytes: 8 }));
    assert_eq!(memory.span(2 * PAGE, 1), Err(Outside(2 * PAGE)));
    assert_eq!(memory.span(u64::MAX, u32::MAX), Err(Outside(u64::MAX)));
}

#[test]
fn vmm_addresses_are_translated_by_the_region_they_lie_in() {
    let memory = guest_memory(&[(0, PAGE), (4 * PAGE, PAGE)]);
    assert_eq!(memory.translate(VMM_BASE + 4 * PAGE + 5), Ok(4 * PAGE + 5));
    assert_eq!(memory.translate(VMM_BASE + PAGE), Err(Outside(VMM_BASE + PAGE)));
    assert_eq!(memory.translate(0), Err(Outside(0)));
}

#[test]
fn copies_across_the_end_of_a_region_are_refused() {
    let memory = guest_memory(&[(0, PAGE)]);
    let mut bytes = [0; 16];
    let across = Span { gpa: PAGE - 8, bytes: 16 };
    assert_eq!(memory.copy_out(across, &mut bytes), Err(Outside(PAGE - 8)));
    assert_eq!(memory.copy_in(across, &bytes), Err(Outside(PAGE - 8)));
    assert!(memory.window(PAGE - 8, 9).is_err());
    assert!(Batch::new(memory).push(across).is_err());
}

#[test]
fn words_are_little_endian_and_seen_by_every_mapping_of_the_file() {
    let file = memory_file(PAGE).unwrap();
    let one = Memory::map(&[region(0, PAGE)], vec![file.try_clone().unwrap()]).unwrap();
    let other = Memory::map(&[region(0, PAGE)], vec![file]).unwrap();
    one.window(64, 8).unwrap().store_u64(0, 0x0807_0605_0403_0201, Ordering::Release);
    let mut bytes = [0; 8];
    other.copy_out(Span { gpa: 64, bytes: 8 }, &mut bytes).unwrap();
    assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(other.window(64, 8).unwrap().load_u16(2, Ordering::Acquire), 0x0403);
}

#[test]
fn memory_of_a_removed_region_lives_as_long_as_a_batch_holds_it() {
    let memory = guest_memory(&[(0, PAGE), (PAGE, PAGE)]);
    memory.copy_in(Span { gpa: PAGE, bytes: 4 }, b"page").unwrap();
    let mut batch = Batch::new(Arc::clone(&memory));
    assert_eq!(batch.push(Span { gpa: PAGE, bytes: 4 }), Ok(true));
    let smaller = memory.without_region(&region(PAGE, PAGE)).unwrap();
    drop(memory);
    assert!(smaller.span(PAGE, 4).is_err());
    assert!(matches!(smaller.without_region(&region(PAGE, PAGE)), Err(MemoryFault::Absent { .. })));
    let mut file = tempfile::tempfile().unwrap();
    assert_eq!(batch.write_at(file.as_fd(), 0).bytes, 4);
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "page");
}

#[test]
fn batch_is_full_after_the_most_entries_the_kernel_takes() {
    let memory = guest_memory(&[(0, 4 * PAGE)]);
    let mut batch = Batch::new(memory);
    for entry in 0..BATCH_ENTRIES_MAX as u64 {
        assert_eq!(batch.push(Span { gpa: entry * 8, bytes: 4 }), Ok(true));
    }
    assert_eq!(batch.push(Span { gpa: 2 * PAGE + 9, bytes: 4 }), Ok(false));
    let adjacent = Span { gpa: 8 * (BATCH_ENTRIES_MAX as u64 - 1) + 4, bytes: 4 };
    assert_eq!(batch.push(adjacent), Ok(true), "it extends the last entry");
    assert_eq!(batch.bytes(), 4 * BATCH_ENTRIES_MAX as u64 + 4);
}

#[test]
fn write_that_fails_half_way_says_how_far_it_came() {
    let memory = guest_memory(&[(0, 8 * PAGE)]);
    let mut batch = Batch::new(memory);
    for page in [0, 2, 4, 6] {
        assert_eq!(batch.push(Span { gpa: page * PAGE, bytes: 4096 }), Ok(true));
    }
    let file = sealed_file(2 * PAGE).unwrap();
    let written = batch.write_at(file.as_fd(), 0);
    assert_eq!(written.bytes, 2 * PAGE);
    assert_eq!(written.fault.unwrap().errno, Errno::EPERM);
}

proptest! {
    #[test]
    fn entries_advanced_by_any_short_writes_name_the_rest_of_the_bytes(
        lengths in prop::collection::vec(1u32..50, 1..20), steps in prop::collection::vec(0usize..60, 0..40),
    ) {
        let mut batch = Batch::new(guest_memory(&[(0, 4 * PAGE)]));
        for (index, &bytes) in lengths.iter().enumerate() {
            let pushed = batch.push(Span { gpa: index as u64 * 64, bytes });
            prop_assert_eq!(pushed, Ok(true));
        }
        let flat = |batch: &Batch, first: usize| -> Vec<usize> {
            batch.entries[first..].iter().flat_map(|e| (0..e.iov_len).map(|at| e.iov_base as usize + at)).collect()
        };
        let (mut rest, mut first) = (flat(&batch, 0), 0);
        for step in steps {
            let step = step.min(rest.len());
            first = batch.advance(first, step);
            rest.drain(..step);
            prop_assert_eq!(&flat(&batch, first), &rest);
        }
    }

    #[test]
    fn rewound_batch_is_as_it_was(before in prop::collection::vec((0u64..200, 1u32..64), 0..20),
                                  after in prop::collection::vec((0u64..200, 1u32..64), 0..20)) {
        let mut batch = Batch::new(guest_memory(&[(0, 4 * PAGE)]));
        let show = |batch: &Batch| -> Vec<(usize, usize)> {
            batch.entries.iter().map(|e| (e.iov_base as usize, e.iov_len)).collect()
        };
        for (at, bytes) in before {
            batch.push(Span { gpa: at * 64, bytes }).unwrap();
        }
        let (mark, expected, bytes) = (batch.mark(), show(&batch), batch.bytes());
        for (at, bytes) in after {
            batch.push(Span { gpa: at * 64, bytes }).unwrap();
        }
        batch.rewind(mark);
        prop_assert_eq!(show(&batch), expected);
        prop_assert_eq!(batch.bytes(), bytes);
    }

    #[test]
    fn any_table_is_mapped_or_refused(table: Vec<(u64, u64, u64, u64)>) {
        let table: Vec<_> =
            table.iter().map(|&(gpa, bytes, vmm, at)| VhostUserMemoryRegion::new(gpa, bytes, vmm, at)).collect();
        let _ = map(&table);
    }
}
