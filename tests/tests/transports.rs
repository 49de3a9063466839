//! Each QEMU release with each transport, set up and started with what `vtrace setup` prints, and recorded by the same
//! agent and commands, while one part after the other is killed.

use std::{
    fs,
    path::Path,
    process::{Child, Command},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use vtrace_tests::{
    guest::is_clear,
    judge::{lines, trace_cmd},
    recording::Recorder,
    server::Server,
    transport,
};
use xtask::{
    kernel::Kernel,
    machine::{Machine, Turn, turn},
    qemu::{Qemu, Release},
};

const GUEST: &str = "guest1";
const LOAD: &str = "(while :; do sleep 0.01; done) </dev/null >/dev/null 2>&1 &";
const CPUS: u32 = 2;

/// A QEMU release, a guest kernel, and how the ports reach the host.
#[derive(Clone, Copy)]
struct Case {
    release: Release,
    kernel: Kernel,
    transport: &'static str,
}

/// What the test of one case holds.
struct Trial<'a> {
    case: Case,
    turn: &'a Turn,
    /// Of guests' folders.
    root: tempfile::TempDir,
    /// Of recordings.
    folder: tempfile::TempDir,
    words: Vec<String>,
}

impl<'a> Trial<'a> {
    fn new(case: Case, turn: &'a Turn) -> Result<Self> {
        let (root, folder) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let (major, minor) = Qemu::unpack(case.release)?.version()?;
        let words = format!("--cpus {CPUS} --qemu-version {major}.{minor} --transport {}", case.transport);
        let words = transport::set_up(root.path(), GUEST, &words)?;
        Ok(Self { case, turn, root, folder, words })
    }

    fn serve(&self) -> Result<Server> {
        Server::start_with(&["--root", self.root.path().to_str().context("a path of text")?, "--dom", GUEST])
    }

    fn boot(&self) -> Result<Machine> {
        let words: Vec<&str> = self.words.iter().map(String::as_str).collect();
        let builder = Machine::builder(self.turn, self.case.kernel).qemu(self.case.release).cpus(CPUS);
        builder.arguments(&words).boot()
    }

    fn recorder<'b>(&'b self, server: &'b Server) -> Recorder<'b> {
        Recorder { server: server.dir(), folder: self.folder.path() }
    }

    /// A whole session, nothing lost: the guest is as good as new. Stock trace-cmd finds every event of the ledger.
    fn session_works(&self, server: &Server) -> Result<()> {
        server.await_agent(GUEST)?;
        let recorder = self.recorder(server);
        let recording = recorder.run(&format!("-e irq --dom {GUEST} -e sched -- sleep 1"))?.ok()?;
        for name in ["pages_lost", "events_lost"] {
            assert_eq!(recording.sum(GUEST, name)?, 0, "{name}: {:#}", recording.summary);
        }
        assert_eq!(recording.sum(GUEST, "pages_in")?, recording.sum(GUEST, "pages_out")?);
        let shown = u64::try_from(recording.events_shown(GUEST)?)?;
        assert_eq!(shown, recording.sum(GUEST, "events")?, "as stock trace-cmd counts them");
        Ok(())
    }

    /// Only the newest pages of each lane are kept; stock trace-cmd finds their events, in order.
    fn newest_pages_are_kept(&self, machine: &Machine, server: &Server) -> Result<()> {
        let words = format!("-m 512 --dom {GUEST} -b 8192 -e sched -e raw_syscalls -- sleep 1000");
        let child = self.recorder(server).start(&words)?;
        let load = "(while :; do dd if=/dev/zero of=/dev/null bs=1 count=2000; done)";
        machine.shell(&format!("{load} </dev/null >/dev/null 2>&1 & echo $! >/tmp/load"))?.ok()?;
        // As many as both lanes may keep, and as many again.
        server.await_pages(GUEST, 1600)?;
        machine.shell("kill $(cat /tmp/load)")?.ok()?;
        let recording = self.recorder(server).interrupt(child)?.ok()?;
        let [events, old, lost] = ["events", "pages_old", "pages_lost"].map(|name| recording.sum(GUEST, name));
        ensure!(old? > 0 && lost? == 0, "{:#}", recording.summary);
        let file = recording.file(GUEST);
        let report = lines(&trace_cmd(&["report", "-t"], &[&file])?);
        ensure!(report.is_sorted_by_key(|line| line.time), "in order");
        ensure!(report.len() > 1000 && u64::try_from(report.len())? < events?, "{} lines", report.len());
        // 512 KiB and a step of 1 MiB for each lane, and the descriptions.
        let bytes = fs::metadata(&file)?.len();
        ensure!(bytes < u64::from(CPUS) * (3 << 19) + (16 << 20), "{bytes} bytes");
        Ok(())
    }

    /// Starts a recording that goes on until something happens to it.
    fn recording(&self, server: &Server) -> Result<Child> {
        // A small buffer: its pages come soon.
        let child = self.recorder(server).start(&format!("--dom {GUEST} -b 64 -e sched -- sleep 1000"))?;
        server.await_pages(GUEST, 1)?;
        Ok(child)
    }

    /// A recording that something has happened to: it says what, and its file has what came.
    fn broken(&self, child: Child, why: &str) -> Result<()> {
        let folder = self.folder.path();
        let recording = Recorder { server: folder, folder }.finish(child)?;
        assert_eq!(recording.status, 1, "{}", recording.said);
        let remarks = recording.machine(GUEST)?["remarks"].to_string();
        ensure!(remarks.contains(why), "{why}: {:#}", recording.summary);
        recording.events_shown(GUEST).map(drop)
    }
}

/// Threads and descriptors of the server.
fn holds(server: &Server) -> Result<(usize, usize)> {
    let count = |what: &str| Ok::<_, anyhow::Error>(fs::read_dir(format!("/proc/{}/{what}", server.pid()))?.count());
    Ok((count("task")?, count("fd")?))
}

/// What a session would leave if it left something: none of it is there. `before` is from when one had just ended, and
/// something of it may have been there.
fn nothing_is_left(machine: &Machine, server: &Server, before: (usize, usize)) -> Result<()> {
    is_clear(machine)?;
    // A client's thread ends after its answer.
    for _ in 0..50 {
        let now = holds(server)?;
        if now.0 <= before.0 && now.1 <= before.1 {
            return Ok(());
        }
        sleep(Duration::from_millis(100));
    }
    bail!("threads and descriptors of the server: {:?}, were {before:?}", holds(server)?)
}

/// One boot: the server is killed and comes back, then the agent, then the recorder, and at the end the guest.
fn parts_die_one_after_the_other(case: Case, server_first: bool) -> Result<()> {
    let turn = turn()?;
    let trial = Trial::new(case, &turn)?;
    let early = if server_first { Some(trial.serve()?) } else { None };
    let machine = trial.boot()?;
    machine.shell(LOAD)?.ok()?;
    let mut server = early.map_or_else(|| trial.serve(), Ok)?;
    trial.session_works(&server)?;
    if server_first {
        trial.newest_pages_are_kept(&machine, &server)?;
    }

    let child = trial.recording(&server)?;
    server.kill()?;
    trial.broken(child, "the server went away")?;
    let server = trial.serve()?;
    trial.session_works(&server)?;
    let held = holds(&server)?;

    let child = trial.recording(&server)?;
    machine.shell("kill -9 $(pidof vtrace); start-agent")?.ok()?;
    trial.broken(child, "agent went away")?;
    trial.session_works(&server)?;

    let mut child = trial.recording(&server)?;
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGKILL)?;
    child.wait()?;
    server.await_state("is free", |state| state["holder_pid"].is_null())?;
    trial.session_works(&server)?;
    nothing_is_left(&machine, &server, held)?;
    assert_eq!(server.list()?[0]["vmm_pid"], machine.pid()?, "whose ports these are, for its clock");

    let child = trial.recording(&server)?;
    machine.kill()?;
    trial.broken(child, "went away")?;
    if server_first {
        let machine = trial.boot()?;
        machine.shell(LOAD)?.ok()?;
        trial.session_works(&server)?;
        nothing_is_left(&machine, &server, held)?;
    }
    Ok(())
}

#[test]
fn sockets_of_qemu_7_outlive_each_part() -> Result<()> {
    let case = Case { release: Release::Oldest, kernel: Kernel::V6_1, transport: "socket" };
    parts_die_one_after_the_other(case, true)
}

#[test]
fn pipes_of_qemu_7_outlive_each_part() -> Result<()> {
    let case = Case { release: Release::Oldest, kernel: Kernel::V6_1, transport: "pipe" };
    parts_die_one_after_the_other(case, false)
}

#[test]
fn sockets_of_qemu_10_outlive_each_part() -> Result<()> {
    let case = Case { release: Release::Middle, kernel: Kernel::V6_12, transport: "socket" };
    parts_die_one_after_the_other(case, false)
}

#[test]
fn pipes_of_qemu_10_outlive_each_part() -> Result<()> {
    let case = Case { release: Release::Middle, kernel: Kernel::V6_12, transport: "pipe" };
    parts_die_one_after_the_other(case, true)
}

#[test]
fn newest_qemu_takes_what_setup_prints_for_each_transport() -> Result<()> {
    let turn = turn()?;
    let case = Case { release: Release::Newest, kernel: Kernel::V6_12, transport: "socket" };
    let trial = Trial::new(case, &turn)?;
    let machine = trial.boot()?;
    machine.shell(LOAD)?.ok()?;
    let server = trial.serve()?;
    trial.session_works(&server)?;
    drop(machine);
    for transport in ["socket", "pipe", "vhost-user"] {
        takes(Release::Newest, transport, 260)?;
    }
    takes(Release::Middle, "pipe", 260)?;
    takes(Release::Oldest, "socket", 260)
}

/// A QEMU that is given the words for this many CPUs starts, and has every port.
fn takes(release: Release, transport: &str, cpus: u32) -> Result<()> {
    let root = tempfile::tempdir()?;
    let qemu = Qemu::unpack(release)?;
    let (major, minor) = qemu.version()?;
    let run = root.path().join("run");
    fs::create_dir(&run)?;
    let server = if transport == "vhost-user" { Some(()) } else { None };
    let words = format!(
        "--cpus {cpus} --qemu-version {major}.{minor} --transport {transport} --memory 64M --dir {}",
        run.display()
    );
    let words = transport::set_up(root.path(), GUEST, &words)?;
    let server = server.map(|()| serve_in(&run, root.path())).transpose()?;
    let mut command = qemu.command()?;
    command.args(["-M", "q35", "-m", "64M", "-nodefaults", "-display", "none", "-S", "-monitor", "stdio"]).args(&words);
    // Of what waits for a full pipe when it quits, QEMU throws the rest away; a file takes all at once.
    let said = root.path().join("said");
    command.stdin(std::process::Stdio::piped()).stdout(fs::File::create(&said)?);
    let mut child = command.spawn()?;
    std::io::Write::write_all(child.stdin.as_mut().context("a pipe")?, b"info qtree\nquit\n")?;
    let status = child.wait()?;
    drop(server);
    let said = fs::read_to_string(&said)?;
    ensure!(status.success(), "{transport}: {status}");
    let (what, count) = match transport {
        "vhost-user" => ("dev: vhost-user-test-device-pci", cpus.div_ceil(126)),
        _ => ("dev: virtserialport", cpus + 1),
    };
    assert_eq!(said.matches(what).count(), usize::try_from(count)?, "{transport} on QEMU {major}.{minor}");
    Ok(())
}

struct Serving(Child);

impl Drop for Serving {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server whose sockets are in `run`.
fn serve_in(run: &Path, root: &Path) -> Result<Serving> {
    let mut command = Command::new(xtask::build::vtrace()?);
    command.args(["server", "--dom", GUEST, "--dir"]).arg(run).arg("--root").arg(root);
    let serving = Serving(command.stderr(std::process::Stdio::null()).spawn()?);
    for _ in 0..600 {
        if run.join(format!("{GUEST}@3.sock")).exists() {
            return Ok(serving);
        }
        sleep(Duration::from_millis(50));
    }
    bail!("no server in {}", run.display())
}
