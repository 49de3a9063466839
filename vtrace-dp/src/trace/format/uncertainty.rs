//! Which rewritten times are not exact, and how far off each can be.
//!
//! In:    the conversions of a lane, in its order
//! Out:   [`Uncertainty`]s: stretches of neighbours, as few as there are
//! Runs:  with the rewriting
//! Full:  of more than [`DOUBTS_MAX`] in a lane the last one reaches to the last doubtful event
//! Trust: does not apply

use vtrace_common::{ids::Cpu, time::HostTsc};

use crate::clock::table::{Certainty, Conversion};

/// Of one lane.
pub const DOUBTS_MAX: usize = 1 << 8;
/// Of one file.
pub(crate) const UNCERTAINTIES_MAX: usize = 1 << 14;

/// Neighbouring events of one CPU whose times are known only within bounds: after a step back of the guest's clock, or
/// next to a change that was seen too late.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Uncertainty {
    /// The CPU of the events.
    pub cpu: Cpu,
    /// Their number.
    pub events: u64,
    /// The time the first is shown at.
    pub first: HostTsc,
    /// The time the last is shown at.
    pub last: HostTsc,
    /// How far off any of them can be, host ticks.
    pub error: u64,
}

/// Gathers the uncertainties of one lane.
#[derive(Debug, Default)]
pub(crate) struct UncertaintyList {
    found: Vec<Uncertainty>,
    /// The last event was doubtful.
    is_open: bool,
}

impl UncertaintyList {
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
            Some(uncertainty) => {
                (uncertainty.last, uncertainty.events) = (at, uncertainty.events + 1);
                uncertainty.error = uncertainty.error.max(error);
            }
            None => self.found.push(Uncertainty { cpu, events: 1, first: at, last: at, error }),
        }
    }

    pub(crate) fn into_list(self) -> Vec<Uncertainty> {
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
        let mut uncertainties = UncertaintyList::default();
        uncertainties.look(Cpu(3), &[conversion(10, 0, Certainty::Exact), conversion(20, 4, Certainty::Trapped)]);
        uncertainties.look(Cpu(3), &[conversion(30, 9, Certainty::Unsure), conversion(40, 0, Certainty::Exact)]);
        uncertainties.look(Cpu(3), &[conversion(50, 1, Certainty::Trapped)]);
        let found = uncertainties.into_list();
        let uncertainty = |events, first, last, error| Uncertainty {
            cpu: Cpu(3),
            events,
            first: HostTsc(first),
            last: HostTsc(last),
            error,
        };
        assert_eq!(found, [uncertainty(2, 20, 30, 9), uncertainty(1, 50, 50, 1)]);
    }

    #[test]
    fn more_doubts_than_there_is_room_for_are_one() {
        let mut uncertainties = UncertaintyList::default();
        for at in 1..2000 {
            uncertainties.look(
                Cpu(0),
                &[conversion(10 * at, 1, Certainty::Trapped), conversion(10 * at + 5, 0, Certainty::Exact)],
            );
        }
        let found = uncertainties.into_list();
        assert_eq!((found.len(), found.last().unwrap().last), (DOUBTS_MAX, HostTsc(19_990)));
    }
}
