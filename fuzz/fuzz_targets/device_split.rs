//! The device role on a split ring in hostile memory.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| polyvirt_fuzz::device_split(data));
