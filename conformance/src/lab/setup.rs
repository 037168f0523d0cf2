//! Fetches what guests are put together from.

use std::collections::BTreeMap;
use std::env::consts;

use super::apt::{Apt, Archive};
use super::guests::Guest;
use super::parts::Part;
use super::{Cache, LabError};

/// What became of one part.
pub(crate) struct Fetched {
    /// Its name in the cache.
    pub(crate) part: String,
    /// The guests that need it.
    pub(crate) guests: Vec<&'static str>,
    /// Whether it had been there before; or why it cannot be had.
    pub(crate) outcome: Result<bool, LabError>,
}

/// Fetches what `guests` need and is not there yet; `starting` hears each part's name before it is fetched.
pub(crate) fn setup(
    cache: &Cache,
    guests: &[&'static Guest],
    starting: &mut dyn FnMut(&str),
) -> Result<Vec<Fetched>, LabError> {
    let parts = parts(guests);
    let host = debian_architecture()?;
    let missing: Vec<_> = parts.iter().map(|(part, _)| *part).filter(|part| !part.is_there(cache)).collect();
    let archives = if missing.is_empty() {
        Vec::new()
    } else {
        starting("the names of the archives");
        Archive::of_the_host(host)?
    };
    let mut lists = BTreeMap::new();
    let mut fetch = |part: &Part| {
        let (_, architecture) = part.source(host);
        if !lists.contains_key(architecture) {
            starting(&format!("the lists of packages for {architecture}"));
            lists.insert(architecture, Lists::fetch(&archives, architecture, &suites(host, architecture, &missing))?);
        }
        starting(&part.name());
        let Some(Lists { apt, stale }) = lists.get(architecture) else { return Ok(false) };
        let fetched = part.fetch(apt, cache).map(|()| false);
        fetched.map_err(|error| stale.clone().map_or(error, LabError::Host))
    };
    let outcome = |(part, guests): (Part, Vec<&'static str>)| {
        let outcome = if missing.contains(&part) { fetch(&part) } else { Ok(true) };
        Fetched { part: part.name(), guests, outcome }
    };
    Ok(parts.into_iter().map(outcome).collect())
}

/// apt with the lists for an architecture.
struct Lists {
    apt: Apt,
    /// Why some cannot be had, which need not be those that a part is on: what cannot be had without them says so.
    stale: Option<String>,
}

impl Lists {
    fn fetch(archives: &[Archive], architecture: &str, suites: &[&str]) -> Result<Self, LabError> {
        let apt = Apt::new(archives, architecture, suites)?;
        let stale = apt.update().err().map(|error| error.to_string());
        Ok(Self { apt, stale })
    }
}

/// The releases that those of `missing` come from that are for `architecture`, on a host of the architecture `host`.
fn suites(host: &str, architecture: &str, missing: &[Part]) -> Vec<&'static str> {
    let mut suites = Vec::new();
    for (suite, _) in missing.iter().map(|part| part.source(host)).filter(|source| source.1 == architecture) {
        // What is in backports depends on what is in the release itself.
        for suite in [suite, suite.trim_end_matches("-backports")] {
            if !suites.contains(&suite) {
                suites.push(suite);
            }
        }
    }
    suites
}

/// Each part that any of `guests` needs, with the names of those that do.
fn parts(guests: &[&'static Guest]) -> Vec<(Part, Vec<&'static str>)> {
    let mut parts: Vec<(Part, Vec<&'static str>)> = Vec::new();
    for guest in guests {
        for part in Part::all(guest) {
            match parts.iter_mut().find(|(known, _)| *known == part) {
                Some((_, users)) if users.contains(&guest.name) => {}
                Some((_, users)) => users.push(guest.name),
                None => parts.push((part, vec![guest.name])),
            }
        }
    }
    parts
}

/// The host's architecture by Debian's name.
fn debian_architecture() -> Result<&'static str, LabError> {
    match consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => Err(LabError::Host(format!("the lab runs on x86_64 and aarch64, not on {other}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::guests::{STABLE, guests};
    use super::super::parts::EMULATORS;
    use super::*;

    #[test]
    fn a_part_that_two_guests_need_is_fetched_once() {
        let all: Vec<_> = guests().iter().collect();
        let parts = parts(&all);
        for (release, users) in [
            (EMULATORS, &["x86-pc", "x86-microvm", "kvm-nested", "kvm-nested-suite", "ovmf"][..]),
            (STABLE, &["xen-dom0", "xen-domu", "xen-pvh"]),
        ] {
            let emulator = Part::Emulator("qemu-system-x86", release);
            let found = parts.iter().filter(|(part, _)| *part == emulator).map(|(_, users)| &users[..]);
            assert_eq!(found.collect::<Vec<_>>(), [users], "{release}");
        }
        let mut names: Vec<_> = parts.iter().map(|(part, _)| part.name()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), parts.len(), "no two parts are kept in one place");
    }
}
