//! The direct sink on a real file system: aligned or not, whole or failing anywhere, stopped at any time.

#![expect(clippy::cast_possible_truncation, reason = "the numbers of these tests are small")]

use std::{os::unix::fs::FileExt, path::Path, process::Command, sync::mpsc, thread, time::Duration};

use proptest::prelude::*;
use vtrace_common::{
    ids::{Cpu, GuestId},
    page::Header,
    wire::client::{Area, LaneLedger, LaneSent},
};

use super::*;
use crate::{
    drain::ring::RingDrain,
    sys::direct::reopen,
    virtq::{
        memory::Span,
        ring::Ring,
        testing::{Driver, guest_memory},
    },
};

const PAGE: u32 = 4096;
const BUFFER: u32 = 64 << 10;
const ENTRIES: u16 = 128;

/// Two descriptions of a file in `folder`. `None`, said aloud: its file system has no O_DIRECT.
fn files(folder: &Path, bytes: u64) -> Option<(File, File)> {
    let file = tempfile::tempfile_in(folder).unwrap();
    file.set_len(bytes).unwrap();
    match reopen(&file) {
        Ok(direct) => Some((file, direct)),
        Err(error) => {
            println!("skipped: no O_DIRECT in {}: {error}", folder.display());
            None
        }
    }
}

fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A valid page, different for each number.
fn page(number: u64) -> Vec<u8> {
    let mut page: Vec<u8> = (0..512u64).flat_map(|at| (number << 16 | at).to_le_bytes()).collect();
    page[8..16].copy_from_slice(&4000u64.to_le_bytes());
    page
}

fn pages(count: u64) -> Vec<u8> {
    (0..count).flat_map(page).collect()
}

/// One lane of a guest, its driver, its file.
struct DirectBench {
    drain: RingDrain,
    memory: Arc<Memory>,
    driver: Driver,
    file: File,
}

impl DirectBench {
    fn new(files: (File, File), bytes_max: u64) -> Self {
        Self::in_area(files, Area { cpu: Cpu(0), offset: PAGE.into(), bytes_max, begins_again: false })
    }

    fn in_area(files: (File, File), area: Area) -> Self {
        let memory = guest_memory(&[(0, Driver::footprint(ENTRIES, BUFFER))]);
        let driver = Driver::new(Arc::clone(&memory), 0, ENTRIES, BUFFER, true);
        let drain = RingDrain::spawn(GuestId(0), "direct").unwrap();
        let bench = Self { drain, memory, driver, file: files.0.try_clone().unwrap() };
        bench.start(0);
        bench.drain.attach_direct(files.0, files.1, PAGE, vec![area]).unwrap();
        bench
    }

    fn start(&self, base: u16) {
        self.drain.ring_started(Cpu(0), Ring::start(self.driver.setup(base), Arc::clone(&self.memory)).unwrap());
    }

    fn send(&mut self, stream: &[u8]) {
        stream.chunks(BUFFER as usize).for_each(|chain| self.driver.send_blocking(chain, PAGE));
    }

    fn finish(&self, bytes_out: u64) -> LaneLedger {
        let (done, ledgers) = mpsc::channel();
        let ends = vec![LaneSent { cpu: Cpu(0), bytes_out }];
        self.drain.finish(ends, 20_000, Box::new(move |lanes| done.send(lanes[0]).unwrap()));
        ledgers.recv_timeout(Duration::from_secs(30)).expect("finish answers")
    }

    fn content(&self, bytes: usize) -> Vec<u8> {
        let mut content = vec![0; bytes];
        self.file.read_exact_at(&mut content, PAGE.into()).unwrap();
        content
    }
}

#[test]
fn lane_that_begins_again_has_its_newest_pages_with_writes_in_flight() {
    let Some(files) = files(here(), 64 << 20) else { return };
    let area = Area { cpu: Cpu(0), offset: PAGE.into(), bytes_max: 40 << 20, begins_again: true };
    let mut bench = DirectBench::in_area(files, area);
    let (stream, area_bytes) = (pages(14_000), 40 << 20);
    bench.send(&stream);
    let counts = bench.finish(stream.len() as u64);
    assert_eq!((counts.ledger.pages_in, counts.ledger.pages_out, counts.write_errno), (14_000, 14_000, 0));
    let content = bench.content(area_bytes);
    assert!(content[..stream.len() - area_bytes] == stream[area_bytes..], "the newest");
    assert!(content[stream.len() - area_bytes..] == stream[stream.len() - area_bytes..area_bytes], "and those before");
}

#[test]
fn pages_arrive_byte_for_byte_past_the_page_cache() {
    let Some(files) = files(here(), 64 << 20) else { return };
    let mut bench = DirectBench::new(files, 63 << 20);
    let stream = pages(8000);
    bench.send(&stream);
    let counts = bench.finish(stream.len() as u64);
    assert_eq!((counts.ledger.pages_in, counts.ledger.pages_out, counts.write_errno), (8000, 8000, 0));
    assert!(bench.content(stream.len()) == stream);
}

#[test]
fn stopped_ring_has_nothing_in_flight_and_gave_everything_back() {
    let Some(files) = files(here(), 64 << 20) else { return };
    let mut bench = DirectBench::new(files, 63 << 20);
    let stream = pages(16 * 127);
    for (round, chain) in (1u16..).zip(stream.chunks(BUFFER as usize)) {
        bench.driver.send_blocking(chain, PAGE);
        if round % 40 == 0 {
            let base = bench.drain.ring_stopped(Cpu(0)).unwrap();
            bench.driver.reclaim();
            assert_eq!(bench.driver.free(), usize::from(ENTRIES) - usize::from(round - base), "taken is given back");
            let counts = bench.drain.ledger()[0];
            assert_eq!(counts.ledger.pages_out, u64::from(base) * 16, "and in the file");
            bench.start(base);
        }
    }
    assert_eq!(bench.finish(stream.len() as u64).ledger.pages_out, 16 * 127);
    assert!(bench.content(stream.len()) == stream);
}

#[test]
fn memory_may_go_as_soon_as_a_remap_has_answered() {
    let Some(files) = files(here(), 64 << 20) else { return };
    let mut bench = DirectBench::new(files, 63 << 20);
    let stream = pages(16 * 100);
    for chain in stream.chunks(BUFFER as usize) {
        bench.driver.send_blocking(chain, PAGE);
        let again = (*bench.memory).clone();
        let (old, new) = (Arc::clone(&bench.memory), Arc::new(again));
        bench.drain.remap(Arc::clone(&new));
        bench.memory = new;
        // The driver of this test holds windows, not the table.
        drop(old);
    }
    assert_eq!(bench.finish(stream.len() as u64).ledger.pages_out, 16 * 100);
    assert!(bench.content(stream.len()) == stream);
}

#[test]
fn gap_is_marked_in_the_file_and_pages_after_it_are_written_directly_again() {
    let Some(files) = files(here(), 64 << 20) else { return };
    let mut bench = DirectBench::new(files, 63 << 20);
    let mut bad = page(1);
    bad[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    let stream = [page(0), bad, page(2), pages(2000)].concat();
    bench.send(&stream);
    let counts = bench.finish(stream.len() as u64);
    assert_eq!((counts.ledger.pages_in, counts.ledger.pages_out, counts.ledger.pages_lost), (2003, 2002, 1));
    let found = bench.content(2002 * PAGE as usize);
    let missed = |page: &[u8]| Header::parse(page, PAGE as usize).unwrap().missed;
    let marks: Vec<_> =
        found.chunks_exact(PAGE as usize).map(missed).enumerate().filter(|(_, missed)| *missed).collect();
    assert_eq!(marks, [(1, true)]);
    assert!(found[2 * PAGE as usize..] == pages(2000));
}

#[test]
fn panic_while_writes_fly_ends_the_lane_and_lets_no_memory_go_before_they_land() {
    let Some(files) = files(here(), 64 << 20) else { return };
    let again = (files.0.try_clone().unwrap(), files.1.try_clone().unwrap());
    let mut bench = DirectBench::new(files, 63 << 20);
    bench.send(&pages(1500));
    bench.drain.handle.tell(crate::drain::ring::worker::RingCommand::Panic(Some(Cpu(0))));
    let base = bench.drain.ring_stopped(Cpu(0)).expect("its base is still known");
    let counts = bench.finish(0);
    assert_eq!(counts.ledger.pages_in, counts.ledger.pages_out + counts.ledger.pages_lost);
    let kept = counts.ledger.pages_out as usize * PAGE as usize;
    assert!(bench.content(kept) == pages(1500)[..kept]);
    // The next session of the same guest is whole.
    let area = Area { cpu: Cpu(0), offset: PAGE.into(), bytes_max: 63 << 20, begins_again: false };
    bench.drain.attach_direct(again.0, again.1, PAGE, vec![area]).unwrap();
    bench.driver = Driver::new(Arc::clone(&bench.memory), 0, ENTRIES, BUFFER, true);
    bench.driver.begin_at(base);
    bench.start(base);
    bench.send(&pages(700));
    assert_eq!(bench.finish(700 * u64::from(PAGE)).ledger.pages_out, 700);
    assert!(bench.content(700 * PAGE as usize) == pages(700));
}

#[test]
fn idle_lane_costs_no_wake_up_once_its_writes_have_landed() {
    let Some(files) = files(here(), 64 << 20) else { return };
    let mut bench = DirectBench::new(files, 63 << 20);
    bench.send(&pages(1000));
    while bench.drain.ledger()[0].ledger.pages_out < 1000 {
        thread::yield_now();
    }
    thread::sleep(Duration::from_millis(30));
    let sleeps = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
        let ours = tasks
            .filter(|task| std::fs::read_to_string(task.join("comm")).is_ok_and(|c| c.trim() == "vt-drain/direct"));
        let count = |task: std::path::PathBuf| {
            let status = std::fs::read_to_string(task.join("status")).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:").map(str::to_owned));
            (task, line)
        };
        ours.map(count).collect::<Vec<_>>()
    };
    // Other tests' workers come and go; ours is among those that are there both times and slept through.
    let before = sleeps();
    thread::sleep(Duration::from_millis(200));
    assert!(sleeps().iter().any(|after| before.contains(after)));
}

/// A small ext4 file system of its own. `None`, said aloud: it cannot be had here.
struct Small {
    folder: tempfile::TempDir,
}

impl Small {
    fn new(bytes: u64) -> Option<Self> {
        let folder = tempfile::tempdir_in(here()).unwrap();
        let image = folder.path().join("image");
        File::create(&image).unwrap().set_len(bytes).unwrap();
        std::fs::create_dir(folder.path().join("mnt")).unwrap();
        let run = |program: &str, words: &[&str]| {
            Command::new(program)
                .current_dir(folder.path())
                .args(words)
                .output()
                .is_ok_and(|done| done.status.success())
        };
        let made = run("mkfs.ext4", &["-q", "-F", "-m", "0", "-O", "^has_journal", "image"]);
        if !made || !run("mount", &["-o", "loop", "image", "mnt"]) {
            println!("skipped: no file system of our own (mkfs.ext4, loop mount)");
            return None;
        }
        Some(Self { folder })
    }

    fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("mnt")
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

#[test]
fn full_disk_ends_the_lane_with_exactly_the_pages_that_are_in_the_file() {
    let Some(small) = Small::new(16 << 20) else { return };
    let Some(files) = files(&small.path(), 64 << 20) else { return };
    let mut bench = DirectBench::new(files, 63 << 20);
    let stream = pages(8000);
    bench.send(&stream);
    let counts = bench.finish(stream.len() as u64);
    assert_eq!(
        (counts.ledger.pages_in, counts.ledger.pages_in),
        (8000, counts.ledger.pages_out + counts.ledger.pages_lost)
    );
    assert_eq!(counts.write_errno, libc::ENOSPC);
    assert!((1000..4096).contains(&counts.ledger.pages_out), "most of 16 MiB: {counts:?}");
    let kept = counts.ledger.pages_out as usize * PAGE as usize;
    assert!(bench.content(kept) == stream[..kept]);
}

/// What one write of a stream looks like: where its pieces lie, and whether it is given to the sink now.
type Piece = (usize, bool, bool);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_mix_of_aligned_and_unaligned_writes_is_in_the_file_in_order(
        pieces in prop::collection::vec((1usize..40, any::<bool>(), any::<bool>()), 1..40),
    ) {
        let Some(files) = files(here(), 8 << 20) else { return Ok(()) };
        let content = written(files, &pieces);
        prop_assert!(content.0 == content.1);
    }
}

/// What was given to the sink, and what the file has of it.
fn written((file, direct): (File, File), pieces: &[Piece]) -> (Vec<u8>, Vec<u8>) {
    let memory = guest_memory(&[(0, 8 << 20)]);
    let mut sink = DirectSink::new(file.try_clone().unwrap(), direct).unwrap();
    let mut batch = Batch::new(Arc::clone(&memory));
    let (mut expected, mut gpa, mut start, mut flying) = (Vec::new(), 0u64, 0u64, 0usize);
    for (tag, &(count, is_aligned, is_given)) in (0u64..).zip(pieces) {
        let bytes = if is_aligned { count * PAGE as usize } else { count * 31 };
        gpa = if is_aligned { gpa.next_multiple_of(PAGE.into()) } else { gpa + 3 };
        let piece: Vec<u8> = (0..bytes).map(|at| (at as u64 * 7 + tag) as u8).collect();
        let span = Span { gpa, bytes: bytes as u32 };
        memory.copy_in(span, &piece).unwrap();
        assert!(batch.push(span).unwrap());
        gpa += bytes as u64;
        expected.extend(piece);
        if is_given {
            let bytes = batch.bytes();
            match sink.submit(&mut batch, start, tag) {
                Some(written) => assert!(written.fault.is_none() && written.bytes == bytes),
                None => flying += 1,
            }
            batch.clear();
            start += bytes;
        }
    }
    expected.truncate(start as usize);
    while let Some(landed) = sink.landed(true) {
        assert!(landed.written.fault.is_none());
        flying -= 1;
    }
    assert_eq!(flying, 0, "each write that was under way has ended once");
    let mut found = vec![0; expected.len()];
    file.read_exact_at(&mut found, 0).unwrap();
    (expected, found)
}
