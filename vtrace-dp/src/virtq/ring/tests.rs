//! Rings beside another ring consumer, and over hostile memory.

#![expect(clippy::cast_possible_truncation, reason = "the numbers of these tests are small")]

use proptest::prelude::*;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::*;
use crate::virtq::testing::{Driver, VMM_BASE, descriptor, event, events, guest_memory, memory_file, region};

const PAGE: u64 = 4096;
const ENTRIES: u16 = 16;
const BUFFER: u32 = 16 << 10;
/// Where the tests below put the parts of a ring they fill by hand.
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const TABLE: u64 = 0x3000;
const DATA: u64 = 0x8000;

fn driver(event_idx: bool) -> (Arc<Memory>, Driver) {
    let memory = guest_memory(&[(0, Driver::footprint(ENTRIES, BUFFER))]);
    let driver = Driver::new(Arc::clone(&memory), 0, ENTRIES, BUFFER, event_idx);
    (memory, driver)
}

fn bytes_of(memory: &Memory, spans: &[Span]) -> Vec<u8> {
    let mut all = Vec::new();
    for &span in spans {
        let mut bytes = vec![0; span.bytes as usize];
        memory.copy_out(span, &mut bytes).unwrap();
        all.extend(bytes);
    }
    all
}

/// A ring of four entries at 0 over `regions`, filled by hand.
struct Bare {
    memory: Arc<Memory>,
    descriptors: Window,
    available: Window,
    ring: Ring,
}

fn setup(entries: u16) -> RingSetup {
    let (available, used) = (VMM_BASE + AVAILABLE, VMM_BASE + USED);
    RingSetup { entries, descriptors: VMM_BASE, available, used, base: 0, event_idx: true, kick: event(), call: None }
}

impl Bare {
    fn new(regions: &[(u64, u64)]) -> Self {
        let memory = guest_memory(regions);
        let ring = Ring::start(setup(4), Arc::clone(&memory)).unwrap();
        let descriptors = memory.window(0, 64).unwrap();
        let available = memory.window(AVAILABLE, 14).unwrap();
        Self { memory, descriptors, available, ring }
    }

    fn offer(&mut self, head: u16) -> Result<(Chain, Vec<Span>), RingFault> {
        let next = self.ring.base();
        self.available.store_u16(4 + 2 * usize::from(next % 4), head, Ordering::Relaxed);
        self.available.store_u16(2, next.wrapping_add(1), Ordering::Release);
        let mut spans = vec![Span { gpa: 1, bytes: 1 }];
        let result = self.ring.take(&mut spans);
        if result.is_err() {
            assert_eq!(spans.len(), 1, "a fault leaves the spans as they were");
        }
        result.map(|chain| (chain.expect("one is available"), spans.split_off(1)))
    }
}

fn bare() -> Bare {
    Bare::new(&[(0, 1 << 20)])
}

#[test]
fn chain_gives_the_bytes_that_were_sent_and_comes_back_used() {
    let (memory, mut driver) = driver(true);
    let mut ring = Ring::start(driver.setup(0), Arc::clone(&memory)).unwrap();
    let sent: Vec<u8> = (0..BUFFER).map(|n| (n % 251) as u8).collect();
    assert!(driver.send(&sent, 4096));
    let mut spans = Vec::new();
    let chain = ring.take(&mut spans).unwrap().unwrap();
    assert_eq!((chain.readable_bytes, chain.writable_bytes, spans.len()), (BUFFER, 0, 4));
    assert_eq!(bytes_of(&memory, &spans), sent);
    assert_eq!((ring.held(), ring.entries_held()), (1, 1));
    ring.complete(chain, 0).unwrap();
    assert_eq!(driver.reclaim(), 0, "not published yet");
    assert!(ring.publish().unwrap());
    assert_eq!((driver.reclaim(), driver.interrupts), (1, 1));
    assert_eq!((ring.held(), ring.entries_held(), ring.base()), (0, 0, 1));
}

#[test]
fn indices_wrap_around_and_nothing_is_lost() {
    for event_idx in [true, false] {
        let (memory, mut driver) = driver(event_idx);
        driver.begin_at(65530);
        let mut ring = Ring::start(driver.setup(65530), Arc::clone(&memory)).unwrap();
        let mut spans = Vec::new();
        for round in 0u32..100 {
            let count = 1 + round % u32::from(ENTRIES);
            for number in 0..count {
                assert!(driver.send(&(round * 100 + number).to_le_bytes(), 4));
            }
            for number in 0..count {
                spans.clear();
                let chain = ring.take(&mut spans).unwrap().unwrap();
                assert_eq!(bytes_of(&memory, &spans), (round * 100 + number).to_le_bytes());
                ring.complete(chain, 0).unwrap();
            }
            assert!(ring.publish().unwrap(), "the driver asked for an interrupt");
            assert_eq!(driver.reclaim(), count as usize);
            assert!(!ring.arm_kick().unwrap());
        }
    }
}

#[test]
fn ring_goes_on_where_another_stopped() {
    let (memory, mut driver) = driver(true);
    let mut spans = Vec::new();
    let mut base = 0;
    for number in 0u32..50 {
        let mut ring = Ring::start(driver.setup(base), Arc::clone(&memory)).unwrap();
        assert!(driver.send(&number.to_le_bytes(), 4));
        spans.clear();
        let chain = ring.take(&mut spans).unwrap().unwrap();
        assert_eq!(bytes_of(&memory, &spans), number.to_le_bytes());
        ring.complete(chain, 0).unwrap();
        ring.publish().unwrap();
        base = ring.base();
        assert_eq!(driver.reclaim(), 1);
    }
}

#[test]
fn kick_comes_when_as_many_chains_are_there_as_were_asked_for() {
    let (memory, mut driver) = driver(true);
    let mut ring = Ring::start(driver.setup(0), memory).unwrap();
    assert!(!ring.arm_kick_after(4).unwrap());
    for sent in 1..=8 {
        assert!(driver.send(b"x", 1));
        assert_eq!(events(ring.kick()), u64::from(sent == 4), "after {sent}");
    }
    assert!(ring.arm_kick_after(8).unwrap(), "eight are waiting already");
    assert!(!ring.arm_kick_after(9).unwrap());
}

#[test]
fn driver_without_event_idx_is_told_not_to_kick_while_we_look() {
    let (memory, mut driver) = driver(false);
    let mut ring = Ring::start(driver.setup(0), memory).unwrap();
    assert!(driver.send(b"x", 1));
    assert_eq!(driver.kicks, 1);
    ring.take(&mut Vec::new()).unwrap().unwrap();
    assert!(driver.send(b"x", 1));
    assert_eq!(driver.kicks, 1);
    assert!(ring.arm_kick().unwrap(), "the second one is waiting");
    assert!(driver.send(b"x", 1));
    assert_eq!(driver.kicks, 2);
}

#[test]
fn guest_that_does_not_want_an_interrupt_gets_none_after_the_first() {
    let (memory, mut driver) = driver(true);
    let mut ring = Ring::start(driver.setup(0), memory).unwrap();
    for number in 0..10 {
        assert!(driver.send(b"x", 1));
        let chain = ring.take(&mut Vec::new()).unwrap().unwrap();
        ring.complete(chain, 0).unwrap();
        assert_eq!(ring.publish().unwrap(), number == 0, "reclaim was not called, so used_event stays");
    }
}

#[test]
fn interrupt_is_repeated_at_the_eventfd_that_replaces_another() {
    let (memory, driver) = driver(true);
    let mut ring = Ring::start(driver.setup(0), memory).unwrap();
    let call = event();
    ring.set_call(Some(call.try_clone().unwrap()));
    assert_eq!(events(&call), 1);
}

#[test]
fn ring_of_odd_or_huge_size_or_outside_memory_does_not_start() {
    let memory = guest_memory(&[(0, 1 << 20)]);
    let start = |setup: RingSetup| Ring::start(setup, Arc::clone(&memory)).err();
    assert_eq!(start(setup(0)), Some(RingFault::Entries(0)));
    assert_eq!(start(setup(3)), Some(RingFault::Entries(3)));
    assert_eq!(start(setup(2048)), Some(RingFault::Entries(2048)));
    let odd = VMM_BASE + USED + 2;
    assert_eq!(start(RingSetup { used: odd, ..setup(4) }), Some(RingFault::Alignment(odd)));
    let late = VMM_BASE + (1 << 20) - 32;
    assert!(matches!(start(RingSetup { descriptors: late, ..setup(4) }), Some(RingFault::Address(_))));
    assert_eq!(start(RingSetup { available: 0, ..setup(4) }), Some(RingFault::Address(0)));
}

#[test]
fn available_index_that_jumps_over_the_ring_is_a_fault() {
    let mut bare = bare();
    bare.available.store_u16(2, 5, Ordering::Release);
    let jump = RingFault::Jump { available: 5, next: 0, held: 0 };
    assert_eq!(bare.ring.take(&mut Vec::new()).err(), Some(jump));
    assert_eq!(bare.ring.arm_kick().err(), Some(jump));
}

#[test]
fn more_chains_than_entries_in_flight_are_a_fault() {
    let mut bare = bare();
    for _ in 0..4 {
        bare.offer(0).unwrap();
    }
    assert!(matches!(bare.offer(0), Err(RingFault::Jump { held: 4, .. })));
}

#[test]
fn loops_are_found() {
    let mut bare = bare();
    descriptor(&bare.descriptors, 0, DATA, 1, NEXT, 1);
    descriptor(&bare.descriptors, 1, DATA, 1, NEXT, 0);
    assert_eq!(bare.offer(0).err(), Some(RingFault::Loop(0)));
    descriptor(&bare.descriptors, 0, TABLE, 32, INDIRECT, 0);
    let table = bare.memory.window(TABLE, 32).unwrap();
    descriptor(&table, 0, DATA, 0, NEXT, 1);
    descriptor(&table, 1, DATA, 0, NEXT, 1);
    assert_eq!(bare.offer(0).err(), Some(RingFault::Loop(0)));
}

#[test]
fn indices_outside_their_table_are_a_fault() {
    let mut bare = bare();
    assert_eq!(bare.offer(4).err(), Some(RingFault::Descriptor { index: 4, entries: 4 }));
    descriptor(&bare.descriptors, 0, DATA, 1, NEXT, 900);
    assert_eq!(bare.offer(0).err(), Some(RingFault::Descriptor { index: 900, entries: 4 }));
}

#[test]
fn malformed_indirect_tables_are_a_fault() {
    let mut bare = bare();
    for (bytes, flags) in [(0, INDIRECT), (17, INDIRECT), (16, INDIRECT | NEXT)] {
        descriptor(&bare.descriptors, 0, TABLE, bytes, flags, 1);
        assert_eq!(bare.offer(0).err(), Some(RingFault::Indirect(0)));
    }
    descriptor(&bare.descriptors, 0, TABLE, 16, INDIRECT, 0);
    descriptor(&bare.memory.window(TABLE, 16).unwrap(), 0, TABLE, 16, INDIRECT, 0);
    assert_eq!(bare.offer(0).err(), Some(RingFault::Indirect(0)), "nested");
    descriptor(&bare.descriptors, 0, TABLE + 4, 16, INDIRECT, 0);
    assert_eq!(bare.offer(0).err(), Some(RingFault::Alignment(TABLE + 4)));
    descriptor(&bare.descriptors, 0, 1 << 40, 16, INDIRECT, 0);
    assert_eq!(bare.offer(0).err(), Some(RingFault::Address(1 << 40)));
    descriptor(&bare.descriptors, 0, TABLE, 16 << 16, INDIRECT, 0);
    assert_eq!(bare.offer(0).err(), Some(RingFault::Long(0)));
}

#[test]
fn segments_outside_memory_are_a_fault_even_by_one_byte() {
    let mut bare = bare();
    descriptor(&bare.descriptors, 0, (1 << 20) - 8, 8, 0, 0);
    assert_eq!(bare.offer(0).unwrap().1, [Span { gpa: (1 << 20) - 8, bytes: 8 }]);
    descriptor(&bare.descriptors, 0, (1 << 20) - 8, 9, 0, 0);
    assert_eq!(bare.offer(0).err(), Some(RingFault::Address(1 << 20)));
    descriptor(&bare.descriptors, 0, u64::MAX - 4, 64, 0, 0);
    assert_eq!(bare.offer(0).err(), Some(RingFault::Address(u64::MAX - 4)));
}

#[test]
fn segment_across_adjacent_regions_is_split() {
    let mut bare = Bare::new(&[(0, 16 * PAGE), (16 * PAGE, PAGE)]);
    descriptor(&bare.descriptors, 0, 16 * PAGE - 10, 100, 0, 0);
    let (chain, spans) = bare.offer(0).unwrap();
    assert_eq!(chain.readable_bytes, 100);
    assert_eq!(spans, [Span { gpa: 16 * PAGE - 10, bytes: 10 }, Span { gpa: 16 * PAGE, bytes: 90 }]);
}

#[test]
fn readable_segment_after_a_writable_one_is_a_fault() {
    let mut bare = bare();
    descriptor(&bare.descriptors, 0, DATA, 8, NEXT | WRITE, 1);
    descriptor(&bare.descriptors, 1, DATA, 8, 0, 0);
    assert_eq!(bare.offer(0).err(), Some(RingFault::Order(0)));
}

#[test]
fn chain_beyond_its_bounds_is_a_fault() {
    let mut bare = bare();
    let (entries, bytes) = (CHAIN_SEGMENTS_MAX as u16 + 1, 16 * (CHAIN_SEGMENTS_MAX as u32 + 1));
    let table = bare.memory.window(TABLE, bytes as usize).unwrap();
    for index in 0..entries {
        descriptor(&table, index, DATA, 1, if index + 1 < entries { NEXT } else { 0 }, index + 1);
    }
    descriptor(&bare.descriptors, 0, TABLE, bytes, INDIRECT, 0);
    assert_eq!(bare.offer(0).err(), Some(RingFault::Long(0)));
    descriptor(&bare.descriptors, 0, DATA, u32::MAX, 0, 0);
    assert_eq!(bare.offer(0).err(), Some(RingFault::Long(0)));
}

#[test]
fn table_longer_than_the_ring_is_taken() {
    let mut bare = bare();
    let table = bare.memory.window(TABLE, 16 * 300).unwrap();
    for index in 0..300 {
        descriptor(&table, index, DATA + u64::from(index), 1, if index < 299 { NEXT } else { 0 }, index + 1);
    }
    descriptor(&bare.descriptors, 2, TABLE, 16 * 300, INDIRECT, 0);
    let (chain, spans) = bare.offer(2).unwrap();
    assert_eq!((chain.head, chain.readable_bytes, spans.len()), (2, 300, 300));
}

#[test]
fn chain_of_direct_descriptors_occupies_as_many_entries() {
    let mut bare = bare();
    for index in 0..3 {
        descriptor(&bare.descriptors, index, DATA, 5, if index < 2 { NEXT } else { 0 }, index + 1);
    }
    let (chain, _) = bare.offer(0).unwrap();
    assert_eq!((bare.ring.held(), bare.ring.entries_held()), (1, 3));
    bare.ring.complete(chain, 0).unwrap();
    bare.ring.publish().unwrap();
    assert_eq!((bare.ring.held(), bare.ring.entries_held()), (0, 0));
}

#[test]
fn remapped_ring_sees_the_new_memory() {
    let file = memory_file(1 << 20).unwrap();
    let one = Memory::map(&[region(0, 1 << 20)], vec![file.try_clone().unwrap()]).unwrap();
    let mut driver = Driver::new(Arc::clone(&one), 0, ENTRIES, 4096, true);
    let mut ring = Ring::start(driver.setup(0), one).unwrap();
    assert_eq!(ring.remap(Arc::new(Memory::default())).err(), Some(RingFault::Address(VMM_BASE)));
    let more = memory_file(PAGE).unwrap();
    let other = Memory::map(&[region(0, 1 << 20), region(1 << 20, PAGE)], vec![file, more]).unwrap();
    ring.remap(Arc::clone(&other)).unwrap();
    assert!(driver.send(b"seen", 4));
    let mut spans = Vec::new();
    ring.take(&mut spans).unwrap().unwrap();
    assert_eq!(bytes_of(&other, &spans), b"seen");
}

/// What one chain looks like before it is put into memory.
#[derive(Clone, Debug)]
struct Plan {
    segments: Vec<(u64, u32)>,
    writable_from: usize,
    indirect: bool,
}

fn plan() -> impl Strategy<Value = Plan> {
    let segment = (0x10_0000u64..0x1f_0000, 1u32..3000);
    (prop::collection::vec(segment, 1..20), 0usize..20, any::<bool>()).prop_map(
        |(segments, writable_from, indirect)| {
            // Direct chains must fit the ring that they share with others.
            let most = if indirect { segments.len() } else { segments.len().min(4) };
            Plan { segments: segments[..most].to_vec(), writable_from, indirect }
        },
    )
}

/// Puts chains into a ring of 64 entries at 0, indirect tables from 0x8_0000 on.
fn build(memory: &Memory, plans: &[Plan]) {
    let descriptors = memory.window(0, 64 * 16).unwrap();
    let available = memory.window(AVAILABLE, 4 + 2 * 64).unwrap();
    let mut free = 0;
    for (number, plan) in plans.iter().enumerate() {
        let table_gpa = 0x8_0000 + 0x1000 * number as u64;
        let table = memory.window(table_gpa, 16 * 32).unwrap();
        let (target, first) = if plan.indirect { (&table, 0) } else { (&descriptors, free) };
        for (index, &(gpa, bytes)) in plan.segments.iter().enumerate() {
            let write = if index >= plan.writable_from { WRITE } else { 0 };
            let next = if index + 1 < plan.segments.len() { NEXT } else { 0 };
            descriptor(target, first + index as u16, gpa, bytes, write | next, first + index as u16 + 1);
        }
        if plan.indirect {
            descriptor(&descriptors, free, table_gpa, 16 * plan.segments.len() as u32, INDIRECT, 0);
        }
        available.store_u16(4 + 2 * number, free, Ordering::Relaxed);
        free += if plan.indirect { 1 } else { plan.segments.len() as u16 };
    }
    available.store_u16(2, plans.len() as u16, Ordering::Release);
}

/// Another device's ring consumer, and a memory of its own over the same file. (Its crate's mock driver is not used:
/// that one lets the used ring overlap the available ring, `end()` takes entries for bytes.)
fn oracle(file: &std::fs::File, bytes: u64, entries: u16) -> (GuestMemoryMmap, Queue) {
    let offset = FileOffset::new(file.try_clone().unwrap(), 0);
    let mapping = MmapRegion::from_file(offset, usize::try_from(bytes).unwrap()).unwrap();
    let memory = GuestMemoryMmap::from_regions(vec![GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap()]).unwrap();
    let mut queue = Queue::new(entries).unwrap();
    queue.set_desc_table_address(Some(0), Some(0));
    queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
    queue.set_used_ring_address(Some(USED as u32), Some(0));
    queue.set_ready(true);
    (memory, queue)
}

proptest! {
    #[test]
    fn chains_are_taken_as_virtio_queue_takes_them(plans in prop::collection::vec(plan(), 0..16)) {
        let bytes = 2 << 20;
        let file = memory_file(bytes).unwrap();
        let (oracle_memory, mut oracle) = oracle(&file, bytes, 64);
        let memory = Memory::map(&[region(0, bytes)], vec![file]).unwrap();
        build(&memory, &plans);
        let mut ring = Ring::start(setup(64), memory).unwrap();
        let theirs: Vec<_> = oracle.iter(&oracle_memory).unwrap().map(|chain| {
            let head = chain.head_index();
            (head, chain.map(|d| (d.addr().0, d.len())).collect::<Vec<_>>())
        }).collect();
        let mut ours = Vec::new();
        let mut spans = Vec::new();
        while let Some(chain) = ring.take(&mut spans).unwrap() {
            let total: u32 = spans.iter().map(|span| span.bytes).sum();
            prop_assert_eq!(total, chain.readable_bytes + chain.writable_bytes);
            ours.push((chain.head, spans.drain(..).map(|span| (span.gpa, span.bytes)).collect::<Vec<_>>()));
        }
        prop_assert_eq!(ours.len(), plans.len());
        prop_assert_eq!(ours, theirs);
    }

    /// Both publish the same entries into their own used ring, and look at the same event index of the driver.
    #[test]
    fn interrupts_and_used_entries_come_as_virtio_queue_makes_them(
        steps in prop::collection::vec((1u16..4, any::<bool>(), any::<u16>()), 1..12), start: u16,
    ) {
        let bytes = 1 << 20;
        let file = memory_file(bytes).unwrap();
        let (oracle_memory, mut oracle) = oracle(&file, bytes, 16);
        oracle.set_used_ring_address(Some(TABLE as u32), Some(0));
        oracle.set_event_idx(true);
        oracle.set_next_avail(start);
        oracle.set_next_used(start);
        let memory = Memory::map(&[region(0, bytes)], vec![file]).unwrap();
        let available = memory.window(AVAILABLE, 6 + 2 * 16).unwrap();
        let (used, their_used) = (memory.window(USED, 6 + 8 * 16).unwrap(), memory.window(TABLE, 6 + 8 * 16).unwrap());
        available.store_u16(2, start, Ordering::Relaxed);
        used.store_u16(2, start, Ordering::Relaxed);
        let mut ring = Ring::start(RingSetup { base: start, ..setup(16) }, memory).unwrap();
        let mut next = start;
        for (chains, near, event) in steps {
            // An event index somewhere near the used index, or anywhere.
            let event = if near { next.wrapping_add(event % 6).wrapping_sub(3) } else { event };
            available.store_u16(4 + 2 * 16, event, Ordering::Relaxed);
            for _ in 0..chains {
                available.store_u16(4 + 2 * usize::from(next % 16), next % 16, Ordering::Relaxed);
                next = next.wrapping_add(1);
            }
            available.store_u16(2, next, Ordering::Release);
            for _ in 0..chains {
                let chain = ring.take(&mut Vec::new()).unwrap().unwrap();
                ring.complete(chain, 7).unwrap();
                oracle.add_used(&oracle_memory, chain.head, 7).unwrap();
            }
            let theirs = oracle.needs_notification(&oracle_memory).unwrap();
            // Ours interrupts once after the start in any case: the driver may have waited since before.
            let first = next == start.wrapping_add(chains);
            prop_assert_eq!(ring.publish().unwrap(), theirs || first);
            for at in (0..4 + 8 * 16).step_by(4) {
                prop_assert_eq!(used.load_u32(at, Ordering::Relaxed), their_used.load_u32(at, Ordering::Relaxed));
            }
        }
    }

    #[test]
    fn any_memory_gives_chains_inside_it_or_a_fault(
        words in prop::collection::vec(hostile_word(), 1..1200), entries_log in 0u16..6, offsets: [u8; 3], index: u16,
    ) {
        let bytes = 64 << 10;
        let memory = guest_memory(&[(0, bytes / 2), (bytes / 2, bytes / 2)]);
        let all = memory.window(0, usize::try_from(bytes / 2).unwrap()).unwrap();
        for (at, &word) in words.iter().enumerate() {
            all.store_u64(at * 8, word, Ordering::Relaxed);
        }
        let at = |n: usize| VMM_BASE + u64::from(offsets[n]) * 16;
        let setup = RingSetup {
            entries: 1 << entries_log, descriptors: at(0), available: at(1), used: at(2), base: index, ..setup(4)
        };
        let Ok(mut ring) = Ring::start(setup, Arc::clone(&memory)) else { return Ok(()) };
        let mut spans = Vec::with_capacity(CHAIN_SPANS_MAX);
        for _ in 0..64 {
            spans.clear();
            match ring.take(&mut spans) {
                Ok(Some(chain)) => {
                    for span in &spans {
                        prop_assert!(span.gpa + u64::from(span.bytes) <= bytes, "{span:?}");
                        prop_assert_eq!(memory.span(span.gpa, span.bytes), Ok(*span));
                    }
                    let total: u32 = spans.iter().map(|span| span.bytes).sum();
                    prop_assert_eq!(total, chain.readable_bytes + chain.writable_bytes);
                    ring.complete(chain, 0).unwrap();
                    ring.publish().unwrap();
                    let _ = ring.arm_kick_after(3);
                }
                Ok(None) | Err(_) => break,
            }
        }
        prop_assert!(spans.capacity() == CHAIN_SPANS_MAX, "never more than were made room for");
    }
}

/// Words that often look like descriptors: small addresses, small lengths, all flags.
fn hostile_word() -> impl Strategy<Value = u64> {
    let control = (0u64..200, 0u64..8, 0u64..40).prop_map(|(bytes, flags, next)| bytes | (flags << 32) | (next << 48));
    let table = (1u64..8, 0u64..40).prop_map(|(entries, next)| (entries * 16) | (4 << 32) | (next << 48));
    prop_oneof![Just(0u64), any::<u64>(), (0u64..8192).prop_map(|n| n * 8), control, table]
}
