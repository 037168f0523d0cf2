//! Real guests: unmodified Debian kernels whose own drivers meet our devices.
//!
//! A guest is data ([`guests()`]): a kernel package with the modules it needs, the machine that runs it, the disks it
//! finds there. [`setup`](setup::setup) fetches what that takes, [`run`](run::run) boots it and makes a cell of what the
//! guest tells and of what its disks hold afterwards.

mod apt;
mod boot;
mod cache;
mod cpio;
mod disk;
mod dom0;
mod domu;
mod firmware;
mod guests;
mod initramfs;
mod judge;
mod kernel;
mod libraries;
mod machine;
mod nested;
mod parts;
mod run;
mod server;
mod setup;
mod suite;
mod tool;
mod transcript;
mod xen;

pub(crate) use cache::Cache;
pub(crate) use guests::{Guest, guests};
pub(crate) use run::{Step, run};
pub(crate) use setup::{Fetched, setup};

use std::io;
use std::path::{Path, PathBuf};

/// Why a guest's parts cannot be had, or a guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LabError {
    /// Neither XDG_CACHE_HOME nor HOME says where a cache may be.
    #[error("no folder for the lab: neither XDG_CACHE_HOME nor HOME is set")]
    NoCache,
    /// A program that the lab starts is not there.
    #[error("{program} cannot be started: {error}")]
    Missing {
        /// The program as it was named.
        program: String,
        /// What the system said.
        error: io::Error,
    },
    /// A program that the lab started did not do its work.
    #[error("{command}: {said}")]
    Failed {
        /// The program with its first argument.
        command: String,
        /// Its last words, or how it ended.
        said: String,
    },
    /// A file or folder cannot be read or written.
    #[error("{}: {error}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// A package does not hold what it used to.
    #[error("the package {package} has no {missing}")]
    Package {
        /// The package.
        package: String,
        /// What was looked for.
        missing: String,
    },
    /// The host, or the network it is in, is none for the lab.
    #[error("{0}")]
    Host(String),
    /// Something has to be fetched first.
    #[error("{what} is not there: polyvirt lab setup {guest} fetches it")]
    NotSetUp {
        /// The part.
        what: String,
        /// The guest that needs it.
        guest: &'static str,
    },
}

impl LabError {
    /// The same of a guest that is to be booted, so that nothing may be missing.
    fn in_place_of_a_boot(self) -> Self {
        Self::Failed { command: "this guest has to be booted".to_owned(), said: self.to_string() }
    }

    /// Whether a part is missing here, so that there is nothing to judge.
    fn is_absence(&self) -> bool {
        matches!(self, Self::NotSetUp { .. } | Self::Host(_) | Self::NoCache)
    }

    /// For `map_err`: `path` could not be read or written.
    fn file(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        |error| Self::File { path, error }
    }
}
