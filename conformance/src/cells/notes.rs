//! What is written down of the accesses of a driver to registers, and what becomes of them.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use polyvirt_core::hypervisor::HypervisorError;

use crate::suite::RegisterAccess;

/// The most register accesses that are remembered.
const LIMIT: usize = 1 << 16;

/// The record, the lies, and the change.
#[derive(Default)]
pub(super) struct Notes(Mutex<Record>);

#[derive(Default)]
struct Record {
    log: Vec<RegisterAccess>,
    /// By offset, what is read there instead of the truth.
    lies: BTreeMap<u64, u32>,
    /// What an access turns into.
    change: Option<fn(RegisterAccess) -> Vec<RegisterAccess>>,
}

impl Notes {
    fn lock(&self) -> MutexGuard<'_, Record> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `access`, or what it turns into, by `perform`, which gets the bytes to write or to read into; the value is
    /// that of the last one that reads.
    pub(super) fn access(
        &self,
        access: RegisterAccess,
        mut perform: impl FnMut(RegisterAccess, &mut [u8]) -> Result<(), HypervisorError>,
    ) -> Result<u64, HypervisorError> {
        let mut value = 0;
        let change = self.lock().change;
        for mut access in change.map_or(vec![access], |change| change(access)) {
            let mut bytes = access.value.to_le_bytes();
            let Some(part) = bytes.get_mut(..access.len) else { continue };
            perform(access, part)?;
            if !access.write {
                let lie = self.lock().lies.get(&access.offset).map(|lie| lie.to_le_bytes());
                part.iter_mut().zip(lie.iter().flatten()).for_each(|(to, from)| *to = *from);
                access.value = u64::from_le_bytes(bytes);
                value = access.value;
            }
            let mut record = self.lock();
            if record.log.len() < LIMIT {
                record.log.push(access);
            }
        }
        Ok(value)
    }

    /// A read of `data` at `offset`.
    pub(super) fn load(
        &self,
        offset: u64,
        data: &mut [u8],
        perform: impl FnMut(RegisterAccess, &mut [u8]) -> Result<(), HypervisorError>,
    ) -> Result<(), HypervisorError> {
        let access = RegisterAccess { offset, len: data.len(), value: 0, write: false };
        let value = self.access(access, perform)?.to_le_bytes();
        data.iter_mut().zip(value).for_each(|(to, from)| *to = from);
        Ok(())
    }

    /// A write of `data` at `offset`.
    pub(super) fn store(
        &self,
        offset: u64,
        data: &[u8],
        perform: impl FnMut(RegisterAccess, &mut [u8]) -> Result<(), HypervisorError>,
    ) -> Result<(), HypervisorError> {
        let mut value = [0; 8];
        value.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        let access = RegisterAccess { offset, len: data.len(), value: u64::from_le_bytes(value), write: true };
        self.access(access, perform).map(drop)
    }

    /// What was done.
    pub(super) fn log(&self) -> Vec<RegisterAccess> {
        self.lock().log.clone()
    }

    /// From now on `value` is read at `offset`; without a value the truth.
    pub(super) fn lie(&self, offset: u64, value: Option<u32>) {
        let mut record = self.lock();
        match value {
            Some(value) => record.lies.insert(offset, value),
            None => record.lies.remove(&offset),
        };
    }

    /// From now on each access turns into others.
    pub(super) fn tamper(&self, change: fn(RegisterAccess) -> Vec<RegisterAccess>) {
        self.lock().change = Some(change);
    }
}
