//! Broken drivers.

use std::sync::Arc;
use std::time::Duration;

use polyvirt_core::hypervisor::Share;
use polyvirt_core::memory::Pages;
use polyvirt_core::queue::Layout;
use polyvirt_core::transport::{BlockingTransport, Interrupts, Notify, Transport, TransportError, Virtqueue};
use polyvirt_core::{Features, Status};
use polyvirt_transports::mmio::registers::*;

use super::naive::{Fault, Naive};
use super::{Memory, Place, Saboteur};
use crate::cells::{Kind, Sabotage};
use crate::raw::{INDIRECT, NEXT, WRITE};
use crate::suite::{MakeRole, RegisterAccess};

macro_rules! saboteurs {
    ($($name:literal, $kind:ident, [$($violates:literal),*], [$($breaks:literal),*], $sabotage:expr;)*) => {
        &[$(Saboteur {
            name: $name,
            violates: &[$($violates),*],
            kind: Kind::$kind,
            place: Place::Modern,
            breaks: &[$($breaks),*],
            make: || $sabotage,
        }),*]
    };
}

pub(super) const SABOTEURS: &[Saboteur] = saboteurs! {
    "(driver) accepts features that are not offered", Rng, ["N0008", "N0010", "N0012"], ["features/driver-subset"],
        transport(Transports { features: |honest| honest | Features::bit(60), ..Transports::HONEST });
    "(driver) does not accept VERSION_1", Rng, ["N1573"], ["features/driver-version-1"],
        transport(Transports { features: |honest| honest & !Features::VERSION_1, ..Transports::HONEST });
    "(driver) says DRIVER_OK before its queues are set up", Rng, ["N0258"], ["init/driver-sequence"],
        transport(Transports { early_driver_ok: true, ..Transports::HONEST });
    "(driver) clears status bits", Rng, ["N0002"], ["init/driver-sequence"],
        transport(Transports { status: |_, new| if new.contains(Status::DRIVER_OK) { Status::DRIVER_OK } else { new }, ..Transports::HONEST });
    "(driver) leaves out ACKNOWLEDGE", Rng, ["N0001", "N0258"], ["init/driver-sequence"],
        transport(Transports { status: |_, new| new & !Status::ACKNOWLEDGE, ..Transports::HONEST });
    "(driver) kicks before DRIVER_OK", Rng, ["N0264"], ["init/driver-sequence"],
        transport(Transports { early_kick: true, ..Transports::HONEST });
    "(driver) does not say FAILED", Rng, ["N0262"], ["driver/features-ok-refused"],
        transport(Transports { status: |_, new| new & !Status::FAILED, ..Transports::HONEST });
    "(driver) sets up a queue although FEATURES_OK is refused", Rng, ["N0263"], ["driver/features-ok-refused"],
        transport(Transports { early_queue: true, ..Transports::HONEST });
    "(driver) does not reset before it starts over", Rng, ["N0003"], ["driver/reset-after-failed"],
        transport(Transports { no_reset: true, ..Transports::HONEST });
    "(driver) goes on without VERSION_1", Rng, ["N1574"], ["driver/version-1-missing"],
        transport(Transports { legacy: true, ..Transports::HONEST });
    "(driver) places its rings anywhere", Rng, ["N0036"], ["driver/alignment"],
        transport(Transports { misaligned: true, ..Transports::HONEST });

    "(driver) takes any number for the size of a queue", Rng, [], ["mmio/driver-device-sizes"],
        transport(Transports { odd_size: true, ..Transports::HONEST });

    "(driver) puts block requests the wrong way round", Blk, ["N0039"], ["drivers/blk-requests"],
        transport(Transports { turned: true, ..Transports::HONEST });
    "(driver) puts device-readable buffers into an entropy queue", Rng, ["N0851"], ["drivers/rng"],
        transport(Transports { turned: true, ..Transports::HONEST });
    "(driver) puts device-writable buffers into a transmit queue", Console, ["N0843", "N0844"], ["drivers/console"],
        transport(Transports { turned: true, ..Transports::HONEST });
    "(driver) does not take packed rings", Rng, ["N1578"], ["drivers/packed"],
        transport(Transports { features: |honest| honest & !Features::RING_PACKED, ..Transports::HONEST });
    "(driver) does not accept VIRTIO_BLK_F_RO", Blk, ["N0776"], ["drivers/blk-read-only"],
        transport(Transports { features: |honest| honest & !Features::bit(5), ..Transports::HONEST });

    "(driver) reads registers byte by byte", Rng, ["N0404"], ["mmio/driver-widths"],
        registers(|access| match access.write {
            true => vec![access],
            false => vec![RegisterAccess { len: 1, ..access }, access],
        });
    "(driver) reads features before it selects them", Rng, ["N0412", "N0413"], ["mmio/driver-order"],
        registers(|access| if access.offset == DEVICE_FEATURES_SEL && access.write { vec![] } else { vec![access] });
    "(driver) writes features before it selects them", Rng, ["N0413"], ["mmio/driver-order"],
        registers(|access| if access.offset == DRIVER_FEATURES_SEL && access.write { vec![] } else { vec![access] });
    "(driver) sets a queue up after it made it ready", Rng, ["N0415"], ["mmio/driver-order"],
        registers(|access| {
            let late = RegisterAccess { offset: QUEUE_SIZE, value: 4, ..access };
            if access.offset == QUEUE_READY && access.write { vec![access, late] } else { vec![access] }
        });
    "(driver) takes a larger queue than there is", Rng, ["N0414"], ["mmio/driver-order"],
        registers(|access| {
            let larger = RegisterAccess { value: 0x8000, ..access };
            vec![if access.offset == QUEUE_SIZE && access.write { larger } else { access }]
        });
    "(driver) acknowledges everything", Rng, ["N0419", "N0420"], ["mmio/driver-acknowledges"],
        registers(|access| {
            let all = RegisterAccess { value: u64::from(u32::MAX), ..access };
            vec![if access.offset == INTERRUPT_ACK { all } else { access }]
        });
    "(driver) does not acknowledge", Rng, ["N0430", "N0432"], ["mmio/driver-acknowledges"],
        registers(|access| if access.offset == INTERRUPT_ACK { vec![] } else { vec![access] });
    "(driver) acknowledges bits that it does not know", Rng, ["N0418"], ["mmio/driver-undefined-interrupt-bits"],
        registers(|access| {
            let all = RegisterAccess { value: 0xff, ..access };
            vec![if access.offset == INTERRUPT_ACK { all } else { access }]
        });
    "(driver) writes to whatever answers", Rng, ["N0406", "N0408", "N0410"], ["mmio/driver-not-virtio"],
        registers(|access| match access.offset {
            MAGIC_VALUE => vec![access, RegisterAccess { offset: STATUS, write: true, value: 0, ..access }],
            _ => vec![access],
        });
    "(driver) reads the device type before the magic value", Rng, ["N0424", "N0425"], ["mmio/driver-not-virtio"],
        registers(|access| match access.offset {
            MAGIC_VALUE => vec![RegisterAccess { offset: DEVICE_ID, ..access }, access],
            _ => vec![access],
        });
    "(driver) does not wait for a queue to be reset", Rng, ["N0421"], ["mmio/driver-stops-queue"],
        registers(|access| match (access.offset, access.write) {
            (QUEUE_RESET, true) => vec![access, RegisterAccess { offset: QUEUE_SEL, value: 0, ..access }],
            _ => vec![access],
        });

    "(driver) starts with what the rings held", Rng, ["N0071"], ["driver/clean-start"],
        role(|virtqueue| Naive::make(virtqueue, Fault { dirty: true, ..Fault::NONE }));
    "(driver) sets flags that do not exist", Rng, ["N0055", "N0057"], ["driver/flags", "driver/packed-events"],
        role(|virtqueue| Naive::make(virtqueue, Fault { odd_flags: true, ..Fault::NONE }));
    "(driver) puts device-writable pieces first", Rng, ["N0039"], ["driver/readable-first"],
        role(|virtqueue| Naive::make(virtqueue, Fault { reversed: true, ..Fault::NONE }));
    "(driver) makes chains longer than the queue", Rng, ["N0049"], ["driver/queue-size"],
        role(|virtqueue| Naive::make(virtqueue, Fault { too_long: true, ..Fault::NONE }));
    "(driver) uses indirect descriptors unasked", Rng, ["N0047"], ["driver/no-indirect-unasked"],
        role(|virtqueue| Naive::make(virtqueue, Fault { indirect: INDIRECT, ..Fault::NONE }));
    "(driver) sets INDIRECT and NEXT", Rng, ["N0050"], ["driver/indirect-well-formed"],
        role(|virtqueue| Naive::make(virtqueue, Fault { indirect: INDIRECT | NEXT, ..Fault::NONE }));
    "(driver) nests indirect descriptors", Rng, ["N0048"], ["driver/indirect-well-formed"],
        role(|virtqueue| Naive::make(virtqueue, Fault { indirect: INDIRECT, nested: true, ..Fault::NONE }));
    "(driver) takes the available index back", Rng, ["N0054"], ["driver/index-forward"],
        role(|virtqueue| Naive::make(virtqueue, Fault { wraps_at: 1000, ..Fault::NONE }));
    "(driver) never kicks", Rng, ["N0074", "N0076"], ["driver/kicks-when-asked", "driver/avail-event", "driver/kicks-not-when-not-asked"],
        role(|virtqueue| Naive::make(virtqueue, Fault { kicks: Some(false), ..Fault::NONE }));
    "(driver) always kicks", Rng, ["N0073", "N0077"], ["driver/kicks-not-when-not-asked", "driver/avail-event", "driver/packed-kick-rounds"],
        role(|virtqueue| Naive::make(virtqueue, Fault { kicks: Some(true), ..Fault::NONE }));
    "(driver) heeds avail_event although it was not negotiated", Rng, ["N0072"], ["driver/kicks-when-asked"],
        role(|virtqueue| Naive::make(virtqueue, Fault { event_idx: true, ..Fault::NONE }));
    "(driver) heeds the used flags although avail_event is negotiated", Rng, ["N0075"], ["driver/avail-event"],
        role(|virtqueue| Naive::make(virtqueue, Fault::NONE));
    "(driver) takes every interrupt for a buffer", Rng, ["N0059"], ["driver/spurious-interrupt", "driver/packed-stale-used"],
        role(|virtqueue| Naive::make(virtqueue, Fault { eager: true, ..Fault::NONE }));
    "(driver) believes the device", Rng, [],
        [
            "driver/used-id-beyond",
            "driver/used-id-not-in-flight",
            "driver/used-id-no-head",
            "driver/used-id-twice",
            "driver/used-length-beyond",
            "driver/rewritten-descriptors",
            "driver/packed-length-reserved"
        ],
        role(|virtqueue| Naive::make(virtqueue, Fault::NONE));
    "(driver) writes over what is in flight", Rng, ["N0093", "N0094"], ["driver/packed-hands-off"],
        role(|virtqueue| Naive::make(virtqueue, Fault { restless: true, ..Fault::NONE }));
    "(driver) does not look whether there is room", Rng, ["N0100", "N0101"], ["driver/packed-room"],
        role(|virtqueue| Naive::make(virtqueue, Fault::NONE));
    "(driver) makes the first descriptor available first", Rng, ["N0102"], ["driver/packed-first-last"],
        role(|virtqueue| Naive::make(virtqueue, Fault { hasty: true, ..Fault::NONE }));
    "(driver) has one id for all buffers", Rng, [], ["driver/packed-any-order"],
        role(|virtqueue| Naive::make(virtqueue, Fault { one_id: true, ..Fault::NONE }));
    "(driver) does not count rounds", Rng, [], ["driver/packed-rounds"],
        role(|virtqueue| Naive::make(virtqueue, Fault { one_round: true, ..Fault::NONE }));
};

fn transport(broken: Transports) -> Arc<dyn Sabotage<Memory>> {
    Arc::new(broken)
}

pub(super) fn registers(change: fn(RegisterAccess) -> Vec<RegisterAccess>) -> Arc<dyn Sabotage<Memory>> {
    struct Registers(fn(RegisterAccess) -> Vec<RegisterAccess>);
    impl Sabotage<Memory> for Registers {
        fn register_access(&self) -> Option<fn(RegisterAccess) -> Vec<RegisterAccess>> {
            Some(self.0)
        }
    }
    Arc::new(Registers(change))
}

pub(super) fn role(make: MakeRole) -> Arc<dyn Sabotage<Memory>> {
    struct Role(MakeRole);
    impl Sabotage<Memory> for Role {
        fn driver_role(&self) -> Option<MakeRole> {
            Some(self.0)
        }
    }
    Arc::new(Role(make))
}

/// What a driver does differently on its transport.
#[derive(Clone, Copy)]
struct Transports {
    features: fn(Features) -> Features,
    /// Old and new status.
    status: fn(Status, Status) -> Status,
    early_driver_ok: bool,
    early_kick: bool,
    early_queue: bool,
    no_reset: bool,
    legacy: bool,
    misaligned: bool,
    odd_size: bool,
    /// Descriptors get the other direction just before the kick.
    turned: bool,
}

impl Transports {
    const HONEST: Self = Self {
        features: |honest| honest,
        status: |_, new| new,
        early_driver_ok: false,
        early_kick: false,
        early_queue: false,
        no_reset: false,
        legacy: false,
        misaligned: false,
        odd_size: false,
        turned: false,
    };
}

impl Sabotage<Memory> for Transports {
    fn driver(&self, honest: Box<dyn BlockingTransport>) -> Box<dyn BlockingTransport> {
        Box::new(Clumsy { honest, broken: *self, status: Status::empty() })
    }
}

struct Clumsy {
    honest: Box<dyn BlockingTransport>,
    broken: Transports,
    status: Status,
}

impl Transport for Clumsy {
    fn device_type(&self) -> u32 {
        self.honest.device_type()
    }

    fn is_legacy(&self) -> bool {
        self.broken.legacy
    }

    fn device_features(&mut self) -> Result<Features, TransportError> {
        self.honest.device_features()
    }

    fn set_driver_features(&mut self, features: Features) -> Result<(), TransportError> {
        self.honest.set_driver_features((self.broken.features)(features))
    }

    fn status(&mut self) -> Result<Status, TransportError> {
        self.honest.status()
    }

    fn set_status(&mut self, status: Status) -> Result<(), TransportError> {
        let status = (self.broken.status)(self.status, status);
        self.status = status;
        self.honest.set_status(status)?;
        if self.broken.early_queue && status.contains(Status::FEATURES_OK) {
            self.honest.find_vq(0, None)?;
        }
        Ok(())
    }

    fn begin_reset(&mut self) -> Result<(), TransportError> {
        if self.broken.no_reset { Ok(()) } else { self.honest.begin_reset() }
    }

    fn poll_reset(&mut self) -> Result<bool, TransportError> {
        if self.broken.no_reset { Ok(true) } else { self.honest.poll_reset() }
    }

    fn config_generation(&mut self) -> Result<u32, TransportError> {
        self.honest.config_generation()
    }

    fn read_config(&mut self, offset: u32, data: &mut [u8]) -> Result<(), TransportError> {
        self.honest.read_config(offset, data)
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), TransportError> {
        self.honest.write_config(offset, data)
    }

    fn queue_max_size(&mut self, index: u16) -> Result<u16, TransportError> {
        self.honest.queue_max_size(index)
    }

    fn find_vq(&mut self, index: u16, size: Option<u16>) -> Result<Virtqueue, TransportError> {
        if self.broken.early_driver_ok {
            self.set_status(self.status | Status::DRIVER_OK)?;
        }
        let mut found = self.honest.find_vq(index, size)?;
        if self.broken.early_kick {
            found.notify.notify()?;
        }
        if self.broken.misaligned {
            found.config.descriptors += 8;
        }
        if self.broken.turned {
            let inner = found.notify;
            // The flags stand behind the length, or behind the buffer's id.
            let flags = if found.config.layout == Layout::Packed { 14 } else { 12 };
            found.notify = Box::new(Turning { inner, descriptors: found.descriptors.clone(), flags });
        }
        if self.broken.odd_size {
            found.config.size = 3;
        }
        Ok(found)
    }

    fn begin_vq_reset(&mut self, index: u16) -> Result<(), TransportError> {
        self.honest.begin_vq_reset(index)
    }

    fn poll_vq_reset(&mut self, index: u16) -> Result<bool, TransportError> {
        self.honest.poll_vq_reset(index)
    }

    fn take_interrupts(&mut self) -> Result<Interrupts, TransportError> {
        self.honest.take_interrupts()
    }

    fn share(&self) -> Arc<dyn Share> {
        self.honest.share()
    }
}

impl BlockingTransport for Clumsy {
    fn sleep(&mut self, most: Duration) -> Result<bool, TransportError> {
        self.honest.sleep(most)
    }

    fn pause(&mut self, time: Duration) -> Result<(), TransportError> {
        self.honest.pause(time)
    }
}

/// Turns the direction of the first descriptors before it kicks.
struct Turning {
    inner: Box<dyn Notify>,
    descriptors: Pages,
    flags: usize,
}

impl Turning {
    fn turn(&self) {
        let mut flags = [0];
        let _ = self.descriptors.read(self.flags, &mut flags);
        let _ = self.descriptors.write(self.flags, &[flags[0] ^ WRITE as u8]);
    }
}

impl Notify for Turning {
    fn notify(&mut self) -> Result<(), TransportError> {
        self.turn();
        self.inner.notify()
    }

    fn notify_at(&mut self, next: u16) -> Result<(), TransportError> {
        self.turn();
        self.inner.notify_at(next)
    }
}
