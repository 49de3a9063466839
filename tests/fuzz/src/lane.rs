//! A lane fed any bytes in any pieces, with writes and failures anywhere: no panic, pages balance, nothing is written
//! outside the area, and without a failure the area holds exactly the pages with sound headers.
//!
//! Input: 2 bytes of setup (pages of the area, which write fails), then pieces: u16 length and what follows it (bit 15:
//! write after it), then their bytes.

use std::{cell::RefCell, fs::File, io, os::unix::fs::FileExt, sync::Arc};

use vtrace_common::{
    ids::Cpu,
    page::{HEADER_BYTES, Header},
    wire::client::Area,
};
use vtrace_dp::{
    drain::{
        ledger::Counters,
        ring::lane::RingLane,
        sink::{FileSink, Sink},
    },
    sys::{SysError, write_all::Written},
    virtq::{
        memory::{Batch, Memory, Span},
        testing::{guest_memory, memory_file},
    },
};

const PAGE: usize = 4096;
const START: u64 = 8192;
const MEMORY_BYTES: u64 = 256 << 10;

thread_local! {
    static MEMORY: Arc<Memory> = guest_memory(&[(0, MEMORY_BYTES)]);
    static FILE: RefCell<File> = RefCell::new(memory_file(0).expect("memory file"));
}

/// A file that fails at one write, half way, and watches its borders.
#[derive(Debug)]
struct Watched {
    file: FileSink,
    area_bytes: u64,
    writes_left: u8,
    failed: bool,
}

impl Sink for Watched {
    fn write(&mut self, batch: &mut Batch, offset: u64) -> Written {
        let bytes = batch.bytes();
        assert!(offset >= START && offset + bytes <= START + self.area_bytes, "{offset} + {bytes}");
        self.writes_left = self.writes_left.saturating_sub(1);
        if self.writes_left == 0 {
            self.failed = true;
            return Written {
                bytes: bytes / 2,
                fault: Some(SysError { call: "pwritev", errno: nix::errno::Errno::ENOSPC }),
            };
        }
        self.file.write(batch, offset)
    }

    fn erase(&mut self, offset: u64, bytes: u64) -> io::Result<()> {
        assert!(offset >= START && bytes < 4096 && offset + bytes <= START + self.area_bytes);
        self.file.erase(offset, bytes)
    }
}

/// Feeds the lane; returns the stream as it came.
fn feed(lane: &mut RingLane, batch: &mut Batch, sink: &mut Watched, mut input: &[u8]) -> Vec<u8> {
    let (mut stream, mut gpa) = (Vec::new(), 0);
    while let Some((&[low, high], rest)) = input.split_first_chunk() {
        let length = u16::from_le_bytes([low, high]);
        let (piece, rest) = rest.split_at(usize::from(length & 0x7fff).min(rest.len()));
        input = rest;
        let bytes = u32::try_from(piece.len()).expect("at most 0x7fff");
        if gpa + u64::from(bytes) + 1 > MEMORY_BYTES {
            break;
        }
        let span = Span { gpa, bytes };
        batch.memory().copy_in(span, piece).expect("inside memory");
        gpa += u64::from(bytes) + u64::from(length & 1);
        lane.accept(span, batch, sink).expect("inside memory");
        stream.extend_from_slice(piece);
        if length & 0x8000 != 0 {
            lane.write(batch, sink);
        }
    }
    stream
}

/// Feeds one lane and compares what it wrote.
pub fn run(input: &[u8]) {
    let Some((&[pages_max, writes_left], input)) = input.split_first_chunk() else { return };
    let file = FILE.with_borrow(|file| file.try_clone().expect("descriptors left"));
    file.set_len(0).expect("own file");
    let area_bytes = u64::from(pages_max % 16) * 4096;
    let area = Area { cpu: Cpu(0), offset: START, bytes_max: area_bytes, begins_again: false };
    let mut lane = RingLane::new(area, 4096, Arc::new(Counters::new(Cpu(0))));
    let mut batch = Batch::new(MEMORY.with(Arc::clone));
    let inner = FileSink::new(file.try_clone().expect("descriptors left")).expect("a memory file");
    let mut sink = Watched { file: inner, area_bytes, writes_left, failed: false };
    let stream = feed(&mut lane, &mut batch, &mut sink, input);
    let counts = lane.close(&mut batch, &mut sink, None);

    assert!(counts.ledger.is_balanced());
    let pages = stream.chunks_exact(PAGE);
    assert_eq!(counts.bytes_torn, u64::try_from(pages.remainder().len()).expect("less than a page"));
    assert_eq!(counts.ledger.pages_in, u64::try_from(stream.len() / PAGE).expect("small"));
    if !sink.failed {
        let sound = pages.filter(|page| Header::parse(page, PAGE).is_ok()).take(usize::from(pages_max % 16));
        let expected: Vec<u8> = sound.flat_map(unmarked).collect();
        assert_eq!(counts.ledger.pages_out, u64::try_from(expected.len() / PAGE).expect("small"));
        let mut found = vec![0; expected.len()];
        file.read_exact_at(&mut found, START).expect("what was written");
        let found: Vec<u8> = found.chunks_exact(PAGE).flat_map(unmarked).collect();
        assert!(found == expected, "the area holds the sound pages");
        assert!(file.metadata().expect("own file").len() <= START + area_bytes);
    }
}

/// A sound page without its mark, which the lane sets after a gap.
fn unmarked(page: &[u8]) -> Vec<u8> {
    let header = Header::parse(page, PAGE).expect("a sound page");
    let mut page = page.to_vec();
    page[8..HEADER_BYTES].copy_from_slice(&Header { missed: false, ..header }.commit().to_le_bytes());
    page
}

/// Sound, torn and refused pages, in pieces of several lengths, with a full area and with a full disk.
pub fn seeds() -> Vec<Vec<u8>> {
    let page = |data_bytes: u32| {
        let header = Header { time: 7, data_bytes, missed: false, missed_stored: false };
        let mut page = vec![0x5a; PAGE];
        page[..8].copy_from_slice(&header.time.to_le_bytes());
        page[8..HEADER_BYTES].copy_from_slice(&header.commit().to_le_bytes());
        page
    };
    let [full, empty, overlong] = [4080, 0, 4081].map(page);
    let sound = [full.clone(), empty.clone(), full.clone()].concat();
    let mixed = [full, overlong, empty, vec![1; 100]].concat();
    let seed = |setup: [u8; 2], stream: &[u8], piece_bytes: usize| {
        let piece = |bytes: &[u8]| {
            let length = u16::try_from(bytes.len()).expect("pieces are short");
            [&(length | 0x8000).to_le_bytes()[..], bytes].concat()
        };
        [setup.to_vec(), stream.chunks(piece_bytes).flat_map(piece).collect()].concat()
    };
    vec![
        seed([4, 255], &sound, PAGE),
        seed([15, 255], &mixed, 1000),
        seed([2, 255], &sound, 3 * PAGE),
        seed([4, 2], &sound, PAGE),
    ]
}
