//! Who may talk to a guest's agent.
//!
//! In:    claims, releases, what passes in either direction, time
//! Out:   decisions
//! Runs:  on the guest's device thread; a state machine without effects
//! Full:  one claim a client waits, and clients are bounded
//! Trust: nobody: an agent that never answers keeps a guest for [`LEAVE_TIME_MAX`] after its holder is gone
//!
//! Sessions do not mix: after a holder has left, everything its agent still says belongs to nobody until each `Close` that
//! was sent has been answered by a `Closed`. An agent answers in order, so what follows belongs to the next holder.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use vtrace_common::wire::agent::{FromAgent, ToAgent};

/// How long an agent may take to close the session of a holder that has left.
pub(super) const LEAVE_TIME_MAX: Duration = Duration::from_secs(5);

/// The place in front of one guest's agent. `H` is a holder; two are equal if they are the same claim.
#[derive(Debug)]
pub(super) struct Seat<H> {
    state: State<H>,
    /// The holder armed the agent and has not closed it since.
    armed: bool,
    /// The agent has said since that it is armed.
    stands: bool,
    /// `Close`s passed for the holder and not answered.
    closing: u32,
    /// `Close`s of holders that have left, not answered.
    stale: u32,
    waiting: VecDeque<H>,
}

#[derive(Debug)]
enum State<H> {
    Free,
    Held(H),
    /// The last holder has left and its agent has not closed yet.
    Leaving {
        holder: H,
        until: Instant,
    },
}

/// Answer to a claim.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Claim<'a, H> {
    /// The guest is the claimant's.
    Granted,
    /// It will be, when the agent has closed what the last holder left.
    Waits,
    /// It is this one's.
    Refused(&'a H),
}

/// What a release asks of the caller.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Release {
    /// Nothing.
    Done,
    /// Tell the agent to close what the holder left open.
    Close,
    /// It was not the holder's to release.
    NotHeld,
}

impl<H: PartialEq> Seat<H> {
    /// A seat that nobody has taken.
    pub(super) fn new() -> Self {
        Self { state: State::Free, armed: false, stands: false, closing: 0, stale: 0, waiting: VecDeque::new() }
    }

    /// Who holds the guest, or has just left it.
    pub(super) fn holder(&self) -> Option<&H> {
        match &self.state {
            State::Free => None,
            State::Held(holder) | State::Leaving { holder, .. } => Some(holder),
        }
    }

    /// Who is to hear what the agent says.
    pub(super) fn listener(&self) -> Option<&H> {
        match &self.state {
            State::Held(holder) if self.stale == 0 => Some(holder),
            _ => None,
        }
    }

    /// Whether `holder` holds the guest.
    pub(super) fn is_held_by(&self, holder: &H) -> bool {
        matches!(&self.state, State::Held(known) if known == holder)
    }

    /// Whether the holder has a session with the agent, armed at least.
    pub(super) fn stands(&self) -> bool {
        self.stands
    }

    /// `claimant` wants the guest.
    pub(super) fn claim(&mut self, claimant: H) -> Claim<'_, H> {
        if matches!(self.state, State::Free) {
            self.state = State::Held(claimant);
            return Claim::Granted;
        }
        match &self.state {
            State::Held(holder) => Claim::Refused(holder),
            State::Free | State::Leaving { .. } => {
                self.waiting.push_back(claimant);
                Claim::Waits
            }
        }
    }

    /// The holder's request goes to the agent.
    pub(super) fn passes(&mut self, request: &ToAgent) {
        match request {
            ToAgent::Arm(_) => self.armed = true,
            ToAgent::Close => {
                (self.armed, self.stands) = (false, false);
                self.closing += 1;
            }
            _ => {}
        }
    }

    /// The agent says something; whether the listener (as it was before) is to hear it.
    pub(super) fn hears(&mut self, answer: &FromAgent) -> bool {
        let heard = self.listener().is_some();
        self.stands |= heard && self.armed && matches!(answer, FromAgent::Armed(_));
        if *answer != FromAgent::Closed {
            return heard;
        }
        if heard {
            self.closing = self.closing.saturating_sub(1);
        } else {
            self.stale = self.stale.saturating_sub(1);
            self.free_if_closed();
        }
        heard
    }

    /// `holder` is done, or its process is gone.
    pub(super) fn release(&mut self, holder: &H, now: Instant) -> Release {
        self.waiting.retain(|waiting| waiting != holder);
        if !self.is_held_by(holder) {
            return Release::NotHeld;
        }
        let State::Held(holder) = std::mem::replace(&mut self.state, State::Free) else { return Release::NotHeld };
        let close = std::mem::take(&mut self.armed);
        self.stands = false;
        self.stale += std::mem::take(&mut self.closing) + u32::from(close);
        self.state = State::Leaving { holder, until: now + LEAVE_TIME_MAX };
        self.free_if_closed();
        if close { Release::Close } else { Release::Done }
    }

    /// The agent is gone: it owes nothing any more.
    pub(super) fn agent_gone(&mut self) {
        (self.armed, self.stands, self.closing, self.stale) = (false, false, 0, 0);
        self.free_if_closed();
    }

    /// When [`Seat::expire`] is due.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Leaving { until, .. } => Some(*until),
            _ => None,
        }
    }

    /// Time passes: an agent that does not answer keeps nobody waiting for ever. What it says late is still nobody's.
    pub(super) fn expire(&mut self, now: Instant) {
        if self.deadline().is_some_and(|until| now >= until) {
            self.state = State::Free;
        }
    }

    /// The next claimant that waited, when the guest is free.
    pub(super) fn next_claimant(&mut self) -> Option<H> {
        if matches!(self.state, State::Free) { self.waiting.pop_front() } else { None }
    }

    fn free_if_closed(&mut self) {
        if self.stale == 0 && matches!(self.state, State::Leaving { .. }) {
            self.state = State::Free;
        }
    }
}

impl<H: PartialEq> Default for Seat<H> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use vtrace_common::wire::agent::Armed;

    use super::*;

    fn held(holder: u8) -> Seat<u8> {
        let mut seat = Seat::new();
        assert_eq!(seat.claim(holder), Claim::Granted);
        seat
    }

    fn armed(holder: u8) -> Seat<u8> {
        let mut seat = held(holder);
        seat.passes(&ToAgent::Arm(Box::default()));
        seat
    }

    #[test]
    fn held_guest_is_refused_to_others() {
        assert_eq!(held(1).claim(2), Claim::Refused(&1));
        assert_eq!(held(1).claim(1), Claim::Refused(&1));
    }

    #[test]
    fn holder_that_armed_nothing_leaves_at_once() {
        let mut seat = held(1);
        assert_eq!(seat.release(&1, Instant::now()), Release::Done);
        assert_eq!(seat.deadline(), None);
        assert_eq!(seat.claim(2), Claim::Granted);
    }

    #[test]
    fn session_left_open_is_closed_before_the_next_claim_is_granted() {
        let mut seat = armed(1);
        assert_eq!(seat.release(&1, Instant::now()), Release::Close);
        assert_eq!(seat.claim(2), Claim::Waits);
        assert_eq!((seat.hears(&FromAgent::Stopped), seat.next_claimant()), (false, None));
        assert!(!seat.hears(&FromAgent::Closed));
        assert_eq!(seat.next_claimant(), Some(2));
        assert_eq!(seat.claim(2), Claim::Granted);
        assert!(seat.hears(&FromAgent::Stopped));
    }

    #[test]
    fn session_closed_by_its_holder_is_not_closed_again() {
        let mut seat = armed(1);
        seat.passes(&ToAgent::Close);
        assert!(seat.hears(&FromAgent::Closed));
        assert_eq!(seat.release(&1, Instant::now()), Release::Done);
        assert_eq!(seat.claim(2), Claim::Granted);
    }

    #[test]
    fn holder_that_leaves_before_its_close_is_answered_is_waited_for() {
        let mut seat = armed(1);
        seat.passes(&ToAgent::Close);
        assert_eq!(seat.release(&1, Instant::now()), Release::Done);
        assert_eq!(seat.claim(2), Claim::Waits);
        seat.hears(&FromAgent::Closed);
        assert_eq!(seat.next_claimant(), Some(2));
    }

    #[test]
    fn agent_that_never_answers_keeps_the_guest_for_a_while_only_and_is_not_heard_after_it() {
        let (mut seat, now) = (armed(1), Instant::now());
        seat.release(&1, now);
        seat.expire(now);
        assert_eq!(seat.claim(2), Claim::Waits);
        seat.expire(now + LEAVE_TIME_MAX);
        assert_eq!(seat.next_claimant(), Some(2));
        assert_eq!(seat.claim(2), Claim::Granted);
        assert!(!seat.hears(&FromAgent::Stopped), "late: the first holder's");
        assert!(!seat.hears(&FromAgent::Closed));
        assert!(seat.hears(&FromAgent::Stopped), "the second holder's");
    }

    #[test]
    fn session_stands_from_the_agents_word_to_its_close_its_release_or_the_agents_end() {
        let ready = FromAgent::Armed(Armed::default());
        let ends: [fn(&mut Seat<u8>); 3] = [
            |seat| seat.passes(&ToAgent::Close),
            |seat| {
                seat.release(&1, Instant::now());
            },
            |seat| seat.agent_gone(),
        ];
        for end in ends {
            let mut seat = armed(1);
            assert!(!seat.stands(), "it is arming");
            assert!(seat.hears(&ready) && seat.stands());
            end(&mut seat);
            assert!(!seat.stands());
        }
        let mut seat = held(1);
        assert!(seat.hears(&ready) && !seat.stands(), "nobody has armed it");
    }

    #[test]
    fn agent_that_is_gone_owes_nothing() {
        let mut seat = armed(1);
        seat.release(&1, Instant::now());
        seat.agent_gone();
        assert_eq!(seat.deadline(), None);
        assert_eq!(seat.claim(2), Claim::Granted);
        assert!(seat.hears(&FromAgent::Stopped));
    }

    #[test]
    fn claimant_that_gives_up_waiting_is_forgotten() {
        let mut seat = armed(1);
        seat.release(&1, Instant::now());
        seat.claim(2);
        assert_eq!(seat.release(&2, Instant::now()), Release::NotHeld);
        seat.agent_gone();
        assert_eq!(seat.next_claimant(), None);
    }
}
