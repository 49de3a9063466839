//! Moves pages from their sources to their final place in a file.
//!
//! | module | what |
//! |---|---|
//! | [`ring`] | from the virtqueues of a device |
//! | [`stream`] | from sockets and FIFOs |
//! | [`tap`] | from this machine's own ring buffers |
//! | [`sink`] | into a file: through the page cache or past it |
//! | [`handle`] | messages to a worker thread, and its answers |
//! | [`session`] | attach, finish, detach: the same for every worker |
//! | [`ledger`] | the lanes' counts, for other threads |
//!
//! In:    sources; a file and areas of it
//! Out:   whole pages in their areas; a ledger for each lane
//! Runs:  one worker thread for each device; [`Drain`] is its handle
//! Full:  a slow file leaves pages at their source; no page is dropped without a count
//! Trust: nothing from guests; see each source

pub(crate) mod handle;
pub mod ledger;
pub mod ring;
pub(crate) mod session;
pub mod sink;
pub mod stream;
pub mod tap;

use std::{fmt, fs::File, io};

use vtrace_common::{
    ids::Cpu,
    limits::{DEVICE_LANES_MAX, PAGE_BYTES_MAX, PAGE_BYTES_MIN},
    wire::client::{Area, DriverState, LaneLedger, LaneSent},
};

/// Why a CPU has no port.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum Portless {
    #[error("its guest has {devices} devices, of {lanes} CPUs each")]
    NoDevice { devices: usize, lanes: usize },
    #[error("no virtual machine is connected to {0}, the socket of its device")]
    NotConnected(String),
    #[error("the device at {socket} is not ready: {state:?}")]
    NotReady { socket: String, state: DriverState },
    #[error("the device at {socket} has {ports} ports")]
    Few { socket: String, ports: usize },
    #[error("its guest was set up for {0} CPUs")]
    NotSetUp(usize),
    #[error("no virtual machine is connected to {0}, the socket of its port")]
    NoStream(String),
}

/// What is called with the ledgers when all lanes are closed.
pub(crate) type Done = Box<dyn FnOnce(Vec<LaneLedger>) + Send>;

/// A drain of whatever kind: pages that come for its lanes go to a file.
pub(crate) trait Drain: fmt::Debug + Send + Sync {
    /// As [`Drain::attach`], or past the page cache where there is a `direct` and the kind knows how.
    fn attach(&self, file: &File, direct: Option<&File>, page_bytes: u32, areas: &[Area]) -> io::Result<()>;
    /// As [`Drain::ledger`].
    fn ledger(&self) -> Vec<LaneLedger>;
    /// As [`Drain::finish`].
    fn finish(&self, sent: Vec<LaneSent>, wait_ms_max: u32, done: Done);
    /// As [`Drain::detach`].
    fn detach(&self);
    /// Why a lane has no port although its device is there.
    fn portless(&self, _cpu: Cpu) -> Option<Portless> {
        None
    }
}

/// A page size and areas that a file can have.
pub(crate) fn check(page_bytes: u32, areas: &[Area]) -> io::Result<()> {
    let invalid = |what| Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    let size = usize::try_from(page_bytes).unwrap_or(usize::MAX);
    if !page_bytes.is_power_of_two() || !(PAGE_BYTES_MIN..=PAGE_BYTES_MAX).contains(&size) {
        return invalid("no sub-buffer has this size");
    }
    if areas.is_empty() || areas.len() > DEVICE_LANES_MAX {
        return invalid("no areas, or more than lanes");
    }
    for (index, area) in areas.iter().enumerate() {
        let end = area.offset.checked_add(area.bytes_max).filter(|&end| i64::try_from(end).is_ok());
        let whole = !area.begins_again
            || area.bytes_max >= page_bytes.into() && area.bytes_max.is_multiple_of(page_bytes.into());
        let Some(end) = end.filter(|_| whole && area.offset.is_multiple_of(page_bytes.into())) else {
            return invalid("an area is not aligned to pages, or ends past the largest file offset");
        };
        let clash = |other: &Area| {
            let meets = other.offset < end && area.offset < other.offset.saturating_add(other.bytes_max);
            other.cpu == area.cpu || meets
        };
        if areas[..index].iter().any(clash) {
            return invalid("two areas are of one CPU or overlap");
        }
    }
    Ok(())
}
