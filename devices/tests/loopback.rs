//! Each device with its driver, over mmio, on the loopback.

use std::io::{Seek, Write};
use std::sync::{Arc, Mutex};

use polyvirt_core::device::Device;
use polyvirt_core::hypervisor::{Guest as _, Host as _};
use polyvirt_core::memory::FlatMemory;
use polyvirt_core::transport::BlockingTransport;
use polyvirt_devices::blk::{self, MemoryBackend, wire};
use polyvirt_devices::{DriverError, console, rng};
use polyvirt_hypervisors::loopback;
use polyvirt_transports::mmio;

type Memory = Arc<FlatMemory>;

/// The driver's end of `device`, and what has to live as long.
fn plug(device: Box<dyn Device<Memory>>) -> (loopback::Host, Box<dyn BlockingTransport>) {
    let (mut host, guest) = loopback::start(16 << 20).unwrap();
    let memory = host.memory();
    mmio::attach(&mut host, memory, device).unwrap();
    let guest = Arc::new(guest);
    let place = guest.enumerate().unwrap()[0];
    (host, Box::new(mmio::Driver::connect(guest, place).unwrap()))
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

fn disk(sectors: usize, options: blk::Options) -> (loopback::Host, blk::Driver, blk::MemoryHandle) {
    let backend = MemoryBackend::new(pattern(sectors * 512));
    let handle = backend.handle();
    let (host, transport) = plug(Box::new(blk::Device::new(backend, options)));
    (host, blk::Driver::new(transport).unwrap(), handle)
}

#[test]
fn a_disk_is_read_written_and_flushed() {
    let (_host, mut driver, disk) = disk(4096, blk::Options::default());
    assert_eq!(driver.geometry().capacity, 4096);
    let mut bytes = vec![0; 4096 * 512];
    driver.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, disk.bytes());
    driver.write(7, &[0xa5; 3 * 512]).unwrap();
    driver.flush().unwrap();
    bytes[7 * 512..10 * 512].fill(0xa5);
    assert!(disk.bytes() == bytes && disk.flushes() == 1);
    assert_eq!(&driver.get_id().unwrap()[..9], b"polyvirt\0");
}

#[test]
fn the_last_sector_is_there_and_the_one_behind_it_is_not() {
    let (_host, mut driver, disk) = disk(8, blk::Options::default());
    let before = disk.bytes();
    let mut sector = [0; 512];
    driver.read(7, &mut sector).unwrap();
    assert_eq!(sector, before[7 * 512..]);
    for (sector, len) in [(8, 512), (7, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (1 << 55, 512), (0, 100)] {
        assert_eq!(driver.read(sector, &mut vec![0; len]), Err(DriverError::Status("IOERR")), "{sector} {len}");
        assert_eq!(driver.write(sector, &vec![1; len]), Err(DriverError::Status("IOERR")), "{sector} {len}");
    }
    assert_eq!(disk.bytes(), before);
}

#[test]
fn sectors_are_discarded_and_zeroed_only_inside_the_disk() {
    let (_host, mut driver, disk) = disk(64, blk::Options::default());
    driver.write_zeroes(4, 8, true).unwrap();
    driver.discard(20, 1).unwrap();
    let bytes = disk.bytes();
    assert!(bytes[4 * 512..12 * 512].iter().all(|byte| *byte == 0));
    assert_eq!(bytes[..4 * 512], pattern(4 * 512));
    assert_eq!(driver.write_zeroes(60, 5, false), Err(DriverError::Status("IOERR")));
    assert_eq!(driver.discard(u64::MAX, 1), Err(DriverError::Status("IOERR")));
    assert_eq!(disk.bytes(), bytes);
}

#[test]
fn more_sectors_than_a_segment_may_have_are_zeroed_and_discarded_in_several() {
    const SECTORS: u32 = (1 << 16) + 3;
    let (_host, mut driver, disk) = disk(SECTORS as usize + 1, blk::Options::default());
    driver.write_zeroes(1, SECTORS, false).unwrap();
    let bytes = disk.bytes();
    assert!(bytes[512..].iter().all(|&byte| byte == 0));
    assert_eq!(bytes[..512], pattern(512));
    driver.discard(0, SECTORS).unwrap();
}

#[test]
fn a_read_only_disk_refuses_writes_and_says_so_before() {
    let (_host, mut driver, disk) = disk(8, blk::Options { read_only: true, ..Default::default() });
    assert!(driver.geometry().read_only && driver.features().contains(wire::RO));
    assert_eq!(driver.write(0, &[1; 512]), Err(DriverError::Status("IOERR")));
    assert!(matches!(driver.discard(0, 1), Err(DriverError::Unsupported(_))));
    assert_eq!(disk.bytes(), pattern(8 * 512));
}

#[test]
fn a_failing_backend_gives_ioerr_and_the_next_request_works() {
    let (_host, mut driver, disk) = disk(8, blk::Options::default());
    disk.fail(1);
    assert_eq!(driver.read(0, &mut [0; 512]), Err(DriverError::Status("IOERR")));
    driver.read(0, &mut [0; 512]).unwrap();
}

#[test]
fn a_new_capacity_is_told_and_counts() {
    let (_host, mut driver, disk) = disk(8, blk::Options::default());
    disk.resize(16);
    while driver.refresh().unwrap().capacity != 16 {
        driver.transport().wait(std::time::Duration::from_secs(10)).unwrap();
    }
    driver.write(15, &[9; 512]).unwrap();
    assert_eq!(disk.bytes()[15 * 512..], [9; 512]);
}

#[test]
fn a_recovered_driver_loses_no_request() {
    let (_host, mut driver, disk) = disk(64, blk::Options::default());
    let mut waiting = Vec::new();
    for sector in 0..4u64 {
        let data = [sector as u8 + 1; 512];
        waiting.push(driver.submit(blk::Operation::Write { sector, data: &data }).unwrap().unwrap());
    }
    driver.recover().unwrap();
    for _ in 0..4 {
        let answer = driver.wait().unwrap();
        assert_eq!(answer.status, wire::OK);
        waiting.retain(|id| *id != answer.id);
    }
    assert!(waiting.is_empty());
    assert!((0..4).all(|sector| disk.bytes()[sector * 512] == sector as u8 + 1));
}

#[test]
fn whoever_looks_sees_how_large_a_file_is_by_now() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(8 * 512).unwrap();
    let backend = blk::FileBackend::new(file.try_clone().unwrap()).unwrap();
    let told = backend.handle();
    let device = Box::new(blk::Device::new(backend, blk::Options::default()));
    file.set_len(16 * 512).unwrap();
    let (_host, transport) = plug(device);
    let mut driver = blk::Driver::new(transport).unwrap();
    assert_eq!(driver.geometry().capacity, 16, "it was made when there were 8");
    driver.write(15, &[1; 512]).unwrap();
    file.set_len(4 * 512).unwrap();
    assert_eq!(driver.refresh().unwrap().capacity, 4);
    assert_eq!(driver.write(4, &[1; 512]), Err(DriverError::Status("IOERR")));
    assert_eq!(file.metadata().unwrap().len(), 4 * 512, "nor has it grown by that");

    // One that does not look is told.
    while driver.transport().wait(std::time::Duration::ZERO).is_ok() {}
    file.set_len(32 * 512).unwrap();
    assert_eq!(told.refresh().unwrap(), 32);
    while !driver.transport().wait(std::time::Duration::from_secs(10)).unwrap().config {}
    driver.write(31, &[1; 512]).unwrap();
}

#[test]
fn a_file_is_served_by_its_own_thread() {
    let mut file = tempfile::tempfile().unwrap();
    let bytes = pattern(5 << 20);
    file.write_all(&bytes).unwrap();
    file.rewind().unwrap();
    let kept = file.try_clone().unwrap();
    let backend = blk::FileBackend::new(file).unwrap();
    let (_host, transport) = plug(Box::new(blk::Device::new(backend, blk::Options::default())));
    let mut driver = blk::Driver::new(transport).unwrap();
    let mut read = vec![0; bytes.len()];
    driver.read(0, &mut read).unwrap();
    assert!(read == bytes);
    driver.write(3, &[0x5a; 512]).unwrap();
    driver.write_zeroes(5, 1, false).unwrap();
    driver.flush().unwrap();
    let mut sectors = [0; 3 * 512];
    std::os::unix::fs::FileExt::read_exact_at(&kept, &mut sectors, 3 * 512).unwrap();
    assert_eq!(sectors[..512], [0x5a; 512]);
    assert_eq!(sectors[512..1024], bytes[4 * 512..5 * 512]);
    assert_eq!(sectors[1024..], [0; 512]);
}

/// Counts up, so that a gap or a repetition shows.
struct Counter(Arc<Mutex<u8>>);

impl rng::Source for Counter {
    fn fill(&mut self, bytes: &mut [u8]) -> std::io::Result<()> {
        let mut next = self.0.lock().unwrap();
        for byte in bytes {
            *byte = *next;
            *next = next.wrapping_add(1);
        }
        Ok(())
    }
}

#[test]
fn entropy_is_what_the_source_gave_with_no_byte_lost() {
    let (_host, transport) = plug(Box::new(rng::Device::new(Counter(Arc::default()))));
    let mut driver = rng::Driver::new(transport).unwrap();
    let mut bytes = vec![0; 10_000];
    driver.fill(&mut bytes).unwrap();
    assert!(bytes.iter().enumerate().all(|(i, byte)| *byte == i as u8));
}

#[test]
fn host_entropy_is_not_the_same_twice() {
    let (_host, transport) = plug(Box::new(rng::Device::new(rng::HostEntropy)));
    let mut driver = rng::Driver::new(transport).unwrap();
    let mut both = [[0; 32]; 2];
    both.iter_mut().for_each(|bytes| driver.fill(bytes).unwrap());
    assert_ne!(both[0], both[1]);
}

#[test]
fn a_console_carries_bytes_both_ways_in_order_and_tells_its_size() {
    let device = console::Device::new(80, 25);
    let far = device.handle();
    let (_host, transport) = plug(Box::new(device));
    let mut driver = console::Driver::new(transport).unwrap();
    assert_eq!(driver.size(), Ok(Some((80, 25))));

    let bytes = pattern(50_000);
    driver.write(&bytes).unwrap();
    assert!(far.take_output() == bytes);

    assert_eq!(far.type_in(&bytes), bytes.len());
    let (mut read, mut piece) = (Vec::new(), [0; 777]);
    while read.len() < bytes.len() {
        let count = driver.read(&mut piece).unwrap();
        read.extend_from_slice(&piece[..count]);
    }
    assert!(read == bytes);

    driver.emergency_write(b'!').unwrap();
    assert_eq!(far.take_output(), b"!");
    far.resize(132, 50);
    while driver.size() != Ok(Some((132, 50))) {
        driver.transport().wait(std::time::Duration::from_secs(10)).unwrap();
    }
}

#[test]
fn a_console_that_nobody_reads_keeps_what_it_has_room_for() {
    let device = console::Device::new(80, 25);
    let far = device.handle();
    assert_eq!(far.type_in(&vec![b'x'; 100_000]), 64 * 1024);
    assert_eq!(far.type_in(b"y"), 0);
    let (_host, transport) = plug(Box::new(device));
    let mut driver = console::Driver::new(transport).unwrap();
    let (mut count, mut piece) = (0, [0; 4096]);
    while count < 64 * 1024 {
        count += driver.read(&mut piece).unwrap();
    }
    assert_eq!(far.type_in(b"y"), 1);
    assert_eq!((driver.read(&mut piece), piece[0]), (Ok(1), b'y'));
}
