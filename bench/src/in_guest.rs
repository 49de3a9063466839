//! This program inside a guest: fills a ring buffer, sends it over a port. For the case `guest`, which puts it there.
//!
//! In:    words of the host
//! Out:   what was moved, as one line of JSON
//! Runs:  in the guest, as root
//! Trust: the host is ours

use std::{os::fd::AsFd, time::Instant};

use anyhow::{Context, Result, anyhow};
use clap::{Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};
use vtrace_common::ids::Cpu;
use vtrace_dp::agent::testing::{Pumping, open_port};

use crate::rig::{lanes::PAGE, source::Source, stock};

const INSTANCE: &str = "bench";
/// The one CPU whose pages are sent.
const CPU: Cpu = Cpu(0);

/// What the host asks for.
#[derive(Clone, Subcommand)]
pub(crate) enum Word {
    /// Fill the ring buffer
    Fill {
        /// With this much
        megabytes: u64,
    },
    /// Send it
    Send {
        /// How
        sender: Sender,
        /// What the port's name begins with
        port: String,
    },
}

/// How pages get from the ring buffer into the port.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Sender {
    /// The agent's pump
    Pump,
    /// As trace-cmd's recorder does
    Splice,
}

/// What was sent.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Sent {
    pub(crate) bytes: u64,
    pub(crate) seconds: f64,
}

/// Does it.
pub(crate) fn obey(word: &Word) -> Result<Option<Sent>> {
    match word {
        Word::Fill { megabytes } => {
            let bytes = megabytes << 20;
            Source::lasting(INSTANCE, vec![CPU], bytes)?.fill(bytes)?;
            Ok(None)
        }
        Word::Send { sender, port } => send(*sender, port).map(Some),
    }
}

fn send(sender: Sender, port: &str) -> Result<Sent> {
    let source = Source::lasting(INSTANCE, vec![CPU], 0)?;
    let port = open_port(port, CPU).map_err(|failure| anyhow!("{failure:?}"))?;
    let tap = source.taps()?.pop().context("there is a tap for each CPU")?;
    let begun = Instant::now();
    let bytes = match sender {
        Sender::Pump => Pumping::start(vec![(tap, port)], PAGE)?.finish()?,
        Sender::Splice => stock::empty(tap.fd.as_fd(), port.as_fd())?,
    };
    Ok(Sent { bytes, seconds: begun.elapsed().as_secs_f64() })
}
