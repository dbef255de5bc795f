//! What this node offers, as a table: for the start-up message and `weir doctor`. Changes nothing.

use std::fs;
use std::path::Path;

use aya::programs::ProgramType;
use aya::sys::{BpfHelper, is_helper_supported};
use aya::util::KernelVersion;
use nix::sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, FsType, statfs};
use nix::unistd::Uid;
use tracing::warn;

use super::second_lock;

/// One thing that a node must offer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Check {
    pub what: &'static str,
    /// What was found; on failure what to do about it.
    pub outcome: Result<String, String>,
}

/// The oldest kernel on which a node is tried (`cargo xtask vm`).
const FLOOR: (u8, u8) = (5, 15);

/// Every check, whether or not an earlier one failed.
pub fn probe(bpffs: &Path, cgroup: &Path) -> Vec<Check> {
    vec![
        Check {
            what: "kernel",
            outcome: kernel(),
        },
        Check {
            what: "kernel type information (BTF)",
            outcome: btf(),
        },
        Check {
            what: "capabilities",
            outcome: capabilities(),
        },
        Check {
            what: "bpffs",
            outcome: mounted_bpffs(bpffs),
        },
        Check {
            what: "cgroup2",
            outcome: mounted_cgroup2(cgroup),
        },
        Check {
            what: "nftables",
            outcome: nf_tables(),
        },
    ]
}

/// The checks that failed, each in one line with what to do.
pub fn missing(checks: &[Check]) -> Vec<String> {
    checks
        .iter()
        .filter_map(|check| Some(format!("{}: {}", check.what, check.outcome.as_ref().err()?)))
        .collect()
}

fn kernel() -> Result<String, String> {
    let version = KernelVersion::current().map_err(|e| format!("cannot be told: {e}"))?;
    let release = nix::sys::utsname::uname()
        .map(|u| u.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    judge(version).map(|()| format!("Linux {release}"))
}

/// Whether a socket call that is refused can end in another error than EPERM ([`weir_common::node::Features::SAYS_WHY`]).
pub fn refusals_say_why() -> bool {
    is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval).unwrap_or_else(
        |error| {
            warn!(%error, "cannot ask whether a refused call can say why: it ends in EPERM");
            false
        },
    )
}

fn judge(version: KernelVersion) -> Result<(), String> {
    let (major, minor) = FLOOR;
    if version >= KernelVersion::new(major, minor, 0) {
        return Ok(());
    }
    Err(format!(
        "Linux {version} is older than {major}.{minor}, the oldest on which Weir is tried: install a newer kernel"
    ))
}

fn btf() -> Result<String, String> {
    let path = "/sys/kernel/btf/vmlinux";
    match fs::metadata(path) {
        Ok(found) => Ok(format!("{} KiB", found.len() / 1024)),
        Err(error) => Err(format!(
            "{path}: {error}; use a kernel with CONFIG_DEBUG_INFO_BTF=y"
        )),
    }
}

fn capabilities() -> Result<String, String> {
    // Bits of include/uapi/linux/capability.h.
    const NEEDED: [(&str, u32); 3] = [("CAP_NET_ADMIN", 12), ("CAP_PERFMON", 38), ("CAP_BPF", 39)];
    let status = fs::read_to_string("/proc/self/status").map_err(|e| e.to_string())?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .ok_or("cannot be read from /proc/self/status")?;
    let lacking: Vec<&str> = NEEDED
        .iter()
        .filter(|(_, bit)| effective >> bit & 1 == 0)
        .map(|(name, _)| *name)
        .collect();
    if lacking.is_empty() {
        return Ok("CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON".into());
    }
    Err(format!(
        "{} missing (uid {}): run as root, or give the container these capabilities",
        lacking.join(", "),
        Uid::effective()
    ))
}

fn mounted_bpffs(pins: &Path) -> Result<String, String> {
    mounted(pins, BPF_FS_MAGIC, "bpffs", "mount -t bpf bpf /sys/fs/bpf")
}

fn mounted_cgroup2(cgroup: &Path) -> Result<String, String> {
    let remedy = "give --cgroup the folder where cgroup2 is mounted (/sys/fs/cgroup/unified on a hybrid \
                  host), or mount -t cgroup2 none /sys/fs/cgroup";
    if !cgroup.is_dir() {
        return Err(format!("{} is not a folder: {remedy}", cgroup.display()));
    }
    mounted(cgroup, CGROUP2_SUPER_MAGIC, "cgroup2", remedy)
}

/// The file system below a path, which need not exist yet.
fn mounted(path: &Path, magic: FsType, name: &str, remedy: &str) -> Result<String, String> {
    let existing = path
        .ancestors()
        .find(|p| p.exists())
        .unwrap_or(Path::new("/"));
    let found = statfs(existing).map_err(|e| format!("{}: {e}", existing.display()))?;
    if found.filesystem_type() != magic {
        return Err(format!("{} is not on a {name}: {remedy}", path.display()));
    }
    Ok(path.display().to_string())
}

fn nf_tables() -> Result<String, String> {
    second_lock::generation()
        .map(|generation| format!("nf_tables answers, generation {generation}"))
        .map_err(|error| {
            format!(
                "{error:#}; the second lock on pods needs a kernel with CONFIG_NF_TABLES and \
                 CONFIG_NF_TABLES_INET (modprobe nf_tables), and CAP_NET_ADMIN"
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_what_programs_call_is_told_so() {
        assert_eq!(judge(KernelVersion::new(5, 15, 0)), Ok(()));
        let said = judge(KernelVersion::new(5, 14, 190)).unwrap_err();
        assert!(said.contains("older than 5.15"), "{said}");
    }

    #[test]
    fn every_failure_says_what_to_do() {
        let checks = probe(Path::new("/tmp/no-bpffs/weir"), Path::new("/tmp"));
        let missing = missing(&checks);
        let about = |what: &str| missing.iter().find(|m| m.starts_with(what)).cloned();
        assert!(
            about("bpffs").is_some_and(|m| m.contains("mount -t bpf")),
            "{missing:?}"
        );
        assert!(
            about("cgroup2").is_some_and(|m| m.contains("--cgroup")),
            "{missing:?}"
        );
    }
}
