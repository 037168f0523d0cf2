//! Devices and drivers that are broken on purpose: the test of the suite itself.
//!
//! Each breaks one thing and names the cases that have to notice. Nearly all live on the loopback, where everything happens
//! in the caller's thread, so that what they do to a ring is done before the driver looks.

mod blk;
mod broken;
mod bus;
mod careless;
mod device;
mod driver;
mod far_side;
mod function;
mod in_order;
mod legacy;
mod naive;
mod notification;
mod packed;
mod parsers;
mod pci;
mod pci_driver;
mod pci_interrupts;
mod ports;
mod proxy;
mod registers;
mod rings;
mod suspend;

use std::sync::Arc;

use polyvirt_core::hypervisor::Host;

use crate::cells::{
    Flaw, Flawed, FlawedGuest, FlawedHost, Kind, Kvm, Lguest, LguestPage, Local, Loopback, MemoryOf, Mmio, MmioLegacy,
    OnPci, Pci, PciLegacy, Port, Sabotage, Wire, Xen, Xenbus,
};
use crate::suite::{RingFormat, Target};

pub use proxy::{BrokenDaemon, DAEMONS};

/// Guest memory as a saboteur sees it: flat.
type Memory = MemoryOf<Loopback>;
/// The memory of the ports that saboteurs sit on.
type MemoryOfLoopback = <<Loopback as Port>::Host as Host>::Memory;

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
    /// On a PCI bus on the loopback, with each format of rings.
    Pci,
    /// There, behind the legacy interface.
    PciLegacy,
    /// On the loopback, behind version 1 of the registers.
    MmioLegacy,
    /// In the port itself, with each format of rings: wherever this can be broken.
    Port(Flaw),
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
        let formats = RingFormat::of(false);
        match self.place {
            Place::Modern => self.on::<Loopback, Mmio>(formats),
            Place::Split => self.on::<Loopback, Mmio>(&[RingFormat::Split]),
            Place::Packed => self.on::<Loopback, Mmio>(&[RingFormat::Packed]),
            Place::Legacy => self.on::<Lguest, LguestPage>(RingFormat::of(true)),
            Place::Pci => self.on::<OnPci<Loopback>, Pci>(formats),
            Place::PciLegacy => self.on::<OnPci<Loopback>, PciLegacy>(RingFormat::of(true)),
            Place::MmioLegacy => self.on::<Loopback, MmioLegacy>(RingFormat::of(true)),
            // Kicks are calls on the loopback, and interrupts come in the kick: nothing comes back from the one, and
            // only there is it sure that the other came before.
            Place::Port(flaw @ Flaw::NoSecondCall) => {
                [self.flawed::<Xen, Xenbus>(flaw), self.flawed::<Kvm, Mmio>(flaw)].concat()
            }
            Place::Port(flaw @ Flaw::Forgetful) => self.flawed::<Loopback, Mmio>(flaw),
            Place::Port(flaw @ Flaw::NoPoll) => {
                [self.flawed::<Loopback, Mmio>(flaw), self.flawed::<Xen, Xenbus>(flaw)].concat()
            }
            Place::Port(flaw @ (Flaw::LostPin | Flaw::WrongPin)) => {
                let flawed = Local::<OnPci<Flawed<Loopback>>, PciLegacy>::flawed_pci;
                vec![Arc::new(flawed(self.kind, RingFormat::Split, flaw))]
            }
            Place::Port(flaw) => [self.flawed::<Loopback, Mmio>(flaw), self.flawed::<Kvm, Mmio>(flaw)].concat(),
        }
    }

    fn flawed<P, W>(&self, flaw: Flaw) -> Vec<Arc<dyn Target>>
    where
        P: Port,
        W: Wire<FlawedHost<P::Host>, FlawedGuest<P::Guest>>,
    {
        let flawed = |&ring| -> Arc<dyn Target> { Arc::new(Local::<Flawed<P>, W>::flawed(self.kind, ring, flaw)) };
        RingFormat::of(false).iter().map(flawed).collect()
    }

    fn on<P, W>(&self, formats: &[RingFormat]) -> Vec<Arc<dyn Target>>
    where
        P: Port<Host: Host<Memory = MemoryOfLoopback>>,
        W: Wire<P::Host, P::Guest>,
    {
        let sabotaged =
            |&ring| -> Arc<dyn Target> { Arc::new(Local::<P, W>::sabotaged(self.kind, ring, (self.make)())) };
        formats.iter().map(sabotaged).collect()
    }
}

/// All of them.
pub fn all() -> impl Iterator<Item = &'static Saboteur> {
    [
        device::SABOTEURS,
        blk::SABOTEURS,
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
        pci::SABOTEURS,
        pci_interrupts::SABOTEURS,
        pci_driver::SABOTEURS,
        ports::SABOTEURS,
        legacy::PCI,
        legacy::MMIO,
    ]
    .into_iter()
    .flatten()
}
