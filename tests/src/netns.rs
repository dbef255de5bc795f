//! Network namespaces: made, wired to each other, entered, removed. What runs in them is
//! `process.rs`.

use std::fs::{self, File};
use std::future::Future;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};

use crate::run;

/// Where iproute2 keeps named namespaces.
pub const DIR: &str = "/run/netns";

/// A named network namespace with its loopback up; removed on drop.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

/// One end of a link between two namespaces.
#[derive(Debug, Clone, Copy)]
pub struct End<'a> {
    pub netns: &'a Netns,
    /// At most 15 bytes.
    pub device: &'a str,
    /// With prefix length: `10.0.0.1/24`, `fd00::1/64`.
    pub addresses: &'a [&'a str],
}

impl Netns {
    /// Makes a namespace named `weirt-<pid>-<n>-<label>`.
    ///
    /// # Errors
    /// Not root, or no `ip` (package iproute2).
    pub fn new(label: &str) -> Result<Self> {
        Self::named(run::unique_name(label))
    }

    pub(crate) fn named(name: String) -> Result<Self> {
        succeed(Command::new("ip").args(["netns", "add", &name]))?;
        let netns = Self { name };
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// A namespace that somebody else made: it stays when this goes.
    #[cfg(feature = "full")]
    pub(crate) fn existing(name: String) -> std::mem::ManuallyDrop<Self> {
        std::mem::ManuallyDrop::new(Self { name })
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The path that a container runtime would pass as `CNI_NETNS`.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new(DIR).join(&self.name)
    }

    /// Runs `f` on a thread of its own inside the namespace and returns what it returned. A panic
    /// in `f` goes on in the caller. Threads that `f` starts are inside too.
    ///
    /// Do not start processes that must outlive `f` in it: see [`crate::process`].
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        let entered = thread::scope(|scope| {
            scope
                .spawn(|| -> Result<T> {
                    enter(&self.path())?;
                    Ok(f())
                })
                .join()
        });
        entered.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Like [`Netns::run`] for a future, on a tokio runtime of one thread.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the runtime cannot be built.
    pub fn block_on<T: Send, F: Future<Output = T>>(
        &self,
        f: impl FnOnce() -> F + Send,
    ) -> Result<T> {
        self.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            Ok(runtime.block_on(f()))
        })?
    }

    /// A command that runs inside, for short programs whose output the caller waits for. It is
    /// killed when the thread that started it ends.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        command_in(&self.path(), program)
    }

    /// Runs `ip` with these words inside and returns what it printed.
    ///
    /// # Errors
    /// `ip` failed; the error holds what it said.
    pub fn ip(&self, words: &str) -> Result<String> {
        succeed(
            Command::new("ip")
                .args(["-n", &self.name])
                .args(words.split_whitespace()),
        )
    }

    /// Adds a route: `add_route("10.1.0.0/24", "10.0.0.2")`, `add_route("default", …)`.
    ///
    /// # Errors
    /// `ip` refused it.
    pub fn add_route(&self, destination: &str, via: IpAddr) -> Result<()> {
        let family = if via.is_ipv6() { "-6" } else { "-4" };
        self.ip(&format!("{family} route add {destination} via {via}"))
            .map(drop)
    }

    /// Sets a sysctl of the namespace, dots as separators: `net.ipv4.ip_forward`.
    ///
    /// # Errors
    /// There is no such sysctl in a namespace, or it refuses the value.
    pub fn set_sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(key.replace('.', "/"));
        self.run(|| fs::write(&path, value).with_context(|| format!("set {key}={value}")))?
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Err(e) = remove(&self.path()) {
            eprintln!("netns {}: {e:#}", self.name);
        }
    }
}

/// Within what time a device that is up has a carrier and its link-local address.
const CARRIER: Duration = Duration::from_secs(5);

/// Links two namespaces by a veth pair, both ends up with their addresses. It goes when either
/// namespace goes.
///
/// # Errors
/// A device of that name is there already, or an address is not one.
pub fn link(a: End<'_>, b: End<'_>) -> Result<()> {
    a.netns.ip(&format!(
        "link add {} type veth peer name {} netns {}",
        a.device, b.device, b.netns.name
    ))?;
    for end in [&a, &b] {
        for address in end.addresses {
            // Duplicate address detection would keep an IPv6 address unusable for a second.
            let nodad = if address.contains(':') { "nodad" } else { "" };
            end.netns
                .ip(&format!("addr add {address} dev {} {nodad}", end.device))?;
        }
        // Nor does a router ask for a neighbour before its link-local address has been checked.
        let accept_dad = format!("net.ipv6.conf.{}.accept_dad", end.device);
        end.netns.set_sysctl(&accept_dad, "0")?;
        end.netns.ip(&format!("link set {} up", end.device))?;
    }
    for end in [&a, &b] {
        if end.addresses.iter().any(|it| it.contains(':')) {
            wait_for_link_local(end)?;
        }
    }
    Ok(())
}

/// The kernel gives a device its link-local address when it has seen the carrier, for which it takes up to a second if both
/// ends of the pair have the same index. Without it a host answers no neighbour's question.
fn wait_for_link_local(end: &End<'_>) -> Result<()> {
    let asked = format!("-6 addr show dev {} scope link", end.device);
    let deadline = Instant::now() + CARRIER;
    while end.netns.ip(&asked)?.is_empty() {
        if Instant::now() > deadline {
            bail!("{} has no link-local address", end.device);
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// [`Netns::command`] for the namespace at `path`.
pub(crate) fn command_in(path: &Path, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "nsenter"]);
    command
        .arg(format!("--net={}", path.display()))
        .arg("--")
        .arg(program);
    command
}

/// Moves this thread into the namespace at `path`.
///
/// # Errors
/// There is none, or no permission.
pub fn enter(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter {}", path.display()))
}

/// Removes the namespace that is bound at `path`. Absent is success.
pub(crate) fn remove(path: &Path) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let name = path.file_name().context("a namespace has a name")?;
    match succeed(Command::new("ip").args(["netns", "delete"]).arg(name)) {
        Err(_) if !path.exists() => Ok(()),
        other => other.map(drop),
    }
}

fn succeed(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("run {command:?}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?}: {}: {}", output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
