//! Temporary: devices until those of the workspace are there.
#![allow(missing_docs)]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::task::Waker;

use polyvirt_core::Features;
use polyvirt_core::device::{Device, Queues};
use polyvirt_core::memory::GuestMemory;
use polyvirt_core::queue::{Chain, QueueError};

use super::Kind;
use crate::suite::{FarSide, NO_VARIANT, Objection, Variant};

#[derive(Default)]
struct Disk {
    bytes: Vec<u8>,
    sectors: u64,
    fail: bool,
    flushes: u64,
    changed: bool,
    waker: Option<Waker>,
}

struct Blk {
    disk: Arc<Mutex<Disk>>,
    config: Vec<u8>,
    ro: bool,
    accepted: Features,
}

struct Rng;

#[derive(Default)]
struct Tty {
    input: VecDeque<u8>,
    output: Vec<u8>,
    size: (u16, u16),
    changed: bool,
    waker: Option<Waker>,
}

struct Console {
    tty: Arc<Mutex<Tty>>,
    config: Vec<u8>,
}

type Made<M> = (Box<dyn Device<M>>, Box<dyn FarSide>);

pub(super) fn device<M>(kind: Kind, variant: Variant<'_>) -> Result<Made<M>, String>
where
    M: GuestMemory + Send + 'static,
    M::Lease: Send,
{
    Ok(match (kind, variant) {
        (Kind::Blk, _) => {
            let (bytes, sectors) = (vec![0u8; 1 << 20], 2048u64);
            let disk = Arc::new(Mutex::new(Disk { bytes, sectors, ..Disk::default() }));
            let mut config = vec![0; 60];
            config[..8].copy_from_slice(&sectors.to_le_bytes());
            config[36..40].copy_from_slice(&2048u32.to_le_bytes());
            config[40..44].copy_from_slice(&1u32.to_le_bytes());
            config[44..48].copy_from_slice(&1u32.to_le_bytes());
            config[48..52].copy_from_slice(&2048u32.to_le_bytes());
            config[52..56].copy_from_slice(&1u32.to_le_bytes());
            config[56] = 1;
            let ro = variant == Variant::ReadOnly;
            (Box::new(Blk { disk: disk.clone(), config, ro, accepted: Features::empty() }), Box::new(disk))
        }
        (_, Variant::ReadOnly | Variant::Image(_)) => return Err(NO_VARIANT.into()),
        (Kind::Rng, _) => (Box::new(Rng), Box::new(())),
        (Kind::Console, _) => {
            let tty = Arc::new(Mutex::new(Tty { size: (80, 25), ..Tty::default() }));
            (Box::new(Console { tty: tty.clone(), config: vec![80, 0, 25, 0, 0, 0, 0, 0, 0, 0, 0, 0] }), Box::new(tty))
        }
    })
}

impl FarSide for Arc<Mutex<Disk>> {
    fn fail_next_io(&mut self) -> Result<(), Objection> {
        self.lock().unwrap().fail = true;
        Ok(())
    }
    fn set_capacity(&mut self, sectors: u64) -> Result<(), Objection> {
        let waker = {
            let mut disk = self.lock().unwrap();
            disk.bytes.resize(sectors as usize * 512, 0);
            disk.sectors = sectors;
            disk.changed = true;
            disk.waker.clone()
        };
        waker.into_iter().for_each(Waker::wake);
        Ok(())
    }
    fn flushes(&mut self) -> Result<u64, Objection> {
        Ok(self.lock().unwrap().flushes)
    }
    fn read_disk(&mut self, offset: u64, data: &mut [u8]) -> Result<(), Objection> {
        data.copy_from_slice(&self.lock().unwrap().bytes[offset as usize..][..data.len()]);
        Ok(())
    }
}

impl FarSide for Arc<Mutex<Tty>> {
    fn input(&mut self, bytes: &[u8]) -> Result<(), Objection> {
        let waker = {
            let mut tty = self.lock().unwrap();
            tty.input.extend(bytes);
            tty.waker.clone()
        };
        waker.into_iter().for_each(Waker::wake);
        Ok(())
    }
    fn output(&mut self) -> Result<Vec<u8>, Objection> {
        Ok(std::mem::take(&mut self.lock().unwrap().output))
    }
    fn resize(&mut self, columns: u16, rows: u16) -> Result<(), Objection> {
        let waker = {
            let mut tty = self.lock().unwrap();
            tty.size = (columns, rows);
            tty.changed = true;
            tty.waker.clone()
        };
        waker.into_iter().for_each(Waker::wake);
        Ok(())
    }
}

fn malformed<L: polyvirt_core::memory::Lease>(chain: &Chain<L>, reason: &'static str) -> QueueError {
    QueueError::Request { head: chain.head(), reason }
}

impl Blk {
    fn serve<L: polyvirt_core::memory::Lease>(&self, chain: &mut Chain<L>) -> Result<(), QueueError> {
        let mut header = [0; 16];
        chain.read(0, &mut header).map_err(|_| malformed(chain, "header"))?;
        let Some(at) = chain.writable_len().checked_sub(1) else { return Err(malformed(chain, "status")) };
        let kind = u32::from_le_bytes(header[..4].try_into().unwrap());
        let sector = u64::from_le_bytes(header[8..].try_into().unwrap());
        let mut disk = self.disk.lock().unwrap();
        let fits = |len: u64| len % 512 == 0 && sector.checked_add(len / 512).is_some_and(|end| end <= disk.sectors);
        let start = sector.wrapping_mul(512) as usize;
        let readable = chain.readable_len() - 16;
        let status = if disk.fail && matches!(kind, 0 | 1 | 4) {
            disk.fail = false;
            1
        } else {
            match kind {
                0 if fits(at.into()) => {
                    chain.write(0, &disk.bytes[start..start + at as usize]).unwrap();
                    0
                }
                1 if !self.ro && fits(readable.into()) => {
                    chain.read(16, &mut disk.bytes[start..start + readable as usize]).unwrap();
                    0
                }
                0 | 1 => 1,
                4 => {
                    disk.flushes += 1;
                    0
                }
                8 => {
                    let mut id = [0; 20];
                    id[..8].copy_from_slice(b"standin!");
                    if at < 20 {
                        1
                    } else {
                        chain.write(0, &id).unwrap();
                        0
                    }
                }
                11 | 13 if readable == 16 && !self.ro => {
                    let mut segment = [0; 16];
                    chain.read(16, &mut segment).unwrap();
                    let from = u64::from_le_bytes(segment[..8].try_into().unwrap());
                    let count = u32::from_le_bytes(segment[8..12].try_into().unwrap());
                    let flags = u32::from_le_bytes(segment[12..].try_into().unwrap());
                    if flags > 1 || kind == 11 && flags == 1 {
                        2
                    } else if from.checked_add(count.into()).is_none_or(|end| end > disk.sectors) {
                        1
                    } else {
                        disk.bytes[from as usize * 512..][..count as usize * 512].fill(0);
                        0
                    }
                }
                11 | 13 => 1,
                _ => 2,
            }
        };
        if kind != 0 && kind != 8 || status != 0 {
            // Status alone is written, at the end.
            if at > 0 {
                chain.write(0, &vec![0; at as usize]).unwrap();
            }
        } else if kind == 8 && at > 20 {
            chain.write(20, &vec![0; at as usize - 20]).unwrap();
        }
        chain.write(at, &[status]).unwrap();
        Ok(())
    }
}

impl<M: GuestMemory> Device<M> for Blk {
    fn device_type(&self) -> u32 {
        2
    }
    fn features(&self) -> Features {
        let ro = if self.ro { Features::bit(5) } else { Features::bit(13) | Features::bit(14) };
        Features::bit(9) | ro
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[128]
    }
    fn config(&self) -> &[u8] {
        &self.config
    }
    fn activate(&mut self, accepted: Features, waker: Waker) {
        self.accepted = accepted;
        self.disk.lock().unwrap().waker = Some(waker);
    }
    fn kick(&mut self, index: u16, queues: &mut Queues<'_, M>) {
        let Some(queue) = queues.get(index) else { return };
        while let Ok(Some(mut chain)) = queue.pop() {
            if let Err(reason) = self.serve(&mut chain) {
                queue.fail(reason);
                return;
            }
            let _ = queue.complete(chain);
        }
    }
    fn poll(&mut self, queues: &mut Queues<'_, M>) {
        let mut disk = self.disk.lock().unwrap();
        if std::mem::take(&mut disk.changed) {
            self.config[..8].copy_from_slice(&disk.sectors.to_le_bytes());
            drop(disk);
            queues.config_changed();
        }
    }
    fn reset_queue(&mut self, _: u16) {}
    fn reset(&mut self) {
        self.disk.lock().unwrap().waker = None;
    }
}

impl<M: GuestMemory> Device<M> for Rng {
    fn device_type(&self) -> u32 {
        4
    }
    fn features(&self) -> Features {
        Features::empty()
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[128]
    }
    fn config(&self) -> &[u8] {
        &[]
    }
    fn activate(&mut self, _: Features, _: Waker) {}
    fn kick(&mut self, index: u16, queues: &mut Queues<'_, M>) {
        let Some(queue) = queues.get(index) else { return };
        while let Ok(Some(mut chain)) = queue.pop() {
            if chain.writable_len() == 0 || chain.readable_len() > 0 {
                queue.fail(malformed(&chain, "direction"));
                return;
            }
            let mut bytes = vec![0; chain.writable_len().min(65536) as usize];
            std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom").unwrap(), &mut bytes).unwrap();
            chain.write(0, &bytes).unwrap();
            let _ = queue.complete(chain);
        }
    }
    fn reset_queue(&mut self, _: u16) {}
    fn reset(&mut self) {}
}

impl Console {
    fn receive<M: GuestMemory>(&mut self, queues: &mut Queues<'_, M>) {
        let mut tty = self.tty.lock().unwrap();
        let Some(queue) = queues.get(0) else { return };
        while !tty.input.is_empty() {
            let Ok(Some(mut chain)) = queue.pop() else { return };
            if chain.writable_len() == 0 || chain.readable_len() > 0 {
                queue.fail(malformed(&chain, "direction"));
                return;
            }
            let len = tty.input.len().min(chain.writable_len() as usize);
            let bytes: Vec<u8> = tty.input.drain(..len).collect();
            chain.write(0, &bytes).unwrap();
            let _ = queue.complete(chain);
        }
    }
}

impl<M: GuestMemory> Device<M> for Console {
    fn device_type(&self) -> u32 {
        3
    }
    fn features(&self) -> Features {
        Features::bit(0) | Features::bit(2)
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[128, 128]
    }
    fn config(&self) -> &[u8] {
        &self.config
    }
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if offset == 8 && !data.is_empty() {
            self.tty.lock().unwrap().output.push(data[0]);
        }
    }
    fn activate(&mut self, _: Features, waker: Waker) {
        self.tty.lock().unwrap().waker = Some(waker);
    }
    fn kick(&mut self, index: u16, queues: &mut Queues<'_, M>) {
        if index == 0 {
            return self.receive(queues);
        }
        let Some(queue) = queues.get(index) else { return };
        while let Ok(Some(chain)) = queue.pop() {
            if chain.writable_len() > 0 || chain.readable_len() == 0 {
                queue.fail(malformed(&chain, "direction"));
                return;
            }
            let mut bytes = vec![0; chain.readable_len().min(65536) as usize];
            chain.read(0, &mut bytes).unwrap();
            self.tty.lock().unwrap().output.extend(bytes);
            let _ = queue.complete(chain);
        }
    }
    fn poll(&mut self, queues: &mut Queues<'_, M>) {
        self.receive(queues);
        let mut tty = self.tty.lock().unwrap();
        if std::mem::take(&mut tty.changed) {
            self.config[..2].copy_from_slice(&tty.size.0.to_le_bytes());
            self.config[2..4].copy_from_slice(&tty.size.1.to_le_bytes());
            drop(tty);
            queues.config_changed();
        }
    }
    fn reset_queue(&mut self, _: u16) {}
    fn reset(&mut self) {
        self.tty.lock().unwrap().waker = None;
    }
}
