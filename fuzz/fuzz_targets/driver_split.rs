//! The driver role on a split ring with a hostile device.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| polyvirt_fuzz::driver_split(data));
