//! What a served device may still do once it is set up: use what it holds. A front end that takes the process over finds
//! no path that opens, no capability, no program to run.
//!
//! Every layer is a thread's and inherited by the threads that it starts, so this comes before there are others.

mod system_calls;
mod user;

use caps::errors::CapsError;
use caps::{CapSet, Capability};
use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, Ruleset, RulesetAttr as _, RulesetError,
    RulesetStatus, Scope,
};
use nix::errno::Errno;
use nix::sys::prctl::set_no_new_privs;

pub(super) use user::User;

/// Why a layer cannot be put on, though there is one.
#[derive(Debug, thiserror::Error)]
pub(super) enum SandboxError {
    #[error("--uid {user}: {error}")]
    User { user: User, error: Errno },
    #[error("sandbox: capabilities: {0} (--no-sandbox goes on without)")]
    Capabilities(#[from] CapsError),
    #[error("sandbox: NO_NEW_PRIVS: {0} (--no-sandbox goes on without)")]
    Privileges(Errno),
    #[error("sandbox: Landlock: {0} (--no-sandbox goes on without)")]
    Landlock(#[from] RulesetError),
    #[error("sandbox: seccomp: {0} (--no-sandbox goes on without)")]
    Seccomp(#[from] seccompiler::Error),
    #[error("sandbox: seccomp: {0} (--no-sandbox goes on without)")]
    List(#[from] seccompiler::BackendError),
}

/// Becomes `user` if there is one, and gives up all that is not needed any more. A sentence for each layer that this
/// kernel does not have.
pub(super) fn enter(user: Option<User>) -> Result<Vec<&'static str>, SandboxError> {
    let mut missing = Vec::new();
    // The last that can be done with capabilities.
    forget_bounding()?;
    become_user(user)?;
    for set in [CapSet::Ambient, CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
        caps::clear(None, set)?;
    }
    set_no_new_privs().map_err(SandboxError::Privileges)?;
    if !open_nothing()? {
        missing.push("this kernel has no Landlock: the sandbox goes without it");
    }
    missing.extend(system_calls::restrict()?);
    Ok(missing)
}

/// Becomes `user`, if there is one.
pub(super) fn become_user(user: Option<User>) -> Result<(), SandboxError> {
    user.map_or(Ok(()), |user| user.become_it().map_err(|error| SandboxError::User { user, error }))
}

/// No program could bring capabilities back. Who may not do this could not use them either.
fn forget_bounding() -> Result<(), CapsError> {
    if !caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        return Ok(());
    }
    caps::runtime::thread_all_supported()
        .into_iter()
        .try_for_each(|capability| caps::drop(None, CapSet::Bounding, capability))
}

/// From here on no path can be opened, whatever the kernel's Landlock knows of is forbidden. False if there is none.
fn open_nothing() -> Result<bool, RulesetError> {
    // The newest that the crate knows; the kernel takes what it knows of it.
    let abi = ABI::V10;
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::{self, Write as _};
    use std::net::TcpStream;
    use std::os::unix::net::UnixStream;
    use std::process::Command;
    use std::thread;

    use super::*;

    /// What `test` says on a thread of its own: the layers end with it.
    fn alone<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
        thread::spawn(test).join().unwrap()
    }

    fn refused<T>(result: io::Result<T>) -> io::ErrorKind {
        result.map(|_| ()).unwrap_err().kind()
    }

    #[test]
    fn landlock_alone_opens_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_owned();
        alone(move || {
            if !open_nothing().unwrap() {
                return println!("skipped: this kernel has no Landlock");
            }
            assert_eq!(refused(File::open(&path)), io::ErrorKind::PermissionDenied);
            assert_eq!(refused(fs::read_dir("/")), io::ErrorKind::PermissionDenied);
            assert_eq!(refused(fs::remove_file(&path)), io::ErrorKind::PermissionDenied);
            assert_eq!(refused(File::create(path.with_extension("new"))), io::ErrorKind::PermissionDenied);
            assert_eq!(refused(Command::new("/bin/true").status()), io::ErrorKind::PermissionDenied);
        });
    }

    #[test]
    fn the_list_alone_has_no_call_that_opens_connects_or_runs_anything() {
        let temporary = tempfile::NamedTempFile::new().unwrap();
        let path = temporary.path().to_owned();
        let mut file = temporary.reopen().unwrap();
        alone(move || {
            set_no_new_privs().unwrap();
            if let Some(missing) = system_calls::restrict().unwrap() {
                return println!("skipped: {missing}");
            }
            let no_such_call = io::ErrorKind::Unsupported;
            assert_eq!(refused(File::open(&path)), no_such_call);
            assert_eq!(refused(fs::remove_file(&path)), no_such_call);
            assert_eq!(refused(fs::metadata(&path)), no_such_call);
            assert_eq!(refused(UnixStream::connect("/")), no_such_call);
            assert_eq!(refused(UnixStream::pair()), no_such_call);
            assert_eq!(refused(TcpStream::connect("127.0.0.1:1")), no_such_call);
            assert_eq!(refused(Command::new("/bin/true").status()), no_such_call);
            // What it holds it goes on with, and so do the threads that it starts.
            file.write_all(b"there").unwrap();
            let len = thread::scope(|scope| scope.spawn(|| file.metadata().unwrap().len()).join().unwrap());
            assert_eq!(len, 5);
            file.set_len(3).unwrap();
            file.sync_data().unwrap();
        });
        assert_eq!(fs::read(temporary.path()).unwrap(), b"the");
    }

    #[test]
    fn no_capability_is_left_in_any_set() {
        alone(|| {
            let could = caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).unwrap();
            forget_bounding().unwrap();
            for set in [CapSet::Ambient, CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
                caps::clear(None, set).unwrap();
                assert!(caps::read(None, set).unwrap().is_empty());
            }
            match could {
                true => assert!(caps::read(None, CapSet::Bounding).unwrap().is_empty()),
                false => println!("skipped: the bounding set, for want of CAP_SETPCAP"),
            }
        });
    }
}
