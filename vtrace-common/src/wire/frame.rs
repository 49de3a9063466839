//! Frames: the header, the codec and the stream decoder.

use alloc::vec::Vec;
use core::fmt;

use serde::{Serialize, de::DeserializeOwned};

use crate::limits::FRAME_BYTES_MAX;

extern crate alloc;

/// First four bytes of every frame.
pub const MAGIC: u32 = u32::from_le_bytes(*b"vtrc");
/// The wire version of this build. Messages are added under a [`Capabilities`](super::Capabilities) bit each; only a change
/// of what there is raises it.
pub const VERSION: u16 = 2;
/// Bytes before the payload.
pub const HEADER_BYTES: usize = 12;

/// Who speaks to whom.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum Family {
    /// [`Hello`](super::Hello), both ways, first on every link.
    Hello = 0,
    /// [`ToAgent`](super::agent::ToAgent).
    ToAgent = 1,
    /// [`FromAgent`](super::agent::FromAgent).
    FromAgent = 2,
    /// [`ToServer`](super::client::ToServer).
    ToServer = 3,
    /// [`FromServer`](super::client::FromServer).
    FromServer = 4,
}

impl Family {
    fn parse(code: u16) -> Option<Self> {
        [Self::Hello, Self::ToAgent, Self::FromAgent, Self::ToServer, Self::FromServer]
            .into_iter()
            .find(|family| *family as u16 == code)
    }
}

/// A message that travels in one frame.
pub trait Message: Serialize + DeserializeOwned {
    /// Its family.
    const FAMILY: Family;
    /// Compares every text and count with its bound.
    fn check(&self) -> Result<(), Fault>;
    /// The second field of its frame's header: the wire version, or what a hello puts there.
    fn header_field(&self) -> u16 {
        VERSION
    }
    /// Takes that field when the message is received.
    fn set_header_field(&mut self, _field: u16) {}
}

/// Why bytes are refused. The link they came over cannot be used any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Not a frame of ours.
    Magic(u32),
    /// The other side speaks another version.
    Version {
        /// The version of its frame.
        theirs: u16,
    },
    /// An unknown family, or one that does not belong on this link.
    Family(u16),
    /// A payload longer than a frame may be.
    Length(usize),
    /// The payload is not a message of its family.
    Payload,
    /// A text or a count is beyond its bound.
    Bound {
        /// What was claimed.
        count: usize,
        /// What is allowed.
        count_max: usize,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic(word) => write!(f, "not a vtrace frame (starts with {word:#010x})"),
            Self::Version { theirs } => {
                write!(f, "wire version {theirs}, this side speaks {VERSION}: use the same vtrace on both")
            }
            Self::Family(code) => write!(f, "message family {code} does not belong here"),
            Self::Length(bytes) => write!(f, "frame of {bytes} bytes, at most {FRAME_BYTES_MAX} are allowed"),
            Self::Payload => write!(f, "malformed message"),
            Self::Bound { count, count_max } => write!(f, "{count} where at most {count_max} are allowed"),
        }
    }
}

impl core::error::Error for Fault {}

/// One frame, its payload not yet opened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    /// The family its header names.
    pub family: Family,
    header_field: u16,
    payload: Vec<u8>,
}

impl Frame {
    /// The message inside, if it is one of `M` and keeps to its bounds.
    pub fn open<M: Message>(&self) -> Result<M, Fault> {
        if self.family != M::FAMILY {
            return Err(Fault::Family(self.family as u16));
        }
        let (mut message, rest) = postcard::take_from_bytes::<M>(&self.payload).map_err(|_| Fault::Payload)?;
        if !rest.is_empty() {
            return Err(Fault::Payload);
        }
        message.check()?;
        message.set_header_field(self.header_field);
        Ok(message)
    }
}

/// The bytes of one frame with `message` in it. A message of ours beyond its bounds is a fault too, before it is sent.
pub fn encode<M: Message>(message: &M) -> Result<Vec<u8>, Fault> {
    message.check()?;
    let mut bytes = Vec::with_capacity(HEADER_BYTES + 64);
    bytes.extend_from_slice(&MAGIC.to_le_bytes());
    bytes.extend_from_slice(&message.header_field().to_le_bytes());
    bytes.extend_from_slice(&(M::FAMILY as u16).to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    let mut bytes = postcard::to_extend(message, bytes).map_err(|_| Fault::Payload)?;
    let length = bytes.len() - HEADER_BYTES;
    match u32::try_from(length) {
        Ok(word) if length <= FRAME_BYTES_MAX => bytes[8..12].copy_from_slice(&word.to_le_bytes()),
        _ => return Err(Fault::Length(length)),
    }
    Ok(bytes)
}

/// Cuts a byte stream into frames. Holds at most one frame and what was pushed after it.
#[derive(Default, Debug)]
pub struct Decoder {
    bytes: Vec<u8>,
}

impl Decoder {
    /// Takes the next bytes of the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Whether it holds nothing: the stream is between two frames, or nothing has come.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Forgets everything: the other side has reopened the link.
    pub fn reset(&mut self) {
        self.bytes.clear();
    }

    /// The next whole frame, `None` when more bytes are needed. After a fault the stream is lost.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, Fault> {
        let Some((header, _)) = self.bytes.split_first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let (family, header_field, length) = parse_header(header)?;
        let end = HEADER_BYTES + length;
        if self.bytes.len() < end {
            return Ok(None);
        }
        let payload = self.bytes[HEADER_BYTES..end].to_vec();
        self.bytes.drain(..end);
        Ok(Some(Frame { family, header_field, payload }))
    }
}

fn parse_header(header: &[u8; HEADER_BYTES]) -> Result<(Family, u16, usize), Fault> {
    let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    if word(0) != MAGIC {
        return Err(Fault::Magic(word(0)));
    }
    let family = Family::parse(half(6)).ok_or(Fault::Family(half(6)))?;
    if half(4) != VERSION && family != Family::Hello {
        return Err(Fault::Version { theirs: half(4) });
    }
    let length = usize::try_from(word(8)).unwrap_or(usize::MAX);
    if length > FRAME_BYTES_MAX {
        return Err(Fault::Length(length));
    }
    Ok((family, half(4), length))
}
