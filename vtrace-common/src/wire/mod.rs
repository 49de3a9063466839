//! Messages between agent, server and record: versioned, bounded, length-checked, without I/O.
//!
//! A frame is a 12-byte header and a payload of at most [`FRAME_BYTES_MAX`](crate::limits::FRAME_BYTES_MAX):
//!
//! | offset | field | |
//! |---|---|---|
//! | 0 | `u32` magic | `vtrc`, little endian as all of it |
//! | 4 | `u16` version | [`VERSION`]; in a hello, the sender's [`Capabilities`] |
//! | 6 | `u16` family | [`Family`] |
//! | 8 | `u32` length | bytes of payload |
//!
//! A hello of any version can be read by every other. Sides whose ranges of versions overlap speak the newest version that
//! both have, and send a message that was added later only to a side whose hello has its capability bit.
//!
//! The payload is one message of that family in postcard's encoding, with nothing after it.
//! [`Decoder`] turns a byte stream into frames; [`encode`] and [`Frame::open`] turn messages into frames and back.
//!
//! In:    bytes from the other side (guest-controlled)
//! Out:   messages whose texts and counts keep to [`limits`](crate::limits), or a [`Fault`]
//! Full:  a frame longer than the limit is a fault, not a wait; the decoder holds at most one frame
//! Trust: nothing

pub mod agent;
mod arm;
pub mod client;
mod frame;

pub use frame::{Decoder, Family, Fault, Frame, HEADER_BYTES, MAGIC, Message, VERSION, encode};

use alloc::string::String;
use serde::{Deserialize, Serialize};

extern crate alloc;

/// What a side can do beyond the first messages of its wire version. Unknown bits are kept and mean nothing.
///
/// They travel in the version field of a hello's header, which no version compares: the payload of a hello has to stay as
/// version 1 reads it, so that it can refuse with both versions in its message.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Capabilities(pub u16);

impl Capabilities {
    /// An agent lists clocks, tracers and events: [`ToAgent::Offer`](agent::ToAgent::Offer).
    pub const OFFER: Self = Self(1);
    /// All that this build can do.
    pub const ALL: Self = Self::OFFER;

    /// Whether every bit of `other` is set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// The first message of each side, readable by every version. Its encoding never changes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// Oldest wire version this side speaks.
    pub version_min: u16,
    /// Newest wire version this side speaks.
    pub version_max: u16,
    /// Program and its version, for people.
    pub software: String,
    /// In the frame's header.
    #[serde(skip)]
    pub capabilities: Capabilities,
}

impl Hello {
    /// What this build says of itself.
    pub fn ours(software: &str) -> Self {
        Self { version_min: VERSION, version_max: VERSION, software: software.into(), capabilities: Capabilities::ALL }
    }

    /// Whether both sides speak [`VERSION`].
    pub fn speaks_ours(&self) -> bool {
        self.version_min <= VERSION && VERSION <= self.version_max
    }
}

impl Message for Hello {
    const FAMILY: Family = Family::Hello;
    fn check(&self) -> Result<(), Fault> {
        text(&self.software)
    }
    fn header_field(&self) -> u16 {
        self.capabilities.0
    }
    fn set_header_field(&mut self, field: u16) {
        self.capabilities = Capabilities(field);
    }
}

/// Refuses a text that is longer than its bound.
pub(crate) fn text(text: &str) -> Result<(), Fault> {
    bounded(text.len(), crate::limits::TEXT_BYTES_MAX)
}

/// Refuses a count beyond its bound.
pub(crate) fn bounded(count: usize, count_max: usize) -> Result<(), Fault> {
    if count > count_max { Err(Fault::Bound { count, count_max }) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
