//! The state machine behind the registers of virtio-mmio.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| polyvirt_fuzz::registers(data));
