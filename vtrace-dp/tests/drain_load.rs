//! The drain under load: what it may not do (allocate). How fast it is, the bench's case `drain` measures.

#![expect(unsafe_code, reason = "an allocator that counts is an unsafe trait")]
#![expect(clippy::unwrap_used, reason = "all of it is a test")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::{
        Arc,
        atomic::{AtomicI32, AtomicU64, Ordering},
        mpsc,
    },
    time::Duration,
};

use vtrace_common::{
    ids::{Cpu, GuestId},
    wire::client::{Area, LaneLedger, LaneSent},
};
use vtrace_dp::{
    drain::{
        ring::RingDrain,
        sink::{FileSink, Sink},
    },
    virtq::{
        memory::{Memory, Span},
        ring::Ring,
        testing::{Driver, guest_memory, memory_file},
    },
};

const PAGE: u32 = 4096;
const BUFFER: u32 = 64 << 10;
const ENTRIES: u16 = 128;

/// Counts what one thread allocates.
struct Counting;

static WATCHED: AtomicI32 = AtomicI32::new(0);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system's allocator as it came; counting touches atomics only.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if WATCHED.load(Ordering::Relaxed) != 0 && WATCHED.load(Ordering::Relaxed) == nix::unistd::gettid().as_raw() {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer came from `alloc` above, that is from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The thread of this process that has this name.
fn thread_named(name: &str) -> i32 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let named = |task: &std::path::PathBuf| std::fs::read_to_string(task.join("comm")).is_ok_and(|c| c.trim() == name);
    tasks.filter(named).last().unwrap().file_name().unwrap().to_str().unwrap().parse().unwrap()
}

/// A guest with one lane whose buffers hold sound pages.
fn guest() -> (Arc<Memory>, Driver) {
    let bytes = Driver::footprint(ENTRIES, BUFFER);
    let memory = guest_memory(&[(0, bytes)]);
    let buffers = bytes - u64::from(ENTRIES) * u64::from(BUFFER);
    for gpa in (buffers..bytes).step_by(PAGE as usize) {
        memory.copy_in(Span { gpa: gpa + 8, bytes: 8 }, &4000u64.to_le_bytes()).unwrap();
    }
    let driver = Driver::new(Arc::clone(&memory), 0, ENTRIES, BUFFER, true);
    (memory, driver)
}

fn start(name: &str, memory: &Arc<Memory>, driver: &Driver, sink: Box<dyn Sink>) -> RingDrain {
    let drain = RingDrain::spawn(GuestId(0), name).unwrap();
    drain.ring_started(Cpu(0), Ring::start(driver.setup(0), Arc::clone(memory)).unwrap());
    drain
        .attach_sink(sink, PAGE, vec![Area { cpu: Cpu(0), offset: 0, bytes_max: 1 << 40, begins_again: false }])
        .unwrap();
    drain
}

fn finish(drain: &RingDrain, bytes_out: u64) -> LaneLedger {
    let (done, ledgers) = mpsc::channel();
    let ends = vec![LaneSent { cpu: Cpu(0), bytes_out }];
    drain.finish(ends, 60_000, Box::new(move |lanes| done.send(lanes[0]).unwrap()));
    ledgers.recv_timeout(Duration::from_secs(60)).unwrap()
}

#[test]
fn nothing_is_allocated_while_pages_flow() {
    let (memory, mut driver) = guest();
    let file = memory_file(0).unwrap();
    let drain = start("count", &memory, &driver, Box::new(FileSink::new(file).unwrap()));
    driver.send_again_blocking(BUFFER, PAGE);
    while drain.ledger()[0].ledger.pages_out == 0 {
        std::thread::yield_now();
    }
    WATCHED.store(thread_named("vt-drain/count"), Ordering::Relaxed);
    // Bursts, so that the timer and the half ring both give back, and pages that no area takes.
    for chain in 0..2000u32 {
        driver.send_again_blocking(if chain % 7 == 0 { 4000 } else { BUFFER }, PAGE);
        if chain % 300 == 0 {
            std::thread::sleep(Duration::from_millis(4));
        }
    }
    let counted = ALLOCATIONS.load(Ordering::Relaxed);
    finish(&drain, 0);
    assert_eq!(counted, 0, "allocations of the worker");
    assert!(ALLOCATIONS.load(Ordering::Relaxed) > 0, "the counter counts: the answer to finish is allocated");
    WATCHED.store(0, Ordering::Relaxed);
}
