//! The pod's network namespace: opened once, checked to be one, entered when everything of the node is open.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

use crate::netlink::Netlink;

/// An open namespace; it stays while this exists, whatever becomes of its path.
pub(crate) struct Netns {
    file: File,
    pub(crate) inode: u64,
}

impl Netns {
    /// Opens the namespace at `path`. Anything else there is refused, and so is the namespace the
    /// plugin itself runs in: it is the node's.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        // Without O_NONBLOCK a named pipe at this path would hold us.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags((OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
            .open(path)?;
        if fstatfs(&file)?.filesystem_type() != NSFS_MAGIC {
            return Err(io::Error::other("it is not a namespace"));
        }
        let (this, node) = (file.metadata()?, fs::metadata("/proc/thread-self/ns/net")?);
        if (this.dev(), this.ino()) == (node.dev(), node.ino()) {
            return Err(io::Error::other("it is the node's own network namespace"));
        }
        Ok(Self {
            file,
            inode: this.ino(),
        })
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Moves the process there, for good, and opens a netlink socket. What it asks of the node goes on through
    /// sockets: one belongs to the namespace it was opened in. So those come first, and nothing of the node that is
    /// found by a path of its namespace (`/proc/sys/net`) may be touched afterwards.
    pub(crate) fn enter(&self) -> io::Result<Netlink> {
        setns(&self.file, CloneFlags::CLONE_NEWNET)?;
        Netlink::open()
    }
}

/// Switches IPv6 on for a device of the namespace that this process is in: some runtimes make namespaces without it. A
/// device has followed `default` when it was made.
pub(crate) fn enable_ipv6(device: &str) -> io::Result<()> {
    for conf in ["all", "default", "lo", device] {
        let path = format!("/proc/sys/net/ipv6/conf/{conf}/disable_ipv6");
        // Writing `all` switches it on for every device, those of others, too.
        if fs::read_to_string(&path)?.trim() != "0" {
            fs::write(&path, "0")?;
        }
    }
    Ok(())
}
