//! The bytes of a guest whose ports are streams: frames on the control port, pages on the others.
//!
//! Input: u8 setup (bit 7: pages, else frames; the rest: bytes a piece), then the stream.

use std::{cell::RefCell, fs::File, os::unix::fs::FileExt};

use vtrace_common::{
    ids::Cpu,
    limits::FRAME_BYTES_MAX,
    page::Header,
    wire::{HEADER_BYTES, Hello, agent::FromAgent, client::Area, encode},
};
use vtrace_dp::{
    server::stream::testing::{cut, land},
    virtq::testing::memory_file,
};

/// The smallest page there is, so that an input has many.
const PAGE: usize = 4096;
const AREA: Area = Area { cpu: Cpu(0), offset: 8192, bytes_max: 3 * 4096 + 100, begins_again: false };

thread_local! {
    static FILE: RefCell<File> = RefCell::new(memory_file(0).expect("memory file"));
}

/// Feeds a stream as frames or as pages.
pub fn run(bytes: &[u8]) {
    let Some((&setup, stream)) = bytes.split_first() else { return };
    let step = 1 + usize::from(setup & 0x7f);
    if setup & 0x80 == 0 { frames(stream, step) } else { pages(stream, step * 97) }
}

/// Whatever came before, an agent that goes on speaking is heard again.
fn frames(stream: &[u8], step: usize) {
    let pong = encode(&FromAgent::Pong { id: 7 }).expect("a pong is within its bounds");
    // Longer than what a frame that has begun can still swallow.
    let rest = [&hello()[..], &[0; FRAME_BYTES_MAX], &pong].concat();
    let pieces: Vec<&[u8]> = stream.chunks(step).chain([&rest[..]]).collect();
    let found = cut(&pieces);
    assert_eq!(found.last(), Some(&(false, pong)), "the last frame");
    let bytes: usize = found.iter().map(|(_, bytes)| bytes.len()).sum();
    assert!(bytes <= stream.len() + rest.len(), "{bytes} bytes of {}", stream.len() + rest.len());
    assert!(found.iter().all(|(_, bytes)| bytes.len() <= HEADER_BYTES + FRAME_BYTES_MAX));
}

fn hello() -> Vec<u8> {
    encode(&Hello::ours("seed")).expect("a hello is within its bounds")
}

/// Every page is counted, those in the file are whole, and nothing is outside the area.
fn pages(stream: &[u8], step: usize) {
    FILE.with_borrow(|file| {
        file.set_len(0).expect("a memory file");
        let counts = land(&stream.chunks(step).collect::<Vec<_>>(), file, AREA, u32::try_from(PAGE).expect("4096"));
        let came = u64::try_from(stream.len() / PAGE).expect("few pages");
        assert_eq!(
            (counts.ledger.pages_in, counts.ledger.pages_out + counts.ledger.pages_lost),
            (came, came),
            "{counts:?}"
        );
        let length = file.metadata().expect("a memory file").len();
        assert!(length <= AREA.offset + AREA.bytes_max, "{length} bytes");
        let mut content = vec![0; usize::try_from(length).expect("a short file")];
        file.read_exact_at(&mut content, 0).expect("all of it");
        let area = content.get(8192..).unwrap_or_default();
        let kept = PAGE * usize::try_from(counts.ledger.pages_out).expect("few pages");
        assert!(
            area[..kept].chunks(PAGE).all(|page| Header::parse(page, PAGE).is_ok()),
            "a page that is not valid was kept"
        );
        assert!(area[kept..].iter().all(|byte| *byte == 0), "something remains after the last page");
    });
}

/// Frames cut off by a hello, junk; sound pages, one that is not valid, and half a page.
pub fn seeds() -> Vec<Vec<u8>> {
    let (hello, pong) = (hello(), encode(&FromAgent::Pong { id: 7 }).expect("a pong is within its bounds"));
    let page = |commit: u64| [&9_u64.to_le_bytes()[..], &commit.to_le_bytes(), &[7; PAGE - 16]].concat();
    let bad = [page(64), page(1 << 40), page(64), page(64)[..100].to_vec()].concat();
    vec![
        [&[127], &hello[..], &pong, &pong[..13], &hello, &pong].concat(),
        [&[3], &b"vtrcvtrc\xff\xff"[..], &pong, &hello[..9], &pong].concat(),
        [&[0x80 | 20], &bad[..]].concat(),
        [&[0xff], &page(64).repeat(5)[..]].concat(),
    ]
}
