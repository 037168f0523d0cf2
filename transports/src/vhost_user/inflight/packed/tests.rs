//! What is known is true at every step.

use super::super::size;
use super::*;

const SIZE: u16 = 8;

/// A driver and a device on one ring, and what is true about it.
struct Rig {
    memory: Pages,
    ring: Pages,
    next: Position,
    /// Made available and not taken: ids.
    available: Vec<(u16, u16)>,
    /// Taken and not used, in order: id, descriptors.
    taken: Vec<(u16, u16)>,
    from: Position,
    used: Position,
}

impl Rig {
    fn new() -> Self {
        let (memory, ring) = (Pages::allocate(size(2, SIZE, true)), Pages::allocate(4096));
        let start = Position::START;
        Self { memory, ring, next: start, available: vec![], taken: vec![], from: start, used: start }
    }

    fn tracker(&self) -> Tracker {
        Tracker::new(&self.memory, 1, SIZE, SIZE, self.ring.clone()).unwrap()
    }

    /// What comes of it if the back end dies now.
    fn recovered(&self) -> Recovered {
        let copy = |pages: &Pages| {
            let mut bytes = vec![0; pages.len()];
            pages.read(0, &mut bytes).unwrap();
            let copy = Pages::allocate(bytes.len());
            copy.write(0, &bytes).unwrap();
            copy
        };
        let mut tracker = Tracker::new(&copy(&self.memory), 1, SIZE, SIZE, copy(&self.ring)).unwrap();
        tracker.recover(Position::new(3, false)).unwrap()
    }

    /// Where the device goes on, and chains as they have to be in the ring.
    fn expected(&self) -> Recovered {
        let mut at = self.used;
        let mut descriptors = Vec::new();
        for &(id, count) in &self.taken {
            for piece in 0..count {
                descriptors.push(descriptor(at, id, piece, count));
                at = at.advanced(1, SIZE);
            }
        }
        Recovered { used: self.used, descriptors }
    }

    fn free(&self) -> u16 {
        SIZE - self.available.iter().chain(&self.taken).map(|(_, count)| count).sum::<u16>()
    }

    fn add(&mut self, id: u16, count: u16) {
        for piece in (0..count).rev() {
            let at = self.next.advanced(piece, SIZE);
            let (address, rest) = descriptor(at, id, piece, count);
            let bytes = [address.to_ne_bytes(), rest.to_ne_bytes()].concat();
            self.ring.write(16 * usize::from(at.index()), &bytes).unwrap();
        }
        self.next = self.next.advanced(count, SIZE);
        self.available.push((id, count));
    }

    fn take(&mut self, tracker: &mut Tracker) {
        let (id, count) = self.available.remove(0);
        tracker.taken(Taken { head: id, start: self.from, entries: count });
        self.from = self.from.advanced(count, SIZE);
        self.taken.push((id, count));
    }

    /// Uses the chain at `which`; the driver may be so quick that its slot has the next chain at once.
    fn put(&mut self, tracker: &mut Tracker, which: usize, at_once: Option<u16>) {
        let (id, count) = self.taken[which];
        let at = self.used;
        let word = Tail { len: 0, id, flags: at.used_flags() }.to_word();
        let offset = 16 * usize::from(at.index()) + 8;
        tracker.using(id);
        assert_eq!(self.recovered(), self.expected(), "it is not written yet");
        self.ring.write(offset, &word.to_ne_bytes()).unwrap();
        self.taken.remove(which);
        self.used = self.used.advanced(count, SIZE);
        assert_eq!(self.recovered(), self.expected(), "it is written");
        if let Some(next) = at_once {
            self.add(next, 1);
            assert_eq!(self.recovered(), self.expected(), "it was overwritten");
        }
        tracker.used(id);
    }
}

fn descriptor(at: Position, id: u16, piece: u16, count: u16) -> (u64, u64) {
    let next = if piece + 1 == count { 0 } else { NEXT };
    let flags = next | at.available_flags();
    let address = u64::from(id) << 16 | u64::from(piece);
    (address.to_le(), Tail { len: 100 + u32::from(piece), id, flags }.to_word())
}

#[test]
fn whenever_the_back_end_dies_what_was_taken_and_not_used_is_in_flight_in_its_order() {
    let mut rig = Rig::new();
    let mut tracker = rig.tracker();
    assert_eq!(tracker.recover(Position::START).unwrap(), rig.expected());
    let mut dice = 1u32;
    let mut roll = |sides: usize| {
        dice = dice.wrapping_mul(1664525).wrapping_add(1013904223);
        (dice >> 16) as usize % sides
    };
    for id in 0..3000 {
        let count = 1 + roll(3) as u16;
        match roll(3) {
            0 if rig.free() >= count => rig.add(id, count),
            1 if !rig.available.is_empty() => rig.take(&mut tracker),
            2 if !rig.taken.is_empty() => {
                let which = roll(rig.taken.len());
                let at_once = (roll(2) == 0).then_some(id);
                rig.put(&mut tracker, which, at_once);
            }
            // One that was put back is taken again.
            _ => {
                if let Some(&(id, count)) = rig.taken.last() {
                    let start = rig.from.advanced(SIZE - count, SIZE);
                    tracker.taken(Taken { head: id, start, entries: count });
                }
            }
        }
        assert_eq!(rig.recovered(), rig.expected());
    }
    assert!(rig.taken.len() + rig.available.len() > 0);
}

#[test]
fn a_chain_that_is_taken_again_is_in_flight_once_and_what_is_not_in_flight_is_not_used() {
    let mut rig = Rig::new();
    let mut tracker = rig.tracker();
    tracker.recover(Position::START).unwrap();
    rig.add(7, 3);
    assert_eq!(rig.recovered(), rig.expected(), "it is not taken yet");
    for _ in 0..3 {
        tracker.taken(Taken { head: 7, start: Position::START, entries: 3 });
    }
    (rig.taken, rig.available) = (rig.available.clone(), vec![]);
    assert_eq!(rig.recovered(), rig.expected());
    tracker.using(8);
    tracker.used(8);
    assert_eq!(rig.recovered(), rig.expected());
    // More than there are entries is no chain.
    tracker.taken(Taken { head: 8, start: Position::START, entries: SIZE - 2 });
    assert_eq!(rig.recovered(), rig.expected());
}

#[test]
fn nonsense_is_refused() {
    let rig = Rig::new();
    let mut tracker = rig.tracker();
    tracker.recover(Position::START).unwrap();
    tracker.set_used([Position::new(SIZE, true); 2]);
    assert_eq!(rig.tracker().recover(Position::START), Err(Nonsense::Index(SIZE, SIZE)));
    tracker.set_used([Position::START; 2]);
    // In flight, and of no descriptors; then a chain in a circle; then one that ends nowhere.
    tracker.set_free([1; 2]);
    tracker.set_in_flight(0, true);
    assert_eq!(rig.tracker().recover(Position::START), Err(Nonsense::Chain(0)));
    for (next, count) in [(0, 2), (0, u16::MAX), (SIZE, 2)] {
        tracker.set_entry_half(0, 1, next);
        tracker.set_entry_half(0, 3, count);
        assert_eq!(rig.tracker().recover(Position::START), Err(Nonsense::Chain(0)));
    }
    let mut small = Tracker::new(&rig.memory, 1, SIZE, SIZE + 1, rig.ring.clone()).unwrap();
    assert_eq!(small.recover(Position::START), Err(Nonsense::Entries(SIZE, SIZE + 1)));
    assert!(Tracker::new(&rig.memory, 300, SIZE, SIZE, rig.ring.clone()).is_err());
}

#[test]
fn whatever_another_process_writes_meanwhile_does_no_harm() {
    let rig = Rig::new();
    let mut tracker = rig.tracker();
    let (memory, ring) = (rig.memory.clone(), rig.ring.clone());
    // Dropped however the test ends.
    let (going, end) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut number = 1u64;
            while end.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                for at in 0..memory.len() / 8 {
                    number = number.wrapping_mul(6364136223846793005).wrapping_add(1);
                    // Small numbers and flags are the more dangerous ones.
                    let word = number >> 32 & if number & 1 << 63 == 0 { 0x000f_000f } else { u64::MAX };
                    memory.write(8 * at, &word.to_ne_bytes()).unwrap();
                    ring.write(8 * at % 128, &(word << 48).to_ne_bytes()).unwrap();
                }
            }
        });
        let _going = going;
        for round in 0..2000 {
            let (head, start) = (round as u16, Position::new(round as u16 % SIZE, true));
            tracker.taken(Taken { head, start, entries: 1 + round as u16 % SIZE });
            tracker.using(head);
            tracker.used(head);
            let _ = rig.tracker().recover(Position::START);
        }
    });
}
