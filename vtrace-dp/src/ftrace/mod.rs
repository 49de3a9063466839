//! What a page of a ring buffer holds: events, their fields, and the formats that describe them.
//!
//! | module | what |
//! |---|---|
//! | [`events`] | the events of one page, one after another |
//! | [`fields`] | the fields of an event, as its format describes them |
//! | [`metadata`] | what a machine says about itself: formats, symbols, command lines |
//!
//! In:    pages, and the kernel's descriptions of them, as bytes
//! Out:   events and fields; a fault for bytes that are not what they claim to be
//! Runs:  on the caller's thread; no I/O
//! Trust: nothing: pages and descriptions come from guests and from files

pub mod events;
pub mod fields;
pub mod metadata;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
