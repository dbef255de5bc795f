//! Links: one for each hook of the node's cgroup, pinned, replaced in place, never detached by an agent that ends.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::sys::{self, AttachType, Kind, LinkInfo, Seat};

/// Why a program is not on its hook.
#[derive(Debug, Error)]
#[error("{action} {hook}: {source}")]
pub struct LinkError {
    action: &'static str,
    hook: String,
    source: io::Error,
}

/// What came of putting a program on a hook.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Placed {
    /// The link was there, and holds another program from now on.
    Replaced,
    /// There was none, or a stale one.
    Attached,
}

/// The folder of the pinned links.
#[derive(Clone, Debug)]
pub(super) struct Links {
    folder: PathBuf,
}

impl Links {
    /// Where links are pinned, below a pin folder.
    pub(super) fn folder_in(bpffs: &Path) -> PathBuf {
        bpffs.join("links")
    }

    /// Makes the folder if it is not there.
    ///
    /// # Errors
    /// It cannot be made: no bpffs, or no permission.
    pub(super) fn open(bpffs: &Path) -> io::Result<Self> {
        let folder = Self::folder_in(bpffs);
        fs::create_dir_all(&folder)?;
        Ok(Self { folder })
    }

    /// Puts a program on a cgroup.
    ///
    /// # Errors
    /// The kernel refuses; then the hook is as it was.
    pub(super) fn place_on_cgroup(
        &self,
        program: BorrowedFd<'_>,
        cgroup: &Path,
        name: &str,
        attach_type: AttachType,
    ) -> Result<Placed, LinkError> {
        let failed = |source| LinkError {
            action: "open the cgroup for",
            hook: name.to_owned(),
            source,
        };
        let folder = fs::File::open(cgroup).map_err(failed)?;
        let id = folder.metadata().map_err(failed)?.ino();
        let pin = self.pin(name);
        place(&pin, program, Seat::Cgroup(id, attach_type), || {
            sys::link(program, folder.as_fd(), attach_type)
        })
    }

    /// Where a link is pinned, by the name of its hook.
    pub(super) fn pin(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// What is pinned for a hook.
    pub(super) fn info(&self, pin: &Path) -> io::Result<LinkInfo> {
        pinned_link(pin)
    }
}

/// What the link at a path says of itself.
///
/// # Errors
/// Nothing is pinned there, or no link.
pub(super) fn pinned_link(pin: &Path) -> io::Result<LinkInfo> {
    let object = sys::open_pinned(pin)?;
    match sys::kind(object.as_fd())? {
        Kind::Link => sys::link_info(object.as_fd()),
        other => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("what is pinned is no link ({other:?})"),
        )),
    }
}

/// Through the pinned link if it sits where it should, else through a new one.
fn place(
    pin: &Path,
    program: BorrowedFd<'_>,
    seat: Seat,
    attach: impl FnOnce() -> io::Result<OwnedFd>,
) -> Result<Placed, LinkError> {
    let failed = |action| {
        move |source| LinkError {
            action,
            hook: label(pin),
            source,
        }
    };
    match sys::open_pinned(pin) {
        Ok(object) => {
            let replaced = replace(&object, program, seat);
            if replaced.map_err(failed("replace the program of"))? {
                return Ok(Placed::Replaced);
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("open the pin of")(error)),
    }
    let link = attach().map_err(failed("attach to"))?;
    pin_over(&link, pin).map_err(failed("pin"))?;
    Ok(Placed::Attached)
}

/// False when what is pinned is of no use for this hook: no link, or one whose device or cgroup went
/// and whose name another has now.
fn replace(object: &OwnedFd, program: BorrowedFd<'_>, seat: Seat) -> io::Result<bool> {
    if sys::kind(object.as_fd())? != Kind::Link || sys::link_info(object.as_fd())?.seat() != seat {
        return Ok(false);
    }
    match sys::replace(object.as_fd(), program) {
        // It went in this very moment.
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(false),
        other => other.map(|()| true),
    }
}

/// Pins beside what is there and renames over it: the old one is let go of when the new one is safe.
fn pin_over(link: &OwnedFd, pin: &Path) -> io::Result<()> {
    match sys::pin(link.as_fd(), pin) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => return other,
    }
    // A bpffs takes no names with a dot.
    let mut fresh = pin.as_os_str().to_owned();
    fresh.push("-new");
    let fresh = PathBuf::from(fresh);
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    sys::pin(link.as_fd(), &fresh)?;
    fs::rename(&fresh, pin)
}

fn label(pin: &Path) -> String {
    pin.file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}
