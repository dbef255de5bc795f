//! What lets a weir-dns that SELinux confines use files that the agent, which it does not, makes on the node.

use std::fs;
use std::io;
use std::path::Path;

use rustix::fs::{XattrFlags, setxattr};

/// Files of containers, of whichever container: what `:z` gives a volume.
const LABEL: &[u8] = b"system_u:object_r:container_file_t:s0\0";
const ATTRIBUTE: &str = "security.selinux";

/// Labels a folder for containers; what is made in it from then on inherits that. Where SELinux is not in use
/// nothing happens.
///
/// # Errors
/// The label cannot be set.
pub fn label_for_containers(folder: &Path) -> io::Result<()> {
    let own = fs::read("/proc/self/attr/current").unwrap_or_default();
    match is_context(&own) {
        true => Ok(setxattr(folder, ATTRIBUTE, LABEL, XattrFlags::empty())?),
        false => Ok(()),
    }
}

/// Whether this is a label of SELinux: user, role, type and level. AppArmor says its profile in the same place.
fn is_context(own: &[u8]) -> bool {
    own.split(|byte| *byte == b':').count() >= 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_of_apparmor_is_no_label() {
        for (own, expected) in [
            ("system_u:system_r:spc_t:s0\0", true),
            ("system_u:system_r:container_t:s0:c1,c2\0", true),
            ("unconfined\n", false),
            ("cri-containerd.apparmor.d (enforce)\n", false),
            ("", false),
        ] {
            assert_eq!(is_context(own.as_bytes()), expected, "{own}");
        }
    }
}
