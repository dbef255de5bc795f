//! Workloads of a folder, and the pods that stand for them. Nothing makes pods of them here, so each is one pod of its own name, or two
//! where it says that it has more: what is said of a pod and itself is not true of two of a workload.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::{Value, json};

use crate::model::{Kind, Object, ObjectName, Pod, PodNetwork};
use crate::watch::documents::{Document, Origin, object};

/// Kinds that have pods, and where these are described. Of several of one name the first in this order is called by the name alone.
const KINDS: [(&str, &str); 7] = [
    ("Deployment", "/spec/template"),
    ("StatefulSet", "/spec/template"),
    ("DaemonSet", "/spec/template"),
    ("ReplicaSet", "/spec/template"),
    ("ReplicationController", "/spec/template"),
    ("Job", "/spec/template"),
    ("CronJob", "/spec/jobTemplate/spec/template"),
];
/// Behind the name of a workload, which cannot have it: its second pod.
const SECOND: &str = "#2";

/// Who stands for whom.
#[derive(Clone, Debug, Default)]
pub(super) struct Workloads {
    /// Those that a name alone may mean, as `kubectl` writes them, by it; and each one's pod.
    called: BTreeMap<ObjectName, BTreeMap<&'static str, ObjectName>>,
    /// The second pod of a workload, by the first.
    seconds: BTreeMap<ObjectName, ObjectName>,
}

/// Is it a kind that has pods?
pub(super) fn is_workload(kind: &str) -> bool {
    place(kind).is_some()
}

/// Its place among the kinds.
fn place(kind: &str) -> Option<usize> {
    KINDS.iter().position(|(known, _)| *known == kind)
}

/// As it is written in a question.
fn spelled(kind: &str) -> Option<&'static str> {
    const SPELLED: [&str; 7] = [
        "deployment",
        "statefulset",
        "daemonset",
        "replicaset",
        "replicationcontroller",
        "job",
        "cronjob",
    ];
    let kind = kind.to_ascii_lowercase();
    let is_it = |it: &&&str| **it == kind || kind.strip_suffix('s') == Some(**it);
    SPELLED.iter().find(is_it).copied()
}

impl Workloads {
    /// The pods of workloads, beside those that are written as pods, into `documents`. What has none is a warning.
    pub(super) fn of(
        written: &[(Origin, Value)],
        documents: &mut Vec<Document>,
        warnings: &mut Vec<String>,
    ) -> Self {
        let mut all = Self::default();
        let mut taken: BTreeSet<ObjectName> = BTreeSet::new();
        for id in documents.iter().filter_map(|it| it.id.as_ref()) {
            if id.kind == Kind::Pod {
                taken.insert(id.name.clone());
                let meant = all.called.entry(id.name.clone()).or_default();
                meant.insert("pod", id.name.clone());
            }
        }
        let mut workloads: Vec<(usize, &Origin, &Value)> = written
            .iter()
            .filter_map(|(origin, value)| {
                let kind = value.get("kind").and_then(Value::as_str)?;
                Some((place(kind)?, origin, value))
            })
            .collect();
        workloads.sort_by_key(|(place, origin, _)| (*place, *origin));
        for (place, origin, value) in workloads {
            let (kind, template) = KINDS[place];
            let Some(pod) = pod_of(template, value) else {
                warnings.push(format!(
                    "{origin}: the {kind} describes no pods in {template}"
                ));
                continue;
            };
            let mut document = object(origin.clone(), Kind::Pod, pod);
            if let Some(name) = document.id.as_ref().map(|it| it.name.clone())
                && let Some(kind) = spelled(kind)
            {
                let meant = all.called.entry(name.clone()).or_default();
                // Twice the same is for the folder to refuse.
                if !meant.contains_key(kind) && !taken.insert(name.clone()) {
                    let other = format!("{}@{kind}", name.name);
                    rename(
                        &mut document,
                        ObjectName::new(name.namespace.clone(), other),
                    );
                }
                if let Some(id) = &document.id {
                    meant.insert(kind, id.name.clone());
                }
                if is_many(kind, value) {
                    documents.extend(all.second(&document));
                }
            }
            documents.push(document);
        }
        all
    }

    /// A question as it would be asked of pods: `KIND/NAMESPACE/NAME` is the pod that stands for it.
    ///
    /// # Errors
    /// There is none, or it is not clear which.
    pub(super) fn asked(&self, text: &str) -> Result<String, String> {
        let (kind, rest) = match text.split_once('/') {
            Some((kind, rest)) if spelled(kind).is_some() && rest.contains('/') => {
                (spelled(kind), rest)
            }
            _ => (None, text),
        };
        let Some((namespace, tail)) = rest.split_once('/') else {
            return Ok(text.to_owned());
        };
        let (name, more) = tail.split_at(tail.find([':', '/']).unwrap_or(tail.len()));
        let id = ObjectName::new(namespace, name);
        let meant = self.called.get(&id);
        match kind {
            // `job/web/icmp` is of a pod in a namespace of that name.
            Some(_) if namespace.contains(':') || name == "icmp" => Ok(text.to_owned()),
            Some(kind) => match meant.and_then(|it| it.get(kind)) {
                Some(pod) => Ok(format!("{pod}{more}")),
                None => Err(format!("there is no {kind} {id}")),
            },
            None => match meant {
                Some(meant) if meant.len() > 1 => {
                    let all: Vec<String> =
                        meant.keys().map(|kind| format!("{kind}/{id}")).collect();
                    Err(format!("{id} may be each of {}", all.join(", ")))
                }
                _ => Ok(text.to_owned()),
            },
        }
    }

    /// Another pod of the workload that this one stands for, if it has more than one.
    pub(super) fn another(&self, pod: &ObjectName) -> Option<&ObjectName> {
        self.seconds.get(pod)
    }

    /// Its other pod.
    fn second(&mut self, first: &Document) -> Option<Document> {
        let name = &first.id.as_ref()?.name;
        let converted = first.outcome.as_ref().ok()?;
        if !converted.problems.is_empty() || has_network_of_node(converted.object.as_ref()?) {
            return None;
        }
        let other = ObjectName::new(name.namespace.clone(), format!("{}{SECOND}", name.name));
        self.seconds.insert(name.clone(), other.clone());
        let mut document = first.clone();
        rename(&mut document, other);
        Some(document)
    }
}

/// Is it a pod in the network of its node?
pub(super) fn has_network_of_node(object: &Object) -> bool {
    matches!(object, Object::Pod(pod) if pod.network == PodNetwork::Host)
}

/// The pod of a workload, with the workload's name.
fn pod_of(template: &str, value: &Value) -> Option<Value> {
    let template = value.pointer(template)?;
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

/// Does it say that it has more than one pod at a time?
fn is_many(kind: &str, value: &Value) -> bool {
    let number = match kind {
        "daemonset" => return true,
        "job" => "/spec/parallelism",
        "cronjob" => "/spec/jobTemplate/spec/parallelism",
        _ => "/spec/replicas",
    };
    let number = value.pointer(number).and_then(Value::as_u64);
    number.is_some_and(|it| it > 1)
}

fn rename(document: &mut Document, name: ObjectName) {
    if let Some(id) = &mut document.id {
        id.name = name.clone();
    }
    if let Ok(converted) = &mut document.outcome
        && let Some(Object::Pod(pod)) = &mut converted.object
    {
        *pod = Arc::new(Pod {
            id: name,
            ..Pod::clone(pod)
        });
    }
}
