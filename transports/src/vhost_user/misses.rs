//! Translations that are missing: wanted by the device, not yet of the front end.

use std::collections::BTreeMap;

use polyvirt_core::memory::Access;

use super::messages::Iotlb;

/// The most that are kept: more than all queues can wait for at a time.
const MISSES: usize = 1024;

/// What is missing, by device address and access.
#[derive(Default)]
pub(super) struct Misses(BTreeMap<(u64, u8), Miss>);

struct Miss {
    len: u64,
    /// Whether it was asked for.
    asked: bool,
}

impl Misses {
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// One more, if it is not known.
    pub(super) fn add(&mut self, iova: u64, len: u64, access: Access) {
        let key = (iova, access.bits());
        if self.0.len() >= MISSES && !self.0.contains_key(&key) {
            // Of what was asked for, whoever still wants it will find it there or ask again. Who was asked for so much and
            // reads nothing is not asked for more.
            self.ask_again();
            if self.0.len() >= MISSES {
                return;
            }
        }
        self.0.entry(key).or_insert(Miss { len, asked: false });
    }

    /// There is a translation of `size` bytes at `iova` now.
    pub(super) fn found(&mut self, iova: u64, size: u64) {
        let end = iova.saturating_add(size - 1);
        let found: Vec<_> = self.0.range((iova, 0)..=(end, u8::MAX)).map(|(key, _)| *key).collect();
        for key in found {
            self.0.remove(&key);
        }
    }

    /// What was asked for is asked for again, once it is missing again.
    pub(super) fn ask_again(&mut self) {
        self.0.retain(|_, miss| !miss.asked);
    }

    /// What is to be asked for; each once.
    pub(super) fn take(&mut self) -> Vec<Iotlb> {
        let new = self.0.iter_mut().filter(|(_, miss)| !miss.asked);
        let ask = |(&(iova, access), miss): (&(u64, u8), &mut Miss)| {
            miss.asked = true;
            Iotlb { iova, size: miss.len, user: 0, access, kind: Iotlb::MISS }
        };
        new.map(ask).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_asked_for_once_until_it_is_to_be_asked_again() {
        let mut misses = Misses::default();
        for _ in 0..2 {
            misses.add(0x1000, 16, Access::READ);
            misses.add(0x1000, 16, Access::WRITE);
        }
        assert_eq!(misses.take().len(), 2);
        misses.add(0x1000, 16, Access::READ);
        assert_eq!(misses.take(), []);
        misses.ask_again();
        misses.add(0x1000, 16, Access::READ);
        misses.add(0x3000, 16, Access::READ);
        misses.found(0x1000, 0x2000);
        assert_eq!(misses.take().len(), 1);
    }

    #[test]
    fn however_many_there_are_few_are_kept_and_the_newest_is_asked_for() {
        let mut misses = Misses::default();
        (0..10 * MISSES as u64).for_each(|page| misses.add(page << 12, 1, Access::READ));
        assert_eq!(misses.take().len(), MISSES, "unread");
        misses.add(u64::MAX, 1, Access::READ);
        assert_eq!(misses.take().len(), 1, "read");
    }
}
