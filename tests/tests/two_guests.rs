//! The command of the handbook, to the letter: a host's events, everything of one guest, functions of another, a command
//! in each and one on the host.

use std::{
    fs::{self, File},
    process::Stdio,
};

use anyhow::{Context, Result};
use vtrace_tests::{
    judge::{self, Line, lines, trace_cmd},
    recording::{Recorder, Recording},
    server::Server,
};
use xtask::{
    kernel::Kernel,
    machine::{Machine, turn},
};

/// What stands for KVM's events on a host without hardware for them: the threads of its virtual machines.
const HOST_EVENTS: &str = "sched";

/// What the guests' commands write, as the host shows it.
const GUESTS_SAY: [&str; 2] = ["guest1: saw foo", "guest2: bad"];

#[test]
fn host_and_two_guests_of_different_kernels_are_one_recording() -> Result<()> {
    let turn = turn()?;
    let folder = tempfile::tempdir()?;
    let server = Server::start(&["guest1", "guest2"])?;
    let boot = |kernel, guest: &str, app: &str| -> Result<Machine> {
        let machine = Machine::builder(&turn, kernel).without_agent().vhost_user(&server.socket(guest)).boot()?;
        let lines = app.replace('\n', "\\n");
        machine
            .shell(&format!("printf '#!/bin/sh\\n{lines}\\n' > /bin/{guest}-app; chmod +x /bin/{guest}-app"))?
            .ok()?;
        machine.shell("start-agent --allow-exec")?.ok()?;
        server.await_agent(guest)?;
        Ok(machine)
    };
    let _first = boot(Kernel::V6_1, "guest1", "echo saw $1\nexit 5")?;
    let _second = boot(Kernel::V6_12, "guest2", "cat /proc/version >/dev/null\necho bad >&2")?;
    let recorder = Recorder { server: server.dir(), folder: folder.path() };
    let mut command = recorder.command(&format!(
        "--json -e {HOST_EVENTS} --dom guest1 -e all --exec guest1-app foo ; \
         --dom guest2 -p function -l vfs_* --exec guest2-app ; sh -c"
    ))?;
    // The recording ends with the host's command, which therefore outlives what both guests run.
    let said = folder.path().join("said");
    let [first, second] = GUESTS_SAY;
    command.arg(format!(
        "for try in $(seq 600); do grep -qx '{first}' {0} && grep -qx '{second}' {0} && break; sleep 0.1; done
         sleep 1; exit 9",
        said.display()
    ));
    let child = command.stdout(Stdio::piped()).stderr(File::create(&said)?).spawn()?;
    let mut recording = recorder.finish(child)?;
    recording.said = fs::read_to_string(said)?;
    assert_eq!(recording.status, 9, "the host's command decides: {}\n{:#}", recording.said, recording.summary);

    commands_are_told(&recording)?;
    all_started_together(&recording)?;
    stock_tools_see_one_timeline(&recording)?;
    functions_have_the_names_of_their_own_kernel(&recording)
}

fn commands_are_told(recording: &Recording) -> Result<()> {
    for line in GUESTS_SAY {
        assert!(recording.said.lines().any(|said| said == line), "{line}: {}", recording.said);
    }
    let end = |guest: &str| -> Result<i64> {
        recording.machine(guest)?["commands"][0]["status"].as_i64().context("a command has ended")
    };
    assert_eq!((end("guest1")?, end("guest2")?), (5, 0));
    Ok(())
}

/// The skew is measured, and the common marker of each guest lies between two of the host.
fn all_started_together(recording: &Recording) -> Result<()> {
    let files = ["host", "guest1", "guest2"].map(|machine| recording.file(machine));
    let report = lines(&trace_cmd(&["report", "-t"], &[&files[0], &files[1], &files[2]])?);
    let marker = |machine: &str, words: &str| {
        let file = recording.file(machine).file_name().map(|name| name.to_string_lossy().into_owned());
        let session = recording.summary["session"].as_str().unwrap_or("no session");
        let wanted = format!("vtrace: {words} {session}");
        let mut found = report.iter().filter(|line| line.file == file && line.fields.ends_with(&wanted));
        found.next().map(|line| line.time).with_context(|| format!("{machine} has no {wanted:?}"))
    };
    let (before, after) = (marker("host", "common before guests")?, marker("host", "common after guests")?);
    for guest in ["guest1", "guest2"] {
        let common = marker(guest, "common")?;
        assert!((before..=after).contains(&common), "{guest}: {before} {common} {after}");
        let skew = recording.machine(guest)?["start_skew_ns"].as_i64().context("the skew is measured")?;
        let started = i64::try_from(marker(guest, "start")?)? - i64::try_from(marker("host", "start")?)?;
        assert!((skew - started).abs() < 100_000_000, "{guest}: {skew} ns, the markers say {started}");
    }
    Ok(())
}

fn stock_tools_see_one_timeline(recording: &Recording) -> Result<()> {
    let files = ["host", "guest1", "guest2"].map(|machine| recording.file(machine));
    let [host, first, second] = &files;
    let report = lines(&trace_cmd(&["report", "-t"], &[host, first, second])?);
    for machine in ["host", "guest1", "guest2"] {
        let name = recording.file(machine).file_name().context("a file has a name")?.to_string_lossy().into_owned();
        let count = report.iter().filter(|line| line.file.as_deref().is_some_and(|file| file.ends_with(&name))).count();
        assert_eq!(u64::try_from(count)?, recording.sum(machine, "events")?, "{machine}");
        assert_eq!(recording.sum(machine, "pages_lost")?, 0, "{machine}");
    }
    let found = judge::shark(&[host, first, second])?;
    assert_eq!(found.maps.len(), 2, "both guests are tied to the host");
    Ok(())
}

fn functions_have_the_names_of_their_own_kernel(recording: &Recording) -> Result<()> {
    let report = lines(&trace_cmd(&["report", "-t"], &[&recording.file("guest2")])?);
    let functions: Vec<&Line> = report.iter().filter(|line| line.event == "function").collect();
    assert!(functions.len() > 10, "{} functions", functions.len());
    for line in &functions {
        assert!(line.fields.trim_start().starts_with("vfs_"), "{}", line.fields);
    }
    assert!(functions.iter().any(|line| line.fields.contains("vfs_read")));
    assert!(fs::metadata(recording.file("guest2"))?.len() > 0);
    Ok(())
}
