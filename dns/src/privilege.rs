//! Giving up privilege once the ports are open: what reads hostile bytes has none.

use std::fmt;
use std::io;
use std::str::FromStr;

use rustix::process::getuid;
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, Uid, clear_ambient_capability_set, set_capabilities,
    set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

/// Weir's own: "weir" in ASCII, in the range from 1879048192 up that systemd's table of uids leaves to nobody. A
/// number that images use, such as distroless' 65532, would be other people's too.
pub const USER: User = User {
    uid: 2_003_134_834,
    gid: 2_003_134_834,
};

/// Whom to be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
}

/// Not a user that one can become.
#[derive(Debug, thiserror::Error)]
#[error("not UID:GID, both from 1 up")]
pub struct UserError;

impl FromStr for User {
    type Err = UserError;

    fn from_str(text: &str) -> Result<Self, UserError> {
        let (uid, gid) = text.split_once(':').ok_or(UserError)?;
        let read = |text: &str| match text.parse() {
            Ok(0 | u32::MAX) | Err(_) => Err(UserError),
            Ok(id) => Ok(id),
        };
        Ok(Self {
            uid: read(uid)?,
            gid: read(gid)?,
        })
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.uid, self.gid)
    }
}

/// Becomes `user` if we are root, and gives up every capability either way. Acts on the calling
/// thread, so it must be called before there are others: they inherit.
pub fn drop(user: User) -> io::Result<()> {
    if getuid().is_root() {
        let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
        set_thread_groups(&[])?;
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)?;
    }
    clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    set_capabilities(
        None,
        CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        },
    )?;
    Ok(set_no_new_privs(true)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_not_a_user_to_become() {
        for text in ["", "1", "0:1", "1:0", "a:1", "1:1:1", "4294967295:1"] {
            assert!(text.parse::<User>().is_err(), "{text:?}");
        }
        let user: User = "2003134834:2003134834".parse().unwrap();
        assert_eq!(user, USER);
        assert_eq!(user.to_string(), "2003134834:2003134834");
        assert_eq!(USER.uid.to_be_bytes(), *b"weir");
    }
}
