//! `--uid`.

use std::fmt;
use std::str::FromStr;

use nix::errno::Errno;
use nix::unistd::{self, Gid, Uid, setgroups, setresgid, setresuid};

/// Whom a process becomes: one user, one group, no others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cli) struct User {
    pub(in crate::cli) uid: u32,
    pub(in crate::cli) gid: u32,
}

impl User {
    /// Becomes this user for good.
    pub(super) fn become_it(self) -> Result<(), Errno> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        // Groups first: a user other than root may not change them.
        setgroups(&[])?;
        setresgid(gid, gid, gid)?;
        setresuid(uid, uid, uid)
    }
}

impl FromStr for User {
    type Err = String;

    /// `UID` or `UID:GID`; without a group, that of the user.
    fn from_str(text: &str) -> Result<Self, String> {
        // The highest number means "as it is" to the kernel.
        let number = |text: &str| match text.parse() {
            Ok(u32::MAX) | Err(_) => Err(format!("expected UID or UID:GID in numbers, not '{text}'")),
            Ok(number) => Ok(number),
        };
        if let Some((uid, gid)) = text.split_once(':') {
            return Ok(Self { uid: number(uid)?, gid: number(gid)? });
        }
        let uid = number(text)?;
        let known = unistd::User::from_uid(Uid::from_raw(uid)).ok().flatten();
        Ok(Self { uid, gid: known.map_or(uid, |user| user.gid.as_raw()) })
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.uid, self.gid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_a_number_with_or_without_a_group() {
        assert_eq!("7:8".parse(), Ok(User { uid: 7, gid: 8 }));
        assert_eq!("0".parse(), Ok(User { uid: 0, gid: 0 }));
        assert_eq!("3999999999".parse(), Ok(User { uid: 3_999_999_999, gid: 3_999_999_999 }));
        for wrong in ["", "root", "1:", ":1", "-1", "4294967295", "1:4294967295", "1:2:3"] {
            assert!(wrong.parse::<User>().is_err(), "{wrong}");
        }
    }
}
