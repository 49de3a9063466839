//! `cargo xtask demo`: a guest on this machine, recorded together with the host.
//!
//! In: nothing but the repository. Out: trace files under target/demo and what to look at. Runs: QEMU, vtrace and
//! stock trace-cmd as child processes. Full: does not apply. Trust: all of it is ours.

use crate::kernel::Kernel;
use crate::machine::{Machine, turn};
use crate::{build, cache, packages};
use anyhow::{Context, Result, bail, ensure};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// What the demo's guest is called: its socket is `<name>.sock`.
const GUEST: &str = "guest1";
/// Something to see in the guest: a task that sleeps and wakes, and one that starts others.
const GUEST_LOAD: &str = "(while :; do sleep 0.02; done) </dev/null >/dev/null 2>&1 &";
/// What is recorded: scheduling on both sides.
const RECORD: [&str; 12] = ["-e", "sched", "-e", "irq", "--dom", GUEST, "-e", "sched", "-e", "irq:*", "--", "sleep"];
/// How long, in seconds.
const SECONDS: &str = "3";
/// Lines of the merged report that are shown.
const LINES_SHOWN: usize = 24;

/// Boots the guest with our binary in it, records, and shows what stock trace-cmd makes of it.
///
/// # Errors
/// When something cannot be fetched, built, booted, recorded or read.
pub fn run() -> Result<()> {
    packages::ensure(&["trace-cmd"])?;
    println!("building vtrace, one static binary for host and guest");
    let vtrace = build::vtrace()?;
    let turn = turn()?;
    let folder = cache::target().join("demo");
    fs::create_dir_all(&folder)?;
    let server = Server::start(&vtrace, &folder)?;
    println!("booting {GUEST}: QEMU with a vhost-user device that vtrace server serves");
    let machine =
        Machine::builder(&turn, Kernel::V6_12).vhost_user(&server.dir.join(format!("{GUEST}.sock"))).boot()?;
    println!("{GUEST} runs Linux {} on {} CPUs", machine.shell("uname -r")?.ok()?, machine.shell("nproc")?.ok()?);
    server.await_agent(&vtrace)?;
    machine.shell(GUEST_LOAD)?.ok()?;

    let [host, guest] = record(&vtrace, &server.dir, &folder)?;
    show(&host, &guest)
}

fn record(vtrace: &Path, dir: &Path, folder: &Path) -> Result<[PathBuf; 2]> {
    let [host, guest] = [folder.join("trace.dat"), folder.join(format!("trace-{GUEST}.dat"))];
    println!("\nvtrace record -o {} {} {SECONDS}\n", shown(&host), RECORD.join(" "));
    let mut command = Command::new(vtrace);
    command.arg("record").arg("--dir").arg(dir).arg("-o").arg(&host).args(RECORD).arg(SECONDS);
    ensure!(command.status().context("cannot run vtrace")?.success(), "the recording failed");
    Ok([host, guest])
}

/// Prints the merged report around the first guest event that stands between two of the host, and how to go on.
fn show(host: &Path, guest: &Path) -> Result<()> {
    let words = [OsStr::new("report"), OsStr::new("-i"), host.as_os_str(), OsStr::new("-i"), guest.as_os_str()];
    let report = Command::new("trace-cmd").args(words).output().context("cannot run trace-cmd")?;
    ensure!(report.status.success(), "trace-cmd report: {}", String::from_utf8_lossy(&report.stderr));
    let report = String::from_utf8_lossy(&report.stdout);
    let lines: Vec<&str> = report.lines().filter(|line| line.contains('[')).collect();
    let file = |name: &Path| name.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let (host_name, guest_name) = (file(host) + ":", file(guest) + ":");
    let is_of = |line: &str, name: &str| line.trim_start().starts_with(name);
    let mixed = |part: &[&str]| part.iter().filter(|line| is_of(line, &guest_name)).count().abs_diff(LINES_SHOWN / 2);
    let part = lines.windows(LINES_SHOWN).min_by_key(|part| mixed(part)).unwrap_or(&lines);
    println!("\n$ trace-cmd report -i {} -i {}\n…\n{}\n…", shown(host), shown(guest), part.join("\n"));
    for (machine, name) in [("host", &host_name), (GUEST, &guest_name)] {
        let count = lines.iter().filter(|line| is_of(line, name)).count();
        ensure!(count > 0, "no events of {machine} in the report");
        println!("{count} events of {machine} in one timeline");
    }
    println!(
        "\nin KernelShark: kernelshark {} -a {}   (Plots > KVM Combo plots needs -e kvm)",
        shown(host),
        shown(guest)
    );
    Ok(())
}

/// A path as a person in the repository would type it.
fn shown(path: &Path) -> String {
    path.strip_prefix(cache::repository()).unwrap_or(path).display().to_string()
}

/// The demo's server; ends with it.
struct Server {
    child: Child,
    dir: PathBuf,
}

impl Server {
    fn start(vtrace: &Path, folder: &Path) -> Result<Self> {
        // A socket's path must be short (108 bytes): the repository's may not be.
        let dir = std::env::temp_dir().join(format!("vtrace-demo-{}", std::process::id()));
        fs::create_dir_all(&dir)?;
        let log = File::create(folder.join("server.log"))?;
        let child = Command::new(vtrace).args(["server", "--dom", GUEST, "--dir"]).arg(&dir).stderr(log).spawn()?;
        let server = Self { child, dir };
        server.await_list(vtrace, |said| said.contains(GUEST))?;
        Ok(server)
    }

    fn await_agent(&self, vtrace: &Path) -> Result<()> {
        self.await_list(vtrace, |said| said.contains("agent ready"))
    }

    fn await_list(&self, vtrace: &Path, is_so: fn(&str) -> bool) -> Result<()> {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(60) {
            let list = Command::new(vtrace).args(["list", "--dir"]).arg(&self.dir).output()?;
            if list.status.success() && is_so(&String::from_utf8_lossy(&list.stdout)) {
                return Ok(());
            }
            sleep(Duration::from_millis(50));
        }
        bail!("the server or the agent did not come up: see target/demo/server.log")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It has nothing to save, and the demo is over.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.dir);
    }
}
