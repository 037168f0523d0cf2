//! Links `polyvirt-core` and the driver halves into a library that has its own panic handler and allocator.
//!
//! If one of them, or a dependency of theirs, brought std along, there would be two panic handlers and this would not
//! compile. It needs no target without std to be installed.
#![no_std]

use core::alloc::{GlobalAlloc, Layout};

extern crate polyvirt_core as _;
extern crate polyvirt_devices as _;
extern crate polyvirt_transports as _;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

struct NoMemory;

// SAFETY: it never hands out memory; a null pointer says so.
unsafe impl GlobalAlloc for NoMemory {
    unsafe fn alloc(&self, _: Layout) -> *mut u8 {
        core::ptr::null_mut()
    }

    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

#[global_allocator]
static ALLOCATOR: NoMemory = NoMemory;
