//! What takes pages from the taps of all lanes: [`PageMover`], and the one that goes through the page cache.
//!
//! In:    a lane's index, its tap
//! Out:   pages on their way to the file; why a lane takes no more
//! Runs:  on the pump's thread
//! Full:  a slow disk blocks [`Spliced`]; see [`super::direct`] for the other one
//! Trust: the kernel

use std::os::fd::BorrowedFd;

use super::lane::{TapEnd, TapLane};
use crate::sys::splice::Pipe;

/// Batches of one lane before the others have their turn.
const BATCHES_MAX: usize = 4;

/// Moves pages from the taps of all lanes to the file.
pub(crate) trait PageMover {
    /// Whether a lane takes no more pages.
    fn has_ended(&self, at: usize) -> bool;
    /// Moves full pages of a lane whose tap can be read; whether there were any.
    fn take(&mut self, at: usize, tap: BorrowedFd<'_>) -> bool;
    /// Moves everything that is left, the partly filled page too. Tracing is off.
    fn take_rest(&mut self, at: usize, tap: BorrowedFd<'_>);
    /// Whether pages wait here for more to come.
    fn holds_pages(&self) -> bool;
    /// Sends the waiting pages on.
    fn flush(&mut self);
    /// Why a lane takes no more.
    fn end(&self, at: usize) -> Option<TapEnd>;
}

/// Moves pages through the page cache.
pub(super) struct Spliced<'a> {
    pub(super) lanes: Vec<TapLane<'a>>,
    /// One page, for the rest of a ring buffer.
    pub(super) page: Vec<u8>,
    pub(super) pipe: &'a Pipe,
    pub(super) file: BorrowedFd<'a>,
}

impl PageMover for Spliced<'_> {
    fn has_ended(&self, at: usize) -> bool {
        self.lanes[at].end().is_some()
    }

    /// Hot.
    fn take(&mut self, at: usize, tap: BorrowedFd<'_>) -> bool {
        let lane = &mut self.lanes[at];
        (0..BATCHES_MAX).take_while(|_| lane.move_pages(tap, self.pipe, self.file)).count() > 0
    }

    fn take_rest(&mut self, at: usize, tap: BorrowedFd<'_>) {
        let lane = &mut self.lanes[at];
        while lane.move_pages(tap, self.pipe, self.file) {}
        while lane.move_rest(tap, &mut self.page, self.file) {}
    }

    fn holds_pages(&self) -> bool {
        false
    }

    fn flush(&mut self) {}

    fn end(&self, at: usize) -> Option<TapEnd> {
        self.lanes[at].end()
    }
}
