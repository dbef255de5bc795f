//! What is on this machine that a test could leave behind: counted before a run and after it, the
//! difference is the run's. Only looks, never cleans: a leftover is a bug to be seen.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::command::printed;
use crate::workspace::Workspace;

/// How long the kernel may take to finish what was already asked of it: programs and namespaces
/// are freed after their last user is gone, not at once.
const SETTLING: Duration = Duration::from_secs(5);

/// Everything found, each in words.
pub(crate) struct Census(BTreeSet<String>);

impl Census {
    pub(crate) fn take(workspace: &Workspace) -> anyhow::Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").context("read the mounts")?;
        let mut found = BTreeSet::new();
        let mut add = |noun: &str, names: Vec<String>| {
            found.extend(names.into_iter().map(|name| format!("{noun} {name}")));
        };
        add("network namespace", names_in(Path::new("/run/netns")));
        add("network device", names_in(Path::new("/sys/class/net")));
        add(
            "nftables table",
            lines(Command::new("nft").args(["list", "tables"])),
        );
        add(
            "BPF program",
            programs(&lines(Command::new("bpftool").args(["prog", "list"]))),
        );
        for bpffs in mounted(&mounts, "bpf") {
            add("pinned in bpffs:", below(&bpffs, &|_| true));
        }
        for cgroup in mounted(&mounts, "cgroup2") {
            add(
                "cgroup",
                below(&cgroup, &|path| is_ours(path) && path.is_dir()),
            );
        }
        add("mount", mount_points(&mounts));
        add("process", processes(workspace.target()));
        for folder in ["/run", "/var/lib"] {
            let names = names_in(Path::new(folder)).into_iter();
            let ours = names.filter(|name| name.starts_with("weir"));
            add(
                "file",
                ours.map(|name| format!("{folder}/{name}")).collect(),
            );
        }
        Ok(Self(found))
    }

    /// What is there now and was not before, once it has had time to go away.
    pub(crate) fn leftovers(workspace: &Workspace, before: &Census) -> anyhow::Result<Vec<String>> {
        let start = Instant::now();
        loop {
            let now = Census::take(workspace)?;
            let new: Vec<_> = now.0.difference(&before.0).cloned().collect();
            if new.is_empty() || start.elapsed() > SETTLING {
                return Ok(new);
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

fn is_ours(path: &Path) -> bool {
    path.to_string_lossy().contains("weir")
}

/// Empty if there is no such folder: then nothing can be left in it.
fn names_in(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Everything under `folder` that `wanted` says yes to.
fn below(folder: &Path, wanted: &dyn Fn(&Path) -> bool) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let path = entry.path();
        if wanted(&path) {
            found.push(path.display().to_string());
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(below(&path, wanted));
        }
    }
    found
}

fn lines(command: &mut Command) -> Vec<String> {
    printed(command)
        .unwrap_or_default()
        .lines()
        .map(str::to_owned)
        .collect()
}

/// `17: sched_cls  name from_pod  tag …  gpl` gives `17 from_pod`. Programs without a name, and those
/// of systemd, come and go by themselves.
fn programs(list: &[String]) -> Vec<String> {
    list.iter()
        .filter_map(|line| {
            let (id, rest) = line.split_once(": ")?;
            id.parse::<u32>().ok()?;
            let name = rest.split("name ").nth(1)?.split_whitespace().next()?;
            (!name.starts_with("sd_")).then(|| format!("{id} {name}"))
        })
        .collect()
}

/// Mount points of file systems of this type. The fields are in proc_pid_mountinfo(5): the mount
/// point is the fifth, the type the first after ` - `.
fn mounted(mounts: &str, kind: &str) -> BTreeSet<PathBuf> {
    let of_kind = mounts.lines().filter(|line| {
        line.split_once(" - ")
            .and_then(|(_, after)| after.split(' ').next())
            == Some(kind)
    });
    of_kind
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .collect()
}

fn mount_points(mounts: &str) -> Vec<String> {
    mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(str::to_owned)
        .collect()
}

/// Processes that run something from our `target`, or were told to use something there (a virtual
/// machine, a control plane); not ourselves.
fn processes(target: &Path) -> Vec<String> {
    let ours = std::process::id();
    let target = target.to_string_lossy().into_owned();
    let mut found = Vec::new();
    for name in names_in(Path::new("/proc")) {
        let Ok(pid) = name.parse::<u32>() else {
            continue;
        };
        let Ok(words) = fs::read(format!("/proc/{pid}/cmdline")) else {
            continue;
        };
        let words = String::from_utf8_lossy(&words).replace('\0', " ");
        let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        let is_ours = program.starts_with(&target) || words.contains(&target);
        if is_ours && pid != ours {
            found.push(format!("{pid}: {}", words.trim()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_told_apart_by_id_and_systemd_is_not_ours() {
        let list = [
            "2: cgroup_device  name sd_devices  tag aaaa  gpl",
            "7: cgroup_device  tag bbbb  gpl",
            "17: sched_cls  name from_pod  tag cccc  gpl",
            "\tloaded_at 2026-11-21T04:00:00+0000  uid 0",
        ];
        assert_eq!(programs(&list.map(str::to_owned)), ["17 from_pod"]);
    }

    #[test]
    fn mounts_are_found_by_type() {
        let mounts = "\
29 22 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw
34 22 0:31 / /sys/fs/bpf rw shared:14 - bpf bpf rw,mode=700
35 22 0:32 / /tmp/bpf rw - tmpfs bpf rw
";
        assert_eq!(mounted(mounts, "bpf"), ["/sys/fs/bpf".into()].into());
        assert_eq!(mount_points(mounts).len(), 3);
    }

    #[test]
    fn what_is_new_is_found_below_a_folder() {
        let folder = std::env::temp_dir().join(format!("census-{}", std::process::id()));
        fs::create_dir_all(folder.join("weir/v1")).unwrap();
        fs::create_dir_all(folder.join("other")).unwrap();
        let ours = below(&folder, &is_ours);
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(ours.len(), 2, "{ours:?}");
    }
}
