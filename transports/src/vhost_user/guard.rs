//! Maps whose files become shorter than they were: touching what is gone is SIGBUS, which would end the process.
//!
//! A process that wants to outlive it has the signal caught: zeroes take the place of the whole map, and the map is
//! marked as lost, so that its session can be ended.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::libc::{c_int, siginfo_t};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// The most maps that are guarded: there are no more.
pub(super) const MAPS: usize = 2048;

/// The maps that there are. A signal handler reads it, so it is a fixed place and takes no lock.
static GUARDED: [Guarded; MAPS] = [const { Guarded::NONE }; MAPS];

/// What was done about SIGBUS before.
static BEFORE: OnceLock<SigAction> = OnceLock::new();

struct Guarded {
    taken: AtomicBool,
    /// 0 while the entry says nothing.
    start: AtomicUsize,
    len: AtomicUsize,
    lost: AtomicBool,
}

impl Guarded {
    #[allow(clippy::declare_interior_mutable_const, reason = "the value of each slot at first, never used itself")]
    const NONE: Self = Self {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        lost: AtomicBool::new(false),
    };
}

/// A map, unmapped when this is dropped.
pub(super) struct Mapping {
    start: NonNull<c_void>,
    len: usize,
    guarded: &'static Guarded,
}

// SAFETY: a mapping belongs to the process, not to a thread; all that is done with it is to unmap it once.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Takes over `len` bytes that are mapped at `start`. None, and they are unmapped, if they cannot be guarded.
    pub(super) fn new(start: NonNull<c_void>, len: usize) -> Option<Self> {
        let free = |entry: &&Guarded| !entry.taken.swap(true, Ordering::AcqRel);
        let Some(guarded) = GUARDED.iter().find(free) else {
            unmap(start, len);
            return None;
        };
        guarded.lost.store(false, Ordering::Relaxed);
        guarded.len.store(len, Ordering::Relaxed);
        // Release: who sees the start sees the length.
        guarded.start.store(start.as_ptr().addr(), Ordering::Release);
        Some(Self { start, len, guarded })
    }

    /// Whether bytes of it went away, and zeroes are in its place.
    pub(super) fn is_lost(&self) -> bool {
        self.guarded.lost.load(Ordering::Acquire)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.guarded.start.store(0, Ordering::Release);
        unmap(self.start, self.len);
        self.guarded.taken.store(false, Ordering::Release);
    }
}

fn unmap(start: NonNull<c_void>, len: usize) {
    // SAFETY: the caller had it mapped with this length, and every handle to it is gone.
    if let Err(error) = unsafe { munmap(start, len) } {
        tracing::error!(%error, "memory of the other side stays mapped");
    }
}

/// Has this process outlive files that become shorter while they are mapped: such a session ends with a reason. Catches
/// SIGBUS for the maps of this module; whatever else it is about goes where it went before.
pub fn outlive_truncation() -> Result<(), Errno> {
    let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK;
    let action = SigAction::new(SigHandler::SigAction(caught), flags, SigSet::empty());
    // SAFETY: the handler makes no call but mmap and sigaction, reads atomics, and allocates nothing.
    let before = unsafe { sigaction(Signal::SIGBUS, &action) }?;
    // The second time it is our own, which must not follow itself.
    let _ = BEFORE.set(before);
    Ok(())
}

extern "C" fn caught(_signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel hands a valid description of the signal over.
    let address = unsafe { (*info).si_addr() }.addr();
    let hit = GUARDED.iter().find(|entry| {
        let start = entry.start.load(Ordering::Acquire);
        start != 0 && address.wrapping_sub(start) < entry.len.load(Ordering::Relaxed)
    });
    if let Some(entry) = hit {
        let place = NonZeroUsize::new(entry.start.load(Ordering::Relaxed));
        let len = NonZeroUsize::new(entry.len.load(Ordering::Relaxed));
        if let (Some(place), Some(len)) = (place, len) {
            let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            let flags = MapFlags::MAP_FIXED | MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
            // SAFETY: replaces exactly a mapping of ours, which stays readable and writable; nobody has a reference to
            // its bytes. It cannot be unmapped meanwhile: somebody is just touching it.
            if unsafe { mmap_anonymous(Some(place), len, rights, flags) }.is_ok() {
                entry.lost.store(true, Ordering::Release);
                return;
            }
        }
    }
    // Not ours: it comes again, and goes where it would have gone.
    if let Some(before) = BEFORE.get() {
        // SAFETY: the action was in force before.
        let _ = unsafe { sigaction(Signal::SIGBUS, before) };
    }
}
