//! What fuzzing found worth keeping is run again: `fuzz/seeds`, a folder for each target.

use std::fs;
use std::path::Path;

use polyvirt_fuzz::TARGETS;

#[test]
fn every_seed_of_every_target_is_survived() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds");
    for (name, target) in TARGETS {
        let folder = seeds.join(name);
        let mut files: Vec<_> =
            fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())).collect();
        assert!(!files.is_empty(), "no seeds for {name}");
        files.sort_by_key(|file| file.as_ref().map(fs::DirEntry::file_name).unwrap_or_default());
        println!("{name}: {} seeds", files.len());
        for file in files {
            let path = file.unwrap().path();
            // A target that breaks a promise panics: the seed is the last one told.
            println!("{}", path.display());
            target(&fs::read(&path).unwrap());
        }
    }
}
