//! The pump alone, without a session around it, for benchmarks; the owner's rules alone, for fuzz targets.
//!
//! In:    taps and ports; a text of rules
//! Out:   the pages in the ports; the programs that may be run
//! Runs:  as [`Pump`] does
//! Full:  as [`Pump`] does
//! Trust: its caller

use std::{io, os::fd::OwnedFd};

use vtrace_common::{ids::Cpu, wire::agent::Failure};

use super::{
    policy::{Exec, Policy, PolicyFault},
    port::{HeldPorts, SerialPorts},
    pump::Pump,
};
use crate::tracefs::Tap;

/// A pump that runs.
#[derive(Debug)]
pub struct Pumping(Pump);

impl Pumping {
    /// Starts the pump as a session does.
    pub fn start(lanes: Vec<(Tap, OwnedFd)>, page_bytes: u32) -> io::Result<Self> {
        Pump::start(lanes, page_bytes, None).map(Self).map_err(io::Error::other)
    }

    /// Waits until everything is in the ports, as a session does when tracing was switched off. Bytes sent.
    ///
    /// # Errors
    /// When a page was lost, or a lane ended early.
    pub fn finish(self) -> io::Result<u64> {
        self.0.drain();
        let ends = self.0.join().ok_or_else(|| io::Error::other("the pump has panicked"))?;
        match ends.iter().find(|end| end.ledger.pages_lost > 0 || !end.trouble.is_empty()) {
            Some(end) => Err(io::Error::other(format!("{end:?}"))),
            None => Ok(ends.iter().map(|end| end.ledger.bytes_out).sum()),
        }
    }
}

/// Opens the port of `cpu` among those whose names begin with `prefix`, as a session does.
///
/// # Errors
/// As a session's.
pub fn open_port(prefix: &str, cpu: Cpu) -> Result<OwnedFd, Failure> {
    let (class, nodes) = ("/sys/class/virtio-ports".into(), "/dev".into());
    SerialPorts { class, nodes, control: String::new(), lane_prefix: prefix.into(), held: HeldPorts::default() }
        .lanes()
        .open(cpu, false)
}

/// What the rules of `text` allow to be run.
///
/// # Errors
/// Rules that are none.
pub fn exec(text: &str) -> Result<Exec, PolicyFault> {
    Policy::parse(text, "agent.toml".into()).map(|policy| policy.exec)
}
