//! A console whose far side does not read: output waits in the driver's memory, and no more than a little anywhere else.

use std::sync::Arc;
use std::time::{Duration, Instant};

use polyvirt_core::hypervisor::{Guest as _, Host as _};
use polyvirt_core::memory::{Access, FlatMemory};
use polyvirt_core::queue::{Buffer, DriverQueue};
use polyvirt_core::shared::Shared;
use polyvirt_core::transport::{self, BlockingTransport, Transport};
use polyvirt_core::{Features, Status};
use polyvirt_devices::console::{self, wire};
use polyvirt_hypervisors::loopback;
use polyvirt_transports::mmio;

/// Bytes that wait on the way to the far side.
const BACKLOG: usize = 64 * 1024;
/// Bytes of a buffer that does not fit, however often.
const LONG: usize = 2 * BACKLOG + 4097;
/// Bytes of buffers, one after another.
const LENS: [usize; 6] = [LONG, 1, BACKLOG, BACKLOG + 1, LONG, 7];
/// Far more than anything takes.
const WATCHDOG: Duration = Duration::from_secs(60);

/// A driver that sends buffers as they are.
struct Sender {
    _host: loopback::Host,
    transport: mmio::Driver<loopback::Guest>,
    queue: DriverQueue<usize>,
    far: console::Handle,
    buffer: Shared,
}

fn text(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8).collect()
}

impl Sender {
    fn new(format: Features) -> Self {
        let device = console::Device::new(80, 25);
        let far = device.handle();
        let (mut host, guest) = loopback::start(16 << 20).unwrap();
        let memory: Arc<FlatMemory> = host.memory();
        mmio::attach(&mut host, memory, Box::new(device)).unwrap();
        let guest = Arc::new(guest);
        let place = guest.enumerate().unwrap()[0];
        let mut transport = mmio::Driver::connect(guest, place).unwrap();
        let buffer = Shared::new(&transport.share(), LONG, Access::READ).unwrap();
        buffer.pages().write(0, &text(LONG)).unwrap();
        let queue = Self::begin(&mut transport, format);
        Self { _host: host, transport, queue, far, buffer }
    }

    fn begin(transport: &mut dyn BlockingTransport, format: Features) -> DriverQueue<usize> {
        let wanted = Features::SUSPEND | Features::EVENT_IDX | format;
        transport::initialize(transport, wanted).unwrap();
        let queue = DriverQueue::new(transport.find_vq(wire::TRANSMIT, None).unwrap()).unwrap();
        transport::driver_ok(transport).unwrap();
        queue
    }

    fn send(&mut self, len: usize) {
        let buffer = Buffer { address: self.buffer.address(), len: len as u32 };
        self.queue.add_buf(&[buffer], &[], len).unwrap();
        self.queue.kick().unwrap();
    }

    /// What the far side takes away until the next buffer is used.
    fn take_until_used(&mut self) -> Vec<u8> {
        let (begun, mut taken) = (Instant::now(), Vec::new());
        while self.used().is_none() {
            let piece = self.far.take_output();
            assert!(piece.len() <= BACKLOG, "{} bytes at once", piece.len());
            taken.extend(piece);
            assert!(begun.elapsed() < WATCHDOG, "{} bytes were taken away, and the buffer is not used", taken.len());
            std::thread::yield_now();
        }
        taken
    }

    fn used(&mut self) -> Option<usize> {
        self.queue.get_buf().unwrap().map(|(len, written)| {
            assert_eq!(written, 0);
            len
        })
    }
}

const FORMATS: [Features; 2] = [Features::empty(), Features::RING_PACKED];

#[test]
fn a_buffer_that_does_not_fit_is_used_once_all_of_it_was_taken_away() {
    for format in FORMATS {
        let mut sender = Sender::new(format);
        LENS.into_iter().for_each(|len| sender.send(len));
        let (mut seen, mut used) = (Vec::new(), 0);
        for len in LENS {
            seen.extend(sender.take_until_used());
            used += len;
            assert!(used <= seen.len() + BACKLOG, "{format:?}: {used} bytes are used, {} were taken", seen.len());
        }
        seen.extend(sender.far.take_output());
        let sent: Vec<_> = LENS.into_iter().flat_map(text).collect();
        assert_eq!(seen.len(), sent.len(), "{format:?}");
        assert!(seen == sent, "{format:?}");
        assert_eq!(sender.used(), None);
    }
}

#[test]
fn a_console_is_suspended_and_goes_on_in_the_middle_of_a_buffer() {
    for format in FORMATS {
        let mut sender = Sender::new(format);
        sender.send(LONG);
        assert_eq!(sender.used(), None);
        let running = sender.transport.status().unwrap();
        sender.transport.set_status(running | Status::SUSPEND).unwrap();
        // At once, though the far side has not taken anything away.
        assert!(sender.transport.status().unwrap().contains(Status::SUSPEND), "{format:?}");
        let mut seen = sender.far.take_output();
        assert_eq!(seen.len(), BACKLOG);
        assert!(sender.far.take_output().is_empty(), "nothing is taken while the device is suspended");
        sender.transport.set_status(running).unwrap();
        seen.extend(sender.take_until_used());
        seen.extend(sender.far.take_output());
        assert!(seen == text(LONG), "{format:?}: {} bytes", seen.len());
    }
}

#[test]
fn resets_do_not_make_room_for_more_output() {
    for format in FORMATS {
        let mut sender = Sender::new(format);
        for _ in 0..50 {
            sender.send(LONG);
            for _ in 0..200 {
                sender.transport.write_config(wire::EMERGENCY as u32, b"!\0\0\0").unwrap();
            }
            sender.transport.reset().unwrap();
            sender.queue = Sender::begin(&mut sender.transport, format);
        }
        let kept = sender.far.take_output().len();
        assert!(kept <= BACKLOG + 4096, "{format:?}: {kept} bytes are kept");
        // What was sent of a buffer before a reset is not missed in one after it.
        sender.far.take_output();
        sender.send(3);
        assert_eq!(sender.far.take_output(), text(3));
        assert_eq!(sender.used(), Some(3));
    }
}
