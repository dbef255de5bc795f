//! A Weir node on the real control plane: registered, its agent with the permissions of `deploy/` and no
//! more, its pods those that the real controllers make. What is tried on it is the caller's.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Pod as PodObject;

use crate::binaries::Binaries;
use crate::control_plane::ControlPlane;
use crate::kubectl::Kubectl;
use crate::kubelet::{Kubelet, PodRuntime, RegisteredNode};
use crate::node::{CLUSTER, Node, NodeOptions, Pod, Runtime, Source};
use crate::workloads;

/// What a cluster applies, with the template that each object is from.
const MANIFEST: &str = include_str!("../../deploy/weir.yaml");

/// The node's device towards the control plane, and its address there.
const DEVICE: &str = "eth0";
const ADDRESS: &str = "10.210.0.11";

/// The role, the account and the binding, as a cluster would apply them.
#[must_use]
pub fn cluster_role() -> String {
    let documents = MANIFEST.split_inclusive("---\n");
    documents
        .filter(|it| it.contains("# Source: weir/templates/rbac.yaml\n"))
        .collect()
}

/// A running node on a control plane of its own. Everything goes on drop.
#[derive(Debug)]
pub struct RealNode {
    // Dropped in this order: who starts pods, the pods, the node that they are on, the control plane.
    _kubelet: Kubelet,
    running: Running,
    pub node: Node,
    pub plane: ControlPlane,
}

/// The pods that run, by uid.
#[derive(Clone, Debug, Default)]
struct Running(Arc<Mutex<BTreeMap<String, Pod>>>);

impl RealNode {
    /// Starts a control plane, and a node on it with the permissions of `deploy/`; returns when the agent
    /// is ready.
    ///
    /// # Errors
    /// One of them does not become ready; the error shows its log.
    pub fn start(binaries: &Binaries, name: &str) -> Result<Self> {
        let mut real = Self::prepare(ControlPlane::start(binaries)?, name, &cluster_role())?;
        real.start_node()?;
        Ok(real)
    }

    /// As [`Self::start`] with this role, account and binding, before agent and DNS are started.
    ///
    /// # Errors
    /// The control plane refuses the node or the role, or the machine cannot be made.
    pub fn prepare(plane: ControlPlane, name: &str, role: &str) -> Result<Self> {
        let address: IpAddr = ADDRESS.parse()?;
        let registered = RegisteredNode::register(&plane, name, &[address])?;
        plane.kubectl().apply(CLUSTER)?;
        plane.kubectl().apply(role)?;
        let kubeconfig = plane.kubeconfig_of("kube-system", "weir-agent")?;
        let node = Node::prepare(NodeOptions {
            // Those of the Node object, as in any cluster.
            pod_cidrs: Vec::new(),
            source: Source::Kube {
                kubeconfig,
                api_server: ControlPlane::url(),
            },
            ..NodeOptions::named(name)
        })?;
        let netns = node.machine().netns();
        plane.attach(netns, DEVICE, &format!("{ADDRESS}/24"))?;
        // With the link cut, connections are refused at once: a test that cuts it is about what the
        // agent does when it is back, and not about how long silence lasts.
        netns.ip("route add unreachable 10.210.0.0/24 metric 9999")?;
        let running = Running::default();
        let runner = Runner {
            runtime: node.runtime(),
            running: running.clone(),
        };
        Ok(Self {
            _kubelet: Kubelet::start(registered, runner)?,
            running,
            node,
            plane,
        })
    }

    /// Starts agent and DNS and waits until the agent is ready.
    ///
    /// # Errors
    /// It does not become ready.
    pub fn start_node(&mut self) -> Result<()> {
        self.node.start_agent()?;
        self.node.start_dns()?;
        self.node.wait_ready()
    }

    /// kubectl as the administrator.
    #[must_use]
    pub fn kubectl(&self) -> &Kubectl {
        self.plane.kubectl()
    }

    /// kubectl with these words.
    ///
    /// # Errors
    /// As [`Kubectl::run`].
    pub fn run(&self, words: &str) -> Result<String> {
        let words: Vec<&str> = words.split_whitespace().collect();
        self.kubectl().run(&words)
    }

    /// `kubectl apply` of every manifest below a folder.
    ///
    /// # Errors
    /// As [`Kubectl::run`].
    pub fn apply_folder(&self, folder: &Path) -> Result<String> {
        let folder = folder.to_str().context("a folder with a name in UTF-8")?;
        self.kubectl()
            .run(&["apply", "--recursive", "--filename", folder])
    }

    /// Every pod that runs, by namespace and name.
    #[must_use]
    pub fn pods(&self) -> Vec<Pod> {
        let mut pods: Vec<_> = self.running.lock().values().cloned().collect();
        pods.sort_by_key(|pod| pod.workload.id());
        pods
    }

    /// The pods that run in a namespace with this label `app`, by name.
    #[must_use]
    pub fn pods_of(&self, namespace: &str, app: &str) -> Vec<Pod> {
        let mut pods = self.pods();
        pods.retain(|pod| pod.workload.is_of(namespace, app));
        pods
    }

    /// The first of [`Self::pods_of`] as soon as there are so many.
    ///
    /// # Errors
    /// There were not within that time.
    pub fn wait_for_pods(
        &self,
        namespace: &str,
        app: &str,
        number: usize,
        within: Duration,
    ) -> Result<Pod> {
        let deadline = Instant::now() + within;
        loop {
            let pods = self.pods_of(namespace, app);
            match pods.first() {
                Some(pod) if pods.len() == number => return Ok(pod.clone()),
                _ if Instant::now() >= deadline => bail!(
                    "not within {within:?}: {number} pods {namespace}/{app}; there are {}",
                    pods.len()
                ),
                _ => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Cuts the node off from the control plane. What is sent meanwhile is lost or refused.
    ///
    /// # Errors
    /// The device is gone.
    pub fn cut(&self) -> Result<()> {
        let words = format!("link set {DEVICE} down");
        self.node.machine().netns().ip(&words).map(drop)
    }

    /// Undoes [`Self::cut`].
    ///
    /// # Errors
    /// The device is gone.
    pub fn mend(&self) -> Result<()> {
        let words = format!("link set {DEVICE} up");
        self.node.machine().netns().ip(&words).map(drop)
    }
}

impl Running {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Pod>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs the kubelet's pods with `weir-cni` and an echo server.
struct Runner {
    runtime: Runtime,
    running: Running,
}

impl PodRuntime for Runner {
    fn start(&mut self, object: &PodObject) -> Result<Vec<IpAddr>> {
        let uid = uid(object)?;
        let workload = workloads::of_pod(&serde_json::to_value(object)?)?;
        let mut pod = self.runtime.declare_pod_as(workload, uid.clone())?;
        let started = self
            .runtime
            .add_pod(&mut pod)
            .and_then(|_| self.runtime.start_echo(&mut pod));
        if let Err(e) = started {
            // What a runtime does after a failed ADD.
            self.runtime.delete_pod(&pod)?;
            return Err(e);
        }
        let addresses = pod.addresses.clone();
        self.running.lock().insert(uid, pod);
        Ok(addresses)
    }

    fn stop(&mut self, object: &PodObject) -> Result<()> {
        let pod = self.running.lock().remove(&uid(object)?);
        let pod = pod.context("it was not started")?;
        self.runtime.delete_pod(&pod)
    }
}

fn uid(object: &PodObject) -> Result<String> {
    object.metadata.uid.clone().context("a pod without a uid")
}
