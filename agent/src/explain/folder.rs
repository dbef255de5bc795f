//! A folder of manifests as a cluster, without one: what a pipeline has. What is expected of it is in `expect`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use ipnet::IpNet;
use serde_json::{Value, json};

use crate::model::{Kind, Object, ObjectName, Pod, PodNetwork, Snapshot};
use crate::watch::Surroundings;
use crate::watch::controllers::{Assigned, PodLeases, derive};
use crate::watch::documents::{Document, ForeignKind, Origin, Parsed, object, parse, written};
use crate::watch::last_good;
use crate::watch::manifests::texts;

/// The node of pods that name none.
pub(crate) const NODE: &str = "folder";
/// Where pods get addresses when nobody says where: what kubeadm and kind give by default, of each family.
const POD_CIDRS: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/56"];
/// The same of Services without a cluster IP.
const SERVICE_CIDRS: [&str; 2] = ["10.96.0.0/16", "fd00:10:96::/112"];

/// What is written in a folder.
#[derive(Clone, Debug, Default)]
pub(crate) struct Folder {
    documents: Vec<Document>,
    /// Documents of the kind that `expect` reads.
    pub(crate) tests: Vec<(Origin, Value)>,
    /// Kinds that have no part in it.
    pub(crate) not_read: BTreeSet<ForeignKind>,
}

impl Folder {
    /// Reads everything.
    ///
    /// # Errors
    /// All that is wrong, one line each, with the file and the place in it. Nothing that is not understood is left out.
    pub(crate) fn read(path: &Path) -> Result<Self, Vec<String>> {
        let mut folder = Self::default();
        for (path, text) in &texts(path)? {
            for parsed in parse(path, text) {
                match parsed {
                    Parsed::Ours(document) => folder.documents.push(document),
                    Parsed::Foreign(kind) => {
                        folder.not_read.insert(kind);
                    }
                }
            }
            for (origin, value) in written(path, text) {
                match value.get("kind").and_then(Value::as_str) {
                    Some("PolicyTest") => folder.tests.push((origin, value)),
                    Some(kind) => {
                        if let Some(pod) = pod_of(kind, &value) {
                            let document = object(origin, Kind::Pod, pod);
                            folder.documents.push(document);
                        }
                    }
                    None => {}
                }
            }
        }
        folder
            .not_read
            .retain(|it| it.kind != "PolicyTest" && template(&it.kind).is_none());
        let (_, reports) = last_good::Folder::default().next(&folder.documents);
        match reports.is_empty() {
            true => Ok(folder),
            false => Err(reports
                .into_iter()
                .map(|(of, why)| format!("{of}: {why}"))
                .collect()),
        }
    }

    /// Only these objects, as they are written.
    pub(crate) fn objects(&self) -> impl Iterator<Item = &Object> {
        let converted = self.documents.iter();
        converted.filter_map(|it| it.outcome.as_ref().ok()?.object.as_ref())
    }

    /// The cluster that they make: pods without an address have one from these ranges, and run.
    ///
    /// # Errors
    /// A range is too small.
    pub(crate) fn cluster(&self, pod_cidrs: &[IpNet]) -> Result<Snapshot, String> {
        let nets = |all: &[&str]| -> Vec<IpNet> {
            all.iter().filter_map(|net| net.parse().ok()).collect()
        };
        let ranges = match pod_cidrs {
            [] => nets(&POD_CIDRS),
            ranges => ranges.to_vec(),
        };
        let (folder, _) = last_good::Folder::default().next(&self.documents);
        let surroundings = Surroundings {
            node: NODE.into(),
            service_cidrs: nets(&SERVICE_CIDRS),
        };
        let pods = self.objects().filter_map(|object| match object {
            Object::Pod(pod) => Some(pod),
            _ => None,
        });
        let pods: BTreeMap<&ObjectName, &Arc<Pod>> = pods.map(|pod| (&pod.id, pod)).collect();
        let taken: BTreeSet<IpAddr> = pods
            .values()
            .flat_map(|it| &it.addresses)
            .copied()
            .collect();
        let mut free: Vec<_> = ranges
            .iter()
            .map(|range| range.hosts().filter(|ip| !taken.contains(ip)))
            .collect();
        let mut leases = PodLeases::new();
        for (name, pod) in pods {
            if pod.network == PodNetwork::Own && pod.addresses.is_empty() {
                let given: Option<Vec<IpAddr>> = free.iter_mut().map(Iterator::next).collect();
                let given =
                    given.ok_or_else(|| format!("podCIDRs: none is left for pod {name}"))?;
                leases.insert(name.clone(), given);
            }
        }
        let derived = derive(
            &folder.manifests(),
            &leases,
            &surroundings,
            &Assigned::new(),
        );
        let mut snapshot = Snapshot::default();
        for object in derived.objects.into_values() {
            snapshot.apply(match object {
                Object::Pod(pod) if pod.node.is_none() => Object::Pod(Arc::new(Pod {
                    node: Some(NODE.into()),
                    ..Pod::clone(&pod)
                })),
                other => other,
            });
        }
        Ok(snapshot)
    }
}

/// Where the pods of a workload are described.
fn template(kind: &str) -> Option<&'static str> {
    match kind {
        "Deployment"
        | "StatefulSet"
        | "DaemonSet"
        | "ReplicaSet"
        | "ReplicationController"
        | "Job" => Some("/spec/template"),
        "CronJob" => Some("/spec/jobTemplate/spec/template"),
        _ => None,
    }
}

/// One pod of a workload, with the workload's name.
fn pod_of(kind: &str, value: &Value) -> Option<Value> {
    let template = value.pointer(template(kind)?)?;
    let of_workload = |field: &str| value.pointer(&format!("/metadata/{field}")).cloned();
    Some(json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": of_workload("name"),
            "namespace": of_workload("namespace"),
            "labels": template.pointer("/metadata/labels"),
        },
        "spec": template.get("spec"),
    }))
}
