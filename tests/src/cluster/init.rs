//! The first process of a node: it makes the machine's files look like a machine of their own, says
//! that it is done, and reaps. What the node runs is started from outside; when this ends, the
//! kernel ends all of it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use super::hierarchy::{self, Hierarchy};
use super::record::Started;

/// What the kubelet wants of the whole machine and would set: it finds them set.
const SYSCTLS: &[(&str, &str)] = &[
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// Folders of the machine that a node sees and may change for itself.
pub const OVERLAID: [&str; 3] = ["etc", "opt", "var"];
/// Folders that must not lie on an overlay: one has overlays in it, the other pods' volumes.
const ON_DISK: [&str; 2] = ["containerd", "kubelet"];

/// Runs the node whose files are in `dir`, until it is killed.
///
/// # Errors
/// We are not the first process of new namespaces, or something cannot be mounted.
pub fn run(name: &str, dir: &Path) -> Result<()> {
    if std::process::id() != 1 {
        bail!("this is for the first process of a node, which `cluster up` starts");
    }
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    children.thread_block().context("block SIGCHLD")?;
    // The machine's own /proc is still mounted: there we have the pid that others see.
    let pid = fs::read_link("/proc/self").context("read /proc/self")?;
    let pid: u32 = pid.to_string_lossy().parse().context("a pid")?;
    let started = Started::now(name, pid)?;

    lay_out(name, dir).context("lay out the node's files")?;
    let ready = dir.join("init");
    let part = dir.join("init.part");
    fs::write(&part, serde_json::to_vec(&started)?)?;
    fs::rename(&part, &ready).with_context(|| format!("create {}", ready.display()))?;
    loop {
        children.wait().context("wait for a signal")?;
        while matches!(
            waitpid(None, Some(WaitPidFlag::WNOHANG)),
            Ok(status) if status != WaitStatus::StillAlive
        ) {}
    }
}

fn lay_out(name: &str, dir: &Path) -> Result<()> {
    fs::write("/proc/sys/kernel/hostname", name).context("set the host name")?;
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).context("make / private")?;
    // Both show the namespaces of the process that mounted them.
    fresh("proc", "/proc", "")?;
    let hierarchies = hierarchy::mounted()?;
    // Lazily: the old ones go with what is mounted on them.
    umount2("/sys", MntFlags::MNT_DETACH).context("unmount /sys")?;
    fresh("sysfs", "/sys", "")?;
    fresh("bpf", "/sys/fs/bpf", "")?;
    mount_cgroups(&hierarchies)?;
    if Path::new("/sys/kernel/tracing").is_dir() {
        fresh("tracefs", "/sys/kernel/tracing", "")?;
    }
    fresh("tmpfs", "/run", "mode=755")?;
    for folder in ["lock", "netns"] {
        fs::create_dir(Path::new("/run").join(folder))?;
    }
    for folder in OVERLAID {
        overlay(dir, folder)?;
    }
    for folder in ON_DISK {
        let (from, to) = (dir.join(folder), Path::new("/var/lib").join(folder));
        fs::create_dir_all(&from)?;
        fs::create_dir_all(&to)?;
        bind(&from, &to)?;
    }
    for (key, value) in SYSCTLS {
        let file = dir.join(key.replace('/', "."));
        fs::write(&file, format!("{value}\n"))?;
        bind(&file, &Path::new("/proc/sys").join(key))?;
    }
    // Replies between pods of one node cross a bridge, and must meet the NAT of their Service.
    for family in ["ip", "ip6"] {
        let file = format!("/proc/sys/net/bridge/bridge-nf-call-{family}tables");
        if Path::new(&file).exists() {
            fs::write(&file, "1").with_context(|| format!("write {file}"))?;
        }
    }
    let flags = MsFlags::MS_REC | MsFlags::MS_SHARED;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).context("make / shared")
}

/// The hierarchies as the node sees them: we are in its cgroup namespace, so each begins at its
/// own cgroup and nothing on the node can reach the machine's.
fn mount_cgroups(hierarchies: &[Hierarchy]) -> Result<()> {
    let top = Path::new("/sys/fs/cgroup");
    if hierarchies.iter().all(|h| h.mounted_at != top) {
        fresh("tmpfs", top, "mode=755")?;
    }
    for Hierarchy {
        mounted_at,
        file_system,
        options,
    } in hierarchies
    {
        fs::create_dir_all(mounted_at)?;
        // Version 2's options are the whole machine's, and only its first namespace may set them.
        let options = if file_system == "cgroup2" {
            ""
        } else {
            options
        };
        fresh(file_system, mounted_at, options)?;
    }
    Ok(())
}

fn fresh(file_system: &str, at: impl AsRef<Path>, options: &str) -> Result<()> {
    let at = at.as_ref();
    let options = (!options.is_empty()).then_some(options);
    mount(
        Some(file_system),
        at,
        Some(file_system),
        MsFlags::empty(),
        options,
    )
    .with_context(|| format!("mount {file_system} at {}", at.display()))
}

fn bind(from: &Path, to: &Path) -> Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("bind {} to {}", from.display(), to.display()))
}

fn overlay(dir: &Path, folder: &str) -> Result<()> {
    let (upper, work) = (dir.join(folder), dir.join(format!("{folder}.work")));
    let lower: PathBuf = Path::new("/").join(folder);
    fs::create_dir_all(&upper)?;
    fs::create_dir_all(&work)?;
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        upper.display(),
        work.display()
    );
    fresh("overlay", &lower, &options)
}
