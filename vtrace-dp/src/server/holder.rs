//! Which client may send requests to a guest's agent.
//!
//! In:    claims, releases, what passes in either direction, time
//! Out:   decisions
//! Runs:  on the guest's device thread; a state machine without effects
//! Full:  one claim a client waits, and clients are bounded
//! Trust: nothing: an agent that never answers keeps a guest for [`LEAVE_TIME_MAX`] after its holder is gone
//!
//! Sessions do not mix: after a holder has left, what its agent still sends is dropped until each `Close` that was
//! sent has been answered by a `Closed`. An agent answers in order, so what follows belongs to the next holder.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use vtrace_common::wire::agent::{FromAgent, ToAgent};

/// How long an agent may take to close the session of a holder that has left.
pub(super) const LEAVE_TIME_MAX: Duration = Duration::from_secs(5);

/// The claims on one guest's agent. `H` is a holder; two are equal if they are the same claim.
#[derive(Debug)]
pub(super) struct Claims<H> {
    state: ClaimState<H>,
    /// The holder armed the agent and has not closed it since.
    armed: bool,
    /// The agent has reported since that it is armed.
    in_session: bool,
    /// `Close`s passed for the holder and not answered.
    closing: u32,
    /// `Close`s of holders that have left, not answered.
    stale: u32,
    waiting: VecDeque<H>,
}

#[derive(Debug)]
enum ClaimState<H> {
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
    /// This one holds it.
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

impl<H: PartialEq> Claims<H> {
    /// A guest without claims.
    pub(super) fn new() -> Self {
        Self {
            state: ClaimState::Free,
            armed: false,
            in_session: false,
            closing: 0,
            stale: 0,
            waiting: VecDeque::new(),
        }
    }

    /// Who holds the guest, or has just left it.
    pub(super) fn holder(&self) -> Option<&H> {
        match &self.state {
            ClaimState::Free => None,
            ClaimState::Held(holder) | ClaimState::Leaving { holder, .. } => Some(holder),
        }
    }

    /// The client that gets what the agent sends.
    pub(super) fn listener(&self) -> Option<&H> {
        match &self.state {
            ClaimState::Held(holder) if self.stale == 0 => Some(holder),
            _ => None,
        }
    }

    /// Whether `holder` holds the guest.
    pub(super) fn is_held_by(&self, holder: &H) -> bool {
        matches!(&self.state, ClaimState::Held(known) if known == holder)
    }

    /// Whether the holder has a session with the agent, armed at least.
    pub(super) fn is_in_session(&self) -> bool {
        self.in_session
    }

    /// `claimant` wants the guest.
    pub(super) fn claim(&mut self, claimant: H) -> Claim<'_, H> {
        if matches!(self.state, ClaimState::Free) {
            self.state = ClaimState::Held(claimant);
            return Claim::Granted;
        }
        match &self.state {
            ClaimState::Held(holder) => Claim::Refused(holder),
            ClaimState::Free | ClaimState::Leaving { .. } => {
                self.waiting.push_back(claimant);
                Claim::Waits
            }
        }
    }

    /// The holder's request goes to the agent.
    pub(super) fn sends(&mut self, request: &ToAgent) {
        match request {
            ToAgent::Arm(_) => self.armed = true,
            ToAgent::Close => {
                (self.armed, self.in_session) = (false, false);
                self.closing += 1;
            }
            _ => {}
        }
    }

    /// The agent sends a message; whether the listener (as it was before) gets it.
    pub(super) fn receives(&mut self, answer: &FromAgent) -> bool {
        let passed_on = self.listener().is_some();
        self.in_session |= passed_on && self.armed && matches!(answer, FromAgent::Armed(_));
        if *answer != FromAgent::Closed {
            return passed_on;
        }
        if passed_on {
            self.closing = self.closing.saturating_sub(1);
        } else {
            self.stale = self.stale.saturating_sub(1);
            self.free_if_closed();
        }
        passed_on
    }

    /// `holder` is done, or its process is gone.
    pub(super) fn release(&mut self, holder: &H, now: Instant) -> Release {
        self.waiting.retain(|waiting| waiting != holder);
        if !self.is_held_by(holder) {
            return Release::NotHeld;
        }
        let ClaimState::Held(holder) = std::mem::replace(&mut self.state, ClaimState::Free) else {
            return Release::NotHeld;
        };
        let close = std::mem::take(&mut self.armed);
        self.in_session = false;
        self.stale += std::mem::take(&mut self.closing) + u32::from(close);
        self.state = ClaimState::Leaving { holder, until: now + LEAVE_TIME_MAX };
        self.free_if_closed();
        if close { Release::Close } else { Release::Done }
    }

    /// The agent is gone: no answer of it is waited for.
    pub(super) fn agent_gone(&mut self) {
        (self.armed, self.in_session, self.closing, self.stale) = (false, false, 0, 0);
        self.free_if_closed();
    }

    /// When [`Claims::expire`] is due.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match &self.state {
            ClaimState::Leaving { until, .. } => Some(*until),
            _ => None,
        }
    }

    /// Time passes: an agent that does not answer does not keep a claimant waiting for ever. What it sends late is dropped.
    pub(super) fn expire(&mut self, now: Instant) {
        if self.deadline().is_some_and(|until| now >= until) {
            self.state = ClaimState::Free;
        }
    }

    /// The next claimant that waited, when the guest is free.
    pub(super) fn next_claimant(&mut self) -> Option<H> {
        if matches!(self.state, ClaimState::Free) { self.waiting.pop_front() } else { None }
    }

    fn free_if_closed(&mut self) {
        if self.stale == 0 && matches!(self.state, ClaimState::Leaving { .. }) {
            self.state = ClaimState::Free;
        }
    }
}

impl<H: PartialEq> Default for Claims<H> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use vtrace_common::wire::agent::Armed;

    use super::*;

    fn held(holder: u8) -> Claims<u8> {
        let mut claims = Claims::new();
        assert_eq!(claims.claim(holder), Claim::Granted);
        claims
    }

    fn armed(holder: u8) -> Claims<u8> {
        let mut claims = held(holder);
        claims.sends(&ToAgent::Arm(Box::default()));
        claims
    }

    #[test]
    fn held_guest_is_refused_to_others() {
        assert_eq!(held(1).claim(2), Claim::Refused(&1));
        assert_eq!(held(1).claim(1), Claim::Refused(&1));
    }

    #[test]
    fn holder_that_armed_nothing_leaves_at_once() {
        let mut claims = held(1);
        assert_eq!(claims.release(&1, Instant::now()), Release::Done);
        assert_eq!(claims.deadline(), None);
        assert_eq!(claims.claim(2), Claim::Granted);
    }

    #[test]
    fn session_left_open_is_closed_before_the_next_claim_is_granted() {
        let mut claims = armed(1);
        assert_eq!(claims.release(&1, Instant::now()), Release::Close);
        assert_eq!(claims.claim(2), Claim::Waits);
        assert_eq!((claims.receives(&FromAgent::Stopped), claims.next_claimant()), (false, None));
        assert!(!claims.receives(&FromAgent::Closed));
        assert_eq!(claims.next_claimant(), Some(2));
        assert_eq!(claims.claim(2), Claim::Granted);
        assert!(claims.receives(&FromAgent::Stopped));
    }

    #[test]
    fn session_closed_by_its_holder_is_not_closed_again() {
        let mut claims = armed(1);
        claims.sends(&ToAgent::Close);
        assert!(claims.receives(&FromAgent::Closed));
        assert_eq!(claims.release(&1, Instant::now()), Release::Done);
        assert_eq!(claims.claim(2), Claim::Granted);
    }

    #[test]
    fn holder_that_leaves_before_its_close_is_answered_is_waited_for() {
        let mut claims = armed(1);
        claims.sends(&ToAgent::Close);
        assert_eq!(claims.release(&1, Instant::now()), Release::Done);
        assert_eq!(claims.claim(2), Claim::Waits);
        claims.receives(&FromAgent::Closed);
        assert_eq!(claims.next_claimant(), Some(2));
    }

    #[test]
    fn agent_that_never_answers_keeps_the_guest_for_a_while_only_and_is_not_heard_after_it() {
        let (mut claims, now) = (armed(1), Instant::now());
        claims.release(&1, now);
        claims.expire(now);
        assert_eq!(claims.claim(2), Claim::Waits);
        claims.expire(now + LEAVE_TIME_MAX);
        assert_eq!(claims.next_claimant(), Some(2));
        assert_eq!(claims.claim(2), Claim::Granted);
        assert!(!claims.receives(&FromAgent::Stopped), "late: the first holder's");
        assert!(!claims.receives(&FromAgent::Closed));
        assert!(claims.receives(&FromAgent::Stopped), "the second holder's");
    }

    #[test]
    fn session_stands_from_the_agents_word_to_its_close_its_release_or_the_agents_end() {
        let ready = FromAgent::Armed(Armed::default());
        let ends: [fn(&mut Claims<u8>); 3] = [
            |claims| claims.sends(&ToAgent::Close),
            |claims| {
                claims.release(&1, Instant::now());
            },
            |claims| claims.agent_gone(),
        ];
        for end in ends {
            let mut claims = armed(1);
            assert!(!claims.is_in_session(), "it is arming");
            assert!(claims.receives(&ready) && claims.is_in_session());
            end(&mut claims);
            assert!(!claims.is_in_session());
        }
        let mut claims = held(1);
        assert!(claims.receives(&ready) && !claims.is_in_session(), "no client has armed it");
    }

    #[test]
    fn agent_that_is_gone_owes_nothing() {
        let mut claims = armed(1);
        claims.release(&1, Instant::now());
        claims.agent_gone();
        assert_eq!(claims.deadline(), None);
        assert_eq!(claims.claim(2), Claim::Granted);
        assert!(claims.receives(&FromAgent::Stopped));
    }

    #[test]
    fn claimant_that_gives_up_waiting_is_forgotten() {
        let mut claims = armed(1);
        claims.release(&1, Instant::now());
        claims.claim(2);
        assert_eq!(claims.release(&2, Instant::now()), Release::NotHeld);
        claims.agent_gone();
        assert_eq!(claims.next_claimant(), None);
    }
}
