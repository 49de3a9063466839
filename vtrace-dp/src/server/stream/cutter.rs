//! Frames of a stream that may begin, end and begin again anywhere.
//!
//! In:    bytes of a guest, those of an agent that died in the middle of a frame and of its successor among them
//! Out:   whole frames; bytes that are not a frame are skipped
//! Runs:  on the control thread; no effects
//! Full:  at most one frame of the longest kind and what was pushed after it
//! Trust: nothing: a guest that sends what looks like a hello in the middle of a frame loses that frame
//!
//! A stream does not show that an agent goes and another comes: no port is closed, no port is opened. What the successor says
//! first is a hello, so a hello ends whatever frame is not whole. Only one that comes so that its first bytes, and no more,
//! end a frame is lost: what may follow each frame cannot be waited for. The silence that follows has it said again.

use vtrace_common::{
    limits::{FRAME_BYTES_MAX, TEXT_BYTES_MAX},
    wire::{Family, HEADER_BYTES, MAGIC, VERSION},
};

/// The family of a hello.
const HELLO: u16 = Family::Hello as u16;
/// The last family there is.
const FAMILY_MAX: u16 = Family::FromServer as u16;
/// Bytes of the longest hello.
const HELLO_BYTES_MAX: usize = HEADER_BYTES + 16 + TEXT_BYTES_MAX;

/// A whole frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Piece {
    /// The frame says that it is a hello.
    pub(super) is_hello: bool,
    /// All of it.
    pub(super) bytes: Vec<u8>,
}

/// What has come and was not given out.
#[derive(Debug, Default)]
pub(super) struct Cutter {
    bytes: Vec<u8>,
    /// Before this no hello begins but at the first byte: it is looked for once, however slowly a frame comes.
    scanned: usize,
}

impl Cutter {
    /// Takes the next bytes.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Forgets everything: another stream begins.
    pub(super) fn reset(&mut self) {
        self.bytes.clear();
        self.scanned = 0;
    }

    /// The next whole frame.
    pub(super) fn next_piece(&mut self) -> Option<Piece> {
        loop {
            let start = self.bytes.windows(4).position(|word| word == MAGIC.to_le_bytes());
            // Without one, the last three bytes may be the beginning of one.
            self.skip(start.unwrap_or(self.bytes.len().saturating_sub(3)));
            start?;
            if self.bytes.len() < HEADER_BYTES {
                return None;
            }
            let Some((family, length)) = header(&self.bytes) else {
                self.skip(1);
                continue;
            };
            if self.bytes.len() < length {
                let hello = self.hello_inside()?;
                self.skip(hello);
                continue;
            }
            if let Some(hello) = self.hello_across(length) {
                self.skip(hello);
                continue;
            }
            let bytes = self.bytes[..length].to_vec();
            self.skip(length);
            return Some(Piece { is_hello: family == HELLO, bytes });
        }
    }

    fn skip(&mut self, bytes: usize) {
        if bytes > 0 {
            self.bytes.drain(..bytes);
            self.scanned = 0;
        }
    }

    /// Where a hello begins that goes on after the first `length` bytes: the frame they were to be never ended.
    fn hello_across(&self, length: usize) -> Option<usize> {
        let end = self.bytes.len().min(length + 3);
        let magics = self.bytes[..end].windows(4).enumerate().skip(1);
        let mut found = magics.filter(|(_, word)| *word == MAGIC.to_le_bytes()).map(|(at, _)| at);
        found
            .find(|at| header(&self.bytes[*at..]).is_some_and(|(family, bytes)| family == HELLO && at + bytes > length))
    }

    /// Where a whole hello begins after the first byte.
    fn hello_inside(&mut self) -> Option<usize> {
        self.scanned = self.scanned.max(1);
        loop {
            let rest = self.bytes.get(self.scanned..).unwrap_or_default();
            let Some(at) = rest.windows(4).position(|word| word == MAGIC.to_le_bytes()) else {
                self.scanned = self.bytes.len().saturating_sub(3).max(self.scanned);
                return None;
            };
            self.scanned += at;
            let rest = &self.bytes[self.scanned..];
            match header(rest) {
                None if rest.len() < HEADER_BYTES => return None,
                Some((HELLO, length)) if length <= HELLO_BYTES_MAX => {
                    return (length <= rest.len()).then_some(self.scanned);
                }
                _ => self.scanned += 1,
            }
        }
    }
}

/// Family and length, header included, if the bytes begin with a header.
fn header(bytes: &[u8]) -> Option<(u16, usize)> {
    let header = bytes.get(..HEADER_BYTES)?;
    let family = u16::from_le_bytes([header[6], header[7]]);
    let version = u16::from_le_bytes([header[4], header[5]]);
    if family > FAMILY_MAX || (family != HELLO && version != VERSION) {
        return None;
    }
    let length = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
    let length = usize::try_from(length).ok().filter(|length| *length <= FRAME_BYTES_MAX)?;
    (header[..4] == MAGIC.to_le_bytes()).then_some((family, HEADER_BYTES + length))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vtrace_common::wire::{
        Hello,
        agent::{FromAgent, Part, Piece as Text},
        encode,
    };

    use super::*;

    fn hello() -> Vec<u8> {
        encode(&Hello::ours("agent")).unwrap()
    }

    fn pong(id: u32) -> Vec<u8> {
        encode(&FromAgent::Pong { id }).unwrap()
    }

    fn long() -> Vec<u8> {
        let text = Text { part: Part::Kallsyms, name: String::new(), bytes: vec![b'x'; 40_000], last: false };
        encode(&FromAgent::Describe(text)).unwrap()
    }

    fn cut(bytes: &[u8], step: usize) -> Vec<Piece> {
        let mut cutter = Cutter::default();
        let mut pieces = Vec::new();
        for piece in bytes.chunks(step) {
            cutter.push(piece);
            pieces.extend(std::iter::from_fn(|| cutter.next_piece()));
        }
        pieces
    }

    #[test]
    fn frames_come_out_as_they_went_in_however_they_arrive() {
        let stream = [hello(), pong(1), long(), pong(2)].concat();
        for step in [61, 4096, stream.len()] {
            let pieces = cut(&stream, step);
            assert_eq!(pieces.iter().map(|piece| piece.is_hello).collect::<Vec<_>>(), [true, false, false, false]);
            assert_eq!(pieces.concat_bytes(), stream);
        }
    }

    #[test]
    fn hello_after_half_a_frame_is_found_at_once() {
        let stream = [&hello()[..], &long()[..33_000], &hello(), &pong(3)].concat();
        let pieces = cut(&stream, 1000);
        assert_eq!(pieces.concat_bytes(), [hello(), hello(), pong(3)].concat());
    }

    #[test]
    fn junk_before_a_frame_is_skipped() {
        let stream = [b"vtrvtrc\xff\xff\xff\xff\xff\xff\xff\xffjunk".to_vec(), pong(4)].concat();
        assert_eq!(cut(&stream, 3).concat_bytes(), pong(4));
    }

    #[test]
    fn hello_that_makes_a_short_frame_whole_is_a_hello() {
        let pong = pong(1 << 30);
        for length in HEADER_BYTES..pong.len() {
            let stream = [&pong[..length], &hello()].concat();
            assert_eq!(cut(&stream, stream.len()).concat_bytes(), hello(), "{length} bytes of the frame before");
        }
    }

    trait Bytes {
        fn concat_bytes(&self) -> Vec<u8>;
    }

    impl Bytes for Vec<Piece> {
        fn concat_bytes(&self) -> Vec<u8> {
            self.iter().flat_map(|piece| piece.bytes.clone()).collect()
        }
    }

    proptest! {
        #[test]
        fn whatever_comes_is_bounded_and_a_hello_at_its_end_is_found(
            junk in proptest::collection::vec(prop_oneof![any::<u8>(), Just(b'v'), Just(b't'), Just(b'r'), Just(b'c')], 0..3000),
            step in 1usize..500,
        ) {
            let pieces = cut(&[junk, hello()].concat(), step);
            prop_assert_eq!(pieces.last().map(|piece| piece.bytes.clone()), Some(hello()));
            prop_assert!(pieces.iter().all(|piece| piece.bytes.len() <= HEADER_BYTES + FRAME_BYTES_MAX));
        }
    }
}
