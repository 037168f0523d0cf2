//! The device: bytes in, bytes out, in order.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use polyvirt_core::Features;
use polyvirt_core::device::{self, Queues};
use polyvirt_core::memory::GuestMemory;
use polyvirt_core::queue::Queue;

use super::wire;

/// Bytes that wait in either direction: then the far side, or the driver, has to wait.
const BACKLOG: usize = 64 * 1024;
/// Emergency writes, which cannot wait, that are taken besides.
const EMERGENCIES: usize = 4096;
/// Bytes copied at once.
const PIECE: usize = 4096;

/// A console.
pub struct Device {
    far: Handle,
    config: [u8; wire::CONFIG_LEN],
    /// How much of the next transmit buffer is in the output already.
    sent: u32,
}

/// The far side of a console: what is typed, what is seen.
#[derive(Clone)]
pub struct Handle(Arc<Mutex<Far>>);

struct Far {
    input: VecDeque<u8>,
    output: VecDeque<u8>,
    size: (u16, u16),
    waker: Waker,
    /// The far side's own.
    listener: Waker,
}

impl Device {
    /// A console of `columns` by `rows` characters.
    pub fn new(columns: u16, rows: u16) -> Self {
        let far = Far {
            input: VecDeque::new(),
            output: VecDeque::new(),
            size: (columns, rows),
            waker: Waker::noop().clone(),
            listener: Waker::noop().clone(),
        };
        let mut device = Self { far: Handle(Arc::new(Mutex::new(far))), config: [0; wire::CONFIG_LEN], sent: 0 };
        device.fill_config();
        device
    }

    /// The far side.
    pub fn handle(&self) -> Handle {
        self.far.clone()
    }

    fn fill_config(&mut self) {
        let (columns, rows) = self.far.lock().size;
        self.config[wire::COLUMNS..wire::ROWS].copy_from_slice(&columns.to_le_bytes());
        self.config[wire::ROWS..wire::MAX_PORTS].copy_from_slice(&rows.to_le_bytes());
        self.config[wire::MAX_PORTS..wire::EMERGENCY].copy_from_slice(&1u32.to_le_bytes());
    }

    /// Input into receive buffers, as long as there are both.
    fn receive<M: GuestMemory>(&self, queue: &mut Queue<M>) {
        let mut far = self.far.lock();
        while !far.input.is_empty() {
            let Ok(mut chain) = queue.pop() else { return };
            let mut done = 0;
            while !far.input.is_empty() && done < chain.writable_len() {
                let count = far.input.len().min(PIECE).min((chain.writable_len() - done) as usize);
                let piece: Vec<u8> = far.input.iter().take(count).copied().collect();
                if chain.write(done, &piece).is_err() {
                    break;
                }
                far.input.drain(..count);
                done += count as u32;
            }
            far.listener.wake_by_ref();
            // Fails only on a queue that is broken, which has its reason already.
            let _ = queue.complete(chain);
        }
    }

    /// Transmit buffers into output, as long as it is taken away. One that does not fit goes back to the queue until there
    /// is room again, so that nothing of the driver's is kept meanwhile, however long that is.
    fn transmit<M: GuestMemory>(&mut self, queue: &mut Queue<M>) {
        let mut far = self.far.lock();
        while far.output.len() < BACKLOG {
            let Ok(chain) = queue.pop() else { return };
            // A driver may have exchanged the buffer for a shorter one meanwhile.
            let len = chain.readable_len();
            while self.sent < len && far.output.len() < BACKLOG {
                let mut piece = [0; PIECE];
                let count = PIECE.min(BACKLOG - far.output.len()).min((len - self.sent) as usize);
                if chain.read(self.sent, &mut piece[..count]).is_err() {
                    break;
                }
                far.output.extend(&piece[..count]);
                self.sent += count as u32;
            }
            far.listener.wake_by_ref();
            // Either fails only on a queue that is broken, which has its reason already.
            if self.sent < len {
                let _ = queue.put_back(chain);
                return;
            }
            self.sent = 0;
            let _ = queue.complete(chain);
        }
    }
}

impl Handle {
    /// Types `bytes`. How many were taken: fewer if the guest does not read.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        let mut far = self.lock();
        let count = bytes.len().min(BACKLOG - far.input.len().min(BACKLOG));
        far.input.extend(&bytes[..count]);
        far.waker.wake_by_ref();
        count
    }

    /// Takes away what the guest wrote so far.
    pub fn take_output(&self) -> Vec<u8> {
        let mut far = self.lock();
        let output = far.output.drain(..).collect();
        far.waker.wake_by_ref();
        output
    }

    /// What to wake when there is output to take, or room for more input.
    pub fn set_listener(&self, listener: Waker) {
        self.lock().listener = listener;
    }

    /// Changes the size; the guest is told.
    pub fn resize(&self, columns: u16, rows: u16) {
        let mut far = self.lock();
        far.size = (columns, rows);
        far.waker.wake_by_ref();
    }

    fn lock(&self) -> MutexGuard<'_, Far> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<M: GuestMemory> device::Device<M> for Device {
    fn device_type(&self) -> u32 {
        wire::DEVICE_TYPE
    }

    fn features(&self) -> Features {
        wire::SIZE | wire::EMERG_WRITE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[128, 128]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        // Only the emergency register can be written; its lowest byte is the character.
        if offset == wire::EMERGENCY
            && let Some(character) = data.first()
        {
            let mut far = self.far.lock();
            if far.output.len() < BACKLOG + EMERGENCIES {
                far.output.push_back(*character);
                far.listener.wake_by_ref();
            }
        }
    }

    fn activate(&mut self, _features: Features, waker: Waker) {
        self.far.lock().waker = waker;
    }

    fn kick(&mut self, index: u16, queues: &mut Queues<'_, M>) {
        let Some(queue) = queues.get(index) else { return };
        match index {
            wire::RECEIVE => self.receive(queue),
            _ => self.transmit(queue),
        }
    }

    fn poll(&mut self, queues: &mut Queues<'_, M>) {
        let before = self.config;
        self.fill_config();
        if self.config != before {
            queues.config_changed();
        }
        self.kick(wire::RECEIVE, queues);
        self.kick(wire::TRANSMIT, queues);
    }

    fn reset_queue(&mut self, index: u16) {
        if index == wire::TRANSMIT {
            self.sent = 0;
        }
    }

    fn reset(&mut self) {
        self.sent = 0;
        self.far.lock().waker = Waker::noop().clone();
        // What changes while nobody listens is there when the driver comes.
        self.fill_config();
    }
}
