//! Host memory that the other side can change at any time, and how it is touched.

use alloc::sync::Arc;
use core::any::Any;
use core::marker::PhantomData;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::MemoryError;

/// What keeps a [`Segment`] accessible, and sees its accesses.
///
/// The hooks are for memory that is not simply there: a log of accesses, a mirror that is filled by DMA. For plain
/// memory they are empty and cost nothing. Offsets are relative to the segment. What becomes of a queue's chains is not to be
/// told from them: a queue has an [observer](crate::queue::Observer) for that.
pub trait Lease: Send {
    /// `len` bytes at `offset` are about to be read.
    #[inline(always)]
    fn before_load(&self, offset: usize, len: usize) {
        let _ = (offset, len);
    }

    /// `len` bytes at `offset` were written.
    #[inline(always)]
    fn after_store(&self, offset: usize, len: usize) {
        let _ = (offset, len);
    }
}

impl Lease for () {}
/// Whoever owns memory and frees it when the last handle is dropped.
pub type Owner = Arc<dyn Any + Send + Sync>;

impl Lease for Owner {}

/// A piece of host memory that the other side can read and write at any time.
///
/// All accesses copy; whoever needs a value twice reads it once and keeps the copy.
#[derive(Clone, Debug)]
pub struct Segment<L> {
    start: NonNull<u8>,
    len: usize,
    lease: L,
}

/// Host memory with its owner: what a driver allocates for rings and buffers, what a memory map is made of.
pub type Pages = Segment<Owner>;

// SAFETY: a segment is accessed only by atomics and by copies that tolerate concurrent change; the memory itself lives
// as long as the lease, which has to be `Send` itself.
unsafe impl<L: Send> Send for Segment<L> {}
// SAFETY: as above; a shared segment adds nothing that concurrent guests do not do already.
unsafe impl<L: Sync> Sync for Segment<L> {}

impl<L> Segment<L> {
    /// Makes a segment of `len` bytes at `start`.
    ///
    /// # Safety
    /// While `lease` lives, the bytes must stay mapped: readable, and writable if anyone who gets this segment may
    /// write to it. No Rust reference to them may exist.
    pub const unsafe fn new(start: NonNull<u8>, len: usize, lease: L) -> Self {
        Self { start, len, lease }
    }

    /// Bytes.
    #[inline(always)]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether the segment has no bytes.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the segment is in the host's address space: for page tables, system calls and ioctls.
    #[inline(always)]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// What keeps the segment accessible.
    pub const fn lease(&self) -> &L {
        &self.lease
    }

    /// What kept the segment accessible, of which nothing else is left.
    pub fn into_lease(self) -> L {
        self.lease
    }

    /// `len` bytes from `offset` on, kept accessible by `lease` in place of this segment's own.
    ///
    /// # Safety
    /// `lease` must keep this segment's memory mapped.
    #[inline(always)]
    pub(super) unsafe fn part<N>(&self, offset: usize, len: usize, lease: N) -> Option<Segment<N>> {
        let inside = offset <= self.len && len <= self.len - offset;
        // SAFETY: the part is inside; of the lease the caller says so.
        inside.then(|| unsafe { self.part_inside(offset, len, lease) })
    }

    /// As [`Segment::part`], for a part that is inside.
    ///
    /// # Safety
    /// `lease` must keep this segment's memory mapped, and `offset + len` must not exceed this segment's length.
    #[inline(always)]
    pub(super) unsafe fn part_inside<N>(&self, offset: usize, len: usize, lease: N) -> Segment<N> {
        // SAFETY: offset <= len, so the result stays within the segment or one past its end.
        Segment { start: unsafe { self.start.add(offset) }, len, lease }
    }

    /// The same memory with its lease replaced by what `wrap` makes of it.
    pub(super) fn wrap<N>(self, wrap: impl FnOnce(L) -> N) -> Segment<N> {
        Segment { start: self.start, len: self.len, lease: wrap(self.lease) }
    }

    fn check(&self, offset: usize, len: usize) -> Result<*mut u8, MemoryError> {
        if offset > self.len || len > self.len - offset {
            return Err(MemoryError::OutOfBounds { offset, len, size: self.len });
        }
        // SAFETY: offset <= len, checked above.
        Ok(unsafe { self.start.as_ptr().add(offset) })
    }
}

impl<L: Lease> Segment<L> {
    /// Copies bytes from `offset` on into `into`.
    #[inline]
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), MemoryError> {
        let from = self.check(offset, into.len())?;
        self.lease.before_load(offset, into.len());
        // SAFETY: the range is inside the segment (checked), mapped while the lease lives, and cannot overlap `into`,
        // of which a Rust reference exists. A concurrent writer can change which bytes arrive, not where they go.
        unsafe { core::ptr::copy_nonoverlapping(from.cast_const(), into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies `from` to `offset` and on.
    #[inline]
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), MemoryError> {
        let to = self.check(offset, from.len())?;
        // SAFETY: as in `read`, in the other direction.
        unsafe { core::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
        self.lease.after_store(offset, from.len());
        Ok(())
    }

    /// Fills `len` bytes from `offset` on with `byte`.
    pub fn fill(&self, offset: usize, len: usize, byte: u8) -> Result<(), MemoryError> {
        let to = self.check(offset, len)?;
        // SAFETY: the range is inside the segment (checked) and mapped while the lease lives.
        unsafe { core::ptr::write_bytes(to, byte, len) };
        self.lease.after_store(offset, len);
        Ok(())
    }
}

impl Pages {
    /// Allocates `len` bytes, rounded up to whole pages of 4096, zeroed and aligned to a page.
    ///
    /// # Panics
    /// If the host has no memory left, or `len` is above `isize::MAX`.
    pub fn allocate(len: usize) -> Self {
        use alloc::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};

        const PAGE: usize = 4096;
        struct Owner(NonNull<u8>, Layout);
        // SAFETY: the owner does nothing but free the memory when it is dropped.
        unsafe impl Send for Owner {}
        // SAFETY: as above.
        unsafe impl Sync for Owner {}
        impl Drop for Owner {
            fn drop(&mut self) {
                // SAFETY: allocated below with this layout, and freed once.
                unsafe { dealloc(self.0.as_ptr(), self.1) }
            }
        }

        let len = len.max(1).next_multiple_of(PAGE);
        // Aligned here: an allocator that is asked for aligned zeroes writes them, so that memory which nobody uses is taken.
        let layout = Layout::from_size_align(len.saturating_add(PAGE - 1), align_of::<u64>());
        let layout = layout.expect("size of an allocation");
        // SAFETY: the layout's size is not zero.
        let Some(block) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { handle_alloc_error(layout) };
        let before = block.addr().get().wrapping_neg() % PAGE;
        // SAFETY: less than a page is left out, and the block is that much longer.
        let start = unsafe { block.add(before) };
        // SAFETY: the memory is valid until the owner is dropped, and nobody has a reference to it.
        unsafe { Segment::new(start, len, Arc::new(Owner(block, layout))) }
    }

    /// No bytes at all.
    pub(super) fn empty() -> Self {
        // SAFETY: nothing can be accessed.
        unsafe { Segment::new(NonNull::dangling(), 0, Arc::new(())) }
    }

    /// The `len` bytes from `offset` on, under the same owner; none if they reach beyond the end.
    pub fn slice(&self, offset: usize, len: usize) -> Option<Pages> {
        // SAFETY: the owner is the same.
        unsafe { self.part(offset, len, self.lease.clone()) }
    }
}

mod sealed {
    pub trait Sealed {}
}

/// An unsigned integer that memory shared with the other side can hold: `u16`, `u32`, `u64`.
pub trait Word: sealed::Sealed + Copy {
    /// Loads the word at `at` atomically.
    ///
    /// # Safety
    /// `at` must be mapped for reading and aligned to the size of the word.
    #[doc(hidden)]
    unsafe fn load(at: *mut u8, order: Ordering) -> Self;

    /// Stores the word at `at` atomically.
    ///
    /// # Safety
    /// `at` must be mapped for writing and aligned to the size of the word.
    #[doc(hidden)]
    unsafe fn store(at: *mut u8, value: Self, order: Ordering);
}

macro_rules! words {
    ($($word:ty, $atomic:ty;)*) => {$(
        impl sealed::Sealed for $word {}
        #[cfg(not(loom))]
        impl Word for $word {
            #[inline(always)]
            unsafe fn load(at: *mut u8, order: Ordering) -> Self {
                // SAFETY: the caller vouches for mapping and alignment; all parties use atomics on these words.
                unsafe { <$atomic>::from_ptr(at.cast()) }.load(order)
            }
            #[inline(always)]
            unsafe fn store(at: *mut u8, value: Self, order: Ordering) {
                // SAFETY: as above.
                unsafe { <$atomic>::from_ptr(at.cast()) }.store(value, order)
            }
        }
        #[cfg(loom)]
        impl Word for $word {
            #[track_caller]
            unsafe fn load(at: *mut u8, order: Ordering) -> Self {
                // SAFETY: the caller vouches for mapping and alignment.
                crate::sync::model::load(at.addr(), || unsafe { <$atomic>::from_ptr(at.cast()) }.load(order).into(), order) as Self
            }
            #[track_caller]
            unsafe fn store(at: *mut u8, value: Self, order: Ordering) {
                crate::sync::model::store(at.addr(), value.into(), order);
            }
        }
    )*};
}
words! { u16, AtomicU16; u32, AtomicU32; u64, AtomicU64; }

/// What is wrong with an index.
const BEYOND: &str = "a word inside the segment";

/// A segment seen as an array of words: how ring areas are touched.
///
/// `W` is the largest word in it, to which the start is aligned; smaller words have their own, finer indices.
#[derive(Clone, Debug)]
pub struct Words<W, L> {
    segment: Segment<L>,
    /// How many whole words of type `W` there are.
    words: usize,
    /// Where the last of them is: pairs begin before it.
    last: usize,
    word: PhantomData<W>,
}

impl<W: Word, L: Lease> Words<W, L> {
    /// Fails if the segment does not start at a multiple of the size of `W`.
    pub fn new(segment: Segment<L>) -> Result<Self, MemoryError> {
        let address = segment.start.as_ptr().addr();
        if !address.is_multiple_of(size_of::<W>()) {
            return Err(MemoryError::Misaligned { address: address as u64, align: size_of::<W>() });
        }
        let words = segment.len / size_of::<W>();
        Ok(Self { words, last: words.saturating_sub(1), segment, word: PhantomData })
    }

    /// The memory behind the words.
    pub const fn segment(&self) -> &Segment<L> {
        &self.segment
    }

    /// The word of type `T` at `index` (in units of `T`).
    ///
    /// # Panics
    /// If `index` is beyond the end: the caller derives it from a size that it checked, never from guest memory alone.
    #[inline(always)]
    #[cfg_attr(loom, track_caller)]
    pub fn load<T: Word>(&self, index: usize, order: Ordering) -> T {
        self.try_load(index, order).expect(BEYOND)
    }

    /// As [`Words::load`]; none beyond the end.
    #[inline(always)]
    #[cfg_attr(loom, track_caller)]
    pub fn try_load<T: Word>(&self, index: usize, order: Ordering) -> Option<T> {
        let at = self.at::<T>(index)?;
        self.segment.lease.before_load(index * size_of::<T>(), size_of::<T>());
        // SAFETY: inside the segment and aligned, see `at`.
        let value = unsafe { T::load(at, order) };
        Some(value)
    }

    /// Stores `value` at `index` (in units of `T`).
    ///
    /// # Panics
    /// As [`Words::load`].
    #[inline(always)]
    #[cfg_attr(loom, track_caller)]
    pub fn store<T: Word>(&self, index: usize, value: T, order: Ordering) {
        assert!(self.try_store(index, value, order), "{BEYOND}");
    }

    /// As [`Words::store`]; false beyond the end.
    #[must_use]
    #[inline(always)]
    #[cfg_attr(loom, track_caller)]
    pub fn try_store<T: Word>(&self, index: usize, value: T, order: Ordering) -> bool {
        let Some(at) = self.at::<T>(index) else { return false };
        // SAFETY: inside the segment and aligned, see `at`.
        unsafe { T::store(at, value, order) };
        self.segment.lease.after_store(index * size_of::<T>(), size_of::<T>());
        true
    }

    /// The words of type `W` at `index` and behind it; none if they are beyond the end.
    #[inline(always)]
    #[cfg_attr(loom, track_caller)]
    pub fn load_pair(&self, index: usize, order: Ordering) -> Option<(W, W)> {
        if index >= self.last {
            return None;
        }
        self.segment.lease.before_load(index * size_of::<W>(), 2 * size_of::<W>());
        // SAFETY: both are inside the segment; the start is aligned to W.
        let pair = unsafe {
            let at = self.segment.start.as_ptr().add(index * size_of::<W>());
            (W::load(at, order), W::load(at.add(size_of::<W>()), order))
        };
        Some(pair)
    }

    /// As [`Words::load_pair`], but the second word is loaded first, with `order`.
    #[inline(always)]
    #[cfg_attr(loom, track_caller)]
    pub fn load_pair_backwards(&self, index: usize, order: Ordering) -> Option<(W, W)> {
        if index >= self.last {
            return None;
        }
        self.segment.lease.before_load(index * size_of::<W>(), 2 * size_of::<W>());
        // SAFETY: both are inside the segment; the start is aligned to W.
        let pair = unsafe {
            let at = self.segment.start.as_ptr().add(index * size_of::<W>());
            let last = W::load(at.add(size_of::<W>()), order);
            (W::load(at, Ordering::Relaxed), last)
        };
        Some(pair)
    }

    /// Stores `values` at `index` and behind it, in this order; false if they are beyond the end.
    #[must_use]
    #[inline(always)]
    #[cfg_attr(loom, track_caller)]
    pub fn store_pair(&self, index: usize, values: (W, W), order: Ordering) -> bool {
        if index >= self.last {
            return false;
        }
        // SAFETY: as in `load_pair`.
        unsafe {
            let at = self.segment.start.as_ptr().add(index * size_of::<W>());
            W::store(at, values.0, order);
            W::store(at.add(size_of::<W>()), values.1, order);
        }
        self.segment.lease.after_store(index * size_of::<W>(), 2 * size_of::<W>());
        true
    }

    /// Where the word of type `T` at `index` is.
    #[inline(always)]
    fn at<T: Word>(&self, index: usize) -> Option<*mut u8> {
        const { assert!(size_of::<T>() <= size_of::<W>()) };
        // Counted beforehand for words of the largest size, of which most accesses are.
        let words = if size_of::<T>() == size_of::<W>() { self.words } else { self.segment.len / size_of::<T>() };
        if index >= words {
            return None;
        }
        // SAFETY: the index is inside the segment. The start is aligned to W, which is at least as large as T, and
        // both are powers of two, so every multiple of T's size from it is aligned to T.
        Some(unsafe { self.segment.start.as_ptr().add(index * size_of::<T>()) })
    }
}
