//! The pump over this machine's tracefs, with pipes and sockets as ports. Without privilege: said, and nothing tested.

use std::{
    fs::File,
    io::Read,
    os::unix::net::UnixStream,
    sync::atomic::{AtomicU32, Ordering},
    time::Instant,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vtrace_common::{page::Header, wire::agent::Arm};

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
        assert_eq!((end.trouble.as_str(), end.pages_lost), ("", 0));
        assert_eq!(u64::try_from(received.len()).unwrap(), end.bytes_sent);
        assert_eq!(end.bytes_sent, end.pages_sent * u64::try_from(page_bytes).unwrap());
        assert!(received.chunks(page_bytes).all(|page| Header::parse(page, page_bytes).unwrap().data_bytes > 0));
        assert_eq!(&std::fs::read(copies.path().join(format!("{}.raw", end.cpu))).unwrap(), received);
        let stats = Stats::parse(&instance.stats(end.cpu)).unwrap();
        assert_eq!((stats.entries, stats.overrun), (0, 0), "the ring buffer of {} is empty", end.cpu);
        events_read += stats.read_events;
    }
    assert_eq!(events_read, 3001);
    assert!(ends.iter().map(|end| end.pages_sent).sum::<u64>() >= 3001 / 4);
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
fn lone_event_arrives_with_the_drain() {
    let Some(instance) = instance(0) else { return };
    let (pump, outlets) = pump(&instance, pipe_port, None);
    let readers = readers(outlets);
    marks(&instance, 1);
    pump.drain();
    let ends = pump.join().unwrap();
    assert_eq!(
        ends.iter().map(|end| (end.pages_sent, end.pages_lost)).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1)),
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
    assert!(ends.iter().any(|end| end.pages_lost > 0));
    assert!(ends.iter().all(|end| end.pages_tapped == end.pages_sent + end.pages_lost));
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
        assert!(end.pages_sent == 0 && end.pages_lost == end.pages_tapped && end.pages_lost > 0);
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

#[test]
fn copy_that_cannot_be_made_is_refused_at_the_start() {
    let Some(instance) = instance(0) else { return };
    let lanes = vec![(instance.tap(instance.cpus()[0]).unwrap(), pipe_port().0)];
    let error = Pump::start(lanes, instance.page_bytes(), Some(Path::new("/nowhere"))).unwrap_err();
    assert!(error.object.starts_with("/nowhere/cpu"), "{error}");
}
