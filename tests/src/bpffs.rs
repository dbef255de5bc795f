//! A private BPF file system in a directory of the run.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A mounted bpffs; unmounted (pins gone with it) and its directory removed on drop.
#[derive(Debug)]
pub struct Bpffs {
    path: PathBuf,
}

impl Bpffs {
    /// Mounts a fresh bpffs at `path`, which is created.
    ///
    /// # Errors
    /// The directory cannot be made, or no permission to mount.
    pub fn mount(path: &Path) -> Result<Self> {
        fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))?;
        mount(
            Some("weirt"),
            path,
            Some("bpf"),
            MsFlags::empty(),
            None::<&str>,
        )
        .with_context(|| format!("mount a bpffs at {}", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
        })
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let ended = unmount_below(&self.path)
            .and_then(|()| fs::remove_dir(&self.path).context("remove the mount point"));
        if let Err(e) = ended {
            eprintln!("bpffs {}: {e:#}", self.path.display());
        }
    }
}

/// Unmounts everything mounted at or below `dir`, the innermost first.
pub(crate) fn unmount_below(dir: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    let below = mounts
        .lines()
        .rev()
        .filter_map(|l| l.split(' ').nth(1))
        .map(Path::new);
    for point in below.filter(|p| p.starts_with(dir)) {
        match umount2(point, MntFlags::MNT_DETACH) {
            // Another sweep was faster.
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(e) => return Err(e).with_context(|| format!("unmount {}", point.display())),
        }
    }
    Ok(())
}
