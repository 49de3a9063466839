//! Moves this machine's own pages from its ring buffers to a file.
//!
//! | module | what |
//! |---|---|
//! | [`worker`] | the thread: waits for pages, moves them, stops |
//! | [`splice`] | through the page cache: tap ─► pipe ─► file |
//! | [`direct`] | past the page cache: tap ─► block of huge pages ─► O_DIRECT write |
//!
//! In:    taps ([`crate::tracefs::Tap`]), areas of a file
//! Out:   pages at their final place; counts for each lane
//! Runs:  on a thread of its own
//! Full:  a slow file leaves pages in the ring buffer, which overwrites and counts
//! Trust: this machine's kernel

pub(crate) mod direct;
pub mod splice;
pub mod worker;
