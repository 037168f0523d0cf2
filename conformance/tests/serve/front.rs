//! A guest that drives what is served.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use polyvirt_devices::blk;
use polyvirt_hypervisors::FlatShare;
use polyvirt_transports::vhost_user::{Driver, Guest, Options, memory_file};

/// How long anything may take.
pub(crate) const WATCHDOG: Duration = Duration::from_secs(60);
const RAM: u64 = 4 << 20;
const RAM_AT: u64 = 0x4000_0000;

/// A driver of the disk at `socket`.
pub(crate) fn disk(socket: &Path) -> blk::Driver<Driver> {
    let (file, pages) = memory_file("guest", RAM).unwrap();
    let share = Arc::new(FlatShare::new(RAM_AT, pages.clone()));
    let guest = Guest { share, regions: vec![(RAM_AT, file, pages)] };
    let socket = socket.to_owned();
    let dial = Box::new(move || UnixStream::connect(&socket));
    let transport = Driver::connect(dial, blk::wire::DEVICE_TYPE, guest, Options::default()).unwrap();
    let mut driver = blk::Driver::new(transport).unwrap();
    driver.set_watchdog(WATCHDOG);
    driver
}
