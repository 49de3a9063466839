//! Moves host pages past the page cache: tap ─► block of huge pages ─► O_DIRECT write of up to 1 MiB.
//!
//! In:    taps of which poll(2) has said that at least `batch` pages are full
//! Out:   pages at the areas' offsets, one after the other; a ledger
//! Runs:  pages are taken on the pump's thread, written by one more ([`Writer`])
//! Full:  while more than [`WAITING_MAX`] blocks wait for the disk, the writer goes through the page cache; when no
//!        block is free, so does the pump itself; an area without room (unless it begins again) and a failed write end the
//!        lane
//! Trust: the kernel
//!
//! Memory: [`BLOCK_BYTES`] for each lane and each spare block, touched when it is first used.
//!
//! Why it copies: readv(2) copies a page of 4 KiB faster than splice(2) takes it out of the ring and puts a new one in
//! its place, and a block of huge pages is one entry for the disk where spliced pages are 256.

use std::{
    array,
    fs::File,
    io::{self, IoSliceMut},
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use crossbeam::channel::{Receiver, Sender, bounded};
use nix::errno::Errno;
use vtrace_common::wire::client::Area;

use super::{lane::TapEnd, source::PageMover};
use crate::{
    drain::ledger::{Counters, count},
    sys::{
        SysError,
        direct::reopen,
        splice::{read, read_pieces},
        write_all::{Written, write_all_at},
    },
};

/// What is written at once.
pub(crate) const BLOCK_BYTES: usize = 1 << 20;
/// Blocks beside those of the lanes.
pub(crate) const SPARE_BLOCKS: usize = 48;
/// Of those that are free, so many are used again first: what was written last is still in the cache.
const WARM_BLOCKS: usize = 2;
/// Blocks that may wait for a disk that is slower than the load.
const WAITING_MAX: usize = 8;
/// Pages of one readv(2).
const PIECES_MAX: usize = 64;

/// The file twice: around the page cache, and through it.
#[derive(Debug)]
pub(crate) struct Files {
    direct: File,
    plain: File,
}

impl Files {
    /// Opens `plain` once more, around the page cache: flags belong to an opened file, which others hold too.
    ///
    /// # Errors
    /// `EINVAL` where the file system has no O_DIRECT.
    pub(crate) fn open(plain: &File) -> io::Result<Self> {
        Ok(Self { direct: reopen(plain)?, plain: plain.try_clone()? })
    }

    /// Writes all of `bytes`. What O_DIRECT does not take, by its length or place, goes through the page cache.
    fn write(&self, bytes: &[u8], offset: u64) -> Written {
        let direct = write_all_at(self.direct.as_fd(), bytes, offset);
        if direct.fault.is_none_or(|fault| fault.errno != Errno::EINVAL) {
            return direct;
        }
        let done = usize::try_from(direct.bytes).expect("at most a block");
        let rest = write_all_at(self.plain.as_fd(), &bytes[done..], offset + direct.bytes);
        Written { bytes: direct.bytes + rest.bytes, ..rest }
    }
}

/// One end of the queues of free blocks: the writer gives back, the pump takes.
#[derive(Debug)]
pub(crate) struct Free<C> {
    warm: C,
    cold: C,
}

/// Where blocks are given back.
pub(crate) type GiveBack<'b> = Free<Sender<&'b mut [u8]>>;
/// Where they are taken.
pub(crate) type Take<'b> = Free<Receiver<&'b mut [u8]>>;

/// Both ends, with all `blocks` free.
pub(crate) fn all_free<'b>(blocks: impl ExactSizeIterator<Item = &'b mut [u8]>) -> (GiveBack<'b>, Take<'b>) {
    let ((warm, warm_taken), (cold, cold_taken)) = (bounded(WARM_BLOCKS), bounded(blocks.len()));
    let give_back = Free { warm, cold };
    blocks.for_each(|block| give_back.give(block));
    (give_back, Free { warm: warm_taken, cold: cold_taken })
}

impl<'b> GiveBack<'b> {
    /// Hot.
    fn give(&self, block: &'b mut [u8]) {
        if let Err(full) = self.warm.try_send(block) {
            drop(self.cold.try_send(full.into_inner())); // at the end the pump is gone and takes none
        }
    }
}

impl<'b> Take<'b> {
    /// Hot.
    fn take(&self) -> Option<&'b mut [u8]> {
        self.warm.try_recv().or_else(|_| self.cold.try_recv()).ok()
    }
}

/// A block on its way to the disk.
#[derive(Debug)]
pub(crate) struct Job<'b> {
    lane: usize,
    /// Bytes of the lane in front of it.
    start: u64,
    bytes: usize,
    block: &'b mut [u8],
}

/// What pump and writer share of a lane. [`Fate::settle`] closes it.
#[derive(Debug)]
pub(crate) struct Fate<'a> {
    counters: &'a Counters,
    area: Area,
    failed: AtomicBool,
    /// Where the pages that reached the file end, if some did not.
    torn: Mutex<Option<(u64, SysError)>>,
}

impl<'a> Fate<'a> {
    pub(crate) fn new(area: Area, counters: &'a Counters) -> Self {
        Self { counters, area, failed: AtomicBool::new(false), torn: Mutex::new(None) }
    }

    /// Counts a block written at `start` bytes into the lane, or records where the lane broke off.
    fn record(&self, page_bytes: usize, bytes: usize, start: u64, written: Written) {
        let whole = usize::try_from(written.bytes).expect("at most a block") / page_bytes;
        self.counters.add_out(whole, page_bytes);
        let Some(fault) = written.fault else { return };
        self.counters.add_lost(bytes / page_bytes - whole); // `settle` adds the pages after it
        let end = start + count(whole * page_bytes);
        let mut first = self.torn.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none_or(|(other, _)| end < other) {
            *first = Some((end, fault));
        }
        self.failed.store(true, Relaxed);
    }

    /// Counts the pages up to the first gap as written and all pages after it as lost. Gives why writing failed, if it
    /// did. Called once no write is under way.
    pub(crate) fn settle(&self, page_bytes: usize) -> Option<TapEnd> {
        let mut lane = self.counters.read();
        let torn = *self.torn.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(torn.is_some() || lane.ledger.is_balanced(), "{}: every block was written or failed", self.area.cpu);
        if let Some((end, _)) = torn {
            lane.ledger.set_out(end / count(page_bytes), count(page_bytes));
            lane.ledger.settle();
            self.counters.publish(&lane);
        }
        torn.map(|(_, error)| TapEnd::File(error))
    }
}

/// Writes blocks until there are no more, and gives them back.
#[derive(Debug)]
pub(crate) struct Writer<'a, 'b> {
    pub(crate) files: &'a Files,
    pub(crate) fates: &'a [Fate<'a>],
    pub(crate) page_bytes: usize,
    pub(crate) jobs: Receiver<Job<'b>>,
    pub(crate) free: GiveBack<'b>,
}

impl Writer<'_, '_> {
    /// Hot.
    pub(crate) fn run(self) {
        for Job { lane, start, bytes, block } in &self.jobs {
            let offset = self.fates[lane].area.place(start);
            let written = match self.jobs.len() {
                waiting if waiting > WAITING_MAX => write_all_at(self.files.plain.as_fd(), &block[..bytes], offset),
                _ => self.files.write(&block[..bytes], offset),
            };
            self.fates[lane].record(self.page_bytes, bytes, start, written);
            self.free.give(block);
        }
    }
}

/// A lane's pages that are not yet with the writer.
#[derive(Debug)]
struct Filling<'b> {
    block: &'b mut [u8],
    bytes: usize,
    end: Option<TapEnd>,
}

/// The pump's side of all lanes.
#[derive(Debug)]
pub(crate) struct Direct<'a, 'b> {
    files: &'a Files,
    fates: &'a [Fate<'a>],
    page_bytes: usize,
    batch_pages: usize,
    lanes: Vec<Filling<'b>>,
    jobs: Sender<Job<'b>>,
    free: Take<'b>,
}

impl<'a, 'b> Direct<'a, 'b> {
    /// `free` holds a block for each lane and the spare ones.
    pub(crate) fn new(
        writer: (&'a Files, &'a [Fate<'a>]),
        page_bytes: usize,
        batch_pages: usize,
        jobs: Sender<Job<'b>>,
        free: Take<'b>,
    ) -> Self {
        let (files, fates) = writer;
        let block = || free.take().expect("there is a block for each lane");
        let lanes = fates.iter().map(|_| Filling { block: block(), bytes: 0, end: None }).collect();
        Self { files, fates, page_bytes, batch_pages, lanes, jobs, free }
    }

    /// Bytes that whole pages can still take, in the block and up to the area's end.
    fn room(&self, at: usize) -> usize {
        let left = usize::try_from(self.fates[at].area.room(self.bytes_taken(at))).unwrap_or(usize::MAX);
        let room = left.min(BLOCK_BYTES - self.lanes[at].bytes);
        room - room % self.page_bytes
    }

    fn bytes_taken(&self, at: usize) -> u64 {
        self.fates[at].counters.ledger().pages_in * count(self.page_bytes)
    }

    /// Counts what a read gave. False if it was nothing; the lane goes on if the kernel only had nothing.
    fn taken(&mut self, at: usize, taken: Result<usize, SysError>) -> bool {
        match taken {
            Ok(bytes) => {
                assert!(bytes.is_multiple_of(self.page_bytes), "the kernel gives whole pages");
                self.lanes[at].bytes += bytes;
                self.fates[at].counters.add_in(bytes / self.page_bytes);
                // What comes next has its place at the start of the area: no write goes across the end.
                if self.fates[at].area.is_at_start(self.bytes_taken(at)) {
                    self.hand_over(at);
                }
                bytes > 0
            }
            Err(error) => {
                if !error.would_block() && error.errno != Errno::EINTR {
                    self.lanes[at].end = Some(TapEnd::Tap(error));
                }
                false
            }
        }
    }

    /// Ends a lane whose area is full. False if it has ended.
    fn makes_room(&mut self, at: usize) -> bool {
        if self.room(at) == 0 {
            self.hand_over(at);
            if self.room(at) == 0 {
                self.lanes[at].end = Some(TapEnd::AreaFull { bytes_max: self.fates[at].area.bytes_max });
            }
        }
        !self.has_ended(at)
    }

    /// Gives a lane's block to the writer; while that has too much to do, writes it through the page cache. Hot.
    fn hand_over(&mut self, at: usize) {
        let start = self.bytes_taken(at) - count(self.lanes[at].bytes);
        let lane = &mut self.lanes[at];
        let bytes = std::mem::take(&mut lane.bytes);
        if bytes == 0 {
            return;
        }
        let Some(next) = self.free.take() else {
            let fate = &self.fates[at];
            let written = write_all_at(self.files.plain.as_fd(), &lane.block[..bytes], fate.area.place(start));
            return fate.record(self.page_bytes, bytes, start, written);
        };
        let block = std::mem::replace(&mut lane.block, next);
        let sent = self.jobs.try_send(Job { lane: at, start, bytes, block });
        assert!(sent.is_ok(), "the writer lives as long as the pump, and has room for every block");
    }
}

impl PageMover for Direct<'_, '_> {
    fn has_ended(&self, at: usize) -> bool {
        self.lanes[at].end.is_some() || self.fates[at].failed.load(Relaxed)
    }

    /// Takes the full pages that poll(2) has promised. Hot.
    fn take(&mut self, at: usize, tap: BorrowedFd<'_>) -> bool {
        if !self.makes_room(at) {
            return false;
        }
        let bytes = (self.batch_pages * self.page_bytes).min(self.room(at));
        let lane = &mut self.lanes[at];
        let mut pages = lane.block[lane.bytes..lane.bytes + bytes].chunks_exact_mut(self.page_bytes);
        let mut pieces: [_; PIECES_MAX] = array::from_fn(|_| IoSliceMut::new(pages.next().unwrap_or_default()));
        let used = pieces.iter().filter(|piece| !piece.is_empty()).count();
        let taken = read_pieces(tap, &mut pieces[..used]);
        let any = self.taken(at, taken);
        if self.room(at) < self.batch_pages * self.page_bytes {
            self.hand_over(at);
        }
        any
    }

    fn take_rest(&mut self, at: usize, tap: BorrowedFd<'_>) {
        while self.makes_room(at) {
            let lane = &mut self.lanes[at];
            let page = &mut lane.block[lane.bytes..lane.bytes + self.page_bytes];
            let taken = read(tap, page).map(|bytes| {
                page[bytes..].fill(0);
                if bytes > 0 { self.page_bytes } else { 0 }
            });
            if !self.taken(at, taken) {
                break;
            }
        }
        self.hand_over(at);
    }

    fn holds_pages(&self) -> bool {
        self.lanes.iter().any(|lane| lane.bytes > 0)
    }

    fn flush(&mut self) {
        (0..self.lanes.len()).for_each(|at| self.hand_over(at));
    }

    fn end(&self, at: usize) -> Option<TapEnd> {
        self.lanes[at].end
    }
}
