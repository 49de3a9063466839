//! What a session has left in a guest.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use xtask::machine::Machine;

/// Function tracing takes back every function's hook first.
const CLEARING: Duration = Duration::from_secs(20);

/// No instance is left. An agent clears up when its session is over; only the next session waits for that.
pub fn is_clear(machine: &Machine) -> Result<()> {
    let left = || Ok::<_, anyhow::Error>(machine.shell("ls /sys/kernel/tracing/instances")?.text());
    let begun = Instant::now();
    while !left()?.is_empty() && begun.elapsed() < CLEARING {
        sleep(Duration::from_millis(100));
    }
    let left = left()?;
    ensure!(left.is_empty(), "instances stay in the guest: {left}\n{}", machine.console());
    Ok(())
}
