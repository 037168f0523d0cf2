//! A device whose every step a test can see: what it read, what it filled, what it keeps.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Waker;

use polyvirt_core::Features;
use polyvirt_core::device::{Device, Queues};
use polyvirt_core::memory::GuestMemory;
use polyvirt_core::queue::Chain;
use polyvirt_transports::vhost_user::Memory;

/// Queues.
pub(crate) const QUEUES: u16 = 2;
/// What it fills device-writable bytes with.
pub(crate) const FILL: u8 = 0x5a;
/// A feature of its own.
pub(crate) const FEATURE: Features = Features::from_bits_retain(1);

type Kept = Chain<<Memory as GuestMemory>::Lease>;

/// Takes what is readable, and fills what is writable.
pub(crate) struct Toy {
    handle: Handle,
    config: [u8; 16],
    kept: Vec<(u16, Kept)>,
}

/// The test's hand on the device.
#[derive(Clone, Default)]
pub(crate) struct Handle(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    read: Vec<Vec<u8>>,
    keeps: bool,
    /// How many of those that it keeps come back, the last first.
    release: usize,
    panics: bool,
    config: Option<u8>,
    waker: Option<Waker>,
    gate: Option<(Sender<u16>, Receiver<()>)>,
}

impl Handle {
    /// What the device read so far, a request each, in its order.
    pub(crate) fn read(&self) -> Vec<Vec<u8>> {
        self.lock().read.clone()
    }

    /// Whether the device keeps what it takes. Once it does not any more, the last comes back first.
    pub(crate) fn keep(&self, keeps: bool) {
        let waker = {
            let mut state = self.lock();
            state.keeps = keeps;
            state.waker.clone()
        };
        waker.inspect(Waker::wake_by_ref);
    }

    /// Has one come back of those that the device keeps: the last.
    pub(crate) fn release_last(&self) {
        let waker = {
            let mut state = self.lock();
            state.release += 1;
            state.waker.clone()
        };
        waker.inspect(Waker::wake_by_ref);
    }

    /// The device panics at the next request.
    pub(crate) fn panic(&self) {
        self.lock().panics = true;
    }

    /// From now on each turn begins with its queue's number, and waits to be let on; dropping that ends it.
    pub(crate) fn gate(&self) -> (Receiver<u16>, Sender<()>) {
        let ((tell, told), (let_on, wait)) = (channel(), channel());
        self.lock().gate = Some((tell, wait));
        (told, let_on)
    }

    fn pass_gate(&self, index: u16) {
        let Some((tell, wait)) = self.lock().gate.take() else { return };
        if tell.send(index).is_ok() && wait.recv().is_ok() {
            self.lock().gate = Some((tell, wait));
        }
    }

    /// Changes the first byte of the configuration.
    pub(crate) fn set_config(&self, byte: u8) {
        let waker = {
            let mut state = self.lock();
            state.config = Some(byte);
            state.waker.clone()
        };
        waker.inspect(Waker::wake_by_ref);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

impl Toy {
    pub(crate) fn new(handle: Handle) -> Self {
        let config = std::array::from_fn(|index| index as u8);
        Self { handle, config, kept: Vec::new() }
    }

    fn serve(&mut self, index: u16, queues: &mut Queues<'_, Memory>) {
        let Some(queue) = queues.get(index) else { return };
        while let Ok(mut chain) = queue.pop() {
            let mut bytes = vec![0; chain.readable_len() as usize];
            chain.read(0, &mut bytes).unwrap();
            chain.write(0, &vec![FILL; chain.writable_len() as usize]).unwrap();
            let mut state = self.handle.lock();
            if std::mem::take(&mut state.panics) {
                drop(state);
                panic!("as it was told");
            }
            state.read.push(bytes);
            if state.keeps {
                self.kept.push((index, chain));
            } else {
                queue.complete(chain).unwrap();
            }
        }
    }
}

impl Device<Memory> for Toy {
    fn device_type(&self) -> u32 {
        42
    }

    fn features(&self) -> Features {
        FEATURE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[256; QUEUES as usize]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config[offset..offset + data.len()].copy_from_slice(data);
    }

    fn activate(&mut self, _features: Features, waker: Waker) {
        self.handle.lock().waker = Some(waker);
    }

    fn kick(&mut self, index: u16, queues: &mut Queues<'_, Memory>) {
        self.handle.pass_gate(index);
        self.serve(index, queues);
    }

    fn poll(&mut self, queues: &mut Queues<'_, Memory>) {
        if let Some(byte) = self.handle.lock().config.take() {
            self.config[0] = byte;
            queues.config_changed();
        }
        let gives = |state: &mut State| {
            let released = state.release.checked_sub(1);
            state.release = released.unwrap_or(0);
            !state.keeps || released.is_some()
        };
        while gives(&mut self.handle.lock())
            && let Some((index, chain)) = self.kept.pop()
        {
            queues.get(index).unwrap().complete(chain).unwrap();
        }
    }

    fn reset_queue(&mut self, index: u16) {
        self.kept.retain(|(kept, _)| *kept != index);
    }

    fn reset(&mut self) {
        self.kept.clear();
    }
}
