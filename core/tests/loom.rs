//! Models of each pair of racing operations, for loom: every order of their memory accesses that the memory model
//! allows, on both ring formats, with and without EVENT_IDX.
//!
//! Bounds: rings of 2 entries, one driver and one device thread, one or two buffers of one descriptor, at most
//! [`PREEMPTIONS`] preemptions of a thread. Of what is in a buffer, one word is modelled.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release -p polyvirt-core --test loom`
#![cfg(loom)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use polyvirt_core::memory::{FlatMemory, Owner, Pages, Words};
use polyvirt_core::queue::{Buffer, DriverQueue, Layout, PopError, Queue, QueueConfig};
use polyvirt_core::sync::model;
use polyvirt_core::transport::{Notify, TransportError, Virtqueue};

/// How often a thread may be preempted.
const PREEMPTIONS: usize = 3;

const RING: u64 = 0x1_0000;
const BUFFERS: u64 = 0x2_0000;

/// A kind of ring.
#[derive(Clone, Copy, Debug)]
struct Kind {
    layout: Layout,
    event_idx: bool,
}

const KINDS: [Kind; 4] = [
    Kind { layout: Layout::Modern, event_idx: false },
    Kind { layout: Layout::Modern, event_idx: true },
    Kind { layout: Layout::Packed, event_idx: false },
    Kind { layout: Layout::Packed, event_idx: true },
];

/// A doorbell that remembers.
#[derive(Clone, Default)]
struct Rung(Arc<AtomicBool>);

impl Notify for Rung {
    fn notify(&mut self) -> Result<(), TransportError> {
        self.0.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// A driver, and the words in its buffers.
struct Driver {
    queue: DriverQueue<u16, Rung>,
    buffers: Words<u64, Owner>,
}

/// Where the word of buffer `number` is, in words.
const fn word(number: u16) -> usize {
    number as usize * 0x100 / 8
}

/// The value that the driver writes into buffer `number`, and the one that the device writes.
const fn asked(number: u16) -> u64 {
    100 + number as u64
}
const fn answered(number: u16) -> u64 {
    200 + number as u64
}

type Device = Queue<Arc<FlatMemory>>;

/// Both roles on a fresh ring.
fn ring(kind: Kind) -> (Driver, Device, Rung) {
    let pages = Pages::allocate(0x3000);
    let part = |page: usize| pages.slice(page * 0x1000, 0x1000).unwrap();
    // No area of a ring of 2 is longer than 32 bytes.
    (0..3).for_each(|page| model::prepare(part(page).as_ptr().addr(), 32));
    let config = QueueConfig {
        size: 2,
        descriptors: RING,
        driver: RING + 0x1000,
        device: RING + 0x2000,
        layout: kind.layout,
        event_idx: kind.event_idx,
        ..QueueConfig::default()
    };
    let rung = Rung::default();
    let (descriptors, driver, device) = (part(0), part(1), part(2));
    let buffers = Pages::allocate(0x1000);
    (0..2).for_each(|number| model::prepare(buffers.as_ptr().addr() + 8 * word(number), 8));
    let memory = FlatMemory::new([(RING, pages), (BUFFERS, buffers.clone())]);
    let queue = DriverQueue::new(Virtqueue { config, descriptors, driver, device, notify: rung.clone() }).unwrap();
    let driver = Driver { queue, buffers: Words::new(buffers).unwrap() };
    (driver, Queue::new(Arc::new(memory), config).unwrap(), rung)
}

/// Adds buffer `number`, which is told from others by its length, and kicks.
fn publish(driver: &mut Driver, number: u16) {
    let len = 16 + u32::from(number);
    driver.buffers.store(word(number), asked(number), Ordering::Relaxed);
    driver.queue.add_buf(&[], &[Buffer { address: BUFFERS + 8 * word(number) as u64, len }], number).unwrap();
    driver.queue.kick().unwrap();
}

/// Serves the next buffer, if there is one, which has to be number `next`, whole.
fn serve_one(device: &mut Device, next: u16) -> bool {
    let mut chain = match device.pop() {
        Ok(chain) => chain,
        Err(PopError::Broken(reason)) => panic!("{reason}"),
        Err(_) => return false,
    };
    assert_eq!((chain.readable_len(), chain.writable_len()), (0, 16 + u32::from(next)), "torn");
    let words = Words::<u64, _>::new(chain.writable()[0].clone()).unwrap();
    assert_eq!(words.load::<u64>(0, Ordering::Relaxed), asked(next), "the buffer is behind its descriptor");
    words.store(0, answered(next), Ordering::Relaxed);
    chain.set_written(u32::from(next) + 1);
    device.complete(chain).unwrap();
    true
}

/// Serves what is there: how many buffers, in order from `next` on.
fn serve(device: &mut Device, next: u16) -> u16 {
    let mut served = 0;
    while serve_one(device, next + served) {
        served += 1;
    }
    served
}

/// Takes back what is there, in order from `next` on, whole: which is the next then.
fn take(driver: &mut Driver, mut next: u16) -> u16 {
    while let Some((token, written)) = driver.queue.get_buf().unwrap() {
        assert_eq!((token, written), (next, u32::from(next) + 1), "torn");
        let answer: u64 = driver.buffers.load(word(next), Ordering::Relaxed);
        assert_eq!(answer, answered(next), "the buffer is behind its used descriptor");
        next += 1;
    }
    next
}

/// A device that found nothing and asked for kicks is kicked, or sees what was published: publish against pop, enabling
/// notifications against a kick.
fn kicks(kind: Kind, buffers: u16) {
    let (mut driver, mut device, rung) = ring(kind);
    let driving = loom::thread::spawn(move || {
        for number in 0..buffers {
            publish(&mut driver, number);
        }
        driver
    });
    device.begin_burst();
    let mut served = serve(&mut device, 0);
    let more = device.end_burst();
    let _driver = driving.join().unwrap();
    if served < buffers {
        assert!(more || rung.0.load(Ordering::Relaxed), "the device sleeps through a published buffer");
        device.begin_burst();
        served += serve(&mut device, served);
        assert_eq!(served, buffers, "published, and not there");
    }
}

/// A driver that found nothing and wants interrupts is interrupted, or sees what was used: complete against get, enabling
/// callbacks against an interrupt.
fn interrupts(kind: Kind, buffers: u16, disabled_before: bool) {
    let (mut driver, mut device, _) = ring(kind);
    for number in 0..buffers {
        publish(&mut driver, number);
    }
    if disabled_before {
        driver.queue.disable_cb();
    }
    let serving = loom::thread::spawn(move || {
        device.begin_burst();
        let (mut interrupted, mut served) = (false, 0);
        while serve_one(&mut device, served) {
            served += 1;
            interrupted |= device.needs_interrupt();
        }
        interrupted
    });
    let mut taken = take(&mut driver, 0);
    let mut sleeps = true;
    if disabled_before && !driver.queue.enable_cb() {
        // Told that there is more, the driver looks again; if it finds nothing, it was told wrongly.
        let before = taken;
        taken = take(&mut driver, taken);
        assert!(taken > before, "enabling callbacks told of what is not there");
        sleeps = taken < buffers;
    }
    let interrupted = serving.join().unwrap();
    if taken < buffers && sleeps {
        assert!(interrupted, "the driver sleeps through a used buffer");
        assert_eq!(take(&mut driver, taken), buffers, "used, and not there");
    }
}

fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.check(model);
}

/// Each model, by name.
fn models() -> Vec<(String, Box<dyn Fn()>)> {
    let mut models: Vec<(String, Box<dyn Fn()>)> = Vec::new();
    for kind in KINDS {
        for buffers in [1, 2] {
            let name = format!("kicks, {buffers} buffer(s), {kind:?}");
            models.push((name, Box::new(move || check(move || kicks(kind, buffers)))));
            for disabled in [false, true] {
                let name = format!("interrupts, {buffers} buffer(s), disabled before: {disabled}, {kind:?}");
                models.push((name, Box::new(move || check(move || interrupts(kind, buffers, disabled)))));
            }
        }
    }
    models
}

/// One test, because what is weakened is weakened for all threads.
#[test]
fn no_wake_up_is_lost_nothing_is_torn_and_each_ordering_is_needed() {
    let models = models();
    for (name, model) in &models {
        println!("{name}");
        model();
    }
    let sites = model::sites();
    assert!(sites.len() >= 12, "{sites:?}");
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let mut unnoticed = Vec::new();
    for site in sites {
        model::weaken(Some(site));
        let noticed = models.iter().find(|(_, model)| catch_unwind(AssertUnwindSafe(model)).is_err());
        match noticed {
            Some((name, _)) => println!("{}:{} weakened: noticed by {name}", site.0, site.1),
            None => unnoticed.push(site),
        }
    }
    model::weaken(None);
    std::panic::set_hook(quiet);
    assert!(unnoticed.is_empty(), "no model notices that nothing is ordered at {unnoticed:?}");
}
