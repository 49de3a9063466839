//! The pump over this machine's tracefs, with pipes and sockets as ports. Without privilege: said, and nothing tested.

use std::{
    fs::File,
    io::Read,
    os::unix::net::UnixStream,
    sync::atomic::{AtomicU32, Ordering},
    time::Instant,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::prctl,
    unistd::Pid,
};
use vtrace_common::{ids::Cpu, page::Header, wire::agent::Arm};

use super::*;
use crate::tracefs::{INSTANCE_PREFIX, Instance, Tracefs, stats::Stats};

fn instance(buffer_kb: u32) -> Option<Instance> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let tracefs = Tracefs::find_or_mount().ok().filter(|_| nix::unistd::geteuid().is_root());
    let Some(tracefs) = tracefs else {
        println!("skipped: tracefs is not writable here");
        return None;
    };
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = format!("{INSTANCE_PREFIX}{}-pump{count}", std::process::id());
    Some(tracefs.arm(&name, &Arm { buffer_kb, ..Arm::default() }).unwrap())
}

/// A pump over every CPU of `instance`, and what comes out of each port.
fn pump(instance: &Instance, mut port: impl FnMut() -> (OwnedFd, OwnedFd), tee: Option<&Path>) -> (Pump, Vec<OwnedFd>) {
    let mut lanes = Vec::new();
    let mut outlets = Vec::new();
    for cpu in instance.cpus() {
        let (inlet, outlet) = port();
        lanes.push((instance.tap(*cpu).unwrap(), inlet));
        outlets.push(outlet);
    }
    (Pump::start(lanes, instance.page_bytes(), tee).unwrap(), outlets)
}

fn pipe_port() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    (writer, reader)
}

fn socket_port() -> (OwnedFd, OwnedFd) {
    let (inlet, outlet) = UnixStream::pair().unwrap();
    (inlet.into(), outlet.into())
}

fn readers(outlets: Vec<OwnedFd>) -> Vec<JoinHandle<Vec<u8>>> {
    let read = |outlet: OwnedFd| {
        let mut bytes = Vec::new();
        File::from(outlet).read_to_end(&mut bytes).unwrap();
        bytes
    };
    outlets.into_iter().map(|outlet| std::thread::spawn(move || read(outlet))).collect()
}

fn marks(instance: &Instance, count: usize) {
    instance.set_tracing(true).unwrap();
    let text = "m".repeat(900);
    for _ in 0..count {
        instance.mark(&text).unwrap();
    }
    instance.set_tracing(false).unwrap();
}

fn is_done(pump: &Pump, wait: Duration) -> bool {
    let mut fds = [PollFd::new(pump.done(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::try_from(wait).unwrap()).unwrap() == 1
}

fn what_is_tapped_is_received(port: fn() -> (OwnedFd, OwnedFd)) {
    let Some(instance) = instance(4096) else { return };
    let copies = tempfile::tempdir().unwrap();
    let (pump, outlets) = pump(&instance, port, Some(copies.path()));
    let readers = readers(outlets);
    marks(&instance, 3001);
    pump.drain();
    assert!(is_done(&pump, Duration::from_secs(20)));
    let ends = pump.join().unwrap();
    let received: Vec<Vec<u8>> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();

    let page_bytes = usize::try_from(instance.page_bytes()).unwrap();
    let mut events_read = 0;
    for (end, received) in ends.iter().zip(&received) {
        assert_eq!((end.trouble.as_str(), end.ledger.pages_lost), ("", 0));
        assert_eq!(u64::try_from(received.len()).unwrap(), end.ledger.bytes_out);
        assert_eq!(end.ledger.bytes_out, end.ledger.pages_out * u64::try_from(page_bytes).unwrap());
        assert!(received.chunks(page_bytes).all(|page| Header::parse(page, page_bytes).unwrap().data_bytes > 0));
        assert_eq!(&std::fs::read(copies.path().join(format!("{}.raw", end.cpu))).unwrap(), received);
        let stats = Stats::parse(&instance.stats(end.cpu)).unwrap();
        assert_eq!((stats.entries, stats.overrun), (0, 0), "the ring buffer of {} is empty", end.cpu);
        events_read += stats.read_events;
    }
    assert_eq!(events_read, 3001);
    assert!(ends.iter().map(|end| end.ledger.pages_out).sum::<u64>() >= 3001 / 4);
    instance.remove().unwrap();
}

#[test]
fn what_is_tapped_is_received_over_pipes() {
    what_is_tapped_is_received(pipe_port);
}

#[test]
fn what_is_tapped_is_received_over_sockets() {
    what_is_tapped_is_received(socket_port);
}

#[test]
fn pages_larger_than_the_smallest_pipe_are_moved_whole() {
    for page_kib in [64, 512] {
        let Some(instance) = instance(4096) else { return };
        if std::fs::write(instance.path().join("buffer_subbuf_size_kb"), page_kib.to_string()).is_err() {
            return println!("skipped: this kernel has pages of 4 KiB only");
        }
        let page_bytes: usize = page_kib << 10;
        let lane = |cpu: &Cpu| {
            let (inlet, outlet) = pipe_port();
            ((instance.tap(*cpu).unwrap(), inlet), outlet)
        };
        let (lanes, outlets) = instance.cpus().iter().map(lane).unzip();
        let pump = Pump::start(lanes, u32::try_from(page_bytes).unwrap(), None).unwrap();
        let readers = readers(outlets);
        marks(&instance, 3000);
        pump.drain();
        let ends = pump.join().unwrap();
        let mut data_bytes_max = 0;
        for (end, reader) in ends.iter().zip(readers) {
            let received = reader.join().unwrap();
            assert_eq!((end.trouble.as_str(), end.ledger.pages_lost), ("", 0));
            assert_eq!(end.ledger.pages_out, u64::try_from(received.len() / page_bytes).unwrap());
            for page in received.chunks(page_bytes) {
                data_bytes_max = data_bytes_max.max(Header::parse(page, page_bytes).unwrap().data_bytes);
            }
        }
        assert!(usize::try_from(data_bytes_max).unwrap() > page_bytes * 9 / 10, "pages are as large as was asked for");
        assert!(ends.iter().map(|end| end.ledger.bytes_out).sum::<u64>() >= 3000 * 900);
        instance.remove().unwrap();
    }
}

#[test]
fn lone_event_arrives_with_the_drain() {
    let Some(instance) = instance(0) else { return };
    let (pump, outlets) = pump(&instance, pipe_port, None);
    let readers = readers(outlets);
    marks(&instance, 1);
    pump.drain();
    let ends = pump.join().unwrap();
    assert_eq!(
        ends.iter()
            .map(|end| (end.ledger.pages_out, end.ledger.pages_lost))
            .fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1)),
        (1, 0)
    );
    let pages: Vec<Vec<u8>> =
        readers.into_iter().map(|reader| reader.join().unwrap()).filter(|b| !b.is_empty()).collect();
    assert_eq!(pages.len(), 1);
    assert!(pages[0].windows(900).any(|window| window.iter().all(|byte| *byte == b'm')));
}

#[test]
fn ports_that_take_nothing_are_abandoned_with_their_pages_counted() {
    let Some(instance) = instance(4096) else { return };
    let (pump, outlets) = pump(&instance, pipe_port, None);
    marks(&instance, 3000);
    pump.drain();
    assert!(!is_done(&pump, Duration::from_millis(300)), "64 KiB of pipe cannot take 3 MB");
    let begun = Instant::now();
    pump.order(Order::Abandon);
    let ends = pump.join().unwrap();
    assert!(begun.elapsed() < CANCEL_WAIT, "cancelling works, it was not given up: {:?}", begun.elapsed());
    println!("abandoned after {:?}: {ends:?}", begun.elapsed());
    assert!(ends.iter().any(|end| end.ledger.pages_lost > 0));
    assert!(ends.iter().all(|end| end.ledger.pages_in == end.ledger.pages_out + end.ledger.pages_lost));
    drop(outlets);
    instance.remove().unwrap();
}

#[test]
fn lane_whose_host_vanishes_ends_with_its_reason() {
    let Some(instance) = instance(4096) else { return };
    let (pump, outlets) = pump(&instance, pipe_port, None);
    drop(outlets);
    marks(&instance, 3000);
    pump.drain();
    let ends = pump.join().unwrap();
    let ended: Vec<&LaneEnd> = ends.iter().filter(|end| !end.trouble.is_empty()).collect();
    assert!(!ended.is_empty());
    for end in ended {
        assert!(end.trouble.contains("EPIPE"), "{}", end.trouble);
        assert!(end.ledger.pages_out == 0 && end.ledger.pages_lost == end.ledger.pages_in && end.ledger.pages_lost > 0);
    }
    instance.remove().unwrap();
}

#[test]
fn nothing_of_a_dropped_pump_stays() {
    let Some(instance) = instance(0) else { return };
    for _ in 0..20 {
        let (pump, _outlets) = pump(&instance, pipe_port, None);
        marks(&instance, 50);
        drop(pump);
    }
    instance.remove().unwrap();
}

/// The threads of the pump that `start` starts. They inherit a timer slack that no other thread has.
fn threads_of<T>(start: impl FnOnce() -> T) -> (T, Vec<String>) {
    static SLACK_NS: AtomicU32 = AtomicU32::new(50_001);
    let slack_ns = SLACK_NS.fetch_add(1, Ordering::Relaxed);
    let before = prctl::get_timerslack().unwrap();
    prctl::set_timerslack(slack_ns.into()).unwrap();
    let started = start();
    prctl::set_timerslack(u64::try_from(before).unwrap()).unwrap();
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let threads = threads.map(|thread| thread.unwrap().file_name().into_string().unwrap()).filter(|thread| {
        let slack = std::fs::read_to_string(format!("/proc/{thread}/timerslack_ns"));
        slack.is_ok_and(|slack| slack.trim() == slack_ns.to_string())
    });
    (started, threads.collect())
}

/// How often they have been woken up, or made to wait for a CPU.
fn switches(threads: &[String]) -> u64 {
    let each = |thread: &String| {
        let status = std::fs::read_to_string(format!("/proc/self/task/{thread}/status")).unwrap();
        let counts = status.lines().filter_map(|line| line.split_once("voluntary_ctxt_switches:"));
        counts.map(|(_, count)| count.trim().parse::<u64>().unwrap()).sum::<u64>()
    };
    threads.iter().map(each).sum()
}

/// Waits until they sleep, then watches them do so.
fn sleep_through(threads: &[String]) {
    let begun = Instant::now();
    let mut before = switches(threads);
    loop {
        std::thread::sleep(Duration::from_millis(300));
        let now = switches(threads);
        if now == before {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "{} wake-ups in 300 ms", now - before);
        before = now;
    }
}

#[test]
fn quiet_lanes_and_blocked_lanes_wake_no_thread() {
    let Some(instance) = instance(4096) else { return };
    instance.set_tracing(true).unwrap();
    let ((pump, outlets), threads) = threads_of(|| pump(&instance, pipe_port, None));
    assert_eq!(threads.len(), 1, "a thread is enough for {} lanes", outlets.len());
    sleep_through(&threads);
    marks(&instance, 3000);
    sleep_through(&threads);
    assert!(!is_done(&pump, Duration::ZERO));
    drop((pump, outlets));
    instance.remove().unwrap();
}

fn entries(instance: &Instance, cpu: Cpu) -> u64 {
    Stats::parse(&instance.stats(cpu)).unwrap().entries
}

#[test]
fn full_port_holds_up_no_other_lane() {
    let Some(instance) = instance(4096) else { return };
    let [full, free] = instance.cpus()[..2] else { return println!("skipped: one CPU") };
    let (pump, mut outlets) = pump(&instance, pipe_port, None);
    let home = sched_getaffinity(Pid::from_raw(0)).unwrap();
    for cpu in [full, free] {
        let mut there = CpuSet::new();
        there.set(usize::try_from(cpu.0).unwrap()).unwrap();
        sched_setaffinity(Pid::from_raw(0), &there).unwrap();
        marks(&instance, 2000);
    }
    sched_setaffinity(Pid::from_raw(0), &home).unwrap();
    let unread = outlets.remove(0);
    let readers = readers(outlets);
    pump.drain();
    let begun = Instant::now();
    while entries(&instance, free) > 0 {
        assert!(begun.elapsed() < Duration::from_secs(20), "{free} waits for {full}");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!is_done(&pump, Duration::ZERO) && entries(&instance, full) > 0);
    pump.order(Order::Abandon);
    let ends = pump.join().unwrap();
    assert!(
        ends[0].ledger.pages_lost > 0 && ends[1].ledger.pages_lost == 0 && ends[1].ledger.pages_out > 400,
        "{ends:?}"
    );
    drop(unread);
    readers.into_iter().for_each(|reader| drop(reader.join().unwrap()));
    instance.remove().unwrap();
}

#[test]
fn many_lanes_are_shared_among_threads_and_their_ends_keep_their_order() {
    let Some(first) = instance(64) else { return };
    let mut instances = vec![first];
    while instances.len() * instances[0].cpus().len() < 3 * LANES_A_THREAD / 2 {
        instances.push(instance(64).unwrap());
    }
    let (lanes, outlets): (Vec<_>, Vec<_>) = instances
        .iter()
        .flat_map(|instance| instance.cpus().iter().map(|cpu| instance.tap(*cpu).unwrap()))
        .map(|tap| {
            let (inlet, outlet) = pipe_port();
            ((tap, inlet), outlet)
        })
        .unzip();
    let cpus: Vec<Cpu> = lanes.iter().map(|(tap, _): &(Tap, OwnedFd)| tap.cpu).collect();
    let (pump, threads) = threads_of(|| Pump::start(lanes, instances[0].page_bytes(), None).unwrap());
    assert_eq!(threads.len(), cpus.len().div_ceil(LANES_A_THREAD));
    instances.iter().for_each(|instance| marks(instance, 9));
    assert!(!is_done(&pump, Duration::from_millis(50)));
    let readers = readers(outlets);
    pump.drain();
    assert!(is_done(&pump, Duration::from_secs(20)));
    let ends = pump.join().unwrap();
    assert_eq!(ends.iter().map(|end| end.cpu).collect::<Vec<_>>(), cpus);
    for (end, reader) in ends.iter().zip(readers) {
        assert_eq!(
            (end.ledger.pages_lost, end.ledger.bytes_out),
            (0, u64::try_from(reader.join().unwrap().len()).unwrap())
        );
    }
    assert!(ends.iter().map(|end| end.ledger.pages_out).sum::<u64>() >= u64::try_from(instances.len()).unwrap());
    instances.into_iter().for_each(|instance| instance.remove().unwrap());
}

#[test]
fn no_thread_has_more_than_its_lanes_until_there_are_threads_enough() {
    assert_eq!([1, 2, 8].map(share), [1, 2, 8]);
    assert_eq!([9, 16, 17].map(share), [5, 8, 6]);
    assert_eq!([64, 65, 126].map(share), [8, 9, 16]);
    assert!((1..=126usize).all(|lanes| lanes.div_ceil(share(lanes)) <= THREADS_MAX));
}

#[test]
fn copy_that_cannot_be_made_is_refused_at_the_start() {
    let Some(instance) = instance(0) else { return };
    let lanes = vec![(instance.tap(instance.cpus()[0]).unwrap(), pipe_port().0)];
    let error = Pump::start(lanes, instance.page_bytes(), Some(Path::new("/nowhere"))).unwrap_err();
    assert!(error.object.starts_with("/nowhere/cpu"), "{error}");
}

#[test]
fn lane_that_joins_a_running_pump_is_moved_and_drained_like_the_others() {
    let Some(instance) = instance(4096) else { return };
    let [first, late @ ..] = instance.cpus() else { panic!("no CPU") };
    // As many more of an instance of their own that all threads have their share, and one is started for the rest.
    let others: Vec<Instance> =
        (0..=LANES_A_THREAD / instance.cpus().len()).map(|_| self::instance(64).unwrap()).collect();
    let taps = others.iter().flat_map(|other| other.cpus().iter().map(|cpu| other.tap(*cpu).unwrap()));
    let taps: Vec<Tap> = late.iter().map(|cpu| instance.tap(*cpu).unwrap()).chain(taps).collect();
    let count = taps.len();
    let (inlet, outlet) = pipe_port();
    let lanes = vec![(instance.tap(*first).unwrap(), inlet)];
    let ((pump, mut outlets), threads) = threads_of(|| {
        let mut pump = Pump::start(lanes, instance.page_bytes(), None).unwrap();
        let join = |tap| {
            let (inlet, outlet) = pipe_port();
            pump.join_lane((tap, inlet)).unwrap();
            outlet
        };
        let outlets: Vec<OwnedFd> = taps.into_iter().map(join).collect();
        (pump, outlets)
    });
    outlets.insert(0, outlet);
    assert_eq!(threads.len(), (count + 1).div_ceil(LANES_A_THREAD));
    sleep_through(&threads);
    let readers = readers(outlets);
    marks(&instance, 3000);
    others.iter().for_each(|other| marks(other, 9));
    pump.drain();
    assert!(is_done(&pump, Duration::from_secs(20)));
    let ends = pump.join().unwrap();
    let sent: u64 = ends.iter().map(|end| end.ledger.bytes_out).sum();
    assert!(
        ends.len() == count + 1 && ends.iter().all(|end| end.trouble.is_empty() && end.ledger.pages_lost == 0),
        "{ends:?}"
    );
    let received: usize = readers.into_iter().map(|reader| reader.join().unwrap().len()).sum();
    assert_eq!(sent, u64::try_from(received).unwrap());
    let read = |instance: &Instance, cpu: &Cpu| Stats::parse(&instance.stats(*cpu)).unwrap().read_events;
    let events: u64 = std::iter::once(&instance)
        .chain(&others)
        .flat_map(|instance| instance.cpus().iter().map(move |cpu| read(instance, cpu)))
        .sum();
    assert_eq!(events, 3000 + 9 * u64::try_from(others.len()).unwrap());
    instance.remove().unwrap();
    others.into_iter().for_each(|other| other.remove().unwrap());
}

#[test]
fn lane_cannot_join_a_pump_that_has_ended() {
    let Some(instance) = instance(0) else { return };
    let (mut pump, _outlets) = pump(&instance, pipe_port, None);
    pump.drain();
    assert!(is_done(&pump, Duration::from_secs(20)));
    while !pump.threads.iter().all(|thread| thread.handle.is_finished()) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let tap = instance.tap(instance.cpus()[0]).unwrap();
    let refused = pump.join_lane((tap, pipe_port().0)).unwrap_err();
    assert_eq!(refused.object, "the pump has ended");
    drop(pump);
    instance.remove().unwrap();
}
