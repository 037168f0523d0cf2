//! The device role on a packed ring in hostile memory.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| polyvirt_fuzz::device_packed(data));
