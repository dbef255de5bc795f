//! Links of tcx, by which agents before this one held their programs on devices: two for each pod and each uplink,
//! pinned. They are found, given our programs, and taken off. Kernels before 6.6 have none.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::links::Links;
use super::sys::{self, AttachType, Kind, Seat};
use super::tc::Side;

/// How the names of the pins of uplinks begin; the interface index follows.
const UPLINK: &str = "uplink-";

/// Where earlier agents pinned links of devices.
#[derive(Debug)]
pub(super) struct Former {
    folder: PathBuf,
}

/// A link that an earlier agent pinned.
#[derive(Debug)]
pub(super) struct FormerLink {
    pin: PathBuf,
    link: OwnedFd,
}

impl FormerLink {
    /// Lets go of it: the kernel takes it off its hook in its own time, and nobody waits for the grace period that this
    /// takes.
    ///
    /// # Errors
    /// The pin cannot be removed.
    pub(super) fn remove(self) -> Result<()> {
        let Self { pin, link } = self;
        // The pin is what goes last: a descriptor that was the last to hold a link is waited for.
        drop(link);
        fs::remove_file(&pin).with_context(|| format!("unpin {}", pin.display()))
    }
}

/// The side of a device that a hook of tcx is.
pub(super) fn side_of(hook: AttachType) -> Option<Side> {
    match hook {
        AttachType::TcxIngress => Some(Side::In),
        AttachType::TcxEgress => Some(Side::Out),
        _ => None,
    }
}

/// The hook of tcx at a side of a device.
pub(super) fn hook_at(side: Side) -> AttachType {
    match side {
        Side::In => AttachType::TcxIngress,
        Side::Out => AttachType::TcxEgress,
    }
}

/// How the pins of an uplink's links begin.
pub(super) fn uplink_name(ifindex: u32) -> String {
    format!("{UPLINK}{ifindex}")
}

impl Former {
    pub(super) fn new(bpffs: &Path) -> Self {
        Self {
            folder: Links::folder_in(bpffs),
        }
    }

    /// Gives the link at one side of a device, by the name that its pin begins with, another program. Returns the link if
    /// it is on the device; with a stale pin nothing is to be done here.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn update(
        &self,
        name: &str,
        at: (u32, Side),
        program: BorrowedFd<'_>,
    ) -> Result<Option<FormerLink>> {
        let (ifindex, side) = at;
        let pin = self.folder.join(format!("{name}{}", side.suffix()));
        let link = match sys::open_pinned(&pin) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            link => link.with_context(|| format!("open the pin {}", pin.display()))?,
        };
        let is_there = sys::kind(link.as_fd())? == Kind::Link
            && sys::link_info(link.as_fd())?.seat() == Seat::Device(ifindex, hook_at(side));
        if !is_there {
            return Ok(None);
        }
        let replaced = sys::replace(link.as_fd(), program);
        replaced.with_context(|| format!("replace the program of {}", pin.display()))?;
        Ok(Some(FormerLink { pin, link }))
    }

    /// The uplinks of an earlier agent, by interface index.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub(super) fn uplinks(&self) -> Result<BTreeMap<u32, String>> {
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
            entries => entries.with_context(|| format!("read {}", self.folder.display()))?,
        };
        let mut found = BTreeMap::new();
        for entry in entries {
            let name = entry?.file_name();
            let Some(name) = name.to_str() else { continue };
            for side in Side::BOTH {
                if let Some(pin) = name.strip_suffix(side.suffix())
                    && let Some(index) = pin.strip_prefix(UPLINK).and_then(|it| it.parse().ok())
                {
                    found.insert(index, pin.to_owned());
                }
            }
        }
        Ok(found)
    }
}
