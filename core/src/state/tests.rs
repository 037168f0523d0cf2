use std::sync::Mutex;
use std::vec;

use super::*;
use crate::memory::{Access, Accessed, FlatMemory, Log, MemoryError, Watched};
use crate::queue::{Buffer, Chain, DriverQueue, split};
use crate::transport::{Notify, TransportError, Virtqueue};

const RAM: u64 = 0x10000;
/// Bytes of RAM that each queue has: three areas of a page, and a page of buffers.
const EACH: u64 = 0x4000;
const MAX: [u16; 3] = [4, 8, 0];
const DEVICE_FEATURE: Features = Features::bit(3);
const READY: Status = Status::ACKNOWLEDGE.union(Status::DRIVER).union(Status::FEATURES_OK).union(Status::DRIVER_OK);

/// What happened to the fake device, in order.
#[derive(Clone, Debug, PartialEq)]
enum Call {
    Activate(Features),
    Kick(u16),
    Poll,
    WriteConfig(usize, Vec<u8>),
    ResetQueue(u16),
    Reset,
}

/// What the fake device does, and what it saw.
#[derive(Default)]
struct Book {
    calls: Vec<Call>,
    served: usize,
    /// Whether the device keeps what it takes until it is polled when it is not slow.
    slow: bool,
    /// The configuration's first byte, which the next poll installs.
    news: Option<u8>,
    /// The same, if whoever looks sees it.
    unseen: Option<u8>,
    /// Which features were settled, each time.
    settled: Vec<Features>,
    interrupts: Vec<Cause>,
    accesses: Vec<Accessed>,
    wakes: usize,
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Book>>);

impl Shared {
    fn with<R>(&self, look: impl FnOnce(&mut Book) -> R) -> R {
        look(&mut self.0.lock().unwrap())
    }
    fn called(&self, call: &Call) -> usize {
        self.with(|book| book.calls.iter().filter(|other| *other == call).count())
    }
    fn interrupts(&self) -> Vec<Cause> {
        self.with(|book| mem::take(&mut book.interrupts))
    }
    fn accesses(&self) -> Vec<Accessed> {
        self.with(|book| mem::take(&mut book.accesses))
    }
    fn served(&self) -> usize {
        self.with(|book| mem::take(&mut book.served))
    }
}

impl Interrupt for Shared {
    fn raise(&self, cause: Cause) {
        self.with(|book| book.interrupts.push(cause));
    }
}

impl Log for Shared {
    fn accessed(&self, access: Accessed) {
        self.with(|book| book.accesses.push(access));
    }
}

impl std::task::Wake for Shared {
    fn wake(self: Arc<Self>) {
        self.with(|book| book.wakes += 1);
    }
}

/// Completes whatever it finds in any queue, whichever was kicked.
struct Fake<L> {
    book: Shared,
    config: [u8; 6],
    /// What it was slow with.
    held: Vec<(u16, Chain<L>)>,
}

impl<M: GuestMemory> Device<M> for Fake<M::Lease> {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> Features {
        DEVICE_FEATURE
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &MAX
    }
    fn config(&self) -> &[u8] {
        &self.config
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.book.with(|book| book.calls.push(Call::WriteConfig(offset, data.to_vec())));
        // The last two bytes are read-only.
        for (at, byte) in data.iter().enumerate().filter(|(at, _)| offset + at < 4) {
            self.config[offset + at] = *byte;
        }
    }
    fn activate(&mut self, features: Features, _: Waker) {
        self.book.with(|book| book.calls.push(Call::Activate(features)));
    }
    fn kick(&mut self, index: u16, queues: &mut Queues<'_, M>) {
        self.book.with(|book| book.calls.push(Call::Kick(index)));
        for index in 0..MAX.len() as u16 {
            let Some(queue) = queues.get(index) else { continue };
            while let Ok(chain) = queue.pop() {
                self.book.with(|book| book.served += 1);
                if self.book.with(|book| book.slow) {
                    self.held.push((index, chain));
                } else {
                    let _ = queue.complete(chain);
                }
            }
        }
    }
    fn refresh(&mut self) -> bool {
        let unseen = self.book.with(|book| book.unseen.take());
        unseen.inspect(|byte| self.config[0] = *byte).is_some()
    }
    fn negotiated(&mut self, features: Features) {
        self.book.with(|book| book.settled.push(features));
    }
    fn poll(&mut self, queues: &mut Queues<'_, M>) {
        let news = self.book.with(|book| {
            book.calls.push(Call::Poll);
            book.news.take()
        });
        if !self.book.with(|book| book.slow) {
            for (index, chain) in self.held.drain(..) {
                if let Some(queue) = queues.get(index) {
                    let _ = queue.complete(chain);
                }
            }
        }
        if let Some(byte) = news {
            self.config[0] = byte;
            queues.config_changed();
        }
    }
    fn reset_queue(&mut self, index: u16) {
        self.held.retain(|(queue, _)| *queue != index);
        self.book.with(|book| book.calls.push(Call::ResetQueue(index)));
    }
    fn reset(&mut self) {
        self.held.clear();
        self.book.with(|book| book.calls.push(Call::Reset));
    }
}

struct Silent;
impl Notify for Silent {
    fn notify(&mut self) -> Result<(), TransportError> {
        Ok(())
    }
}

type Driver = DriverQueue<u32, Silent>;

struct Rig {
    state: VirtioDevice<Watched<Arc<FlatMemory>>>,
    ram: Arc<FlatMemory>,
    book: Shared,
}

impl Rig {
    fn new(interface: Interface) -> Self {
        let book = Shared::default();
        let ram = Arc::new(FlatMemory::new([(RAM, crate::memory::Pages::allocate(3 * EACH as usize))]));
        let device = Fake { book: book.clone(), config: [1, 2, 3, 4, 5, 6], held: Vec::new() };
        let memory = Watched::new(ram.clone(), "device", Arc::new(book.clone()));
        let mut state = VirtioDevice::new(Box::new(device), memory, Arc::new(book.clone()), interface).with_features(
            Features::RING_RESET | Features::RING_PACKED | Features::NOTIFICATION_DATA | Features::NOTIF_CONFIG_DATA,
        );
        state.set_waker(Arc::new(book.clone()).into());
        Self { state, ram, book }
    }

    fn modern() -> Self {
        Self::new(Interface::Modern)
    }

    /// Up to FEATURES_OK.
    fn negotiated(features: Features) -> Self {
        let mut rig = Self::modern();
        rig.state.set_status(Status::ACKNOWLEDGE);
        rig.state.set_status(Status::ACKNOWLEDGE | Status::DRIVER);
        rig.state.set_driver_features(Features::VERSION_1 | features);
        rig.state.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK);
        assert!(rig.state.status().contains(Status::FEATURES_OK));
        rig
    }

    /// Queues 0 and 1 enabled, DRIVER_OK.
    fn running() -> (Self, Driver, Driver) {
        let mut rig = Self::negotiated(Features::empty());
        let drivers = (rig.enable(0), rig.enable(1));
        rig.state.set_status(READY);
        assert!(rig.state.is_running());
        rig.book.accesses();
        (rig, drivers.0, drivers.1)
    }

    /// Writes what a driver writes to enable queue `index` at its maximum size, and takes it into use.
    fn enable(&mut self, index: u16) -> Driver {
        let base = RAM + u64::from(index) * EACH;
        let size = MAX[usize::from(index)];
        let (offsets, layout) = match self.state.interface {
            Interface::Modern if self.state.driver_features().contains(Features::RING_PACKED) => {
                ([0, 0x1000, 0x2000], Layout::Packed)
            }
            Interface::Modern => ([0, 0x1000, 0x2000], Layout::Modern),
            Interface::Legacy(order) => {
                let (driver, device, _) = split::layout::legacy(size);
                ([0, driver, device], Layout::Legacy(order))
            }
        };
        let [descriptors, driver, device] = offsets.map(|offset| base + offset);
        let pages = |address: u64| {
            let pages = self.ram.pages(address, 0x1000).unwrap();
            pages.fill(0, 0x1000, 0).unwrap();
            pages
        };
        let notify = Silent;
        let config = QueueConfig {
            size,
            descriptors,
            driver,
            device,
            layout,
            event_idx: false,
            indirect: false,
            ..QueueConfig::default()
        };
        let memory =
            Virtqueue { config, descriptors: pages(descriptors), driver: pages(driver), device: pages(device), notify };
        self.state.set_queue_size(index, size.into());
        for (area, address) in [(Area::Descriptors, descriptors), (Area::Driver, driver), (Area::Device, device)] {
            self.state.set_queue_address_half(index, area, Half::Low, address as u32);
            self.state.set_queue_address_half(index, area, Half::High, (address >> 32) as u32);
        }
        self.state.enable_queue(index);
        DriverQueue::new(memory).unwrap()
    }
}

/// Makes a buffer available; true if the device wants to be kicked.
fn add(driver: &mut Driver, token: u32) -> bool {
    driver.add_buf(&[Buffer { address: RAM + 0x3000, len: 4 }], &[], token).unwrap();
    driver.kick().unwrap()
}

/// The 16-bit word `index` of an area in RAM, as a driver that breaks the ring writes it.
fn poke(rig: &Rig, address: u64, value: u16) {
    rig.ram.pages(address, 2).unwrap().write(0, &value.to_le_bytes()).unwrap();
}

#[test]
fn status_bits_are_only_added_until_a_reset() {
    let mut rig = Rig::modern();
    assert_eq!(rig.state.status(), Status::empty());
    rig.state.set_status(Status::ACKNOWLEDGE);
    rig.state.set_status(Status::DRIVER);
    assert_eq!(rig.state.status(), Status::ACKNOWLEDGE | Status::DRIVER);
    rig.state.set_status(Status::ACKNOWLEDGE);
    assert_eq!(rig.state.status(), Status::ACKNOWLEDGE | Status::DRIVER, "a cleared bit stays");
    rig.state.set_status(Status::empty());
    assert_eq!(rig.state.status(), Status::empty());
    assert_eq!(rig.book.called(&Call::Reset), 1);
}

#[test]
fn several_status_bits_may_come_in_one_write() {
    let mut rig = Rig::modern();
    rig.state.set_driver_features(Features::VERSION_1);
    rig.state.set_status(READY);
    assert_eq!(rig.state.status(), READY);
    assert_eq!(rig.book.called(&Call::Activate(Features::VERSION_1)), 1);
}

#[test]
fn needs_reset_and_bits_without_a_feature_are_not_the_drivers_to_write() {
    let mut rig = Rig::modern();
    rig.state.set_status(Status::from_bits_retain(!(READY | Status::FAILED).bits()));
    assert_eq!(rig.state.status(), Status::empty());
}

#[test]
fn what_is_offered_has_version_1_the_devices_bits_and_the_transports() {
    let offered = Rig::modern().state.device_features();
    assert!(offered.contains(Features::VERSION_1 | DEVICE_FEATURE | Features::RING_RESET | Features::RING_PACKED));
    let unknown = Features::all() - offered;
    assert!(unknown.contains(Features::SR_IOV | Features::ANY_LAYOUT));
}

#[test]
fn a_feature_that_was_not_offered_keeps_features_ok_away_until_it_is_taken_back() {
    let mut rig = Rig::modern();
    let (before, after) = (Status::ACKNOWLEDGE | Status::DRIVER, Status::FEATURES_OK);
    rig.state.set_status(before);
    for refused in [Features::VERSION_1 | Features::bit(4), Features::VERSION_1 | Features::bit(127), DEVICE_FEATURE] {
        rig.state.set_driver_features(refused);
        rig.state.set_status(before | after);
        assert_eq!(rig.state.status(), before, "{refused:?}");
    }
    rig.state.set_driver_features(Features::VERSION_1 | DEVICE_FEATURE);
    rig.state.set_status(before | after);
    assert_eq!(rig.state.status(), before | after);
}

#[test]
fn features_are_settled_by_features_ok() {
    let mut rig = Rig::negotiated(DEVICE_FEATURE);
    rig.state.set_driver_features(Features::VERSION_1);
    rig.state.set_status(READY);
    rig.state.set_driver_features(Features::all());
    assert_eq!(rig.state.driver_features(), Features::VERSION_1 | DEVICE_FEATURE);
    assert_eq!(rig.book.called(&Call::Activate(Features::VERSION_1 | DEVICE_FEATURE)), 1);
}

#[test]
fn driver_ok_without_features_ok_does_not_count() {
    let mut rig = Rig::modern();
    rig.state.set_driver_features(Features::VERSION_1);
    rig.state.set_status(READY - Status::FEATURES_OK);
    assert_eq!(rig.state.status(), Status::ACKNOWLEDGE | Status::DRIVER);
    rig.state.set_driver_features(Features::bit(4));
    rig.state.set_status(READY);
    assert_eq!(rig.state.status(), Status::ACKNOWLEDGE | Status::DRIVER, "nor with a FEATURES_OK that was refused");
    assert!(rig.book.with(|book| book.calls.is_empty()));
}

#[test]
fn driver_ok_twice_activates_once() {
    let (mut rig, ..) = Rig::running();
    rig.state.set_status(READY);
    rig.state.set_status(READY - Status::DRIVER_OK);
    rig.state.set_status(READY);
    assert_eq!(rig.book.called(&Call::Activate(Features::VERSION_1)), 1);
}

#[test]
fn driver_ok_without_a_queue_is_fine() {
    let mut rig = Rig::negotiated(Features::empty());
    rig.state.set_status(READY);
    assert_eq!(rig.state.status(), READY);
    assert!(!rig.state.kick(0) && !rig.state.poll());
    assert_eq!(rig.book.called(&Call::Kick(0)), 0);
}

#[test]
fn buffers_and_kicks_before_driver_ok_wait_for_it() {
    let mut rig = Rig::negotiated(Features::empty());
    let mut driver = rig.enable(0);
    add(&mut driver, 7);
    assert!(!rig.state.kick(0) && !rig.state.poll());
    assert_eq!((rig.book.accesses(), rig.book.interrupts()), (vec![], vec![]));
    rig.state.set_status(READY);
    assert_eq!(driver.get_buf(), Ok(Some((7, 0))), "served without another kick");
    assert_eq!(rig.book.interrupts(), [Cause::Queue(0)]);
    assert_eq!(rig.book.with(|book| book.wakes), 0, "nothing is left");
}

#[test]
fn a_kick_serves_the_queue_and_interrupts_once() {
    let (mut rig, mut first, mut second) = Rig::running();
    add(&mut second, 1);
    add(&mut second, 2);
    assert!(!rig.state.kick(1));
    assert_eq!((second.get_buf(), second.get_buf(), second.get_buf()), (Ok(Some((1, 0))), Ok(Some((2, 0))), Ok(None)));
    assert_eq!(first.get_buf(), Ok(None));
    assert_eq!(rig.book.interrupts(), [Cause::Queue(1)]);
    assert!(!rig.state.kick(1));
    assert_eq!(rig.book.interrupts(), [], "nothing was used");
}

#[test]
fn a_queue_that_used_up_its_turn_is_served_by_the_next_poll_without_a_kick() {
    let (mut rig, mut driver, _second) = Rig::running();
    (0..4).for_each(|token| _ = add(&mut driver, token));
    assert!(rig.state.kick(0), "as many as the queue is long: there may be more");
    (0..4).for_each(|token| assert_eq!(driver.get_buf(), Ok(Some((token, 0)))));
    assert!(!add(&mut driver, 4), "the device said that it does not want to be kicked");
    assert!(!rig.state.poll());
    assert_eq!(driver.get_buf(), Ok(Some((4, 0))));
    assert!(add(&mut driver, 5), "it wants to now");
}

#[test]
fn a_queue_that_was_full_at_driver_ok_wakes_the_host() {
    let mut rig = Rig::negotiated(Features::empty());
    let mut driver = rig.enable(0);
    (0..4).for_each(|token| _ = add(&mut driver, token));
    rig.state.set_status(READY);
    assert_eq!(rig.book.served(), 4);
    assert_eq!(rig.book.with(|book| book.wakes), 1);
    assert!(!rig.state.poll());
}

#[test]
fn a_queue_served_on_anothers_kick_still_wants_its_own() {
    let (mut rig, mut first, _second) = Rig::running();
    assert!(add(&mut first, 1));
    assert!(!rig.state.kick(1));
    assert_eq!(first.get_buf(), Ok(Some((1, 0))));
    assert_eq!(rig.book.interrupts(), [Cause::Queue(0)]);
    assert!(add(&mut first, 2));
}

#[test]
fn reset_returns_everything_to_its_initial_state_and_ends_all_accesses() {
    let (mut rig, mut driver, _second) = Rig::running();
    add(&mut driver, 1);
    rig.state.set_status(Status::empty());
    assert_eq!(rig.state.status(), Status::empty());
    assert_eq!(rig.state.driver_features(), Features::empty());
    for index in 0..2 {
        assert!(!rig.state.queue_enabled(index));
        assert_eq!(rig.state.queue_size(index), u32::from(MAX[usize::from(index)]));
        assert_eq!(rig.state.queue_address(index, Area::Device), 0);
    }
    assert!(!rig.state.kick(0) && !rig.state.poll());
    assert_eq!((rig.book.accesses(), rig.book.interrupts()), (vec![], vec![]));
    assert_eq!(rig.book.with(|book| book.calls.last().cloned()), Some(Call::Reset));
}

#[test]
fn after_a_reset_the_device_comes_up_again_with_other_features() {
    let (mut rig, ..) = Rig::running();
    rig.state.set_status(Status::empty());
    rig.state.set_driver_features(Features::VERSION_1 | Features::RING_PACKED);
    let mut driver = rig.enable(0);
    add(&mut driver, 9);
    rig.state.set_status(READY);
    assert_eq!(driver.get_buf(), Ok(Some((9, 0))), "a packed ring now");
}

#[test]
fn after_failed_only_a_reset_counts() {
    let (mut rig, mut driver, _second) = Rig::running();
    rig.state.set_status(READY | Status::FAILED);
    assert_eq!(rig.state.status(), READY | Status::FAILED);
    add(&mut driver, 1);
    assert!(!rig.state.kick(0) && !rig.state.poll());
    rig.state.set_status(READY);
    assert_eq!(rig.state.status(), READY | Status::FAILED);
    assert_eq!((rig.book.accesses(), rig.book.interrupts()), (vec![], vec![]));
    rig.state.set_status(Status::empty());
    assert_eq!(rig.state.status(), Status::empty());
}

#[test]
fn an_enabled_queue_cannot_be_moved_or_resized() {
    for driver_ok in [false, true] {
        let mut rig = Rig::negotiated(Features::empty());
        let mut driver = rig.enable(0);
        if driver_ok {
            rig.state.set_status(READY);
        }
        rig.state.set_queue_size(0, 0);
        rig.state.set_queue_address(0, Area::Descriptors, u64::MAX);
        rig.state.set_queue_address_half(0, Area::Device, Half::High, u32::MAX);
        rig.state.enable_queue(0);
        assert_eq!((rig.state.queue_size(0), rig.state.queue_address(0, Area::Descriptors)), (4, RAM));
        assert_eq!(rig.state.queue_address(0, Area::Device), RAM + 0x2000);
        rig.state.set_status(READY);
        add(&mut driver, 1);
        rig.state.kick(0);
        assert_eq!(driver.get_buf(), Ok(Some((1, 0))));
    }
}

#[test]
fn addresses_are_written_in_halves_in_any_order() {
    let mut rig = Rig::modern();
    rig.state.set_queue_address_half(1, Area::Driver, Half::High, 0x1234_5678);
    rig.state.set_queue_address_half(1, Area::Driver, Half::Low, 0x9abc_def0);
    assert_eq!(rig.state.queue_address(1, Area::Driver), 0x1234_5678_9abc_def0);
    rig.state.set_queue_address_half(1, Area::Driver, Half::High, 0);
    assert_eq!(rig.state.queue_address(1, Area::Driver), 0x9abc_def0);
}

#[test]
fn a_queue_that_cannot_be_asks_for_a_reset_when_it_starts() {
    let beyond = RAM + 3 * EACH;
    let size = |size| move |state: &mut VirtioDevice<_>| state.set_queue_size(0, size);
    let place = |area, address| move |state: &mut VirtioDevice<_>| state.set_queue_address(0, area, address);
    type Mistake = Box<dyn Fn(&mut VirtioDevice<Watched<Arc<FlatMemory>>>)>;
    let mistakes: [Mistake; 9] = [
        Box::new(size(0)),
        Box::new(size(3)),
        Box::new(size(8)),
        Box::new(size(0x1_0000)),
        Box::new(size(0x1_0004)),
        Box::new(place(Area::Descriptors, beyond)),
        Box::new(place(Area::Driver, 0u64.wrapping_sub(2))),
        Box::new(place(Area::Device, beyond - 4)),
        Box::new(place(Area::Descriptors, RAM + 1)),
    ];
    for (number, mistake) in mistakes.iter().enumerate() {
        let mut rig = Rig::negotiated(Features::empty());
        for (area, page) in [(Area::Descriptors, 0), (Area::Driver, 1), (Area::Device, 2)] {
            rig.state.set_queue_address(0, area, RAM + page * 0x1000);
        }
        mistake(&mut rig.state);
        rig.state.enable_queue(0);
        let mut second = rig.enable(1);
        add(&mut second, 1);
        rig.state.set_status(READY);
        assert_eq!(rig.state.status(), READY | Status::DEVICE_NEEDS_RESET, "mistake {number}");
        assert!(rig.state.needs_reset().is_some());
        assert_eq!(rig.book.interrupts(), [Cause::Config], "mistake {number}");
        assert_eq!(rig.book.served(), 0, "mistake {number}: the device is broken as a whole");
    }
}

#[test]
fn a_broken_ring_asks_for_a_reset_once_and_is_left_alone() {
    let (mut rig, _first, mut second) = Rig::running();
    poke(&rig, RAM + 0x1002, 5);
    rig.state.kick(0);
    assert_eq!(rig.state.status(), READY | Status::DEVICE_NEEDS_RESET);
    assert_eq!(rig.state.needs_reset(), Some(QueueError::IndexJump { last: 0, index: 5, size: 4 }));
    assert_eq!(rig.book.interrupts(), [Cause::Config]);
    rig.book.accesses();
    add(&mut second, 1);
    assert!(!rig.state.kick(0) && !rig.state.kick(1) && !rig.state.poll());
    rig.state.set_status(READY);
    assert_eq!((rig.book.accesses(), rig.book.interrupts()), (vec![], vec![]));
    assert_eq!(rig.state.status(), READY | Status::DEVICE_NEEDS_RESET);

    rig.state.set_status(Status::empty());
    assert_eq!((rig.state.status(), rig.state.needs_reset()), (Status::empty(), None));
    rig.state.set_driver_features(Features::VERSION_1);
    let mut driver = rig.enable(0);
    rig.state.set_status(READY);
    add(&mut driver, 3);
    rig.state.kick(0);
    assert_eq!(driver.get_buf(), Ok(Some((3, 0))));
}

#[test]
fn a_device_whose_broken_queue_is_gone_goes_on_if_its_transport_says_so() {
    let (mut rig, _first, mut second) = Rig::running();
    poke(&rig, RAM + 0x1002, 5);
    rig.state.kick(0);
    add(&mut second, 1);
    rig.state.recover();
    assert!(rig.state.needs_reset().is_some(), "it is still there");
    assert!(!rig.state.kick(1));
    rig.state.reset_queue(0);
    assert!(rig.state.needs_reset().is_some(), "a queue's reset alone mends no device (2.1)");
    rig.book.interrupts();
    rig.state.recover();
    assert_eq!((rig.state.status(), rig.state.needs_reset()), (READY, None));
    // Nobody kicks it again.
    assert_eq!(second.get_buf(), Ok(Some((1, 0))));
    let mut first = rig.enable(0);
    add(&mut first, 2);
    rig.state.kick(0);
    assert_eq!(first.get_buf(), Ok(Some((2, 0))));
    assert_eq!(rig.book.interrupts(), [Cause::Queue(1), Cause::Queue(0)]);
}

#[test]
fn what_a_transport_finds_wrong_stops_the_device() {
    let (mut rig, mut first, _second) = Rig::running();
    rig.state.fail(QueueError::HandOver);
    assert_eq!(rig.state.status(), READY | Status::DEVICE_NEEDS_RESET);
    assert_eq!(rig.state.needs_reset(), Some(QueueError::HandOver));
    assert_eq!(rig.book.interrupts(), [Cause::Config]);
    rig.state.fail(QueueError::Overrun { size: 4 });
    assert_eq!(rig.state.needs_reset(), Some(QueueError::HandOver), "the first reason stays");
    add(&mut first, 1);
    assert!(!rig.state.kick(0));
    assert_eq!(rig.book.served(), 0);
}

#[test]
fn a_ring_broken_before_driver_ok_is_found_then() {
    let mut rig = Rig::negotiated(Features::empty());
    rig.enable(0);
    poke(&rig, RAM + 0x1002, 0x8000);
    assert!(!rig.state.kick(0));
    assert_eq!(rig.book.interrupts(), []);
    rig.state.set_status(READY);
    assert!(rig.state.status().contains(Status::DEVICE_NEEDS_RESET));
    assert_eq!(rig.book.interrupts(), [Cause::Config]);
}

#[test]
fn a_memory_that_refuses_is_named_in_the_reason() {
    let mut rig = Rig::negotiated(Features::empty());
    rig.state.enable_queue(0);
    rig.state.set_status(READY);
    let reason = rig.state.needs_reset();
    assert!(matches!(reason, Some(QueueError::Memory(MemoryError::NotMapped { address: 0, .. }))), "{reason:?}");
}

#[test]
fn one_queue_is_reset_while_the_other_runs() {
    let (mut rig, mut first, mut second) = Rig::running();
    add(&mut first, 1);
    rig.state.reset_queue(0);
    assert_eq!(rig.book.called(&Call::ResetQueue(0)), 1);
    assert!(!rig.state.queue_enabled(0));
    assert_eq!((rig.state.queue_size(0), rig.state.queue_address(0, Area::Driver)), (4, 0));
    assert!(!rig.state.kick(0));
    assert_eq!((rig.book.accesses(), rig.book.interrupts()), (vec![], vec![]));

    add(&mut second, 2);
    rig.state.kick(1);
    assert_eq!(second.get_buf(), Ok(Some((2, 0))));
    let touched = |access: &Accessed| (RAM..RAM + EACH).contains(&access.address);
    assert!(!rig.book.accesses().iter().any(touched), "nothing touches the queue that was reset");

    let mut again = rig.enable(0);
    add(&mut again, 3);
    rig.state.kick(0);
    assert_eq!(again.get_buf(), Ok(Some((3, 0))), "from index 0 again");
    assert_eq!(rig.state.status(), READY);
}

#[test]
fn a_queue_enabled_after_driver_ok_runs() {
    let mut rig = Rig::negotiated(Features::empty());
    rig.state.set_status(READY);
    let mut driver = rig.enable(1);
    add(&mut driver, 1);
    rig.state.kick(1);
    assert_eq!(driver.get_buf(), Ok(Some((1, 0))));
    let polls = rig.book.called(&Call::Poll);
    rig.enable(0);
    assert_eq!(rig.book.called(&Call::Poll), polls + 1, "what waited for the queue may go now");
}

/// What shows then: SUSPEND in place of DRIVER_OK.
const SUSPENDED: Status = READY.difference(Status::DRIVER_OK).union(Status::SUSPEND);

fn suspendable() -> (Rig, Driver, Driver) {
    let mut rig = Rig::negotiated(Features::SUSPEND);
    let drivers = (rig.enable(0), rig.enable(1));
    rig.state.set_status(READY);
    rig.book.accesses();
    (rig, drivers.0, drivers.1)
}

#[test]
fn a_suspended_device_touches_nothing_and_goes_on_where_it_was_when_it_is_resumed() {
    let (mut rig, mut driver, _other) = suspendable();
    rig.state.set_status(READY | Status::SUSPEND);
    assert_eq!(rig.state.status(), SUSPENDED);
    rig.book.accesses();
    rig.book.interrupts();
    add(&mut driver, 7);
    rig.book.with(|book| book.news = Some(99));
    assert!(!rig.state.kick(0));
    assert!(!rig.state.poll());
    rig.state.write_config(0, &[9]);
    assert_eq!((rig.book.served(), rig.book.interrupts(), rig.book.accesses()), (0, vec![], vec![]));
    assert_eq!(rig.state.config()[0], 1);
    rig.state.set_status(READY);
    assert_eq!(rig.state.status(), READY);
    assert_eq!(rig.book.served(), 1);
    // What changed meanwhile is told now (N0277).
    assert_eq!(rig.book.interrupts(), [Cause::Config, Cause::Queue(0)]);
    assert_eq!(rig.state.config()[0], 99);
    assert_eq!(driver.get_buf().unwrap(), Some((7, 0)));
}

#[test]
fn suspend_shows_only_when_nothing_is_in_flight_any_more() {
    let (mut rig, mut driver, _other) = suspendable();
    rig.book.with(|book| book.slow = true);
    add(&mut driver, 1);
    rig.state.kick(0);
    assert_eq!(rig.state.queue_in_flight(0), 1);
    rig.state.set_status(READY | Status::SUSPEND);
    assert_eq!(rig.state.status(), READY, "a request is in flight");
    add(&mut driver, 2);
    rig.state.kick(0);
    rig.book.with(|book| book.slow = false);
    rig.state.poll();
    assert_eq!(rig.state.status(), SUSPENDED);
    assert_eq!(driver.get_buf().unwrap(), Some((1, 0)));
    assert_eq!(driver.get_buf().unwrap(), None, "nothing new is taken");
    rig.state.set_status(READY);
    assert_eq!(driver.get_buf().unwrap(), Some((2, 0)));
}

#[test]
fn a_device_that_may_not_access_memory_touches_nothing_and_goes_on_when_it_may() {
    let (mut rig, mut driver, _other) = suspendable();
    rig.book.with(|book| book.slow = true);
    assert!(add(&mut driver, 1));
    rig.state.kick(0);
    assert_eq!(rig.book.served(), 1);
    assert!(!rig.state.allow_memory(false));
    rig.book.with(|book| book.slow = false);
    assert!(add(&mut driver, 2));
    rig.book.accesses();
    rig.state.set_status(READY | Status::SUSPEND);
    assert!(!rig.state.kick(0) && !rig.state.poll());
    assert_eq!((rig.book.accesses(), rig.book.interrupts()), (vec![], vec![]));
    assert_eq!((rig.book.served(), rig.state.status()), (0, READY), "what is in flight is not finished");
    rig.state.allow_memory(true);
    assert!(rig.state.status().contains(Status::SUSPEND));
    assert_eq!(rig.book.interrupts(), [Cause::Queue(0)]);
    assert_eq!((driver.get_buf(), driver.get_buf()), (Ok(Some((1, 0))), Ok(None)), "nothing is taken any more");
    rig.state.set_status(READY);
    assert_eq!(driver.get_buf(), Ok(Some((2, 0))));
}

#[test]
fn suspend_is_nothing_without_the_feature_or_before_driver_ok() {
    let (mut rig, mut driver, _other) = Rig::running();
    rig.state.set_status(READY | Status::SUSPEND);
    assert_eq!(rig.state.status(), READY);
    add(&mut driver, 1);
    rig.state.kick(0);
    assert_eq!(rig.book.served(), 1);

    let mut rig = Rig::negotiated(Features::SUSPEND);
    let status = rig.state.status();
    rig.state.set_status(status | Status::SUSPEND);
    assert_eq!(rig.state.status(), status);
}

#[test]
fn a_suspended_device_can_be_reset_and_a_queue_enabled_meanwhile_runs_when_it_is_resumed() {
    let mut rig = Rig::negotiated(Features::SUSPEND);
    let _first = rig.enable(0);
    rig.state.set_status(READY);
    rig.state.set_status(READY | Status::SUSPEND);
    let mut second = rig.enable(1);
    add(&mut second, 5);
    assert_eq!(rig.book.served(), 0);
    rig.state.set_status(READY);
    assert_eq!(rig.book.served(), 1);
    rig.state.set_status(READY | Status::SUSPEND);
    rig.state.set_status(Status::empty());
    assert_eq!(rig.state.status(), Status::empty());
}

#[test]
fn a_notification_names_its_queue_as_was_negotiated() {
    let named = |features, value| Rig::negotiated(features).state.notified_queue(value);
    let (data, own) = (Features::NOTIFICATION_DATA, Features::NOTIF_CONFIG_DATA);
    assert_eq!(named(Features::empty(), 2), Some(2));
    assert_eq!(named(Features::empty(), 3), None, "there are three queues");
    assert_eq!(named(Features::empty(), 0x8001_0001), None);
    assert_eq!(named(data, 0x8001_0001), Some(1));
    let of = VirtioDevice::<Watched<Arc<FlatMemory>>>::queue_notification_data;
    assert_eq!(named(own, of(2).into()), Some(2));
    assert_eq!(named(own, 2), None);
    assert_eq!(named(data | own, 0x1234 << 16 | u32::from(of(1))), Some(1));
}

#[test]
fn queues_that_do_not_exist_read_zero_and_take_nothing() {
    let mut rig = Rig::negotiated(Features::empty());
    assert_eq!(rig.state.queue_count(), 3);
    for index in [3, 0x7fff, u16::MAX] {
        rig.state.set_queue_size(index, 4);
        rig.state.set_queue_address(index, Area::Driver, RAM);
        rig.state.enable_queue(index);
        rig.state.reset_queue(index);
        assert_eq!((rig.state.queue_max_size(index), rig.state.queue_size(index)), (0, 0));
        assert_eq!((rig.state.queue_address(index, Area::Driver), rig.state.queue_enabled(index)), (0, false));
    }
    rig.state.set_status(READY);
    assert!(!rig.state.kick(3) && !rig.state.kick(u16::MAX));
    assert_eq!(rig.state.status(), READY);
    assert!(rig.book.with(|book| !book.calls.iter().any(|call| matches!(call, Call::ResetQueue(_) | Call::Kick(_)))));
}

#[test]
fn configuration_reads_at_any_offset_and_length_and_is_zero_beyond_its_end() {
    let mut rig = Rig::modern();
    let config = [1, 2, 3, 4, 5, 6];
    for len in 0..10 {
        for offset in (0..10).chain([u64::from(u32::MAX), u64::MAX - 1, u64::MAX]) {
            let mut data = vec![0xaa; len];
            rig.state.read_config(offset, &mut data);
            let at = |n: usize| usize::try_from(offset).ok()?.checked_add(n).and_then(|at| config.get(at)).copied();
            let expected: Vec<_> = (0..len).map(|n| at(n).unwrap_or(0)).collect();
            assert_eq!(data, expected, "{len} bytes at {offset}");
        }
    }
}

#[test]
fn configuration_writes_are_taken_inside_it_only() {
    let mut rig = Rig::modern();
    rig.state.write_config(1, &[9, 8]);
    rig.state.write_config(5, &[7]);
    for (offset, len) in [(5, 2), (6, 1), (0, 7), (0, 0), (6, 0), (u64::MAX, 1), (u64::MAX, 0), (1 << 32, 1)] {
        rig.state.write_config(offset, &vec![0; len]);
    }
    let expected = [Call::WriteConfig(1, vec![9, 8]), Call::WriteConfig(5, vec![7])];
    assert_eq!(rig.book.with(|book| mem::take(&mut book.calls)), expected);
    assert_eq!(rig.state.config(), [1, 9, 8, 4, 5, 6]);
}

#[test]
fn whoever_reads_the_configuration_reads_what_it_is_by_now() {
    let mut rig = Rig::negotiated(Features::empty());
    let mut first = [0];
    rig.book.with(|book| book.unseen = Some(7));
    let mut last = rig.state.config_generation();
    rig.state.read_config(0, &mut first);
    assert_eq!(first, [7]);
    assert_ne!(rig.state.config_generation(), last);
    assert_eq!(rig.book.interrupts(), [], "nobody drives it yet");

    // What is not read before DRIVER_OK is told then.
    rig.book.with(|book| book.unseen = Some(8));
    last = rig.state.config_generation();
    rig.state.set_status(READY);
    assert_eq!((rig.state.config()[0], rig.book.interrupts()), (8, vec![Cause::Config]));
    assert_ne!(rig.state.config_generation(), last);

    rig.book.with(|book| book.unseen = Some(9));
    rig.state.read_config(0, &mut first);
    assert_eq!((first, rig.book.interrupts()), ([9], vec![Cause::Config]));
    rig.state.read_config(0, &mut first);
    assert_eq!((first, rig.book.interrupts()), ([9], vec![]));
}

#[test]
fn a_device_hears_which_features_are_settled_once_they_are() {
    let begun = Status::ACKNOWLEDGE | Status::DRIVER;
    let mut rig = Rig::modern();
    rig.state.set_status(begun);
    rig.state.set_driver_features(Features::EVENT_IDX);
    rig.state.set_status(begun | Status::FEATURES_OK);
    assert_eq!(rig.book.with(|book| mem::take(&mut book.settled)), [], "VERSION_1 is missing");
    rig.state.set_driver_features(Features::VERSION_1);
    rig.state.set_status(begun | Status::FEATURES_OK);
    rig.state.set_status(READY);
    assert_eq!(rig.book.with(|book| mem::take(&mut book.settled)), [Features::VERSION_1]);
}

#[test]
fn the_generation_changes_when_the_configuration_does() {
    let (mut rig, ..) = Rig::running();
    let mut last = rig.state.config_generation();
    rig.book.with(|book| book.news = Some(77));
    rig.state.poll();
    assert_ne!(rig.state.config_generation(), last, "the device changed it");
    assert_eq!(rig.book.interrupts(), [Cause::Config]);

    last = rig.state.config_generation();
    rig.state.poll();
    rig.state.kick(0);
    rig.state.write_config(5, &[0]);
    rig.state.write_config(0, &[77]);
    assert_eq!(rig.state.config_generation(), last, "nothing changed");

    rig.state.write_config(0, &[78]);
    assert_ne!(rig.state.config_generation(), last, "the driver changed it");
    assert_eq!(rig.book.interrupts(), [], "and knows");
}

#[test]
fn news_from_before_driver_ok_is_told_at_driver_ok() {
    let mut rig = Rig::negotiated(Features::empty());
    rig.book.with(|book| book.news = Some(77));
    assert!(!rig.state.poll());
    assert_eq!((rig.state.config()[0], rig.book.interrupts()), (1, vec![]));
    rig.state.set_status(READY);
    assert_eq!((rig.state.config()[0], rig.book.interrupts()), (77, vec![Cause::Config]));
}

#[test]
fn the_legacy_interface_has_no_features_ok_and_settles_features_with_driver_ok() {
    for order in [ByteOrder::Little, ByteOrder::Big] {
        let mut rig = Rig::new(Interface::Legacy(order));
        assert!(!rig.state.device_features().contains(Features::VERSION_1));
        rig.state.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK);
        assert_eq!(rig.state.status(), Status::ACKNOWLEDGE | Status::DRIVER);
        rig.state.set_driver_features(DEVICE_FEATURE | Features::bit(4));
        let mut driver = rig.enable(0);
        add(&mut driver, 5);
        rig.state.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::DRIVER_OK);
        assert_eq!(driver.get_buf(), Ok(Some((5, 0))), "{order:?}");
        rig.state.set_driver_features(Features::empty());
        assert_eq!(rig.state.driver_features(), DEVICE_FEATURE, "only what was offered, and settled");
        assert_eq!(rig.book.called(&Call::Activate(DEVICE_FEATURE)), 1);
    }
}

#[test]
fn a_device_that_only_reads_writes_to_used_rings_alone() {
    let (mut rig, mut driver, _second) = Rig::running();
    add(&mut driver, 1);
    rig.state.kick(0);
    let mut written = rig.book.accesses();
    written.retain(|access| access.direction == Access::WRITE);
    let used_ring = |access: &Accessed| (access.address - RAM) % EACH / 0x1000 == 2;
    assert!(!written.is_empty() && written.iter().all(used_ring), "{written:x?}");
}
