//! Our driver role and rust-vmm's device role exchange data.

use std::collections::VecDeque;

use polyvirt_core::memory::Pages;
use polyvirt_core::queue::{Buffer, DriverQueue};
use polyvirt_core::transport::{Notify, TransportError, Virtqueue};
use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::ring::{BUFFERS, Ring, SEAM, TABLES};

/// What one side or the other does next.
#[derive(Clone, Debug)]
enum Step {
    /// The driver adds a buffer: bytes to be read, in pieces of these lengths; room to be written to, likewise.
    Add {
        readable: Vec<u32>,
        writable: Vec<u32>,
    },
    Kick,
    /// The device takes what there is, answers some of what it has, in this order, and asks whether to interrupt.
    Serve(Vec<u16>),
    /// The driver takes back what is used.
    Get,
    /// The driver does not want interrupts, or wants them again.
    Quiet,
    Listen,
}

fn step() -> impl Strategy<Value = Step> {
    let pieces = || prop::collection::vec(1u32..40, 0..4);
    prop_oneof![
        4 => (pieces(), pieces())
            .prop_filter("a buffer has a piece", |(readable, writable)| !readable.is_empty() || !writable.is_empty())
            .prop_map(|(readable, writable)| Step::Add { readable, writable }),
        2 => Just(Step::Kick),
        2 => prop::collection::vec(any::<u16>(), 0..8).prop_map(Step::Serve),
        2 => Just(Step::Get),
        1 => Just(Step::Quiet),
        1 => Just(Step::Listen),
    ]
}

/// Counts.
#[derive(Default)]
struct Kicks(u32);

impl Notify for &mut Kicks {
    fn notify(&mut self) -> Result<(), TransportError> {
        self.0 += 1;
        Ok(())
    }
}

/// What the device makes of what it read: each byte changed, from the last to the first, round and round.
fn answer(read: &[u8], room: usize) -> Vec<u8> {
    let fill = [0xa5];
    let read = if read.is_empty() { &fill } else { read };
    read.iter().rev().cycle().take(room.min(read.len() * 2)).map(|byte| byte ^ 0x3c).collect()
}

/// The bytes of a buffer that the driver added, for as long as the device has it.
struct Sent {
    answer: Vec<u8>,
    room: Vec<Buffer>,
}

/// Hands out memory for buffers, round and round: there is more than can be in flight.
struct Heap(u64);

impl Heap {
    fn take(&mut self, len: u32) -> Buffer {
        let buffer = Buffer { address: BUFFERS + self.0, len };
        self.0 = (self.0 + u64::from(len)) % (SEAM - BUFFERS - 0x100);
        buffer
    }
}

/// rust-vmm's queue, and what it has taken.
struct Device {
    queue: Queue,
    held: Vec<Held>,
}

/// A chain that the device has not answered.
struct Held {
    head: u16,
    read: Vec<u8>,
    room: Vec<(GuestAddress, u32)>,
}

impl Device {
    fn serve(&mut self, ring: &Ring, order: &[u16]) -> bool {
        let memory = &*ring.theirs;
        self.queue.disable_notification(memory).unwrap();
        loop {
            while let Some(chain) = self.queue.pop_descriptor_chain(memory) {
                let (head, mut read, mut room) = (chain.head_index(), Vec::new(), Vec::new());
                for descriptor in chain {
                    if descriptor.is_write_only() {
                        room.push((descriptor.addr(), descriptor.len()));
                    } else {
                        let mut bytes = vec![0; descriptor.len() as usize];
                        memory.read_slice(&mut bytes, descriptor.addr()).unwrap();
                        read.extend(bytes);
                    }
                }
                self.held.push(Held { head, read, room });
            }
            if !self.queue.enable_notification(memory).unwrap() {
                break;
            }
        }
        for index in order {
            if self.held.is_empty() {
                break;
            }
            let Held { head, read, room } = self.held.remove(usize::from(*index) % self.held.len());
            let bytes = answer(&read, room.iter().map(|(_, len)| *len as usize).sum());
            let mut left = &bytes[..];
            for (address, len) in room {
                let (now, later) = left.split_at(left.len().min(len as usize));
                memory.write_slice(now, address).unwrap();
                left = later;
            }
            self.queue.add_used(memory, head, bytes.len() as u32).unwrap();
        }
        !order.is_empty() && self.queue.needs_notification(memory).unwrap()
    }
}

proptest! {
    #[test]
    fn every_buffer_comes_back_once_with_the_answer_to_its_bytes(
        log in 1u32..6,
        (event_idx, indirect) in any::<(bool, bool)>(),
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let ring = Ring::new(1 << log, event_idx, indirect);
        let mut device = Device { queue: ring.their_device(), held: Vec::new() };
        let [descriptors, driver, used] = ring.areas();
        let mut kicks = Kicks::default();
        let virtqueue = Virtqueue { config: ring.config, descriptors, driver, device: used, notify: &mut kicks };
        let tables: Pages = ring.pages(TABLES, 16 * 4 * usize::from(ring.config.size));
        let mut driver = DriverQueue::new(virtqueue).unwrap().with_indirect(tables, TABLES);
        let mut heap = Heap(0);
        let mut sent: Vec<Option<Sent>> = Vec::new();
        let mut waiting: VecDeque<usize> = VecDeque::new();
        let (mut serial, mut added) = (0u8, 0);
        // What still has to happen, so that everything comes back.
        let rest = [Step::Kick, Step::Serve(vec![0; 64]), Step::Get];
        for step in steps.iter().chain(&rest) {
            match step {
                Step::Add { readable, writable } => {
                    let readable: Vec<_> = readable.iter().map(|len| heap.take(*len)).collect();
                    let room: Vec<_> = writable.iter().map(|len| heap.take(*len)).collect();
                    let mut bytes = Vec::new();
                    for piece in &readable {
                        serial = serial.wrapping_add(1);
                        let piece_bytes: Vec<_> = (0..piece.len as u8).map(|at| at.wrapping_mul(7) ^ serial).collect();
                        ring.theirs.write_slice(&piece_bytes, GuestAddress(piece.address)).unwrap();
                        bytes.extend(piece_bytes);
                    }
                    let space = room.iter().map(|piece| piece.len as usize).sum();
                    let number = sent.len();
                    // No room in the ring, or a buffer of more pieces than it has: the next one, then.
                    if driver.add_buf(&readable, &room, number).is_ok() {
                        sent.push(Some(Sent { answer: answer(&bytes, space), room }));
                        waiting.push_back(number);
                        added += 1;
                    }
                }
                Step::Kick => { driver.kick().unwrap(); }
                Step::Serve(order) => { device.serve(&ring, order); }
                Step::Get => while let Some((number, len)) = driver.get_buf().unwrap() {
                    let Sent { answer, room } = sent[number].take().expect("it comes back once");
                    prop_assert_eq!(len as usize, answer.len());
                    let mut got = Vec::new();
                    for piece in room {
                        let mut bytes = vec![0; piece.len as usize];
                        ring.theirs.read_slice(&mut bytes, GuestAddress(piece.address)).unwrap();
                        got.extend(bytes);
                    }
                    prop_assert_eq!(&got[..answer.len()], &answer[..]);
                    waiting.retain(|other| *other != number);
                },
                Step::Quiet => driver.disable_cb(),
                Step::Listen => { driver.enable_cb(); }
            }
        }
        prop_assert!(waiting.is_empty(), "{} of {} are missing", waiting.len(), added);
        prop_assert!(driver.drain().is_empty());
    }
}
