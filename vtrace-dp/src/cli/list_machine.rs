//! Clocks, tracers and events of a machine: `vtrace list --dom GUEST` and `--host`.

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
use crate::{doctor::remedy, server::link::Link, tracefs::Tracefs};

/// Timeout of an agent's whole answer.
const OFFER_MAX: Duration = Duration::from_secs(10);
/// Limit of all texts together: no kernel has more.
const BYTES_MAX: usize = 8 << 20;

/// An answer that is longer than any kernel's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("its names of events exceed {BYTES_MAX} bytes")]
struct OfferTooLong;

/// Clocks, tracers and events of a machine.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub(super) struct Offers {
    /// The top buffer's clock is in brackets.
    pub(super) clocks: Vec<String>,
    pub(super) tracers: Vec<String>,
    /// Events by system.
    pub(super) events: BTreeMap<String, Vec<String>>,
}

/// The texts of an answer, in pieces.
#[derive(Default)]
struct OfferTexts {
    texts: BTreeMap<Offered, Vec<u8>>,
    bytes: usize,
    complete: bool,
}

impl OfferTexts {
    fn add(&mut self, piece: &OfferPiece) -> Result<(), OfferTooLong> {
        self.bytes += piece.bytes.len();
        if self.bytes > BYTES_MAX {
            return Err(OfferTooLong);
        }
        self.texts.entry(piece.offered).or_default().extend_from_slice(&piece.bytes);
        self.complete |= piece.last && piece.offered == Offered::Events;
        Ok(())
    }

    fn offers(&self) -> Offers {
        let words = |offered| {
            let text = String::from_utf8_lossy(self.texts.get(&offered).map_or(&[][..], Vec::as_slice)).into_owned();
            // A guest's text is not trusted: control characters do not reach the terminal.
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

/// Clocks, tracers and events of this machine.
pub(super) fn of_host() -> Result<Offers, Complaint> {
    let mut texts = OfferTexts::default();
    let mut result = Ok(());
    Tracefs::find_or_mount()
        .and_then(|tracefs| tracefs.offer(&mut |piece| result = result.and_then(|()| texts.add(&piece))))
        .map_err(|failure| {
            Complaint::new("cannot list the host", format!("{}: {}", failure.object, failure.detail), "run as root")
        })?;
    result.map_err(|error| Complaint::new("cannot list the host", error, ""))?;
    Ok(texts.offers())
}

/// Clocks, tracers and events of a guest, from its agent. The guest must not be recorded meanwhile.
pub(super) fn of_guest(link: &mut Link, guest: &str) -> Result<Offers, Complaint> {
    let cannot = format!("cannot list events of {guest}");
    let name = || guest.to_owned();
    link.send(&ToServer::Claim { guest: name() })?;
    let mut texts = OfferTexts::default();
    let begun = Instant::now();
    while !texts.complete {
        let left = OFFER_MAX.saturating_sub(begun.elapsed());
        let Some(message) = link.receive(Some(left))? else {
            return Err(Complaint::new(cannot, "its agent does not answer", remedy::SILENT_GUEST));
        };
        match message {
            FromServer::Claimed(_) => link.send(&ToServer::Agent { guest: name(), request: ToAgent::Offer })?,
            FromServer::Refused(refusal) => return Err(super::complaint::refused(&refusal).instead(cannot)),
            FromServer::Gone { .. } => return Err(Complaint::new(cannot, "its agent has gone", "vtrace list")),
            FromServer::Agent { answer: FromAgent::Offer(piece), .. } => {
                texts
                    .add(&piece)
                    .map_err(|error| Complaint::new(&cannot, error, "see the agent's output in the guest"))?;
            }
            FromServer::Agent { answer: FromAgent::Failed(failure), .. } => {
                let why = format!("{}: {}", failure.object, failure.detail);
                return Err(Complaint::new(cannot, why, remedy::AGENT_VERSION));
            }
            _ => {}
        }
    }
    link.send(&ToServer::Release { guest: name() })?;
    while !matches!(
        link.receive(Some(OFFER_MAX.saturating_sub(begun.elapsed())))?,
        Some(FromServer::Released { .. }) | None
    ) {}
    Ok(texts.offers())
}

impl Offers {
    /// Clocks, tracers, and the number of events of each system.
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

    /// The events whose `system:event` contains `pattern`, for `record -e`.
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
        let mut texts = OfferTexts::default();
        texts.add(&piece(Offered::Clocks, "[local] x86-tsc\n", true)).unwrap();
        texts.add(&piece(Offered::Tracers, "function nop\n", true)).unwrap();
        texts.add(&piece(Offered::Events, "sched:sched_swi", false)).unwrap();
        assert!(!texts.complete);
        texts.add(&piece(Offered::Events, "tch\nirq:a\nsched:b\x1b[2J\nodd\n", true)).unwrap();
        let offers = texts.offers();
        assert!(texts.complete);
        assert_eq!(offers.events_with("sched"), ["sched:sched_switch", "sched:b?[2J"]);
        let expected =
            ["  clocks   [local] x86-tsc", "  tracers  function nop", "  events   3 in 2 systems: irq 1, sched 2"];
        assert_eq!(offers.overview(), expected);
    }

    #[test]
    fn answer_without_end_is_an_error() {
        let mut texts = OfferTexts::default();
        let long = "a:b ".repeat(8 << 10);
        let count = (0..).take_while(|_| texts.add(&piece(Offered::Events, &long, false)).is_ok()).count();
        assert_eq!(count, BYTES_MAX / long.len());
    }

    #[test]
    fn host_lists_its_tracefs() {
        let Ok(offers) = of_host() else { return println!("skipped: tracefs cannot be read here") };
        assert!(offers.clocks.iter().any(|clock| clock.contains("x86-tsc")));
        assert!(
            offers.tracers.contains(&"nop".to_owned()) && offers.events["sched"].contains(&"sched_switch".to_owned())
        );
    }
}
