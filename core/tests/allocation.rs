//! What memory costs that nobody uses. On its own: the whole process is measured.
#![cfg(target_os = "linux")]

use polyvirt_core::memory::Pages;

/// Pages of the process that are in memory.
fn resident() -> usize {
    let told = std::fs::read_to_string("/proc/self/statm").unwrap();
    told.split(' ').nth(1).unwrap().parse().unwrap()
}

#[test]
fn pages_are_aligned_and_zero_and_taken_when_they_are_used() {
    let before = resident();
    let regions: Vec<_> = (0..16).map(|_| Pages::allocate(64 << 20)).collect();
    for pages in &regions {
        assert_eq!(pages.as_ptr().addr() % 4096, 0);
        assert_eq!(pages.len(), 64 << 20);
        let mut last = [1; 8];
        pages.read((64 << 20) - 8, &mut last).unwrap();
        assert_eq!(last, [0; 8]);
        pages.write((64 << 20) - 8, &[1; 8]).unwrap();
    }
    let pages = resident() - before;
    assert!(pages < 16 << 20 >> 12, "{pages} pages of 4096 bytes are in memory, of 1 GiB that nobody wrote");
}
