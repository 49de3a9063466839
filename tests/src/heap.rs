//! What is alive of all that this process has allocated: a leak shows at once, what an allocator keeps for later does not.
//!
//! In:    every allocation of a test that declares [`Counting`] its `#[global_allocator]`
//! Out:   [`live`]
//! Runs:  on every thread; two relaxed additions a call
//! Trust: the system's allocator, which does the work
#![expect(unsafe_code, reason = "GlobalAlloc is an unsafe trait")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicIsize, Ordering},
};

static BYTES: AtomicIsize = AtomicIsize::new(0);
static BLOCKS: AtomicIsize = AtomicIsize::new(0);

/// The system's allocator, counted.
#[derive(Clone, Copy, Debug)]
pub struct Counting;

/// Bytes and blocks that were allocated and not freed. Zero where [`Counting`] is not the allocator.
pub fn live() -> (isize, isize) {
    (BYTES.load(Ordering::Relaxed), BLOCKS.load(Ordering::Relaxed))
}

fn count(bytes: usize, blocks: isize) {
    let bytes = isize::try_from(bytes).expect("a Layout is no longer than isize::MAX");
    BYTES.fetch_add(bytes * blocks, Ordering::Relaxed);
    BLOCKS.fetch_add(blocks, Ordering::Relaxed);
}

// SAFETY: each call is passed on as it came to an allocator that keeps the promises; counting touches two numbers only.
unsafe impl GlobalAlloc for Counting {
    // SAFETY: see the impl.
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is passed on.
        let block = unsafe { System.alloc(layout) };
        count(layout.size(), isize::from(!block.is_null()));
        block
    }

    // SAFETY: see the impl.
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(layout.size(), -1);
        // SAFETY: the caller's promise is passed on; what `alloc` gave came from the same allocator.
        unsafe { System.dealloc(block, layout) };
    }

    // SAFETY: see the impl.
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is passed on.
        let block = unsafe { System.alloc_zeroed(layout) };
        count(layout.size(), isize::from(!block.is_null()));
        block
    }

    // SAFETY: see the impl.
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: the caller's promise is passed on; what `alloc` gave came from the same allocator.
        let moved = unsafe { System.realloc(block, layout, bytes) };
        if !moved.is_null() {
            count(layout.size(), -1);
            count(bytes, 1);
        }
        moved
    }
}
