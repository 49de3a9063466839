//! Measured clocks over minutes and under changing load: `vtrace check` must not refute a printed bound.
//!
//! Takes too long for every run. By hand: `VTRACE_SOAK_RECORDINGS=20 VTRACE_SOAK_SECONDS=120 cargo test -p vtrace-tests
//! --test clock_soak -- --ignored --nocapture`. Each recording prints one line, so that a failure keeps the others.

use std::{env, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vtrace_tests::{recording::Recorder, server::Server};
use xtask::{
    kernel::Kernel,
    machine::{Machine, turn},
};

const GUEST: &str = "guest1";
/// Busy for a while, then asleep for a while, out of step with each other.
const LOADS: [&str; 2] = [
    "(while :; do i=0; while [ $i -lt 40000 ]; do i=$((i+1)); done; sleep 0.7; done) </dev/null >/dev/null 2>&1 &",
    "(while :; do n=0; while [ $n -lt 300 ]; do sleep 0.01; n=$((n+1)); done; i=0; while [ $i -lt 90000 ]; do i=$((i+1)); done; done) </dev/null >/dev/null 2>&1 &",
];

#[test]
#[ignore = "minutes for each recording; run by hand"]
fn measured_bound_holds_over_minutes_of_changing_load() -> Result<()> {
    let recordings = number("VTRACE_SOAK_RECORDINGS", 1)?;
    let seconds = number("VTRACE_SOAK_SECONDS", 120)?;
    let turn = turn()?;
    let server = Server::start(&[GUEST])?;
    let machine = Machine::builder(&turn, Kernel::V6_12).cpus(2).vhost_user(&server.socket(GUEST)).boot()?;
    server.await_agent(GUEST)?;
    for load in LOADS {
        machine.shell(load)?.ok()?;
    }
    let mut bounds_ns = Vec::new();
    for number in 1..=recordings {
        let report = record_and_check(&server, seconds)?;
        let counter = |name: &str| report[name].as_u64().with_context(|| format!("{name}: {report:#}"));
        let bound_ns = counter("bound_ns")?;
        println!(
            "recording {number}: {seconds} s, bound {bound_ns} ns, {} events, {} outside, worst {} ns, {}",
            counter("events")?,
            counter("outside")?,
            counter("worst")?,
            report["verdict"]
        );
        ensure!(counter("outside")? == 0, "the bound does not hold: {report:#}");
        bounds_ns.push(bound_ns);
    }
    bounds_ns.sort_unstable();
    println!("median bound {} ns, largest {:?} ns", bounds_ns[bounds_ns.len() / 2], bounds_ns.last());
    Ok(())
}

/// A natural number from the environment.
fn number(variable: &str, default: u64) -> Result<u64> {
    match env::var(variable) {
        Ok(text) => text.parse().with_context(|| format!("{variable} is not a number: {text}")),
        Err(_) => Ok(default),
    }
}

fn record_and_check(server: &Server, seconds: u64) -> Result<Value> {
    let folder = tempfile::tempdir()?;
    let recorder = Recorder { server: server.dir(), folder: folder.path() };
    let recording = recorder.run(&format!("-e sched --dom {GUEST} -e sched -- sleep {seconds}"))?.ok()?;
    let files = [recording.file("host"), recording.file(GUEST)];
    let output = Command::new(xtask::build::vtrace()?).args(["check", "--json"]).args(files).output()?;
    let report: Value =
        serde_json::from_slice(&output.stdout).with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    Ok(report["guests"][0].clone())
}
