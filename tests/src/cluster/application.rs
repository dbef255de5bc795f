//! An application on a cluster: a folder of manifests given to kubectl, with stand-ins for its programs,
//! and its pods where the scheduler puts them. Who may reach whom is in `matrix`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use weir_agent::model::{self, Object};
use weir_agent::watch::documents::{Parsed, parse};

use super::{Cluster, images, node::until, stand_in};
use crate::cache::progress;
use crate::kubectl::Kubectl;
use crate::targets::{self, ServiceKind, ServicePort};
use crate::workloads;

/// How long its pods may take to be ready, and the nodes to know them.
const READY: Duration = Duration::from_secs(120);
const SETTLE: Duration = Duration::from_secs(30);

/// A running application. It is deleted on drop.
#[derive(Debug)]
pub struct Application {
    kubectl: Kubectl,
    /// As they were applied.
    manifests: String,
    pub ports: Vec<ServicePort>,
    /// As the API server shows them.
    pub pods: Vec<model::Pod>,
}

impl Application {
    /// Applies what is below the folder and waits until all of its pods are ready and every node
    /// knows every backend.
    ///
    /// # Errors
    /// A manifest is refused, or it takes too long; the error shows the pods.
    pub fn run(cluster: &Cluster, folder: &Path) -> Result<Self> {
        let objects = workloads::objects(folder)?;
        let expected = workloads::expand(&objects)?;
        let count = expected.len();
        let image = images::agnhost(&cluster.programs.e2e)?;
        let items = stand_in::cast(objects.clone(), &image)?;
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": items });
        let mut application = Self {
            kubectl: cluster.kubectl(),
            manifests: list.to_string(),
            ports: Vec::new(),
            pods: Vec::new(),
        };
        let kubectl = &application.kubectl;
        let begin = Instant::now();
        // A namespace that is new has no account for pods yet.
        until("the application is applied", SETTLE, || {
            kubectl.apply(&application.manifests)
        })?;
        let namespaces: BTreeSet<&str> = expected.iter().map(|w| w.namespace.as_str()).collect();
        let pods = until("the application's pods", READY, || {
            ready_pods(kubectl, &namespaces, count)
        });
        let pods = pods.map_err(|why| {
            let seen = kubectl.run(&["get", "pods", "--all-namespaces", "--output=wide"]);
            why.context(seen.unwrap_or_else(|e| format!("{e:#}")))
        })?;
        application.ports = targets::service_ports(&objects, &pods);
        application.pods = pods;
        application.settle()?;
        progress(&format!(
            "{}: {count} pods in {:.1} s",
            folder.display(),
            begin.elapsed().as_secs_f64()
        ));
        Ok(application)
    }

    /// How many of its pods are on each node.
    #[must_use]
    pub fn spread(&self) -> BTreeMap<&str, usize> {
        let mut counts = BTreeMap::new();
        for node in self.pods.iter().filter_map(|pod| pod.node.as_deref()) {
            *counts.entry(node).or_default() += 1;
        }
        counts
    }

    pub(super) fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    /// Waits until the agent of every node has all backends of every Service.
    fn settle(&self) -> Result<()> {
        let of_weir = "--selector=app.kubernetes.io/name=weir";
        let agents = [
            "--namespace=kube-system",
            "get",
            "pods",
            of_weir,
            "--output=name",
        ];
        let agents = self.kubectl.run(&agents)?;
        for agent in agents.lines() {
            until(&format!("{agent} knows every backend"), SETTLE, || {
                let ask = [
                    "--namespace=kube-system",
                    "exec",
                    agent,
                    "--container=agent",
                    "--",
                ];
                let words = ["weir", "services", "--output=json"];
                let rows = self.kubectl.run(&[&ask[..], &words[..]].concat())?;
                let rows: Vec<Value> = serde_json::from_str(&rows).context("parse its answer")?;
                self.ports
                    .iter()
                    .try_for_each(|port| has_backends(&rows, port))
            })?;
        }
        Ok(())
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        let begin = Instant::now();
        let delete = ["delete", "--filename=-", "--ignore-not-found", "--wait"];
        match self.kubectl.run_with_input(&delete, &self.manifests) {
            Ok(_) => progress(&format!(
                "deleted in {:.1} s",
                begin.elapsed().as_secs_f64()
            )),
            Err(e) => eprintln!("delete the application: {e:#}"),
        }
    }
}

/// The pods of these namespaces, once there are so many and all are ready.
fn ready_pods(
    kubectl: &Kubectl,
    namespaces: &BTreeSet<&str>,
    count: usize,
) -> Result<Vec<model::Pod>> {
    let text = kubectl.run(&["get", "pods", "--all-namespaces", "--output=json"])?;
    let mut pods = Vec::new();
    for parsed in parse("pods", &text) {
        let Parsed::Ours(document) = parsed else {
            continue;
        };
        match document.outcome.map(|c| c.object) {
            Ok(Some(Object::Pod(pod))) if namespaces.contains(&*pod.id.namespace) => {
                pods.push((*pod).clone());
            }
            Ok(_) => {}
            Err(e) => bail!("{}: {e:?}", document.origin),
        }
    }
    let waiting = pods.iter().filter(|pod| !pod.ready);
    let waiting: Vec<String> = waiting.map(|pod| pod.id.to_string()).collect();
    if pods.len() != count || !waiting.is_empty() {
        bail!(
            "{} of {count} are there, not ready: {waiting:?}",
            pods.len()
        );
    }
    Ok(pods)
}

/// `rows` are what `weir services` lists.
fn has_backends(rows: &[Value], port: &ServicePort) -> Result<()> {
    if port.kind == ServiceKind::Headless {
        return Ok(());
    }
    let is_it = |row: &&Value| {
        row["service"] == port.id.to_string().as_str()
            && row["backends"].as_array().map(Vec::len) == Some(port.backends.len())
    };
    if !rows.iter().any(|row| is_it(&row)) {
        bail!("{port} has not {} backends", port.backends.len());
    }
    Ok(())
}
