//! `polyvirt xen-guest`: what a domain of the lab does with its disk.

use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use polyvirt_core::hypervisor::{Guest as _, HypervisorError, WaitForInterrupt as _};
use polyvirt_devices::DriverError;
use polyvirt_devices::blk::Driver;
use polyvirt_hypervisors::xen::{self, Guest};
use polyvirt_transports::xenbus::{self, Domain as _, GuestPlace};
use sha2::{Digest, Sha256};

use super::output::Output;
use super::{CliError, SUCCESS};

/// How long domain 0 may take to plug the disk in.
const WATCHDOG: Duration = Duration::from_secs(60);
/// Bytes read or written at a time.
const CHUNK: usize = 128 * 1024;
const SECTOR: usize = 512;

#[derive(Args)]
pub(super) struct XenGuestArgs {
    /// Keep writing until the domain is destroyed
    #[arg(long)]
    hold: bool,
}

/// Reads the disk, inverts its middle, reads it again; tells the SHA-256 before and after.
pub(super) fn run(args: &XenGuestArgs, output: &mut Output) -> Result<u8, CliError> {
    let xen = |error: HypervisorError| CliError::Mistake(error.to_string());
    let driver = |error: DriverError| CliError::Mistake(error.to_string());
    let mut tell = |line: String| output.text(&line).and_then(|()| output.flush());
    let guest = Arc::new(xen::drive().map_err(xen)?);
    let place = find(&guest).map_err(xen)?;
    let transport = xenbus::Driver::connect(guest, place).map_err(|error| CliError::Mistake(error.to_string()))?;
    let mut disk = Driver::new(transport).map_err(driver)?;
    tell(format!("read {}\n", sum(&mut disk).map_err(driver)?))?;

    let sector = disk.geometry().capacity / 2;
    let mut middle = vec![0; CHUNK];
    disk.read(sector, &mut middle).map_err(driver)?;
    middle.iter_mut().for_each(|byte| *byte = !*byte);
    disk.write(sector, &middle).map_err(driver)?;
    disk.flush().map_err(driver)?;
    tell(format!("wrote {}\n", sum(&mut disk).map_err(driver)?))?;
    if args.hold {
        tell("busy\n".into())?;
        loop {
            disk.write(sector, &middle).map_err(driver)?;
        }
    }
    Ok(SUCCESS)
}

/// The disk's place, as soon as there is one.
fn find(guest: &Guest) -> Result<GuestPlace, HypervisorError> {
    loop {
        if let Some(place) = guest.enumerate()?.into_iter().next() {
            return Ok(place);
        }
        let plugged = guest.watch("device/virtio")?;
        if !guest.wait(&[plugged], WATCHDOG)? || !guest.take(plugged)? {
            return Err(HypervisorError::Unavailable("no device in device/virtio".into()));
        }
    }
}

/// The SHA-256 of the whole disk.
fn sum(disk: &mut Driver<xenbus::Driver<Guest>>) -> Result<String, DriverError> {
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; CHUNK];
    let sectors = disk.geometry().capacity;
    for sector in (0..sectors).step_by(CHUNK / SECTOR) {
        let len = (sectors - sector).min((CHUNK / SECTOR) as u64) as usize * SECTOR;
        disk.read(sector, &mut chunk[..len])?;
        hasher.update(&chunk[..len]);
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
