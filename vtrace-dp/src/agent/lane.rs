//! One lane's way through the pump: states and counts, no descriptors.
//!
//! In:    results of the lane's operations
//! Out:   the next operation ([`Next`]); at the end a [`Ledger`]
//! Runs:  on the pump's thread; pure
//! Full:  one pipe's worth is on its way at a time; while the port takes nothing, the ring buffer overwrites and counts
//! Trust: the kernel's counts, except where `assert!` says what would have to be wrong
//!
//! ```text
//!        ┌──────────── nothing more ◄───────────┐
//!        ▼                                      │
//!    Waiting ── readable ──► Filling ── pages ──► Sending ──► (all sent) ── pipe was full ──► Filling
//!    (POLL tap)           (SPLICE tap→pipe)    (SPLICE pipe→port)        └─ else ───────────► Waiting
//!        ▲                     │ readable, but no whole page
//!        └── timer ── Pausing ◄┘
//! ```
//! Once draining: Filling until there are no whole pages, then the rest by read(2), then [`Next::End`].

use nix::{errno::Errno, libc};

/// How an interrupted operation of a kernel worker ends when nothing restarts it (include/linux/errno.h).
const ERESTARTSYS: i32 = 512;

/// What to do next for a lane. Nothing is outstanding when one of these is given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Next {
    /// Wait until the tap is readable.
    Poll,
    /// Move whole pages from the tap into the empty pipe.
    Fill,
    /// Move this many bytes from the pipe to the port.
    Send(u32),
    /// The tap called itself readable and had no page: wait for the timer, then poll again.
    Pause,
    /// No whole page is left: read(2) the rest into the pipe, then say how much ([`Lane::read_rest`]).
    ReadRest,
    /// Throw away what waits in the pipe (it is counted), then go on with [`Lane::discarded`].
    Discard,
    /// Nothing more will happen.
    End,
}

/// What the lane waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// POLL_ADD on the tap.
    Waiting,
    /// SPLICE tap → pipe.
    Filling,
    /// SPLICE pipe → port.
    Sending,
    /// The timer.
    Pausing,
    /// Nothing: its end.
    Ended,
}

/// Bytes in and out. `tapped == sent + lost` once the lane has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Ledger {
    /// Taken out of the ring buffer.
    pub(super) tapped: u64,
    /// Put into the port.
    pub(super) sent: u64,
    /// Taken and not sent.
    pub(super) lost: u64,
}

/// The states and counts of one lane.
#[derive(Debug)]
pub(super) struct Lane {
    page_bytes: u32,
    pipe_bytes: u32,
    step: Step,
    ledger: Ledger,
    in_pipe: u32,
    /// The last fill took all the pipe can hold, so there may be more.
    filled_up: bool,
    /// The fill under way follows a poll that said "readable".
    was_readable: bool,
    draining: bool,
    cancelling: bool,
    trouble: Option<(Step, Errno)>,
    torn: bool,
}

impl Lane {
    /// A lane whose pipe takes `pipe_bytes`, at least one page. It begins with [`Next::Poll`].
    pub(super) fn new(page_bytes: u32, pipe_bytes: u32) -> Self {
        assert!(page_bytes > 0 && pipe_bytes >= page_bytes, "a page fits the pipe: the pump has checked it");
        Self {
            page_bytes,
            pipe_bytes,
            step: Step::Waiting,
            ledger: Ledger::default(),
            in_pipe: 0,
            filled_up: false,
            was_readable: false,
            draining: false,
            cancelling: false,
            trouble: None,
            torn: false,
        }
    }

    /// What it waits for.
    pub(super) fn step(&self) -> Step {
        self.step
    }

    /// Its counts so far.
    pub(super) fn ledger(&self) -> Ledger {
        self.ledger
    }

    /// Bytes to ask a fill for: whole pages, as many as the pipe holds.
    pub(super) fn fill_bytes(&self) -> u32 {
        self.pipe_bytes - self.pipe_bytes % self.page_bytes
    }

    /// Tracing is off: move everything, then end. True when the lane's poll has to be cancelled for that (its
    /// completion goes on); a pausing lane goes on by [`Lane::resumed`].
    pub(super) fn drain(&mut self) -> bool {
        self.draining = true;
        self.step == Step::Waiting
    }

    /// End as soon as the outstanding operation has come back. True when there is one to cancel.
    pub(super) fn cancel(&mut self) -> bool {
        self.cancelling = true;
        matches!(self.step, Step::Waiting | Step::Filling | Step::Sending)
    }

    /// The poll has completed. Hot.
    pub(super) fn polled(&mut self, result: i32) -> Next {
        if self.cancelling {
            return self.end();
        }
        match errno(result) {
            None | Some(Errno::EINTR | Errno::ECANCELED) => {
                self.was_readable = !self.draining;
                self.go(Step::Filling, Next::Fill)
            }
            Some(errno) => self.fail(errno),
        }
    }

    /// The timer has fired for a pausing lane. Hot.
    pub(super) fn resumed(&mut self) -> Next {
        match (self.cancelling, self.draining) {
            (true, _) => self.end(),
            (_, true) => self.go(Step::Filling, Next::Fill),
            _ => self.go(Step::Waiting, Next::Poll),
        }
    }

    /// The splice from the tap has completed. Hot.
    pub(super) fn filled(&mut self, result: i32) -> Next {
        let was_readable = std::mem::take(&mut self.was_readable);
        match u32::try_from(result) {
            Ok(bytes) if bytes > 0 => {
                self.took(bytes);
                self.filled_up = bytes >= self.fill_bytes();
                if self.cancelling { self.end() } else { self.go(Step::Sending, Next::Send(self.in_pipe)) }
            }
            _ if self.cancelling => self.end(),
            _ => match errno(result) {
                None | Some(Errno::EAGAIN) if self.draining => self.go(Step::Filling, Next::ReadRest),
                None | Some(Errno::EAGAIN) if was_readable => self.go(Step::Pausing, Next::Pause),
                None | Some(Errno::EAGAIN) => self.go(Step::Waiting, Next::Poll),
                Some(Errno::EINTR | Errno::ECANCELED) => self.go(Step::Filling, Next::Fill),
                Some(errno) => self.fail(errno),
            },
        }
    }

    /// `bytes` of whole pages were read(2) from the tap and written into the pipe.
    pub(super) fn read_rest(&mut self, bytes: u32) -> Next {
        if bytes == 0 {
            return self.end();
        }
        self.took(bytes);
        self.go(Step::Sending, Next::Send(self.in_pipe))
    }

    /// read(2) of the rest failed.
    pub(super) fn rest_failed(&mut self, errno: Errno) -> Next {
        self.fail(errno)
    }

    /// The splice to the port has completed. Hot.
    pub(super) fn sent(&mut self, result: i32) -> Next {
        match u32::try_from(result) {
            // virtio_console frees pages it could not queue and says 0 (__send_to_port).
            Ok(0) => self.lose(),
            Ok(bytes) => {
                assert!(bytes <= self.in_pipe, "the kernel sent more than the pipe held");
                self.in_pipe -= bytes;
                self.ledger.sent += u64::from(bytes);
                if self.cancelling {
                    return self.end();
                }
                match self.in_pipe {
                    0 => self.onward(),
                    rest => self.go(Step::Sending, Next::Send(rest)),
                }
            }
            Err(_) if self.cancelling => self.end(),
            Err(_) => match errno(result) {
                Some(Errno::EINTR | Errno::ECANCELED) => self.go(Step::Sending, Next::Send(self.in_pipe)),
                Some(errno) => self.fail(errno),
                None => unreachable!("a result that is no count is an errno"),
            },
        }
    }

    /// The pipe is empty again after [`Next::Discard`].
    pub(super) fn discarded(&mut self) -> Next {
        if self.torn || self.cancelling { self.end() } else { self.onward() }
    }

    /// The ring does not answer any more (a cancelled operation that does not come back): what is in the pipe counts
    /// as lost.
    pub(super) fn give_up(&mut self, errno: Errno) {
        if self.step != Step::Ended {
            self.fail(errno);
        }
    }

    /// Why the lane ended early, in words; empty if it did not.
    pub(super) fn trouble(&self) -> String {
        match self.trouble {
            _ if self.torn => "the port lost the end of a page: the pages behind it would not be found".into(),
            None => String::new(),
            Some((Step::Waiting, errno)) => format!("poll of the ring buffer: {errno}"),
            Some((Step::Filling, errno)) => format!("splice from the ring buffer: {errno}"),
            Some((_, errno)) => format!("splice to the port: {errno}"),
        }
    }

    fn took(&mut self, bytes: u32) {
        assert_eq!(self.in_pipe, 0, "pages are taken into an empty pipe");
        assert_eq!(bytes % self.page_bytes, 0, "the kernel gives whole pages (tracing_buffers_splice_read)");
        self.in_pipe = bytes;
        self.ledger.tapped += u64::from(bytes);
    }

    fn onward(&mut self) -> Next {
        if self.draining || std::mem::take(&mut self.filled_up) {
            self.go(Step::Filling, Next::Fill)
        } else {
            self.go(Step::Waiting, Next::Poll)
        }
    }

    fn lose(&mut self) -> Next {
        self.torn = !self.ledger.sent.is_multiple_of(u64::from(self.page_bytes));
        self.write_off();
        Next::Discard
    }

    fn fail(&mut self, errno: Errno) -> Next {
        self.trouble = Some((self.step, errno));
        self.end()
    }

    fn end(&mut self) -> Next {
        self.write_off();
        let Ledger { tapped, sent, lost } = self.ledger;
        assert_eq!(tapped, sent + lost, "every byte is in the ledger");
        self.go(Step::Ended, Next::End)
    }

    fn write_off(&mut self) {
        self.ledger.lost += u64::from(std::mem::take(&mut self.in_pipe));
    }

    fn go(&mut self, step: Step, next: Next) -> Next {
        self.step = step;
        next
    }
}

/// The error in a completion's result; `None` for 0 and counts.
fn errno(result: i32) -> Option<Errno> {
    match result {
        0.. => None,
        result if result == -ERESTARTSYS => Some(Errno::EINTR),
        result => Some(Errno::from_raw(result.checked_neg().unwrap_or(libc::EIO))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: u32 = 4096;

    fn filling() -> Lane {
        let mut lane = Lane::new(PAGE, 16 * PAGE);
        assert_eq!(lane.polled(1), Next::Fill);
        lane
    }

    fn sending(pages: i32) -> Lane {
        let mut lane = filling();
        assert_eq!(lane.filled(pages * 4096), Next::Send(pages.cast_unsigned() * PAGE));
        lane
    }

    #[test]
    fn short_splice_to_the_port_is_continued() {
        let mut lane = sending(3);
        assert_eq!(lane.sent(4096), Next::Send(2 * PAGE));
        assert_eq!(lane.sent(2 * 4096), Next::Poll);
        assert_eq!(lane.ledger(), Ledger { tapped: 12288, sent: 12288, lost: 0 });
    }

    #[test]
    fn full_pipe_is_followed_by_another_fill_and_a_part_full_one_by_a_poll() {
        assert_eq!(sending(16).sent(16 * 4096), Next::Fill);
        assert_eq!(sending(15).sent(15 * 4096), Next::Poll);
    }

    #[test]
    fn splice_that_moved_nothing_is_loss_and_the_lane_goes_on() {
        let mut lane = sending(3);
        assert_eq!(lane.sent(0), Next::Discard);
        assert_eq!(lane.discarded(), Next::Poll);
        assert_eq!(lane.ledger(), Ledger { tapped: 12288, sent: 0, lost: 12288 });
        assert_eq!(lane.trouble(), "");
    }

    #[test]
    fn loss_in_the_middle_of_a_page_ends_the_lane() {
        let mut lane = sending(3);
        assert_eq!(lane.sent(1000), Next::Send(3 * PAGE - 1000));
        assert_eq!(lane.sent(0), Next::Discard);
        assert_eq!(lane.discarded(), Next::End);
        assert!(lane.trouble().contains("lost the end of a page"));
    }

    #[test]
    fn vanished_port_ends_the_lane_with_its_reason_and_the_pages_counted() {
        let mut lane = sending(2);
        assert_eq!(lane.sent(-libc::ENODEV), Next::End);
        assert_eq!(lane.ledger(), Ledger { tapped: 8192, sent: 0, lost: 8192 });
        assert!(lane.trouble().contains("ENODEV"), "{}", lane.trouble());
    }

    #[test]
    fn readable_tap_without_a_page_pauses_instead_of_spinning() {
        let mut lane = filling();
        assert_eq!(lane.filled(-libc::EAGAIN), Next::Pause);
        assert_eq!(lane.resumed(), Next::Poll);
    }

    #[test]
    fn drain_moves_whole_pages_then_the_rest_then_ends() {
        let mut lane = Lane::new(PAGE, 16 * PAGE);
        assert!(lane.drain());
        assert_eq!(lane.polled(-libc::ECANCELED), Next::Fill);
        assert_eq!(lane.filled(4096), Next::Send(PAGE));
        assert_eq!(lane.sent(4096), Next::Fill);
        assert_eq!(lane.filled(-libc::EAGAIN), Next::ReadRest);
        assert_eq!(lane.read_rest(PAGE), Next::Send(PAGE));
        assert_eq!(lane.sent(4096), Next::Fill);
        assert_eq!(lane.filled(0), Next::ReadRest);
        assert_eq!(lane.read_rest(0), Next::End);
        assert_eq!(lane.ledger(), Ledger { tapped: 8192, sent: 8192, lost: 0 });
    }

    #[test]
    fn cancelled_send_counts_its_pages_as_lost() {
        let mut lane = sending(2);
        assert!(lane.cancel());
        assert_eq!(lane.sent(-ERESTARTSYS), Next::End);
        assert_eq!(lane.ledger(), Ledger { tapped: 8192, sent: 0, lost: 8192 });
    }

    proptest! {
        /// Whatever the kernel answers, in any order, with drain and cancel at any time: the books balance.
        #[test]
        fn every_byte_is_sent_or_lost(answers in proptest::collection::vec((0u8..6, 0u32..20, 0u8..40), 1..200)) {
            let mut lane = Lane::new(PAGE, 16 * PAGE);
            let mut next = Next::Poll;
            for (kind, amount, chance) in answers {
                if chance == 0 && !lane.draining { lane.drain(); }
                if chance == 1 { lane.cancel(); }
                let error = -[libc::EAGAIN, libc::EINTR, ERESTARTSYS, libc::ENODEV, libc::EPIPE, libc::ECANCELED][usize::from(kind)];
                let pages = i32::try_from(amount.min(16) * PAGE).unwrap();
                next = match next {
                    Next::Poll => lane.polled(if kind < 3 { 1 } else { error }),
                    Next::Fill => lane.filled(if kind < 3 { pages } else { error }),
                    Next::Send(bytes) if kind < 4 => lane.sent(i32::try_from(bytes.min(amount * 700)).unwrap()),
                    Next::Send(_) => lane.sent(error),
                    Next::Pause => lane.resumed(),
                    Next::ReadRest => lane.read_rest(amount.min(16) * PAGE),
                    Next::Discard => lane.discarded(),
                    Next::End => break,
                };
            }
            lane.give_up(Errno::ETIMEDOUT);
            let Ledger { tapped, sent, lost } = lane.ledger();
            prop_assert_eq!(lane.step(), Step::Ended);
            prop_assert_eq!(tapped, sent + lost);
            prop_assert_eq!(tapped % u64::from(PAGE), 0);
        }
    }
}
