//! vhost-user, message by message: what a front end may send, what it may not, and what becomes of its memory.
#![cfg(target_os = "linux")]

mod crowded;
mod faults;
mod features;
mod front;
mod held;
mod held_driver;
mod inflight;
mod iotlb;
mod log;
mod memory;
mod moves;
mod negotiation;
mod order;
mod toy;
mod turns;
