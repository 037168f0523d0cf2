//! Split and packed rings deliver the same: whatever a driver and a device do, in whatever order, each sees the same
//! buffers with the same bytes, and the same refusals, on rings of either format.

mod common;

use std::sync::Arc;

use common::{BUFFERS, Rig, SPACE, Shape, popped};
use polyvirt_core::memory::{FlatMemory, Segment};
use polyvirt_core::queue::{AddError, Buffer, Chain, Layout};
use proptest::prelude::*;

/// Bytes of each piece; the next starts twice as far.
const PIECE: u32 = 8;

#[derive(Clone, Debug)]
enum Step {
    Add { readable: u64, writable: u64 },
    Kick,
    Get,
    Disable,
    Enable,
    Begin,
    Pop,
    End,
    Complete { which: usize, written: u32 },
    Interrupt,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(
        prop_oneof![
            5 => (0u64..4, 0u64..4).prop_map(|(readable, writable)| Step::Add { readable, writable }),
            3 => Just(Step::Kick),
            4 => Just(Step::Get),
            1 => Just(Step::Disable),
            1 => Just(Step::Enable),
            2 => Just(Step::Begin),
            6 => Just(Step::Pop),
            2 => Just(Step::End),
            4 => (any::<usize>(), 0u32..40).prop_map(|(which, written)| Step::Complete { which, written }),
            2 => Just(Step::Interrupt),
        ],
        1..300,
    )
}

/// What a step shows to whoever made it. What the format is free to choose does not count: identities of chains, and
/// when a notification is wanted.
#[derive(Debug, PartialEq)]
enum Seen {
    Nothing,
    Added {
        free: u16,
    },
    Full,
    Pieces(usize),
    /// A chain: offset, length and bytes of its readable pieces, offset and length of its writable ones.
    Chain(Vec<(u64, Vec<u8>)>, Vec<(u64, usize)>),
    Got {
        token: u64,
        written: u32,
        bytes: Vec<u8>,
    },
}

/// A driver and a device on one ring.
struct Pair {
    rig: Rig,
    next: u64,
    held: Vec<Chain<Arc<FlatMemory>>>,
    /// Whether the device serves: it takes chains only then.
    serves: bool,
}

impl Pair {
    fn new(shape: Shape) -> Self {
        Self { rig: Rig::new(shape), next: 0, held: Vec::new(), serves: false }
    }

    /// Where a segment is in the memory for buffers.
    fn offset<L>(&self, segment: &Segment<L>) -> u64 {
        let base = self.rig.memory.map.pages(BUFFERS, 1).unwrap().as_ptr().addr();
        (segment.as_ptr().addr() - base) as u64
    }

    fn step(&mut self, step: &Step) -> Seen {
        match *step {
            Step::Add { readable, writable } => {
                let slot = BUFFERS + self.next * 0x80 % SPACE;
                let piece = |number| Buffer { address: slot + 2 * u64::from(PIECE) * number, len: PIECE };
                let pieces: Vec<_> = (0..readable + writable).map(piece).collect();
                let (readable, writable) = pieces.split_at(readable as usize);
                for (number, piece) in readable.iter().enumerate() {
                    self.rig.memory.write(piece.address, &[self.next as u8 ^ number as u8; PIECE as usize]);
                }
                match self.rig.driver.add_buf(readable, writable, self.next) {
                    Ok(()) => self.next += 1,
                    Err(AddError::Full(_)) => return Seen::Full,
                    Err(AddError::Pieces { pieces, .. }) => return Seen::Pieces(pieces),
                    Err(other) => panic!("{other}"),
                }
                return Seen::Added { free: self.rig.driver.free() };
            }
            Step::Kick => drop(self.rig.driver.kick().unwrap()),
            Step::Get => {
                if let Some((token, written)) = self.rig.driver.get_buf().unwrap() {
                    let bytes = self.rig.memory.read::<0x80>(BUFFERS + token * 0x80 % SPACE);
                    return Seen::Got { token, written, bytes: bytes.to_vec() };
                }
            }
            Step::Disable => self.rig.driver.disable_cb(),
            Step::Enable => drop(self.rig.driver.enable_cb()),
            Step::Begin => {
                self.rig.device.begin_burst();
                self.serves = true;
            }
            Step::Pop if self.serves => {
                if let Some(chain) = popped(self.rig.device.pop()) {
                    let readable = chain.readable().iter().map(|segment| {
                        let mut bytes = vec![0; segment.len()];
                        segment.read(0, &mut bytes).unwrap();
                        (self.offset(segment), bytes)
                    });
                    let writable = chain.writable().iter().map(|segment| (self.offset(segment), segment.len()));
                    let seen = Seen::Chain(readable.collect(), writable.collect());
                    self.held.push(chain);
                    return seen;
                }
            }
            Step::Pop => {}
            Step::End => {
                self.rig.device.end_burst();
                self.serves = false;
            }
            Step::Complete { which, written } => {
                if !self.held.is_empty() {
                    let mut chain = self.held.remove(which % self.held.len());
                    let answer = vec![which as u8; written.min(chain.writable_len()) as usize];
                    chain.write(0, &answer).unwrap();
                    self.rig.device.complete(chain).unwrap();
                }
            }
            Step::Interrupt => drop(self.rig.device.needs_interrupt()),
        }
        Seen::Nothing
    }
}

proptest! {
    #[test]
    fn the_same_operations_give_the_same_deliveries(
        log in 0u32..5,
        (indirect, in_order) in any::<(bool, bool)>(),
        event_idx in any::<[bool; 2]>(),
        steps in steps(),
    ) {
        let size = 1 << log;
        let [split, packed] = event_idx;
        let shape = |layout, event_idx| Shape { size, event_idx, indirect, in_order, layout };
        let mut split = Pair::new(shape(Layout::Modern, split));
        let mut packed = Pair::new(shape(Layout::Packed, packed));
        // In the end the driver publishes all, the device serves all, and the driver takes all back.
        let mut end = vec![Step::Kick];
        end.extend([Step::Begin, Step::Pop, Step::Complete { which: 0, written: 5 }, Step::End].into_iter().cycle().take(4 * 20));
        end.extend(std::iter::repeat_n(Step::Complete { which: 0, written: 5 }, 20));
        end.extend(std::iter::repeat_n(Step::Get, 20));
        for (number, step) in steps.iter().chain(&end).enumerate() {
            prop_assert_eq!(split.step(step), packed.step(step), "step {}: {:?}", number, step);
        }
        prop_assert_eq!(split.rig.driver.in_flight(), 0);
        prop_assert_eq!(packed.rig.driver.in_flight(), 0);
    }
}
