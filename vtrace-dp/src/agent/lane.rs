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
//!    Waiting ── readable ──► Filling ── pages ──► Sending ──► (all sent) ── pipe was full ──► its next turn: Filling
//!    (poll of the tap)     (tap → pipe)       ▲ (pipe → port) └─ else ──────────────────────► Waiting
//!        ▲                     │         room │     │ no room
//!        │   readable, but no whole page      └─ Blocked (poll of the port)
//!        └── timer ── Pausing ◄┘                    │ room, but not for us: the host has closed its side
//!                        └───── timer ──► Blocked   └──► Pausing
//! ```
//! Once draining: Filling until there are no whole pages, then the rest by read(2), then [`Wait::End`].

use nix::errno::Errno;
use vtrace_common::ledger::Ledger;

/// What to do next for a lane. Nothing is outstanding when one of these is given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Next {
    /// Move whole pages from the tap into the empty pipe, without waiting.
    Fill,
    /// Move this many bytes from the pipe to the port, without waiting.
    Send(u32),
    /// No whole page is left: read(2) the rest into the pipe, then say how much ([`PumpLane::read_rest`]).
    ReadRest,
    /// Throw away what waits in the pipe (it is counted), then go on with [`PumpLane::discarded`].
    Discard,
    /// Nothing, until this has happened.
    Wait(Wait),
}

/// What a lane waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wait {
    /// The tap is readable.
    Page,
    /// The port has room.
    Room,
    /// The other lanes have had their turn: there may be more pages.
    Turn,
    /// The timer: poll says that something can be moved, and nothing could.
    Timer,
    /// Nothing more will happen.
    End,
}

/// Where the lane is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// A poll of the tap is outstanding.
    Waiting,
    /// It fills its pipe, at once or when its turn comes.
    Filling,
    /// It empties its pipe.
    Sending,
    /// A poll of the port is outstanding; pages wait in the pipe.
    Blocked,
    /// The timer runs.
    Pausing,
    /// It has ended.
    Ended,
}

/// The states and counts of one lane.
#[derive(Debug)]
pub(super) struct PumpLane {
    page_bytes: u32,
    pipe_bytes: u32,
    step: Step,
    /// Bytes taken out of the ring buffer.
    bytes_in: u64,
    /// Bytes put into the port.
    bytes_out: u64,
    /// Bytes taken and not put into the port.
    bytes_lost: u64,
    in_pipe: u32,
    /// The last fill took all the pipe can hold, so there may be more.
    filled_up: bool,
    /// The fill or send under way follows a poll that said "ready".
    was_ready: bool,
    draining: bool,
    cancelling: bool,
    trouble: Option<(Step, Errno)>,
    torn: bool,
}

impl PumpLane {
    /// A lane whose pipe takes `pipe_bytes`, at least one page. It begins with [`Wait::Page`].
    pub(super) fn new(page_bytes: u32, pipe_bytes: u32) -> Self {
        assert!(page_bytes > 0 && pipe_bytes >= page_bytes, "a page fits the pipe: the pump has checked it");
        Self {
            page_bytes,
            pipe_bytes,
            step: Step::Waiting,
            bytes_in: 0,
            bytes_out: 0,
            bytes_lost: 0,
            in_pipe: 0,
            filled_up: false,
            was_ready: false,
            draining: false,
            cancelling: false,
            trouble: None,
            torn: false,
        }
    }

    /// Where it is.
    pub(super) fn step(&self) -> Step {
        self.step
    }

    /// Its counts so far.
    pub(super) fn ledger(&self) -> Ledger {
        let page_bytes = u64::from(self.page_bytes);
        Ledger {
            pages_in: self.bytes_in / page_bytes,
            pages_out: self.bytes_out / page_bytes,
            // A page that was sent in part is lost.
            pages_lost: self.bytes_lost.div_ceil(page_bytes),
            bytes_out: self.bytes_out,
            events_lost: None,
        }
    }

    /// Grows with every byte that is taken, sent or lost. Hot.
    pub(super) fn bytes_moved(&self) -> u64 {
        self.bytes_in + self.bytes_out + self.bytes_lost
    }

    /// Bytes to ask a fill for: whole pages, as many as the pipe holds.
    pub(super) fn fill_bytes(&self) -> u32 {
        self.pipe_bytes - self.pipe_bytes % self.page_bytes
    }

    /// Tracing is off: move everything, then end. True when the lane's poll has to be cancelled for that (its
    /// completion goes on); others go on by themselves, or by [`PumpLane::resumed`].
    pub(super) fn drain(&mut self) -> bool {
        self.draining = true;
        self.step == Step::Waiting
    }

    /// End as soon as the outstanding operation has come back. True when there is one to cancel; otherwise the lane
    /// ends by [`PumpLane::resumed`].
    pub(super) fn cancel(&mut self) -> bool {
        self.cancelling = true;
        matches!(self.step, Step::Waiting | Step::Blocked)
    }

    /// The poll of the tap has completed. Hot.
    pub(super) fn readable(&mut self, outcome: Result<(), Errno>) -> Next {
        match outcome {
            _ if self.cancelling => self.end(),
            Ok(()) | Err(Errno::EINTR | Errno::ECANCELED) => {
                self.was_ready = !self.draining;
                self.go(Step::Filling, Next::Fill)
            }
            Err(errno) => self.fail(errno),
        }
    }

    /// The poll of the port has completed. Hot.
    pub(super) fn writable(&mut self, outcome: Result<(), Errno>) -> Next {
        match outcome {
            _ if self.cancelling => self.end(),
            Ok(()) | Err(Errno::EINTR | Errno::ECANCELED) => {
                self.was_ready = true;
                self.go(Step::Sending, Next::Send(self.in_pipe))
            }
            Err(errno) => self.fail(errno),
        }
    }

    /// Its turn has come ([`Wait::Turn`]), or the timer has fired ([`Wait::Timer`]). Hot.
    pub(super) fn resumed(&mut self) -> Next {
        match self.step {
            _ if self.cancelling => self.end(),
            Step::Pausing if self.in_pipe > 0 => self.wait(Step::Blocked, Wait::Room),
            Step::Pausing if !self.draining => self.wait(Step::Waiting, Wait::Page),
            _ => self.go(Step::Filling, Next::Fill),
        }
    }

    /// The splice from the tap has returned. Hot.
    pub(super) fn filled(&mut self, result: Result<u32, Errno>) -> Next {
        let was_ready = std::mem::take(&mut self.was_ready);
        match result {
            Ok(bytes) if bytes > 0 => {
                self.took(bytes);
                self.filled_up = bytes >= self.fill_bytes();
                self.go(Step::Sending, Next::Send(bytes))
            }
            Ok(_) | Err(Errno::EAGAIN) if self.draining => self.go(Step::Filling, Next::ReadRest),
            Ok(_) | Err(Errno::EAGAIN) if was_ready => self.wait(Step::Pausing, Wait::Timer),
            Ok(_) | Err(Errno::EAGAIN) => self.wait(Step::Waiting, Wait::Page),
            Err(Errno::EINTR) => self.go(Step::Filling, Next::Fill),
            Err(errno) => self.fail(errno),
        }
    }

    /// `bytes` of whole pages were read(2) from the tap and written into the pipe.
    pub(super) fn read_rest(&mut self, bytes: u32) -> Next {
        if bytes == 0 {
            return self.end();
        }
        self.took(bytes);
        self.go(Step::Sending, Next::Send(bytes))
    }

    /// read(2) of the rest failed.
    pub(super) fn rest_failed(&mut self, errno: Errno) -> Next {
        self.fail(errno)
    }

    /// The splice to the port has returned. Hot.
    pub(super) fn sent(&mut self, result: Result<u32, Errno>) -> Next {
        let was_ready = std::mem::take(&mut self.was_ready);
        match result {
            // virtio_console frees pages it could not queue and says 0 (__send_to_port).
            Ok(0) => self.lose(),
            Ok(bytes) => {
                assert!(bytes <= self.in_pipe, "the kernel sent more than the pipe held");
                self.in_pipe -= bytes;
                self.bytes_out += u64::from(bytes);
                match self.in_pipe {
                    0 => self.onward(),
                    rest => self.go(Step::Sending, Next::Send(rest)),
                }
            }
            // The host has closed its side of a virtio port: its poll reports that (POLLHUP) again and again.
            Err(Errno::EAGAIN) if was_ready => self.wait(Step::Pausing, Wait::Timer),
            Err(Errno::EAGAIN) => self.wait(Step::Blocked, Wait::Room),
            Err(Errno::EINTR) => self.go(Step::Sending, Next::Send(self.in_pipe)),
            Err(errno) => self.fail(errno),
        }
    }

    /// The pipe is empty again after [`Next::Discard`].
    pub(super) fn discarded(&mut self) -> Next {
        if self.torn { self.end() } else { self.onward() }
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
            _ if self.torn => "the port lost the end of a page: the pages after it would not be found".into(),
            None => String::new(),
            Some((Step::Waiting, errno)) => format!("poll of the ring buffer: {errno}"),
            Some((Step::Filling, errno)) => format!("splice from the ring buffer: {errno}"),
            Some((Step::Blocked, errno)) => format!("poll of the port: {errno}"),
            Some((_, errno)) => format!("splice to the port: {errno}"),
        }
    }

    fn took(&mut self, bytes: u32) {
        assert_eq!(self.in_pipe, 0, "pages are taken into an empty pipe");
        assert_eq!(bytes % self.page_bytes, 0, "the kernel gives whole pages (tracing_buffers_splice_read)");
        self.in_pipe = bytes;
        self.bytes_in += u64::from(bytes);
    }

    fn onward(&mut self) -> Next {
        if self.draining || std::mem::take(&mut self.filled_up) {
            self.wait(Step::Filling, Wait::Turn)
        } else {
            self.wait(Step::Waiting, Wait::Page)
        }
    }

    fn lose(&mut self) -> Next {
        self.torn = !self.bytes_out.is_multiple_of(u64::from(self.page_bytes));
        self.write_off();
        Next::Discard
    }

    fn fail(&mut self, errno: Errno) -> Next {
        self.trouble = Some((self.step, errno));
        self.end()
    }

    fn end(&mut self) -> Next {
        self.write_off();
        assert_eq!(self.bytes_in, self.bytes_out + self.bytes_lost, "every byte is in the ledger");
        assert!(self.ledger().is_balanced(), "every page is in the ledger: {:?}", self.ledger());
        self.wait(Step::Ended, Wait::End)
    }

    fn write_off(&mut self) {
        self.bytes_lost += u64::from(std::mem::take(&mut self.in_pipe));
    }

    fn wait(&mut self, step: Step, wait: Wait) -> Next {
        self.go(step, Next::Wait(wait))
    }

    fn go(&mut self, step: Step, next: Next) -> Next {
        self.step = step;
        next
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: u32 = 4096;

    fn counted(pages_in: u64, pages_out: u64, pages_lost: u64) -> Ledger {
        let bytes_out = pages_out * u64::from(PAGE);
        Ledger { pages_in, pages_out, pages_lost, bytes_out, events_lost: None }
    }

    fn filling() -> PumpLane {
        let mut lane = PumpLane::new(PAGE, 16 * PAGE);
        assert_eq!(lane.readable(Ok(())), Next::Fill);
        lane
    }

    fn sending(pages: u32) -> PumpLane {
        let mut lane = filling();
        assert_eq!(lane.filled(Ok(pages * PAGE)), Next::Send(pages * PAGE));
        lane
    }

    fn blocked(pages: u32) -> PumpLane {
        let mut lane = sending(pages);
        assert_eq!(lane.sent(Err(Errno::EAGAIN)), Next::Wait(Wait::Room));
        lane
    }

    #[test]
    fn short_splice_to_the_port_is_continued() {
        let mut lane = sending(3);
        assert_eq!(lane.sent(Ok(PAGE)), Next::Send(2 * PAGE));
        assert_eq!(lane.sent(Ok(2 * PAGE)), Next::Wait(Wait::Page));
        assert_eq!(lane.ledger(), counted(3, 3, 0));
    }

    #[test]
    fn full_pipe_is_followed_by_another_turn_and_a_part_full_one_by_a_poll() {
        let mut lane = sending(16);
        assert_eq!(lane.sent(Ok(16 * PAGE)), Next::Wait(Wait::Turn));
        assert_eq!(lane.resumed(), Next::Fill);
        assert_eq!(lane.filled(Err(Errno::EAGAIN)), Next::Wait(Wait::Page));
        assert_eq!(sending(15).sent(Ok(15 * PAGE)), Next::Wait(Wait::Page));
    }

    #[test]
    fn full_port_is_waited_for_and_its_pages_are_kept() {
        let mut lane = blocked(3);
        assert_eq!(lane.writable(Ok(())), Next::Send(3 * PAGE));
        assert_eq!(lane.sent(Ok(3 * PAGE)), Next::Wait(Wait::Page));
        assert_eq!(lane.ledger(), counted(3, 3, 0));
    }

    #[test]
    fn port_whose_host_is_away_pauses_instead_of_spinning() {
        let mut lane = blocked(3);
        assert_eq!(lane.writable(Ok(())), Next::Send(3 * PAGE));
        assert_eq!(lane.sent(Err(Errno::EAGAIN)), Next::Wait(Wait::Timer));
        assert_eq!(lane.resumed(), Next::Wait(Wait::Room));
        assert_eq!(lane.ledger(), counted(3, 0, 0));
    }

    #[test]
    fn splice_that_moved_nothing_is_loss_and_the_lane_goes_on() {
        let mut lane = sending(3);
        assert_eq!(lane.sent(Ok(0)), Next::Discard);
        assert_eq!(lane.discarded(), Next::Wait(Wait::Page));
        assert_eq!(lane.ledger(), counted(3, 0, 3));
        assert_eq!(lane.trouble(), "");
    }

    #[test]
    fn loss_in_the_middle_of_a_page_ends_the_lane() {
        let mut lane = sending(3);
        assert_eq!(lane.sent(Ok(1000)), Next::Send(3 * PAGE - 1000));
        assert_eq!(lane.sent(Ok(0)), Next::Discard);
        assert_eq!(lane.discarded(), Next::Wait(Wait::End));
        assert!(lane.trouble().contains("lost the end of a page"));
    }

    #[test]
    fn vanished_port_ends_the_lane_with_its_reason_and_the_pages_counted() {
        let mut lane = sending(2);
        assert_eq!(lane.sent(Err(Errno::ENODEV)), Next::Wait(Wait::End));
        assert_eq!(lane.ledger(), counted(2, 0, 2));
        assert!(lane.trouble().contains("ENODEV"), "{}", lane.trouble());
    }

    #[test]
    fn readable_tap_without_a_page_pauses_instead_of_spinning() {
        let mut lane = filling();
        assert_eq!(lane.filled(Err(Errno::EAGAIN)), Next::Wait(Wait::Timer));
        assert_eq!(lane.resumed(), Next::Wait(Wait::Page));
    }

    #[test]
    fn drain_moves_whole_pages_then_the_rest_then_ends() {
        let mut lane = PumpLane::new(PAGE, 16 * PAGE);
        assert!(lane.drain());
        assert_eq!(lane.readable(Err(Errno::ECANCELED)), Next::Fill);
        assert_eq!(lane.filled(Ok(PAGE)), Next::Send(PAGE));
        assert_eq!(lane.sent(Ok(PAGE)), Next::Wait(Wait::Turn));
        assert_eq!(lane.resumed(), Next::Fill);
        assert_eq!(lane.filled(Err(Errno::EAGAIN)), Next::ReadRest);
        assert_eq!(lane.read_rest(PAGE), Next::Send(PAGE));
        assert_eq!(lane.sent(Ok(PAGE)), Next::Wait(Wait::Turn));
        assert_eq!(lane.resumed(), Next::Fill);
        assert_eq!(lane.filled(Ok(0)), Next::ReadRest);
        assert_eq!(lane.read_rest(0), Next::Wait(Wait::End));
        assert_eq!(lane.ledger(), counted(2, 2, 0));
    }

    #[test]
    fn drain_of_a_blocked_lane_leaves_its_poll_alone() {
        let mut lane = blocked(2);
        assert!(!lane.drain());
        assert_eq!(lane.writable(Ok(())), Next::Send(2 * PAGE));
        assert_eq!(lane.sent(Ok(2 * PAGE)), Next::Wait(Wait::Turn));
    }

    #[test]
    fn cancelled_send_counts_its_pages_as_lost() {
        let mut lane = blocked(2);
        assert!(lane.cancel());
        assert_eq!(lane.writable(Err(Errno::ECANCELED)), Next::Wait(Wait::End));
        assert_eq!(lane.ledger(), counted(2, 0, 2));
    }

    #[test]
    fn lane_that_is_cancelled_before_its_turn_takes_no_more_pages() {
        let mut lane = sending(16);
        assert_eq!(lane.sent(Ok(16 * PAGE)), Next::Wait(Wait::Turn));
        assert!(!lane.cancel(), "nothing is outstanding");
        assert_eq!(lane.resumed(), Next::Wait(Wait::End));
        assert_eq!(lane.ledger(), counted(16, 16, 0));
    }

    proptest! {
        /// Whatever the kernel answers, in any order, with drain and cancel at any time: the books balance.
        #[test]
        fn every_byte_is_sent_or_lost(answers in proptest::collection::vec((0u8..8, 0u32..20, 0u8..40), 1..200)) {
            let mut lane = PumpLane::new(PAGE, 16 * PAGE);
            let mut next = Next::Wait(Wait::Page);
            for (kind, amount, chance) in answers {
                if chance == 0 && !lane.draining { lane.drain(); }
                if chance == 1 { lane.cancel(); }
                let errors = [Errno::EAGAIN, Errno::EINTR, Errno::ENODEV, Errno::EPIPE, Errno::ECANCELED];
                let error = Err(errors[usize::from(kind) % errors.len()]);
                let pages = Ok(amount.min(16) * PAGE);
                next = match next {
                    Next::Wait(Wait::Page) => lane.readable(if kind < 5 { Ok(()) } else { error.map(|_: u32| ()) }),
                    Next::Wait(Wait::Room) => lane.writable(if kind < 5 { Ok(()) } else { error.map(|_: u32| ()) }),
                    Next::Wait(Wait::Turn | Wait::Timer) => lane.resumed(),
                    Next::Fill => lane.filled(if kind < 4 { pages } else { error }),
                    Next::Send(bytes) if kind < 5 => lane.sent(Ok(bytes.min(amount * 700))),
                    Next::Send(_) => lane.sent(error),
                    Next::ReadRest => lane.read_rest(amount.min(16) * PAGE),
                    Next::Discard => lane.discarded(),
                    Next::Wait(Wait::End) => break,
                };
            }
            lane.give_up(Errno::ETIMEDOUT);
            prop_assert_eq!(lane.step(), Step::Ended);
            prop_assert_eq!(lane.bytes_in, lane.bytes_out + lane.bytes_lost);
            prop_assert_eq!(lane.bytes_in % u64::from(PAGE), 0);
        }

        /// A poll that says "ready" is answered by a step that moves pages, or by a rest: never by the same poll at once.
        #[test]
        fn poll_is_never_repeated_before_something_moved(pages in 1u32..16, closed in proptest::bool::ANY) {
            let mut lane = if closed { blocked(pages) } else { PumpLane::new(PAGE, 16 * PAGE) };
            let answered = if closed { lane.writable(Ok(())) } else { lane.readable(Ok(())) };
            let after = match answered {
                Next::Send(_) => lane.sent(Err(Errno::EAGAIN)),
                _ => lane.filled(Err(Errno::EAGAIN)),
            };
            prop_assert_eq!(after, Next::Wait(Wait::Timer));
        }
    }
}
