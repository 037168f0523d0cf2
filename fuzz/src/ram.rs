//! Guest memory with edges: at 0, at the top of the address space, a seam, holes. All accesses are watched.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use polyvirt_core::memory::{Access, Accessed, FlatMemory, Log, Pages, Watched};

use crate::input::Input;

/// Guest memory as the device role gets it.
pub(crate) type Memory = Watched<Arc<FlatMemory>>;

/// Where the topmost region starts.
const TOP: u64 = 0u64.wrapping_sub(0x2000);

/// Start and length of each region, in order; the second and the third touch.
const REGIONS: [(u64, usize); 4] = [(0, 0x3000), (0x10_0000, 0x2000), (0x10_2000, 0x2000), (TOP, 0x2000)];

/// Addresses around which most are drawn.
const EDGES: [u64; 12] =
    [0, 0x1000, 0x2000, 0x3000, 0x10_0000, 0x10_1000, 0x10_2000, 0x10_4000, 1 << 32, 1 << 63, TOP, u64::MAX];

/// An address: mostly near an edge, sometimes anything.
pub(crate) fn address(input: &mut Input<'_>) -> u64 {
    let how = input.byte();
    if how & 0x80 != 0 {
        return input.u64();
    }
    let edge = EDGES[usize::from(how & 15) % EDGES.len()];
    match how >> 4 {
        0 | 1 => edge.wrapping_add(16 * u64::from(input.byte())),
        2 | 3 => edge.wrapping_add_signed(i64::from(input.byte() as i8)),
        4 => edge.wrapping_sub(16 * u64::from(input.byte())),
        5 => edge.wrapping_add(u64::from(input.u16())),
        _ => edge,
    }
}

/// Memory, and the record of what was done to it.
pub(crate) struct Ram {
    map: Arc<FlatMemory>,
    watch: Arc<Watch>,
}

struct Watch {
    map: Arc<FlatMemory>,
    book: Mutex<Book>,
}

#[derive(Default)]
struct Book {
    accesses: usize,
    /// The ring areas that the device may read, and those that it may write as well.
    read: Vec<Range<u128>>,
    written: Vec<Range<u128>>,
    /// Whether it may read anything, because tables are anywhere.
    tables: bool,
    /// Whether it may read and write buffers, which are anywhere.
    buffers: bool,
    /// What the other side writes in the middle of something: just before so many more reads are over.
    race: Option<Race>,
}

struct Race {
    reads: u8,
    address: u64,
    bytes: Vec<u8>,
}

impl Log for Watch {
    fn accessed(&self, access: Accessed) {
        let mut book = self.book.lock().expect("one thread");
        book.accesses += 1;
        let start = u128::from(access.address);
        let end = start + u128::from(access.len);
        // How far memory reaches from the start on.
        let mut reach = start;
        for (base, len) in REGIONS {
            let region = u128::from(base)..u128::from(base) + len as u128;
            if region.contains(&reach) {
                reach = region.end;
            }
        }
        assert!(end <= reach, "an access outside memory: {access:x?}");
        let mut inside = book.written.iter();
        let inside = inside.any(|area| area.start <= start && end <= area.end);
        if access.direction.contains(Access::WRITE) {
            assert!(inside || book.buffers, "a write outside the device's areas: {access:x?}");
            return;
        }
        let inside = inside || book.read.iter().any(|area| area.start <= start && end <= area.end);
        assert!(inside || book.tables || book.buffers, "a read outside the device's areas: {access:x?}");
        match &mut book.race {
            Some(Race { reads: reads @ 1.., .. }) => *reads -= 1,
            race => {
                if let Some(Race { address, bytes, .. }) = race.take() {
                    poke(&self.map, address, &bytes);
                }
            }
        }
    }
}

/// Writes where there is memory.
fn poke(map: &FlatMemory, address: u64, bytes: &[u8]) {
    if let Some(pages) = map.pages(address, bytes.len()) {
        pages.write(0, bytes).expect("inside");
    }
}

fn range(address: u64, len: u64) -> Range<u128> {
    let start = u128::from(address);
    start..start + u128::from(len)
}

impl Ram {
    pub(crate) fn new() -> Self {
        let regions = REGIONS.map(|(base, len)| (base, Pages::allocate(len)));
        let map = Arc::new(FlatMemory::new(regions));
        Self { map: map.clone(), watch: Arc::new(Watch { map, book: Mutex::default() }) }
    }

    /// The device's view.
    pub(crate) fn memory(&self) -> Memory {
        Watched::new(self.map.clone(), "device", self.watch.clone())
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.watch.book.lock().expect("one thread")
    }

    /// Lets the device read `len` bytes at `address` at any time.
    pub(crate) fn allow_reading(&self, address: u64, len: u64) {
        self.book().read.push(range(address, len));
    }

    /// Lets the device read and write `len` bytes at `address` at any time.
    pub(crate) fn allow_writing(&self, address: u64, len: u64) {
        self.book().written.push(range(address, len));
    }

    /// Lets the device read all memory, or its areas only.
    pub(crate) fn allow_tables(&self, allowed: bool) {
        self.book().tables = allowed;
    }

    /// Lets the device read and write all memory, or its areas only.
    pub(crate) fn allow_buffers(&self, allowed: bool) {
        self.book().buffers = allowed;
    }

    /// How many accesses there were since the last call.
    pub(crate) fn accesses(&self) -> usize {
        std::mem::take(&mut self.book().accesses)
    }

    /// The other side writes `bytes` just before the device reads once more after `reads` times.
    pub(crate) fn race(&self, reads: u8, address: u64, bytes: &[u8]) {
        self.book().race = Some(Race { reads, address, bytes: bytes.to_vec() });
    }

    /// Writes as the other side, where there is memory.
    pub(crate) fn poke(&self, address: u64, bytes: &[u8]) {
        poke(&self.map, address, bytes);
    }

    /// Reads as the other side; 0 where there is no memory.
    pub(crate) fn peek<const LEN: usize>(&self, address: u64) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        if let Some(pages) = self.map.pages(address, LEN) {
            pages.read(0, &mut bytes).expect("inside");
        }
        bytes
    }
}
