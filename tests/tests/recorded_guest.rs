//! What goes on in a guest while it is recorded: applications write markers, triggers stop tracing or hold the instance, the
//! kernel forbids io_uring.

use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use vtrace_tests::{
    guest::is_clear,
    judge::{lines, trace_cmd},
    recording::{Recorder, Recording},
    server::Server,
};
use xtask::{
    kernel::Kernel,
    machine::{Machine, turn},
};

const GUEST: &str = "guest1";
/// Writes markers and starts programs until it is killed.
const APPLICATION: &str = "(cd /sys/kernel/tracing; i=0; while :; do i=$((i+1)); echo mark-$i >trace_marker; \
                           printf '\\1\\0\\0\\0raw' >trace_marker_raw; /bin/sleep 0.2; done) >/dev/null 2>&1 & echo $! >/tmp/application";

fn record(recorder: &Recorder, words: &[&str]) -> Result<Recording> {
    let mut command = recorder.command("--json")?;
    let words = [&["--dom", GUEST][..], words].concat();
    recorder.finish(command.args(words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
}

fn recorded_while_applications_run(kernel: Kernel) -> Result<()> {
    let (turn, folder) = (turn()?, tempfile::tempdir()?);
    let server = Server::start(&[GUEST])?;
    let recorder = Recorder { server: server.dir(), folder: folder.path() };
    let machine = Machine::builder(&turn, kernel).vhost_user(&server.socket(GUEST)).boot()?;
    server.await_agent(GUEST)?;
    machine.shell("echo 2 >/proc/sys/kernel/io_uring_disabled; kill $(pidof vtrace); sleep 0.5; start-agent")?.ok()?;
    server.await_agent(GUEST)?;
    machine.shell(APPLICATION)?.ok()?;

    markers_are_in_the_file_in_order(&recorder, &machine, kernel)?;
    tracing_that_a_trigger_stops_keeps_what_was_recorded(&recorder)?;
    is_clear(&machine)?;
    instance_of_a_hist_variable_is_removed(&recorder)?;
    is_clear(&machine)
}

fn markers_are_in_the_file_in_order(recorder: &Recorder, machine: &Machine, kernel: Kernel) -> Result<()> {
    if kernel != Kernel::Newest {
        let recording = record(recorder, &["-e", "sched:sched_switch", "--", "sleep", "2"])?.ok()?;
        let remarks = recording.remarks(GUEST)?;
        let is_said =
            remarks.contains(" markers of applications are not recorded") && remarks.contains("-O copy_trace_marker");
        ensure!(is_said, "{remarks}");
    }
    let words = format!("--dom {GUEST} -e sched:sched_switch -O copy_trace_marker -- sleep 3");
    let mut child = recorder.start(&words)?;
    let rings = "sleep 1.5; ls -l /proc/$(pidof vtrace)/fd | grep -c io_uring";
    let rings = machine.shell(rings)?.text();
    // The sysctl exists since 6.6.
    ensure!(rings.trim() == "0" || kernel == Kernel::V6_1, "the agent has {rings} io_uring");
    ensure!(child.try_wait()?.is_none(), "it was recording");
    let recording = recorder.finish(child)?.ok()?.whole(GUEST)?;
    let report = trace_cmd(&["report"], &[&recording.file(GUEST)])?;
    let marks: Vec<u32> =
        report.lines().filter_map(|line| line.split_once("mark-")?.1.split_whitespace().next()?.parse().ok()).collect();
    ensure!(marks.len() > 3 && marks.is_sorted(), "markers {marks:?}\n{}", recording.said);
    ensure!(report.contains("raw_data") || report.contains("# 1 buf") || report.contains("id=0x1"), "no raw marker");
    Ok(())
}

fn tracing_that_a_trigger_stops_keeps_what_was_recorded(recorder: &Recorder) -> Result<()> {
    let words = ["-e", "sched:sched_switch", "-e", "sched:sched_process_exec", "-R", "traceoff", "--", "sleep", "4"];
    let recording = record(recorder, &words)?.ok()?;
    let events = lines(&trace_cmd(&["report"], &[&recording.file(GUEST)])?).len();
    ensure!(events > 2, "{events} events: {}", recording.said);
    let changes = &recording.machine(GUEST)?["changes"];
    ensure!(changes[0]["setting"] == "tracing_on" && changes[0]["found"] == "0", "{changes}");
    Ok(())
}

fn instance_of_a_hist_variable_is_removed(recorder: &Recorder) -> Result<()> {
    let trigger = "hist:keys=pid:ts0=common_timestamp:clock=x86-tsc";
    record(recorder, &["-e", "sched:sched_waking", "-R", trigger, "--", "sleep", "1"])?.ok()?;
    let trigger = "hist:keys=pid:ts0=common_timestamp.usecs";
    let refused = record(recorder, &["-e", "sched:sched_waking", "-R", trigger, "--", "sleep", "1"])?;
    ensure!(
        refused.status == 1 && refused.said.contains("switch the buffer's clock from x86-tsc to global"),
        "{}",
        refused.said
    );
    refused.said.lines().next().context("it says why")?;
    Ok(())
}

#[test]
fn guest_of_6_1_is_recorded_whole_while_applications_run() -> Result<()> {
    recorded_while_applications_run(Kernel::V6_1)
}

#[test]
fn guest_of_6_12_is_recorded_whole_while_applications_run() -> Result<()> {
    recorded_while_applications_run(Kernel::V6_12)
}

#[test]
fn guest_of_the_newest_kernel_is_recorded_whole_while_applications_run() -> Result<()> {
    recorded_while_applications_run(Kernel::Newest)
}
