//! A played kubelet and scheduler against a real API server: registers a node, binds pods to it,
//! has a runtime start them, reports their status. How a pod is run is the caller's.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::{WatchStreamExt, watcher, watcher::Event};
use kube::{Client, Config};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::control_plane::ControlPlane;
use crate::netns;

/// How long until what failed is tried again.
const RETRY: Duration = Duration::from_millis(500);
/// The label by which a pod's `nodeSelector` asks for one node.
const HOSTNAME: &str = "kubernetes.io/hostname";

/// What runs pods.
pub trait PodRuntime: Send + 'static {
    /// Runs the pod and returns its addresses, the primary first. Called again if it fails.
    ///
    /// # Errors
    /// Whatever a kubelet would report of a pod that cannot start.
    fn start(&mut self, pod: &Pod) -> Result<Vec<IpAddr>>;

    /// Ends the pod. Called once for each that was started.
    ///
    /// # Errors
    /// It is logged, and the pod is gone from the API all the same.
    fn stop(&mut self, pod: &Pod) -> Result<()>;
}

/// A node that the API server knows.
#[derive(Debug, Clone)]
pub struct RegisteredNode {
    pub name: String,
    /// Given by the node IPAM controller.
    pub pod_cidrs: Vec<String>,
    addresses: Vec<IpAddr>,
    kubeconfig: PathBuf,
    netns: PathBuf,
}

/// A running kubelet. Ends on drop; its runtime is dropped then, its pods stay in the API.
#[derive(Debug)]
pub struct Kubelet {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl RegisteredNode {
    /// Creates the node, Ready, and waits until it has its pod range.
    ///
    /// # Errors
    /// The API server refuses it, or the controllers gave it no range in ten seconds.
    pub fn register(plane: &ControlPlane, name: &str, addresses: &[IpAddr]) -> Result<Self> {
        let mut node = Self {
            name: name.to_owned(),
            pod_cidrs: Vec::new(),
            addresses: addresses.to_owned(),
            kubeconfig: plane.admin().to_owned(),
            netns: plane.machine().netns().path(),
        };
        let pod_cidrs = plane.machine().netns().block_on(|| {
            let registered = register(&node);
            async { tokio::time::timeout(Duration::from_secs(10), registered).await }
        })?;
        node.pod_cidrs = pod_cidrs.context("no pod range in ten seconds")??;
        Ok(node)
    }
}

impl Kubelet {
    /// Plays the kubelet of `node`, on a thread of its own in the control plane's namespace.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(node: RegisteredNode, runtime: impl PodRuntime) -> Result<Self> {
        let (stop, stopped) = oneshot::channel();
        let name = format!("kubelet {}", node.name);
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            netns::enter(&node.netns)?;
            let tokio = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            tokio.block_on(async {
                let client = client(&node.kubeconfig).await?;
                let work = Work {
                    pods: Api::all(client.clone()),
                    client,
                    node,
                    runtime,
                    known: BTreeMap::new(),
                    running: BTreeMap::new(),
                    unsettled: BTreeSet::new(),
                };
                // Dropped where it waits: an API server that does not answer holds nobody up.
                tokio::select! {
                    ended = work.run() => ended,
                    _ = stopped => Ok(()),
                }
            })
        })?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Ends it and says what went wrong, if anything did.
    ///
    /// # Errors
    /// It could not talk to the API server at all, or it panicked.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        // The receiver is gone if it has ended already, and then there is nothing to stop.
        self.stop.take().map(|stop| stop.send(()).ok());
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        thread.join().map_err(|_| anyhow!("the kubelet panicked"))?
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            eprintln!("played kubelet: {e:#}");
        }
    }
}

/// The unique id of a pod: names come again.
type Uid = String;

struct Work<R> {
    client: Client,
    pods: Api<Pod>,
    node: RegisteredNode,
    runtime: R,
    /// As the API server last showed them.
    known: BTreeMap<Uid, Pod>,
    /// The pods that the runtime has started, and their addresses.
    running: BTreeMap<Uid, (Pod, Vec<IpAddr>)>,
    /// What failed and is to be tried again.
    unsettled: BTreeSet<Uid>,
}

impl<R: PodRuntime> Work<R> {
    async fn run(mut self) -> Result<()> {
        let watch = watcher(self.pods.clone(), watcher::Config::default()).default_backoff();
        let mut events = pin!(watch);
        let mut listed = BTreeSet::new();
        let mut retry = tokio::time::interval(RETRY);
        loop {
            tokio::select! {
                event = events.next() => match event.context("a watch without end")? {
                    Ok(Event::Init) => listed.clear(),
                    Ok(Event::InitApply(pod)) => {
                        listed.insert(uid(&pod));
                        self.saw(pod).await;
                    }
                    Ok(Event::InitDone) => {
                        let gone = self.known.keys().filter(|uid| !listed.contains(*uid));
                        for uid in gone.cloned().collect::<Vec<_>>() {
                            self.is_gone(&uid);
                        }
                    }
                    Ok(Event::Apply(pod)) => self.saw(pod).await,
                    Ok(Event::Delete(pod)) => self.is_gone(&uid(&pod)),
                    // An outage: the watcher comes back by itself.
                    Err(e) => eprintln!("kubelet {}: watch: {e}", self.node.name),
                },
                _ = retry.tick() => {
                    for uid in std::mem::take(&mut self.unsettled) {
                        self.settle(uid).await;
                    }
                }
            }
        }
    }

    async fn saw(&mut self, pod: Pod) {
        let uid = uid(&pod);
        self.known.insert(uid.clone(), pod);
        self.settle(uid).await;
    }

    fn is_gone(&mut self, uid: &str) {
        self.known.remove(uid);
        self.end(uid);
    }

    async fn settle(&mut self, uid: Uid) {
        let Some(pod) = self.known.get(&uid).cloned() else {
            return;
        };
        if let Err(e) = self.advance(&uid, &pod).await {
            let name = pod.metadata.name.unwrap_or_default();
            eprintln!("kubelet {}: pod {name}: {e:#}", self.node.name);
            self.unsettled.insert(uid);
        }
    }

    /// Brings one pod a step closer to what the API says.
    async fn advance(&mut self, uid: &str, pod: &Pod) -> Result<()> {
        let spec = pod.spec.as_ref().context("a pod without spec")?;
        let is_leaving = pod.metadata.deletion_timestamp.is_some();
        match spec.node_name.as_deref().filter(|name| !name.is_empty()) {
            None if is_leaving || !self.suits(pod) => Ok(()),
            None => self.bind(pod).await,
            Some(name) if name != self.node.name => Ok(()),
            Some(_) if is_leaving => {
                self.end(uid);
                self.confirm_deletion(uid, pod).await
            }
            Some(_) => {
                if !self.running.contains_key(uid) {
                    let addresses = self.runtime.start(pod)?;
                    self.running
                        .insert(uid.to_owned(), (pod.clone(), addresses));
                }
                self.report(uid, pod).await
            }
        }
    }

    /// Whether this node is one that the pod may be bound to.
    fn suits(&self, pod: &Pod) -> bool {
        let selector = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.node_selector.as_ref());
        let wanted = selector.and_then(|labels| labels.get(HOSTNAME));
        wanted.is_none_or(|hostname| *hostname == self.node.name)
    }

    async fn bind(&self, pod: &Pod) -> Result<()> {
        let name = name_of(pod)?;
        let binding = json!({
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": { "name": name, "uid": pod.metadata.uid },
            "target": { "apiVersion": "v1", "kind": "Node", "name": self.node.name },
        });
        let params = PostParams::default();
        let bound = self
            .api_of(pod)
            .create_subresource("binding", name, &params, &binding)
            .await;
        match bound.map(|_: Value| ()) {
            // Another node was faster.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            other => other.context("bind"),
        }
    }

    async fn report(&self, uid: &str, pod: &Pod) -> Result<()> {
        let (_, addresses) = self.running.get(uid).context("it runs")?;
        let status = status_of(pod, addresses, self.node.addresses.first());
        let shown = pod.status.as_ref().and_then(|s| s.pod_ip.clone());
        if shown == addresses.first().map(ToString::to_string) {
            return Ok(());
        }
        let patch = Patch::Merge(json!({ "status": status }));
        let params = PatchParams::default();
        self.api_of(pod)
            .patch_status(name_of(pod)?, &params, &patch)
            .await
            .context("report")?;
        Ok(())
    }

    /// A pod with a deletion timestamp goes when its kubelet deletes it without grace.
    async fn confirm_deletion(&self, uid: &str, pod: &Pod) -> Result<()> {
        let same = Preconditions {
            uid: Some(uid.to_owned()),
            ..Preconditions::default()
        };
        let now = DeleteParams::default().grace_period(0).preconditions(same);
        match self.api_of(pod).delete(name_of(pod)?, &now).await {
            // Gone, or already another pod of this name.
            Err(kube::Error::Api(status)) if [404, 409].contains(&status.code) => Ok(()),
            other => other.map(drop).context("confirm deletion"),
        }
    }

    fn end(&mut self, uid: &str) {
        if let Some((pod, _)) = self.running.remove(uid)
            && let Err(e) = self.runtime.stop(&pod)
        {
            let name = pod.metadata.name.unwrap_or_default();
            eprintln!("kubelet {}: stop {name}: {e:#}", self.node.name);
        }
    }

    fn api_of(&self, pod: &Pod) -> Api<Pod> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        Api::namespaced(self.client.clone(), namespace)
    }
}

fn status_of(pod: &Pod, addresses: &[IpAddr], host: Option<&IpAddr>) -> Value {
    let now = pod.metadata.creation_timestamp.clone();
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let conditions = [
        "PodScheduled",
        "PodReadyToStartContainers",
        "Initialized",
        "ContainersReady",
        "Ready",
    ];
    json!({
        "phase": "Running",
        "startTime": now,
        "hostIP": host,
        "podIP": addresses.first(),
        "podIPs": addresses.iter().map(|ip| json!({ "ip": ip })).collect::<Vec<_>>(),
        "conditions": conditions.map(|kind| json!({
            "type": kind, "status": "True", "lastTransitionTime": now,
        })),
        "containerStatuses": containers.map(|container| json!({
            "name": container.name,
            "image": container.image.as_deref().unwrap_or("none"),
            "imageID": "none",
            "ready": true,
            "started": true,
            "restartCount": 0,
            "state": { "running": { "startedAt": now } },
        })).collect::<Vec<_>>(),
    })
}

/// Registers and returns the pod ranges.
async fn register(node: &RegisteredNode) -> Result<Vec<String>> {
    let nodes: Api<Node> = Api::all(client(&node.kubeconfig).await?);
    let labels = json!({ HOSTNAME: node.name, "kubernetes.io/os": "linux" });
    let metadata = json!({ "name": node.name, "labels": labels });
    let object = serde_json::from_value(json!({ "metadata": metadata }))?;
    match nodes.create(&PostParams::default(), &object).await {
        Err(kube::Error::Api(status)) if status.code == 409 => {}
        other => drop(other.context("create the node")?),
    }
    let addresses = node
        .addresses
        .iter()
        .map(|a| json!({ "type": "InternalIP", "address": a }));
    let status = json!({ "status": {
        "addresses": addresses.collect::<Vec<_>>(),
        "capacity": { "cpu": "2", "memory": "4Gi", "pods": "250" },
        "allocatable": { "cpu": "2", "memory": "4Gi", "pods": "250" },
        "conditions": [{ "type": "Ready", "status": "True", "reason": "Played" }],
    }});
    nodes
        .patch_status(&node.name, &PatchParams::default(), &Patch::Merge(status))
        .await?;
    loop {
        let spec = nodes.get(&node.name).await?.spec.unwrap_or_default();
        match spec.pod_cidrs {
            Some(cidrs) if !cidrs.is_empty() => return Ok(cidrs),
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// A client for a kubeconfig. It must be used where the API server is reachable.
///
/// # Errors
/// The kubeconfig cannot be read.
pub async fn client(kubeconfig: &Path) -> Result<Client> {
    let read = kube::config::Kubeconfig::read_from(kubeconfig)?;
    let options = kube::config::KubeConfigOptions::default();
    let config = Config::from_custom_kubeconfig(read, &options).await?;
    Ok(Client::try_from(config)?)
}

fn uid(pod: &Pod) -> Uid {
    pod.metadata.uid.clone().unwrap_or_default()
}

fn name_of(pod: &Pod) -> Result<&str> {
    match pod.metadata.name.as_deref() {
        Some(name) => Ok(name),
        None => bail!("a pod without a name"),
    }
}
