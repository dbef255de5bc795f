//! What happens to a cluster that runs: nodes come, go and start again, the API server is away, a pod's
//! sandbox dies. How a node is made is `node.rs`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::options::{Cni, Proxy};
use super::place::{CONTROL, Node};
use super::start::Inside;
use super::{Cluster, hierarchy, node, plane};
use crate::netns::{self, Netns};

/// How long the kernel may take to be rid of a namespace and its devices.
const GONE: Duration = Duration::from_secs(20);

impl Cluster {
    /// Makes the machine of another node: containerd runs on it, with the images, and no kubelet. Its name.
    ///
    /// # Errors
    /// Not a cluster that this process started with Weir alone, or a part does not start.
    pub fn prepare_node(&mut self) -> Result<String> {
        if self.options.cni != Cni::Weir || self.options.proxy != Proxy::Weir {
            bail!("peers are installed on the nodes of the start only");
        }
        let node = Node(self.options.nodes + 1);
        // First, so that whoever takes the cluster down knows of it.
        self.starter.count_nodes(node.0)?;
        self.options.nodes = node.0;
        node::create(&self.starter, &self.place, node)?;
        let archives = [self.programs.images.as_path(), &self.options.image];
        node::start_containerd(&self.starter, &self.programs, &self.place, node, &archives)?;
        Ok(node.name())
    }

    /// Starts the kubelet of a node, which registers it, and waits for nothing.
    ///
    /// # Errors
    /// There is no such node, or it does not run.
    pub fn start_kubelet(&self, node: &str) -> Result<()> {
        let node = self.node(node)?;
        let authority = self.authority.get();
        let authority = authority.context("another process signed for this cluster")?;
        node::start_kubelet(
            &self.starter,
            &self.programs,
            &self.place,
            authority,
            node,
            &self.options,
        )
    }

    /// Pulls the plug of a node: everything it runs, its namespaces, its bpffs and its `/run` are gone.
    /// Its disk stays.
    ///
    /// # Errors
    /// The control plane is on that node, or something of it stays.
    pub fn stop_node(&self, node: &str) -> Result<()> {
        let node = self.node(node)?;
        if node == CONTROL {
            bail!("the control plane is on {}", node.name());
        }
        self.starter.kill(&format!("{}-", node.name()))?;
        hierarchy::remove(&self.place.cgroup_of(&node.name()))?;
        netns::remove(&Path::new(netns::DIR).join(self.place.netns(node)))?;
        let switch = Netns::existing(self.place.switch());
        let port = format!("link show dev {}", node.name());
        node::until("its port of the switch is gone", GONE, || {
            match switch.ip(&port) {
                Err(_) => Ok(()),
                Ok(_) => bail!("{} is there", node.name()),
            }
        })
    }

    /// Starts a stopped node again, with the disk that it had. Its kubelet runs then, and nothing is
    /// waited for.
    ///
    /// # Errors
    /// It runs, or a part does not start.
    pub fn start_node(&self, name: &str) -> Result<()> {
        let node = self.node(name)?;
        node::create(&self.starter, &self.place, node)?;
        node::start_containerd(&self.starter, &self.programs, &self.place, node, &[])?;
        self.start_kubelet(name)
    }

    /// Kills the API server. etcd keeps every object.
    ///
    /// # Errors
    /// No permission.
    pub fn stop_api_server(&self) -> Result<()> {
        self.starter.kill(plane::SERVING)
    }

    /// Starts the API server again, and waits until it answers.
    ///
    /// # Errors
    /// It does not.
    pub fn start_api_server(&self) -> Result<()> {
        let authority = self.authority.get();
        let authority = authority.context("another process signed for this cluster")?;
        plane::start_api_server(&self.starter, &self.programs, authority, &self.options)?;
        plane::wait_for_api_server(&self.starter, &self.kubectl())
    }

    /// Runs a program of this machine inside a node, and returns what it printed.
    ///
    /// # Errors
    /// It failed; the error holds its stderr.
    pub fn run_on(&self, node: &str, program: &Path, args: &[&str]) -> Result<String> {
        self.starter.run(self.node(node)?, program, args)
    }

    /// The log of a process of the cluster: `kube-apiserver`, `n1-kubelet`, …
    #[must_use]
    pub fn log(&self, process: &str) -> PathBuf {
        self.place.log(process)
    }

    /// A command in a container of a pod, without the API server; what it reads is a pipe.
    ///
    /// # Errors
    /// No such container runs there.
    pub fn in_pod(&self, node: &str, pod: &str, words: &[&str]) -> Result<Command> {
        let container = self.container(node, pod, ("io.cri-containerd.kind", "container"))?;
        let exec = format!("weir-{:x}", fastrand::u64(..));
        let place = Inside::Node(self.node(node)?);
        let mut command = self.starter.foreground(place, &format!("{node}/run"))?;
        command
            .arg(&self.programs.ctr)
            .args(["-n", "k8s.io", "tasks", "exec", "--exec-id"]);
        command
            .args([&exec, &container])
            .args(words)
            .stdin(Stdio::piped());
        Ok(command)
    }

    /// Kills the sandbox of a pod as a crash would: the kubelet makes another.
    ///
    /// # Errors
    /// None runs there.
    pub fn kill_sandbox(&self, node: &str, pod: &str) -> Result<()> {
        self.kill(node, pod, ("io.cri-containerd.kind", "sandbox"))
    }

    /// Kills a container of a pod, by its name there: the kubelet starts it again.
    ///
    /// # Errors
    /// None runs there.
    pub fn kill_container(&self, node: &str, pod: &str, name: &str) -> Result<()> {
        self.kill(node, pod, ("io.kubernetes.container.name", name))
    }

    fn kill(&self, node: &str, pod: &str, label: (&str, &str)) -> Result<()> {
        let container = self.container(node, pod, label)?;
        let kill = ["-n", "k8s.io", "tasks", "kill", "-s", "SIGKILL", &container];
        self.run_on(node, &self.programs.ctr, &kill).map(drop)
    }

    /// The container (or the sandbox) of a pod that runs on a node, by one of its labels. Of several, one.
    fn container(&self, node: &str, pod: &str, (label, value): (&str, &str)) -> Result<String> {
        let ctr = |args: &[&str]| {
            let args: Vec<&str> = ["-n", "k8s.io"].iter().chain(args).copied().collect();
            self.run_on(node, &self.programs.ctr, &args)
        };
        let filter =
            format!("labels.\"io.kubernetes.pod.name\"=={pod},labels.\"{label}\"=={value}");
        let tasks = ctr(&["tasks", "list"])?;
        let runs = |id: &&str| {
            let mut lines = tasks.lines().map(str::split_whitespace);
            lines.any(|mut line| line.next() == Some(id) && line.nth(1) == Some("RUNNING"))
        };
        let found = ctr(&["containers", "list", "-q", &filter])?;
        let found = found.lines().find(runs).map(str::to_owned);
        found.with_context(|| format!("nothing with {label}={value} of pod {pod} runs on {node}"))
    }

    pub(super) fn node(&self, name: &str) -> Result<Node> {
        let mut all = Node::all(self.options.nodes);
        let found = all.find(|node| node.name() == name);
        found.with_context(|| format!("no node {name}"))
    }
}
