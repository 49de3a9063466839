//! What reads a kernel's texts, without a kernel: for fuzz targets.
//!
//! In:    texts as tracefs has them
//! Out:   what they say
//! Runs:  on the caller's thread
//! Full:  does not apply
//! Trust: nothing

use vtrace_common::wire::agent::{EventRequest, Failure};

use super::{describe, events::Events, instance};

/// Bytes of a page, as events/header_page says.
///
/// # Errors
/// A text that says nothing, or what cannot be.
pub fn page_bytes(header_page: &str) -> Result<u32, Failure> {
    instance::page_bytes(header_page)
}

/// Events of the text available_events that `requests` mean, as system and event, sorted.
///
/// # Errors
/// The first request that means none.
pub fn choose(available_events: &str, requests: &[EventRequest]) -> Result<Vec<(String, String)>, Failure> {
    let chosen = Events::parse(available_events).choose(requests)?;
    Ok(chosen.each().map(|(system, event)| (system.into(), event.into())).collect())
}

/// Names of processes, as saved_cmdlines says.
pub fn commands(saved_cmdlines: &str) -> Vec<(u32, String)> {
    describe::parse_commands(saved_cmdlines).into_iter().collect()
}
