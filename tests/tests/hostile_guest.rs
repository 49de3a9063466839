//! Random attacks of one guest beside the recording of another: the recording loses nothing and its table is right.
//!
//! Hostile are a virtual machine monitor (vhost-user requests with odd descriptors, deaths at any byte, rings that change
//! while they are served, regions of terabytes, eventfds that are pipes), the root of a real guest (random bytes and valid
//! messages of every kind into the ports, agents that are killed), and clients (garbage and floods on the control socket,
//! recordings of the hostile guest).
//!
//! Some seconds in CI; `cargo xtask soak hostile --minutes 10` for longer.

#![expect(clippy::print_stdout, reason = "a long run shows its numbers")]

use std::{
    fs,
    io::Write,
    os::{fd::AsFd, unix::net::UnixStream},
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread::{self, sleep},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vtrace_dp::{
    server::CONTROL_SOCKET,
    sys::socket::{MESSAGE_DESCRIPTORS_MAX, send_all},
};
use vtrace_fuzz::{
    client,
    random::Random,
    vhost_user::{attack, random_input, serves},
    wire,
};
use vtrace_tests::{
    fixture::{Fixture, GUEST},
    recording::{Recorder, Recording},
    server::Server,
};
use xtask::machine::Machine;

/// The guest of the monitor that attacks.
const VMM: &str = "hostile-vmm";
/// The guest whose root attacks.
const ROOT: &str = "hostile-root";
/// How long a recording is attacked in CI.
const SECONDS: u64 = 20;
/// How long the last attackers may be on their way out.
const SETTLE_MAX: Duration = Duration::from_secs(60);
/// Connections to the control socket at once: root's own clients are not limited.
const CONNECTIONS: usize = 16;
/// Messages in the file that the guest's root sends.
const MESSAGES: usize = 2000;

/// What the root of the guest does, until it is killed: random bytes to all ports, messages of every kind to the control
/// port, an agent that begins and is killed.
const ROOT_SCRIPT: &str = r"
while :; do for port in /dev/vport*; do timeout 1 dd if=/dev/urandom of=$port bs=5000 count=40; done; done &
while :; do
    for name in /sys/class/virtio-ports/*/name; do
        grep -q ctl $name && port=${name%/name} && timeout 1 dd if=/tmp/messages of=/dev/${port##*/} bs=4096
    done
done &
while :; do start-agent --allow-exec; sleep 0.7; kill -9 $(pidof vtrace); done &
";

/// What was tried.
#[derive(Default, Debug)]
struct Attacks {
    over: AtomicBool,
    monitors: AtomicU64,
    clients: AtomicU64,
    recordings: AtomicU64,
}

impl Attacks {
    fn go_on(&self) -> bool {
        !self.over.load(Ordering::Relaxed)
    }

    /// Monitors, one after the other.
    fn by_monitor(&self, socket: &Path, seed: u64) {
        while self.go_on() {
            let count = self.monitors.fetch_add(1, Ordering::Relaxed);
            attack(socket, &random_input(seed.wrapping_add(count)));
        }
    }

    /// Clients: garbage, requests out of order, any descriptors, connections that stay and read nothing.
    fn by_clients(&self, socket: &Path, seed: u64) -> Result<()> {
        let mut random = Random::new(seed);
        let seeds = client::seeds();
        let memory = memfd_create(c"client", MFdFlags::MFD_CLOEXEC)?;
        let mut open = Vec::new();
        while self.go_on() {
            let mut input = random.mutated(&seeds);
            // The first byte is for the fuzz target: whether a hello goes before.
            input.remove(0);
            let hello = wire::seeds()[0][1..].to_vec();
            let bytes = [if random.below(4) == 0 { Vec::new() } else { hello }, input].concat();
            let descriptors = [0, 0, 1, 4, MESSAGE_DESCRIPTORS_MAX][random.below(5)];
            let Ok(mut socket) = UnixStream::connect(socket) else { continue };
            socket.set_write_timeout(Some(Duration::from_millis(100)))?;
            let _ = send_all(socket.as_fd(), &bytes, &vec![memory.as_fd(); descriptors]);
            let _ = socket.write_all(&bytes);
            self.clients.fetch_add(1, Ordering::Relaxed);
            if random.below(3) == 0 {
                open.push(socket);
            }
            if open.len() > CONNECTIONS {
                open.clear();
            }
        }
        Ok(())
    }

    /// Recordings of the guest whose root is hostile. How they end is not this test's subject.
    fn by_recordings(&self, server: &Server, folder: &Path) -> Result<()> {
        let recorder = Recorder { server: server.dir(), folder };
        while self.go_on() {
            recorder.run(&format!("--dom {ROOT} -e sched -- sleep 1"))?;
            self.recordings.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// All at once for `time`.
    fn run(&self, server: &Server, folder: &Path, seed: u64, time: Duration) -> Result<()> {
        thread::scope(|scope| {
            let monitor = scope.spawn(|| self.by_monitor(&server.socket(VMM), seed));
            let clients = scope.spawn(|| self.by_clients(&server.dir().join(CONTROL_SOCKET), seed));
            let recordings = scope.spawn(|| self.by_recordings(server, folder));
            sleep(time);
            self.over.store(true, Ordering::Relaxed);
            monitor.join().expect("it does not panic");
            clients.join().expect("it does not panic")?;
            recordings.join().expect("it does not panic")
        })
    }
}

/// Messages of every kind, some with changed bytes, in any order.
fn messages(seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    // One byte for the fuzz target comes before each.
    let alone: Vec<Vec<u8>> = wire::seeds().iter().filter(|seed| seed[0] == 0).map(|seed| seed[1..].to_vec()).collect();
    let hello = alone[0].clone();
    let message = |_| match random.below(8) {
        0 => random.mutated(&alone),
        1 => hello.clone(),
        _ => random.pick(&alone).clone(),
    };
    (0..MESSAGES).flat_map(message).collect()
}

fn descriptors(server: &Server) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{}/fd", server.pid()))?.count())
}

/// The recorded guest's table and file agree, and nothing is lost.
fn is_whole(recording: &Recording) -> Result<()> {
    ensure!(recording.status == 0, "status {}: {}", recording.status, recording.said);
    for counter in ["pages_lost", "events_lost"] {
        ensure!(recording.sum(GUEST, counter)? == 0, "{counter}: {:#}", recording.summary);
    }
    let [pages_in, pages_out] = [recording.sum(GUEST, "pages_in")?, recording.sum(GUEST, "pages_out")?];
    ensure!(pages_in == pages_out, "{pages_in} pages in, {pages_out} out: {:#}", recording.summary);
    let (shown, counted) = (recording.events_shown(GUEST)?, recording.sum(GUEST, "events")?);
    ensure!(u64::try_from(shown)? == counted, "{shown} events in the file, {counted} in the table");
    println!("{GUEST}: {pages_out} pages, {counted} events, none lost");
    Ok(())
}

/// The hostile guest, its root at work.
fn boot_hostile(fixture: &Fixture, seed: u64) -> Result<Machine> {
    let machine = fixture.boot(ROOT, 2)?;
    machine.put(&messages(seed), "/tmp/messages")?;
    machine.put(ROOT_SCRIPT.as_bytes(), "/tmp/attack")?;
    machine.shell("kill -9 $(pidof vtrace); sh /tmp/attack >/dev/null 2>&1 </dev/null &")?.ok()?;
    Ok(machine)
}

#[test]
fn recording_is_whole_beside_a_vmm_and_an_agent_that_attack() -> Result<()> {
    let minutes = std::env::var(xtask::soak::MINUTES).ok().and_then(|text| text.parse().ok());
    let time = Duration::from_secs(minutes.map_or(SECONDS, |minutes: u64| 60 * minutes));
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let seed = u64::from(now.subsec_nanos());
    println!("seed {seed}");

    let fixture = Fixture::of(&[GUEST, VMM, ROOT])?;
    let server = &fixture.server;
    let _guest = fixture.boot(GUEST, 2)?;
    ensure!(serves(&server.socket(VMM)), "the server serves before the attack");
    let recorder = fixture.recorder();
    let child = recorder.start(&format!("--strict --dom {GUEST} -e sched -- sleep 100000"))?;
    server.await_pages(GUEST, 1)?;
    let before = descriptors(server)?;

    let hostile = boot_hostile(&fixture, seed)?;
    let (attacks, folder) = (Attacks::default(), tempfile::tempdir()?);
    attacks.run(server, folder.path(), seed, time)?;
    ensure!(serves(&server.socket(VMM)), "the next monitor is not served");
    hostile.kill()?;
    println!("{attacks:?} in {} s; the log has {} bytes", time.as_secs(), server.log().len());

    let begun = Instant::now();
    while descriptors(server)? > before {
        ensure!(begun.elapsed() < SETTLE_MAX, "{before} descriptors became {}", descriptors(server)?);
        sleep(Duration::from_millis(50));
    }
    is_whole(&recorder.interrupt(child).context("the recording ends")?)
}
