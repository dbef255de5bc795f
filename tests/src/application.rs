//! An application on a node: a folder of manifests, its pods running, and what its policies should mean
//! for every pair of client and service port.

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use weir_agent::model::{self, ObjectName};
use weir_common::Protocol;

use crate::node::{Node, Pod};
use crate::targets::{self, ServiceKind, ServicePort, texts};
use crate::workloads::{self, Transport};

/// How long a refused connection is tried. A denial is silent, so this is what it costs.
const PATIENCE_SECONDS: &str = "1.5";

/// A running application.
#[derive(Debug)]
pub struct Application {
    pub pods: Vec<Pod>,
    pub objects: Vec<Value>,
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
        let pods: Vec<_> = self.pods.iter().map(model_pod).collect();
        let mut ports = targets::service_ports(&self.objects, &pods);
        ports.retain(|port| port.protocol == Protocol::TCP);
        ports
    }

    /// Tries every pair of a client pod and a service port that has one answer, by name, and compares with
    /// what the naive reading of the policies says.
    ///
    /// # Errors
    /// A manifest cannot be read, or curl cannot be run.
    pub fn matrix(&self, folder: &Path) -> Result<Vec<Cell>> {
        let pods = self.pods.iter().map(model_pod).collect();
        let cluster = targets::cluster(folder, pods)?;
        let ports = self.service_ports();
        let mut cells = Vec::new();
        for client in &self.pods {
            let mut attempts = Vec::new();
            let id = id_of(client);
            for target in &ports {
                if let Some(expected) = targets::is_allowed(&cluster, &id, target)? {
                    attempts.push((target, expected, connect(client, target)?));
                }
            }
            for (target, expected, child) in attempts {
                let output = child.wait_with_output().context("wait for curl")?;
                cells.push(Cell {
                    client: client.workload.id(),
                    target: target.to_string(),
                    expected,
                    reached: output.status.success(),
                    said: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
                });
            }
        }
        Ok(cells)
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

fn connect(client: &Pod, target: &ServicePort) -> Result<Child> {
    let host = target.name_in(&client.workload.namespace);
    client
        .command("curl")
        .args(["-sS", "-o", "/dev/null", "--max-time", PATIENCE_SECONDS])
        .arg(format!("http://{host}:{}/", target.port))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("start curl")
}

fn id_of(pod: &Pod) -> ObjectName {
    ObjectName::new(pod.workload.namespace.as_str(), pod.workload.name.as_str())
}

fn model_pod(pod: &Pod) -> model::Pod {
    model::Pod {
        id: id_of(pod),
        uid: "".into(),
        static_uid: None,
        labels: pod
            .workload
            .labels
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
        if target.kind == ServiceKind::ClusterIp {
            let id = target.id.to_string();
            node.wait_for_service(&id, target.backends.len(), SETTLE)?;
        }
    }
    Ok(())
}
