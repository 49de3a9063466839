//! Lanes that nothing comes over: how often anybody wakes up for them.
//!
//! In:    lanes of a running recording on the host's side; lanes of a running pump on the guest's
//! Out:   context switches per second of the backend's threads, and of the pump's
//! Runs:  both at once, while this thread sleeps

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context, Result};
use vtrace_dp::{
    agent::testing::Pumping,
    drain::sink::NullSink,
    tracefs::{Tap, online_cpus},
};

use crate::{
    measure,
    rig::{
        backend::{Backend, attach},
        lanes::{Guest, PAGE},
        source::Source,
    },
    row::Row,
};

const LANES: u32 = 64;
const WATCHED: Duration = Duration::from_secs(10);
/// More rounds tell nothing more about nothing.
const ROUNDS_MAX: u32 = 3;

/// Measures a few rounds of ten seconds.
pub(crate) fn run(rounds: u32) -> Result<Vec<Row>> {
    measure(rounds.min(ROUNDS_MAX), LANES, WATCHED)
}

pub(super) fn measure(rounds: u32, lanes: u32, watched: Duration) -> Result<Vec<Row>> {
    let guest = Guest::new(lanes)?;
    let (theirs, ours) = UnixStream::pair()?;
    let backend = Backend::connected("idle", ours)?;
    let _frontend = attach(theirs, &guest)?;
    backend.drain.attach_sink(Box::new(NullSink), PAGE, guest.areas(1 << 20))?;
    let sources = sources(lanes)?;
    let (taps, _outlets, ports) = taps(&sources, lanes)?;
    let pump = Pumping::start(taps.into_iter().zip(ports).collect(), PAGE)?;
    let mut rows = Vec::new();
    for round in 0..rounds {
        // Nothing of the start is counted.
        sleep(watched / 5);
        let before = [backend_switches()?, measure::switches("vt-pump")?];
        sleep(watched);
        let after = [backend_switches()?, measure::switches("vt-pump")?];
        for (side, what) in [(0, "server"), (1, "agent")] {
            let per_second = measure::real(after[side] - before[side]) / watched.as_secs_f64();
            let metric = format!("wake-ups, {what} of {lanes} lanes");
            rows.push(Row::new("idle", metric, round, "1/s", [per_second, 0.0]).beside("none"));
        }
    }
    pump.finish()?;
    Ok(rows)
}

fn backend_switches() -> Result<u64> {
    Ok(measure::switches("vt-drain/idle")? + measure::switches("vt-dev/idle")?)
}

/// Instances enough for the lanes, each with tracing on and nothing to trace.
fn sources(lanes: u32) -> Result<Vec<Source>> {
    let cpus = online_cpus().context("sysfs names no CPUs")?;
    let count = lanes.div_ceil(u32::try_from(cpus.len())?);
    let source = |index| {
        let source = Source::new(&format!("idle{index}"), cpus.clone(), 0)?;
        source.write("tracing_on", "1")?;
        Ok(source)
    };
    (0..count).map(source).collect()
}

/// A tap for each lane, and a pipe as its port.
fn taps(sources: &[Source], lanes: u32) -> Result<(Vec<Tap>, Vec<OwnedFd>, Vec<OwnedFd>)> {
    let mut taps = Vec::new();
    for source in sources {
        taps.extend(source.taps()?);
    }
    taps.truncate(usize::try_from(lanes)?);
    let (outlets, ports) =
        taps.iter().map(|_| nix::unistd::pipe()).collect::<nix::Result<Vec<_>>>()?.into_iter().unzip();
    Ok((taps, outlets, ports))
}
