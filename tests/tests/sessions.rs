//! Sessions one after another against one booted guest: nothing stays behind.

use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use vtrace_dp::tracefs::Tracefs;
use vtrace_tests::{recording::Recorder, server::Server};
use xtask::{
    kernel::Kernel,
    machine::{Machine, turn},
};

const GUEST: &str = "guest1";
/// Sessions before the first look: caches and pools fill.
const WARM_UP: u32 = 100;
/// Sessions in all.
const SESSIONS: u32 = 500;
/// What glibc's allocator may keep more of. Its caches grew by 200 to 400 bytes a session where the agent's own live
/// bytes and blocks, counted by an allocator that counts, stayed the same to the byte over 30 sessions.
const SLACK_KB: u64 = 512;

/// What a process holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Holdings {
    descriptors: u64,
    threads: u64,
    anonymous_kb: u64,
}

impl Holdings {
    /// Of a process, from the text of `ls /proc/PID/fd | wc -l; cat /proc/PID/status`.
    fn parse(text: &str) -> Result<Self> {
        let line = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).context("a line of status");
        let number = |name: &str| anyhow::Ok(line(name)?.trim().trim_end_matches(" kB").parse()?);
        let descriptors = text.lines().next().context("a first line")?.trim().parse()?;
        Ok(Self { descriptors, threads: number("Threads:")?, anonymous_kb: number("RssAnon:")? })
    }

    fn of_server(server: &Server) -> Result<Self> {
        let process = PathBuf::from(format!("/proc/{}", server.pid()));
        let descriptors = fs::read_dir(process.join("fd"))?.count();
        Self::parse(&format!("{descriptors}\n{}", fs::read_to_string(process.join("status"))?))
    }

    fn of_agent(machine: &Machine) -> Result<Self> {
        let script = "pid=$(pidof vtrace); ls /proc/$pid/fd | wc -l; cat /proc/$pid/status";
        Self::parse(&machine.shell(script)?.ok()?)
    }
}

/// The host's tracefs instances. Other programs may have some.
fn instances() -> Result<BTreeSet<String>> {
    let tracefs = Tracefs::find_or_mount().map_err(|failure| anyhow::anyhow!("{failure:?}"))?;
    let entries = fs::read_dir(tracefs.root().join("instances"))?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
}

/// What is held comes back to what was held before; the last client may still be on its way out.
fn ensure_not_more(whose: &str, before: Holdings, look: impl Fn() -> Result<Holdings>) -> Result<()> {
    let is_fine = |now: &Holdings| {
        now.descriptors <= before.descriptors
            && now.threads <= before.threads
            && now.anonymous_kb <= before.anonymous_kb + SLACK_KB
    };
    let begun = Instant::now();
    loop {
        let now = look()?;
        if is_fine(&now) {
            return Ok(());
        }
        ensure!(begun.elapsed() < Duration::from_secs(5), "{whose}: {before:?} became {now:?}");
        sleep(Duration::from_millis(100));
    }
}

#[test]
fn five_hundred_sessions_leave_nothing_behind() -> Result<()> {
    let turn = turn()?;
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let server = Server::start(&[GUEST])?;
    let machine = Machine::builder(&turn, Kernel::V6_12).vhost_user(&server.socket(GUEST)).boot()?;
    server.await_agent(GUEST)?;
    let recorder = Recorder { server: server.dir(), folder: folder.path() };
    let words = format!("-e sched:sched_switch --dom {GUEST} -e sched:sched_switch -- true");
    let (mut before, instances_before) = (None, instances()?);
    // To tell a leak from a step, if it comes to that.
    let mut server_kb = Vec::new();
    for session in 0..SESSIONS {
        if session == WARM_UP {
            before = Some((Holdings::of_server(&server)?, Holdings::of_agent(&machine)?));
        }
        if session.is_multiple_of(WARM_UP) {
            server_kb.push(Holdings::of_server(&server)?.anonymous_kb);
        }
        let recording = recorder.run(&words)?.ok().with_context(|| format!("session {session}"))?;
        ensure!(recording.sum(GUEST, "pages_out")? > 0 && recording.sum(GUEST, "pages_lost")? == 0, "{session}");
    }
    let (server_before, agent_before) = before.context("there was a warm-up")?;
    ensure_not_more(&format!("server, every {WARM_UP} sessions {server_kb:?} KiB,"), server_before, || {
        Holdings::of_server(&server)
    })?;
    ensure_not_more("agent", agent_before, || Holdings::of_agent(&machine))?;
    assert_eq!(machine.shell("ls /sys/kernel/tracing/instances")?.text(), "");
    let left: Vec<String> = instances()?.difference(&instances_before).cloned().collect();
    ensure!(left.is_empty(), "instances on the host: {left:?}");
    Ok(())
}
