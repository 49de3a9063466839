//! Guest memory: address checks, volatile access, batches for vectored writes.
//!
//! In:    a vhost-user memory table and its descriptors; guest-physical and VMM-virtual addresses (both foreign)
//! Out:   checked [`Span`]s, [`Window`]s with atomic loads and stores, [`Batch`]es that the kernel writes from
//! Runs:  wherever its owner runs; a [`Memory`] never changes, a new table makes a new one, and the mapping of the old
//!        one lives as long as it is used
//! Full:  a [`Batch`] says so and takes no more; regions beyond a guest's [share](MemoryShare) are refused
//! Trust: the guest with nothing: it may change any byte at any time, so a value is loaded once and then checked. The
//!        VMM with one thing: that it does not shrink the file of its own guest's memory, which would end this
//!        process by SIGBUS at the next load (writes from such memory only fail, with EFAULT). It owns that memory and
//!        could stop its guest more simply.
//!
//! Unsafe code is here because the kernel is handed pointers into guest memory. No reference to guest memory is formed.

#![expect(unsafe_code, reason = "vectored writes take their bytes from guest memory by address")]

use std::{
    fs::File,
    io,
    ops::Deref,
    os::fd::{AsRawFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence},
    },
};

use nix::errno::Errno;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, mmap::MmapRegionError};
use vtrace_common::limits::MEMORY_REGIONS_MAX;

use self::budget::{MemoryShare, OverBudget, Reservation};
use crate::sys::{
    SysError,
    descriptor::{DescriptorFault, check_memory_file},
    write_all::{Written, write_all},
    writes::Vectors,
};

pub mod budget;

/// Entries of one vectored write (IOV_MAX, include/uapi/linux/uio.h).
pub const BATCH_ENTRIES_MAX: usize = 1024;
/// Bytes of our own that a batch has room for.
pub const OWN_BYTES_MAX: usize = 4096;
/// Alignment of a region in the guest, in the VMM and in its file: then alignment in the guest is alignment here.
const REGION_ALIGNMENT: u64 = 4096;

/// Why a memory table is refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryFault {
    /// More regions than the limit.
    #[error("{count} memory regions are more than {MEMORY_REGIONS_MAX}")]
    TooMany {
        /// How many there would be.
        count: usize,
    },
    /// Regions and descriptors must pair up.
    #[error("{regions} memory regions came with {files} descriptors")]
    Unpaired {
        /// Regions in the table.
        regions: usize,
        /// Descriptors with it.
        files: usize,
    },
    /// A region is empty, wraps around the address space or is not aligned to a page.
    #[error("memory region at {gpa:#x} of {bytes:#x} bytes is empty, unaligned or wraps around")]
    Shape {
        /// Where it begins in the guest.
        gpa: u64,
        /// Its size.
        bytes: u64,
    },
    /// Two regions claim the same guest-physical or VMM-virtual addresses.
    #[error("memory region at {gpa:#x} overlaps another one")]
    Overlap {
        /// Where the later one begins in the guest.
        gpa: u64,
    },
    /// The file is shorter than the region.
    #[error("memory region at {gpa:#x} ends at byte {end:#x} of a file of {file_bytes:#x} bytes")]
    Short {
        /// Where it begins in the guest.
        gpa: u64,
        /// Where it ends in the file.
        end: u64,
        /// Bytes of the file.
        file_bytes: u64,
    },
    /// The region to be removed is not there.
    #[error("no memory region at {gpa:#x} of {bytes:#x} bytes")]
    Absent {
        /// Where it should begin in the guest.
        gpa: u64,
        /// Its size.
        bytes: u64,
    },
    /// The file could not be examined.
    #[error("memory region at {gpa:#x}: file size")]
    File {
        /// Where it begins in the guest.
        gpa: u64,
        /// The kernel's error.
        source: io::Error,
    },
    /// The guest has mapped as much as it may.
    #[error("memory region at {gpa:#x} of {bytes:#x} bytes: this guest may map {left:#x} bytes more")]
    Budget {
        /// Where it begins in the guest.
        gpa: u64,
        /// Its size.
        bytes: u64,
        /// Bytes the guest may still map.
        left: u64,
    },
    /// The descriptor cannot back memory.
    #[error("memory region at {gpa:#x}")]
    Descriptor {
        /// Where it begins in the guest.
        gpa: u64,
        /// What is wrong with it.
        source: DescriptorFault,
    },
    /// The file could not be mapped.
    #[error("memory region at {gpa:#x}: map")]
    Map {
        /// Where it begins in the guest.
        gpa: u64,
        /// The error of the mapping.
        source: MmapRegionError,
    },
}

/// An address, or a stretch of memory that begins there, is outside guest memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("address {0:#x} is outside guest memory")]
pub struct Outside(pub u64);

/// The guest's memory as one memory table maps it.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// Sorted by guest-physical address; no overlaps there nor in the VMM's addresses.
    regions: Vec<Region>,
    share: MemoryShare,
}

#[derive(Clone, Debug)]
struct Region {
    gpa: u64,
    vmm: u64,
    bytes: u64,
    mapping: Arc<Mapping>,
}

/// A mapped region, with its part of the guest's share. The bytes are given back after they are unmapped.
#[derive(Debug)]
struct Mapping {
    region: MmapRegion,
    _reserved: Reservation,
}

impl Deref for Mapping {
    type Target = MmapRegion;

    fn deref(&self) -> &MmapRegion {
        &self.region
    }
}

/// A stretch of guest memory that was checked to lie inside one region. No reference is ever formed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Span {
    /// Guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub bytes: u32,
}

impl Memory {
    /// Memory without regions, of a guest that has this share.
    pub fn empty(share: MemoryShare) -> Self {
        Self { regions: Vec::new(), share }
    }

    /// Maps a whole memory table of the only guest of a process.
    pub fn map(table: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<Arc<Self>, MemoryFault> {
        Self::default().with_table(table, files)
    }

    /// The same guest's memory as a whole table says (vhost-user SET_MEM_TABLE): one descriptor for each region.
    pub fn with_table(&self, table: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<Arc<Self>, MemoryFault> {
        if table.len() != files.len() {
            return Err(MemoryFault::Unpaired { regions: table.len(), files: files.len() });
        }
        if table.len() > MEMORY_REGIONS_MAX {
            return Err(MemoryFault::TooMany { count: table.len() });
        }
        let mut memory = Self::empty(self.share.clone());
        for (region, file) in table.iter().zip(files) {
            memory.insert(Region::map(region, file, &self.share)?)?;
        }
        Ok(Arc::new(memory))
    }

    /// This memory and one more region (ADD_MEM_REG).
    pub fn with_region(&self, region: &VhostUserMemoryRegion, file: File) -> Result<Arc<Self>, MemoryFault> {
        let mut memory = self.clone();
        memory.insert(Region::map(region, file, &self.share)?)?;
        Ok(Arc::new(memory))
    }

    /// This memory without one region (REM_MEM_REG; the offset into the file is not compared).
    pub fn without_region(&self, region: &VhostUserMemoryRegion) -> Result<Arc<Self>, MemoryFault> {
        let (gpa, vmm, bytes) = (region.guest_phys_addr, region.user_addr, region.memory_size);
        let mut memory = self.clone();
        memory.regions.retain(|known| (known.gpa, known.vmm, known.bytes) != (gpa, vmm, bytes));
        if memory.regions.len() == self.regions.len() {
            return Err(MemoryFault::Absent { gpa, bytes });
        }
        Ok(Arc::new(memory))
    }

    /// Bytes of all regions.
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.bytes).sum()
    }

    fn insert(&mut self, region: Region) -> Result<(), MemoryFault> {
        if self.regions.len() >= MEMORY_REGIONS_MAX {
            return Err(MemoryFault::TooMany { count: self.regions.len() + 1 });
        }
        if self.regions.iter().any(|known| known.overlaps(&region)) {
            return Err(MemoryFault::Overlap { gpa: region.gpa });
        }
        let at = self.regions.partition_point(|known| known.gpa < region.gpa);
        self.regions.insert(at, region);
        Ok(())
    }

    /// The guest-physical address of a VMM-virtual one: vhost-user names rings by the latter.
    pub fn translate(&self, vmm: u64) -> Result<u64, Outside> {
        let inside = |region: &&Region| vmm.checked_sub(region.vmm).is_some_and(|offset| offset < region.bytes);
        self.regions.iter().find(inside).map(|region| region.gpa + (vmm - region.vmm)).ok_or(Outside(vmm))
    }

    /// The first of `bytes` at `gpa` that lie in one region; what is left lies in the next one. Hot.
    pub fn span(&self, gpa: u64, bytes: u32) -> Result<Span, Outside> {
        let (region, offset) = self.locate(gpa).ok_or(Outside(gpa))?;
        let room = u32::try_from(region.bytes - offset).unwrap_or(u32::MAX);
        Ok(Span { gpa, bytes: bytes.min(room) })
    }

    /// A piece of guest memory that lies in one region, for repeated access.
    pub fn window(&self, gpa: u64, bytes: usize) -> Result<Window, Outside> {
        let (region, offset) = self.locate(gpa).ok_or(Outside(gpa))?;
        let offset = usize::try_from(offset).map_err(|_| Outside(gpa))?;
        region.mapping.get_slice(offset, bytes).map_err(|_| Outside(gpa))?;
        Ok(Window { mapping: Arc::clone(&region.mapping), offset, bytes })
    }

    /// Copies from the guest, as many bytes as both have; returns how many. Each byte is loaded once. Hot.
    pub fn copy_out(&self, span: Span, into: &mut [u8]) -> Result<usize, Outside> {
        let bytes = usize::try_from(span.bytes).map_or(into.len(), |bytes| bytes.min(into.len()));
        let (region, offset) = self.place(span.gpa, bytes)?;
        let slice = region.mapping.get_slice(offset, bytes).map_err(|_| Outside(span.gpa))?;
        Ok(slice.copy_to(&mut into[..bytes]))
    }

    /// Has the processor fetch the first bytes of a span, which are wanted soon: a guest's page is seldom in this
    /// processor's cache, and waiting for one after the other costs more than all else that is done with them. Hot.
    pub fn prefetch(&self, span: Span) {
        let Ok((region, offset)) = self.place(span.gpa, 1) else { return };
        let Ok(slice) = region.mapping.get_slice(offset, 1) else { return };
        let guard = slice.ptr_guard();
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch reads nothing into the program and never faults, whatever lies at the address.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(guard.as_ptr().cast());
        }
    }

    /// Copies into the guest, as many bytes as both have; returns how many.
    pub fn copy_in(&self, span: Span, from: &[u8]) -> Result<usize, Outside> {
        let bytes = usize::try_from(span.bytes).map_or(from.len(), |bytes| bytes.min(from.len()));
        let (region, offset) = self.place(span.gpa, bytes)?;
        let slice = region.mapping.get_slice(offset, bytes).map_err(|_| Outside(span.gpa))?;
        slice.copy_from(&from[..bytes]);
        Ok(bytes)
    }

    fn place(&self, gpa: u64, bytes: usize) -> Result<(&Region, usize), Outside> {
        let (region, offset) = self.locate(gpa).ok_or(Outside(gpa))?;
        let bytes = u64::try_from(bytes).map_err(|_| Outside(gpa))?;
        if bytes > region.bytes - offset {
            return Err(Outside(gpa));
        }
        Ok((region, usize::try_from(offset).map_err(|_| Outside(gpa))?))
    }

    fn locate(&self, gpa: u64) -> Option<(&Region, u64)> {
        let after = self.regions.partition_point(|region| region.gpa <= gpa);
        let region = self.regions.get(after.checked_sub(1)?)?;
        let offset = gpa - region.gpa;
        (offset < region.bytes).then_some((region, offset))
    }
}

impl Region {
    fn map(region: &VhostUserMemoryRegion, file: File, share: &MemoryShare) -> Result<Self, MemoryFault> {
        let (gpa, vmm, bytes, start) =
            (region.guest_phys_addr, region.user_addr, region.memory_size, region.mmap_offset);
        let aligned = (gpa | vmm | start).is_multiple_of(REGION_ALIGNMENT);
        let fits = gpa.checked_add(bytes).is_some() && vmm.checked_add(bytes).is_some();
        let (Ok(size), Some(end), true, true) = (usize::try_from(bytes), start.checked_add(bytes), aligned, fits)
        else {
            return Err(MemoryFault::Shape { gpa, bytes });
        };
        if size == 0 || isize::try_from(size).is_err() || i64::try_from(end).is_err() {
            return Err(MemoryFault::Shape { gpa, bytes });
        }
        check_memory_file(&file).map_err(|source| MemoryFault::Descriptor { gpa, source })?;
        let file_bytes = file.metadata().map_err(|source| MemoryFault::File { gpa, source })?.len();
        if end > file_bytes {
            return Err(MemoryFault::Short { gpa, end, file_bytes });
        }
        let over = |OverBudget(left)| MemoryFault::Budget { gpa, bytes, left };
        let reserved = share.reserve(bytes).map_err(over)?;
        let region = MmapRegion::from_file(FileOffset::new(file, start), size)
            .map_err(|source| MemoryFault::Map { gpa, source })?;
        Ok(Self { gpa, vmm, bytes, mapping: Arc::new(Mapping { region, _reserved: reserved }) })
    }

    fn overlaps(&self, other: &Self) -> bool {
        let meet = |a: u64, a_bytes: u64, b: u64, b_bytes: u64| a < b + b_bytes && b < a + a_bytes;
        meet(self.gpa, self.bytes, other.gpa, other.bytes) || meet(self.vmm, self.bytes, other.vmm, other.bytes)
    }
}

/// A piece of guest memory inside one region: a ring's table, loaded and stored word by word. Words are little-endian
/// (virtio 1.3, 1.4). Offsets are the caller's own arithmetic: one outside the window, or not a multiple of the word in
/// a window that begins at such a multiple, is a mistake in this program and panics.
#[derive(Clone, Debug)]
pub struct Window {
    mapping: Arc<Mapping>,
    offset: usize,
    bytes: usize,
}

impl Window {
    /// Bytes of the window.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Loads a u16. Hot.
    pub fn load_u16(&self, at: usize, order: Ordering) -> u16 {
        u16::from_le(self.with::<AtomicU16, _>(at, |word| word.load(order)))
    }

    /// Loads a u32. Hot.
    pub fn load_u32(&self, at: usize, order: Ordering) -> u32 {
        u32::from_le(self.with::<AtomicU32, _>(at, |word| word.load(order)))
    }

    /// Loads a u64. Hot.
    pub fn load_u64(&self, at: usize, order: Ordering) -> u64 {
        u64::from_le(self.with::<AtomicU64, _>(at, |word| word.load(order)))
    }

    /// Stores a u16. Hot.
    pub fn store_u16(&self, at: usize, value: u16, order: Ordering) {
        self.with::<AtomicU16, _>(at, |word| word.store(value.to_le(), order));
    }

    /// Stores a u32. Hot.
    pub fn store_u32(&self, at: usize, value: u32, order: Ordering) {
        self.with::<AtomicU32, _>(at, |word| word.store(value.to_le(), order));
    }

    /// Stores a u64. Hot.
    pub fn store_u64(&self, at: usize, value: u64, order: Ordering) {
        self.with::<AtomicU64, _>(at, |word| word.store(value.to_le(), order));
    }

    fn with<W: vm_memory::AtomicInteger, R>(&self, at: usize, access: impl FnOnce(&W) -> R) -> R {
        assert!(at < self.bytes && size_of::<W>() <= self.bytes - at, "offset {at} is outside the window");
        access(
            self.mapping.get_atomic_ref(self.offset + at).expect("the window lies inside its mapping and is aligned"),
        )
    }
}

/// Orders a store to guest memory before a load that follows: either we see what the guest stored, or it sees ours.
pub fn full_fence() {
    fence(Ordering::SeqCst);
}

/// Spans gathered for one vectored write; keeps the mapping alive. Allocated once.
pub struct Batch {
    memory: Arc<Memory>,
    entries: Vec<libc::iovec>,
    bytes: u64,
    /// Bytes that stand for some of the guest's.
    own: Arc<MmapRegion>,
    own_bytes: usize,
}

// SAFETY: the pointers lead into mappings that `memory` and `own` keep in place wherever the batch goes; they are only
// handed to the kernel, which reads bytes that the guest may be changing at that time, as it may for any device.
unsafe impl Send for Batch {}

// SAFETY: `memory` and `own` keep what the entries name mapped, and go only with the batch; the entries lie on the heap,
// where they stay when the batch is moved.
unsafe impl Vectors for Batch {
    fn vectors(&self) -> &[libc::iovec] {
        &self.entries
    }
}

/// A place in a batch to return to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mark {
    entries: usize,
    last_bytes: usize,
    bytes: u64,
}

impl Batch {
    /// An empty batch over `memory`.
    pub fn new(memory: Arc<Memory>) -> Self {
        let own = MmapRegion::new(OWN_BYTES_MAX).expect("a page of memory");
        Self { memory, entries: Vec::with_capacity(BATCH_ENTRIES_MAX), bytes: 0, own: Arc::new(own), own_bytes: 0 }
    }

    /// From now on, spans of `memory`. The batch is empty.
    pub fn remap(&mut self, memory: &Arc<Memory>) {
        assert!(self.entries.is_empty(), "what is gathered belongs to the old memory");
        if !Arc::ptr_eq(&self.memory, memory) {
            self.memory = Arc::clone(memory);
        }
    }

    /// Adds a span that lies in one region. False if the batch is full: write it, clear it, push again. Hot.
    pub fn push(&mut self, span: Span) -> Result<bool, Outside> {
        let bytes = usize::try_from(span.bytes).map_err(|_| Outside(span.gpa))?;
        let (region, offset) = self.memory.place(span.gpa, bytes)?;
        let slice = region.mapping.get_slice(offset, bytes).map_err(|_| Outside(span.gpa))?;
        let base = slice.ptr_guard().as_ptr().cast_mut();
        Ok(self.append(base, bytes))
    }

    /// Adds bytes that are not the guest's, and copies them. False if there is no room. Hot.
    pub fn push_own(&mut self, bytes: &[u8]) -> bool {
        let Ok(slice) = self.own.get_slice(self.own_bytes, bytes.len()) else { return false };
        slice.copy_from(bytes);
        let base = slice.ptr_guard().as_ptr().cast_mut();
        let is_pushed = self.append(base, bytes.len());
        self.own_bytes += if is_pushed { bytes.len() } else { 0 };
        is_pushed
    }

    fn append(&mut self, base: *mut u8, bytes: usize) -> bool {
        let full = self.entries.len() == BATCH_ENTRIES_MAX;
        match self.entries.last_mut() {
            Some(last) if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == base => last.iov_len += bytes,
            _ if full => return false,
            _ => self.entries.push(libc::iovec { iov_base: base.cast(), iov_len: bytes }),
        }
        self.bytes += u64::try_from(bytes).expect("usize has at most 64 bits");
        true
    }

    /// Every entry begins and ends at a multiple of `alignment`. Hot.
    pub fn is_aligned(&self, alignment: usize) -> bool {
        let bits = self.entries.iter().fold(0, |bits, entry| bits | entry.iov_base.addr() | entry.iov_len);
        bits.is_multiple_of(alignment)
    }

    /// Bytes gathered. Hot.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The memory the spans belong to.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Where the next span will go. Hot.
    pub fn mark(&self) -> Mark {
        let last_bytes = self.entries.last().map_or(0, |last| last.iov_len);
        Mark { entries: self.entries.len(), last_bytes, bytes: self.bytes }
    }

    /// Takes back what was pushed since `mark`, which is of this batch since its last `clear`. Hot.
    pub fn rewind(&mut self, mark: Mark) {
        self.entries.truncate(mark.entries);
        if let Some(last) = self.entries.last_mut() {
            last.iov_len = mark.last_bytes;
        }
        self.bytes = mark.bytes;
    }

    /// Forgets everything. Hot.
    pub fn clear(&mut self) {
        self.entries.clear();
        (self.bytes, self.own_bytes) = (0, 0);
    }

    /// Writes what is left after the first `done` bytes, at its offset in a file in which the batch begins at `offset`.
    /// Like [`Batch::write_at`], and says how far all of it came.
    pub fn write_rest(&mut self, file: BorrowedFd<'_>, offset: u64, done: u64) -> Written {
        let first = self.advance(0, usize::try_from(done).expect("bytes of a batch in memory"));
        self.write_from(file, offset, first, done)
    }

    /// Writes everything at `offset` of the file. The batch is used up: entries move on as they are written, so only
    /// `clear` may follow. Hot.
    pub fn write_at(&mut self, file: BorrowedFd<'_>, offset: u64) -> Written {
        self.write_from(file, offset, 0, 0)
    }

    fn write_from(&mut self, file: BorrowedFd<'_>, offset: u64, mut first: usize, done: u64) -> Written {
        write_all(self.bytes, done, |done| {
            let bytes = self.write_once(file, first, offset + done)?;
            first = self.advance(first, bytes);
            Ok(bytes)
        })
    }

    fn write_once(&self, file: BorrowedFd<'_>, first: usize, offset: u64) -> Result<usize, SysError> {
        const CALL: &str = "pwritev";
        let entries = &self.entries[first..];
        let count = libc::c_int::try_from(entries.len()).expect("a batch has at most 1024 entries");
        let offset = libc::off_t::try_from(offset).map_err(|_| SysError { call: CALL, errno: Errno::EFBIG })?;
        // SAFETY: `entries` are `count` initialized iovecs, each inside a mapping that `self.memory` keeps alive during
        // the call. The kernel only reads there; the guest and its VMM may write meanwhile, which can change what the
        // file gets and nothing else; a page that is gone gives EFAULT.
        let written = unsafe { libc::pwritev(file.as_raw_fd(), entries.as_ptr(), count, offset) };
        usize::try_from(written).map_err(|_| SysError { call: CALL, errno: Errno::last() })
    }

    /// Moves the entries from `first` on past `bytes`; returns the first that has bytes left.
    fn advance(&mut self, mut first: usize, mut bytes: usize) -> usize {
        while let Some(entry) = self.entries.get_mut(first) {
            if bytes < entry.iov_len {
                entry.iov_base = entry.iov_base.cast::<u8>().wrapping_add(bytes).cast();
                entry.iov_len -= bytes;
                break;
            }
            bytes -= entry.iov_len;
            first += 1;
        }
        first
    }
}

impl std::fmt::Debug for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Batch").field("entries", &self.entries.len()).field("bytes", &self.bytes).finish()
    }
}

#[cfg(test)]
mod tests;
