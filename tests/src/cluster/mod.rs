//! A real Kubernetes cluster on this machine: each node a set of namespaces and a cgroup, with
//! containerd and kubelet on it; networking, Services and DNS by Weir or by its peers. This file is
//! the order of things; how each is done is beside it.

pub mod application;
pub mod census;
pub mod clients;
pub mod compare;
pub mod e2e;
mod fabric;
mod hierarchy;
mod images;
pub mod init;
pub mod kills;
pub mod matrix;
pub mod network_policy_api;
mod node;
pub mod nodes;
mod oci;
pub mod options;
mod peers;
mod place;
mod plane;
pub mod programs;
mod record;
pub mod rollout;
mod stand_in;
mod start;
mod weir;

use std::fs;
use std::path::{self, Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cache::progress;
use crate::kubectl::Kubectl;
use crate::netns;
use crate::run;
use options::{Cni, Dns, Options, Proxy};
use place::{CONTROL, Node, Place};
use plane::Authority;
use programs::Programs;
use record::Record;
use start::{Inside, Starter};

const READY: Duration = Duration::from_secs(180);

/// A running cluster. It is taken down on drop, unless it was left running.
#[derive(Debug)]
pub struct Cluster {
    options: Options,
    place: Place,
    programs: Programs,
    starter: Starter,
    /// Of one that this process started: who else could sign?
    authority: OnceLock<Authority>,
    end: End,
}

/// What becomes of a cluster when the value goes, or when it does not come up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    TakenDown,
    /// For later commands, or for somebody who looks.
    LeftRunning,
}

impl Cluster {
    /// Starts a cluster and waits until its nodes are Ready, if anybody does their networking.
    ///
    /// # Errors
    /// One of this name is there, or a part does not start; `failed` says what becomes of the rest.
    pub fn up(mut options: Options, programs: Programs, failed: End) -> Result<Self> {
        // What reads them runs elsewhere.
        options.image = path::absolute(&options.image)?;
        options.manifest = path::absolute(&options.manifest)?;
        let place = Place::of(&options.name);
        if Record::load(&place)?.is_some() {
            bail!(
                "cluster {} is there already: take it down first",
                options.name
            );
        }
        if options.has_weir() {
            weir::check(&options)?;
        }
        fs::create_dir_all(place.dir().join("log"))?;
        let record = Record {
            options: options.clone(),
            processes: Vec::new(),
        };
        record.save(&place)?;
        let mut cluster = Self {
            starter: Starter::new(place.clone(), record, &programs.folders())?,
            options,
            place,
            programs,
            authority: OnceLock::new(),
            end: failed,
        };
        cluster.start()?;
        cluster.end = End::TakenDown;
        Ok(cluster)
    }

    /// The cluster of this name that an earlier command left running.
    ///
    /// # Errors
    /// There is none.
    pub fn running(name: &str, programs: Programs) -> Result<Self> {
        let place = Place::of(name);
        let record = Record::load(&place)?.with_context(|| format!("no cluster {name} runs"))?;
        Ok(Self {
            options: record.options.clone(),
            starter: Starter::new(place.clone(), record, &programs.folders())?,
            place,
            programs,
            authority: OnceLock::new(),
            end: End::LeftRunning,
        })
    }

    /// Leaves it running for later commands.
    #[must_use]
    pub fn leave_running(mut self) -> Self {
        self.end = End::LeftRunning;
        self
    }

    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// kubectl as the administrator.
    #[must_use]
    pub fn kubectl(&self) -> Kubectl {
        let netns = Path::new(netns::DIR).join(self.place.netns(CONTROL));
        let admin = plane::admin(&self.place);
        Kubectl::inside(
            &self.programs.plane.kubectl,
            &admin,
            netns,
            &self.place.dir(),
        )
    }

    /// A shell, or anything else, inside a node, for the caller's terminal.
    ///
    /// # Errors
    /// There is no such node.
    pub fn inside(&self, node: &str) -> Result<Command> {
        let node = self.node(node)?;
        let cgroup = format!("{}/shell", node.name());
        let mut command = self.starter.foreground(Inside::Node(node), &cgroup)?;
        command.env("KUBECONFIG", plane::admin(&self.place));
        command.env("CONTAINERD_NAMESPACE", "k8s.io");
        Ok(command)
    }

    /// The folder whose pods a node's kubelet runs without being told to by anybody.
    ///
    /// # Errors
    /// There is no such node.
    pub fn static_pods(&self, node: &str) -> Result<PathBuf> {
        Ok(node::static_pods(&self.place, self.node(node)?))
    }

    /// The image that plays every client and server, by its name on the nodes.
    ///
    /// # Errors
    /// The list of Kubernetes' test images does not name it.
    pub fn agnhost(&self) -> Result<String> {
        images::agnhost(&self.programs.e2e)
    }

    /// Another image for every node, from an archive.
    ///
    /// # Errors
    /// It is no archive of an image.
    pub fn import(&self, archive: &Path) -> Result<()> {
        let archive = path::absolute(archive)?;
        let nodes: Vec<Node> = Node::all(self.options.nodes).collect();
        at_once(&nodes, |node| {
            node::import(&self.starter, &self.programs, node, &archive)
        })
    }

    fn start(&self) -> Result<()> {
        let begin = Instant::now();
        let said =
            |what: &str| progress(&format!("{:6.1} s  {what}", begin.elapsed().as_secs_f64()));
        let Self {
            options,
            place,
            programs,
            starter,
            ..
        } = self;
        let nodes: Vec<Node> = Node::all(options.nodes).collect();
        hierarchy::create_inner(place.cgroup())?;
        fabric::create(place)?;
        peers::start_outside(starter, programs, place)?;
        let authority = Authority::new(place)?;
        for node in &nodes {
            node::create(starter, place, *node)?;
        }
        said("the nodes' namespaces and files");
        plane::start(starter, programs, place, &authority, options)?;
        let mut archives = vec![programs.images.as_path()];
        if options.has_weir() {
            archives.push(&options.image);
        }
        at_once(&nodes, |node| {
            node::start_containerd(starter, programs, place, node, &archives)
        })?;
        said("containerd, with its images");
        let kubectl = self.kubectl();
        plane::start_controllers(starter, programs, &authority, &kubectl, options)?;
        said("the control plane");
        for node in &nodes {
            node::start_kubelet(starter, programs, place, &authority, *node, options)?;
            if matches!(options.proxy, Proxy::Nftables | Proxy::Iptables) {
                peers::start_proxy(starter, programs, place, &authority, *node, options)?;
            }
        }
        if options.dns == Dns::Coredns {
            peers::apply_coredns(&kubectl)?;
        }
        at_once(&nodes, |node| {
            let name = node.name();
            let found = node::until(&format!("{name} registered"), READY, || {
                kubectl.run(&["get", "node", &name])
            });
            found.map(drop)
        })?;
        said("nodes registered");
        match options.cni {
            Cni::Bridge => at_once(&nodes, |node| {
                peers::install_bridge(place, &kubectl, node, options.nodes)
            })?,
            Cni::Weir | Cni::None => {}
        }
        if options.has_weir() {
            let took = weir::install(&kubectl, options)?;
            said(&format!(
                "Weir: {:.1} s from kubectl apply to Ready",
                took.as_secs_f64()
            ));
        } else if options.cni != Cni::None {
            kubectl.run(&[
                "wait",
                "--for=condition=Ready",
                "node",
                "--all",
                "--timeout=120s",
            ])?;
        }
        if options.cni != Cni::None {
            said("nodes Ready");
            if options.dns == Dns::Coredns {
                peers::wait_for_coredns(&kubectl)?;
                said("CoreDNS");
            }
        }
        self.authority.get_or_init(|| authority);
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.end == End::TakenDown
            && let Err(e) = down(&self.options.name)
        {
            eprintln!("take cluster {} down: {e:#}", self.options.name);
        }
    }
}

/// Takes down the cluster of this name, whoever started it and however far it came. Absent is
/// success. Ends the processes that the record names, if they still are those, and whatever is in
/// the cluster's own cgroups.
///
/// # Errors
/// Something stays; the first reason. The rest is gone.
pub fn down(name: &str) -> Result<()> {
    let place = Place::of(name);
    let Some(record) = Record::load(&place)? else {
        return Ok(());
    };
    let nodes = record.options.nodes;
    let mut results: Vec<Result<()>> = Vec::new();
    // The nodes first: the kernel ends what is in them with their first process.
    for node in Node::all(nodes) {
        if let Some(init) = record.running(&node::init_process(node)) {
            results.push(init.kill());
        }
    }
    results.extend(record.processes.iter().map(record::Started::kill));
    results.push(hierarchy::remove(place.cgroup()));
    results.push(fabric::remove(&place, nodes));
    // The record goes last: while anything stays, this can be run again.
    results.into_iter().collect::<Result<()>>()?;
    run::remove_dir(&place.dir())
}

/// The same for every node, each on a thread of its own; the first failure.
fn at_once(nodes: &[Node], each: impl Fn(Node) -> Result<()> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = nodes
            .iter()
            .map(|node| scope.spawn(|| each(*node)))
            .collect();
        let joined = threads.into_iter().map(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        joined.collect::<Vec<_>>().into_iter().collect()
    })
}
