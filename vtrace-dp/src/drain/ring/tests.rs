//! The worker between a driver that runs in this process and a file.

#![expect(clippy::cast_possible_truncation, reason = "the numbers of these tests are small")]

use std::{
    os::unix::fs::FileExt,
    sync::{atomic::Ordering, mpsc},
    thread,
    time::{Duration, Instant},
};

use vtrace_common::{ledger::Ledger, limits::MEMORY_REGIONS_MAX};

use super::*;
use crate::{
    sys::write_all::Written,
    virtq::{
        memory::{Batch, Span},
        testing::{Driver, descriptor, guest_memory, memory_file, region, sealed_file},
    },
};

const PAGE: u32 = 4096;
const BUFFER: u32 = 64 << 10;
const ENTRIES: u16 = 64;
const AREA: u64 = 64 << 20;

/// A drain, the drivers of its guest, and the file it writes.
struct DrainBench {
    drain: RingDrain,
    memory: Arc<Memory>,
    drivers: Vec<Driver>,
    file: File,
}

fn footprint() -> u64 {
    Driver::footprint(ENTRIES, BUFFER).next_multiple_of(u64::from(PAGE))
}

fn area(cpu: u32) -> Area {
    Area { cpu: Cpu(cpu), offset: u64::from(PAGE) + AREA * u64::from(cpu), bytes_max: AREA, begins_again: false }
}

/// A valid page, different for each CPU and number.
fn page(cpu: u32, number: u32) -> Vec<u8> {
    let mut page = vec![0; PAGE as usize];
    for (at, word) in page.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(u64::from(cpu) << 48 | u64::from(number) << 16 | at as u64).to_le_bytes());
    }
    page[8..16].copy_from_slice(&4000u64.to_le_bytes());
    page
}

fn pages(cpu: u32, numbers: std::ops::Range<u32>) -> Vec<u8> {
    numbers.flat_map(|number| page(cpu, number)).collect()
}

fn end(cpu: u32, bytes: u64) -> LaneSent {
    LaneSent { cpu: Cpu(cpu), bytes_out: bytes }
}

impl DrainBench {
    /// `cpus` lanes; the rings run.
    fn new(cpus: u32) -> Self {
        let memory = guest_memory(&[(0, footprint() * u64::from(cpus.max(1)))]);
        let driver =
            |cpu| Driver::new(Arc::clone(&memory), footprint() * u64::from(cpu), ENTRIES, BUFFER, cpu % 2 == 0);
        let drivers = (0..cpus).map(driver).collect();
        let drain = RingDrain::spawn(GuestId(0), "test").unwrap();
        let bench = Self { drain, memory, drivers, file: memory_file(0).unwrap() };
        (0..cpus).for_each(|cpu| bench.start(cpu, 0));
        bench
    }

    /// The same, with lanes.
    fn attached(cpus: u32) -> Self {
        let bench = Self::new(cpus);
        bench.attach();
        bench
    }

    fn start(&self, cpu: u32, base: u16) {
        let setup = self.drivers[cpu as usize].setup(base);
        self.drain.ring_started(Cpu(cpu), Ring::start(setup, Arc::clone(&self.memory)).unwrap());
    }

    fn attach(&self) {
        let areas = (0..self.drivers.len() as u32).map(area).collect();
        self.drain.attach(self.file.try_clone().unwrap(), PAGE, areas).unwrap();
    }

    fn finish(&self, ends: Vec<LaneSent>, wait_ms_max: u32) -> Vec<LaneLedger> {
        let (done, ledgers) = mpsc::channel();
        self.drain.finish(ends, wait_ms_max, Box::new(move |lanes| done.send(lanes).unwrap()));
        ledgers.recv_timeout(Duration::from_secs(20)).expect("finish answers")
    }

    fn content(&self, cpu: u32, bytes: usize) -> Vec<u8> {
        let mut content = vec![0; bytes];
        self.file.read_exact_at(&mut content, area(cpu).offset).unwrap();
        content
    }

    fn send(&mut self, cpu: u32, bytes: &[u8]) {
        self.drivers[cpu as usize].send_blocking(bytes, PAGE);
    }
}

#[test]
fn pages_of_several_lanes_arrive_byte_for_byte_in_their_areas() {
    let mut bench = DrainBench::attached(4);
    let mut drivers = std::mem::take(&mut bench.drivers);
    thread::scope(|scope| {
        for (cpu, driver) in (0..).zip(&mut drivers) {
            scope.spawn(move || {
                let stream = pages(cpu, 0..1200);
                // Chains and segments of all sizes, pages cut anywhere.
                let (mut rest, mut size) = (&stream[..], 1);
                while !rest.is_empty() {
                    let (chain, after) = rest.split_at(size.min(rest.len()));
                    driver.send_blocking(chain, 1 + (size as u32 % 8000).max(size as u32 / 400));
                    size = (size * 7 + 4099) % BUFFER as usize + 1;
                    rest = after;
                }
            });
        }
    });
    let bytes = 1200 * u64::from(PAGE);
    let ledgers = bench.finish((0..4).map(|cpu| end(cpu, bytes)).collect(), 10_000);
    let ledger = Ledger { pages_in: 1200, pages_out: 1200, bytes_out: bytes, ..Ledger::default() };
    for (cpu, counts) in (0..).zip(ledgers) {
        assert_eq!(counts, LaneLedger { cpu: Cpu(cpu), ledger, bytes_missing: Some(0), ..LaneLedger::default() });
        assert!(bench.content(cpu, bytes as usize) == pages(cpu, 0..1200), "cpu {cpu}");
    }
}

#[test]
fn nothing_is_lost_where_the_indices_of_the_ring_wrap_around() {
    let mut bench = DrainBench::new(0);
    let mut driver = Driver::new(Arc::clone(&bench.memory), 0, ENTRIES, BUFFER, true);
    driver.begin_at(65_500);
    bench.drivers.push(driver);
    bench.start(0, 65_500);
    bench.attach();
    for number in 0..500 {
        bench.send(0, &page(0, number));
    }
    let ledgers = bench.finish(vec![end(0, 500 * u64::from(PAGE))], 10_000);
    assert_eq!((ledgers[0].ledger.pages_out, ledgers[0].bytes_missing), (500, Some(0)));
    assert!(bench.content(0, 500 * PAGE as usize) == pages(0, 0..500));
    assert_eq!(bench.drain.ring_stopped(Cpu(0)), Some(65_500u16.wrapping_add(500)));
}

#[test]
fn held_chain_comes_back_without_another_kick() {
    let mut bench = DrainBench::attached(1);
    bench.send(0, &page(0, 0));
    assert!(bench.drivers[0].wait(Duration::from_secs(5)), "the timer gives it back");
    assert_eq!(bench.drivers[0].reclaim(), 1);
    assert_eq!(bench.content(0, PAGE as usize), page(0, 0), "written before it comes back");
    assert_eq!(bench.drain.ledger()[0].ledger.pages_out, 1);
}

#[test]
fn stopped_ring_has_written_and_given_back_everything() {
    let mut bench = DrainBench::attached(1);
    for round in 0..20u16 {
        bench.send(0, &page(0, round.into()));
        // Kicked and perhaps taken, perhaps not: there may be no next ring to take it from.
        let base = bench.drain.ring_stopped(Cpu(0)).unwrap();
        assert_eq!((base, bench.drivers[0].reclaim()), (round + 1, 1));
        assert_eq!(bench.drain.ring_stopped(Cpu(0)), None);
        bench.start(0, base);
        while bench.drain.ledger()[0].ledger.pages_out != u64::from(round) + 1 {
            thread::yield_now();
        }
        while bench.drivers[0].free() < usize::from(ENTRIES) {
            bench.drivers[0].reclaim();
        }
    }
    let ledgers = bench.finish(vec![end(0, 20 * u64::from(PAGE))], 10_000);
    assert_eq!((ledgers[0].ledger.pages_out, ledgers[0].bytes_torn), (20, 0));
    assert!(bench.content(0, 20 * PAGE as usize) == pages(0, 0..20));
}

#[test]
fn page_torn_by_a_reboot_of_the_ring_goes_on_with_the_next_ring() {
    let mut bench = DrainBench::attached(1);
    let whole = page(0, 7);
    bench.send(0, &whole[..1000]);
    let mut base = 0;
    while base == 0 {
        base = bench.drain.ring_stopped(Cpu(0)).unwrap();
        bench.start(0, base);
    }
    bench.send(0, &whole[1000..]);
    let ledgers = bench.finish(vec![end(0, PAGE.into())], 10_000);
    assert_eq!((ledgers[0].ledger.pages_out, ledgers[0].bytes_torn), (1, 0));
    assert_eq!(bench.content(0, PAGE as usize), whole);
}

#[test]
fn finish_waits_for_what_is_on_its_way() {
    let mut bench = DrainBench::attached(1);
    bench.send(0, &page(0, 0));
    let (done, ledgers) = mpsc::channel();
    bench.drain.finish(vec![end(0, 2 * u64::from(PAGE))], 20_000, Box::new(move |lanes| done.send(lanes).unwrap()));
    assert!(ledgers.recv_timeout(Duration::from_millis(50)).is_err(), "half of it has not come");
    bench.send(0, &page(0, 1));
    let ledgers = ledgers.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!((ledgers[0].ledger.pages_out, ledgers[0].bytes_missing), (2, Some(0)));
    assert!(bench.content(0, 2 * PAGE as usize) == pages(0, 0..2));
}

#[test]
fn finish_ends_at_its_deadline_and_counts_what_never_came() {
    let mut bench = DrainBench::attached(1);
    bench.send(0, &page(0, 0)[..100]);
    let before = Instant::now();
    let ledgers = bench.finish(vec![end(0, 5000)], 60);
    assert!(before.elapsed() >= Duration::from_millis(60));
    assert_eq!((ledgers[0].ledger.pages_in, ledgers[0].bytes_torn, ledgers[0].bytes_missing), (0, 100, Some(4900)));
}

#[test]
fn finish_does_not_wait_for_a_ring_that_is_gone() {
    let bench = DrainBench::attached(2);
    let (done, ledgers) = mpsc::channel();
    let ends = vec![end(0, 1 << 20), end(1, 1 << 20)];
    bench.drain.finish(ends, 600_000, Box::new(move |lanes| done.send(lanes).unwrap()));
    bench.drain.ring_stopped(Cpu(0));
    assert!(ledgers.recv_timeout(Duration::from_millis(50)).is_err(), "the other one runs");
    bench.drain.ring_stopped(Cpu(1));
    let ledgers = ledgers.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!(ledgers[1].bytes_missing, Some(1 << 20));
}

#[test]
fn finish_without_lanes_answers_with_nothing() {
    assert!(DrainBench::new(1).finish(vec![end(0, 1 << 20)], 600_000).is_empty());
}

#[test]
fn lane_may_be_attached_before_its_ring_starts() {
    let mut bench = DrainBench::new(1);
    bench.drain.ring_stopped(Cpu(0));
    bench.attach();
    bench.send(0, &page(0, 0));
    bench.start(0, 0);
    let ledgers = bench.finish(vec![end(0, PAGE.into())], 10_000);
    assert_eq!(ledgers[0].ledger.pages_out, 1);
    assert_eq!(bench.content(0, PAGE as usize), page(0, 0));
}

#[test]
fn without_lanes_what_comes_is_discarded_and_given_back() {
    let mut bench = DrainBench::new(1);
    for number in 0..200 {
        bench.send(0, &page(0, number));
    }
    bench.attach();
    bench.send(0, &page(0, 5));
    let ledgers = bench.finish(vec![end(0, PAGE.into())], 10_000);
    assert_eq!(ledgers[0].ledger.pages_in, 1, "attach takes what was sent before");
    assert_eq!(bench.content(0, PAGE as usize), page(0, 5));
}

#[test]
fn sessions_follow_one_another() {
    let mut bench = DrainBench::new(1);
    for session in 0..50 {
        bench.attach();
        let again = bench.drain.attach(bench.file.try_clone().unwrap(), PAGE, vec![area(0)]);
        assert_eq!(again.unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        bench.send(0, &page(0, session));
        if session % 2 == 0 {
            assert_eq!(bench.finish(vec![end(0, PAGE.into())], 10_000)[0].ledger.pages_out, 1);
            assert_eq!(bench.drain.ledger()[0].ledger.pages_out, 1, "to be read until detach");
            assert_eq!(bench.content(0, PAGE as usize), page(0, session));
        }
        bench.drain.detach();
        assert!(bench.drain.ledger().is_empty());
    }
}

/// A file that takes its time.
#[derive(Debug)]
struct Slow(FileSink, Duration);

impl Sink for Slow {
    fn write(&mut self, batch: &mut Batch, offset: u64) -> Written {
        thread::sleep(self.1);
        self.0.write(batch, offset)
    }
    fn erase(&mut self, offset: u64, bytes: u64) -> io::Result<()> {
        self.0.erase(offset, bytes)
    }
}

#[test]
fn slow_file_blocks_the_guest_and_loses_nothing() {
    let mut bench = DrainBench::new(1);
    let sink = Slow(FileSink::new(bench.file.try_clone().unwrap()).unwrap(), Duration::from_millis(30));
    bench.drain.attach_sink(Box::new(sink), PAGE, vec![area(0)]).unwrap();
    let mut refused = 0;
    for number in 0..300 {
        while !bench.drivers[0].send(&page(0, number), PAGE) {
            refused += 1;
            bench.drivers[0].wait(Duration::from_secs(10));
            bench.drivers[0].reclaim();
        }
    }
    assert!(refused > 0, "a full ring is what the guest sees");
    let ledgers = bench.finish(vec![end(0, 300 * u64::from(PAGE))], 10_000);
    assert_eq!(ledgers[0].ledger.pages_out, 300);
    assert!(bench.content(0, 300 * PAGE as usize) == pages(0, 0..300));
}

#[test]
fn full_disk_never_stalls_the_guest_and_every_page_is_counted() {
    let mut bench = DrainBench::new(2);
    bench.file = sealed_file(area(1).offset + 10 * u64::from(PAGE)).unwrap();
    bench.attach();
    for number in 0..200 {
        bench.send(0, &page(0, number));
        bench.send(1, &page(1, number));
    }
    let bytes = 200 * u64::from(PAGE);
    let ledgers = bench.finish(vec![end(0, bytes), end(1, bytes)], 10_000);
    assert_eq!((ledgers[0].ledger.pages_out, ledgers[0].write_errno), (200, 0));
    let full = &ledgers[1];
    assert_eq!((full.ledger.pages_in, full.ledger.pages_out, full.ledger.pages_lost), (200, 10, 190));
    assert_eq!(full.write_errno, libc::EPERM);
    assert!(bench.content(1, 10 * PAGE as usize) == pages(1, 0..10));
}

#[test]
fn ring_at_fault_ends_its_lane_and_no_other() {
    let mut bench = DrainBench::attached(2);
    bench.send(0, &page(0, 0));
    while bench.drain.ledger()[0].ledger.pages_out == 0 {
        thread::yield_now();
    }
    // The next chains of ring 0 lead out of memory.
    let table = bench.memory.window(0, 16 * usize::from(ENTRIES)).unwrap();
    (0..ENTRIES).for_each(|index| descriptor(&table, index, u64::MAX - 4096, 4096, 0, 0));
    let available = bench.memory.window(16 * u64::from(ENTRIES), 4).unwrap();
    available.store_u16(2, 5, Ordering::Release);
    bench.drivers[0].kick();
    for number in 0..100 {
        bench.send(1, &page(1, number));
    }
    let ledgers = bench.finish(vec![end(0, 1 << 20), end(1, 100 * u64::from(PAGE))], 600_000);
    assert_eq!((ledgers[0].ledger.pages_out, ledgers[0].bytes_missing), (1, Some((1 << 20) - u64::from(PAGE))));
    assert_eq!((ledgers[1].ledger.pages_out, ledgers[1].bytes_missing), (100, Some(0)));
    assert_eq!(bench.drain.ring_stopped(Cpu(0)), Some(1), "its base is still known");
}

#[test]
fn panic_ends_the_lane_it_happens_in_and_nothing_else() {
    let mut bench = DrainBench::attached(2);
    for cpu in [0, 1] {
        bench.send(cpu, &page(cpu, 0));
        while bench.drain.ledger()[cpu as usize].ledger.pages_out == 0 {
            thread::yield_now();
        }
    }
    bench.drain.handle.tell(RingCommand::Panic(None));
    bench.drain.handle.tell(RingCommand::Panic(Some(Cpu(0))));
    bench.send(1, &page(1, 1));
    let ledgers = bench.finish(vec![end(0, 1 << 20), end(1, 2 * u64::from(PAGE))], 600_000);
    assert_eq!((ledgers[0].ledger.pages_in, ledgers[0].ledger.pages_out), (1, 1));
    assert_eq!((ledgers[1].ledger.pages_in, ledgers[1].ledger.pages_out), (2, 2));
    assert!(bench.drain.ring_stopped(Cpu(0)).is_some());
    // Too many of them: commands are all that is left.
    (0..20).for_each(|_| bench.drain.handle.tell(RingCommand::Panic(None)));
    assert!(bench.drain.ring_stopped(Cpu(1)).is_some());
    assert!(bench.finish(vec![end(1, 1)], 600_000).is_empty());
}

/// A sink of ours with a mistake in it: the first write panics.
#[derive(Debug)]
struct Mistaken(FileSink, bool);

impl Sink for Mistaken {
    fn write(&mut self, batch: &mut Batch, offset: u64) -> Written {
        assert!(std::mem::replace(&mut self.1, true), "as the test wants");
        self.0.write(batch, offset)
    }
    fn erase(&mut self, offset: u64, bytes: u64) -> io::Result<()> {
        self.0.erase(offset, bytes)
    }
}

#[test]
fn lanes_that_waited_for_one_that_panicked_are_served_without_another_kick() {
    let mut bench = DrainBench::new(8);
    let sink = Mistaken(FileSink::new(bench.file.try_clone().unwrap()).unwrap(), false);
    bench.drain.attach_sink(Box::new(sink), PAGE, (0..8).map(area).collect()).unwrap();
    (0..8).for_each(|cpu| bench.send(cpu, &page(cpu, 0)));
    let begun = Instant::now();
    while bench.drain.ledger().iter().map(|lane| lane.ledger.pages_out).sum::<u64>() < 7 {
        assert!(begun.elapsed() < Duration::from_secs(10), "one lane ends, seven go on: {:?}", bench.drain.ledger());
        thread::yield_now();
    }
    let ledgers = bench.finish(Vec::new(), 10_000);
    assert!(ledgers.iter().all(|lane| lane.ledger.pages_in == lane.ledger.pages_out + lane.ledger.pages_lost));
}

#[test]
fn memory_that_is_plugged_in_while_pages_flow_disturbs_nothing() {
    let mut bench = DrainBench::attached(1);
    let mut memory = Arc::clone(&bench.memory);
    for number in 0..MEMORY_REGIONS_MAX as u32 - 1 {
        let gpa = (1 << 40) + (u64::from(number) << 20);
        memory = memory.with_region(&region(gpa, 4096), memory_file(4096).unwrap()).unwrap();
        bench.send(0, &page(0, number));
        bench.drain.remap(Arc::clone(&memory));
    }
    let count = MEMORY_REGIONS_MAX as u32 - 1;
    let ledgers = bench.finish(vec![end(0, u64::from(count) * u64::from(PAGE))], 10_000);
    assert_eq!(ledgers[0].ledger.pages_out, u64::from(count));
    assert!(bench.content(0, count as usize * PAGE as usize) == pages(0, 0..count));
    bench.drain.remap(Arc::default());
    assert_eq!(bench.drain.ring_stopped(Cpu(0)), Some(count as u16), "a ring without memory ends, its base is known");
}

#[test]
fn under_load_there_is_one_interrupt_and_one_kick_for_eight_chains_or_more() {
    let mut bench = DrainBench::attached(1);
    let (chains, sixteen) = (1000, pages(0, 0..16));
    for _ in 0..chains {
        bench.send(0, &sixteen);
    }
    let ledgers = bench.finish(vec![end(0, chains * sixteen.len() as u64)], 10_000);
    assert_eq!(ledgers[0].ledger.pages_out, chains * 16);
    let driver = &mut bench.drivers[0];
    driver.reclaim();
    assert!(driver.interrupts <= chains / 8, "{} interrupts", driver.interrupts);
    assert!(driver.kicks <= chains / 8, "{} kicks", driver.kicks);
}

/// Times a thread of this process went to sleep.
fn sleeps(name: &str) -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let named = |task: &std::path::PathBuf| std::fs::read_to_string(task.join("comm")).is_ok_and(|c| c.trim() == name);
    let status = std::fs::read_to_string(tasks.filter(named).last().unwrap().join("status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
    line.trim().parse().unwrap()
}

#[test]
fn idle_guest_costs_no_wake_up() {
    let mut bench = DrainBench::attached(1);
    let drain = std::mem::replace(&mut bench.drain, RingDrain::spawn(GuestId(1), "idle").unwrap());
    drop(drain);
    bench.start(0, 0);
    bench.attach();
    for number in 0..100 {
        bench.send(0, &page(0, number));
    }
    while bench.drain.ledger()[0].ledger.pages_out < 100 {
        thread::yield_now();
    }
    thread::sleep(Duration::from_millis(20));
    let before = sleeps("vt-drain/idle");
    thread::sleep(Duration::from_millis(200));
    assert_eq!(sleeps("vt-drain/idle"), before);
}

#[test]
fn files_and_areas_that_cannot_be_used_are_refused() {
    let drain = RingDrain::spawn(GuestId(0), "test").unwrap();
    let attach = |file: File, page_bytes, areas: Vec<Area>| drain.attach(file, page_bytes, areas).map_err(|e| e.kind());
    let sound = || tempfile::tempfile().unwrap();
    let invalid = Err(io::ErrorKind::InvalidInput);
    let path = tempfile::NamedTempFile::new().unwrap();
    assert_eq!(attach(File::open(path.path()).unwrap(), PAGE, vec![area(0)]), invalid, "read only");
    let append = File::options().append(true).open(path.path()).unwrap();
    assert_eq!(attach(append, PAGE, vec![area(0)]), invalid, "appending");
    let device = File::options().write(true).open("/dev/null").unwrap();
    assert_eq!(attach(device, PAGE, vec![area(0)]), invalid, "not a file");
    assert_eq!(attach(sound(), 1000, vec![area(0)]), invalid, "page size");
    assert_eq!(attach(sound(), PAGE, vec![]), invalid, "no lanes");
    assert_eq!(attach(sound(), PAGE, vec![area(0), area(0)]), invalid, "one CPU twice");
    let (offset, bytes_max) = (area(0).offset + 8 * u64::from(PAGE), 1);
    assert_eq!(
        attach(sound(), PAGE, vec![area(0), Area { cpu: Cpu(1), offset, bytes_max, begins_again: false }]),
        invalid,
        "overlap"
    );
    assert_eq!(attach(sound(), PAGE, vec![Area { offset: 5, ..area(0) }]), invalid, "unaligned");
    assert_eq!(attach(sound(), PAGE, vec![Area { bytes_max: u64::MAX, ..area(0) }]), invalid, "wraps around");
    assert_eq!(attach(sound(), PAGE, (0..200).map(area).collect()), invalid, "more than lanes");
    assert_eq!(attach(sound(), PAGE, vec![area(0), area(1)]), Ok(()));
}

#[test]
fn old_buffers_are_not_read_after_they_were_given_back() {
    let mut bench = DrainBench::attached(1);
    let (first, second) = (page(0, 1), page(0, 2));
    bench.send(0, &first);
    bench.drivers[0].wait(Duration::from_secs(5));
    bench.drivers[0].reclaim();
    // The guest uses all of its memory for something else.
    for gpa in (0..u64::from(ENTRIES)).map(|n| footprint() - (n + 1) * u64::from(BUFFER)) {
        bench.memory.copy_in(Span { gpa, bytes: PAGE }, &second).unwrap();
    }
    let ledgers = bench.finish(vec![end(0, PAGE.into())], 10_000);
    assert_eq!(ledgers[0].ledger.pages_out, 1);
    assert_eq!(bench.content(0, PAGE as usize), first);
}
