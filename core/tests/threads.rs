//! A driver and a device on two threads, each asleep unless the other wakes it: a lost wake-up stops both.

mod common;

use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use common::{BUFFERS, Memory, SPLIT, Shape, popped};
use polyvirt_core::memory::FlatMemory;
use polyvirt_core::queue::{Buffer, DriverQueue, Layout, Queue};
use polyvirt_core::transport::{Notify, TransportError};

/// Buffers that are carried through each ring.
const COUNT: u64 = 10_000;
/// Far beyond what the machine could need; only a lost wake-up takes as long.
const WATCHDOG: Duration = Duration::from_secs(60);
/// Bytes between the buffers of one token and the next; more tokens than fit a queue have room.
const SLOT: u64 = 64;
const SLOTS: u64 = 64;

/// A wake-up that is remembered until it is waited for.
#[derive(Clone, Default)]
struct Wake(Arc<(Mutex<State>, Condvar)>);

#[derive(Default)]
struct State {
    pending: bool,
    count: u64,
}

impl Wake {
    fn wake(&self) {
        let mut state = self.0.0.lock().unwrap();
        state.pending = true;
        state.count += 1;
        self.0.1.notify_one();
    }

    fn wait(&self, who: &str) {
        let state = self.0.0.lock().unwrap();
        let (mut state, timeout) = self.0.1.wait_timeout_while(state, WATCHDOG, |state| !state.pending).unwrap();
        assert!(!timeout.timed_out(), "the {who} sleeps through a wake-up");
        state.pending = false;
    }

    fn count(&self) -> u64 {
        self.0.0.lock().unwrap().count
    }
}

impl Notify for Wake {
    fn notify(&mut self) -> Result<(), TransportError> {
        self.wake();
        Ok(())
    }
}

/// Where the device finds the buffer of `token`, and where it answers.
fn pieces(token: u64) -> [Buffer; 2] {
    let address = BUFFERS + SLOT * (token % SLOTS);
    [Buffer { address, len: 8 }, Buffer { address: address + 8, len: 8 }]
}

/// Adds while there is room, kicks if the device wants it, sleeps when there is nothing to take back.
fn drive(mut driver: DriverQueue<u64, Wake>, memory: &Memory, interrupts: &Wake, polling: bool) {
    let (mut added, mut got) = (0, 0);
    if polling {
        driver.disable_cb();
    }
    while got < COUNT {
        // A full ring would kick in any case and hide a kick that was lost.
        while added < COUNT && driver.free() >= 2 {
            let [readable, writable] = pieces(added);
            memory.write(readable.address, &added.to_le_bytes());
            driver.add_buf(&[readable], &[writable], added).unwrap();
            added += 1;
        }
        driver.kick().unwrap();
        while let Some((token, len)) = driver.get_buf().unwrap() {
            let [_, writable] = pieces(token);
            assert_eq!((len, u64::from_le_bytes(memory.read(writable.address))), (8, !token));
            got += 1;
        }
        if driver.in_flight() > 0 && driver.free() < 2 || added == COUNT && got < COUNT {
            if polling {
                if driver.enable_cb() {
                    interrupts.wait("driver");
                }
                driver.disable_cb();
            } else {
                interrupts.wait("driver");
            }
        }
    }
    assert_eq!(driver.in_flight(), 0);
}

/// Sleeps until kicked, then answers what is there, the newest first.
fn serve(mut queue: Queue<Arc<FlatMemory>>, kicks: &Wake, interrupts: &Wake) {
    let mut served = 0;
    let mut held = Vec::new();
    while served < COUNT {
        kicks.wait("device");
        loop {
            queue.begin_burst();
            while let Some(chain) = popped(queue.pop()) {
                held.push(chain);
            }
            while let Some(mut chain) = held.pop() {
                let mut bytes = [0; 8];
                chain.read(0, &mut bytes).unwrap();
                chain.write(0, &(!u64::from_le_bytes(bytes)).to_le_bytes()).unwrap();
                queue.complete(chain).unwrap();
                served += 1;
                if served % 3 == 0 && queue.needs_interrupt() {
                    interrupts.wake();
                }
            }
            if queue.needs_interrupt() {
                interrupts.wake();
            }
            if !queue.end_burst() {
                break;
            }
        }
    }
}

fn carry(shape: Shape, polling: bool) {
    let memory = Memory::new(shape);
    let (kicks, interrupts) = (Wake::default(), Wake::default());
    let (driver, device) = (memory.driver(kicks.clone()), memory.device());
    thread::scope(|scope| {
        scope.spawn(|| serve(device, &kicks, &interrupts));
        drive(driver, &memory, &interrupts, polling);
    });
    for (wake, what) in [(&kicks, "kicks"), (&interrupts, "interrupts")] {
        let count = wake.count();
        assert!(count <= COUNT, "{count} {what} for {COUNT} buffers, {shape:?}");
    }
}

/// Carries buffers through rings with and without EVENT_IDX and indirect descriptors, by a driver with callbacks always
/// on and by one that enables them only before it sleeps, also in order.
fn carry_all(layout: Layout) {
    for size in [2, 8] {
        for event_idx in [false, true] {
            for indirect in [false, true] {
                for (polling, in_order) in [(false, false), (true, false), (true, true)] {
                    carry(Shape { size, event_idx, indirect, in_order, layout }, polling);
                }
            }
        }
    }
}

#[test]
fn two_threads_lose_no_wake_up_on_a_modern_split_ring() {
    carry_all(Layout::Modern);
}

#[test]
fn two_threads_lose_no_wake_up_on_a_legacy_ring_of_either_byte_order() {
    SPLIT[1..].iter().for_each(|&layout| carry_all(layout));
}

#[test]
fn two_threads_lose_no_wake_up_on_a_packed_ring() {
    carry_all(Layout::Packed);
}
