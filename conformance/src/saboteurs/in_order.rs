//! Devices and drivers that agreed to use buffers in order, and do not keep to it.

use std::sync::Arc;

use polyvirt_core::Features;
use polyvirt_core::memory::Pages;
use polyvirt_core::queue::{AddError, Buffer, DriverQueue, QueueConfig, QueueError};
use polyvirt_core::transport::{TransportError, Virtqueue};

use super::bus::Meddler;
use super::driver::role;
use super::naive::{Fault, Naive};
use super::packed::swap;
use super::rings::{after, before};
use super::{Memory, Place, Saboteur};
use crate::cells::{Kind, Sabotage};
use crate::suite::DriverRole;

/// Where the used element stands that is `back` before the newest.
fn element(meddler: &Meddler, queue: usize, back: u16) -> u64 {
    let ring = meddler.ring(queue);
    let slot = meddler.u16(ring.used).wrapping_sub(1 + back) % ring.size.max(1);
    ring.elements + 8 * u64::from(slot)
}

/// Whether the last kick was for several buffers, to be used in order.
fn several(meddler: &Meddler, queue: usize) -> bool {
    meddler.has(Features::IN_ORDER) && meddler.queues[queue].fresh > 1
}

pub(super) const SABOTEURS: &[Saboteur] = &[
    Saboteur {
        name: "uses buffers in another order than agreed",
        violates: &["N1590"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["in-order/used-in-order"],
        make: || {
            after(|meddler, queue| {
                if !several(meddler, queue) {
                    return;
                }
                if meddler.packed() {
                    return swap(meddler, queue, [0, 1], false);
                }
                let places = [0, 1].map(|back| element(meddler, queue, back));
                let [last, before]: [[u8; 8]; 2] = places.map(|at| meddler.get(at).unwrap_or_default());
                meddler.put(places[0], &before);
                meddler.put(places[1], &last);
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "tells of a batch by its last buffer, and counts it as one",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Split,
        breaks: &["in-order/used-in-order"],
        make: || {
            after(|meddler, queue| {
                if several(meddler, queue) {
                    let last: [u8; 8] = meddler.get(element(meddler, queue, 0)).unwrap_or_default();
                    meddler.put(element(meddler, queue, 1), &last);
                    let ring = meddler.ring(queue);
                    meddler.put(ring.used, &meddler.u16(ring.used).wrapping_sub(1).to_le_bytes());
                }
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "stops after one round of a ring in order",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["in-order/goes-on"],
        make: || {
            before(|meddler, _| {
                meddler.count += 1;
                !meddler.has(Features::IN_ORDER) || meddler.count <= 8
            })
            .sabotage()
        },
    },
    Saboteur {
        name: "(driver) does not know that buffers are used in order",
        violates: &["N0046"],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["in-order/driver-ring-order", "in-order/driver-batch"],
        make: || role(|virtqueue| DriverQueue::new(any_order(virtqueue)).map(|queue| Box::new(queue) as _)),
    },
    Saboteur {
        name: "(driver) links its tables in another order",
        violates: &["N0051"],
        kind: Kind::Rng,
        place: Place::Split,
        breaks: &["in-order/driver-tables"],
        make: leaping,
    },
    Saboteur {
        name: "(driver) believes what the device says of batches",
        violates: &[],
        kind: Kind::Rng,
        place: Place::Modern,
        breaks: &["in-order/driver-not-counted", "in-order/driver-not-in-flight", "in-order/driver-length-beyond"],
        make: || role(|virtqueue| Naive::make(virtqueue, Fault::NONE)),
    },
];

fn any_order(virtqueue: Virtqueue) -> Virtqueue {
    Virtqueue { config: QueueConfig { in_order: false, ..virtqueue.config }, ..virtqueue }
}

fn leaping() -> Arc<dyn Sabotage<Memory>> {
    role(|virtqueue| Ok(Box::new(Leaping { honest: Box::new(DriverQueue::new(virtqueue)?), tables: None })))
}

/// A driver that is honest, but for the first link of a table, which leads to its third entry.
struct Leaping {
    honest: Box<dyn DriverRole>,
    tables: Option<Pages>,
}

impl DriverRole for Leaping {
    fn add(&mut self, readable: &[Buffer], writable: &[Buffer], token: u32) -> Result<(), AddError<u32>> {
        self.honest.add(readable, writable, token)?;
        if let Some(tables) = &self.tables {
            let _ = tables.write(14, &2u16.to_le_bytes());
        }
        Ok(())
    }

    fn kick(&mut self) -> Result<bool, TransportError> {
        self.honest.kick()
    }

    fn get(&mut self) -> Result<Option<(u32, u32)>, QueueError> {
        self.honest.get()
    }

    fn disable(&mut self) {
        self.honest.disable();
    }

    fn enable(&mut self) -> bool {
        self.honest.enable()
    }

    fn allow_indirect(mut self: Box<Self>, tables: Pages, address: u64) -> Box<dyn DriverRole> {
        self.tables = Some(tables.clone());
        self.honest = self.honest.allow_indirect(tables, address);
        self
    }

    fn in_flight(&self) -> usize {
        self.honest.in_flight()
    }

    fn free(&self) -> u16 {
        self.honest.free()
    }

    fn drain(&mut self) -> Vec<u32> {
        self.honest.drain()
    }
}
