//! How many files may be open at once.

use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

use super::CliError;

/// Allows as many as the process may allow itself; how many that are.
pub(super) fn raise_open_files() -> rlim_t {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return rlim_t::MAX };
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    }
}

/// At least `needed` files can be open at once, else that is said before anything is begun.
pub(super) fn need_open_files(needed: rlim_t) -> Result<(), CliError> {
    // What is enough stays as it is: programs that are started inherit it.
    if getrlimit(Resource::RLIMIT_NOFILE).is_ok_and(|(soft, _)| soft >= needed) {
        return Ok(());
    }
    match raise_open_files() {
        allowed if allowed < needed => Err(CliError::Mistake(format!(
            "only {allowed} files may be open at once, and this needs up to {needed}: ulimit -n {needed}"
        ))),
        _ => Ok(()),
    }
}
