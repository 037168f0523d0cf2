//! Both roles over one ring: every buffer arrives once, with its bytes, and nobody sleeps through a wake-up.

mod common;

use std::collections::VecDeque;

use common::{BUFFERS, Rig, Shape, popped};
use polyvirt_core::queue::{AddError, Buffer, ByteOrder, Layout, Queue, QueueError};
use proptest::prelude::*;

/// Bytes of each buffer piece.
const PIECE: u32 = 16;

fn shapes() -> impl Strategy<Value = Shape> {
    let split = prop_oneof![
        Just(Layout::Modern),
        Just(Layout::Legacy(ByteOrder::Little)),
        Just(Layout::Legacy(ByteOrder::Big)),
    ];
    let split = (0u32..5, split).prop_map(|(log, layout)| (1 << log, layout));
    let packed = (1u16..=16).prop_map(|size| (size, Layout::Packed));
    (prop_oneof![split, packed], any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        |((size, layout), event_idx, indirect, in_order)| Shape { size, event_idx, indirect, in_order, layout },
    )
}

#[derive(Clone, Debug)]
enum Step {
    Add { readable: usize, writable: usize },
    Kick,
    Get,
    Disable,
    Enable,
    Begin,
    Pop,
    End,
    Complete { which: usize },
    Interrupt,
    Restore,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(
        prop_oneof![
            4 => (0usize..3, 0usize..3).prop_map(|(readable, writable)| Step::Add { readable, writable }),
            3 => Just(Step::Kick),
            3 => Just(Step::Get),
            1 => Just(Step::Disable),
            1 => Just(Step::Enable),
            3 => Just(Step::Begin),
            6 => Just(Step::Pop),
            3 => Just(Step::End),
            4 => any::<usize>().prop_map(|which| Step::Complete { which }),
            3 => Just(Step::Interrupt),
            1 => Just(Step::Restore),
        ],
        1..200,
    )
}

proptest! {
    #[test]
    fn every_buffer_is_delivered_once_with_its_bytes(shape in shapes(), steps in steps()) {
        let mut rig = Rig::new(shape);
        let mut next = 0u64;
        // What the driver added and has not got back, by token: writable bytes, and where they are.
        let mut added = std::collections::BTreeMap::new();
        let mut published = VecDeque::new();
        let mut held = Vec::new();
        // In order: what was popped and is not used, oldest first, and whether the device is done with it.
        let mut waiting = VecDeque::new();
        // Whether the device was told of what is published, and the driver of what was used.
        let (mut device_awake, mut driver_awake) = (false, false);
        let (mut published_count, mut seen) = (0usize, 0usize);
        let (mut completed, mut got) = (0usize, 0usize);
        let mut callbacks = true;
        // While the device serves: whether it found the queue empty.
        let mut burst = None;
        for step in steps {
            match step {
                Step::Add { readable, writable } => {
                    let slot = BUFFERS + (next % 64) * 0x100;
                    let pieces: Vec<_> = (0..readable + writable)
                        .map(|i| Buffer { address: slot + u64::from(PIECE) * i as u64, len: PIECE })
                        .collect();
                    let stamp = next.to_le_bytes();
                    // 16 buffers at most are in flight, so a slot is free again when it comes round.
                    for i in 0..readable {
                        rig.memory.write(slot + u64::from(PIECE) * i as u64, &stamp);
                    }
                    let kicks = rig.kicks.rung();
                    match rig.driver.add_buf(&pieces[..readable], &pieces[readable..], next) {
                        Ok(()) => {
                            let answer = slot + u64::from(PIECE) * readable as u64;
                            added.insert(next, (writable as u32 * PIECE, answer));
                            published.push_back((next, readable, writable));
                            next += 1;
                        }
                        Err(AddError::Full(token)) => {
                            prop_assert_eq!(token, next);
                            prop_assert_eq!(rig.kicks.rung(), kicks + 1, "a full ring kicks");
                            published_count = added.len() + got;
                            device_awake = true;
                        }
                        Err(AddError::Pieces { pieces, .. }) => {
                            prop_assert!(pieces == 0 || pieces > usize::from(shape.size));
                        }
                        Err(other) => prop_assert!(false, "{other}"),
                    }
                }
                Step::Kick => {
                    let kicked = rig.driver.kick().unwrap();
                    device_awake |= kicked;
                    published_count = added.len() + got;
                    prop_assert!(!rig.driver.kick().unwrap(), "a second kick for nothing");
                }
                Step::Begin if burst.is_none() => {
                    // The device sleeps unless it was kicked; a kick is owed whenever it sleeps on published buffers.
                    if !device_awake {
                        prop_assert_eq!(seen, published_count, "the device sleeps through published buffers");
                        continue;
                    }
                    // A kick that comes from here on is for the next burst.
                    device_awake = false;
                    rig.device.begin_burst();
                    burst = Some(false);
                }
                Step::Pop => {
                    let Some(drained) = &mut burst else { continue };
                    let Some(chain) = popped(rig.device.pop()) else {
                        *drained = true;
                        continue;
                    };
                    let (token, readable, writable) = published.pop_front().unwrap();
                    prop_assert_eq!(chain.readable_len(), readable as u32 * PIECE);
                    prop_assert_eq!(chain.writable_len(), writable as u32 * PIECE);
                    if readable > 0 {
                        let mut stamp = [0; 8];
                        chain.read(PIECE * (readable as u32 - 1), &mut stamp).unwrap();
                        prop_assert_eq!(u64::from_le_bytes(stamp), token);
                    }
                    seen += 1;
                    let buffer = (token, readable, writable);
                    waiting.push_back((chain.head(), buffer, false));
                    held.push((chain, buffer));
                }
                Step::End => {
                    let Some(drained) = burst.take() else { continue };
                    // A device that stopped by itself knows that there is more.
                    device_awake |= rig.device.end_burst() || !drained;
                }
                Step::Begin => {}
                Step::Complete { which } => {
                    if held.is_empty() {
                        continue;
                    }
                    let (mut chain, (token, ..)) = held.swap_remove(which % held.len());
                    if chain.writable_len() >= 8 {
                        chain.write(0, &token.to_le_bytes()).unwrap();
                    }
                    rig.device.complete(chain).unwrap();
                    let at = waiting.iter().position(|(_, (other, ..), _)| *other == token).unwrap();
                    waiting[at].2 = true;
                    if shape.in_order {
                        while waiting.front().is_some_and(|(.., done)| *done) {
                            waiting.pop_front();
                            completed += 1;
                        }
                    } else {
                        waiting.remove(at);
                        completed += 1;
                    }
                }
                Step::Interrupt => {
                    if rig.device.needs_interrupt() {
                        driver_awake = true;
                    } else if callbacks && !driver_awake {
                        prop_assert!(completed == got, "the driver sleeps through used buffers");
                    }
                    prop_assert!(!rig.device.needs_interrupt(), "a second interrupt for nothing");
                }
                Step::Restore => {
                    driver_awake |= rig.device.needs_interrupt();
                    let saved = match rig.device.save() {
                        Ok(saved) => saved,
                        Err(reason) => {
                            prop_assert_eq!(reason, QueueError::Overwritten);
                            prop_assert!(shape.layout == Layout::Packed && !shape.in_order && !held.is_empty());
                            continue;
                        }
                    };
                    // What was in flight is popped again: on a split ring in the order of the list, on a packed one in that
                    // of the ring, before anything that was not.
                    let place = |head| saved.in_flight.iter().position(|&other| other == head);
                    let mut again: Vec<_> = waiting.drain(..).collect();
                    again.sort_by_key(|(head, (token, ..), _)| (place(*head), *token));
                    seen -= again.len();
                    again.into_iter().rev().for_each(|(_, buffer, _)| published.push_front(buffer));
                    held.clear();
                    rig.device = Queue::restore(rig.memory.map.clone(), shape.config(), &saved).unwrap();
                    // Whoever restores looks.
                    (burst, device_awake) = (None, true);
                }
                Step::Disable => {
                    rig.driver.disable_cb();
                    callbacks = false;
                }
                Step::Enable => {
                    callbacks = true;
                    let nothing = rig.driver.enable_cb();
                    prop_assert_eq!(nothing, completed == got);
                    // Told otherwise, the driver knows that it has to look.
                    driver_awake |= !nothing;
                }
                Step::Get => match rig.driver.get_buf().unwrap() {
                    Some((token, len)) => {
                        got += 1;
                        if shape.in_order {
                            prop_assert_eq!(added.keys().next(), Some(&token), "not the oldest");
                        }
                        let (writable, answer) = added.remove(&token).expect("returned twice, or never added");
                        prop_assert_eq!(len, writable.min(8));
                        if writable > 0 {
                            prop_assert_eq!(u64::from_le_bytes(rig.memory.read(answer)), token);
                        }
                        if !callbacks {
                            driver_awake = true;
                        }
                    }
                    None => {
                        prop_assert_eq!(completed, got);
                        driver_awake = false;
                    }
                },
            }
        }
        prop_assert_eq!(added.len(), rig.driver.in_flight());
    }
}
