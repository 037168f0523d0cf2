//! The folder in which the lab keeps what it fetched.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::LabError;
use crate::temporary::{self, Temporary};

/// The lab's folder.
pub(crate) struct Cache {
    root: PathBuf,
}

impl Cache {
    /// `polyvirt/lab` in the user's folder for caches, as the XDG base directory specification has it.
    pub(crate) fn of_the_user() -> Result<Self, LabError> {
        let absolute = |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let caches = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
        Ok(Self::at(&caches.ok_or(LabError::NoCache)?.join("polyvirt/lab")))
    }

    /// The folder `root`, which need not exist.
    pub(super) fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Where `name` is, or would be.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// An empty folder beside what is kept, for what is under construction.
    pub(super) fn scratch(&self) -> Result<Temporary<TempDir>, LabError> {
        fs::create_dir_all(&self.root).map_err(LabError::file(&self.root))?;
        temporary::folder_in(tempfile::Builder::new().prefix("fetching-"), &self.root)
            .map_err(LabError::file(&self.root))
    }

    /// Makes `made`, a finished folder, what is kept as `name`. Who looks sees the old one, none, or the new one.
    pub(super) fn keep(&self, made: &Path, name: &str) -> Result<(), LabError> {
        let place = self.path(name);
        if let Some(above) = place.parent() {
            fs::create_dir_all(above).map_err(LabError::file(above))?;
        }
        if place.exists() {
            fs::remove_dir_all(&place).map_err(LabError::file(&place))?;
        }
        fs::rename(made, &place).map_err(LabError::file(&place))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finished_folder_takes_the_place_of_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(&folder.path().join("not/yet"));
        for content in ["old", "new"] {
            let scratch = cache.scratch().unwrap();
            let made = scratch.path().join("made");
            fs::create_dir(&made).unwrap();
            fs::write(made.join("file"), content).unwrap();
            cache.keep(&made, "kernels/one").unwrap();
            assert_eq!(fs::read_to_string(cache.path("kernels/one").join("file")).unwrap(), content);
        }
        let kept: Vec<_> = fs::read_dir(cache.path("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(kept, ["kernels"], "nothing is left of the scratch folders");
    }
}
