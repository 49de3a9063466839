//! A booted guest with three transports to the host: vtrace's device, and stock virtserialport over a FIFO and over a
//! socket. Same guest, same load, one transport after the other.
//!
//! In:    a ring buffer of the guest, filled beforehand with tracing off; the agent's pump, or a recorder as trace-cmd's
//! Out:   MB/s in the guest; host CPU (QEMU's threads but its vCPUs', and whoever receives) and guest CPU (the vCPUs'
//!        threads) per GiB
//! Runs:  QEMU as a child process; backend and receivers as threads of this process, all into files on the disk
//! Trust: what the guest says it sent must have arrived, to the byte
//!
//! Guest CPU is that of the vCPU threads, so an emulated guest's is that of its emulation. What starts the sender in the
//! guest is counted with it, the same for all transports.

mod receiver;
mod transport;

use std::{path::Path, thread::sleep, time::Duration};

use anyhow::{Context, Result, ensure};
use xtask::{
    kernel::Kernel,
    machine::{Chardev, Machine, turn},
};

use self::transport::{Transport, Transports};
use crate::{
    in_guest::{Sender, Sent},
    measure::{GIB, real, tasks},
    row::Row,
};

/// What is sent at a time.
const MEGABYTES: u64 = 256;
const MEMORY_MB: u32 = 1024;
const PROGRAM: &str = "/bin/vtrace-bench";
const PATIENCE: Duration = Duration::from_secs(120);

/// A sender and the transport it uses.
type Route = (Sender, Transport);

const OURS: Route = (Sender::Pump, Transport::VhostUser);
const SPLICE: Route = (Sender::Splice, Transport::VhostUser);
const FIFO: Route = (Sender::Splice, Transport::Fifo);
const SOCKET: Route = (Sender::Splice, Transport::Socket);
const ROUTES: [Route; 4] = [OURS, FIFO, SOCKET, SPLICE];

/// What one sending took.
#[derive(Clone, Copy, Debug)]
struct Taken {
    mb_per_s: f64,
    host_s_per_gib: f64,
    guest_s_per_gib: f64,
}

/// Boots one guest and measures `rounds` of all paths.
pub(crate) fn run(rounds: u32) -> Result<Vec<Row>> {
    measure(rounds, MEGABYTES)
}

fn measure(rounds: u32, megabytes: u64) -> Result<Vec<Row>> {
    // Built before others have to wait for us; an image has `vtrace` in it whether it runs or not.
    let program = xtask::build::program("vtrace-bench", "vtrace-bench")?;
    xtask::build::vtrace()?;
    let turn = turn()?;
    let folder = tempfile::tempdir()?;
    let transports = Transports::prepare(folder.path())?;
    let machine = Machine::builder(&turn, Kernel::V6_12).memory_mb(MEMORY_MB).without_agent();
    let ports = [
        (&*format!("{}0", Transport::Fifo.prefix()), Chardev::Pipe(transports.fifo())),
        (&*format!("{}0", Transport::Socket.prefix()), Chardev::Listen(transports.socket())),
    ];
    let machine = machine.vhost_user(&transports.vhost_user()).stock_ports(&ports).file(PROGRAM, &program).boot()?;
    let transports = transports.connect()?;
    let mut rows = Vec::new();
    for round in 0..=rounds {
        let mut taken = Vec::new();
        for at in 0..ROUTES.len() {
            // Each round begins with another route.
            let route = (at + usize::try_from(round)?) % ROUTES.len();
            taken.push((route, send(&machine, &transports, ROUTES[route], megabytes)?));
        }
        taken.sort_by_key(|(route, _)| *route);
        // The first round warms up: caches of translated code, pages of files.
        if let Some(round) = round.checked_sub(1) {
            rows.extend(compare(round, [taken[0].1, taken[1].1, taken[2].1, taken[3].1]));
        }
    }
    machine.kill()?;
    transports.end()?;
    Ok(rows)
}

fn compare(round: u32, [ours, fifo, socket, splice]: [Taken; 4]) -> Vec<Row> {
    let row = |metric: &str, unit: &str, pair: [f64; 2], name: &str| {
        Row::new("guest", metric, round, unit, pair).beside(name)
    };
    let throughput = |other: Taken| [ours.mb_per_s, other.mb_per_s];
    let host = |other: Taken| [ours.host_s_per_gib, other.host_s_per_gib];
    let guest = |other: Taken| [ours.guest_s_per_gib, other.guest_s_per_gib];
    vec![
        row("throughput against FIFO", "MB/s", throughput(fifo), "FIFO"),
        row("throughput against socket", "MB/s", throughput(socket), "unix socket"),
        row("host cpu against FIFO", "s/GiB", host(fifo), "FIFO"),
        row("host cpu against socket", "s/GiB", host(socket), "unix socket"),
        row("guest cpu against splice", "s/GiB", guest(splice), "splice(2) of 64 KiB, same transport"),
        row("guest cpu against the stock path", "s/GiB", guest(fifo), "splice(2) of 64 KiB, FIFO"),
        row("throughput against splice", "MB/s", throughput(splice), "splice(2) of 64 KiB, same transport"),
    ]
}

fn send(machine: &Machine, transports: &transport::Open, (sender, transport): Route, megabytes: u64) -> Result<Taken> {
    machine.shell_within(&format!("{PROGRAM} in-guest fill {megabytes}"), PATIENCE)?.ok()?;
    let receipt = transports.expect(transport)?;
    let qemu = machine.pid()?.to_string();
    let before = [cpu(&qemu, is_vcpu)?, cpu(&qemu, |name| !is_vcpu(name))?, transport.receiver_cpu()?];
    let how = format!("{sender:?}").to_lowercase();
    let said =
        machine.shell_within(&format!("{PROGRAM} in-guest send {how} {}", transport.prefix()), PATIENCE)?.ok()?;
    let sent: Sent = serde_json::from_str(said.lines().last().unwrap_or_default()).context(said.clone())?;
    ensure!(sent.bytes >= megabytes << 20, "the guest sent only {sent:?}");
    receipt.await_bytes(sent.bytes)?;
    let after = [cpu(&qemu, is_vcpu)?, cpu(&qemu, |name| !is_vcpu(name))?, transport.receiver_cpu()?];
    let [guest, vmm, receiver] = [0, 1, 2].map(|at| after[at].saturating_sub(before[at]).as_secs_f64());
    let gib = real(sent.bytes) / GIB;
    let mb_per_s = real(sent.bytes) / 1e6 / sent.seconds;
    Ok(Taken { mb_per_s, host_s_per_gib: (vmm + receiver) / gib, guest_s_per_gib: guest / gib })
}

/// CPU time of those of QEMU's threads.
fn cpu(qemu: &str, wanted: impl Fn(&str) -> bool) -> Result<Duration> {
    Ok(tasks(qemu)?.values().filter(|(name, _)| wanted(name)).map(|(_, spent)| *spent).sum())
}

/// QEMU calls them so with `debug-threads=on`: "CPU 0/TCG", "CPU 0/KVM".
fn is_vcpu(name: &str) -> bool {
    name.starts_with("CPU ")
}

/// Waits until `is_so`, up to a limit.
fn wait_until(what: &str, is_so: impl Fn() -> bool) -> Result<()> {
    let begun = std::time::Instant::now();
    while !is_so() {
        ensure!(begun.elapsed() < PATIENCE, "{what}");
        sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// A path below a folder.
fn below(folder: &Path, name: &str) -> std::path::PathBuf {
    folder.join(name)
}
