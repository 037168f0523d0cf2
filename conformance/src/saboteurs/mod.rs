//! Devices and drivers that are broken on purpose: the test of the suite itself.
//!
//! Each breaks one thing and names the cases that have to notice. Nearly all live on the loopback, where everything happens
//! in the caller's thread, so that what they do to a ring is done before the driver looks.

mod broken;
mod bus;
mod careless;
mod device;
mod driver;
mod far_side;
mod in_order;
mod naive;
mod notification;
mod packed;
mod parsers;
mod registers;
mod rings;
mod suspend;

use std::sync::Arc;

use crate::cells::{Kind, Lguest, LguestPage, Local, Loopback, MemoryOf, Mmio, Sabotage};
use crate::suite::{RingFormat, Target};

/// Guest memory as a saboteur sees it: flat.
type Memory = MemoryOf<Loopback>;

/// Where a saboteur sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On the loopback, with each format of rings.
    Modern,
    /// On the loopback, with split rings.
    Split,
    /// On the loopback, with packed rings.
    Packed,
    /// On lguest, for what only the legacy interface has. Not every host can run it.
    Legacy,
}

/// Something broken.
pub struct Saboteur {
    /// What it does wrong.
    pub name: &'static str,
    /// The statements of VIRTIO 1.4 that it violates; none if it is a matter of robustness.
    pub violates: &'static [&'static str],
    /// The device that it sits on.
    pub kind: Kind,
    /// Where it sits.
    pub place: Place,
    /// The cases that have to fail.
    pub breaks: &'static [&'static str],
    make: fn() -> Arc<dyn Sabotage<Memory>>,
}

impl Saboteur {
    /// Targets with it inside, one for each format of rings.
    pub fn targets(&self) -> Vec<Arc<dyn Target>> {
        let modern =
            |ring| -> Arc<dyn Target> { Arc::new(Local::<Loopback, Mmio>::sabotaged(self.kind, ring, (self.make)())) };
        match self.place {
            Place::Modern => RingFormat::of(false).iter().map(|&ring| modern(ring)).collect(),
            Place::Split => vec![modern(RingFormat::Split)],
            Place::Packed => vec![modern(RingFormat::Packed)],
            Place::Legacy => {
                let ring = RingFormat::Split;
                vec![Arc::new(Local::<Lguest, LguestPage>::sabotaged(self.kind, ring, (self.make)()))]
            }
        }
    }
}

/// All of them.
pub fn all() -> impl Iterator<Item = &'static Saboteur> {
    [
        device::SABOTEURS,
        registers::SABOTEURS,
        careless::SABOTEURS,
        rings::SABOTEURS,
        packed::SABOTEURS,
        suspend::SABOTEURS,
        in_order::SABOTEURS,
        notification::SABOTEURS,
        parsers::SABOTEURS,
        far_side::SABOTEURS,
        driver::SABOTEURS,
    ]
    .into_iter()
    .flatten()
}
