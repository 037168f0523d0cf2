//! Temporary files and folders, which are gone when the program is, whatever ends it: a signal that asks it to end, or
//! its own end while a case that wedged still has some.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::Builder;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;
use tempfile::{NamedTempFile, TempDir};

/// What there is.
static KEPT: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn kept() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file or folder that goes with this.
pub(crate) struct Temporary<T> {
    // Goes first: until then it is kept in mind.
    made: T,
    mark: Mark,
}

/// That a path is to be removed.
struct Mark(PathBuf);

impl Drop for Mark {
    fn drop(&mut self) {
        kept().remove(&self.0);
    }
}

impl<T> Temporary<T> {
    /// What `make` makes. It is kept in mind before a signal could end the program.
    fn new(make: impl FnOnce() -> io::Result<T>, path: impl FnOnce(&T) -> &Path) -> io::Result<Self> {
        let mut kept = kept();
        let made = make()?;
        let path = path(&made).to_owned();
        kept.insert(path.clone());
        Ok(Self { made, mark: Mark(path) })
    }

    /// Hands it over to somebody who gives it another name.
    pub(crate) fn hand_over<U>(self, to: impl FnOnce(T) -> U) -> U {
        let Self { made, mark } = self;
        let done = to(made);
        drop(mark);
        done
    }
}

impl<T> Deref for Temporary<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.made
    }
}

impl<T> DerefMut for Temporary<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.made
    }
}

/// A file.
pub(crate) fn file() -> io::Result<Temporary<NamedTempFile>> {
    Temporary::new(NamedTempFile::new, NamedTempFile::path)
}

/// A file in `folder`, as `builder` has it.
pub(crate) fn file_in(builder: &tempfile::Builder<'_, '_>, folder: &Path) -> io::Result<Temporary<NamedTempFile>> {
    Temporary::new(|| builder.tempfile_in(folder), NamedTempFile::path)
}

/// A folder.
pub(crate) fn folder() -> io::Result<Temporary<TempDir>> {
    Temporary::new(tempfile::tempdir, TempDir::path)
}

/// A folder in `folder`, as `builder` has it.
pub(crate) fn folder_in(builder: &tempfile::Builder<'_, '_>, folder: &Path) -> io::Result<Temporary<TempDir>> {
    Temporary::new(|| builder.tempdir_in(folder), TempDir::path)
}

/// Removes what is left. Nothing new is made while the result is there.
pub(crate) fn remove_all() -> impl Drop {
    let mut kept = kept();
    for path in std::mem::take(&mut *kept) {
        // It may just have gone by itself.
        _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
    }
    kept
}

/// Has signals that ask the program to end do so after all that is temporary is gone. They are caught, not held up: what the
/// program starts has them as it would have without this.
pub(crate) fn remove_on_signals() -> io::Result<()> {
    // What nohup, or a shell for its background, has taken from it does not end it now.
    let ignored = ignored();
    let endings = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| ignored >> (signal - 1) & 1 == 0);
    let mut endings = Signals::new(endings)?;
    let wait = move || {
        let Some(signal) = endings.forever().next() else { return };
        let _nothing_new = remove_all();
        // As it would have ended: who waits for it sees by what.
        _ = emulate_default_handler(signal);
    };
    Builder::new().name("signals".into()).spawn(wait).map(drop)
}

/// The signals that the process was told to ignore, a bit each.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default()
}
