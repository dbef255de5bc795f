//! The cgroups of a cluster, in every hierarchy that the machine has mounted: version 2, the
//! controllers of version 1, or both. Only cgroups below the cluster's own are written to.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cgroup;

/// One mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hierarchy {
    pub(super) mounted_at: PathBuf,
    /// `cgroup` or `cgroup2`.
    pub(super) file_system: String,
    /// What a new mount of the same hierarchy is asked with.
    pub(super) options: String,
}

/// Options of every file system rather than of cgroups.
const COMMON_OPTIONS: &[&str] = &["rw", "ro", "nosuid", "nodev", "noexec", "relatime"];

/// What is mounted below `/sys/fs/cgroup`.
///
/// # Errors
/// The mounts cannot be read.
pub(super) fn mounted() -> Result<Vec<Hierarchy>> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    Ok(mounts.lines().filter_map(parse).collect())
}

fn parse(line: &str) -> Option<Hierarchy> {
    let mut fields = line.split(' ').skip(1);
    let (point, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
    if !matches!(kind, "cgroup" | "cgroup2") || !point.starts_with("/sys/fs/cgroup") {
        return None;
    }
    let is_own = |o: &&str| !COMMON_OPTIONS.contains(o) && !o.starts_with("release_agent=");
    let mut own: Vec<&str> = options.split(',').filter(is_own).collect();
    if own.iter().any(|o| o.starts_with("name=")) {
        // A named hierarchy has no controller, and says so.
        own.insert(0, "none");
    }
    Some(Hierarchy {
        mounted_at: point.into(),
        file_system: kind.to_owned(),
        options: own.join(","),
    })
}

/// Makes the cgroup `path` in every hierarchy, its parents included.
///
/// # Errors
/// It cannot be made.
pub(super) fn create(path: &str) -> Result<()> {
    for hierarchy in mounted()? {
        let mut dir = hierarchy.mounted_at.clone();
        for part in Path::new(path) {
            let parent = dir.clone();
            dir.push(part);
            match fs::create_dir(&dir) {
                Err(e) if e.kind() == ErrorKind::AlreadyExists => continue,
                made => made.with_context(|| format!("create cgroup {}", dir.display()))?,
            }
            // A new cpuset is empty, and nothing can run in it. Those below copy it from now on.
            for file in ["cpuset.cpus", "cpuset.mems", "cgroup.clone_children"] {
                let of_parent = parent.join(file);
                if hierarchy.file_system == "cgroup" && of_parent.exists() {
                    let value = match file {
                        "cgroup.clone_children" => "1".to_owned(),
                        _ => fs::read_to_string(of_parent)?,
                    };
                    let to = dir.join(file);
                    fs::write(&to, value).with_context(|| format!("write {}", to.display()))?;
                }
            }
        }
    }
    Ok(())
}

/// The files that a process writes its pid to, to be in the cgroup `path` everywhere.
///
/// # Errors
/// The mounts cannot be read.
pub(super) fn entrances(path: &str) -> Result<Vec<PathBuf>> {
    let mounted = mounted()?;
    let entrance = |h: &Hierarchy| h.mounted_at.join(path).join("cgroup.procs");
    Ok(mounted.iter().map(entrance).collect())
}

/// Moves what is in `from` itself to `to`, and lets the cgroups below `from` have the controllers
/// that it has: version 2 wants processes in leaves.
///
/// # Errors
/// `to` does not exist, or a process cannot be moved.
pub(super) fn delegate(from: &str, to: &str) -> Result<()> {
    for hierarchy in mounted()? {
        let (source, leaf) = (
            hierarchy.mounted_at.join(from),
            hierarchy.mounted_at.join(to),
        );
        for pid in fs::read_to_string(source.join("cgroup.procs"))?.lines() {
            match fs::write(leaf.join("cgroup.procs"), pid) {
                // It has ended meanwhile.
                Err(e) if e.raw_os_error() == Some(nix::libc::ESRCH) => {}
                moved => moved.with_context(|| format!("move {pid} to {}", leaf.display()))?,
            }
        }
        distribute(&source)?;
    }
    Ok(())
}

/// Gives the cgroups below `dir` every controller that it has. Nothing on version 1.
fn distribute(dir: &Path) -> Result<()> {
    let Ok(controllers) = fs::read_to_string(dir.join("cgroup.controllers")) else {
        return Ok(());
    };
    for controller in controllers.split_whitespace() {
        let file = dir.join("cgroup.subtree_control");
        fs::write(&file, format!("+{controller}"))
            .with_context(|| format!("+{controller} to {}", file.display()))?;
    }
    Ok(())
}

/// As [`create`], and what is made below it has controllers on version 2 too.
///
/// # Errors
/// As [`create`].
pub(super) fn create_inner(path: &str) -> Result<()> {
    create(path)?;
    mounted()?
        .iter()
        .try_for_each(|h| distribute(&h.mounted_at.join(path)))
}

/// Ends every process in the cgroup `path` or below it, then removes it everywhere. Absent is
/// success.
///
/// # Errors
/// It is still busy after ten seconds.
pub(super) fn remove(path: &str) -> Result<()> {
    let mounted = mounted()?;
    // Every process is in one cgroup of each hierarchy, so ending those in version 2's ends all.
    for hierarchy in mounted.iter().filter(|h| h.file_system == "cgroup2") {
        cgroup::remove(&hierarchy.mounted_at.join(path))?;
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    for hierarchy in &mounted {
        let dir = hierarchy.mounted_at.join(path);
        loop {
            match cgroup::remove_tree(&dir) {
                Err(e) if e.kind() == ErrorKind::ResourceBusy && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(e) if e.kind() == ErrorKind::ResourceBusy => {
                    bail!("{} is still busy after 10 s", dir.display())
                }
                removed => break removed.with_context(|| format!("remove {}", dir.display()))?,
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_says_how_to_mount_it_again() {
        let cases = [
            (
                "cgroup /sys/fs/cgroup/cpu cgroup rw,relatime,cpu 0 0",
                Some("cpu"),
            ),
            (
                "cgroup /sys/fs/cgroup/systemd cgroup rw,nosuid,xattr,name=systemd 0 0",
                Some("none,xattr,name=systemd"),
            ),
            (
                "cgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0",
                Some("nsdelegate"),
            ),
            ("tmpfs /sys/fs/cgroup tmpfs rw 0 0", None),
            ("cgroup2 /mnt cgroup2 rw 0 0", None),
        ];
        for (line, options) in cases {
            let parsed = parse(line).map(|h| h.options);
            assert_eq!(parsed.as_deref(), options, "{line}");
        }
    }
}
