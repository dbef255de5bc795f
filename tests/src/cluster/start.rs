//! Processes that outlive the command that started them: in the cluster's cgroups, in a namespace or
//! inside a node, written down before anything else happens.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::hierarchy;
use super::place::{Node, Place};
use super::record::{Record, Started};
use crate::netns;

/// Arguments: how many `cgroup.procs`, these, the program with its arguments. The limit of open
/// files is raised as far as it goes: containerd and the API server have many.
const ENTER: &str = r#"ulimit -n "$(ulimit -Hn)"
n=$1
shift
while [ "$n" -gt 0 ]; do
  echo $$ >"$1" || exit 125
  shift
  n=$((n - 1))
done
exec "$@""#;

/// Where a process is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Inside {
    /// The namespaces of the machine, but the network of a node.
    NetworkOf(Node),
    /// The network of the switch.
    Outside,
    /// Everything of the node: its files, processes, network, cgroups.
    Node(Node),
}

/// Starts the processes of one cluster, from several threads.
#[derive(Debug)]
pub(super) struct Starter {
    place: Place,
    record: Mutex<Record>,
    path: OsString,
}

impl Starter {
    /// `programs` are the folders in which processes look for others, before the machine's own.
    ///
    /// # Errors
    /// A folder has a colon in its name.
    pub(super) fn new(place: Place, record: Record, programs: &[PathBuf]) -> Result<Self> {
        let machine = [
            "/usr/local/sbin",
            "/usr/local/bin",
            "/usr/sbin",
            "/usr/bin",
            "/sbin",
            "/bin",
        ];
        let folders = programs.iter().cloned().chain(machine.map(PathBuf::from));
        Ok(Self {
            place,
            record: Mutex::new(record),
            path: std::env::join_paths(folders).context("join PATH")?,
        })
    }

    /// Starts a process in the cgroup `<cluster>/<cgroup>`. Its log is `log/<name>.log`.
    ///
    /// # Errors
    /// It cannot be started, or ended before it could be written down.
    pub(super) fn start<A: AsRef<OsStr>>(
        &self,
        name: &str,
        inside: Inside,
        cgroup: &str,
        program: &Path,
        args: impl IntoIterator<Item = A>,
    ) -> Result<()> {
        let path = self.place.log(name);
        let log = File::options().create(true).append(true).open(&path);
        let log = log.with_context(|| format!("open {}", path.display()))?;
        let mut command = self.command(inside, cgroup, "setsid")?;
        command.arg(program).args(args);
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        let started = Started::now(name, child.id())?;
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        record.processes.push(started);
        record.save(&self.place)
    }

    /// Ends the processes whose names begin so.
    ///
    /// # Errors
    /// No permission.
    pub(super) fn kill(&self, prefix: &str) -> Result<()> {
        let record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        let mut named = record.processes.iter();
        named.try_for_each(|process| match process.name.starts_with(prefix) {
            true => process.kill(),
            false => Ok(()),
        })
    }

    /// Writes down that there are so many nodes.
    ///
    /// # Errors
    /// The record cannot be written.
    pub(super) fn count_nodes(&self, nodes: u8) -> Result<()> {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        record.options.nodes = nodes;
        record.save(&self.place)
    }

    /// A program in the foreground, with the caller's own terminal.
    ///
    /// # Errors
    /// The node does not run.
    pub(super) fn foreground(&self, inside: Inside, cgroup: &str) -> Result<Command> {
        self.command(inside, cgroup, "env")
    }

    /// `through`, the shell that enters the cgroups and `nsenter`; the program comes after.
    fn command(&self, inside: Inside, cgroup: &str, through: &str) -> Result<Command> {
        let cgroup = self.place.cgroup_of(cgroup);
        hierarchy::create(&cgroup)?;
        let entrances = hierarchy::entrances(&cgroup)?;
        let mut command = Command::new(through);
        command.current_dir("/").env("PATH", &self.path);
        command.args(["sh", "-c", ENTER, "weirc"]);
        command.arg(entrances.len().to_string()).args(entrances);
        command.arg("nsenter");
        let netns = |name: String| format!("--net={}", Path::new(netns::DIR).join(name).display());
        match inside {
            Inside::NetworkOf(node) => command.arg(netns(self.place.netns(node))),
            Inside::Outside => command.arg(netns(self.place.switch())),
            Inside::Node(node) => {
                let pid = self.init_of(node)?;
                command.arg(format!("--target={pid}"));
                command.args(["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"])
            }
        };
        command.arg("--");
        Ok(command)
    }

    /// The pid, on the machine, of the first process of a node.
    ///
    /// # Errors
    /// The node does not run.
    pub(super) fn init_of(&self, node: Node) -> Result<i32> {
        let file = self.place.node_dir(node).join("init");
        let started: Started = fs::read(&file)
            .map_err(anyhow::Error::from)
            .and_then(|bytes| Ok(serde_json::from_slice(&bytes)?))
            .with_context(|| format!("node {} has not started", node.name()))?;
        if !started.is_running() {
            bail!("node {} does not run", node.name());
        }
        Ok(started.pid)
    }

    /// Runs a command inside a node and returns what it printed.
    ///
    /// # Errors
    /// It failed; the error holds its stderr.
    pub(super) fn run<A: AsRef<OsStr>>(
        &self,
        node: Node,
        program: &Path,
        args: impl IntoIterator<Item = A>,
    ) -> Result<String> {
        let mut command = self.foreground(Inside::Node(node), &format!("{}/run", node.name()))?;
        command.arg(program).args(args).stdin(Stdio::null());
        let output = command.output().context("start nsenter")?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!(
                "{}: {} on {}: {}",
                program.display(),
                output.status,
                node.name(),
                said.trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Waits for something that a process brings about, and gives up when that process ends.
    ///
    /// # Errors
    /// It ended first, or the time is over; the error shows the end of its log.
    pub(super) fn wait(
        &self,
        process: &str,
        what: &str,
        within: Duration,
        mut is_so: impl FnMut() -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + within;
        while !is_so() {
            let record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
            let runs = record.running(process).is_some();
            drop(record);
            if !runs || Instant::now() > deadline {
                let why = if runs {
                    "is not"
                } else {
                    "ended before it was"
                };
                let log = fs::read(self.place.log(process)).unwrap_or_default();
                let log = String::from_utf8_lossy(&log);
                let mut tail: Vec<&str> = log.lines().rev().take(20).collect();
                tail.reverse();
                bail!("{process} {why} {what} in {within:?}\n{}", tail.join("\n"));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}
