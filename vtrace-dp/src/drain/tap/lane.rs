//! One host CPU's path from its tap to its area, through the page cache: tap ─► pipe ─► file, by splice.
//!
//! In:    a tap, a pipe that is empty between two calls
//! Out:   pages at the area's offset, one after the other; a ledger
//! Runs:  on the pump's thread; a slow disk blocks it, and the kernel overwrites and counts meanwhile
//! Full:  an area without room (unless it begins again), and a write that fails, end the lane; what the kernel has by
//!        then stays with it
//! Trust: the kernel

use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use vtrace_common::wire::client::Area;

use crate::{
    drain::ledger::{Counters, count},
    sys::{
        SysError,
        splice::{Pipe, SpliceFlags, read, splice},
        write_all::{write_all, write_all_at},
    },
};

/// Why a lane takes no more pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TapEnd {
    /// The area has no room for another page.
    #[error("the area of {bytes_max} bytes is full")]
    AreaFull {
        /// Its size.
        bytes_max: u64,
    },
    /// The ring buffer cannot be read.
    #[error("ring buffer: {0}")]
    Tap(SysError),
    /// The file cannot be written.
    #[error("file: {0}")]
    File(SysError),
}

/// One host CPU's path from its tap to its area.
#[derive(Debug)]
pub(crate) struct TapLane<'a> {
    area: Area,
    page_bytes: usize,
    counters: &'a Counters,
    end: Option<TapEnd>,
}

impl<'a> TapLane<'a> {
    pub(crate) fn new(area: Area, page_bytes: usize, counters: &'a Counters) -> Self {
        Self { area, page_bytes, counters, end: None }
    }

    pub(crate) fn end(&self) -> Option<TapEnd> {
        self.end
    }

    /// Moves full pages, at most a pipe of them. False when none was ready, or the lane has ended. Hot.
    pub(crate) fn move_pages(&mut self, tap: BorrowedFd<'_>, pipe: &Pipe, file: BorrowedFd<'_>) -> bool {
        let bytes_max = self.room().min(pipe.bytes_max);
        if !self.has_room(bytes_max) {
            return false;
        }
        match splice(tap, pipe.writer_fd(), None, bytes_max, SpliceFlags::SPLICE_F_NONBLOCK) {
            Ok(0) => false,
            Ok(bytes) => {
                self.count_taken(bytes);
                self.empty(pipe, file, bytes);
                true
            }
            Err(error) => self.end_unless_idle(error),
        }
    }

    /// Takes what splice does not: a page that is only partly filled. False when there is nothing more.
    pub(crate) fn move_rest(&mut self, tap: BorrowedFd<'_>, page: &mut [u8], file: BorrowedFd<'_>) -> bool {
        if !self.has_room(self.room()) {
            return false;
        }
        match read(tap, page) {
            Ok(0) => false,
            Ok(bytes) => {
                page[bytes..].fill(0);
                self.count_taken(self.page_bytes);
                self.write_page(page, file);
                true
            }
            Err(error) => self.end_unless_idle(error),
        }
    }

    /// Bytes up to the area's end that whole pages can still take.
    fn room(&self) -> usize {
        let left = usize::try_from(self.area.room(self.bytes_written())).unwrap_or(usize::MAX);
        left - left % self.page_bytes
    }

    fn has_room(&mut self, bytes: usize) -> bool {
        if self.end.is_none() && bytes < self.page_bytes {
            self.end = Some(TapEnd::AreaFull { bytes_max: self.area.bytes_max });
        }
        self.end.is_none()
    }

    /// Pages that were written, in bytes.
    fn bytes_written(&self) -> u64 {
        self.counters.ledger().bytes_out
    }

    fn count_taken(&self, bytes: usize) {
        assert!(bytes.is_multiple_of(self.page_bytes), "the kernel gives whole pages");
        self.counters.add_in(bytes / self.page_bytes);
    }

    /// Moves `bytes` from the pipe into the file. When a write fails, pages that are complete count as written, the
    /// others as lost, and the pipe is emptied.
    fn empty(&mut self, pipe: &Pipe, file: BorrowedFd<'_>, bytes: usize) {
        let mut offset = self.area.place(self.bytes_written());
        let mut left = bytes;
        let written = write_all(count(bytes), 0, |_| {
            let moved = splice(pipe.reader_fd(), file, Some(&mut offset), left, SpliceFlags::empty())?;
            left -= moved;
            Ok(moved)
        });
        self.end = written.fault.map(TapEnd::File);
        let pages = (bytes - left) / self.page_bytes;
        self.counters.add_out(pages, self.page_bytes);
        self.counters.add_lost(bytes / self.page_bytes - pages);
        discard(pipe, left);
    }

    fn write_page(&mut self, page: &[u8], file: BorrowedFd<'_>) {
        let written = write_all_at(file, page, self.area.place(self.bytes_written()));
        self.end = written.fault.map(TapEnd::File);
        match self.end {
            None => self.counters.add_out(1, self.page_bytes),
            Some(_) => self.counters.add_lost(1),
        }
    }

    /// False, as nothing was moved; the lane goes on if the kernel only had nothing.
    fn end_unless_idle(&mut self, error: SysError) -> bool {
        if !error.would_block() && error.errno != Errno::EINTR {
            self.end = Some(TapEnd::Tap(error));
        }
        false
    }
}

/// Empties a pipe of what no file takes.
fn discard(pipe: &Pipe, mut left: usize) {
    let mut block = [0; 4096];
    while left > 0 {
        match read(pipe.reader_fd(), &mut block) {
            Ok(0) => return,
            Ok(bytes) => left = left.saturating_sub(bytes),
            Err(error) if error.errno == Errno::EINTR => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::Write,
        os::{fd::AsFd, unix::fs::FileExt},
    };

    use nix::mount::{MsFlags, mount, umount};
    use vtrace_common::ids::Cpu;

    use super::*;

    const PAGE: usize = 4096;

    /// A pipe that stands for a tap: whole pages go in and come out.
    fn tap(pages: usize) -> Pipe {
        let pipe = Pipe::new(1 << 20).unwrap();
        let mut writer = File::from(pipe.writer.try_clone().unwrap());
        for page in 1..=pages {
            writer.write_all(&[u8::try_from(page).unwrap(); PAGE]).unwrap();
        }
        pipe
    }

    fn area(pages: usize) -> Area {
        Area { cpu: Cpu(3), offset: 8192, bytes_max: u64::try_from(pages * PAGE).unwrap(), begins_again: false }
    }

    fn counted(counters: &Counters) -> [u64; 3] {
        let ledger = counters.ledger();
        [ledger.pages_in, ledger.pages_out, ledger.pages_lost]
    }

    #[test]
    fn pages_land_in_the_area_in_order() {
        let (tap, pipe, file, counters) =
            (tap(5), Pipe::new(1 << 20).unwrap(), tempfile::tempfile().unwrap(), Counters::default());
        let mut lane = TapLane::new(area(100), PAGE, &counters);
        while lane.move_pages(tap.reader_fd(), &pipe, file.as_fd()) {}
        assert_eq!((counted(&counters), lane.end()), ([5, 5, 0], None));
        let mut back = [0; 5 * PAGE];
        file.read_exact_at(&mut back, 8192).unwrap();
        assert!((0..5 * PAGE).all(|at| usize::from(back[at]) == at / PAGE + 1));
    }

    #[test]
    fn full_area_ends_the_lane_and_takes_no_page_it_cannot_keep() {
        let (tap, pipe, file, counters) =
            (tap(5), Pipe::new(1 << 20).unwrap(), tempfile::tempfile().unwrap(), Counters::default());
        let mut lane = TapLane::new(Area { bytes_max: 3 * 4096 + 4095, ..area(0) }, PAGE, &counters);
        while lane.move_pages(tap.reader_fd(), &pipe, file.as_fd()) {}
        assert_eq!(counted(&counters), [3, 3, 0]);
        assert_eq!(lane.end(), Some(TapEnd::AreaFull { bytes_max: 3 * 4096 + 4095 }));
        assert_eq!(file.metadata().unwrap().len(), 8192 + 3 * 4096);
    }

    #[test]
    fn lane_that_begins_again_goes_over_its_oldest_pages() {
        let (tap, pipe, file, counters) =
            (tap(5), Pipe::new(1 << 20).unwrap(), tempfile::tempfile().unwrap(), Counters::default());
        let mut lane = TapLane::new(Area { begins_again: true, ..area(3) }, PAGE, &counters);
        while lane.move_pages(tap.reader_fd(), &pipe, file.as_fd()) {}
        assert_eq!((counted(&counters), lane.end()), ([5, 5, 0], None));
        assert_eq!(file.metadata().unwrap().len(), 8192 + 3 * 4096);
        let mut back = [0; 3 * PAGE];
        file.read_exact_at(&mut back, 8192).unwrap();
        assert_eq!([back[0], back[PAGE], back[2 * PAGE]], [4, 5, 3]);
    }

    #[test]
    fn file_that_cannot_be_written_ends_the_lane_and_every_page_is_accounted_for() {
        let (tap, pipe, counters) = (tap(5), Pipe::new(1 << 20).unwrap(), Counters::default());
        let read_only = File::open("/proc/self/exe").unwrap();
        let mut lane = TapLane::new(area(100), PAGE, &counters);
        assert!(lane.move_pages(tap.reader_fd(), &pipe, read_only.as_fd()));
        assert_eq!(counted(&counters), [5, 0, 5]);
        assert!(matches!(lane.end(), Some(TapEnd::File(SysError { errno: Errno::EBADF, .. }))));
        assert!(!lane.move_pages(tap.reader_fd(), &pipe, read_only.as_fd()));
        assert!(read(pipe.reader_fd(), &mut [0; 1]).unwrap_err().would_block(), "the pipe is empty for the next lane");
    }

    #[test]
    fn disk_that_fills_up_keeps_the_pages_that_fitted() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root for a small tmpfs");
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        mount(Some("tmpfs"), directory.path(), Some("tmpfs"), MsFlags::empty(), Some("size=16k")).unwrap();
        let file = File::create(directory.path().join("trace")).unwrap();
        let (tap, pipe, counters) = (tap(9), Pipe::new(1 << 20).unwrap(), Counters::default());
        let mut lane = TapLane::new(Area { offset: 0, ..area(100) }, PAGE, &counters);
        while lane.move_pages(tap.reader_fd(), &pipe, file.as_fd()) {}
        assert_eq!(counted(&counters), [9, 4, 5]);
        assert!(matches!(lane.end(), Some(TapEnd::File(SysError { errno: Errno::ENOSPC, .. }))));
        drop(file);
        umount(directory.path()).unwrap();
    }

    #[test]
    fn rest_is_padded_to_a_page() {
        let (tap, file, counters) = (Pipe::new(1 << 20).unwrap(), tempfile::tempfile().unwrap(), Counters::default());
        File::from(tap.writer.try_clone().unwrap()).write_all(b"partly").unwrap();
        let mut lane = TapLane::new(area(100), PAGE, &counters);
        let mut page = vec![0xff; PAGE];
        while lane.move_rest(tap.reader_fd(), &mut page, file.as_fd()) {}
        assert_eq!((counted(&counters), lane.bytes_written()), ([1, 1, 0], 4096));
        file.read_exact_at(&mut page, 8192).unwrap();
        assert!(page.starts_with(b"partly\0") && page[6..].iter().all(|byte| *byte == 0));
    }
}
