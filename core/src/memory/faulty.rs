//! Refusals on demand, to prove that a device survives them.

use alloc::sync::Arc;

use super::{Access, GuestMemory, ResolveError, Segment};

/// Guest memory that asks a judge before it resolves a range, and refuses what the judge refuses.
#[derive(Clone)]
pub struct Faulty<M> {
    inner: M,
    judge: Arc<Judge>,
}

type Judge = dyn Fn(u64, u64, Access) -> Result<(), ResolveError> + Send + Sync;

impl<M> Faulty<M> {
    /// Puts `judge` (address, length, access) in front of `inner`.
    pub fn new(inner: M, judge: Arc<Judge>) -> Self {
        Self { inner, judge }
    }
}

impl<M: GuestMemory> GuestMemory for Faulty<M> {
    type Lease = M::Lease;

    fn resolve(
        &self,
        address: u64,
        len: u64,
        access: Access,
        segments: impl FnMut(Segment<Self::Lease>),
    ) -> Result<(), ResolveError> {
        (self.judge)(address, len, access)?;
        self.inner.resolve(address, len, access, segments)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{FlatMemory, MemoryError, Pages};
    use super::*;

    #[test]
    fn what_the_judge_refuses_is_refused_and_the_rest_passes() {
        let flat = FlatMemory::new([(0, Pages::allocate(4096))]);
        let memory = Faulty::new(
            &flat,
            Arc::new(|address, len, access: Access| {
                if access.contains(Access::WRITE) && address < 0x100 {
                    return Err(MemoryError::Forbidden { address, len, access }.into());
                }
                Ok(())
            }),
        );
        assert!(memory.resolve(0x10, 4, Access::READ, |_| {}).is_ok());
        assert!(memory.resolve(0x100, 4, Access::WRITE, |_| {}).is_ok());
        assert!(matches!(
            memory.resolve(0x10, 4, Access::WRITE, |_| {}),
            Err(ResolveError::Fault(MemoryError::Forbidden { .. }))
        ));
    }
}
