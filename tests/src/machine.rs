//! A machine as a node's processes see it: a network namespace, a cgroup, a bpffs, a directory.
//! What makes it a node (agent, DNS) is started by the caller.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::bpffs::Bpffs;
use crate::cgroup::Cgroup;
use crate::netns::Netns;
use crate::process::Launch;
use crate::run;

/// Everything goes on drop: processes first, by cgroup.
#[derive(Debug)]
pub struct Machine {
    // Fields are dropped in this order.
    cgroup: Cgroup,
    _devices: Devices,
    netns: Netns,
    bpffs: Bpffs,
    dir: Dir,
}

impl Machine {
    /// # Errors
    /// Not root, no cgroup2, or no bpffs.
    pub fn new(label: &str) -> Result<Self> {
        let name = run::unique_name(label);
        let dir = Dir::new(run::dir_of(&name))?;
        let bpffs = Bpffs::mount(&dir.0.join("bpf"))?;
        let cgroup = Cgroup::named(&name)?;
        let netns = Netns::named(name.clone())?;
        Ok(Self {
            cgroup,
            _devices: Devices(name),
            netns,
            bpffs,
            dir,
        })
    }

    /// A process on this machine; its log is `<dir>/<name>.log`.
    #[must_use]
    pub fn launch(&self, name: &str, program: impl AsRef<OsStr>) -> Launch {
        Launch::new(name, program)
            .in_netns(&self.netns)
            .in_cgroup(self.cgroup.path())
            .log_to(&self.dir.0.join(format!("{name}.log")))
    }

    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    #[must_use]
    pub fn bpffs(&self) -> &Bpffs {
        &self.bpffs
    }

    /// `/tmp/weirt-<pid>-<n>-<label>`: short enough for unix sockets; gone with the machine.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir.0
    }
}

/// The devices of a namespace, by its name. They go before it does: a connection that its process has left, and that
/// cannot be ended since nobody answers, keeps the namespace for minutes, and with it what is attached to them.
#[derive(Debug)]
struct Devices(String);

impl Drop for Devices {
    fn drop(&mut self) {
        let ip = |words: &[&str]| {
            Command::new("ip")
                .args(["-n", &self.0])
                .args(words)
                .output()
        };
        let Ok(shown) = ip(&["-br", "link"]) else {
            return;
        };
        let shown = String::from_utf8_lossy(&shown.stdout);
        let names = shown
            .lines()
            .filter_map(|line| line.split([' ', '@']).next());
        for name in names.filter(|name| *name != "lo") {
            // One that is gone with its other end is as good.
            if let Err(e) = ip(&["link", "del", name]) {
                eprintln!("device {name}: {e}");
            }
        }
    }
}

#[derive(Debug)]
struct Dir(PathBuf);

impl Dir {
    fn new(path: PathBuf) -> Result<Self> {
        fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        if let Err(e) = run::remove_dir(&self.0) {
            eprintln!("{e:#}");
        }
    }
}
