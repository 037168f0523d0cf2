//! Fetches what guests are put together from.

use std::env::consts;

use super::apt::Apt;
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
    let mut apt = None;
    // Lists that could not be fetched need not be those that a part is on; what cannot be had without them says why.
    let mut stale = None;
    if !missing.is_empty() {
        starting("the lists of packages");
        let fetched = Apt::new(host, &sources(host, &missing))?;
        stale = fetched.update().err().map(|error| error.to_string());
        apt = Some(fetched);
    }
    let fetch = |(part, guests): (Part, Vec<&'static str>)| {
        let name = part.name();
        let outcome = match &apt {
            Some(apt) if missing.contains(&part) => {
                starting(&name);
                let fetched = part.fetch(apt, host, cache).map(|()| false);
                fetched.map_err(|error| stale.clone().map_or(error, LabError::Host))
            }
            _ => Ok(true),
        };
        Fetched { part: name, guests, outcome }
    };
    Ok(parts.into_iter().map(fetch).collect())
}

/// The releases and architectures that `missing` come from, on a host of the architecture `host`.
fn sources<'a>(host: &'a str, missing: &[Part]) -> Vec<(&'static str, &'a str)> {
    let mut sources = Vec::new();
    for part in missing {
        // What is in backports depends on what is in the release itself.
        let (suite, architecture) = part.source(host);
        for suite in [suite, suite.trim_end_matches("-backports")] {
            if !sources.contains(&(suite, architecture)) {
                sources.push((suite, architecture));
            }
        }
    }
    sources
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
            (EMULATORS, &["x86-pc", "x86-microvm", "kvm-nested", "kvm-nested-suite"][..]),
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
