//! In the steady state neither side of a queue allocates.
#![allow(unsafe_code, reason = "an allocator that counts")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use common::{Rig, Shape, buffer, every_shape};

/// The system's allocator, which counts the calls of each thread.
struct Counting;

thread_local! {
    static CALLS: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    // A thread that is ending has no counter any more.
    let _ = CALLS.try_with(|calls| calls.set(calls.get() + 1));
}

// SAFETY: every call goes to the system's allocator as it is; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count();
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn calls() -> usize {
    CALLS.with(Cell::get)
}

/// One round: the ring is filled, served and emptied.
fn round(rig: &mut Rig) {
    let mut added = 0;
    while rig.driver.free() >= 3 {
        let pieces = [buffer(0, 16), buffer(1, 16), buffer(2, 16)];
        rig.driver.add_buf(&pieces[..1], &pieces[1..], added).unwrap();
        added += 1;
    }
    rig.driver.kick().unwrap();
    assert_eq!(rig.serve() as u64, added);
    rig.device.needs_interrupt();
    for token in 0..added {
        assert_eq!(rig.driver.get_buf().unwrap(), Some((token, 0)));
    }
}

#[test]
fn the_counter_counts() {
    let before = calls();
    drop(std::hint::black_box(Box::new(1)));
    assert_eq!(calls() - before, 2);
}

#[test]
fn a_queue_that_has_been_full_once_allocates_nothing_more() {
    for shape in every_shape(16).flat_map(|shape| [false, true].map(|indirect| Shape { indirect, ..shape })) {
        let mut rig = Rig::new(shape);
        round(&mut rig);
        let before = calls();
        (0..100).for_each(|_| round(&mut rig));
        assert_eq!(calls() - before, 0, "{shape:?}");
    }
}
