//! What a disk is asked for, and who does it.

use std::io;
use std::task::Waker;

/// Requests that a device has with its backend at once, at most: with what one of them can hold it bounds memory.
pub const IN_FLIGHT: usize = 16;
/// Bytes that a read or write may have at most.
pub const TRANSFER: u64 = 1 << 20;
/// Bytes that are zeroed or discarded by one request at most.
pub const RANGE: u64 = 16 << 20;

/// What a backend is asked for, in bytes from the start of the disk. The device has checked that it lies inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Read `len` bytes, at most [`TRANSFER`].
    Read {
        /// Where.
        offset: u64,
        /// How many.
        len: usize,
    },
    /// Write these bytes, at most [`TRANSFER`].
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Vec<u8>,
    },
    /// Make durable everything whose completion was reported before.
    Flush,
    /// Make `len` bytes, at most [`RANGE`], read as zero.
    Zero {
        /// Where.
        offset: u64,
        /// How many.
        len: u64,
        /// Whether they need not keep the room that they take.
        deallocate: bool,
    },
    /// Forget `len` bytes, at most [`RANGE`]: what they read as is up to the backend.
    Discard {
        /// Where.
        offset: u64,
        /// How many.
        len: u64,
    },
}

/// A request that is done.
#[derive(Debug)]
pub struct Completion {
    /// What [`Backend::submit`] was given.
    pub id: u64,
    /// The bytes of a read; empty for others.
    pub result: io::Result<Vec<u8>>,
}

/// A disk. It owns the buffers of what it works on, so it may finish a request whenever it likes: nothing of the guest's
/// is touched but by the device.
///
/// A device has at most [`IN_FLIGHT`] requests with it at once, those that a reset made it [cancel](Self::cancel)
/// included.
pub trait Backend: Send {
    /// Sectors of 512 bytes, as far as is known.
    fn capacity(&self) -> u64;

    /// Looks how large the medium is now, if that may have changed with nobody to say so.
    fn refresh(&mut self) {}

    /// Whether [`Request::Zero`] and [`Request::Discard`] can give room back.
    fn deallocates(&self) -> bool {
        true
    }

    /// What tells this medium from others, if anything does: a name for GET_ID of at most 20 bytes.
    fn id(&self) -> Option<String> {
        None
    }

    /// Begins `request`; [`Backend::complete`] will say what became of it. Never waits. Requests that are with it at the
    /// same time may be done in any order.
    fn submit(&mut self, id: u64, request: Request);

    /// Nobody wants request `id` any more: it need not be done if it is not begun. It is completed all the same.
    fn cancel(&mut self, id: u64) {
        let _ = id;
    }

    /// The next completion, in any order; none if nothing else is done yet.
    fn complete(&mut self) -> Option<Completion>;

    /// What to wake when there is a completion, or when the capacity has changed.
    fn set_waker(&mut self, waker: Waker);
}
