//! Changes of memory, also under queues that run: a guest's memory grows, shrinks and moves while it does.

use std::os::fd::OwnedFd;

use super::body::Body;
use super::device::Backend;
use super::error::ServeError;
use super::memory::Memory;
use super::messages::*;
use super::regions::RegionError;

/// Where the areas of a queue are in our address space.
type Places = [usize; 3];

impl Backend {
    pub(super) fn set_mem_table(&mut self, body: &Body<'_>, fds: Vec<OwnedFd>) -> Result<(), ServeError> {
        let count = match body.payload.first_chunk::<4>() {
            Some(&count) => u32::from_ne_bytes(count) as usize,
            None => return Err(body.size(8)),
        };
        if count > MEM_TABLE_MAX {
            return Err(body.refused(format!("{count} regions, expected at most {MEM_TABLE_MAX}")));
        }
        body.descriptors(&fds, count)?;
        // User Mode Linux sends the payload of two regions and announces one: what is not announced does not count.
        let announced = 8 + count * Region::LEN;
        if body.payload.len() < announced || body.payload.len() > 8 + MEM_TABLE_MAX * Region::LEN {
            return Err(body.size(announced));
        }
        let regions = body.payload[8..announced].chunks_exact(Region::LEN).map(Region::from_bytes);
        let regions = regions.zip(fds).collect();
        self.change_memory(body, |memory| memory.replace(regions))
    }

    /// Changes memory. A queue whose areas are elsewhere then goes on there. One whose areas are gone rests until they are
    /// back: a front end that changes a region takes it away and hands it over again.
    pub(super) fn change_memory(
        &mut self,
        body: &Body<'_>,
        change: impl FnOnce(&Memory) -> Result<(), RegionError>,
    ) -> Result<(), ServeError> {
        let running: Vec<_> = (0..self.rings.len()).filter(|&index| self.rings[index].running).collect();
        let places = |backend: &Self| running.iter().map(|&index| backend.places(index)).collect::<Vec<_>>();
        let before = places(self);
        change(&self.memory).map_err(|error| body.refused(error))?;
        // What a queue that runs has of its memory stays mapped, so what is at the same place is the same.
        let after = places(self);
        for (&index, (before, after)) in running.iter().zip(before.iter().zip(&after)) {
            if before != after {
                tracing::info!(index, there = after.is_some(), "the memory of a queue is another");
                self.stop(index);
                self.rings[index].rests = true;
            }
        }
        for index in 0..self.rings.len() {
            if self.rings[index].rests {
                self.update(index)?;
                // What was made available meanwhile was kicked for before.
                self.rings[index].due = true;
            }
        }
        Ok(())
    }

    /// Whether queue `index` waits for its memory to come back.
    pub(super) fn rests(&mut self, index: usize) -> bool {
        self.rings[index].rests &= self.places(index).is_none();
        self.rings[index].rests
    }

    /// Where the areas of queue `index` are, if all of them are there.
    fn places(&self, index: usize) -> Option<Places> {
        let areas = self.areas(index).ok()??;
        let places = areas.map(|(address, len, access)| self.memory.place(address, len, access));
        let [descriptors, driver, device] = places;
        Some([descriptors?, driver?, device?])
    }
}
