//! A host whose devices cannot take the process with them, and may be broken on purpose.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::Waker;

use polyvirt_core::hypervisor::{BusDevice, Host, HypervisorError, Interrupt};
use polyvirt_core::memory::GuestMemory;

use super::Sabotage;
use crate::suite::Alarm;

/// A host, guarded. `M` is the memory that the device is given.
pub(super) struct Guarded<'a, H, M: GuestMemory> {
    pub(super) host: &'a mut H,
    pub(super) alarm: Alarm,
    pub(super) saboteur: Option<&'a dyn Sabotage<M>>,
    pub(super) memory: M,
}

impl<H: Host, M: GuestMemory> Host for Guarded<'_, H, M> {
    type Memory = H::Memory;
    type Place = H::Place;

    fn memory(&self) -> Self::Memory {
        self.host.memory()
    }

    fn place(&mut self, device_type: u32, queues: u16) -> Result<Self::Place, HypervisorError> {
        self.host.place(device_type, queues)
    }

    fn interrupt(&self, place: &Self::Place) -> Arc<dyn Interrupt> {
        let honest = self.host.interrupt(place);
        match self.saboteur {
            Some(saboteur) => saboteur.interrupt(honest),
            None => honest,
        }
    }

    fn plug(&mut self, place: Self::Place, device: Box<dyn BusDevice>) -> Result<(), HypervisorError> {
        let device = match self.saboteur {
            Some(saboteur) => saboteur.bus_device(device, self.memory.clone()),
            None => device,
        };
        self.host.plug(place, Box::new(Caught { device: Some(device), alarm: self.alarm.clone() }))
    }
}

/// A device whose panics are reported. One that panicked answers nothing any more.
struct Caught {
    device: Option<Box<dyn BusDevice>>,
    alarm: Alarm,
}

impl Caught {
    fn call<T: Default>(&mut self, work: impl FnOnce(&mut dyn BusDevice) -> T) -> T {
        let Some(mut device) = self.device.take() else { return T::default() };
        match catch_unwind(AssertUnwindSafe(|| {
            let result = work(&mut *device);
            (device, result)
        })) {
            Ok((device, result)) => {
                self.device = Some(device);
                result
            }
            Err(payload) => {
                self.alarm.ring(&*payload);
                T::default()
            }
        }
    }
}

impl BusDevice for Caught {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.call(|device| device.read(offset, data));
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.call(|device| device.write(offset, data));
    }

    fn kick(&mut self, queue: u16) -> bool {
        self.call(|device| device.kick(queue))
    }

    fn poll(&mut self) -> bool {
        self.call(|device| device.poll())
    }

    fn set_waker(&mut self, waker: Waker) {
        self.call(|device| device.set_waker(waker));
    }
}
