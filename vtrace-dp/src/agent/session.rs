//! The states of a session, and what each request does in each of them.
//!
//! In:    requests of the host; outcomes of what was done
//! Out:   the one thing to do next ([`Effect`]); the caller does it and reports a [`SessionOutcome`]
//! Runs:  in the control loop; pure
//! Full:  one session at a time: a second `Arm` is refused, never queued
//! Trust: nothing: any request may arrive in any state
//!
//! | state | Arm | Start | Mark | Stop | Close |
//! |---|---|---|---|---|---|
//! | Idle | → Armed | refused | refused | refused | answered |
//! | Armed | refused | → Running | done | → Stopping | → Idle |
//! | Running | refused | refused | done | → Stopping | → Idle |
//! | Stopping (pages on their way) | refused | refused | refused | refused | → Idle |
//! | Stopped (reported) | refused | refused | refused | refused | → Idle |
//!
//! `Probe`, `Ping` and `Offer` are answered in every state. A host that disconnects counts as a `Close`
//! without an answer.

use vtrace_common::{
    ids::Cpu,
    wire::agent::{Arm, Failure, FailureKind, ToAgent},
};

/// The state of a session.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum SessionState {
    /// There is no session.
    #[default]
    Idle,
    /// Instance, taps and ports are open; tracing is off.
    Armed,
    /// Tracing is on.
    Running,
    /// Tracing is off; the pump moves what is left.
    Stopping,
    /// The report is sent; the instance still exists.
    Stopped,
}

/// What to do for a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Effect {
    /// Prepare everything, describe, answer `Armed`.
    Arm(Box<Arm>),
    /// Tracing on, marker, answer `Started`.
    Start {
        /// The marker's text.
        marker: String,
    },
    /// Write the marker, answer `Marked`.
    Mark {
        /// The marker's text.
        text: String,
    },
    /// Answer `Echo` from that CPU.
    Echo {
        /// The probe's id.
        id: u32,
        /// The CPU to answer on.
        cpu: Cpu,
    },
    /// Answer `Pong`.
    Pong {
        /// The ping's id.
        id: u32,
    },
    /// Answer with what could be traced.
    Offer,
    /// Tracing off, let the pump move what is left; the report follows when it has.
    Drain,
    /// Remove everything (there may be nothing), answer `Closed`.
    Close,
    /// Answer `Failed`.
    Refuse(Failure),
}

/// The outcome of an effect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum SessionOutcome {
    /// [`Effect::Arm`] has succeeded. A failed one changes nothing.
    Armed,
    /// [`Effect::Start`] has succeeded. A failed one changes nothing.
    Started,
    /// [`Effect::Drain`] is under way.
    Draining,
    /// The pump has moved everything and the report is sent.
    Reported,
    /// Everything is removed: after a `Close`, or because the host or the pump has ended.
    Removed,
}

impl SessionState {
    /// What to do for `request` now.
    pub(super) fn on(self, request: ToAgent) -> Effect {
        match (self, request) {
            (_, ToAgent::Ping { id }) => Effect::Pong { id },
            (_, ToAgent::Probe { id, cpu }) => Effect::Echo { id, cpu },
            (_, ToAgent::Close) => Effect::Close,
            (_, ToAgent::Offer) => Effect::Offer,
            (Self::Idle, ToAgent::Arm(arm)) => Effect::Arm(arm),
            (Self::Armed, ToAgent::Start { marker }) => Effect::Start { marker },
            (Self::Armed | Self::Running, ToAgent::Mark { text }) => Effect::Mark { text },
            (Self::Armed | Self::Running, ToAgent::Stop) => Effect::Drain,
            (state, request) => Effect::Refuse(state.refusal(&request)),
        }
    }

    /// The state after `outcome`.
    pub(super) fn after(self, outcome: SessionOutcome) -> Self {
        match (self, outcome) {
            (Self::Idle, SessionOutcome::Armed) => Self::Armed,
            (Self::Armed, SessionOutcome::Started) => Self::Running,
            (Self::Armed | Self::Running, SessionOutcome::Draining) => Self::Stopping,
            (Self::Stopping, SessionOutcome::Reported) => Self::Stopped,
            (_, SessionOutcome::Removed) => Self::Idle,
            (state, outcome) => {
                unreachable!("{outcome:?} cannot follow {state:?}: SessionState::on allows no such effect")
            }
        }
    }

    fn refusal(self, request: &ToAgent) -> Failure {
        let object = match request {
            ToAgent::Arm(_) => "Arm",
            ToAgent::Start { .. } => "Start",
            ToAgent::Mark { .. } => "Mark",
            ToAgent::Stop => "Stop",
            ToAgent::Probe { .. } => "Probe",
            ToAgent::Ping { .. } => "Ping",
            ToAgent::Close => "Close",
            ToAgent::Offer => "Offer",
        };
        let detail = match self {
            Self::Idle => "no session is armed",
            Self::Armed => "a session is armed",
            Self::Running => "a session is running",
            Self::Stopping => "the session is stopping",
            Self::Stopped => "the session has stopped and is not closed yet",
        };
        Failure { kind: FailureKind::State, object: object.into(), detail: detail.into(), near: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn requests() -> impl Strategy<Value = ToAgent> {
        prop_oneof![
            Just(ToAgent::Arm(Box::default())),
            Just(ToAgent::Start { marker: "m".into() }),
            Just(ToAgent::Mark { text: "t".into() }),
            any::<u32>().prop_map(|id| ToAgent::Ping { id }),
            any::<(u32, u32)>().prop_map(|(id, cpu)| ToAgent::Probe { id, cpu: Cpu(cpu) }),
            Just(ToAgent::Stop),
            Just(ToAgent::Close),
            Just(ToAgent::Offer),
        ]
    }

    fn outcome(effect: &Effect) -> Option<SessionOutcome> {
        match effect {
            Effect::Arm(_) => Some(SessionOutcome::Armed),
            Effect::Start { .. } => Some(SessionOutcome::Started),
            Effect::Drain => Some(SessionOutcome::Draining),
            Effect::Close => Some(SessionOutcome::Removed),
            Effect::Mark { .. } | Effect::Echo { .. } | Effect::Pong { .. } | Effect::Offer | Effect::Refuse(_) => None,
        }
    }

    #[test]
    fn whole_session_passes_every_state_in_order() {
        let mut state = SessionState::default();
        let mut seen = vec![];
        for request in [ToAgent::Arm(Box::default()), ToAgent::Start { marker: "m".into() }, ToAgent::Stop] {
            let done = outcome(&state.on(request)).expect("each of them changes the state");
            state = state.after(done);
            seen.push(state);
        }
        state = state.after(SessionOutcome::Reported);
        assert_eq!(seen, [SessionState::Armed, SessionState::Running, SessionState::Stopping]);
        assert_eq!(state, SessionState::Stopped);
        assert_eq!(state.on(ToAgent::Close), Effect::Close);
        assert_eq!(state.after(SessionOutcome::Removed), SessionState::Idle);
    }

    #[test]
    fn second_arm_is_refused_while_a_session_exists() {
        for state in [SessionState::Armed, SessionState::Running, SessionState::Stopping, SessionState::Stopped] {
            let Effect::Refuse(failure) = state.on(ToAgent::Arm(Box::default())) else { panic!("{state:?} took it") };
            assert_eq!(failure.kind, FailureKind::State);
        }
    }

    #[test]
    fn close_is_answered_in_every_state() {
        for state in [
            SessionState::Idle,
            SessionState::Armed,
            SessionState::Running,
            SessionState::Stopping,
            SessionState::Stopped,
        ] {
            assert_eq!(state.on(ToAgent::Close), Effect::Close);
        }
    }

    proptest! {
        /// For any requests and failures, and whenever the pump ends: resources are never taken twice, never used when there
        /// are none, and are gone after a close.
        #[test]
        fn any_order_of_requests_keeps_at_most_one_session(
            steps in proptest::collection::vec((requests(), any::<bool>(), any::<bool>()), 0..64),
        ) {
            let mut state = SessionState::default();
            let mut exists = false;
            for (request, fails, drained) in steps {
                if drained && state == SessionState::Stopping {
                    state = state.after(SessionOutcome::Reported);
                }
                let effect = state.on(request.clone());
                match &effect {
                    Effect::Arm(_) => prop_assert!(!exists),
                    Effect::Start { .. } | Effect::Mark { .. } | Effect::Drain => prop_assert!(exists),
                    _ => {}
                }
                let may_fail = matches!(effect, Effect::Arm(_) | Effect::Start { .. });
                if let Some(done) = outcome(&effect).filter(|_| !(fails && may_fail)) {
                    state = state.after(done);
                    exists = done != SessionOutcome::Removed;
                }
                if request == ToAgent::Close {
                    prop_assert_eq!(effect, Effect::Close);
                    prop_assert!(!exists && state == SessionState::Idle);
                }
            }
        }
    }
}
