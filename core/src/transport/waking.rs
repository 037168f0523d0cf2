//! Interrupts that wake tasks: what futures are made of.

use alloc::boxed::Box;
use core::task::Waker;

use super::{Transport, TransportError};

/// A transport over a guest that wakes tasks.
pub trait WakingTransport: Transport {
    /// Has `waker` woken, once, when the device interrupts; at once if it has, and the interrupt was not taken. A waker that
    /// was handed over before may be forgotten.
    fn wake_on_interrupt(&mut self, waker: &Waker) -> Result<(), TransportError>;
}

impl<T: WakingTransport + ?Sized> WakingTransport for Box<T> {
    fn wake_on_interrupt(&mut self, waker: &Waker) -> Result<(), TransportError> {
        (**self).wake_on_interrupt(waker)
    }
}
