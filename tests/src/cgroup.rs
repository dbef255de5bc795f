//! A cgroup of our own in the cgroup2 hierarchy, which ends its processes when it goes.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::run;

/// A cgroup directly under the cgroup2 root. On drop every process in it or below is killed and it
/// is removed with what is below it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// # Errors
    /// No cgroup2 is mounted, or no permission to create one below it.
    pub fn new(label: &str) -> Result<Self> {
        Self::named(&run::unique_name(label))
    }

    pub(crate) fn named(name: &str) -> Result<Self> {
        let path = mount_point()?.join(name);
        fs::create_dir(&path).with_context(|| format!("create cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    /// Creates a cgroup below this one (a pod's), removed with it.
    ///
    /// # Errors
    /// It cannot be created.
    pub fn child(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        fs::create_dir_all(&path).with_context(|| format!("create cgroup {}", path.display()))?;
        Ok(path)
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(e) = remove(&self.path) {
            eprintln!("cgroup {}: {e:#}", self.path.display());
        }
    }
}

/// Where the cgroup2 hierarchy is mounted (`/sys/fs/cgroup`, or `…/unified` on a hybrid host).
///
/// # Errors
/// It is mounted nowhere.
pub fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    let mut fields = mounts.lines().map(|l| l.split(' ').skip(1));
    fields
        .find_map(|mut f| {
            let point = f.next()?;
            (f.next()? == "cgroup2").then(|| PathBuf::from(point))
        })
        .context("no cgroup2 file system is mounted: mount one at /sys/fs/cgroup")
}

/// Kills every process in the cgroup and below, then removes it. Absent is success.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match fs::write(path.join("cgroup.kill"), "1") {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        other => other.context("kill the processes")?,
    }
    // The kill is asynchronous: a cgroup with a dying process is still busy.
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match remove_tree(path) {
            Err(e) if e.kind() == ErrorKind::ResourceBusy && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(e) if e.kind() == ErrorKind::ResourceBusy => bail!("still busy after 10 s"),
            other => return other.context("remove"),
        }
    }
}

/// Removes a cgroup and those below it. Absent is success.
pub(crate) fn remove_tree(path: &Path) -> std::io::Result<()> {
    let absent_is_success = |r: std::io::Result<()>| match r {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    };
    let entries = match fs::read_dir(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    absent_is_success(fs::remove_dir(path))
}
