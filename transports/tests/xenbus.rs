//! virtio over xenstore: how the two sides open, close and reopen their connection, whatever either of them missed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Wake, Waker};
use std::time::Duration;

use polyvirt_core::device::{self, Queues};
use polyvirt_core::hypervisor::{
    BusDevice, Cause, Guest, Host, HypervisorError, Interrupt, Share, WaitForInterrupt, WakeOnInterrupt,
};
use polyvirt_core::memory::{Access, FlatMemory, GuestMemory, Pages};
use polyvirt_core::transport::{BlockingTransport, Interrupts, QueueSet, Transport, TransportError, WakingTransport};
use polyvirt_core::{Features, Status};
use polyvirt_transports::xenbus::{self, Backend, Channel, Domain, Driver, GuestPlace, HostPlace, Ports, State, Store};

const BACKEND: &str = "/backend";
const FRONTEND: &str = "/frontend";

/// xenstore.
#[derive(Default)]
struct Tree {
    nodes: Mutex<BTreeMap<String, String>>,
    watches: Mutex<Vec<(String, Waker)>>,
    /// What the backend's state has been.
    states: Mutex<Vec<State>>,
}

impl Tree {
    fn changed(&self, path: &str) {
        let watches: Vec<_> = self.watches.lock().unwrap().iter().filter(|(at, _)| at == path).cloned().collect();
        watches.iter().for_each(|(_, waker)| waker.wake_by_ref());
    }

    fn frontend(&self, state: u8) {
        self.write(&format!("{FRONTEND}/state"), &state.to_string()).unwrap();
    }

    fn backend(&self) -> State {
        self.read(&format!("{BACKEND}/state")).unwrap().map_or(State::Unknown, |state| State::parse(&state))
    }

    fn take_states(&self) -> Vec<State> {
        std::mem::take(&mut self.states.lock().unwrap())
    }
}

impl Store for Tree {
    fn read(&self, path: &str) -> Result<Option<String>, HypervisorError> {
        Ok(self.nodes.lock().unwrap().get(path).cloned())
    }
    fn write(&self, path: &str, value: &str) -> Result<(), HypervisorError> {
        self.nodes.lock().unwrap().insert(path.into(), value.into());
        if path == format!("{BACKEND}/state") {
            self.states.lock().unwrap().push(State::parse(value));
        }
        self.changed(path);
        Ok(())
    }
    fn remove(&self, path: &str) -> Result<(), HypervisorError> {
        self.nodes.lock().unwrap().remove(path);
        self.changed(path);
        Ok(())
    }
    fn list(&self, _path: &str) -> Result<Vec<String>, HypervisorError> {
        Ok(Vec::new())
    }
    fn watch(&self, path: &str, waker: Waker) -> Result<(), HypervisorError> {
        waker.wake_by_ref();
        self.watches.lock().unwrap().push((path.into(), waker));
        Ok(())
    }
}

/// A device with one queue. It says how often it was reset.
struct Toy(Arc<AtomicU64>);

impl<M: GuestMemory> device::Device<M> for Toy {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> Features {
        Features::empty()
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[4]
    }
    fn config(&self) -> &[u8] {
        &[]
    }
    fn activate(&mut self, _: Features, _: Waker) {}
    fn kick(&mut self, _: u16, _: &mut Queues<'_, M>) {}
    fn reset_queue(&mut self, _: u16) {}
    fn reset(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

struct NoPorts;

impl Ports for NoPorts {
    fn bind(&self, _: u16, _: u32) -> Result<(), HypervisorError> {
        Ok(())
    }
    fn close(&self, _: u16) {}
}

struct NoInterrupt;

impl Interrupt for NoInterrupt {
    fn raise(&self, _: Cause) {}
}

/// The device's side: it takes its turns when it is told to.
struct Served {
    tree: Arc<Tree>,
    device: Mutex<Option<Box<dyn BusDevice>>>,
    resets: Arc<AtomicU64>,
}

impl Served {
    fn poll(&self) {
        self.device.lock().unwrap().as_mut().unwrap().poll();
    }
}

struct Hosting(Arc<Served>);

impl Host for Hosting {
    type Memory = Arc<FlatMemory>;
    type Place = HostPlace;

    fn memory(&self) -> Self::Memory {
        Arc::new(FlatMemory::new([(0x1000, Pages::allocate(0x1000))]))
    }
    fn place(&mut self, _: u32, _: u16) -> Result<HostPlace, HypervisorError> {
        let (store, ports) = (self.0.tree.clone(), Arc::new(NoPorts));
        Ok(HostPlace { backend: BACKEND.into(), frontend: FRONTEND.into(), store, ports })
    }
    fn interrupt(&self, _: &HostPlace) -> Arc<dyn Interrupt> {
        Arc::new(NoInterrupt)
    }
    fn plug(&mut self, _: HostPlace, mut device: Box<dyn BusDevice>) -> Result<(), HypervisorError> {
        device.set_waker(Waker::noop().clone());
        *self.0.device.lock().unwrap() = Some(device);
        Ok(())
    }
}

fn serve() -> (Arc<Served>, Backend) {
    let served = Arc::new(Served { tree: Arc::default(), device: Mutex::default(), resets: Arc::default() });
    let mut host = Hosting(served.clone());
    let memory = host.memory();
    let backend = xenbus::attach(&mut host, memory, Box::new(Toy(served.resets.clone()))).unwrap();
    served.poll();
    served.tree.take_states();
    (served, backend)
}

/// The driver's domain. The device takes a turn whenever the driver looks for news, and only then, so that no time passes.
struct Booted {
    served: Arc<Served>,
    lines: Mutex<Vec<String>>,
    pending: Arc<AtomicU64>,
    /// What somebody else writes to the frontend's state before the turns to come.
    meanwhile: Mutex<Vec<u8>>,
}

struct Line(Arc<AtomicU64>, u32);

impl Wake for Line {
    fn wake(self: Arc<Self>) {
        self.0.fetch_or(1 << self.1, Ordering::SeqCst);
    }
}

impl Booted {
    fn new(served: &Arc<Served>) -> Arc<Self> {
        let (lines, pending, meanwhile) = Default::default();
        Arc::new(Self { served: served.clone(), lines, pending, meanwhile })
    }

    /// The other side does something.
    fn turn(&self) {
        if let Some(state) = self.meanwhile.lock().unwrap().pop() {
            self.served.tree.frontend(state);
        }
        self.served.poll();
    }

    fn connect(self: &Arc<Self>) -> Result<Driver<Self>, TransportError> {
        let place = self.enumerate().unwrap().remove(0);
        Driver::connect(self.clone(), place)
    }
}

impl Share for Booted {
    fn allocate(&self, _: usize) -> Result<Pages, HypervisorError> {
        Err(HypervisorError::Exhausted("memory"))
    }
    fn share(&self, _: &Pages, _: Access) -> Result<u64, HypervisorError> {
        Err(HypervisorError::Exhausted("memory"))
    }
    fn unshare(&self, _: u64) -> Result<(), HypervisorError> {
        Ok(())
    }
}

impl Guest for Booted {
    type Place = GuestPlace;

    fn notify(&self, _: u64, _: u32) -> Result<(), HypervisorError> {
        Ok(())
    }
    fn take(&self, line: u32) -> Result<bool, HypervisorError> {
        self.turn();
        Ok(self.pending.fetch_and(!(1 << line), Ordering::SeqCst) & 1 << line != 0)
    }
    fn enumerate(&self) -> Result<Vec<GuestPlace>, HypervisorError> {
        Ok(vec![GuestPlace { frontend: FRONTEND.into(), backend: BACKEND.into() }])
    }
}

impl WaitForInterrupt for Booted {
    fn wait(&self, lines: &[u32], _: Duration) -> Result<bool, HypervisorError> {
        self.turn();
        Ok(lines.iter().any(|line| self.pending.load(Ordering::SeqCst) & 1 << line != 0))
    }
}

impl WakeOnInterrupt for Booted {
    fn wake_on(&self, lines: &[u32], waker: &Waker) -> Result<(), HypervisorError> {
        if self.wait(lines, Duration::ZERO)? {
            waker.wake_by_ref();
        }
        Ok(())
    }
}

impl Domain for Booted {
    fn store(&self) -> &dyn Store {
        &*self.served.tree
    }
    fn open_channel(&self) -> Result<Channel, HypervisorError> {
        Err(HypervisorError::Exhausted("channels"))
    }
    fn close_channel(&self, _: Channel) -> Result<(), HypervisorError> {
        Ok(())
    }
    fn watch(&self, path: &str) -> Result<u32, HypervisorError> {
        let mut lines = self.lines.lock().unwrap();
        let line = lines.iter().position(|known| known == path).unwrap_or(lines.len());
        if line == lines.len() {
            lines.push(path.into());
        }
        let waker = Waker::from(Arc::new(Line(self.pending.clone(), line as u32)));
        self.served.tree.watch(path, waker).unwrap();
        Ok(line as u32)
    }
}

/// A driver is served from here on, through the state that it resets and all that it asks.
fn use_device(driver: &mut Driver<Booted>) {
    assert_eq!(driver.device_type(), 42);
    driver.reset().unwrap();
    for status in [Status::ACKNOWLEDGE, Status::ACKNOWLEDGE | Status::DRIVER] {
        driver.set_status(status).unwrap();
    }
    driver.set_driver_features(Features::VERSION_1).unwrap();
    let accepted = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK;
    driver.set_status(accepted).unwrap();
    assert_eq!(driver.status(), Ok(accepted));
}

/// All ways in which the other side can see `writes`: for each, whether it looks after it.
fn looks(writes: usize) -> impl Iterator<Item = Vec<bool>> {
    (0..1u32 << writes).map(move |mask| (0..writes).map(|at| mask & 1 << at != 0).collect())
}

#[test]
fn a_frontend_that_begins_anew_finds_the_backend_waiting_whatever_of_its_way_was_seen() {
    for from in [vec![], vec![4], vec![4, 5], vec![4, 6], vec![6]] {
        for way in [vec![1], vec![5, 1], vec![6, 1], vec![5, 6, 1], vec![5, 6, 1, 5, 6, 1], vec![0, 1], vec![9, 1]] {
            for seen in looks(way.len()) {
                let (served, _backend) = serve();
                for state in &from {
                    served.tree.frontend(*state);
                    served.poll();
                }
                let connected = served.tree.backend() == State::Connected;
                let resets = served.resets.load(Ordering::SeqCst);
                served.tree.take_states();
                for (state, seen) in way.iter().zip(&seen) {
                    served.tree.frontend(*state);
                    if *seen {
                        served.poll();
                    }
                }
                served.poll();
                let (now, passed) = (served.tree.backend(), served.tree.take_states());
                assert_eq!(now, State::InitWait, "{from:?}, then {way:?} of which {seen:?}");
                if connected {
                    assert!(passed.contains(&State::Closed), "{passed:?} after {way:?} of which {seen:?}");
                    assert!(served.resets.load(Ordering::SeqCst) > resets, "the guest's memory was let go of");
                }
                served.tree.frontend(4);
                served.poll();
                assert_eq!(served.tree.backend(), State::Connected);
            }
        }
    }
}

#[test]
fn a_frontend_whose_directory_goes_is_let_go_of() {
    let (served, _backend) = serve();
    served.tree.frontend(4);
    served.poll();
    let resets = served.resets.load(Ordering::SeqCst);
    served.tree.remove(&format!("{FRONTEND}/state")).unwrap();
    served.poll();
    assert_eq!(served.tree.backend(), State::Closed);
    assert!(served.resets.load(Ordering::SeqCst) > resets);
}

#[test]
fn a_backend_that_closes_while_nobody_is_connected_waits_again() {
    for frontend in [None, Some(1), Some(6)] {
        let (served, backend) = serve();
        frontend.into_iter().for_each(|state| served.tree.frontend(state));
        served.poll();
        backend.close();
        served.poll();
        assert_ne!(served.tree.backend(), State::Closing, "{frontend:?}");
        use_device(&mut Booted::new(&served).connect().unwrap());
    }
}

#[test]
fn a_driver_connects_wherever_its_predecessor_left_the_two_sides() {
    for predecessor in [vec![], vec![4], vec![5], vec![6], vec![4, 5], vec![4, 6], vec![4, 5, 6], vec![4, 5, 6, 1]] {
        for seen in looks(predecessor.len()) {
            for closes in [false, true] {
                let (served, backend) = serve();
                for (state, seen) in predecessor.iter().zip(&seen) {
                    served.tree.frontend(*state);
                    if *seen {
                        served.poll();
                    }
                }
                if closes {
                    backend.close();
                    served.poll();
                }
                let connected = Booted::new(&served).connect();
                let mut driver = connected.unwrap_or_else(|error| {
                    panic!("{error} after {predecessor:?} of which {seen:?}, backend closed: {closes}")
                });
                use_device(&mut driver);
            }
        }
    }
}

#[test]
fn a_driver_is_not_led_astray_by_what_its_predecessor_still_writes() {
    for meanwhile in [vec![1, 6, 5], vec![6, 5], vec![5], vec![6]] {
        let (served, _backend) = serve();
        served.tree.frontend(4);
        served.poll();
        served.tree.frontend(5);
        let guest = Booted::new(&served);
        *guest.meanwhile.lock().unwrap() = meanwhile;
        use_device(&mut guest.connect().unwrap());
    }
}

#[test]
fn a_reset_opens_the_connection_again_if_the_backend_closes_it_at_any_moment() {
    let (served, backend) = serve();
    let mut driver = Booted::new(&served).connect().unwrap();
    use_device(&mut driver);
    for polls in 0..2 {
        backend.close();
        (0..polls).for_each(|_| served.poll());
        driver.reset().unwrap();
        use_device(&mut driver);
    }
    served.tree.remove(&format!("{BACKEND}/state")).unwrap();
    assert_eq!(driver.reset(), Err(TransportError::Closed), "there is nobody who could come back");
}

/// Counts how often it is woken.
struct Count(AtomicU64);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn a_task_is_woken_by_what_the_driver_is_told_of_and_once_for_each() {
    let (served, backend) = serve();
    let mut driver = Booted::new(&served).connect().unwrap();
    use_device(&mut driver);
    let count = Arc::new(Count(AtomicU64::new(0)));
    let waker = Waker::from(count.clone());
    assert_eq!(driver.take_interrupts(), Ok(Interrupts::default()));
    driver.wake_on_interrupt(&waker).unwrap();
    assert_eq!(count.0.load(Ordering::SeqCst), 0, "nothing came");
    backend.close();
    driver.wake_on_interrupt(&waker).unwrap();
    assert_eq!(count.0.load(Ordering::SeqCst), 1);
    // The driver has seen it on its own account, which does not take it from who waits.
    assert!(driver.status().unwrap().contains(Status::DEVICE_NEEDS_RESET));
    driver.wake_on_interrupt(&waker).unwrap();
    assert_eq!(count.0.load(Ordering::SeqCst), 2);
    assert_eq!(driver.take_interrupts(), Ok(Interrupts { queues: QueueSet::NONE, config: true }));
    driver.wake_on_interrupt(&waker).unwrap();
    assert_eq!(count.0.load(Ordering::SeqCst), 2, "told once");
}
