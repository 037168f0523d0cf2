//! The ports of the machine that are not virtio's: a serial port, power control.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use vm_superio::serial::{self, SerialEvents};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::{Ended, lock, map};

/// The upper half of the event registers: which events are wanted.
const PM_WANTED: u16 = map::PM_EVENTS + 2;
const PM_WANTED_HIGH: u16 = PM_WANTED + 1;

/// What answers at the ports.
pub(super) struct Ports {
    serial: Mutex<Serial<Line, Arc<Room>, Box<dyn Write + Send>>>,
    room: Arc<Room>,
    /// Whether the guest has touched any port.
    touched: AtomicBool,
    /// Which of ACPI's events the guest wants, a byte each: none of them ever comes.
    wanted: [AtomicU8; 2],
}

/// The interrupt line of the serial port.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Whether the guest has read what was typed.
#[derive(Default)]
struct Room {
    read: Mutex<bool>,
    changed: Condvar,
}

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        *lock(&self.read) = true;
        self.changed.notify_one();
    }
}

/// The other end of the serial port's input.
#[derive(Clone)]
pub struct SerialInput(pub(super) Arc<Ports>);

impl SerialInput {
    /// Types `bytes`: waits as long as the guest has not read what was typed before.
    pub fn type_in(&self, mut bytes: &[u8]) {
        let Ports { serial, room, .. } = &*self.0;
        while !bytes.is_empty() {
            let mut port = lock(serial);
            *lock(&room.read) = false;
            let fits = bytes.len().min(port.fifo_capacity());
            match port.enqueue_raw_bytes(&bytes[..fits]) {
                Ok(taken) => bytes = &bytes[taken..],
                Err(serial::Error::FullFifo) => {
                    drop(port);
                    let read = lock(&room.read);
                    let _read = room.changed.wait_while(read, |read| !*read);
                }
                Err(error) => return tracing::warn!(?error, "what was typed is lost"),
            }
        }
    }
}

impl Ports {
    pub(super) fn new(line: EventFd, out: Box<dyn Write + Send>) -> Self {
        let room = Arc::new(Room::default());
        Self {
            serial: Mutex::new(Serial::with_events(Line(line), Arc::clone(&room), out)),
            room,
            touched: AtomicBool::new(false),
            wanted: Default::default(),
        }
    }

    /// Whether the guest has not come to any port, of these or others.
    pub(super) fn is_untouched(&self) -> bool {
        !self.touched.load(Ordering::Relaxed)
    }

    /// The guest reads. False if nothing of this is there.
    pub(super) fn read(&self, port: u16, data: &mut [u8]) -> bool {
        self.touched.store(true, Ordering::Relaxed);
        match port {
            map::SERIAL..0x400 => data.fill(lock(&self.serial).read((port - map::SERIAL) as u8)),
            map::PM_EVENTS..=map::PM_CONTROL => {
                for (byte, port) in data.iter_mut().zip(port..) {
                    *byte = match port {
                        PM_WANTED => self.wanted[0].load(Ordering::Relaxed),
                        PM_WANTED_HIGH => self.wanted[1].load(Ordering::Relaxed),
                        // SCI_EN: ACPI has the machine already.
                        map::PM_CONTROL => 1,
                        _ => 0,
                    };
                }
            }
            map::KEYBOARD => data.fill(0),
            _ => return false,
        }
        true
    }

    /// The guest writes. None if nothing of this is there; it may be the end.
    pub(super) fn write(&self, port: u16, data: &[u8]) -> Option<ControlFlow<Ended>> {
        self.touched.store(true, Ordering::Relaxed);
        match (port, data) {
            (map::SERIAL..0x400, bytes) => {
                let mut serial = lock(&self.serial);
                for byte in bytes {
                    if let Err(error) = serial.write((port - map::SERIAL) as u8, *byte) {
                        tracing::warn!(?error, "the serial port");
                    }
                }
            }
            (map::PM_CONTROL, &[low, high]) => {
                // SLP_EN is bit 13, SLP_TYP bits 10 to 12.
                let control = u16::from_le_bytes([low, high]);
                if control & 1 << 13 != 0 && (control >> 10 & 7) as u8 == map::SLEEP_OFF {
                    return Some(ControlFlow::Break(Ended::Off));
                }
            }
            (map::KEYBOARD, &[map::KEYBOARD_RESET]) => return Some(ControlFlow::Break(Ended::Restart)),
            (map::PM_EVENTS..=map::PM_CONTROL, bytes) => {
                for (byte, port) in bytes.iter().zip(port..) {
                    match port {
                        PM_WANTED => self.wanted[0].store(*byte, Ordering::Relaxed),
                        PM_WANTED_HIGH => self.wanted[1].store(*byte, Ordering::Relaxed),
                        _ => {}
                    }
                }
            }
            (map::KEYBOARD, _) => {}
            _ => return None,
        }
        Some(ControlFlow::Continue(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports() -> Ports {
        Ports::new(EventFd::new(0).unwrap(), Box::new(io::sink()))
    }

    #[test]
    fn sleeping_for_good_and_the_keyboard_controllers_reset_are_ends() {
        let ports = ports();
        let off = u16::from(map::SLEEP_OFF) << 10 | 1 << 13;
        assert_eq!(ports.write(map::PM_CONTROL, &off.to_le_bytes()), Some(ControlFlow::Break(Ended::Off)));
        assert_eq!(ports.write(map::PM_CONTROL, &(off & 0x1fff).to_le_bytes()), Some(ControlFlow::Continue(())));
        assert_eq!(ports.write(map::KEYBOARD, &[0xfe]), Some(ControlFlow::Break(Ended::Restart)));
        assert_eq!(ports.write(map::KEYBOARD, &[0x20]), Some(ControlFlow::Continue(())));
        let mut control = [0xff; 2];
        assert!(ports.read(map::PM_CONTROL, &mut control));
        assert_eq!(control, [1, 0]);
        assert_eq!(ports.write(0x80, &[1]), None);
        assert!(!ports.read(0x80, &mut control));
    }

    #[test]
    fn what_is_typed_is_read_in_order_however_much_it_is() {
        let ports = Arc::new(ports());
        let typed: Vec<u8> = (0..1000u32).map(|at| at as u8).collect();
        let input = SerialInput(Arc::clone(&ports));
        let bytes = typed.clone();
        let typist = std::thread::spawn(move || input.type_in(&bytes));
        let mut got = Vec::new();
        while got.len() < typed.len() {
            let mut status = [0];
            assert!(ports.read(map::SERIAL + 5, &mut status));
            if status[0] & 1 != 0 {
                let mut byte = [0];
                ports.read(map::SERIAL, &mut byte);
                got.push(byte[0]);
            } else {
                std::thread::yield_now();
            }
        }
        typist.join().unwrap();
        assert_eq!(got, typed);
    }
}
