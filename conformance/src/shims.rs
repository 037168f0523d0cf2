//! What each port of a hypervisor costs: the table of their sources, counted when the program runs.

use crate::lines;

/// The most lines of code that a shim may have.
pub(crate) const LIMIT: usize = 300;

/// The sources of one port.
pub(crate) struct Shim {
    /// Its name, as in `--hypervisor`.
    pub(crate) hypervisor: &'static str,
    /// What carries out the four mechanisms: file and text.
    shim: &'static [Source],
    /// What stands below the shim in the hypervisor's place, or does the guest's bidding inside it (the hands).
    below: &'static [(&'static str, &'static [Source])],
}

struct Source {
    #[cfg(test)]
    path: &'static str,
    text: &'static str,
}

macro_rules! source {
    ($path:expr) => {
        Source {
            #[cfg(test)]
            path: $path,
            text: include_str!(concat!("../../hypervisors/src/", $path)),
        }
    };
}

macro_rules! sources {
    ($hypervisor:literal: $($file:literal)*) => {
        &[$(source!(concat!($hypervisor, "/", $file, ".rs"))),*]
    };
}

macro_rules! shim {
    ($hypervisor:literal: $($file:literal)* $(; $part:literal: $($below:literal)*)*) => {
        Shim {
            hypervisor: $hypervisor,
            shim: sources!($hypervisor: $($file)*),
            below: &[$(($part, sources!($hypervisor: $($below)*))),*],
        }
    };
}

/// Every port: a line for each.
pub(crate) const SHIMS: &[Shim] = &[
    shim!("kvm": "mod" "abi" "host" "guest"; "PCI": "pci"; "machine": "machine"; "vCPU": "vcpu"; "hands": "hands"; "machine for Linux": "vmm/mod" "vmm/kernel" "vmm/map" "vmm/ports" "vmm/processor" "vmm/tables"),
    shim!("xen": "mod" "abi" "host" "guest"; "xenstore client": "store" "wire"; "domain kernel": "kernel"; "machine": "machine"; "real calls": "sys/mod" "sys/abi" "sys/arena" "sys/dm/mod" "sys/dm/abi" "sys/dm/foreign" "sys/dm/ioreq" "sys/dm/releases" "sys/evtchn" "sys/gntalloc" "sys/gntdev" "sys/hands" "sys/heap" "sys/privcmd" "sys/xenbus"; "model": "model/mod" "model/domain" "model/events" "model/grants" "model/memory" "model/ring" "model/tree" "model/xenstored"),
    shim!("xen_hvm": "mod" "abi" "host" "domain"; "model": "model"),
    shim!("lguest": "mod" "abi" "host" "guest"; "launcher": "launcher"; "kernel": "kernel"; "hands": "hands"),
    shim!("loopback": "mod" "host" "guest"; "PCI": "pci"),
];

/// What ports share: no port's own, and counted apart.
const SHARED: &[Source] =
    &[source!("absent.rs"), source!("event_loop.rs"), source!("flat_share.rs"), source!("mapping.rs")];

impl Shim {
    /// Lines of code of the shim itself.
    pub(crate) fn lines(&self) -> usize {
        count(self.shim)
    }

    /// Lines of code of each part below the shim.
    pub(crate) fn below(&self) -> Vec<(&'static str, usize)> {
        self.below.iter().map(|(part, sources)| (*part, count(sources))).collect()
    }
}

/// Lines of code that the ports share.
pub(crate) fn shared() -> usize {
    count(SHARED)
}

/// The port called `hypervisor`.
pub(crate) fn find(hypervisor: &str) -> Option<&'static Shim> {
    SHIMS.iter().find(|shim| shim.hypervisor == hypervisor)
}

fn count(sources: &[Source]) -> usize {
    sources.iter().map(|source| lines::of_code(source.text)).sum()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::*;

    #[test]
    fn no_shim_is_over_the_limit() {
        for shim in SHIMS {
            let lines = shim.lines();
            assert!(lines > 0 && lines <= LIMIT, "{}: {lines} lines of code, {LIMIT} allowed", shim.hypervisor);
        }
    }

    #[test]
    fn every_source_of_a_port_is_counted_once() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../hypervisors/src");
        let counted: Vec<&str> = SHIMS
            .iter()
            .flat_map(|shim| shim.shim.iter().chain(shim.below.iter().flat_map(|(_, sources)| *sources)))
            .chain(SHARED)
            .map(|source| source.path)
            .collect();
        let once: BTreeSet<String> = counted.iter().map(|path| (*path).to_owned()).collect();
        assert_eq!(counted.len(), once.len(), "a source is counted twice");
        let there: BTreeSet<String> = sources_below(&root)
            .into_iter()
            .map(|path| path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned())
            // The crate's root only names its modules; test modules are not counted anywhere.
            .filter(|path| path != "lib.rs" && !path.ends_with("tests.rs") && !path.contains("/tests/"))
            .collect();
        assert_eq!(once, there);
    }

    fn sources_below(folder: &Path) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                found.extend(sources_below(&path));
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
        found
    }
}
