//! The parsers of a kernel's texts, for fuzz targets.
//!
//! In:    texts as tracefs has them
//! Out:   their contents, or a [`Failure`]
//! Trust: nothing

use vtrace_common::wire::agent::{EventRequest, Failure};

use super::{describe, events::Events, instance};

/// Bytes of a page, from events/header_page.
///
/// # Errors
/// `Kernel` when the text has no possible size.
pub fn page_bytes(header_page: &str) -> Result<u32, Failure> {
    instance::page_bytes(header_page)
}

/// The events of `available_events` that match `requests`, as system and event, sorted.
///
/// # Errors
/// `NoSuchEvent` for the first request that matches none.
pub fn choose(available_events: &str, requests: &[EventRequest]) -> Result<Vec<(String, String)>, Failure> {
    let chosen = Events::parse(available_events).choose(requests)?;
    Ok(chosen.each().map(|(system, event)| (system.into(), event.into())).collect())
}

/// Process ids and names from saved_cmdlines.
pub fn commands(saved_cmdlines: &str) -> Vec<(u32, String)> {
    describe::parse_commands(saved_cmdlines).into_iter().collect()
}
