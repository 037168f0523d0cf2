//! The driver role of virtio-drivers and our device role exchange data.

use std::cell::RefCell;
use std::ptr::NonNull;

use polyvirt_conformance::bench::opponents::Catcher;
use polyvirt_core::memory::{FlatMemory, Pages};
use polyvirt_core::queue::{self, Layout, PopError, QueueConfig};
use proptest::prelude::*;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

/// Entries.
const SIZE: usize = 16;
/// Where the device sees the memory that this driver shares.
const BASE: PhysAddr = 0x4000_0000;
/// Bytes of it.
const LEN: usize = 1 << 20;

thread_local! {
    /// What is shared with the device, and how much of it is handed out.
    static SHARED: RefCell<(Pages, usize)> = RefCell::new((Pages::allocate(LEN), 0));
}

/// Begins again with memory in which nothing is handed out.
fn restart() -> FlatMemory {
    SHARED.with_borrow_mut(|shared| {
        *shared = (Pages::allocate(LEN), 0);
        FlatMemory::new([(BASE, shared.0.clone())])
    })
}

fn take(len: usize, align: usize) -> (PhysAddr, NonNull<u8>) {
    SHARED.with_borrow_mut(|(pages, used)| {
        let at = used.next_multiple_of(align);
        *used = at + len;
        assert!(*used <= LEN, "more than a run of the test shares");
        let part = pages.slice(at, len).unwrap();
        (BASE + at as PhysAddr, NonNull::new(part.as_ptr()).unwrap())
    })
}

fn shared(address: PhysAddr, len: usize) -> Pages {
    SHARED.with_borrow(|(pages, _)| pages.slice((address - BASE) as usize, len).unwrap())
}

/// A platform where the device sees only memory that is set apart: buffers are copied in and out.
struct Apart;

// SAFETY: what is handed out is zeroed, aligned, and handed out once in a run of the test.
unsafe impl Hal for Apart {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        take(pages * PAGE_SIZE, PAGE_SIZE)
    }

    unsafe fn dma_dealloc(_address: PhysAddr, _start: NonNull<u8>, _pages: usize) -> i32 {
        0
    }

    unsafe fn mmio_phys_to_virt(_address: PhysAddr, _size: usize) -> NonNull<u8> {
        unreachable!("there are no registers")
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        let (address, start) = take(buffer.len(), 16);
        if direction != BufferDirection::DeviceToDriver {
            // SAFETY: both have this length, and the caller lends the buffer.
            unsafe { start.copy_from_nonoverlapping(buffer.cast(), buffer.len()) };
        }
        address
    }

    unsafe fn unshare(address: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        if direction != BufferDirection::DriverToDevice {
            let part = shared(address, buffer.len());
            let start = NonNull::new(part.as_ptr()).unwrap();
            // SAFETY: both have this length, and the caller lends the buffer.
            unsafe { buffer.cast().copy_from_nonoverlapping(start, buffer.len()) };
        }
    }
}

/// A request: what is to be read and room for the answer, in pieces.
struct Request {
    token: u16,
    inputs: Vec<Vec<u8>>,
    outputs: Vec<Vec<u8>>,
    answer: Vec<u8>,
}

impl Request {
    /// Adds it to `queue`; none if there is no room.
    fn add(queue: &mut VirtQueue<Apart, SIZE>, inputs: Vec<Vec<u8>>, rooms: &[usize]) -> Option<Self> {
        let read: Vec<u8> = inputs.concat();
        let answer = answer(&read, rooms.iter().sum());
        let outputs = rooms.iter().map(|room| vec![0; *room]).collect();
        let mut request = Self { token: 0, inputs, outputs, answer };
        // SAFETY: `Apart` copies, so nothing is touched until it is taken back with the same buffers.
        request.token = unsafe { request.with(|inputs, outputs| queue.add(inputs, outputs)) }.ok()?;
        Some(request)
    }

    fn with<R>(&mut self, call: impl for<'a> FnOnce(&'a [&'a [u8]], &'a mut [&'a mut [u8]]) -> R) -> R {
        let inputs: Vec<_> = self.inputs.iter().map(Vec::as_slice).collect();
        let mut outputs: Vec<_> = self.outputs.iter_mut().map(Vec::as_mut_slice).collect();
        call(&inputs, &mut outputs)
    }
}

/// What the device makes of what it read.
fn answer(read: &[u8], room: usize) -> Vec<u8> {
    (0..room.min(read.len() + 1)).map(|at| read.get(at).map_or(0x77, |byte| byte.wrapping_add(1))).collect()
}

/// What happens in a round: requests are added, some of those that the device has are answered, in some order.
#[derive(Clone, Debug)]
struct Round {
    requests: Vec<(Vec<Vec<u8>>, Vec<usize>)>,
    answered: Vec<u16>,
}

fn rounds() -> impl Strategy<Value = Vec<Round>> {
    let bytes = prop::collection::vec(any::<u8>(), 1..40);
    // Their queue cannot add a buffer of nothing.
    let request = (prop::collection::vec(bytes, 0..4), prop::collection::vec(1usize..40, 0..4))
        .prop_filter("a request has a piece", |(inputs, rooms)| !inputs.is_empty() || !rooms.is_empty());
    let round = (prop::collection::vec(request, 0..8), prop::collection::vec(any::<u16>(), 0..8));
    prop::collection::vec(round.prop_map(|(requests, answered)| Round { requests, answered }), 1..20)
}

proptest! {
    #[test]
    fn every_request_comes_back_once_with_its_answer(
        (indirect, event_idx) in any::<(bool, bool)>(),
        rounds in rounds(),
    ) {
        let memory = restart();
        let mut catcher = Catcher::default();
        let mut driver = VirtQueue::<Apart, SIZE>::new(&mut catcher, 0, indirect, event_idx).unwrap();
        let [descriptors, available, used] = catcher.areas;
        let config = QueueConfig {
            size: SIZE as u16,
            descriptors,
            driver: available,
            device: used,
            layout: Layout::Modern,
            event_idx,
            indirect,
            in_order: false,
        };
        let mut device = queue::Queue::new(&memory, config).unwrap();
        let (mut sent, mut held): (Vec<Request>, _) = (Vec::new(), Vec::new());
        let everything = Round { requests: Vec::new(), answered: vec![0; SIZE] };
        for round in rounds.iter().chain([&everything]) {
            for (inputs, rooms) in &round.requests {
                sent.extend(Request::add(&mut driver, inputs.clone(), rooms));
            }
            device.begin_burst();
            while let Ok(chain) = device.pop() {
                held.push(chain);
            }
            prop_assert_eq!(device.broken(), None);
            let answered = round.answered.len().min(held.len());
            for index in &round.answered[..answered] {
                let mut chain = held.remove(usize::from(*index) % held.len());
                let mut read = vec![0; chain.readable_len() as usize];
                chain.read(0, &mut read).unwrap();
                let bytes = answer(&read, chain.writable_len() as usize);
                chain.write(0, &bytes).unwrap();
                device.complete(chain).unwrap();
            }
            prop_assert_eq!(device.needs_interrupt(), answered > 0, "their driver always wants to know");
            while device.end_burst() {
                device.begin_burst();
                prop_assert!(matches!(device.pop(), Err(PopError::Empty)));
            }
            let mut back = 0;
            while let Some(token) = driver.peek_used() {
                let at = sent.iter().position(|request| request.token == token).expect("it comes back once");
                let mut request = sent.remove(at);
                // SAFETY: the buffers that it was added with.
                let len = unsafe { request.with(|inputs, outputs| driver.pop_used(token, inputs, outputs)) }.unwrap();
                prop_assert_eq!(len as usize, request.answer.len());
                prop_assert_eq!(&request.outputs.concat()[..request.answer.len()], &request.answer[..]);
                back += 1;
            }
            prop_assert_eq!(back, answered);
            // Having been asked for kicks, their driver wants to give one for what it adds next.
            if sent.len() < SIZE / 8 {
                let request = Request::add(&mut driver, vec![vec![1]], &[]);
                prop_assert!(request.is_none() || driver.should_notify());
                sent.extend(request);
            }
        }
        prop_assert!(sent.len() <= 1, "all but what was added at the very end");
    }
}
