//! The system's allocator, which counts for each thread, in every program that this is part of.
#![allow(unsafe_code, reason = "an allocator")]
#![allow(dead_code, unreachable_pub, reason = "each test uses its part")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// What this thread has allocated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Calls that allocate or grow.
    pub calls: usize,
    /// Bytes that are allocated now; what other threads freed still counts.
    pub live: isize,
    /// The most bytes that were allocated at once, since [`restart`].
    pub peak: isize,
}

thread_local! {
    static COUNT: Cell<Count> = const { Cell::new(Count { calls: 0, live: 0, peak: 0 }) };
}

/// What this thread has allocated since [`restart`].
pub fn count() -> Count {
    COUNT.with(Cell::get)
}

/// Counts from 0 again.
pub fn restart() {
    COUNT.with(|count| count.set(Count::default()));
}

fn changed(calls: usize, bytes: isize) {
    // A thread that is ending has no counter any more.
    let _ = COUNT.try_with(|cell| {
        let count = cell.get();
        let live = count.live.wrapping_add(bytes);
        cell.set(Count { calls: count.calls.wrapping_add(calls), live, peak: count.peak.max(live) });
    });
}

struct Counting;

// SAFETY: every call goes to the system's allocator as it is; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        changed(1, layout.size() as isize);
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        changed(1, layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        changed(0, -(layout.size() as isize));
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        changed(1, size as isize - layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;
