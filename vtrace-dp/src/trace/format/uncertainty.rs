//! Which rewritten times are not exact, and how far off each can be.
//!
//! In:    the conversions of a lane, in its order
//! Out:   [`Doubt`]s: stretches of neighbours, as few as there are
//! Runs:  with the rewriting
//! Full:  of more than [`DOUBTS_MAX`] in a lane the last one reaches to the last doubtful event
//! Trust: does not apply

use vtrace_common::{ids::Cpu, time::HostTsc};

use crate::clock::table::{Certainty, Conversion};

/// Of one lane.
pub const DOUBTS_MAX: usize = 1 << 8;
/// Of one file.
pub(crate) const FILE_DOUBTS_MAX: usize = 1 << 14;

/// Neighbouring events of one CPU whose times are known within bounds only: behind a step back of the guest's clock, or
/// beside a change that was seen too late.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Doubt {
    /// Whose.
    pub cpu: Cpu,
    /// How many.
    pub events: u64,
    /// What the first is shown at.
    pub first: HostTsc,
    /// And the last.
    pub last: HostTsc,
    /// How far off any of them can be, host ticks.
    pub error: u64,
}

/// Gathers the doubts of one lane.
#[derive(Debug, Default)]
pub(crate) struct Doubts {
    found: Vec<Doubt>,
    /// The last event was doubtful.
    is_open: bool,
}

impl Doubts {
    /// Looks at the next events. Hot.
    pub(crate) fn look(&mut self, cpu: Cpu, conversions: &[Conversion]) {
        for conversion in conversions {
            let is_doubtful = matches!(conversion.certainty, Certainty::Unsure | Certainty::Trapped);
            if is_doubtful {
                self.push(cpu, conversion);
            }
            self.is_open = is_doubtful;
        }
    }

    fn push(&mut self, cpu: Cpu, conversion: &Conversion) {
        let (at, error) = (conversion.at, conversion.error());
        let joins = self.is_open || self.found.len() == DOUBTS_MAX;
        match self.found.last_mut().filter(|_| joins) {
            Some(doubt) => {
                (doubt.last, doubt.events) = (at, doubt.events + 1);
                doubt.error = doubt.error.max(error);
            }
            None => self.found.push(Doubt { cpu, events: 1, first: at, last: at, error }),
        }
    }

    pub(crate) fn into_list(self) -> Vec<Doubt> {
        self.found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::math::HostRange;

    fn conversion(at: u64, error: u64, certainty: Certainty) -> Conversion {
        let possible = HostRange { low: HostTsc(at - error), high: HostTsc(at) };
        Conversion { at: HostTsc(at), possible, certainty }
    }

    #[test]
    fn neighbours_are_one_doubt_and_an_exact_event_ends_it() {
        let mut doubts = Doubts::default();
        doubts.look(Cpu(3), &[conversion(10, 0, Certainty::Exact), conversion(20, 4, Certainty::Trapped)]);
        doubts.look(Cpu(3), &[conversion(30, 9, Certainty::Unsure), conversion(40, 0, Certainty::Exact)]);
        doubts.look(Cpu(3), &[conversion(50, 1, Certainty::Trapped)]);
        let found = doubts.into_list();
        let doubt = |events, first, last, error| Doubt {
            cpu: Cpu(3),
            events,
            first: HostTsc(first),
            last: HostTsc(last),
            error,
        };
        assert_eq!(found, [doubt(2, 20, 30, 9), doubt(1, 50, 50, 1)]);
    }

    #[test]
    fn more_doubts_than_there_is_room_for_are_one() {
        let mut doubts = Doubts::default();
        for at in 1..2000 {
            doubts.look(
                Cpu(0),
                &[conversion(10 * at, 1, Certainty::Trapped), conversion(10 * at + 5, 0, Certainty::Exact)],
            );
        }
        let found = doubts.into_list();
        assert_eq!((found.len(), found.last().unwrap().last), (DOUBTS_MAX, HostTsc(19_990)));
    }
}
