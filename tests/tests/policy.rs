//! What `agent.toml` of a guest's owner bounds: what a host may write to tracefs, the memory it may take, whom its commands
//! run as, and how long they live.

use std::{
    process::Stdio,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
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
const POLICY: &str = r#"exec = ["sh"]
user = "nobody"
buffer_mib_max = 16
events_denied = ["irq:*", "sched:sched_switch"]
"#;

fn record(recorder: &Recorder, words: &[&str]) -> Result<Recording> {
    let mut command = recorder.command("--json")?;
    let words = [&["--dom", GUEST][..], words].concat();
    recorder.finish(command.args(words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
}

fn refuses(recorder: &Recorder, words: &[&str], why: &str) -> Result<()> {
    let recording = record(recorder, words)?;
    ensure!(recording.status == 1 && recording.said.contains(why), "{words:?}: {}", recording.said);
    Ok(())
}

#[test]
fn what_a_host_asks_of_a_guest_keeps_to_its_owners_policy() -> Result<()> {
    let (turn, folder) = (turn()?, tempfile::tempdir()?);
    let server = Server::start(&[GUEST])?;
    let recorder = Recorder { server: server.dir(), folder: folder.path() };
    let machine = Machine::builder(&turn, Kernel::V6_12).vhost_user(&server.socket(GUEST)).boot()?;
    server.await_agent(GUEST)?;
    machine.put(POLICY.as_bytes(), "/tmp/agent.toml")?;
    machine.shell("echo nobody:x:65534:65534:nobody:/:/bin/sh >>/etc/passwd; kill $(pidof vtrace); sleep 0.5")?.ok()?;

    let missing = machine.shell("vtrace agent --policy /tmp/missing.toml 2>&1")?;
    ensure!(missing.status == 1 && missing.text().contains("/tmp/missing.toml"), "{}", missing.text());
    machine.shell("start-agent --policy /tmp/agent.toml")?.ok()?;
    server.await_agent(GUEST)?;

    let rule = "a function command may not switch events while some are denied";
    let command = "schedule:enable_event:sched:sched_switch";
    refuses(&recorder, &["-e", "sched:sched_waking", "-l", command, "--", "true"], rule)?;
    let rule = "function commands allowed are";
    refuses(&recorder, &["-e", "sched:sched_waking", "-l", "schedule:dump", "--", "true"], rule)?;
    let rule = "KiB for hist triggers: 16384 KiB are allowed";
    let table = "hist:keys=common_pid:size=131072";
    refuses(&recorder, &["-e", "sched:sched_waking", "-R", table, "--", "true"], rule)?;
    let score = machine.shell("cat /proc/$(pidof vtrace)/oom_score_adj")?.text();
    ensure!(score.trim() == "-900", "the agent's own score is {score}");

    command_of_another_user_is_traced(&recorder)?;
    process_in_a_session_of_its_own_ends_with_the_recording(&recorder, &machine)?;
    is_clear(&machine)
}

fn command_of_another_user_is_traced(recorder: &Recorder) -> Result<()> {
    let script =
        "cat /proc/self/status /proc/self/oom_score_adj; i=0; while [ $i -lt 20 ]; do sleep 0.01; i=$((i+1)); done";
    let words =
        ["-e", "sched:sched_waking", "-e", "timer", "-F", "--exec", "sh", "-c", script, ";", "--", "sleep", "2"];
    let recording = record(recorder, &words)?.ok()?;
    ensure!(recording.said.contains("Uid:\t65534") || recording.said.contains("Uid:?65534"), "{}", recording.said);
    let events = lines(&trace_cmd(&["report"], &[&recording.file(GUEST)])?).len();
    ensure!(events > 20, "{events} events of a command that sleeps 20 times: {}", recording.said);
    Ok(())
}

fn process_in_a_session_of_its_own_ends_with_the_recording(recorder: &Recorder, machine: &Machine) -> Result<()> {
    for setup in ["true", "mkdir -p /tmp/cgroup; mount -t cgroup2 none /tmp/cgroup"] {
        machine.shell(setup)?.ok()?;
        let script = "setsid sleep 4321 & setsid sh -c 'setsid sleep 4321' & sleep 0.5; pidof sleep";
        let words = ["-e", "sched:sched_waking", "--exec", "sh", "-c", script, ";", "--", "sleep", "2"];
        let recording = record(recorder, &words)?.ok()?;
        ensure!(recording.said.split_whitespace().filter(|word| word.parse::<u32>().is_ok()).count() >= 2, "two ran");
        let begun = Instant::now();
        let left = || Ok::<_, anyhow::Error>(machine.shell("pidof sleep")?.text());
        while !left()?.is_empty() {
            ensure!(begun.elapsed() < Duration::from_secs(20), "alive after the session: {}", left()?);
            sleep(Duration::from_millis(100));
        }
    }
    Ok(())
}
