//! Links: one for each hook, pinned, replaced in place, never detached by an agent that ends.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::sys::{self, AttachType, LinkInfo};

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
    /// Makes the folder if it is not there.
    ///
    /// # Errors
    /// It cannot be made: no bpffs, or no permission.
    pub(super) fn open(bpffs: &Path) -> io::Result<Self> {
        let folder = bpffs.join("links");
        fs::create_dir_all(&folder)?;
        Ok(Self { folder })
    }

    /// Puts a program on a side of a device.
    ///
    /// # Errors
    /// The kernel refuses; then the hook is as it was.
    pub(super) fn place_on_device(
        &self,
        program: BorrowedFd<'_>,
        device: &str,
        ifindex: u32,
        attach_type: AttachType,
    ) -> Result<Placed, LinkError> {
        let pin = self.device_pin(device, attach_type);
        self.place(
            &pin,
            program,
            |info| info.target[0] == ifindex,
            || sys::link_device(program, ifindex, attach_type),
        )
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
        let pin = self.folder.join(name);
        self.place(
            &pin,
            program,
            |info| info.cgroup() == id,
            || sys::link_cgroup(program, folder.as_fd(), attach_type),
        )
    }

    /// Where the link of a side of a device is pinned.
    pub(super) fn device_pin(&self, device: &str, attach_type: AttachType) -> PathBuf {
        let side = if attach_type == AttachType::TcxIngress {
            "in"
        } else {
            "out"
        };
        self.folder.join(format!("{device}-{side}"))
    }

    /// Where a link is pinned, by the name of its hook.
    pub(super) fn pin(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Takes a program off a hook. One that is not there is no error.
    ///
    /// # Errors
    /// The pin cannot be removed.
    pub(super) fn remove(&self, pin: &Path) -> Result<(), LinkError> {
        match fs::remove_file(pin) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(LinkError {
                action: "unpin",
                hook: label(pin),
                source,
            }),
            _ => Ok(()),
        }
    }

    /// Removes the pins of pods' devices that are not there; returns the names of the pins.
    ///
    /// # Errors
    /// The folder cannot be read, or a pin not be removed.
    pub(super) fn remove_strays(&self, is_there: impl Fn(&str) -> bool) -> io::Result<Vec<String>> {
        let mut strays = Vec::new();
        for pin in fs::read_dir(&self.folder)? {
            let pin = pin?;
            let name = pin.file_name().to_string_lossy().into_owned();
            let sides = ["-in", "-out"];
            let device = sides.iter().find_map(|side| name.strip_suffix(side));
            if device.is_some_and(|device| !is_there(device)) {
                fs::remove_file(pin.path())?;
                strays.push(name);
            }
        }
        Ok(strays)
    }

    /// What is pinned for a hook.
    pub(super) fn info(&self, pin: &Path) -> io::Result<LinkInfo> {
        sys::link_info(sys::open_pinned(pin)?.as_fd())
    }

    fn place(
        &self,
        pin: &Path,
        program: BorrowedFd<'_>,
        is_current: impl Fn(&LinkInfo) -> bool,
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
            Ok(link) => {
                let info = sys::link_info(link.as_fd()).map_err(failed("read the link of"))?;
                if is_current(&info) {
                    sys::replace(link.as_fd(), program)
                        .map_err(failed("replace the program of"))?;
                    return Ok(Placed::Replaced);
                }
                // The device or cgroup went, and another has its name: this link carries nothing.
                fs::remove_file(pin).map_err(failed("remove the stale pin of"))?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("open the pin of")(error)),
        }
        let link = attach().map_err(failed("attach to"))?;
        sys::pin(link.as_fd(), pin).map_err(failed("pin"))?;
        Ok(Placed::Attached)
    }
}

/// What an agent must never do: between this and the next attachment nothing is balanced or judged.
#[cfg(feature = "broken-detach-first")]
pub(super) fn detach_all(bpffs: &Path) -> io::Result<()> {
    tracing::warn!("built with broken-detach-first: detaching every program");
    match fs::read_dir(bpffs.join("links")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        pins => pins?.try_for_each(|pin| fs::remove_file(pin?.path())),
    }
}

fn label(pin: &Path) -> String {
    pin.file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}
