//! An application on a node: a folder of manifests, its pods running, and what its policies should mean
//! for every pair of client and service port.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use weir_agent::model::{self, Object, ObjectName, TargetPort};
use weir_agent::watch::documents::{Parsed, parse};
use weir_common::Protocol;

use crate::node::{Family, Node, Pod};
use crate::oracle::{self, Cluster, Party, Who};
use crate::workloads::{self, Transport, Workload};

/// How long a refused connection is tried. A denial is silent, so this is what it costs.
const PATIENCE_SECONDS: &str = "1.5";

/// A running application.
#[derive(Debug)]
pub struct Application {
    pub pods: Vec<Pod>,
    pub objects: Vec<Value>,
}

/// A port of a Service, as a client names it.
#[derive(Clone, Debug, PartialEq)]
pub struct ServicePort {
    pub namespace: String,
    pub service: String,
    /// Host order.
    pub port: u16,
    /// Pods behind it, `namespace/name`, with the port that each serves.
    pub backends: Vec<(String, u16)>,
}

/// One cell: may the client reach the service, and did it?
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    pub client: String,
    pub target: String,
    pub expected: bool,
    pub reached: bool,
    /// What curl said.
    pub said: String,
}

impl Application {
    /// Puts the folder's manifests on the node and runs the pods that they ask for.
    ///
    /// # Errors
    /// A manifest is no YAML, or a pod does not start.
    pub fn start(node: &Node, folder: &Path) -> Result<Self> {
        Self::start_with(node, folder, |_| {})
    }

    /// As [`Self::start`], telling of each pod that runs.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(node: &Node, folder: &Path, mut started: impl FnMut(&Pod)) -> Result<Self> {
        let objects = workloads::objects(folder)?;
        copy_manifests(folder, &node.manifests())?;
        let mut pods = Vec::new();
        for workload in workloads::expand(&objects)? {
            let pod = node.run_pod(workload)?;
            started(&pod);
            pods.push(pod);
        }
        Ok(Self { pods, objects })
    }

    /// The pod of this name, `namespace/name`.
    ///
    /// # Errors
    /// There is none.
    pub fn pod(&self, id: &str) -> Result<&Pod> {
        let found = self.pods.iter().find(|p| p.workload.id() == id);
        found.with_context(|| format!("the application has no pod {id}"))
    }

    /// Every TCP port of every Service that selects pods of the application.
    pub fn service_ports(&self) -> Vec<ServicePort> {
        let mut found = Vec::new();
        for object in &self.objects {
            let Some(selector) = object["spec"]["selector"].as_object() else {
                continue;
            };
            if object["kind"] != "Service" || selector.is_empty() {
                continue;
            }
            let namespace = object["metadata"]["namespace"]
                .as_str()
                .unwrap_or("default");
            let selected = |w: &Workload| {
                w.namespace == namespace
                    && selector
                        .iter()
                        .all(|(k, v)| w.labels.get(k).map(String::as_str) == v.as_str())
            };
            for port in object["spec"]["ports"].as_array().into_iter().flatten() {
                if port["protocol"].as_str().unwrap_or("TCP") != "TCP" {
                    continue;
                }
                let number = port["port"].as_u64().and_then(|n| u16::try_from(n).ok());
                let Some(number) = number else { continue };
                // A headless Service does not translate ports.
                let headless = object["spec"]["clusterIP"] == "None";
                let target = match &port["targetPort"] {
                    Value::String(name) if !headless => TargetPort::Name(name.as_str().into()),
                    Value::Number(n) if !headless => TargetPort::Number(
                        n.as_u64()
                            .and_then(|n| u16::try_from(n).ok())
                            .unwrap_or(number),
                    ),
                    _ => TargetPort::Number(number),
                };
                let backends: Vec<_> = self
                    .pods
                    .iter()
                    .filter(|p| selected(&p.workload))
                    .filter_map(|p| Some((p.workload.id(), served(&p.workload, &target)?)))
                    .collect();
                found.push(ServicePort {
                    namespace: namespace.to_owned(),
                    service: object["metadata"]["name"]
                        .as_str()
                        .unwrap_or_default()
                        .to_owned(),
                    port: number,
                    backends,
                });
            }
        }
        found
    }

    /// Tries every pair of a client pod and a service port that has one answer, by name, and compares with
    /// what the naive reading of the policies says.
    ///
    /// # Errors
    /// A manifest cannot be read, or curl cannot be run.
    pub fn matrix(&self, folder: &Path) -> Result<Vec<Cell>> {
        let cluster = self.cluster(folder)?;
        let ports = self.service_ports();
        let mut cells = Vec::new();
        for client in &self.pods {
            let mut attempts = Vec::new();
            for target in &ports {
                if let Some(expected) = self.is_allowed(&cluster, client, target)? {
                    attempts.push((target, expected, connect(client, target)?));
                }
            }
            for (target, expected, child) in attempts {
                let output = child.wait_with_output().context("wait for curl")?;
                cells.push(Cell {
                    client: client.workload.id(),
                    target: format!("{}/{}:{}", target.namespace, target.service, target.port),
                    expected,
                    reached: output.status.success(),
                    said: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
                });
            }
        }
        Ok(cells)
    }

    /// None for a pod that is a backend of the service itself and may reach no other: it has two answers,
    /// since a pod may always reach itself. All other backends must agree.
    fn is_allowed(
        &self,
        cluster: &Cluster,
        client: &Pod,
        target: &ServicePort,
    ) -> Result<Option<bool>> {
        let from = party(cluster, client)?;
        let mut answers = Vec::new();
        for (backend, port) in &target.backends {
            let to = party(cluster, self.pod(backend)?)?;
            answers.push(oracle::allowed(cluster, &from, &to, Protocol::TCP, *port));
        }
        let is_backend = target
            .backends
            .iter()
            .any(|(backend, _)| *backend == client.workload.id());
        match (answers.contains(&true), answers.contains(&false)) {
            (true, true) if is_backend => Ok(None),
            (true, true) => bail!("the backends of {} differ in policy", target.service),
            (reachable, _) => Ok(Some(reachable)),
        }
    }

    /// The folder's objects as the oracle reads them, with the pods that run.
    fn cluster(&self, folder: &Path) -> Result<Cluster> {
        let mut namespaces: BTreeMap<String, model::Namespace> = BTreeMap::new();
        let mut policies = Vec::new();
        for (path, text) in texts(folder)? {
            for parsed in parse(&path, &text) {
                let Parsed::Ours(document) = parsed else {
                    continue;
                };
                match document.outcome.map(|c| c.object) {
                    Ok(Some(Object::Namespace(n))) => {
                        namespaces.insert(n.name.to_string(), (*n).clone());
                    }
                    Ok(Some(Object::Policy(p))) => policies.push((*p).clone()),
                    Ok(_) => {}
                    Err(e) => bail!("{path}: {e:?}"),
                }
            }
        }
        let pods: Vec<_> = self.pods.iter().map(model_pod).collect();
        for pod in &pods {
            let name = pod.id.namespace.to_string();
            let namespace = namespaces
                .entry(name.clone())
                .or_insert_with(|| model::Namespace {
                    name: name.as_str().into(),
                    labels: BTreeMap::new(),
                    phase: model::NamespacePhase::Active,
                });
            // Every namespace of a real API has it.
            namespace
                .labels
                .insert("kubernetes.io/metadata.name".into(), name.as_str().into());
        }
        Ok(Cluster {
            namespaces: namespaces.into_values().collect(),
            pods,
            policies,
        })
    }
}

/// Copies a folder's objects into one flat folder, keeping each file's path in the name. Its pods are
/// left out: they get their objects, bound to the node, when they run.
///
/// # Errors
/// A file cannot be read or written, or is no YAML.
pub fn copy_manifests(from: &Path, to: &Path) -> Result<()> {
    for (path, text) in texts(from)? {
        let documents: Vec<Value> =
            serde_saphyr::from_multiple(&text).with_context(|| format!("parse {path}"))?;
        // JSON is YAML too.
        let kept: Vec<String> = documents
            .iter()
            .filter(|d| !d.is_null() && d["kind"] != "Pod")
            .map(ToString::to_string)
            .collect();
        fs::write(to.join(path.replace('/', "_")), kept.join("\n---\n"))?;
    }
    Ok(())
}

fn texts(folder: &Path) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(at) = folders.pop() {
        for entry in fs::read_dir(&at).with_context(|| format!("read {}", at.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "yaml" || e == "yml") {
                let name = path.strip_prefix(folder)?.display().to_string();
                found.push((name, fs::read_to_string(&path)?));
            }
        }
    }
    found.sort();
    Ok(found)
}

fn connect(client: &Pod, target: &ServicePort) -> Result<Child> {
    let host = if client.workload.namespace == target.namespace {
        target.service.clone()
    } else {
        format!("{}.{}", target.service, target.namespace)
    };
    client
        .command("curl")
        .args(["-sS", "-o", "/dev/null", "--max-time", PATIENCE_SECONDS])
        .arg(format!("http://{host}:{}/", target.port))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("start curl")
}

fn served(workload: &Workload, target: &TargetPort) -> Option<u16> {
    let mut tcp = workload
        .ports
        .iter()
        .filter(|p| p.transport == Transport::Tcp);
    match target {
        TargetPort::Number(n) => tcp.find(|p| p.number == *n).map(|p| p.number),
        TargetPort::Name(name) => tcp
            .find(|p| p.name.as_deref() == Some(name))
            .map(|p| p.number),
    }
}

fn party(cluster: &Cluster, pod: &Pod) -> Result<Party> {
    let id = ObjectName::new(pod.workload.namespace.as_str(), pod.workload.name.as_str());
    let known = cluster
        .pods
        .iter()
        .find(|p| p.id == id)
        .context("every pod is in the cluster")?;
    Ok(Party {
        address: pod.address(Family::V4)?,
        is: Who::Pod(known.clone()),
    })
}

fn model_pod(pod: &Pod) -> model::Pod {
    let Workload {
        namespace,
        name,
        labels,
        ..
    } = &pod.workload;
    model::Pod {
        id: ObjectName::new(namespace.as_str(), name.as_str()),
        uid: "".into(),
        labels: labels
            .iter()
            .map(|(k, v)| (k.as_str().into(), v.as_str().into()))
            .collect(),
        node: Some("n1".into()),
        addresses: pod.addresses.clone(),
        network: model::PodNetwork::Own,
        phase: model::PodPhase::Running,
        ready: true,
        hostname: None,
        subdomain: None,
        ports: pod
            .workload
            .ports
            .iter()
            .map(|p| model::ContainerPort {
                name: p.name.as_deref().map(Into::into),
                protocol: match p.transport {
                    Transport::Tcp => Protocol::TCP,
                    Transport::Udp => Protocol::UDP,
                },
                port: p.number,
                host: None,
            })
            .collect(),
    }
}

/// How long an application may take to be programmed.
pub const SETTLE: Duration = Duration::from_secs(10);

/// Waits until every service port with backends is programmed with all of them.
///
/// # Errors
/// It took longer than [`SETTLE`].
pub fn settle(node: &Node, application: &Application) -> Result<()> {
    for target in application.service_ports() {
        let headless = application.objects.iter().any(|o| {
            o["kind"] == "Service"
                && o["metadata"]["name"] == target.service.as_str()
                && o["spec"]["clusterIP"] == "None"
        });
        if !headless {
            let id = format!("{}/{}", target.namespace, target.service);
            node.wait_for_service(&id, target.backends.len(), SETTLE)?;
        }
    }
    Ok(())
}
