//! What broken devices are made of.

use std::sync::Arc;
use std::task::Waker;

use polyvirt_core::Features;
use polyvirt_core::device::{Device, Queues};
use polyvirt_core::memory::GuestMemory;
use polyvirt_core::queue::{Chain, Queue};
use polyvirt_core::transport::BlockingTransport;

use super::Memory;
use crate::cases::scripted::{Script, Scripted};
use crate::cells::Sabotage;
use crate::suite::{Recorded, Trace};

/// A chain in a broken device's hands.
pub(super) type Taken = Chain<<Memory as GuestMemory>::Lease>;
/// How a broken device serves a chain.
pub(super) type Serve = fn(&mut Broken, &mut Taken);
/// What a broken device is made of.
pub(super) type Made = Box<dyn Device<Memory>>;

/// What to do differently.
#[derive(Clone, Copy)]
pub(super) struct Tamper {
    pub(super) features: Option<fn(Features) -> Features>,
    pub(super) config: Option<fn(&mut [u8])>,
    pub(super) ignores_config_writes: bool,
    pub(super) takes_config_writes: bool,
    pub(super) drifts: bool,
    pub(super) serve: Option<Serve>,
}

impl Tamper {
    /// Everything as the honest device does it.
    pub(super) const NOTHING: Self = Self {
        features: None,
        config: None,
        ignores_config_writes: false,
        takes_config_writes: false,
        drifts: false,
        serve: None,
    };
}

pub(super) fn with(tamper: Tamper) -> Arc<dyn Sabotage<Memory>> {
    Arc::new(tamper)
}

/// A device that serves each chain by `serve`, whatever queue it is in.
pub(super) fn serving(serve: Serve) -> Arc<dyn Sabotage<Memory>> {
    with(Tamper { serve: Some(serve), ..Tamper::NOTHING })
}

impl Sabotage<Memory> for Tamper {
    fn device(&self, honest: Box<dyn Device<Memory>>) -> Box<dyn Device<Memory>> {
        let mut config = honest.config().to_vec();
        self.config.into_iter().for_each(|change| change(&mut config));
        Box::new(Broken { honest, tamper: *self, config, printed: Vec::new(), count: 0 })
    }
}

/// A device that does something differently.
pub(super) struct Broken {
    pub(super) honest: Box<dyn Device<Memory>>,
    pub(super) tamper: Tamper,
    pub(super) config: Vec<u8>,
    pub(super) printed: Vec<u8>,
    pub(super) count: usize,
}

impl Device<Memory> for Broken {
    fn device_type(&self) -> u32 {
        self.honest.device_type()
    }

    fn features(&self) -> Features {
        self.tamper.features.map_or(self.honest.features(), |change| change(self.honest.features()))
    }

    fn queue_max_sizes(&self) -> &[u16] {
        self.honest.queue_max_sizes()
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if self.tamper.takes_config_writes {
            self.config[offset..offset + data.len()].copy_from_slice(data);
        } else if !self.tamper.ignores_config_writes {
            self.honest.write_config(offset, data);
        }
    }

    fn negotiated(&mut self, features: Features) {
        self.honest.negotiated(features);
    }

    fn activate(&mut self, features: Features, waker: Waker) {
        self.honest.activate(features, waker);
    }

    fn kick(&mut self, index: u16, queues: &mut Queues<'_, Memory>) {
        if self.tamper.drifts
            && let Some(first) = self.config.first_mut()
        {
            *first = first.wrapping_add(1);
        }
        let Some(serve) = self.tamper.serve else { return self.honest.kick(index, queues) };
        let Some(queue) = queues.get(index) else { return };
        each(queue, |chain| serve(self, chain));
    }

    fn poll(&mut self, queues: &mut Queues<'_, Memory>) {
        self.honest.poll(queues);
    }

    fn reset_queue(&mut self, index: u16) {
        self.honest.reset_queue(index);
    }

    fn reset(&mut self) {
        self.honest.reset();
    }
}

fn each(queue: &mut Queue<Memory>, mut serve: impl FnMut(&mut Taken)) {
    while let Ok(mut chain) = queue.pop() {
        serve(&mut chain);
        let _ = queue.complete(chain);
    }
}

/// Fills at most `most` bytes with something that is different each time.
pub(super) fn fill(chain: &mut Taken, most: u32) {
    let len = chain.writable_len().min(most) as usize;
    let seed = std::ptr::from_ref(chain).addr() ^ usize::from(chain.head());
    let bytes: Vec<_> = (0..len).map(|at| (seed.wrapping_mul(31).wrapping_add(at * at * 7 + at) >> 3) as u8).collect();
    let _ = chain.write(0, &bytes);
}

/// Writes a block request's status, and claims that all before it was written.
pub(super) fn status(chain: &mut Taken, status: u8) {
    let Some(at) = chain.writable_len().checked_sub(1) else { return };
    let _ = chain.write(at, &[status]);
    chain.set_written(at + 1);
}

/// A device in place of the honest one.
pub(super) struct Wrapped(pub(super) fn(Made) -> Made);

impl Sabotage<Memory> for Wrapped {
    fn device(&self, honest: Box<dyn Device<Memory>>) -> Box<dyn Device<Memory>> {
        (self.0)(honest)
    }
}

/// Does not complete its first chain of a run, and writes to it when the next run begins.
pub(super) struct Hoarder {
    pub(super) honest: Box<dyn Device<Memory>>,
    pub(super) hoard: Vec<Taken>,
}

/// Panics at a reset of a running device.
pub(super) struct Panics(pub(super) Box<dyn Device<Memory>>);

/// Hears no kick unless all its queues are set up.
pub(super) struct AllOrNothing(pub(super) Box<dyn Device<Memory>>);

macro_rules! honest {
    ($($field:tt)+) => {
        fn device_type(&self) -> u32 {
            self.$($field)+.device_type()
        }
        fn features(&self) -> Features {
            self.$($field)+.features()
        }
        fn queue_max_sizes(&self) -> &[u16] {
            self.$($field)+.queue_max_sizes()
        }
        fn config(&self) -> &[u8] {
            self.$($field)+.config()
        }
        fn write_config(&mut self, offset: usize, data: &[u8]) {
            self.$($field)+.write_config(offset, data);
        }
        fn poll(&mut self, queues: &mut Queues<'_, Memory>) {
            self.$($field)+.poll(queues);
        }
        fn reset_queue(&mut self, index: u16) {
            self.$($field)+.reset_queue(index);
        }
    };
}
pub(super) use honest;

macro_rules! honest_set_up {
    ($($field:tt)+) => {
        fn refresh(&mut self) -> bool {
            self.$($field)+.refresh()
        }
        fn negotiated(&mut self, features: Features) {
            self.$($field)+.negotiated(features);
        }
    };
}

impl Device<Memory> for Hoarder {
    honest!(honest);
    honest_set_up!(honest);

    fn activate(&mut self, features: Features, waker: Waker) {
        for chain in &self.hoard {
            for segment in chain.writable() {
                let _ = segment.fill(0, segment.len(), 0xee);
            }
        }
        self.honest.activate(features, waker);
    }

    fn kick(&mut self, index: u16, queues: &mut Queues<'_, Memory>) {
        if self.hoard.is_empty()
            && let Some(queue) = queues.get(index)
            && let Ok(chain) = queue.pop()
        {
            self.hoard.push(chain);
        }
        self.honest.kick(index, queues);
    }

    fn reset(&mut self) {
        self.honest.reset();
    }
}

impl Device<Memory> for Panics {
    honest!(0);
    honest_set_up!(0);

    fn activate(&mut self, features: Features, waker: Waker) {
        self.0.activate(features, waker);
    }

    fn kick(&mut self, index: u16, queues: &mut Queues<'_, Memory>) {
        self.0.kick(index, queues);
    }

    fn reset(&mut self) {
        panic!("reset")
    }
}

impl Device<Memory> for AllOrNothing {
    honest!(0);

    fn activate(&mut self, features: Features, waker: Waker) {
        self.0.activate(features, waker);
    }

    fn kick(&mut self, index: u16, queues: &mut Queues<'_, Memory>) {
        if (0..self.0.queue_max_sizes().len() as u16).all(|index| queues.get(index).is_some()) {
            self.0.kick(index, queues);
        }
    }

    fn reset(&mut self) {
        self.0.reset();
    }
}

/// On lguest's device page: has more feature bytes than the legacy interface knows.
pub(super) struct LongFeatures;

impl Sabotage<Memory> for LongFeatures {
    fn driver(&self, honest: Box<dyn BlockingTransport>) -> Box<dyn BlockingTransport> {
        Box::new(Scripted::new(
            Recorded::new(honest, Trace::default()),
            Script { offered: Some(Features::VERSION_1), ..Script::default() },
        ))
    }
}
