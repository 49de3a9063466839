//! A file that takes nothing for a while, and sub-buffers of another size: the guest runs on, its ring buffers take up
//! what they can, and every figure that is told afterwards is the guest's kernel's own.

use std::{
    process::Child,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use vtrace_dp::tracefs::stats::Stats;
use vtrace_tests::{
    disk::Disk,
    judge::trace_cmd,
    recording::{Recorder, Recording},
    server::Server,
};
use xtask::{
    kernel::Kernel,
    machine::{Machine, Turn, turn},
};

const GUEST: &str = "guest1";
const CPUS: usize = 2;
/// Markers that each CPU writes, 4 to a page of 4 KiB: twice what a lane's pipe and ring can hold (32 MiB).
const MARKERS: u64 = 65_000;
/// Numbered markers of 900 bytes in /tmp/markers. `mark CPU` writes them into the recording's buffer.
const PREPARE: &str = r#"
seq 100000 164999 | awk -v pad=$(printf '%0885d' 0) '{ printf "number=%s %s\n", $1, pad }' > /tmp/markers
cat > /bin/mark <<END
#!/bin/sh
taskset \$((1 << \$1)) dd if=/tmp/markers of=\$(ls -d /sys/kernel/tracing/instances/vtrace*)/trace_marker bs=900 2>/tmp/dd\$1
touch /tmp/written\$1
END
chmod +x /bin/mark
stat -c %s /tmp/markers"#;
/// Nothing of the guest's own comes between the markers: this event does not happen.
const NOTHING: &str = "-e sched:sched_process_hang";

fn boot(turn: &Turn, server: &Server) -> Result<Machine> {
    let machine = Machine::builder(turn, Kernel::V6_12).memory_mb(768).vhost_user(&server.socket(GUEST)).boot()?;
    server.await_agent(GUEST)?;
    assert_eq!(machine.shell(PREPARE)?.ok()?.trim(), (MARKERS * 900).to_string());
    Ok(machine)
}

fn signal(pid: u32, signal: Signal) -> Result<()> {
    Ok(kill(Pid::from_raw(i32::try_from(pid)?), signal)?)
}

/// Waits until the guest traces.
fn await_tracing(machine: &Machine) -> Result<()> {
    let begun = Instant::now();
    while machine.shell("cat /sys/kernel/tracing/instances/vtrace*/tracing_on")?.text() != "1" {
        ensure!(begun.elapsed() < Duration::from_secs(30), "the guest does not trace");
    }
    // The marker of the start is on its way.
    sleep(Duration::from_millis(500));
    Ok(())
}

/// All CPUs write their markers at once. How long that took, and what the guest's kernel has counted then.
fn write_markers(machine: &Machine) -> Result<(Duration, Vec<Stats>)> {
    let begun = Instant::now();
    machine.shell("rm -f /tmp/written*; for cpu in 0 1; do mark $cpu </dev/null >/dev/null 2>&1 & done")?.ok()?;
    while machine.shell("ls /tmp/written0 /tmp/written1")?.status != 0 {
        ensure!(begun.elapsed() < Duration::from_secs(40), "the guest's writers are held up");
        sleep(Duration::from_millis(50));
    }
    let took = begun.elapsed();
    for cpu in 0..CPUS {
        let said = machine.shell(&format!("cat /tmp/dd{cpu}"))?.text();
        ensure!(said.contains(&format!("{MARKERS}+0 records out")), "every marker was written: {said}");
    }
    let stats = (0..CPUS).map(|cpu| {
        let text = machine.shell(&format!("cat /sys/kernel/tracing/instances/vtrace*/per_cpu/cpu{cpu}/stats"))?.text();
        Ok(Stats::parse(&text)?)
    });
    Ok((took, stats.collect::<Result<_>>()?))
}

/// What stock trace-cmd shows of one CPU.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Shown {
    /// Event lines.
    events: u64,
    /// Numbered markers.
    markers: u64,
    /// `[N EVENTS DROPPED]`, summed up.
    dropped: u64,
    /// Of those: events from before the first marker, which have no number.
    unnumbered: u64,
}

/// Reads a report. Where numbers are missing between two markers, the line in between has to say how many.
fn shown(report: &str) -> Result<Vec<Shown>> {
    let (mut all, mut last, mut dropped) = (vec![Shown::default(); CPUS], vec![99_999; CPUS], vec![0; CPUS]);
    for line in report.lines() {
        if let Some((cpu, count)) = line.strip_prefix("CPU:").and_then(|rest| rest.split_once(" [")) {
            let Some(count) = count.strip_suffix(" EVENTS DROPPED]") else { continue };
            dropped[cpu.parse::<usize>()?] = count.parse()?;
            continue;
        }
        let Some(cpu) = (0..CPUS).find(|cpu| line.contains(&format!(" [{cpu:03}] "))) else { continue };
        all[cpu].events += 1;
        let Some((_, rest)) = line.split_once("number=") else { continue };
        let number: u64 = rest.split(' ').next().context("a number")?.parse()?;
        let (missing, said) = (number - last[cpu] - 1, std::mem::take(&mut dropped[cpu]));
        if all[cpu].markers == 0 && said > missing {
            all[cpu].unnumbered = said - missing;
        } else {
            ensure!(said == missing, "{} to {number}: {said} dropped", last[cpu]);
        }
        all[cpu].markers += 1;
        all[cpu].dropped += said;
        last[cpu] = number;
    }
    // The last ones written are the last ones there: nothing after them is overwritten.
    ensure!(last.iter().all(|number| *number == 99_999 + MARKERS), "{last:?}");
    Ok(all)
}

/// File, table and `--json` say what the kernel said.
fn every_figure_is_the_kernels(recording: &Recording, counted: &[Stats]) -> Result<()> {
    let file = recording.file(GUEST);
    let shown = shown(&trace_cmd(&["report"], &[&file])?)?;
    let said = trace_cmd(&["report", "--stat"], &[&file])?;
    for (cpu, (shown, stats)) in shown.iter().zip(counted).enumerate() {
        let lane = &recording.machine(GUEST)?["lanes"][cpu];
        let figure = |name: &str| lane[name].as_u64().with_context(|| format!("{name} of {lane}"));
        assert_eq!(figure("events_lost")?, stats.lost(), "{lane}\n{stats:?}");
        assert_eq!((shown.events, shown.dropped), (figure("events")?, stats.lost()), "{lane}");
        assert_eq!(shown.markers + stats.lost(), MARKERS + shown.unnumbered, "every marker was read or overwritten");
        assert!(shown.unnumbered < 10, "{shown:?}");
        assert_eq!((figure("pages_in")?, figure("pages_lost")?), (figure("pages_out")?, 0), "{lane}");
        let text = said.split(&format!("CPU: {cpu}\n")).nth(1).context("statistics of each CPU")?;
        let kept = Stats::parse(text.split("\nCPU: ").next().unwrap_or_default())?;
        assert_eq!((kept.overrun, kept.lost()), (stats.overrun, stats.lost()), "what the file keeps");
        assert_eq!((kept.entries, kept.read_events), (0, shown.events), "what the file keeps");
    }
    Ok(())
}

/// Ends a recording by hand.
fn end(recorder: &Recorder, child: Child) -> Result<Recording> {
    signal(child.id(), Signal::SIGINT)?;
    recorder.finish(child)
}

#[test]
fn guest_runs_on_while_its_file_takes_nothing_and_every_figure_is_its_kernels() -> Result<()> {
    let (disk, server) = (Disk::ext4(1 << 30)?, Server::start(&[GUEST])?);
    let turn = turn()?;
    let machine = boot(&turn, &server)?;
    let recorder = Recorder { server: server.dir(), folder: disk.path() };
    let begin = |words: &str| -> Result<Child> {
        let child = recorder.start(&format!("--strict {words} {NOTHING}"))?;
        await_tracing(&machine)?;
        Ok(child)
    };

    // Nothing in the way, sub-buffers of 64 KiB.
    let child = begin(&format!("--dom {GUEST} -b 8192 --subbuf-size 64"))?;
    let (took_freely, counted) = write_markers(&machine)?;
    let recording = end(&recorder, child)?;
    println!("{took_freely:?} {counted:?}\n{:#}", recording.summary);
    every_figure_is_the_kernels(&recording, &counted)?;

    // A disk that hangs: the server waits within its write.
    let child = begin(&format!("--sink buffered --dom {GUEST} -b 256"))?;
    let frozen = disk.freeze()?;
    let (took, counted) = write_markers(&machine)?;
    println!("{took:?} {counted:?}");
    ensure!(
        counted.iter().all(|stats| stats.overrun > MARKERS / 10),
        "it took no more than it could hold: {counted:?}"
    );
    ensure!(took < 3 * took_freely, "the guest's writers were held up: {took:?}, freely {took_freely:?}");
    ensure!(server.list().is_ok(), "the server talks to others meanwhile");
    drop(frozen);
    let recording = end(&recorder, child)?;
    assert_eq!(recording.status, 3, "{}\n{:#}", recording.said, recording.summary);
    every_figure_is_the_kernels(&recording, &counted)?;

    // A server that is stopped, writing past the page cache.
    let child = begin(&format!("--sink direct --dom {GUEST} -b 256"))?;
    signal(server.pid(), Signal::SIGSTOP)?;
    let (took, counted) = write_markers(&machine)?;
    ensure!(
        counted.iter().all(|stats| stats.overrun > MARKERS / 10),
        "it took no more than it could hold: {counted:?}"
    );
    ensure!(took < 3 * took_freely, "the guest's writers were held up: {took:?}, freely {took_freely:?}");
    signal(server.pid(), Signal::SIGCONT)?;
    let recording = end(&recorder, child)?;
    assert_eq!(recording.status, 3, "{}\n{:#}", recording.said, recording.summary);
    every_figure_is_the_kernels(&recording, &counted)
}
