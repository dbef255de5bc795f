//! The names of everything a test run makes, and the removal of what a killed run left behind.
//! Each kind of thing removes itself on drop; nothing here does that.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

use crate::{bpffs, cgroup, netns};

/// Every namespace, cgroup and directory of a run starts with this and the pid of the run.
const PREFIX: &str = "weirt-";

static COUNT: AtomicU32 = AtomicU32::new(0);
static SWEPT: Once = Once::new();

/// A name that no other run alive on this machine uses: `weirt-<pid>-<n>-<label>`.
///
/// The first name of a process also sweeps: what carries this pid then is of an earlier process.
#[must_use]
pub fn unique_name(label: &str) -> String {
    SWEPT.call_once(|| {
        let own = std::process::id();
        for failure in sweep_where(|pid| pid == own || !is_alive(pid)) {
            eprintln!("sweep: {failure:#}");
        }
    });
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{PREFIX}{}-{n}-{label}", std::process::id())
}

/// Removes whatever runs that are no longer alive left behind: their processes (by cgroup),
/// namespaces, mounts and directories. Goes on after a failure and returns all of them.
#[must_use]
pub fn sweep() -> Vec<anyhow::Error> {
    sweep_where(|pid| !is_alive(pid))
}

/// Where the files of a thing of this name are: `/tmp/<name>`.
#[must_use]
pub fn dir_of(name: &str) -> PathBuf {
    Path::new("/tmp").join(name)
}

fn sweep_where(is_stale: impl Fn(u32) -> bool) -> Vec<anyhow::Error> {
    let stale = |parent: &Path| -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(parent) else {
            return Vec::new();
        };
        entries
            .filter_map(Result::ok)
            .filter(|e| {
                e.file_name()
                    .to_str()
                    .and_then(run_of)
                    .is_some_and(&is_stale)
            })
            .map(|e| e.path())
            .collect()
    };
    let mut removals: Vec<(PathBuf, Result<()>)> = Vec::new();
    // Processes first: a namespace lives for as long as something runs in it.
    if let Ok(root) = cgroup::mount_point() {
        removals.extend(
            stale(&root)
                .into_iter()
                .map(|p| (p.clone(), cgroup::remove(&p))),
        );
    }
    let namespaces = stale(Path::new(netns::DIR));
    removals.extend(
        namespaces
            .into_iter()
            .map(|p| (p.clone(), netns::remove(&p))),
    );
    removals.extend(
        stale(Path::new("/tmp"))
            .into_iter()
            .map(|p| (p.clone(), remove_dir(&p))),
    );
    removals
        .into_iter()
        .filter(|(path, _)| path.exists()) // Another run sweeps too, and may have been faster.
        .filter_map(|(path, r)| {
            r.err()
                .map(|e| e.context(format!("remove {}", path.display())))
        })
        .collect()
}

/// Removes a directory of ours, unmounting first whatever is mounted in it.
pub(crate) fn remove_dir(dir: &Path) -> Result<()> {
    bpffs::unmount_below(dir)?;
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.with_context(|| format!("remove {}", dir.display())),
    }
}

/// The pid in a name of ours.
fn run_of(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()
}

fn is_alive(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_names_belong_to_a_run() {
        for (name, run) in [
            ("weirt-12-0-n1", Some(12)),
            ("weirt-12-3-a-b", Some(12)),
            ("weirt-x-0-n1", None),
            ("weirt-", None),
            ("weir-12-0", None),
            ("cni-12", None),
        ] {
            assert_eq!(run_of(name), run, "{name}");
        }
    }
}
