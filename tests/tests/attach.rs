//! A server that comes after the guest, goes before it, dies and comes back: the device is plugged into the running guest
//! and out of it, and every recording in between is whole.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use vtrace_tests::{
    guest::is_clear,
    judge::{lines, trace_cmd},
    recording::Recorder,
    server::Server,
};
use xtask::{
    kernel::Kernel,
    machine::{Builder, Machine, Turn, turn},
    qemu::Release,
};

const GUEST: &str = "guest1";
/// Tasks that start and end, sleep and wake, on every CPU of the guest.
const LOAD: &str = "for i in 1 2; do (while :; do sleep 0.01; done) </dev/null >/dev/null 2>&1 & done";

/// A machine without a device of ours, with a QMP socket for vtrace.
struct AttachBench {
    turn: Turn,
    folder: TempDir,
}

impl AttachBench {
    fn new() -> Result<Self> {
        Ok(Self { turn: turn()?, folder: tempfile::tempdir()? })
    }

    fn qmp(&self) -> PathBuf {
        self.folder.path().join("qmp.sock")
    }

    fn machine(&self) -> Builder {
        let qmp = format!("unix:{},server=on,wait=off", self.qmp().display());
        Machine::builder(&self.turn, Kernel::V6_12).arguments(&["-qmp", &qmp])
    }

    /// A guest with slots for devices, and a server that waits for it.
    fn busy_guest_without_a_device(&self) -> Result<(Machine, Server)> {
        let machine = self.machine().hot_plug().boot()?;
        machine.shell(LOAD)?.ok()?;
        Ok((machine, Server::start(&[GUEST])?))
    }

    /// `vtrace VERB guest1 --qmp SOCKET --dir DIR WORDS`
    fn vtrace(&self, verb: &str, server: &Path, words: &[&str]) -> Result<Output> {
        let mut command = Command::new(xtask::build::vtrace()?);
        command.args([verb, GUEST, "--qmp"]).arg(self.qmp()).arg("--dir").arg(server).args(words);
        Ok(command.output()?)
    }

    fn works(&self, verb: &str, server: &Path, words: &[&str]) -> Result<String> {
        let output = self.vtrace(verb, server, words)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{verb}: {said}");
        Ok(String::from_utf8(output.stdout)? + &said)
    }

    /// What `vtrace doctor` finds in the guest's QEMU: verdicts and texts.
    fn doctor(&self, server: &Path) -> Result<Vec<(String, String)>> {
        let mut command = Command::new(xtask::build::vtrace()?);
        command.args(["doctor", "--json", "-o", "/tmp", "--dom", GUEST, "--qmp"]).arg(self.qmp());
        let output = command.arg("--dir").arg(server).output()?;
        let findings: Vec<Value> = serde_json::from_slice(&output.stdout)?;
        let text = |finding: &Value, what: &str| finding[what].as_str().unwrap_or_default().to_owned();
        let of_guest = findings.iter().filter(|finding| finding["check"] == GUEST);
        let said = |finding| (text(finding, "verdict"), text(finding, "found") + " → " + &text(finding, "remedy"));
        Ok(of_guest.map(said).skip_while(|(_, said)| !said.contains("QEMU 1") && !said.contains("QMP")).collect())
    }

    /// It finds these, in this order, and nothing else.
    fn finds(&self, server: &Path, expected: &[(&str, &str)]) -> Result<()> {
        let found = self.doctor(server)?;
        let fits = |((verdict, said), (expected, words)): (&(String, String), &(&str, &str))| {
            verdict == expected && said.contains(words)
        };
        ensure!(found.len() == expected.len() && found.iter().zip(expected).all(fits), "{found:#?}, not {expected:#?}");
        Ok(())
    }

    /// It fails, and says why and what to do.
    fn complains(&self, verb: &str, server: &Path, why: &str, remedy: &str) -> Result<()> {
        let output = self.vtrace(verb, server, &[])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1), "{verb}: {:?} {said}", output.status);
        ensure!(said.contains(why) && said.contains(remedy), "{why:?} and {remedy:?} are not in: {said}");
        Ok(())
    }
}

/// A whole recording, nothing lost, read by stock trace-cmd: as many events as the kernels counted.
fn record(server: &Server, folder: &Path) -> Result<()> {
    let recorder = Recorder { server: server.dir(), folder };
    let recording = recorder.run(&format!("-e irq --dom {GUEST} -e sched -- sleep 1"))?.ok()?;
    assert_eq!(recording.sum(GUEST, "pages_lost")? + recording.sum(GUEST, "events_lost")?, 0);
    let report = lines(&trace_cmd(&["report", "--ts-check"], &[&recording.file(GUEST)])?);
    assert_eq!(u64::try_from(report.len())?, recording.sum(GUEST, "events")?);
    ensure!(report.len() > 10, "{} events", report.len());
    Ok(())
}

/// `vtrace VERB WORDS` with the server's run directory, in `folder`.
fn run(verb: &str, words: &str, server: &Path, folder: &Path) -> Result<Output> {
    let mut command = Command::new(xtask::build::vtrace()?);
    command.arg(verb).arg("--dir").arg(server).args(words.split_whitespace());
    Ok(command.current_dir(folder).stdin(Stdio::null()).output()?)
}

/// Records in the background until some of the guest's pages are in its file. Gives the recording's process.
fn start(server: &Path, folder: &Path) -> Result<String> {
    let started = run("start", &format!("--dom {GUEST} -e sched -e irq -e timer"), server, folder)?;
    ensure!(started.status.success(), "{}", String::from_utf8_lossy(&started.stderr));
    let begun = Instant::now();
    loop {
        let status = run("status", "--json", server, folder)?.stdout;
        let status: Value = serde_json::from_slice(&status)?;
        let state = &status[0]["state"];
        ensure!(state["guests"] == json!([GUEST]) && begun.elapsed() < Duration::from_secs(60), "no pages: {status}");
        if state["progress"]["machines"][1]["pages_out"].as_u64().is_some_and(|pages| pages > 4) {
            return Ok(state["pid"].to_string());
        }
        sleep(Duration::from_millis(100));
    }
}

/// The recording has ended because its guest was gone: its table says so, and what came can be read.
fn ended_with_what_came(why: &str, server: &Path, folder: &Path) -> Result<()> {
    let stopped = run("stop", "", server, folder)?;
    let said = String::from_utf8_lossy(&stopped.stderr).into_owned();
    ensure!(stopped.status.code() == Some(1) && said.contains(why), "{:?} {said}", stopped.status);
    let report = lines(&trace_cmd(&["report"], &[&folder.join(format!("trace-{GUEST}.dat"))])?);
    ensure!(report.len() > 10, "{} events: {said}", report.len());
    Ok(())
}

/// The status of `vtrace WORDS DIR` and all it says.
fn ask(words: &[&str], dir: &Path) -> Result<(Option<i32>, String)> {
    let output = Command::new(xtask::build::vtrace()?).args(words).arg(dir).output()?;
    Ok((output.status.code(), String::from_utf8([output.stdout, output.stderr].concat())?))
}

/// What `list` and `doctor` say of an attached guest.
fn guest_is_listed_and_found_healthy(dir: &Path) -> Result<()> {
    let (status, said) = ask(&["list", "--dom", GUEST, "--dir"], dir)?;
    ensure!(status == Some(0) && said.contains("agent ready, 2 CPUs"), "{said}");
    let line =
        |head: &str| said.lines().find(|line| line.trim_start().starts_with(head)).unwrap_or_default().to_owned();
    ensure!(line("clocks").contains("x86-tsc") && line("tracers").contains("function_graph"), "{said}");
    ensure!(line("events").contains("sched "), "{said}");
    let (_, events) = ask(&["list", "--dom", GUEST, "-e", "sched_sw", "--dir"], dir)?;
    ensure!(events.lines().any(|event| event == "sched:sched_switch"), "{events}");

    let (_, said) = ask(&["doctor", "--json", "--dom", GUEST, "-o", "/tmp", "--dir"], dir)?;
    let findings: Value = serde_json::from_str(&said)?;
    let of_guest = findings.as_array().context("findings")?.iter().filter(|finding| finding["check"] == GUEST);
    let of_guest: Vec<_> = of_guest.map(|finding| finding["verdict"].as_str().unwrap_or_default()).collect();
    ensure!(of_guest == ["ok", "ok", "ok"], "socket, driver, agent: {said}");
    Ok(())
}

/// Each of its CPUs runs what it is given: none spins.
fn guest_works(machine: &Machine) -> Result<()> {
    assert_eq!(machine.shell("for mask in 1 2; do taskset $mask echo alive; done")?.text(), "alive\nalive");
    ensure!(!machine.console().contains("soft lockup"), "{}", machine.console());
    Ok(())
}

#[test]
fn running_guest_is_attached_recorded_detached_and_outlives_its_servers() -> Result<()> {
    let (bench, folder) = (AttachBench::new()?, tempfile::tempdir()?);
    let (machine, mut server) = bench.busy_guest_without_a_device()?;
    let dir = server.dir().to_path_buf();

    // The server comes after the guest.
    let emulated = ("warn", "running, emulated (TCG)");
    let shared = ("ok", "its memory is shared");
    bench.finds(&dir, &[emulated, ("warn", "1 slot free for hot-plug → vtrace attach guest1 --qmp"), shared])?;
    let said = bench.works("attach", &dir, &[])?;
    ensure!(said.contains("guest1: attached to QEMU 1") && said.contains("2 CPUs, vtrace0 at rp0"), "{said}");
    ensure!(said.contains("driver running, agent ready"), "{said}");
    bench.complains("attach", &dir, "is connected to", "vtrace detach guest1 first")?;
    record(&server, folder.path())?;
    guest_is_listed_and_found_healthy(&dir)?;
    let ports = ("ok", "1 device of vhost-user-test-device-pci: ports for 2 CPUs, 2 CPUs");
    bench.finds(&dir, &[emulated, ports, shared, ("ok", "its device is connected")])?;

    // Upgraded: detached, started anew, attached.
    bench.works("detach", &dir, &[])?;
    bench.complains("detach", &dir, "no device that connects to", "vtrace list")?;
    guest_works(&machine)?;
    server.restart()?;
    bench.works("attach", &dir, &[])?;
    record(&server, folder.path())?;

    // Killed at rest; its device is replaced for the next server.
    server.kill()?;
    bench.complains("attach", &dir, "no server at", "vtrace server")?;
    guest_works(&machine)?;
    server.restart()?;
    let replaces = "its device has lost its server → vtrace attach guest1 --qmp";
    bench.finds(&dir, &[emulated, ports, shared, ("fail", replaces)])?;
    ensure!(bench.works("attach", &dir, &[])?.contains("replaced the device of a server that had ended"), "it says so");
    record(&server, folder.path())?;

    // Detached in the middle of a recording: only by force, and what came is kept.
    let pid = start(&dir, folder.path())?;
    let (status, said) = ask(&["list", "--dom", GUEST, "--dir"], &dir)?;
    ensure!(status == Some(1) && said.contains(&format!("process {pid} of user 0 is recording it")), "{said}");
    bench.complains("detach", &dir, &format!("process {pid} of user 0 is recording it"), "--force")?;
    bench.works("detach", &dir, &["--force"])?;
    ended_with_what_came("went away", &dir, folder.path())?;
    bench.works("attach", &dir, &[])?;
    record(&server, folder.path())?;
    guest_works(&machine)?;
    is_clear(&machine)
}

#[test]
fn server_killed_in_the_middle_of_a_recording_is_replaced_under_the_running_guest() -> Result<()> {
    let (bench, folder) = (AttachBench::new()?, tempfile::tempdir()?);
    let (machine, mut server) = bench.busy_guest_without_a_device()?;
    let dir = server.dir().to_path_buf();
    machine.qmp("stop", &json!(null))?;
    ensure!(bench.works("attach", &dir, &[])?.contains("the guest is paused"), "it says why no driver runs");
    bench.complains("detach", &dir, "is paused", "cont")?;
    machine.qmp("cont", &json!(null))?;
    server.await_agent(GUEST)?;

    start(&dir, folder.path())?;
    server.kill()?;
    bench.works("detach", &dir, &[])?;
    ended_with_what_came("the server went away", &dir, folder.path())?;
    guest_works(&machine)?;
    server.restart()?;
    bench.works("attach", &dir, &[])?;
    server.await_agent(GUEST)?;
    record(&server, folder.path())?;
    guest_works(&machine)?;

    // The agent gives its host up, and closes nothing to one that does not hear it.
    start(&dir, folder.path())?;
    server.kill()?;
    ended_with_what_came("the server went away", &dir, folder.path())?;
    is_clear(&machine)?;
    guest_works(&machine)?;
    bench.works("detach", &dir, &[])?;
    server.restart()?;
    bench.works("attach", &dir, &[])?;
    server.await_agent(GUEST)?;
    record(&server, folder.path())?;
    guest_works(&machine)?;
    is_clear(&machine)
}

#[test]
fn qemu_that_cannot_take_the_device_is_told_what_is_missing() -> Result<()> {
    let bench = AttachBench::new()?;
    let server = Server::start(&[GUEST])?;
    let dir = server.dir();
    bench.complains("attach", dir, "no QMP at", "-qmp unix:")?;
    {
        let _machine = bench.machine().start()?;
        bench.complains("attach", dir, "free PCI hot-plug slots are needed, the guest has 0", "pcie-root-port")?;
        bench.finds(dir, &[("warn", "QEMU 1"), ("fail", "the guest has 0"), ("ok", "its memory is shared")])?;
        let held = std::os::unix::net::UnixStream::connect(bench.qmp())?;
        bench.complains("attach", dir, "QMP does not answer the connection", "another -qmp socket")?;
        drop(held);
    }
    {
        let _machine = bench.machine().private_memory().hot_plug().start()?;
        bench.complains("attach", dir, "memory (memory) is not shared", "share=on")?;
        bench
            .finds(dir, &[("warn", "QEMU 1"), ("warn", "vtrace attach"), ("fail", "memory (memory) is not shared")])?;
    }
    let _machine = bench.machine().qemu(Release::Middle).hot_plug().start()?;
    bench.complains("attach", dir, "QEMU 10.0", "QEMU 10.2 or newer")?;
    bench.finds(dir, &[("warn", "QEMU 10.0"), ("fail", "--transport socket")])
}
