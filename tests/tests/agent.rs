//! `vtrace agent` in real guests over QEMU's own virtio-serial ports; this file is the host.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    sync::mpsc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};
use vtrace_common::{
    ids::Cpu,
    page::Header,
    wire::{
        Decoder, Hello, Message,
        agent::{Arm, Armed, EventRequest, FailureKind, FromAgent, LaneReport, Machine as Guest, Part, ToAgent},
        encode,
    },
};
use xtask::{
    kernel::Kernel,
    machine::{Chardev, Machine, Turn, turn},
};

const CPUS: u32 = 2;
/// The number of a ping whose answer is not awaited.
const STILL_HERE: u32 = u32::MAX;
const START: &str = "mkdir -p /tmp/tee; vtrace agent --tee /tmp/tee >>/tmp/agent.log 2>&1 &";
const INSTANCES: &str = "ls /sys/kernel/tracing/instances";

/// The host's end of a guest's control port.
struct Host {
    socket: UnixStream,
    decoder: Decoder,
}

impl Host {
    /// Greets the agent.
    fn meet(path: &Path) -> Result<(Self, Guest)> {
        let socket = UnixStream::connect(path)?;
        socket.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut host = Self { socket, decoder: Decoder::default() };
        host.say(&Hello::ours("test"))?;
        ensure!(host.next::<Hello>()?.speaks_ours());
        match host.next()? {
            FromAgent::Machine(machine) => Ok((host, machine)),
            other => bail!("{other:?}"),
        }
    }

    fn say<M: Message>(&mut self, message: &M) -> Result<()> {
        Ok(self.socket.write_all(&encode(message)?)?)
    }

    fn next<M: Message>(&mut self) -> Result<M> {
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok(frame.open()?);
            }
            let mut buffer = [0; 65536];
            let count = self.socket.read(&mut buffer).context("the agent says nothing")?;
            ensure!(count > 0, "the control port has closed");
            self.decoder.push(&buffer[..count]);
        }
    }

    fn ask(&mut self, request: &ToAgent) -> Result<FromAgent> {
        self.say(request)?;
        loop {
            match self.next()? {
                FromAgent::EventsLost { .. } => {} // comes after a pong when a ring buffer has overwritten events
                other => return Ok(other),
            }
        }
    }

    /// The next answer that is no description; sizes of what was described are added up.
    fn answer(&mut self, described: &mut std::collections::BTreeMap<Part, usize>) -> Result<FromAgent> {
        loop {
            match self.next()? {
                FromAgent::Describe(piece) => *described.entry(piece.part).or_default() += piece.bytes.len(),
                FromAgent::Pong { id: STILL_HERE }
                | FromAgent::Arming { .. }
                | FromAgent::EventsLost { .. }
                | FromAgent::Remark { .. } => {}
                other => return Ok(other),
            }
        }
    }

    fn arm(&mut self, events: &[&str]) -> Result<Armed> {
        let events = events.iter().map(|pattern| EventRequest::from(*pattern)).collect();
        let arm = Arm { session: 7, clock: "x86-tsc".into(), events, buffer_kb: 0, kallsyms: true, ..Arm::default() };
        self.say(&ToAgent::Arm(Box::new(arm)))?;
        let mut described = Default::default();
        match self.answer(&mut described)? {
            FromAgent::Armed(armed) => {
                for part in [Part::HeaderPage, Part::HeaderEvent, Part::FtraceFormat, Part::EventFormat, Part::Kallsyms]
                {
                    ensure!(
                        described.get(&part).is_some_and(|bytes| *bytes > 100),
                        "{part:?} is missing: {described:?}"
                    );
                }
                Ok(armed)
            }
            other => bail!("{other:?}"),
        }
    }

    /// Probes `cpu` some times.
    fn probe(&mut self, cpu: Cpu) -> Result<()> {
        for id in 0..20 {
            match self.ask(&ToAgent::Probe { id, cpu })? {
                FromAgent::Echo(echo) => {
                    ensure!(echo.id == id && echo.cpu == cpu && echo.received < echo.sent, "{echo:?}");
                }
                other => bail!("{other:?}"),
            }
        }
        Ok(())
    }

    /// Says every second that it is there, as `vtrace record` does: an agent on a busy machine may need longer to report
    /// than a host may be silent.
    fn stop(&mut self) -> Result<Vec<LaneReport>> {
        let (mut socket, (end, ended)) = (self.socket.try_clone()?, mpsc::channel());
        let pings = std::thread::spawn(move || -> Result<()> {
            let ping = encode(&ToAgent::Ping { id: STILL_HERE })?;
            while ended.recv_timeout(Duration::from_secs(1)) == Err(mpsc::RecvTimeoutError::Timeout) {
                socket.write_all(&ping)?;
            }
            Ok(())
        });
        let reports = self.stopped();
        end.send(())?;
        pings.join().expect("no panic")?;
        // What is asked next must not be answered by the last of them.
        while self.ask(&ToAgent::Ping { id: 0 })? != (FromAgent::Pong { id: 0 }) {}
        reports
    }

    fn stopped(&mut self) -> Result<Vec<LaneReport>> {
        self.say(&ToAgent::Stop)?;
        let mut reports = Vec::new();
        let mut described = Default::default();
        loop {
            match self.answer(&mut described)? {
                FromAgent::Lane(report) => reports.push(report),
                FromAgent::Stopped => break,
                other => bail!("{other:?}"),
            }
        }
        ensure!(described.contains_key(&Part::Cmdlines), "no command lines");
        Ok(reports)
    }
}

/// What came out of a data port.
struct Received {
    pages: u64,
    events_missed: bool,
    sha256: String,
}

/// Reads a data port until its socket is shut down.
fn receive(path: &Path) -> Result<(UnixStream, JoinHandle<Result<Received>>)> {
    let socket = UnixStream::connect(path)?;
    let mut reader = socket.try_clone()?;
    let thread = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes)?;
        let mut events_missed = false;
        for page in bytes.chunks(4096) {
            let header = Header::parse(page, 4096).map_err(|fault| anyhow::anyhow!("{fault:?}"))?;
            ensure!(page.len() == 4096 && header.data_bytes > 0);
            events_missed |= header.missed;
        }
        let sha256 = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Received { pages: u64::try_from(bytes.len() / 4096)?, events_missed, sha256 })
    });
    Ok((socket, thread))
}

fn boot(turn: &Turn, kernel: Kernel, dir: &Path, more: &[&str]) -> Result<Machine> {
    let mut ports = vec![("agent-ctl-path".to_owned(), Chardev::Listen(dir.join("control.sock")))];
    for cpu in 0..CPUS {
        ports.push((format!("trace-path-cpu{cpu}"), Chardev::Listen(dir.join(format!("cpu{cpu}.sock")))));
    }
    let ports: Vec<(&str, Chardev)> = ports.iter().map(|(name, chardev)| (name.as_str(), chardev.clone())).collect();
    Machine::builder(turn, kernel).cpus(CPUS).without_agent().stock_ports(&ports).arguments(more).boot()
}

/// Arms, starts, makes the guest busy, stops, closes, and compares every byte.
fn record(machine: &Machine, dir: &Path) -> Result<()> {
    let (mut host, guest) = Host::meet(&dir.join("control.sock"))?;
    ensure!(guest.cpus == [Cpu(0), Cpu(1)] && guest.lanes == guest.cpus, "{guest:?}");
    let (sockets, threads): (Vec<_>, Vec<_>) = (0..CPUS)
        .map(|cpu| receive(&dir.join(format!("cpu{cpu}.sock"))))
        .collect::<Result<Vec<_>>>()?
        .into_iter()
        .unzip();
    let armed = host.arm(&["sched", "syscalls"])?;
    ensure!(armed.page_bytes == 4096 && armed.lanes == guest.cpus && armed.clock.contains("[x86-tsc]"), "{armed:?}");
    ensure!(
        matches!(host.ask(&ToAgent::Start { marker: "begin".into() })?, FromAgent::Started { before, after } if before < after)
    );
    machine.shell("(for i in 1 2; do (i=0; while [ $i -lt 300 ]; do /bin/true; i=$((i+1)); done) & done; wait; touch /tmp/done) &")?.ok()?;
    while machine.shell("rm /tmp/done")?.status != 0 {
        ensure!(host.ask(&ToAgent::Ping { id: 1 })? == FromAgent::Pong { id: 1 });
        std::thread::sleep(Duration::from_millis(300));
    }
    for cpu in &guest.cpus {
        host.probe(*cpu)?;
    }
    let reports = host.stop()?;
    ensure!(host.ask(&ToAgent::Close)? == FromAgent::Closed);
    ensure!(machine.shell(INSTANCES)?.text().is_empty(), "the instance stays");
    for socket in sockets {
        // Everything has been read when QEMU has nothing more to write: the agent said so.
        std::thread::sleep(Duration::from_millis(200));
        socket.shutdown(std::net::Shutdown::Both)?;
    }
    for (report, thread) in reports.iter().zip(threads) {
        let received = thread.join().expect("no panic")?;
        let copy = machine.shell(&format!("sha256sum /tmp/tee/{}.raw", report.cpu))?.text();
        ensure!(report.trouble.is_empty() && report.ledger.pages_lost == 0, "{report:?}");
        ensure!(report.ledger.pages_out == received.pages && report.ledger.pages_in == received.pages, "{report:?}");
        ensure!(received.pages > 20, "{} pages are no test", received.pages);
        ensure!(copy.starts_with(&received.sha256), "{copy}");
        ensure!(report.stats_after.lines().any(|line| line == "entries: 0"), "{}", report.stats_after);
        let overrun = !report.stats_after.lines().any(|line| line == "overrun: 0");
        ensure!(overrun == received.events_missed, "the pages and the stats agree about missed events");
    }
    Ok(())
}

fn agent_log(machine: &Machine) -> String {
    machine.shell("cat /tmp/agent.log").map(|output| output.text()).unwrap_or_default()
}

fn records_every_byte(kernel: Kernel) -> Result<()> {
    let turn = turn()?;
    let dir = tempfile::tempdir()?;
    let machine = boot(&turn, kernel, dir.path(), &[])?;
    machine.shell(START)?.ok()?;
    for _ in 0..2 {
        record(&machine, dir.path()).with_context(|| agent_log(&machine))?;
    }
    Ok(())
}

#[test]
fn what_is_tapped_in_6_1_is_received() -> Result<()> {
    records_every_byte(Kernel::V6_1)
}

#[test]
fn what_is_tapped_in_6_12_is_received() -> Result<()> {
    records_every_byte(Kernel::V6_12)
}

#[test]
fn what_is_tapped_in_the_newest_kernel_is_received() -> Result<()> {
    records_every_byte(Kernel::Newest)
}

/// Voluntary context switches of all threads of the agent.
fn wake_ups(machine: &Machine) -> Result<u64> {
    let script = "cat /proc/$(pidof vtrace)/task/*/status | grep ^voluntary | cut -f2";
    let text = machine.shell(script)?.ok()?;
    Ok(text.lines().filter_map(|line| line.parse::<u64>().ok()).sum())
}

fn await_no_instance(machine: &Machine) -> Result<Duration> {
    let begun = Instant::now();
    while !machine.shell(INSTANCES)?.text().is_empty() {
        ensure!(begun.elapsed() < Duration::from_secs(20), "the instance stays\n{}", agent_log(machine));
    }
    Ok(begun.elapsed())
}

#[test]
fn agent_cleans_up_however_a_session_ends() -> Result<()> {
    let turn = turn()?;
    let dir = tempfile::tempdir()?;
    let control = dir.path().join("control.sock");
    let machine = boot(&turn, Kernel::V6_12, dir.path(), &[])?;
    machine.shell(START)?.ok()?;

    let second = machine.shell("sleep 1; pidof vtrace; vtrace agent 2>&1")?;
    let text = second.text();
    let (first, said) = text.split_once('\n').context("a process, then words")?;
    ensure!(second.status == 1 && said.contains("in use") && said.contains(&format!("process {first}")), "{text}");

    // First no host is connected, then one that says nothing: no thread wakes up.
    let before = wake_ups(&machine)?;
    std::thread::sleep(Duration::from_secs(3));
    let without_host = wake_ups(&machine)? - before;
    let (mut host, _) = Host::meet(&control)?;
    let before = wake_ups(&machine)?;
    std::thread::sleep(Duration::from_secs(3));
    let idle = wake_ups(&machine)? - before;
    host.arm(&["sched:sched_wakeup_new"])?;
    let before = wake_ups(&machine)?;
    std::thread::sleep(Duration::from_secs(3));
    let armed = wake_ups(&machine)? - before;
    println!("wake-ups in 3 s: {without_host} without a host, {idle} idle, {armed} armed");
    ensure!((without_host, idle) == (0, 0));

    // The host vanishes. No data port is connected, so pages of a running session would wait in a blocked splice.
    host.ask(&ToAgent::Start { marker: "begin".into() })?;
    drop(host);
    println!("instance gone {:?} after the host", await_no_instance(&machine)?);

    // The splice of a lane waits for a host that never comes; the session is closed all the same.
    let (mut host, _) = Host::meet(&control)?;
    host.arm(&["sched", "syscalls"])?;
    host.ask(&ToAgent::Start { marker: "begin".into() })?;
    machine.shell("i=0; while [ $i -lt 30 ]; do /bin/true; i=$((i+1)); done")?.ok()?;
    host.say(&ToAgent::Stop)?;
    let pong = host.ask(&ToAgent::Ping { id: 5 })?;
    ensure!(pong == FromAgent::Pong { id: 5 }, "stopping does not wait for the ports: {pong:?}");
    let begun = Instant::now();
    ensure!(host.ask(&ToAgent::Close)? == FromAgent::Closed);
    println!("blocked lanes abandoned in {:?}", begun.elapsed());
    ensure!(machine.shell(INSTANCES)?.text().is_empty());

    // Killed in a session, then started again; then asked to end in a session.
    host.arm(&["sched"])?;
    machine.shell("kill -9 $(pidof vtrace)")?.ok()?;
    ensure!(!machine.shell(INSTANCES)?.text().is_empty(), "a killed agent cannot clean up");
    drop(host);
    machine.shell(START)?.ok()?;
    await_no_instance(&machine)?;
    let (mut host, _) = Host::meet(&control)?;
    host.arm(&["sched"])?;
    host.ask(&ToAgent::Start { marker: "begin".into() })?;
    machine.shell("kill $(pidof vtrace)")?.ok()?;
    await_no_instance(&machine)?;
    ensure!(machine.shell("sleep 0.5; pidof vtrace")?.status == 1, "it has ended");
    println!("{}", agent_log(&machine));
    Ok(())
}

#[test]
fn driver_without_indirect_descriptors_is_refused() -> Result<()> {
    let turn = turn()?;
    let dir = tempfile::tempdir()?;
    let machine = boot(&turn, Kernel::V6_12, dir.path(), &["-global", "virtio-serial-pci.indirect_desc=off"])?;
    machine.shell(START)?.ok()?;
    let (mut host, _) = Host::meet(&dir.path().join("control.sock"))?;
    match host.ask(&ToAgent::Arm(Box::default()))? {
        FromAgent::Failed(failure) => ensure!(failure.kind == FailureKind::NoIndirect, "{failure:?}"),
        other => bail!("{other:?}"),
    }
    ensure!(machine.shell(INSTANCES)?.text().is_empty());
    Ok(())
}
