//! A folder of manifests as a cluster, without one: what a pipeline has. What is expected of it is in `expect`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use ipnet::IpNet;
use serde_json::Value;

use super::warning;
use super::workload::{Workloads, has_network_of_node, is_workload};
use crate::compile::policy::NodeView;
use crate::config::DNS_ADDRESSES;
use crate::model::{Kind, Object, ObjectId, ObjectName, Pod, PodNetwork, Snapshot};
use crate::watch::Surroundings;
use crate::watch::controllers::{Assigned, PodLeases, derive};
use crate::watch::documents::{Document, ForeignKind, Origin, Parsed, parse, written};
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
    /// What is no part of it, though its author may think so.
    pub(crate) warnings: Vec<String>,
    pub(super) workloads: Workloads,
}

impl Folder {
    /// Reads everything.
    ///
    /// # Errors
    /// All that is wrong, one line each, with the file and the place in it. Nothing that is not understood is left out.
    pub(crate) fn read(path: &Path) -> Result<Self, Vec<String>> {
        let mut folder = Self::default();
        let mut wrong = Vec::new();
        let mut workloads = Vec::new();
        let mut policies = Vec::new();
        for (path, text) in &texts(path)? {
            let mut nameless = BTreeSet::new();
            for (origin, value) in written(path, text) {
                let text = |field: &str| value.get(field).and_then(Value::as_str);
                let kind = ForeignKind {
                    api_version: text("apiVersion").unwrap_or_default().to_owned(),
                    kind: text("kind").unwrap_or_default().to_owned(),
                };
                let has_pods = is_workload(&kind.kind);
                if warning::is_policy_of_ours(&kind) {
                    policies.push((origin.clone(), kind.clone()));
                }
                match kind.kind.as_str() {
                    "PolicyTest" => folder.tests.push((origin, value)),
                    "Pod" if has_no_name(&value) => {
                        folder.warnings.push(nameless_words(&origin, &kind.kind));
                        nameless.insert(origin);
                    }
                    _ if has_pods && has_no_name(&value) => {
                        folder.warnings.push(nameless_words(&origin, &kind.kind));
                    }
                    _ if has_pods => workloads.push((origin, value)),
                    _ => {}
                }
            }
            for parsed in parse(path, text) {
                match parsed {
                    Parsed::Ours(document) if nameless.contains(&document.origin) => {}
                    Parsed::Ours(document) => folder.documents.push(document),
                    Parsed::Foreign(kind) => {
                        folder.not_read.insert(kind);
                    }
                }
            }
        }
        for (origin, kind) in policies {
            if folder.not_read.contains(&kind) {
                let ForeignKind { api_version, kind } = kind;
                wrong.push(format!(
                    "{origin}: {kind} of {api_version} is not read: it is no version of a policy that is understood"
                ));
            }
        }
        folder
            .not_read
            .retain(|it| it.kind != "PolicyTest" && !is_workload(&it.kind));
        folder.workloads = Workloads::of(&workloads, &mut folder.documents, &mut folder.warnings);
        folder
            .warnings
            .extend(warning::of_foreign(&folder.not_read));
        let of_nodes: Vec<String> = folder
            .objects()
            .filter(|it| has_network_of_node(it))
            .map(|it| it.id().name.to_string())
            .collect();
        if !of_nodes.is_empty() {
            folder.warnings.push(format!(
                "in the network of their nodes, where no policy selects them: {}",
                of_nodes.join(", ")
            ));
        }
        let (_, reports) = last_good::Folder::default().next(&folder.documents);
        let reports = reports.into_iter();
        wrong.extend(reports.map(|(of, why)| format!("{of}: {why}")));
        match wrong.is_empty() {
            true => Ok(folder),
            false => Err(wrong),
        }
    }

    /// Only these objects, as they are written.
    pub(crate) fn objects(&self) -> impl Iterator<Item = &Object> {
        let converted = self.documents.iter();
        converted.filter_map(|it| it.outcome.as_ref().ok()?.object.as_ref())
    }

    /// The cluster that they make: pods without an address have one from these ranges, and run. Of a namespace that is not written only the
    /// name is known. What should be known beside it, in words.
    ///
    /// # Errors
    /// A range is too small.
    pub(crate) fn cluster(&self, pod_cidrs: &[IpNet]) -> Result<(Snapshot, Vec<String>), String> {
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
        let written: BTreeSet<ObjectId> = self.objects().map(Object::id).collect();
        snapshot.namespaces.retain(|name, _| {
            written.contains(&ObjectId {
                kind: Kind::Namespace,
                name: ObjectName::cluster(name.clone()),
            })
        });
        let mut warnings = self.warnings.clone();
        let reports = derived.reports.into_iter();
        warnings.extend(reports.map(|(of, why)| format!("{of}: {why}")));
        warnings.extend(warning::of_namespaces(&snapshot));
        let together = warning::together(&snapshot, &node().dns);
        warnings.extend(warning::of_policies(self.objects(), &together));
        warnings.extend(warning::of_addresses(&together));
        Ok((snapshot, warnings))
    }
}

/// The node of a folder. It answers DNS where a node does that is told nothing else.
pub(super) fn node() -> NodeView {
    let dns: Vec<IpAddr> = DNS_ADDRESSES
        .iter()
        .filter_map(|it| it.parse().ok())
        .collect();
    NodeView {
        name: NODE.into(),
        addresses: dns.clone(),
        dns,
    }
}

/// Would the API server make its name up?
fn has_no_name(value: &Value) -> bool {
    let has = |field: &str| {
        let text = value.pointer(field).and_then(Value::as_str);
        text.is_some_and(|it| !it.is_empty())
    };
    has("/metadata/generateName") && !has("/metadata/name")
}

fn nameless_words(origin: &Origin, kind: &str) -> String {
    format!(
        "{origin}: the {kind} has no name to ask for it by, only a generateName: it is left out"
    )
}
