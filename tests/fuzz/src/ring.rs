//! A ring over any memory: no panic, no hang, no span outside memory.
//!
//! Input: 4 bytes of setup (size and places of the ring's parts), u16 base, then the memory.

use std::sync::{Arc, atomic::Ordering};

use vtrace_dp::virtq::{
    memory::{Batch, Memory, Span},
    ring::{CHAIN_SPANS_MAX, Ring, RingSetup},
    testing::{VMM_BASE, descriptor, event, guest_memory},
};

/// Two adjacent regions of this many bytes.
const REGION_BYTES: u32 = 16 << 10;

/// Where the seeds put the available ring, the used ring, an indirect table, and data.
const SEED_PLACES: [u32; 4] = [0x1000, 0x2000, 0x3000, 0x3400];
const SEED_ENTRIES: u16 = 8;
const NEXT: u16 = 1;
const INDIRECT: u16 = 4;

thread_local! {
    static MEMORY: Arc<Memory> = regions();
}

fn regions() -> Arc<Memory> {
    guest_memory(&[(0, REGION_BYTES.into()), (REGION_BYTES.into(), REGION_BYTES.into())])
}

fn fill(memory: &Memory, content: &[u8]) {
    let mut whole = vec![0; 32 << 10];
    let bytes = content.len().min(whole.len());
    whole[..bytes].copy_from_slice(&content[..bytes]);
    let (low, high) = whole.split_at(16 << 10);
    memory.copy_in(Span { gpa: 0, bytes: REGION_BYTES }, low).expect("region 0");
    memory.copy_in(Span { gpa: REGION_BYTES.into(), bytes: REGION_BYTES }, high).expect("region 1");
}

fn check(memory: &Memory, spans: &[Span], chain_bytes: u32) {
    let mut sum = 0;
    for span in spans {
        assert!(span.gpa + u64::from(span.bytes) <= 2 * u64::from(REGION_BYTES), "{span:?}");
        assert_eq!(memory.span(span.gpa, span.bytes), Ok(*span), "inside one region");
        sum += span.bytes;
    }
    assert_eq!(sum, chain_bytes);
}

/// Takes chains and gives them back until the ring is empty or refused.
pub fn run(input: &[u8]) {
    let memory = MEMORY.with(Arc::clone);
    let Some(mut ring) = start(input, &memory) else { return };
    let mut spans = Vec::with_capacity(CHAIN_SPANS_MAX);
    let mut batch = Batch::new(Arc::clone(&memory));
    for turn in 0..64 {
        spans.clear();
        let Ok(Some(chain)) = ring.take(&mut spans) else { break };
        assert_eq!(spans.capacity(), CHAIN_SPANS_MAX, "room was made once");
        check(&memory, &spans, chain.readable_bytes + chain.writable_bytes);
        for &span in &spans {
            batch.push(span).expect("spans are inside memory");
        }
        batch.clear();
        // The used ring may lie over the other parts: what we write there is hostile, too.
        ring.complete(chain, 0).expect("own state");
        if turn % 3 == 0 && (ring.publish().is_err() || ring.arm_kick_after(turn).is_err()) {
            break;
        }
    }
}

/// Fills memory and starts the ring.
fn start(input: &[u8], memory: &Arc<Memory>) -> Option<Ring> {
    let (&[size, descriptors, available, used, low, high], content) = input.split_first_chunk()?;
    fill(memory, content);
    let place = |place: u8| VMM_BASE + u64::from(place) * 128;
    let setup = RingSetup {
        entries: 1 << (size % 11),
        descriptors: place(descriptors),
        available: place(available),
        used: place(used),
        base: u16::from_le_bytes([low, high]),
        event_idx: size & 0x80 != 0,
        kick: event(),
        call: None,
    };
    Ring::start(setup, Arc::clone(memory)).ok()
}

/// What stands in one descriptor: address, bytes, flags, next.
type Entry = (u32, u32, u16, u16);

/// Chains as a driver makes them, and as only a hostile one does: loops, nested tables, addresses outside memory.
pub fn seeds() -> Vec<Vec<u8>> {
    let [_, _, table, data] = SEED_PLACES;
    let direct: [Entry; 2] = [(data, 64, NEXT, 1), (data + 64, 100, 0, 0)];
    let indirect: [Entry; 1] = [(table, 48, INDIRECT, 0)];
    let across: [Entry; 3] = [(data, 16, NEXT, 1), (REGION_BYTES - 256, 512, NEXT, 2), (data + 16, 4096, 0, 0)];
    let looped: [Entry; 2] = [(data, 8, NEXT, 1), (data, 8, NEXT, 0)];
    let nested: [Entry; 1] = [(table, 16, INDIRECT, 0)];
    let outside: [Entry; 1] = [(2 * REGION_BYTES - 4, 8, 0, 0)];
    vec![
        seed(&direct, &[], 0),
        seed(&indirect, &across, 0x80),
        seed(&looped, &[], 0x80),
        seed(&indirect, &looped, 0),
        seed(&indirect, &nested, 0),
        seed(&outside, &[], 0x80),
    ]
}

/// A ring with its first chain available: `descriptors` in its table, `table` in the indirect one.
fn seed(descriptors: &[Entry], table: &[Entry], event_idx: u8) -> Vec<u8> {
    let memory = regions();
    let [available_at, used_at, table_at, _] = SEED_PLACES;
    for (at, entries) in [(0, descriptors), (table_at, table)] {
        let window = memory.window(at.into(), 16 * usize::from(SEED_ENTRIES)).expect("inside region 0");
        for (index, &(gpa, bytes, flags, next)) in (0..).zip(entries) {
            descriptor(&window, index, gpa.into(), bytes, flags, next);
        }
    }
    let available = memory.window(available_at.into(), 4).expect("inside region 0");
    available.store_u16(2, 1, Ordering::Relaxed);
    let mut content = vec![0; usize::try_from(REGION_BYTES).expect("usize has 64 bits")];
    memory.copy_out(Span { gpa: 0, bytes: REGION_BYTES }, &mut content).expect("region 0");
    let place = |at: u32| u8::try_from(at / 128).expect("places are low");
    [&[size(event_idx), 0, place(available_at), place(used_at), 0, 0], &content[..]].concat()
}

/// The byte that gives [`SEED_ENTRIES`] modulo 11, with the bit of EVENT_IDX or without.
fn size(event_idx: u8) -> u8 {
    let is_right = |size: &u8| 1 << (size % 11) == SEED_ENTRIES;
    (event_idx..).find(is_right).expect("one in eleven is right")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_of_a_driver_give_their_chains_and_hostile_ones_are_refused() {
        let memory = regions();
        let taken = seeds().into_iter().map(|seed| {
            let mut ring = start(&seed, &memory).expect("the places are sound");
            ring.take(&mut Vec::with_capacity(CHAIN_SPANS_MAX)).ok().flatten().map(|chain| chain.readable_bytes)
        });
        assert_eq!(taken.collect::<Vec<_>>(), [Some(164), Some(4624), None, None, None, None]);
    }
}
