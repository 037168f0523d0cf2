//! A PCI bus with functions of both generations.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| polyvirt_fuzz::pci(data));
