//! Section 8.1 of the paper calls Xen the hardest of all because its connections can be closed and opened again. Here
//! they are, with requests in flight, and none is lost.

use std::collections::BTreeSet;
use std::sync::Arc;

use polyvirt_core::Status;
use polyvirt_core::hypervisor::{Guest, Host};
use polyvirt_core::transport::{BlockingTransport as _, Transport as _};
use polyvirt_devices::blk::{self, wire};
use polyvirt_devices::rng;
use polyvirt_hypervisors::xen;
use polyvirt_transports::xenbus;

/// A disk of 64 sectors on the Xen model: the machine, the backend's handle, the disk and its driver.
fn disk() -> Option<(xen::Host, xenbus::Backend, blk::MemoryHandle, blk::Driver<xenbus::Driver<xen::Guest>>)> {
    let (mut host, guest) = match xen::start(16 << 20) {
        Ok(halves) => halves,
        Err(reason) => {
            println!("skipped: {reason}");
            return None;
        }
    };
    let backend = blk::MemoryBackend::new(vec![0; 64 * 512]);
    let disk = backend.handle();
    let memory = host.memory();
    let device = Box::new(blk::Device::new(backend, blk::Options::default()));
    let connection = xenbus::attach(&mut host, memory, device).unwrap();
    let guest = Arc::new(guest);
    let place = guest.enumerate().unwrap().remove(0);
    let transport = xenbus::Driver::connect(guest, place).unwrap();
    Some((host, connection, disk, blk::Driver::new(transport).unwrap()))
}

#[test]
fn a_backend_that_goes_and_comes_back_loses_no_request() {
    let Some((_host, connection, disk, mut driver)) = disk() else { return };
    for round in 1..=5u8 {
        let mut waiting = BTreeSet::new();
        for sector in 0..6 {
            if sector == 3 {
                connection.close();
            }
            let write = blk::Operation::Write { sector, data: &[round; 512] };
            waiting.insert(driver.submit(write).unwrap().expect("room for six requests"));
        }
        while !driver.transport().status().unwrap().contains(Status::DEVICE_NEEDS_RESET) {
            driver.transport().wait(std::time::Duration::from_secs(10)).unwrap();
        }
        driver.recover().unwrap();
        while !waiting.is_empty() {
            let answer = driver.wait().unwrap();
            assert_eq!(answer.status, wire::OK);
            assert!(waiting.remove(&answer.id), "answered twice: {:?}", answer.id);
        }
        let bytes = disk.bytes();
        assert!((0..6).all(|sector| bytes[sector * 512..][..512] == [round; 512]), "round {round}");
    }
}

#[test]
fn a_frontend_that_goes_leaves_the_device_to_the_next() {
    let (mut host, guest) = match xen::start(16 << 20) {
        Ok(halves) => halves,
        Err(reason) => return println!("skipped: {reason}"),
    };
    let memory = host.memory();
    xenbus::attach(&mut host, memory, Box::new(rng::Device::new(rng::HostEntropy))).unwrap();
    let guest = Arc::new(guest);
    for _ in 0..5 {
        let place = guest.enumerate().unwrap().remove(0);
        let transport = xenbus::Driver::connect(guest.clone(), place).unwrap();
        let mut driver = rng::Driver::new(Box::new(transport)).unwrap();
        let mut bytes = [0; 64];
        driver.fill(&mut bytes).unwrap();
        assert_ne!(bytes, [0; 64]);
    }
}
