//! A back end that makes what it shares wait for ever: the driver is not held up.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::write;
use polyvirt_core::hypervisor::{HypervisorError, Share};
use polyvirt_core::memory::{Access, Pages};
use polyvirt_core::transport::{BlockingTransport, Interrupts, Notify, QueueSet, Transport, TransportError};
use polyvirt_core::{Features, Status};
use polyvirt_transports::vhost_user::messages::*;
use polyvirt_transports::vhost_user::{Connection, Driver, Guest, Options, memory_file};

use crate::front::{RAM, RAM_AT, WATCHDOG};

/// Memory that is handed out from its start on.
struct Memory(Pages, Mutex<usize>);

impl Share for Memory {
    fn allocate(&self, len: usize) -> Result<Pages, HypervisorError> {
        let mut next = self.1.lock().unwrap();
        let start = *next;
        *next += len.next_multiple_of(4096);
        Ok(self.0.slice(start, len.next_multiple_of(4096)).unwrap())
    }

    fn share(&self, pages: &Pages, _access: Access) -> Result<u64, HypervisorError> {
        Ok(RAM_AT + (pages.as_ptr().addr() - self.0.as_ptr().addr()) as u64)
    }

    fn unshare(&self, _address: u64) -> Result<(), HypervisorError> {
        Ok(())
    }
}

/// A driver of a back end that takes what it is told, keeps its descriptors for kick and call, and does nothing.
fn driver() -> (Driver, Receiver<(Request, OwnedFd)>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (keep, kept) = channel();
    std::thread::spawn(move || {
        let mut connection = Connection::new(theirs).unwrap();
        while let Ok(mut message) = connection.wait(WATCHDOG) {
            let answer = match Request::from_code(message.header.request) {
                Some(Request::GetFeatures) => (Features::VERSION_1.bits() as u64).to_bytes(),
                Some(Request::GetVringBase) => VringState { index: 0, num: 0 }.to_bytes(),
                Some(request @ (Request::SetVringKick | Request::SetVringCall)) => {
                    let _ = keep.send((request, message.fds.remove(0)));
                    continue;
                }
                _ => continue,
            };
            if connection.send(message.header.request, REPLY, &answer, &[]).is_err() {
                return;
            }
        }
    });
    let (file, pages) = memory_file("ram", RAM).unwrap();
    let share = Arc::new(Memory(pages.clone(), Mutex::new(0)));
    let guest = Guest { share, regions: vec![(RAM_AT, file, pages)] };
    let once = Mutex::new(Some(ours));
    let dial = Box::new(move || once.lock().unwrap().take().ok_or_else(|| std::io::ErrorKind::NotConnected.into()));
    let mut driver = Driver::connect(dial, 42, guest, Options { queues: 2, ..Options::default() }).unwrap();
    driver.set_driver_features(Features::VERSION_1).unwrap();
    driver.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK).unwrap();
    (driver, kept)
}

#[test]
fn a_kick_that_is_full_and_a_call_that_is_empty_hold_no_driver_up() {
    let (mut driver, kept) = driver();
    let mut queue = driver.find_vq(0, Some(8)).unwrap();
    let status = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::DRIVER_OK;
    driver.set_status(status).unwrap();
    for _ in 0..2 {
        let (request, event) = kept.recv_timeout(WATCHDOG).unwrap();
        if request == Request::SetVringKick {
            write(&event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        }
        fcntl(&event, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    }
    queue.notify.notify().unwrap();
    let waited = driver.wait(Duration::ZERO);
    assert!(matches!(waited, Err(TransportError::Watchdog(..))), "{waited:?}");
}

#[test]
fn a_call_names_its_queue() {
    let (mut driver, kept) = driver();
    let _queues = [0, 1].map(|index| driver.find_vq(index, Some(8)).unwrap());
    let status = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::DRIVER_OK;
    driver.set_status(status).unwrap();
    let mut calls = (0..4).map(|_| kept.recv_timeout(WATCHDOG).unwrap());
    let calls = [(); 2].map(|()| calls.find(|(request, _)| *request == Request::SetVringCall).unwrap().1);
    assert_eq!(driver.take_interrupts(), Ok(Interrupts::default()));
    for (called, queues) in
        [(&[1][..], QueueSet::of(1)), (&[0], QueueSet::of(0)), (&[0, 1, 1], QueueSet::of(0) | QueueSet::of(1))]
    {
        for &index in called {
            write(&calls[index], &1u64.to_ne_bytes()).unwrap();
        }
        assert_eq!(driver.take_interrupts(), Ok(Interrupts { queues, config: false }));
        assert_eq!(driver.take_interrupts(), Ok(Interrupts::default()), "taken once");
    }
}
