//! Claims about frames and messages: what comes out, what is refused, and that any bytes give an answer.

use alloc::{string::ToString, vec, vec::Vec};

use proptest::prelude::*;

use super::{
    agent::{FromAgent, Part, Piece, ToAgent},
    client::{FromServer, LaneLedger, ToServer},
    *,
};
use crate::{
    ids::Cpu,
    ledger::Ledger,
    limits::{FRAME_BYTES_MAX, LANES_MAX, NAME_BYTES_MAX, PIECE_BYTES_MAX},
};

fn frames(bytes: &[u8]) -> Result<Vec<Frame>, Fault> {
    let mut decoder = Decoder::default();
    decoder.push(bytes);
    let mut frames = Vec::new();
    while let Some(frame) = decoder.next_frame()? {
        frames.push(frame);
    }
    Ok(frames)
}

#[test]
fn message_comes_out_as_it_went_in() {
    let bytes = encode(&ToAgent::Mark { text: "here".into() }).unwrap();
    let frames = frames(&bytes).unwrap();
    assert_eq!(frames[0].open::<ToAgent>().unwrap(), ToAgent::Mark { text: "here".into() });
}

#[test]
fn hello_of_another_version_is_read_and_anything_else_is_refused() {
    let hello = Hello { version_min: VERSION - 1, version_max: VERSION + 1, ..Hello::ours("vtrace test") };
    let bytes = encode(&hello).unwrap();
    assert_eq!(frames(&bytes).unwrap()[0].open::<Hello>(), Ok(hello.clone()));
    assert!(hello.speaks_ours());
    let mut stop = encode(&ToAgent::Stop).unwrap();
    stop[4..6].copy_from_slice(&9u16.to_le_bytes());
    assert_eq!(frames(&stop), Err(Fault::Version { theirs: 9 }));
    assert!(Fault::Version { theirs: 9 }.to_string().contains("wire version 9"));
}

/// A hello of version 1 as its program writes it, and as it reads ours: the payload is postcard's of three fields.
#[test]
fn hello_of_version_1_and_ours_read_each_other() {
    let payload = [&[1, 1, 12][..], b"vtrace 0.1.0"].concat();
    let mut bytes = [&MAGIC.to_le_bytes()[..], &1u16.to_le_bytes(), &[0; 6]].concat();
    bytes[8] = u8::try_from(payload.len()).unwrap();
    bytes.extend(&payload);
    let older = frames(&bytes).unwrap()[0].open::<Hello>().unwrap();
    assert_eq!((older.version_min, older.version_max, older.software.as_str()), (1, 1, "vtrace 0.1.0"));
    assert!(!older.speaks_ours());
    let ours = encode(&Hello::ours("vtrace 0.1.0")).unwrap();
    assert_eq!(ours[HEADER_BYTES..], [&[2, 2, 12][..], b"vtrace 0.1.0"].concat());
}

#[test]
fn unknown_capabilities_of_a_newer_side_are_ignored() {
    let newer = Hello { capabilities: Capabilities(u16::MAX), version_max: VERSION + 1, ..Hello::ours("newer") };
    let read = frames(&encode(&newer).unwrap()).unwrap()[0].open::<Hello>().unwrap();
    assert!(read.speaks_ours() && read.capabilities.contains(Capabilities::ALL));
    let fewer = Hello { capabilities: Capabilities::default(), ..newer };
    let read = frames(&encode(&fewer).unwrap()).unwrap()[0].open::<Hello>().unwrap();
    assert!(read.speaks_ours() && !read.capabilities.contains(Capabilities::OFFER));
}

#[test]
fn ledgers_of_the_largest_guest_are_one_frame_whatever_they_say() {
    let ledger = LaneLedger {
        cpu: Cpu(u32::MAX),
        ledger: Ledger {
            pages_in: u64::MAX,
            pages_out: u64::MAX,
            pages_lost: u64::MAX,
            bytes_out: u64::MAX,
            events_lost: Some(u64::MAX),
        },
        bytes_torn: u64::MAX,
        bytes_missing: Some(u64::MAX),
        write_errno: i32::MIN,
    };
    let guest = "n".repeat(NAME_BYTES_MAX);
    encode(&FromServer::Finished { guest: guest.clone(), lanes: vec![ledger; LANES_MAX] }).unwrap();
    let beyond = FromServer::Finished { guest, lanes: vec![ledger; LANES_MAX + 1] };
    assert_eq!(encode(&beyond), Err(Fault::Bound { count: LANES_MAX + 1, count_max: LANES_MAX }));
}

#[test]
fn frame_longer_than_the_limit_is_refused_before_its_bytes_come() {
    let mut bytes = encode(&ToAgent::Stop).unwrap();
    bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(frames(&bytes), Err(Fault::Length(_))));
    let largest = u32::try_from(FRAME_BYTES_MAX).unwrap();
    bytes[8..12].copy_from_slice(&largest.to_le_bytes());
    assert_eq!(frames(&bytes), Ok(vec![]));
}

#[test]
fn bytes_after_a_message_are_refused() {
    let mut bytes = encode(&ToAgent::Stop).unwrap();
    bytes.push(0);
    bytes[8] += 1;
    assert_eq!(frames(&bytes).unwrap()[0].open::<ToAgent>(), Err(Fault::Payload));
}

#[test]
fn family_of_another_link_is_refused() {
    let bytes = encode(&ToServer::List).unwrap();
    assert!(matches!(frames(&bytes).unwrap()[0].open::<ToAgent>(), Err(Fault::Family(3))));
}

#[test]
fn text_beyond_its_bound_is_neither_sent_nor_taken() {
    let guest = "g".repeat(NAME_BYTES_MAX + 1);
    assert!(matches!(encode(&ToServer::Claim { guest }), Err(Fault::Bound { .. })));
}

#[test]
fn largest_piece_fits_a_frame() {
    let bytes = vec![0xff; PIECE_BYTES_MAX];
    let piece = Piece { part: Part::Kallsyms, name: "n".repeat(4096), bytes, last: true };
    encode(&FromAgent::Describe(piece)).unwrap();
}

proptest! {
    #[test]
    fn any_bytes_give_frames_or_a_fault(bytes: Vec<u8>) {
        for frame in frames(&bytes).unwrap_or_default() {
            let _ = frame.open::<Hello>();
            let _ = frame.open::<FromAgent>();
        }
    }

    #[test]
    fn any_payload_gives_a_message_within_bounds_or_a_fault(payload in proptest::collection::vec(any::<u8>(), 0..512), family in 0u16..5) {
        let mut bytes = encode(&ToAgent::Stop).unwrap();
        bytes.truncate(HEADER_BYTES);
        bytes[6..8].copy_from_slice(&family.to_le_bytes());
        bytes[8..12].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        bytes.extend_from_slice(&payload);
        let frame = frames(&bytes).unwrap().remove(0);
        if let Ok(message) = frame.open::<FromAgent>() {
            prop_assert!(encode(&message).is_ok());
        }
        let _ = (frame.open::<ToAgent>(), frame.open::<ToServer>(), frame.open::<client::FromServer>());
    }

    #[test]
    fn stream_cut_anywhere_gives_the_same_frames(cuts in proptest::collection::vec(1usize..40, 1..60)) {
        let messages = [ToAgent::Stop, ToAgent::Mark { text: "a marker".into() }, ToAgent::Ping { id: 7 }];
        let stream: Vec<u8> = messages.iter().flat_map(|message| encode(message).unwrap()).collect();
        let mut decoder = Decoder::default();
        let (mut rest, mut opened) = (&stream[..], Vec::new());
        for cut in cuts.into_iter().chain([stream.len()]) {
            let (now, later) = rest.split_at(cut.min(rest.len()));
            decoder.push(now);
            rest = later;
            while let Some(frame) = decoder.next_frame().unwrap() {
                opened.push(frame.open::<ToAgent>().unwrap());
            }
        }
        prop_assert_eq!(opened, messages);
    }
}
