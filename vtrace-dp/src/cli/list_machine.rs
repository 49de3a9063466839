//! What could be traced on a machine: `vtrace list --dom GUEST` and `--host`.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use serde::Serialize;
use vtrace_common::wire::{
    agent::{FromAgent, OfferPiece, Offered, ToAgent},
    client::{FromServer, ToServer},
};

use super::complaint::Complaint;
use crate::{server::link::Link, tracefs::Tracefs};

/// An agent that answers at all has told everything by then.
const OFFER_MAX: Duration = Duration::from_secs(10);
/// All texts together: more is no kernel's.
const BYTES_MAX: usize = 8 << 20;

/// Clocks, tracers and events of a machine.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub(super) struct Offers {
    /// The one in use in the top buffer has brackets.
    pub(super) clocks: Vec<String>,
    pub(super) tracers: Vec<String>,
    /// By system.
    pub(super) events: BTreeMap<String, Vec<String>>,
}

/// Texts as they come.
#[derive(Default)]
struct Gathered {
    texts: BTreeMap<Offered, Vec<u8>>,
    bytes: usize,
    complete: bool,
}

impl Gathered {
    fn add(&mut self, piece: &OfferPiece) -> Result<(), String> {
        self.bytes += piece.bytes.len();
        if self.bytes > BYTES_MAX {
            return Err(format!("it offers more than {BYTES_MAX} bytes of names"));
        }
        self.texts.entry(piece.offered).or_default().extend_from_slice(&piece.bytes);
        self.complete |= piece.last && piece.offered == Offered::Events;
        Ok(())
    }

    fn offers(&self) -> Offers {
        let words = |offered| {
            let text = String::from_utf8_lossy(self.texts.get(&offered).map_or(&[][..], Vec::as_slice)).into_owned();
            // A guest says whatever it likes: nothing of it moves a terminal's cursor.
            text.split_whitespace().map(|word| word.replace(char::is_control, "?")).collect::<Vec<_>>()
        };
        let mut events: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for event in words(Offered::Events) {
            if let Some((system, event)) = event.split_once(':') {
                events.entry(system.into()).or_default().push(event.into());
            }
        }
        Offers { clocks: words(Offered::Clocks), tracers: words(Offered::Tracers), events }
    }
}

/// What this machine offers.
pub(super) fn of_host() -> Result<Offers, Complaint> {
    let failed = |failure: vtrace_common::wire::agent::Failure| {
        Complaint::new("cannot list the host", format!("{}: {}", failure.object, failure.detail), "be root")
    };
    let (mut gathered, mut result) = (Gathered::default(), Ok(()));
    let tracefs = Tracefs::find_or_mount().map_err(failed)?;
    tracefs.offer(&mut |piece| result = result.clone().and_then(|()| gathered.add(&piece))).map_err(failed)?;
    result.map_err(|why| Complaint::new("cannot list the host", why, ""))?;
    Ok(gathered.offers())
}

/// What a guest offers: its agent is asked, for which nobody else may hold the guest.
pub(super) fn of_guest(link: &mut Link, guest: &str) -> Result<Offers, Complaint> {
    let cannot = format!("cannot list what {guest} offers");
    let name = || guest.to_owned();
    link.send(&ToServer::Claim { guest: name() })?;
    let (mut gathered, begun) = (Gathered::default(), Instant::now());
    while !gathered.complete {
        let left = OFFER_MAX.saturating_sub(begun.elapsed());
        let Some(message) = link.receive(Some(left))? else {
            return Err(Complaint::new(
                cannot,
                "its agent does not answer",
                "see whether the guest runs and is not paused",
            ));
        };
        match message {
            FromServer::Claimed(_) => link.send(&ToServer::Agent { guest: name(), request: ToAgent::Offer })?,
            FromServer::Refused(refusal) => return Err(super::complaint::refused(&refusal).instead(cannot)),
            FromServer::Gone { .. } => return Err(Complaint::new(cannot, "its agent has gone", "vtrace list")),
            FromServer::Agent { answer: FromAgent::Offer(piece), .. } => {
                gathered.add(&piece).map_err(|why| Complaint::new(&cannot, why, "look at its agent"))?;
            }
            FromServer::Agent { answer: FromAgent::Failed(failure), .. } => {
                let why = format!("{}: {}", failure.object, failure.detail);
                return Err(Complaint::new(cannot, why, "copy this vtrace into the guest and start its agent again"));
            }
            _ => {}
        }
    }
    link.send(&ToServer::Release { guest: name() })?;
    while !matches!(
        link.receive(Some(OFFER_MAX.saturating_sub(begun.elapsed())))?,
        Some(FromServer::Released { .. }) | None
    ) {}
    Ok(gathered.offers())
}

impl Offers {
    /// A few lines: clocks, tracers, how many events each system has.
    pub(super) fn overview(&self) -> Vec<String> {
        let count: usize = self.events.values().map(Vec::len).sum();
        let systems: Vec<String> =
            self.events.iter().map(|(system, events)| format!("{system} {}", events.len())).collect();
        vec![
            format!("  clocks   {}", self.clocks.join(" ")),
            format!("  tracers  {}", self.tracers.join(" ")),
            format!("  events   {count} in {} systems: {}", self.events.len(), systems.join(", ")),
        ]
    }

    /// `system:event`, where `pattern` occurs in it; for `record -e`.
    pub(super) fn events_with(&self, pattern: &str) -> Vec<String> {
        let all =
            self.events.iter().flat_map(|(system, events)| events.iter().map(move |event| format!("{system}:{event}")));
        all.filter(|event| event.contains(pattern)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(offered: Offered, text: &str, last: bool) -> OfferPiece {
        OfferPiece { offered, bytes: text.into(), last }
    }

    #[test]
    fn texts_in_pieces_become_clocks_tracers_and_events() {
        let mut gathered = Gathered::default();
        gathered.add(&piece(Offered::Clocks, "[local] x86-tsc\n", true)).unwrap();
        gathered.add(&piece(Offered::Tracers, "function nop\n", true)).unwrap();
        gathered.add(&piece(Offered::Events, "sched:sched_swi", false)).unwrap();
        assert!(!gathered.complete);
        gathered.add(&piece(Offered::Events, "tch\nirq:a\nsched:b\x1b[2J\nodd\n", true)).unwrap();
        let offers = gathered.offers();
        assert!(gathered.complete);
        assert_eq!(offers.events_with("sched"), ["sched:sched_switch", "sched:b?[2J"]);
        let expected =
            ["  clocks   [local] x86-tsc", "  tracers  function nop", "  events   3 in 2 systems: irq 1, sched 2"];
        assert_eq!(offers.overview(), expected);
    }

    #[test]
    fn guest_that_offers_without_end_is_cut_off() {
        let mut gathered = Gathered::default();
        let long = "a:b ".repeat(8 << 10);
        let count = (0..).take_while(|_| gathered.add(&piece(Offered::Events, &long, false)).is_ok()).count();
        assert_eq!(count, BYTES_MAX / long.len());
    }

    #[test]
    fn host_offers_what_its_tracefs_does() {
        let Ok(offers) = of_host() else { return println!("skipped: tracefs cannot be read here") };
        assert!(offers.clocks.iter().any(|clock| clock.contains("x86-tsc")));
        assert!(
            offers.tracers.contains(&"nop".to_owned()) && offers.events["sched"].contains(&"sched_switch".to_owned())
        );
    }
}
