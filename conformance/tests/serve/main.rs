//! `polyvirt serve` as those meet it who start it, and those who attack it: what it opens, what it keeps, what it tells.
#![cfg(target_os = "linux")]

mod front;
mod image;
mod injected;
mod sandbox;
mod server;
mod socket;
