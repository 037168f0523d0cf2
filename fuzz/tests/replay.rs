//! The kept inputs: what each reaches is reached by every test run, and what once failed does not fail again.

use std::fs;
use std::path::Path;

use polyvirt_fuzz::TARGETS;

#[test]
fn every_kept_input_passes_its_target() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    for (name, target) in TARGETS {
        let mut paths: Vec<_> = fs::read_dir(seeds.join(name)).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        assert!(paths.len() >= 10, "{name} has only {} inputs", paths.len());
        for path in paths {
            let input = fs::read(&path).unwrap();
            assert!(
                std::panic::catch_unwind(|| target(&input)).is_ok(),
                "{} fails its target; `fuzz/run {name} 0 {0}` shows how",
                path.display()
            );
        }
    }
}

#[test]
fn the_empty_input_and_long_ones_of_one_byte_pass_every_target() {
    for (_, target) in TARGETS {
        target(&[]);
        for byte in 0..=u8::MAX {
            target(&[byte; 256]);
        }
    }
}
